//! Child processes that do not outlive the test, however it ends.
//!
//! All are started by one thread that lives as long as the process: PR_SET_PDEATHSIG fires when the *thread* that
//! forked ends, and a test's own thread may end before the handle is dropped.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};

enum Order {
    Start(Command, SyncSender<io::Result<Child>>),
    Run(Box<dyn FnOnce() + Send>, SyncSender<()>),
}

fn starter() -> &'static SyncSender<Order> {
    static STARTER: OnceLock<SyncSender<Order>> = OnceLock::new();
    STARTER.get_or_init(|| {
        let (orders, received) = sync_channel::<Order>(16);
        std::thread::spawn(move || {
            for order in received {
                match order {
                    Order::Start(mut command, reply) => drop(reply.send(command.spawn())),
                    Order::Run(what, done) => {
                        what();
                        let _ = done.send(());
                    }
                }
            }
        });
        orders
    })
}

/// Does something on the thread that starts all children, which inherit its namespaces.
pub fn on_the_starter(what: impl FnOnce() + Send + 'static) {
    let (done, finished) = sync_channel(1);
    starter().send(Order::Run(Box::new(what), done)).expect("the starter thread lives on");
    finished.recv().expect("the starter thread has not panicked");
}

/// Starts `command`; the child gets the signal `at_our_death` if this process dies without having ended it.
pub fn spawn(mut command: Command, at_our_death: libc::c_int) -> io::Result<Child> {
    let parent = std::process::id();
    // SAFETY: prctl and getppid are async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, at_our_death);
            if libc::getppid().cast_unsigned() != parent {
                return Err(io::Error::other("the test has already died"));
            }
            Ok(())
        });
    }
    let (reply, child) = sync_channel(1);
    starter().send(Order::Start(command, reply)).expect("the starter thread lives on");
    child.recv().expect("the starter thread answers")
}

/// Where a program is: some are in sbin, which not every PATH has.
pub fn program(name: &str) -> PathBuf {
    let folders = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let of_path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&of_path)
        .chain(folders.iter().map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.exists());
    found.unwrap_or_else(|| panic!("{name} is not on this machine: apt-get install nginx-light haproxy"))
}

/// Sends a signal to a process that this test started; false if it is gone.
pub fn signal(pid: u32, signal: libc::c_int) -> bool {
    // SAFETY: kill has no memory effects.
    unsafe { libc::kill(pid.cast_signed(), signal) == 0 }
}

/// The living children of `parent`, from /proc; zombies are not counted.
pub fn children_of(parent: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut found: Vec<u32> =
        pids.filter(|pid| matches!(state_and_parent(*pid), Some((state, ppid)) if ppid == parent && state != 'Z')).collect();
    found.sort_unstable();
    found
}

/// Ends a process and its children, none of which gets away: stopped first, for a parent in the middle of a fork would
/// leave an orphan behind, with the listening socket. When it returns they are gone.
pub fn kill_family(mut parent: Child) {
    if !matches!(parent.try_wait(), Ok(Some(_))) {
        signal(parent.id(), libc::SIGSTOP);
        until("stopped", || matches!(state_and_parent(parent.id()), None | Some(('T' | 'Z', _))));
        let family = children_of(parent.id());
        for child in &family {
            signal(*child, libc::SIGKILL);
        }
        let _ = parent.kill();
        let _ = parent.wait();
        until("ended", || family.iter().all(|child| matches!(state_and_parent(*child), None | Some(('Z' | 'X', _)))));
    }
}

/// SIGKILL for a grandchild; when it returns that one is gone, whether its parent has noticed or not.
pub fn kill(pid: u32) {
    signal(pid, libc::SIGKILL);
    until("ended", || matches!(state_and_parent(pid), None | Some(('Z' | 'X', _))));
}

/// For Drop, where nothing can be awaited. The kernel takes about a millisecond; a second is its deadline.
fn until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    eprintln!("a process that was to be {what} is not, after a second");
}

fn state_and_parent(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // pid (name) state ppid ...: the name may hold blanks and brackets.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
