//! The proxies, each configured for the same work as its own manual has it, one worker, all its threads on core 0.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::support::{children, ports, usage::resident};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Peer {
    Slackwater,
    Nginx,
    Haproxy,
    Caddy,
}

pub const ALL: [Peer; 4] = [Peer::Slackwater, Peer::Nginx, Peer::Haproxy, Peer::Caddy];

impl Peer {
    pub fn name(self) -> &'static str {
        match self {
            Peer::Slackwater => "Slackwater",
            Peer::Nginx => "Nginx",
            Peer::Haproxy => "HAProxy",
            Peer::Caddy => "Caddy",
        }
    }

    pub fn colour(self) -> &'static str {
        match self {
            Peer::Slackwater => "#0b6e99",
            Peer::Nginx => "#3f9142",
            Peer::Haproxy => "#d9822b",
            Peer::Caddy => "#a23b72",
        }
    }

    pub fn program(self) -> PathBuf {
        match self {
            Peer::Slackwater => PathBuf::from(env!("CARGO_BIN_EXE_slackwater")),
            Peer::Nginx => children::program("nginx"),
            Peer::Haproxy => children::program("haproxy"),
            Peer::Caddy => std::env::var_os("CADDY").map_or_else(|| children::program("caddy"), PathBuf::from),
        }
    }

    pub fn version(self) -> String {
        let argument = if self == Peer::Nginx || self == Peer::Haproxy { "-v" } else { "version" };
        let argument = if self == Peer::Slackwater { "--version" } else { argument };
        let output = Command::new(self.program()).arg(argument).output().expect("it runs");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let version = text.split_whitespace().find(|word| word.contains(|c: char| c.is_ascii_digit())).unwrap_or_default();
        format!("{} {}", self.name(), version.trim_start_matches("nginx/"))
    }
}

/// How a proxy speaks with FPM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// Connections are kept, as many as clients.
    Kept,
    /// What the proxy does where nothing is said; Slackwater is told the capacity, as it is in Kubernetes.
    Default,
    /// A connection for each request.
    Off,
}

/// What the proxies are set up for.
#[derive(Clone, Debug)]
pub struct Setup {
    /// "ADDRESS:PORT" or "unix:PATH".
    pub backends: Vec<String>,
    /// Workers of each backend.
    pub capacity: usize,
    pub reuse: Reuse,
    /// Access log, metrics and ten routes; else none of them.
    pub full: bool,
    pub tls: bool,
    /// Static files are served from here, and PHP from nowhere.
    pub files: Option<PathBuf>,
    pub docroot: PathBuf,
    pub workers: usize,
    /// The core that all its threads run on; none: all cores.
    pub core: Option<usize>,
    /// Bodies of 2 MiB are buffered in memory, as Nginx is told to in all rows.
    pub memory: bool,
    /// More of Slackwater's routes, of no other proxy's.
    pub routes: usize,
}

/// Key and certificate for TLS, in PEM and in one file each, and both together (HAProxy's way).
pub struct Certificate {
    pub folder: tempfile::TempDir,
    pub der: Vec<u8>,
}

