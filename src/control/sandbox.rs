//! What the process can do no more once it serves (`sandbox = "on"`): Landlock leaves it the folders that the configuration names, seccomp takes the
//! system calls that only an intruder would make. Both last as long as the process, for all its threads.

use std::{
    collections::BTreeSet,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use super::config::Config;
use crate::model::site::Symlinks;

/// What anything on Linux reads: names, times, certificates, what it is told of itself.
const SYSTEM: &[&str] = &[
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/localtime",
    "/etc/ssl",
    "/etc/pki",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
    "/usr/lib",
    "/lib",
    "/lib64",
    "/proc",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
    "/var/run/secrets/kubernetes.io",
];
/// Streams that are opened by name.
const DEVICES: &[&str] = &["/dev/null", "/dev/stdout", "/dev/stderr", "/dev/urandom", "/dev/random", "/dev/termination-log"];

/// System calls that no proxy makes: to run or look into other programs, to change the machine, to load code into the kernel.
const NEVER: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_pidfd_getfd,
    libc::SYS_io_uring_setup,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_open_by_handle_at,
    libc::SYS_personality,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
];

/// The folders that a configuration needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Folders {
    read: BTreeSet<PathBuf>,
    write: BTreeSet<PathBuf>,
}

impl Folders {
    pub fn of(config: &Config) -> Folders {
        let settings = &config.settings;
        let mut folders = Folders::default();
        for file in &config.files {
            folders.read_beside(file);
        }
        for certificate in &settings.certificates {
            folders.read_beside(&certificate.certificate);
            folders.read_beside(&certificate.key);
        }
        for keys in &settings.listen.tls_ticket_keys {
            folders.read_beside(keys);
        }
        if let Some(kubeconfig) = settings.kubernetes.as_ref().and_then(|kubernetes| kubernetes.kubeconfig.as_ref()) {
            folders.read_beside(kubeconfig);
        }
        for site in config.all_sites() {
            folders.read_root(site.root.as_deref());
            if let Symlinks::Folders(all) = &site.symlinks {
                all.iter().for_each(|folder| folders.read_folder(folder));
            }
            for route in site.routes().chain([&site.default_route]) {
                if let Some(auth) = &route.basic_auth {
                    folders.read_beside(&auth.file);
                }
                if let Some(flag) = route.maintenance.as_ref().and_then(|maintenance| maintenance.flag.as_ref()) {
                    folders.read_beside(&flag.file);
                }
            }
        }
        for set in config.upstreams.values().flat_map(|upstream| &upstream.sets) {
            folders.read_root(set.root.as_deref());
        }
        add(&mut folders.write, Some(&settings.buffer.dir));
        folders.write_beside(&settings.listen.admin);
        let written = [settings.state.as_deref(), settings.drain.receipt.as_deref(), Some(Path::new(&*settings.log.access_file))];
        for file in written.into_iter().flatten().filter(|file| file.is_absolute()) {
            folders.write_beside(file);
        }
        folders
    }

    /// A file, and whatever takes its place: it is replaced, not rewritten. Where it is a link, also what lies beside its target: the next certificate.
    fn read_beside(&mut self, file: &Path) {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.read_folder(folder);
        if let Ok(target) = file.canonicalize() {
            add(&mut self.read, target.parent());
        }
    }

    /// Not in /dev: the streams there have rules of their own.
    fn write_beside(&mut self, file: &Path) {
        add(&mut self.write, file.parent().filter(|folder| !folder.starts_with("/dev")));
    }

    /// A folder and its neighbours: the next release may be one of them.
    fn read_root(&mut self, folder: Option<&Path>) {
        if let Some(folder) = folder {
            self.read_folder(folder);
            add(&mut self.read, folder.parent());
        }
    }

    /// A folder; wherever a link is in its path, also what lies beside that one's target.
    fn read_folder(&mut self, folder: &Path) {
        add(&mut self.read, Some(folder));
        for link in folder.ancestors().filter(|ancestor| ancestor.is_symlink()) {
            if let Ok(target) = link.canonicalize() {
                add(&mut self.read, target.parent());
                add(&mut self.read, Some(&target));
            }
        }
    }

