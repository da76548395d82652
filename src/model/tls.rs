//! What TLS needs, once its files have been read.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

/// `[[tls]]`: where a certificate is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// Of SNI; "*.example.com" stands for one label. Empty: of the certificate itself.
    pub hosts: Vec<String>,
    /// PEM, the chain with the server's own first.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Where the configuration has it: file, line, column.
    pub at: (PathBuf, usize, usize),
}

/// In force for new connections; those that are open keep what they began with.
#[derive(Clone, Debug)]
pub struct Tls {
    pub server: Arc<rustls::ServerConfig>,
    /// In the file's order; the first is for who names no host, or none that there is.
    pub certificates: Vec<Certificate>,
    /// Of everything that was read.
    pub fingerprint: Vec<u8>,
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

/// One certificate as operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub hosts: Vec<String>,
    pub file: PathBuf,
    pub not_after: SystemTime,
    /// Those of `hosts` that it is not for.
    pub foreign: Vec<String>,
}