impl Certificate {
    pub fn new() -> Certificate {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        for (name, text) in [("cert.pem", &certificate), ("key.pem", &key), ("both.pem", &format!("{certificate}{key}"))] {
            fs::write(folder.path().join(name), text).expect("it is written");
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("our folder");
        Certificate { folder, der: made.cert.der().to_vec() }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

/// A proxy that runs. Dropped, it is killed.
pub struct Running {
    child: Option<Child>,
    pub address: SocketAddr,
    /// Slackwater's; the others have none.
    pub admin: PathBuf,
    folder: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            children::kill_family(child);
        }
    }
}

/// Before a proxy's program: a profiler, or nothing.
pub fn start(peer: Peer, setup: &Setup, certificate: &Certificate, before: &[String]) -> Running {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("our folder");
    let address = ports::free_address();
    let file = folder.path().join("proxy.conf");
    let single = !before.is_empty();
    let (arguments, text) = match peer {
        Peer::Slackwater => (vec!["serve", "--config"], slackwater(setup, address, certificate, folder.path())),
        Peer::Nginx => (vec!["-p", ".", "-c"], nginx(setup, address, certificate, folder.path(), single)),
        Peer::Haproxy => (vec!["-f"], haproxy(setup, address, certificate, folder.path())),
        Peer::Caddy => (vec!["run", "--adapter", "caddyfile", "--config"], caddy(setup, address, certificate, folder.path())),
    };
    fs::write(&file, text).expect("its configuration is written");
    let mut words: Vec<String> = match setup.core {
        Some(core) => ["taskset", "-c", &core.to_string()].map(str::to_owned).to_vec(),
        None => Vec::new(),
    };
    words.extend_from_slice(before);
    words.push(peer.program().display().to_string());
    words.extend(arguments.into_iter().map(str::to_owned));
    words.push(file.display().to_string());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).current_dir(folder.path());
    if peer == Peer::Caddy {
        command.env("GOMAXPROCS", setup.workers.to_string()).env("XDG_DATA_HOME", folder.path()).env("HOME", folder.path());
    }
    let log = fs::File::create(folder.path().join("stderr")).expect("a file");
    let out = fs::File::create(folder.path().join("stdout")).expect("a file");
    command.stdin(Stdio::null()).stdout(out).stderr(log);
    let child = children::spawn(command, libc::SIGTERM).expect("it starts");
    let running = Running { child: Some(child), address, admin: folder.path().join("admin.sock"), folder };
    let began = Instant::now();
    while std::net::TcpStream::connect(address).is_err() {
        let said = fs::read_to_string(running.folder.path().join("stderr")).unwrap_or_default();
        assert!(began.elapsed() < Duration::from_secs(60), "{} does not listen: {said}", peer.name());
        std::thread::sleep(Duration::from_millis(20));
    }
    // Slackwater says 503 until it knows that PHP is there.
    std::thread::sleep(Duration::from_millis(300));
    running
}

impl Running {
    /// Its process and the processes of its workers.
    pub fn pids(&self) -> Vec<u32> {
        let pid = self.child.as_ref().expect("it runs").id();
        let mut all = vec![pid];
        let mut next = 0;
        while let Some(pid) = all.get(next) {
            all.extend(children::children_of(*pid));
            next += 1;
        }
        all
    }

    /// CPU of the threads whose names begin with `name`, by the scheduler's own clock.
    pub fn cpu_of_threads(&self, name: &str) -> Duration {
        let mut all = 0;
        for task in
            self.pids().into_iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten())
        {
            let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            if read("comm").starts_with(name) {
                all += read("schedstat").split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        Duration::from_nanos(all)
    }

    /// CPU that it has used, user and system.
    pub fn cpu(&self) -> Duration {
        // SAFETY: sysconf has no memory effects.
        let hz = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100);
        let ticks = self.pids().into_iter().filter_map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
            Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
        });
        Duration::from_millis(ticks.sum::<u64>() * 1000 / hz)
    }

    /// What it holds of memory: resident bytes.
    pub fn rss(&self) -> u64 {
        self.pids().into_iter().filter_map(resident).sum()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Ends it in order, so that what a profiler has counted is written.
    pub fn stop(mut self) -> tempfile::TempDir {
        if let Some(mut child) = self.child.take() {
            for pid in [vec![child.id()], children::children_of(child.id())].concat() {
                children::signal(pid, libc::SIGTERM);
            }
            let _ = child.wait();
        }
        std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"))
    }
}

