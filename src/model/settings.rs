//! Process-wide settings that requests and connections read; all of them come from the configuration.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use ipnet::IpNet;

use super::{
    log_text::LogText,
    tls::{CertificateFiles, Tls},
};

#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub listen: Listen,
    pub buffer: Buffer,
    pub log: Log,
    pub tracing: Tracing,
    pub drain: Drain,
    /// Worker threads; `None` is "auto". Needs a restart.
    pub workers: Option<usize>,
    pub reload: ReloadMode,
    /// Landlock and seccomp, as far as the kernel has them. Needs a restart.
    pub sandbox: bool,
    /// Where an operator's swap is remembered; `None`: nowhere.
    pub state: Option<PathBuf>,
    /// `None`: outside a cluster. Needs a restart.
    pub kubernetes: Option<Kubernetes>,
    /// `[[tls]]`.
    pub certificates: Vec<CertificateFiles>,
    /// What their files hold; `None`: there are none, or nobody has read them yet.
    pub tls: Option<Arc<Tls>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubernetes {
    pub namespace: String,
    /// `None`: the service account of the pod, then $KUBECONFIG.
    pub kubeconfig: Option<PathBuf>,
    /// The Service of this proxy's own replicas.
    pub self_service: Option<Arc<str>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadMode {
    Signal,
    Watch,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    pub http: Vec<SocketAddr>,
    pub https: Vec<SocketAddr>,
    /// Files; the first encrypts session tickets, all decrypt. Empty: keys of this process alone.
    pub tls_ticket_keys: Vec<PathBuf>,
    /// A PROXY header stands before everything else, and only trusted proxies may connect.
    pub proxy_protocol: bool,
    /// Needs a restart.
    pub ops: Option<SocketAddr>,
    pub ops_allow: Vec<IpNet>,
    /// Needs a restart.
    pub admin: PathBuf,
    /// Empty: off.
    pub health_path: String,
    pub trusted_proxies: Vec<IpNet>,
    pub idle_timeout: Duration,
    pub header_timeout: Duration,
    pub max_uri_bytes: usize,
    pub max_header_bytes: usize,
    pub stall_timeout: Duration,
    /// Bytes a second.
    pub min_rate: u64,
    /// `None` is "auto": from RLIMIT_NOFILE.
    pub max_connections: Option<usize>,
    /// `None` is "unlimited".
    pub max_connections_per_address: Option<usize>,
    /// `None` is "unlimited".
    pub max_requests_per_connection: Option<u64>,
}

impl Listen {
    /// In clear and with TLS.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.http.iter().chain(&self.https).copied()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    pub memory: usize,
    pub total: u64,
    pub dir: PathBuf,
    pub disk: u64,
    /// Small static files and what is known of paths; 0: none.
    pub files: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    pub format: LogFormat,
    /// A tracing level or filter: "info", "debug", "slackwater=debug,info".
    pub level: String,
    pub access: AccessFormat,
    /// Percent, from 1 to 100, of what was answered below 400.
    pub access_sample: u8,
    /// "stdout", "stderr" or a path.
    pub access_file: String,
}

/// OpenTelemetry; with the feature `otlp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// Of a collector that takes OTLP over HTTP, as "http://collector:4318"; "": no traces. Needs a restart.
    pub endpoint: String,
    /// Percent of the requests whose trace begins here.
    pub sample: u8,
    /// `service.name`. Needs a restart.
    pub service: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Auto,
    Text,
    Json,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessFormat {
    Json,
    Combined,
    Off,
    Custom(Arc<LogText>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Drain {
    pub grace: Duration,
    pub lame_duck: Duration,
    pub health_fail_delay: Duration,
    pub quiet: Duration,
    pub margin: Duration,
    pub receipt: Option<PathBuf>,
}
