//! Certificates, keys and ticket keys, from their files to what rustls serves with: all or nothing.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ProducesTickets, ResolvesServerCert},
    sign::CertifiedKey,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{config::Problem, tickets::SharedTickets};
use crate::model::{
    settings::Settings,
    tls::{Certificate, CertificateFiles, Tls},
};

/// A certificate that ends sooner is warned of.
pub const SOON: Duration = Duration::from_secs(21 * 86_400);

/// What is wrong, and what would be right.
struct Wrong(String, Option<&'static str>);

impl Wrong {
    fn new(what: impl Into<String>) -> Self {
        Wrong(what.into(), None)
    }
}

/// `None` where there is no `[[tls]]`.
///
/// # Errors
/// Every file that cannot be used.
pub fn load(settings: &Settings) -> Result<Option<Arc<Tls>>, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut resolver = BySni::default();
    let mut certificates = Vec::new();
    let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for files in &settings.certificates {
        match read(files, &mut hash) {
            Ok((certificate, key)) => {
                let key = Arc::new(key);
                for host in &certificate.hosts {
                    resolver.add(host, &key);
                }
                resolver.default.get_or_insert(key);
                certificates.push(certificate);
            }
            Err(Wrong(message, help)) => {
                let (file, line, column) = files.at.clone();
                problems.push(Problem { file, line, column, message, help: help.map(str::to_owned) });
            }
        }
    }
    let ticketer = match tickets(settings, &mut hash) {
        Ok(ticketer) => Some(ticketer),
        Err(Wrong(message, help)) => {
            let (file, line, column) = settings.certificates.first().map(|files| files.at.clone()).unwrap_or_default();
            problems.push(Problem { file, line, column, message, help: help.map(str::to_owned) });
            None
        }
    };
    let (true, Some(ticketer)) = (problems.is_empty(), ticketer) else { return Err(problems) };
    if certificates.is_empty() {
        return Ok(None);
    }
    // TLS 1.3 and 1.2 with forward secrecy and AEAD alone: rustls has nothing else.
    let mut server = rustls::ServerConfig::builder().with_no_client_auth().with_cert_resolver(Arc::new(resolver));
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    server.ticketer = ticketer;
    // A request in the first flight could be sent again by anybody (RFC 8470).
    server.max_early_data_size = 0;
    Ok(Some(Arc::new(Tls { server: Arc::new(server), certificates, fingerprint: hash.finish().as_ref().to_vec() })))
}

/// Warnings for certificates that have ended or soon will.
pub fn warnings(certificates: &[Certificate], now: SystemTime) -> Vec<String> {
    let said = |certificate: &Certificate| {
        let (file, hosts) = (certificate.file.display(), certificate.hosts.join(", "));
        match certificate.not_after.duration_since(now) {
            Err(_) => Some(format!("the certificate {file} ({hosts}) has expired: browsers refuse it")),
            Ok(left) if left < SOON => {
                Some(format!("the certificate {file} ({hosts}) expires in {} days", left.as_secs() / 86_400))
            }
            Ok(_) => None,
        }
    };
    // Perhaps somebody knows better, as behind a client that does not look: it is served all the same.
    let foreign = |certificate: &Certificate| {
        let (file, hosts) = (certificate.file.display(), certificate.foreign.join(", "));
        (!hosts.is_empty()).then(|| format!("the certificate {file} is not for {hosts}: browsers refuse it there"))
    };
    certificates.iter().flat_map(|certificate| [said(certificate), foreign(certificate)]).flatten().collect()
}

fn slurp(path: &Path, hash: &mut aws_lc_rs::digest::Context) -> Result<Vec<u8>, Wrong> {
    let bytes = fs::read(path).map_err(|error| Wrong::new(format!("{} cannot be read: {error}", path.display())))?;
    hash.update(&u64::try_from(bytes.len()).unwrap_or_default().to_be_bytes());
    hash.update(&bytes);
    Ok(bytes)
}

fn read(files: &CertificateFiles, hash: &mut aws_lc_rs::digest::Context) -> Result<(Certificate, CertifiedKey), Wrong> {
    let CertificateFiles { hosts, certificate, key, .. } = files;
    let pem = slurp(certificate, hash)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| Wrong::new(format!("{} is no PEM: {error}", certificate.display())))?;
    let Some(first) = chain.first() else {
        let help = "write the chain in PEM, the server's own certificate first";
        return Err(Wrong(format!("{} holds no certificate", certificate.display()), Some(help)));
    };
    let (_, parsed) = X509Certificate::from_der(first)
        .map_err(|error| Wrong::new(format!("the first certificate of {} is none: {error}", certificate.display())))?;
    let not_after = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
    let own = names(&parsed);
    let hosts = if hosts.is_empty() { own.clone() } else { hosts.clone() };
    let foreign = hosts.iter().filter(|host| !own.iter().any(|name| covers(name, host))).cloned().collect();
    let pem = slurp(key, hash)?;
    let key_der = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        Wrong(format!("{} holds no private key: {error}", key.display()), Some("write it in PEM, without a password"))
    })?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let certified = CertifiedKey::from_der(chain, key_der, &provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            Wrong::new(format!("the key {} is not that of the certificate {}", key.display(), certificate.display()))
        }
        error => Wrong::new(format!("{} cannot be used: {error}", key.display())),
    })?;
    let not_after = UNIX_EPOCH + Duration::from_secs(not_after);
    Ok((Certificate { hosts, file: certificate.clone(), not_after, foreign }, certified))
}