fn slackwater(setup: &Setup, address: SocketAddr, certificate: &Certificate, folder: &Path) -> String {
    let mut out = format!("workers = {}\n[listen]\n", setup.workers);
    let listen = if setup.tls { "https" } else { "http" };
    let _ = writeln!(out, "{listen} = [\"{address}\"]\nadmin = \"{}/admin.sock\"", folder.display());
    if !setup.full {
        out += "ops = \"off\"\n";
    } else {
        let _ = writeln!(out, "ops = \"{}\"", ports::free_address());
    }
    if setup.tls {
        let _ =
            writeln!(out, "[[tls]]\ncertificate = \"{}\"\nkey = \"{}\"", certificate.file("cert.pem"), certificate.file("key.pem"));
    }
    match setup.full {
        true => drop(writeln!(out, "[log]\naccess = \"combined\"\naccess_file = \"{}/access.log\"", folder.display())),
        false => out += "[log]\naccess = \"off\"\n",
    }
    if setup.memory {
        out += "[buffer]\nmemory = \"2MiB\"\n";
    }
    if let Some(files) = &setup.files {
        let _ = writeln!(out, "[[site]]\nroot = \"{}\"\nprecompressed = [\"gzip\"]", files.display());
        return out;
    }
    let _ = writeln!(out, "[upstream.php]\nworkers_per_endpoint = {}", setup.capacity);
    out += match setup.reuse {
        // As Nginx and HAProxy, which send posts over kept connections too.
        Reuse::Kept => "lease = { requests = 1000000, age = \"60s\", idle = \"1s\", non_idempotent = true }\n",
        Reuse::Default => "",
        Reuse::Off => "keepalive = \"off\"\n",
    };
    let _ = writeln!(
        out,
        "active = \"blue\"\n[upstream.php.set.blue]\nendpoints = {0:?}\n[upstream.php.set.green]\nendpoints = {0:?}\n[[site]]\nphp_root = \"{1}\"\nscripts = [\"/*.php\"]\nupstream = \"php\"",
        setup.backends,
        setup.docroot.display()
    );
    if setup.routes > 0 || setup.full {
        for n in 0..setup.routes.max(10) {
            // By turns a prefix and an exact path.
            let path = if n % 2 == 0 { format!("/section{n}/*") } else { format!("/page{n}") };
            let _ = writeln!(out, "[[site.route]]\npath = \"{path}\"\nheaders = {{ set = {{ X-Section = \"{n}\" }} }}");
        }
    }
    out
}

fn nginx(setup: &Setup, address: SocketAddr, certificate: &Certificate, folder: &Path, single: bool) -> String {
    let folder = folder.display();
    let temporary: String =
        ["client_body", "fastcgi", "proxy", "uwsgi", "scgi"].map(|t| format!("{t}_temp_path {folder}/{t};\n")).concat();
    let tls = match setup.tls {
        true => format!(
            "ssl_certificate {}; ssl_certificate_key {}; ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:s:10m;",
            certificate.file("cert.pem"),
            certificate.file("key.pem")
        ),
        false => String::new(),
    };
    let (log, routes) = match setup.full {
        true => (
            format!("access_log {folder}/access.log combined buffer=64k flush=1s;"),
            (0..10)
                .map(|n| {
                    let path = if n % 2 == 0 { format!("/section{n}/") } else { format!("= /page{n}") };
                    format!("location {path} {{ add_header X-Section {n}; return 200; }}\n")
                })
                .collect(),
        ),
        false => ("access_log off;".to_owned(), String::new()),
    };
    // Its users' usual counters.
    let status = if setup.full { format!("server {{ listen {}; stub_status; }}", ports::free_address()) } else { String::new() };
    let keep = if setup.reuse == Reuse::Kept { "keepalive 64;" } else { "" };
    let servers: String = setup.backends.iter().map(|backend| format!("server {backend}; ")).collect();
    let work = match &setup.files {
        Some(files) => format!("root {}; open_file_cache max=1000; gzip_static on; location / {{ }}", files.display()),
        None => format!(
            "location / {{ include /etc/nginx/fastcgi_params; fastcgi_param SCRIPT_FILENAME {}$fastcgi_script_name; fastcgi_pass php; {} }}\n{routes}",
            setup.docroot.display(),
            if setup.reuse == Reuse::Kept { "fastcgi_keep_conn on;" } else { "" }
        ),
    };
    let upstream = if setup.files.is_some() { String::new() } else { format!("upstream php {{ {servers} {keep} }}") };
    let master = if single { "master_process off;\n" } else { "" };
    let ssl = if setup.tls { " ssl http2" } else { "" };
    format!(
        "worker_processes {};\ndaemon off;\n{master}pid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{ worker_connections 19500; }}\n\
         http {{\ninclude /etc/nginx/mime.types;\nsendfile on; tcp_nopush on;\n{log}\n{temporary}keepalive_requests 100000000; keepalive_timeout 600s;\nclient_max_body_size 16m; client_body_buffer_size 2m;\n{upstream}\n{status}\nserver {{\nlisten {address}{ssl} backlog=4096;\n{tls}\n{work}\n}}\n}}\n",
        setup.workers
    )
}