    /// What `self` has and `other` has not, nor a folder around it.
    pub fn beyond(&self, other: &Folders) -> Vec<PathBuf> {
        let within = |folder: &Path, all: &BTreeSet<PathBuf>| all.iter().any(|known| folder.starts_with(known));
        let read = self.read.iter().filter(|folder| !within(folder, &other.read) && !within(folder, &other.write));
        read.chain(self.write.iter().filter(|folder| !within(folder, &other.write))).cloned().collect()
    }
}

/// A rule is for a folder that is there: for one that is not yet the next one above it, but never for everything.
fn add(all: &mut BTreeSet<PathBuf>, folder: Option<&Path>) {
    let there = folder.into_iter().flat_map(Path::ancestors).find(|folder| folder.is_dir());
    all.extend(there.filter(|folder| folder.parent().is_some()).map(Path::to_owned));
}

/// For this thread and those that it starts from now on, in the folders of `config`. Gives those, and how far the kernel goes along, in words.
///
/// # Errors
/// It could have been confined, and was not.
pub fn enter(config: &Config) -> Result<(Folders, String), String> {
    // The socket's is made at the start, by which it would not be there yet; one that cannot be made is said where it is bound.
    let _ = config.settings.listen.admin.parent().map(std::fs::create_dir_all);
    let folders = Folders::of(config);
    let by = confine(&folders)?;
    Ok((folders, by))
}

fn confine(folders: &Folders) -> Result<String, String> {
    // The newest that this knows; an older kernel does what it can.
    let abi = ABI::V5;
    let wrong = |error: &dyn std::fmt::Display| format!("sandbox: Landlock: {error}");
    let reads = AccessFs::ReadFile | AccessFs::ReadDir;
    // A pipe or socket has no rule, and needs none.
    let is_ruled = |path: &&&str| std::fs::metadata(path).is_ok_and(|of| of.is_file() || of.file_type().is_char_device());
    let devices = DEVICES.iter().filter(is_ruled);
    let read = folders.read.iter().map(PathBuf::as_path).chain(SYSTEM.iter().map(Path::new));
    let enforced = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rules(path_beneath_rules(read, reads)))
        .and_then(|rules| rules.add_rules(path_beneath_rules(devices, reads | AccessFs::WriteFile)))
        .and_then(|rules| rules.add_rules(path_beneath_rules(&folders.write, AccessFs::from_all(abi))))
        .and_then(|rules| rules.restrict_self())
        .map_err(|error| wrong(&error))?;
    let landlock = match enforced.ruleset {
        RulesetStatus::FullyEnforced => "Landlock",
        RulesetStatus::PartiallyEnforced => "Landlock as far as this kernel has it",
        RulesetStatus::NotEnforced => "no Landlock, which this kernel does not have",
    };
    let wrong = |error: &dyn std::fmt::Display| format!("sandbox: seccomp: {error}");
    let architecture = std::env::consts::ARCH.try_into().map_err(|error| wrong(&error))?;
    let rules = NEVER.iter().map(|call| (*call, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture).map_err(|error| wrong(&error))?;
    let program: BpfProgram = filter.try_into().map_err(|error| wrong(&error))?;
    seccompiler::apply_filter(&program).map_err(|error| wrong(&error))?;
    Ok(format!("{landlock}; seccomp"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(read: &[&str], write: &[&str]) -> Folders {
        let all = |paths: &[&str]| paths.iter().map(PathBuf::from).collect();
        Folders { read: all(read), write: all(write) }
    }

    #[test]
    fn a_folder_within_a_known_one_is_not_beyond_it() {
        let known = folders(&["/srv/shop", "/etc/slackwater"], &["/var/tmp"]);
        assert_eq!(folders(&["/srv/shop/public", "/var/tmp/x"], &["/var/tmp"]).beyond(&known), Vec::<PathBuf>::new());
        let beyond = folders(&["/srv/shop2", "/srv"], &["/srv/shop"]).beyond(&known);
        assert_eq!(beyond, ["/srv", "/srv/shop2", "/srv/shop"].map(PathBuf::from));
    }
}
