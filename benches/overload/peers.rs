//! The proxies, as their manuals have them, before the same two pools.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::support::{children, ports, process::Slackwater};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Slackwater,
    NginxRoundRobin,
    NginxLeastConn,
    Haproxy,
    /// Told what it cannot know: four workers a pod, and a queue shorter than its clients' patience.
    HaproxyTuned,
}

pub const ALL: [Peer; 5] = [Peer::Slackwater, Peer::NginxRoundRobin, Peer::NginxLeastConn, Peer::Haproxy, Peer::HaproxyTuned];

impl Peer {
    pub fn name(self) -> &'static str {
        match self {
            Peer::Slackwater => "Slackwater",
            Peer::NginxRoundRobin => "Nginx, round robin",
            Peer::NginxLeastConn => "Nginx, least_conn",
            Peer::Haproxy => "HAProxy, leastconn",
            Peer::HaproxyTuned => "HAProxy, tuned by hand",
        }
    }

    pub fn colour(self) -> &'static str {
        match self {
            Peer::Slackwater => "#0b6e99",
            Peer::NginxRoundRobin => "#3f9142",
            Peer::NginxLeastConn => "#8fbf5f",
            Peer::Haproxy => "#d9822b",
            Peer::HaproxyTuned => "#a23b72",
        }
    }
}

/// A proxy that runs. Dropped, it is killed.
pub enum Running {
    Ours(Box<Slackwater>),
    Theirs { child: Option<Child>, address: SocketAddr, _folder: tempfile::TempDir },
}

impl Running {
    pub fn address(&self) -> SocketAddr {
        match self {
            Running::Ours(slackwater) => slackwater.http(),
            Running::Theirs { address, .. } => *address,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Running::Theirs { child, .. } = self
            && let Some(child) = child.take()
        {
            children::kill_family(child);
        }
    }
}

/// What our own configuration says beyond the pools; `lanes` where the bench is about them.
pub fn ours(pools: &[SocketAddr], docroot: &Path, lanes: &str, routes: &str) -> String {
    let endpoints: Vec<String> = pools.iter().map(ToString::to_string).collect();
    format!(
        "[log]\naccess = \"off\"\n{lanes}\n[upstream.php.set.blue]\nendpoints = {endpoints:?}\nstatus_path = \"/status\"\n[[site]]\nphp_root = \"{}\"\nupstream = \"php\"\nscripts = [\"/*.php\"]\n{routes}",
        docroot.display()
    )
}

pub async fn start(peer: Peer, pools: &[SocketAddr], docroot: &Path) -> Running {
    if peer == Peer::Slackwater {
        return Running::Ours(Box::new(Slackwater::start(&ours(pools, docroot, "", "")).await));
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let address = ports::free_address();
    let file = folder.path().join("proxy.conf");
    let (mut command, text) = match peer {
        Peer::NginxRoundRobin | Peer::NginxLeastConn => {
            let mut command = Command::new(children::program("nginx"));
            command.arg("-c").arg(&file).arg("-p").arg(folder.path());
            (command, nginx(peer == Peer::NginxLeastConn, address, pools, docroot, folder.path()))
        }
        _ => {
            let mut command = Command::new(children::program("haproxy"));
            command.arg("-f").arg(&file);
            (command, haproxy(peer == Peer::HaproxyTuned, address, pools, docroot))
        }
    };
    fs::write(&file, text).expect("its configuration is written");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(folder.path().join("stderr")).expect("a file"));
    let child = children::spawn(command, libc::SIGTERM).expect("it starts");
    let running = Running::Theirs { child: Some(child), address, _folder: folder };
    let began = Instant::now();
    while tokio::net::TcpStream::connect(address).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(10), "{} does not listen", peer.name());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    running
}

fn nginx(least_conn: bool, address: SocketAddr, pools: &[SocketAddr], docroot: &Path, folder: &Path) -> String {
    let (folder, docroot) = (folder.display(), docroot.display());
    let servers: String = pools.iter().fold(String::new(), |mut all, pool| {
        let _ = write!(all, "server {pool}; ");
        all
    });
    let method = if least_conn { "least_conn; " } else { "" };
    let temporary: String =
        ["client_body", "fastcgi", "proxy", "uwsgi", "scgi"].map(|t| format!("{t}_temp_path {folder}/{t};\n")).concat();
    // As Debian has it: two worker processes here, sendfile, no keep-alive to FPM.
    format!(
        "worker_processes auto;\ndaemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{ worker_connections 8192; }}\n\
         http {{\naccess_log off;\n{temporary}upstream php {{ {method}{servers} }}\nserver {{\nlisten {address} backlog=4096;\n\
         location / {{ include /etc/nginx/fastcgi_params; fastcgi_param SCRIPT_FILENAME {docroot}$fastcgi_script_name; fastcgi_pass php; }}\n}}\n}}\n"
    )
}

fn haproxy(tuned: bool, address: SocketAddr, pools: &[SocketAddr], docroot: &Path) -> String {
    let (limit, queue, reuse) = match tuned {
        true => (" maxconn 4 pool-max-conn 4", "timeout queue 1s", "http-reuse always\n"),
        false => ("", "", ""),
    };
    let servers: String = pools.iter().enumerate().fold(String::new(), |mut all, (n, pool)| {
        let _ = writeln!(all, "server pod{n} {pool} proto fcgi{limit}");
        all
    });
    format!(
        "global\nmaxconn 8192\nnbthread 2\ndefaults\nmode http\ntimeout connect 5s\ntimeout client 60s\ntimeout server 60s\n{queue}\n\
         fcgi-app php\ndocroot {}\npath-info ^(/.+\\.php)(/.*)?$\nfrontend http\nbind {address} backlog 4096\ndefault_backend php\n\
         backend php\nbalance leastconn\nuse-fcgi-app php\n{reuse}{servers}",
        docroot.display()
    )
}
