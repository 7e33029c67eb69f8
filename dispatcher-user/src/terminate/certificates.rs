//! Certificates, keys and roots from files, and the TLS configurations made of them.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use jiff::Timestamp;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, verify_server_name},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::{ClientHello, ParsedCertificate, ResolvesServerCert},
    sign::CertifiedKey,
    version,
};
use x509_parser::time::ASN1Time;

use super::{Error, Way, seconds};
use crate::{
    config::{KeyPair, Terminate, Tunnels},
    tunnels::{Carries, Settings},
};

/// HTTP versions by ALPN, the better one first: on both sides.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// What clients are shown.
pub(super) struct Shown {
    pub(super) tls: Arc<ServerConfig>,
    /// Contents of the files of certificates and keys.
    pub(super) files: Vec<Vec<u8>>,
    /// When each certificate ends, seconds since 1970.
    pub(super) ends: Vec<(PathBuf, i64)>,
}

/// What a service shows to clients. Certificates that no client takes today are warned of.
pub(super) fn server(service: &str, terminate: &Terminate) -> Result<Shown, Error> {
    let broken =
        |error: rustls::Error| Error::Tls { service: service.to_owned(), problem: error.to_string() };
    let (mut keys, mut files, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for pair in &terminate.certificates {
        let (chain, key, texts) = load(service, pair)?;
        files.extend(texts);
        if let Some((begins, end)) = chain.first().and_then(|certificate| valid(certificate)) {
            if let Some(why) = invalid(begins, end, Timestamp::now()) {
                log::warn!(
                    "service {service}: {}: {why}: clients will not accept it",
                    pair.certificate.display()
                );
            }
            ends.push((pair.certificate.clone(), end.as_second()));
        }
        let refused = |error: rustls::Error| {
            if matches!(error, rustls::Error::InconsistentKeys(_)) {
                let problem = "it is not the key of the certificate beside it; give the one that is";
                return file(service, &pair.key, problem);
            }
            file(service, &pair.certificate, &error.to_string())
        };
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(refused)?;
        key.end_entity_cert()
            .and_then(|certificate| ParsedCertificate::try_from(certificate).map(drop))
            .map_err(refused)?;
        keys.push(Arc::new(key));
    }
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(broken)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Certificates(keys)));
    config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(broken)?;
    Ok(Shown { tls: Arc::new(config), files, ends })
}

/// From when to when a certificate is valid (RFC 5280 section 4.1.2.5).
fn valid(certificate: &[u8]) -> Option<(Timestamp, Timestamp)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let validity = certificate.validity();
    let at = |time: ASN1Time| Timestamp::from_second(time.timestamp()).ok();
    Some((at(validity.not_before)?, at(validity.not_after)?))
}

/// Why it is not valid now, if so.
fn invalid(begins: Timestamp, end: Timestamp, now: Timestamp) -> Option<String> {
    if now > end {
        return Some(format!("it has expired ({end})"));
    }
    (now < begins).then(|| format!("it is not valid before {begins}"))
}

/// How tunnels are made: `old` goes on if it is the same.
pub(super) fn way(
    service: &str,
    tunnels: &Tunnels,
    carries: Carries,
    old: Option<Arc<Way>>,
) -> Result<Arc<Way>, Error> {
    let broken = |problem: String| Error::Tls { service: service.to_owned(), problem };
    let mut files = Vec::new();
    let mut roots = RootCertStore::empty();
    match &tunnels.roots {
        Some(path) => {
            let text = read(service, path)?;
            for certificate in certificates(service, path, &text)? {
                roots.add(certificate).map_err(|error| file(service, path, &error.to_string()))?;
            }
            files.push(text);
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                let why = found.errors.first().map(|error| format!(" ({error})")).unwrap_or_default();
                return Err(broken(format!(
                    "this machine trusts no certificates{why}; install them (`ca-certificates`), or name a file by service.tunnels.roots"
                )));
            }
        }
    }
    let client = tunnels.client.as_ref().map(|pair| load(service, pair)).transpose()?;
    if let Some((_, _, read)) = &client {
        files.extend(read.iter().cloned());
    }
    if let Some(old) = old
        && (&old.config, old.carries) == (tunnels, carries)
        && old.files == files
    {
        return Ok(old);
    }
    let versions: &[_] =
        if tunnels.only_tls13 { &[&version::TLS13] } else { &[&version::TLS13, &version::TLS12] };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .map_err(|error| broken(error.to_string()))?
        .with_root_certificates(roots);
    let mut tls = match client {
        None => builder.with_no_client_auth(),
        Some((chain, key, _)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| broken(format!("service.tunnels.certificate: {error}")))?,
    };
    if carries == Carries::Requests {
        let offered = if tunnels.only_http1 { &ALPN[1..] } else { &ALPN[..] };
        tls.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
    }
    // Each tunnel's backend shows its certificate.
    tls.resumption = Resumption::disabled();
    let clear = Arc::new(Settings {
        tls: None,
        carries,
        established: 1,
        most: tunnels.most as usize,
        max_age: seconds(tunnels.max_age),
        timeout: seconds(tunnels.timeout),
    });
    let (config, tls, settings) = (tunnels.clone(), Arc::new(tls), Mutex::default());
    Ok(Arc::new(Way { config, files, tls, carries, clear, settings }))
}

fn file(service: &str, path: &Path, problem: &str) -> Error {
    Error::File { service: service.to_owned(), path: path.to_owned(), problem: problem.to_owned() }
}

fn read(service: &str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| {
        file(service, path, &format!("{error}; give a file in PEM that the daemon's user may read"))
    })
}

fn certificates(service: &str, path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(file(
            service,
            path,
            "there is no certificate in it; it must have a block -----BEGIN CERTIFICATE-----",
        )),
        Err(error) => Err(file(service, path, &format!("{error}; give a file in PEM"))),
    }
}

type Loaded = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, [Vec<u8>; 2]);

fn load(service: &str, KeyPair { certificate, key }: &KeyPair) -> Result<Loaded, Error> {
    let texts = [read(service, certificate)?, read(service, key)?];
    let chain = certificates(service, certificate, &texts[0])?;
    let found = PrivateKeyDer::from_pem_slice(&texts[1]).map_err(|_| {
        file(service, key, "there is no private key in it; it must have a block -----BEGIN PRIVATE KEY-----")
    })?;
    Ok((chain, found, texts))
}

/// A client gets the first certificate that is for the name it asks for, or the first of all.
#[derive(Debug)]
struct Certificates(Vec<Arc<CertifiedKey>>);

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        let is_for = |key: &&Arc<CertifiedKey>| {
            let certificate =
                key.end_entity_cert().ok().and_then(|one| ParsedCertificate::try_from(one).ok());
            certificate
                .zip(name.as_ref())
                .is_some_and(|(certificate, name)| verify_server_name(&certificate, name).is_ok())
        };
        self.0.iter().find(is_for).or_else(|| self.0.first()).cloned()
    }
}