fn haproxy(setup: &Setup, address: SocketAddr, certificate: &Certificate, folder: &Path) -> String {
    let bind = match setup.tls {
        true => format!("ssl crt {} alpn h2,http/1.1", certificate.file("both.pem")),
        false => String::new(),
    };
    let (log, routes) = match setup.full {
        true => (
            "log stdout format raw local0\noption httplog\n".to_owned(),
            (0..10)
                .map(|n| {
                    let test = if n % 2 == 0 { format!("path_beg /section{n}/") } else { format!("path /page{n}") };
                    format!("http-response set-header X-Section {n} if {{ {test} }}\n")
                })
                .collect::<String>(),
        ),
        false => (String::new(), String::new()),
    };
    // Where nothing is said it keeps an FPM worker for each client's connection, whatever their number: with more clients than workers the others starve.
    // So that is row 1a's, and here it is told to make a connection for each request, as the others do.
    let (reuse, keep) = match setup.reuse {
        Reuse::Kept => ("http-reuse always\n", ""),
        Reuse::Default | Reuse::Off => ("http-reuse never\n", "no option keep-conn\n"),
    };
    let head = format!(
        // It wants two descriptors for each connection, and would not start where it cannot have them.
        "global\nno strict-limits\nmaxconn 19500\nnbthread {}\nstats socket {}/stats.sock\ndefaults\nmode http\ntimeout connect 5s\ntimeout client 600s\ntimeout server 60s\n{log}",
        setup.workers,
        folder.display()
    );
    if let Some(files) = &setup.files {
        // It has no file server: an answer from memory.
        let file = files.join("10k.bin");
        return format!(
            "{head}frontend http\nbind {address} backlog 4096 {bind}\nhttp-request return status 200 content-type application/octet-stream file {} if {{ path /10k.bin }}\n",
            file.display()
        );
    }
    let servers: String = setup.backends.iter().enumerate().fold(String::new(), |mut all, (n, backend)| {
        let _ = writeln!(all, "server pod{n} {} proto fcgi", backend.replace("unix:", "unix@"));
        all
    });
    format!(
        "{head}fcgi-app php\n{keep}docroot {}\npath-info ^(/.+\\.php)(/.*)?$\nfrontend http\nbind {address} backlog 4096 {bind}\n{routes}default_backend php\n\
         backend php\nuse-fcgi-app php\n{reuse}{servers}",
        setup.docroot.display()
    )
}

fn caddy(setup: &Setup, address: SocketAddr, certificate: &Certificate, folder: &Path) -> String {
    let (scheme, tls) = match setup.tls {
        true => ("https", format!("tls {} {}", certificate.file("cert.pem"), certificate.file("key.pem"))),
        false => ("http", String::new()),
    };
    let log = if setup.full { format!("log {{\noutput file {}/access.log\n}}", folder.display()) } else { String::new() };
    let metrics = if setup.full { "metrics" } else { "" };
    let routes: String = match setup.full {
        true => (0..10)
            .map(|n| {
                let path = if n % 2 == 0 { format!("/section{n}/*") } else { format!("/page{n}") };
                format!("header {path} X-Section {n}\n")
            })
            .collect(),
        false => String::new(),
    };
    let work = match &setup.files {
        Some(files) => format!("root * {}\nfile_server {{\nprecompressed gzip\n}}\n", files.display()),
        None => {
            let backends: Vec<String> = setup.backends.iter().map(|backend| backend.replace("unix:", "unix/")).collect();
            format!(
                "root * {}\nreverse_proxy {} {{\ntransport fastcgi {{\nroot {}\nsplit .php\n}}\n}}\n",
                setup.docroot.display(),
                backends.join(" "),
                setup.docroot.display()
            )
        }
    };
    format!(
        "{{\nadmin off\nauto_https off\n{metrics}\nstorage file_system {}\nservers {{\nprotocols h1 h2\n}}\n}}\n{scheme}://localhost:{port}, {scheme}://{address} {{\nbind {ip}\n{tls}\n{log}\n{routes}{work}}}\n",
        folder.display(),
        port = address.port(),
        ip = address.ip()
    )
}