/// DNS names and addresses that the certificate is for.
fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        GeneralName::IPAddress(bytes) => match *bytes {
            bytes if bytes.len() == 4 => Some(std::net::IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?).to_string()),
            bytes => Some(std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string()),
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(name).collect()
}

fn covers(name: &str, host: &str) -> bool {
    let one_label =
        || name.strip_prefix('*').zip(host.find('.')).is_some_and(|(suffix, dot)| !host.starts_with('*') && host[dot..] == *suffix);
    name == host || one_label()
}

/// Those of the files, so that all replicas take each other's tickets; else of this process, over reloads too.
fn tickets(settings: &Settings, hash: &mut aws_lc_rs::digest::Context) -> Result<Arc<dyn ProducesTickets>, Wrong> {
    static OWN: OnceLock<Arc<dyn ProducesTickets>> = OnceLock::new();
    if settings.listen.tls_ticket_keys.is_empty() {
        if let Some(own) = OWN.get() {
            return Ok(own.clone());
        }
        let made = rustls::crypto::aws_lc_rs::Ticketer::new().map_err(|error| Wrong::new(format!("no ticket keys: {error}")))?;
        return Ok(OWN.get_or_init(|| made).clone());
    }
    let mut keys = Vec::new();
    for path in &settings.listen.tls_ticket_keys {
        keys.push((path, slurp(path, hash)?));
    }
    let keys: Vec<&[u8]> = keys.iter().map(|(_, bytes)| bytes.as_slice()).collect();
    let help = "each file holds 80 random bytes, as of `openssl rand 80`; the first encrypts, all decrypt";
    SharedTickets::new(&keys).map(|tickets| Arc::new(tickets) as _).ok_or(Wrong(
        "`listen.tls_ticket_keys`: a file has fewer than 48 bytes, or the same byte throughout".to_owned(),
        Some(help),
    ))
}

/// By the name that the client asks for: exact, else with its first label as a star, else the first certificate.
#[derive(Debug, Default)]
struct BySni {
    by_name: HashMap<String, Arc<CertifiedKey>>,
    default: Option<Arc<CertifiedKey>>,
}

impl BySni {
    /// The first in the file counts.
    fn add(&mut self, host: &str, key: &Arc<CertifiedKey>) {
        self.by_name.entry(host.to_ascii_lowercase()).or_insert_with(|| key.clone());
    }

    fn find(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        let lower = name.to_ascii_lowercase();
        let star = || self.by_name.get(&format!("*{}", lower.get(lower.find('.')?..)?));
        self.by_name.get(&lower).or_else(star).cloned()
    }
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        hello.server_name().and_then(|name| self.find(name)).or_else(|| self.default.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_soon_or_is_for_others_is_warned_of() {
        let now = SystemTime::now();
        let warned = |days: i64, foreign: &[&str]| {
            let away = Duration::from_secs(days.unsigned_abs() * 86_400 + 60);
            let not_after = if days < 0 { now - away } else { now + away };
            let foreign = foreign.iter().map(|host| (*host).to_owned()).collect();
            warnings(&[Certificate { hosts: vec!["a.example".into()], file: "/a.crt".into(), not_after, foreign }], now)
        };
        assert_eq!(warned(22, &[]), Vec::<String>::new());
        assert_eq!(warned(20, &[]), ["the certificate /a.crt (a.example) expires in 20 days"]);
        assert_eq!(warned(-1, &[]), ["the certificate /a.crt (a.example) has expired: browsers refuse it"]);
        assert_eq!(warned(90, &["b.example"]), ["the certificate /a.crt is not for b.example: browsers refuse it there"]);
    }

    #[test]
    fn a_star_is_one_label() {
        assert!(covers("*.example.com", "a.example.com") && covers("*.example.com", "*.example.com") && covers("a.b", "a.b"));
        assert!(!covers("*.example.com", "a.b.example.com") && !covers("*.example.com", "example.com") && !covers("a.b", "c.b"));
    }
}
