//! Services that the daemon serves itself: `[service.terminate]`, TLS and HTTP toward clients,
//! `[service.clear]`, requests in clear, and `[service.tunnels]`, the established TLS connections to the
//! backends of `mode = "terminate"` and `mode = "relay"`.

use std::{
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use hyper::Method;
use rustls::pki_types::ServerName;

use super::{Affinity, Error, Miss, Mode, Span, Spanned, Text, raw};
use crate::{terminate::secure, workers::processors};

/// How a service that ends TLS here serves its clients, and reaches its backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terminate {
    /// Certificates; a client gets the first that is for the name it asks for, or the first of all.
    pub certificates: Vec<KeyPair>,
    /// A client that comes without the session cookie is given one, unless the backend sets it.
    pub assign_cookie: bool,
    /// Seconds that a handshake may take.
    pub handshake_timeout: u32,
    /// Seconds that a backend may take to begin its answer, or to go on with it.
    pub response_timeout: u32,
    /// Seconds that a connection may stay without a request; and that the header of an HTTP/1.1 request may take.
    pub idle_timeout: u32,
    /// File to which a line is added for each request.
    pub access_log: Option<PathBuf>,
    /// Where and how requests in clear are taken.
    pub clear: Option<Clear>,
}

/// Requests in clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clear {
    /// Where they come in.
    pub vips: Vec<SocketAddr>,
    /// Where backends take them in clear.
    pub port: u16,
    /// Which are secure nonetheless, and go through a tunnel.
    pub secure: Vec<Secure>,
}

/// What a request is like that is declared secure: all that is given holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secure {
    /// One of these; of none: any.
    pub methods: Vec<String>,
    /// One of these, where a `*` at the end stands for anything; of none: any.
    pub paths: Vec<String>,
    /// It has the session cookie.
    pub session: bool,
}

/// Files of a certificate chain and of its key, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPair {
    /// The chain, the server's own certificate first.
    pub certificate: PathBuf,
    /// The private key; may be the same file.
    pub key: PathBuf,
}

/// Established TLS connections to each backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnels {
    /// The name that certificates must be for, and that is asked for by SNI; without one the address is.
    pub server_name: Option<String>,
    /// File with the certificates that are trusted; without one those of this machine.
    pub roots: Option<PathBuf>,
    /// Who we are, to backends that ask.
    pub client: Option<KeyPair>,
    /// HTTP/2 is not offered to backends.
    pub only_http1: bool,
    /// TLS 1.2 is refused.
    pub only_tls13: bool,
    /// Kept established ahead of need, to each backend.
    pub established: u32,
    /// No more than so many to each backend.
    pub most: u32,
    /// Seconds after which one is replaced.
    pub max_age: u32,
    /// Seconds that establishing one may take.
    pub timeout: u32,
}

/// The cookie of services that name none.
pub const DEFAULT_COOKIE: &str = "DISPATCHER";

pub(super) const ESTABLISHED: RangeInclusive<i64> = 1..=1024;
/// The most tunnels to a backend where nothing is said.
const MOST: usize = 64;
/// Clients' connections to one service.
pub(super) const CONNECTIONS: RangeInclusive<i64> = 1..=1 << 24;
pub(super) const PORT: RangeInclusive<i64> = 1..=65535;
pub(super) const HTTP: [(&str, bool); 2] = [("auto", false), ("1.1", true)];
pub(super) const VERSIONS: [(&str, bool); 2] = [("1.2", false), ("1.3", true)];

impl Text<'_> {
    /// The cookie by which sessions are known where none is named.
    pub(super) fn default_affinity() -> Vec<Affinity> {
        vec![Affinity::HttpCookie(DEFAULT_COOKIE.to_owned())]
    }

    /// What a service of this mode has, and others must not have.
    pub(super) fn local(
        &self,
        raw: &raw::Service,
        mode: Mode,
        miss: Miss,
    ) -> Result<(Option<Terminate>, Option<Tunnels>), Error> {
        let ends = mode == Mode::Terminate;
        for (given, key, goes, modes) in [
            (raw.terminate.is_some(), "service.terminate", ends, "mode = \"terminate\" only"),
            (raw.clear.is_some(), "service.clear", ends, "mode = \"terminate\" only"),
            (
                raw.max_connections.is_some(),
                "service.max_connections",
                mode.is_local(),
                "mode = \"terminate\" or \"relay\"",
            ),
            (raw.tunnels.is_some(), "service.tunnels", mode.is_local(), "mode = \"terminate\" or \"relay\""),
        ] {
            if given && !goes {
                let problem = format!("goes with {modes}; set that, or remove it");
                return Err(self.error(raw.name.span(), key, problem));
            }
        }
        if !mode.is_local() {
            return Ok((None, None));
        }
        let ours = |key: Option<Span>| key.filter(|_| ends);
        for (span, key) in [
            (raw.source.as_ref().map(Spanned::span), "service.source"),
            (ours(raw.proxy_protocol.as_ref().map(Spanned::span)), "service.proxy_protocol"),
            (ours(raw.tickets.as_ref().map(|_| raw.name.span())), "service.tickets"),
            (raw.table_size.as_ref().map(Spanned::span), "service.table_size"),
            (raw.mss.as_ref().map(Spanned::span), "service.mss"),
            (raw.wscale.as_ref().map(Spanned::span), "service.wscale"),
            (raw.timestamps.map(|_| raw.name.span()), "service.timestamps"),
            (raw.sack.map(|_| raw.name.span()), "service.sack"),
        ] {
            if let Some(span) = span {
                let problem = "does not go with this mode, in which the daemon and the kernel's own TCP serve clients; remove it";
                return Err(self.error(span, key, problem));
            }
        }
        if miss == Miss::Daemon {
            let span = raw.miss.as_ref().map_or_else(|| raw.name.span(), Spanned::span);
            let problem = "in this mode the daemon always decides; remove it";
            return Err(self.error(span, "service.miss", problem));
        }
        let tunnels = self.tunnels(raw.tunnels.as_ref(), ends)?;
        let terminate = if ends { Some(self.terminate(raw)?) } else { None };
        Ok((terminate, Some(tunnels)))
    }

    fn terminate(&self, raw: &raw::Service) -> Result<Terminate, Error> {
        let missing = |key: &str, problem: &str| Err(self.error(raw.name.span(), key, problem));
        let Some(table) = &raw.terminate else {
            return missing(
                "service.terminate",
                "mode = \"terminate\" needs a [service.terminate] table with certificates",
            );
        };
        if table.certificates.is_empty() {
            return missing(
                "service.terminate.certificates",
                "there is none; add certificates = [{ certificate = \"/etc/dispatcher/web.pem\", key = \"/etc/dispatcher/web.key\" }]",
            );
        }
        let key = "service.terminate.certificates";
        let certificates = table.certificates.iter().map(|one| self.key_pair(one, key));
        let seconds = |text: &raw::Text, key: &str, default| {
            self.duration(text.as_ref(), &format!("service.terminate.{key}"), default)
        };
        Ok(Terminate {
            certificates: certificates.collect::<Result<_, _>>()?,
            assign_cookie: table.assign_cookie.unwrap_or(raw.affinity.is_none()),
            handshake_timeout: seconds(&table.handshake_timeout, "handshake_timeout", 10)?,
            response_timeout: seconds(&table.response_timeout, "response_timeout", 60)?,
            idle_timeout: seconds(&table.idle_timeout, "idle_timeout", 60)?,
            access_log: table
                .access_log
                .as_ref()
                .map(|file| self.file(file, "service.terminate.access_log"))
                .transpose()?,
            clear: raw.clear.as_ref().map(|clear| self.clear(clear)).transpose()?,
        })
    }

    fn clear(&self, raw: &raw::Clear) -> Result<Clear, Error> {
        Ok(Clear {
            vips: self.vips(&raw.vip, "service.clear.vip", 80)?,
            port: match &raw.port {
                Some(port) => self.number(port, "service.clear.port", PORT)? as u16,
                None => 80,
            },
            secure: raw
                .secure
                .iter()
                .map(|rule| self.secure(rule, raw.vip.span()))
                .collect::<Result<_, _>>()?,
        })
    }

    fn secure(&self, raw: &raw::Secure, span: Span) -> Result<Secure, Error> {
        let words = |list: Option<&Spanned<raw::OneOrMany>>, key: &str, check: fn(&str) -> Option<&str>| {
            let Some(list) = list else { return Ok(Vec::new()) };
            let texts = list.get_ref().as_slice();
            for text in texts {
                if let Some(problem) = check(text) {
                    let problem = format!("\"{text}\" {problem}");
                    return Err(self.error(self.element(list, text), key, problem));
                }
            }
            if texts.is_empty() {
                return Err(self.error(list.span(), key, "the list is empty; fill it, or remove the key"));
            }
            Ok(texts.to_vec())
        };
        let rule = Secure {
            methods: words(raw.methods.as_ref(), "service.clear.secure.methods", |text| {
                let good = Method::from_bytes(text.as_bytes()).is_ok() && *text == text.to_uppercase();
                (!good).then_some("is no method; write it in capitals, such as \"POST\"")
            })?,
            paths: words(raw.paths.as_ref(), "service.clear.secure.paths", |text| {
                let path = text.strip_suffix('*').unwrap_or(text);
                let plain = path.starts_with('/') && secure::normal(path) == path;
                let plain = plain && !path.contains(['?', '*']);
                (!plain).then_some(
                    "is no plain path; begin with \"/\", without \"%\", \"?\", \";\", \"\\\", \"//\" and \"..\", and with \"*\" at the end only",
                )
            })?,
            session: raw.session.unwrap_or(false),
        };
        if rule.methods.is_empty() && rule.paths.is_empty() && !rule.session {
            let problem = "a rule without methods, paths and session = true would be for all requests; say which, or use methods and paths";
            return Err(self.error(span, "service.clear.secure", problem));
        }
        Ok(rule)
    }

    /// `shared`: by requests one after another; else a tunnel is for one connection.
    fn tunnels(&self, raw: Option<&raw::Tunnels>, shared: bool) -> Result<Tunnels, Error> {
        let none = raw::Tunnels::default();
        let raw = raw.unwrap_or(&none);
        if let Some(name) = &raw.server_name
            && !matches!(ServerName::try_from(name.get_ref().as_str()), Ok(ServerName::DnsName(_)))
        {
            let problem = format!(
                "\"{}\" is no host name; write the name in the backends' certificates, such as \"backend.example.com\"",
                name.get_ref()
            );
            return Err(self.error(name.span(), "service.tunnels.server_name", problem));
        }
        let client = match (&raw.certificate, &raw.key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(KeyPair {
                certificate: self.file(certificate, "service.tunnels.certificate")?,
                key: self.file(key, "service.tunnels.key")?,
            }),
            (Some(one), None) | (None, Some(one)) => {
                let problem = "certificate and key go together; give both, or none";
                return Err(self.error(one.span(), "service.tunnels.certificate", problem));
            }
        };
        let number = |value: &raw::Number, key: &str, default| match value {
            Some(value) => self.number(value, &format!("service.tunnels.{key}"), ESTABLISHED),
            None => Ok(default),
        };
        // One of each worker's own; and one is left when another ends.
        let default = processors().clamp(if shared { 2 } else { 4 }, MOST) as u32;
        let established = number(&raw.established, "established", default)?;
        let most = number(&raw.most, "most", MOST.max(established as usize) as u32)?;
        if most < established {
            let span = raw.most.as_ref().map_or(0..0, Spanned::span);
            let problem =
                format!("{most} are fewer than the {established} of `established`; raise it, or lower that");
            return Err(self.error(span, "service.tunnels.most", problem));
        }
        let version = self.choice(raw.min_version.as_ref(), "service.tunnels.min_version", &VERSIONS)?;
        let http = self.choice(raw.http.as_ref(), "service.tunnels.http", &HTTP)?;
        Ok(Tunnels {
            only_http1: http.unwrap_or_default(),
            server_name: raw.server_name.as_ref().map(|name| name.get_ref().clone()),
            roots: raw.roots.as_ref().map(|file| self.file(file, "service.tunnels.roots")).transpose()?,
            client,
            only_tls13: version.unwrap_or_default(),
            established,
            most,
            max_age: self.duration(raw.max_age.as_ref(), "service.tunnels.max_age", 3600)?,
            timeout: self.duration(raw.timeout.as_ref(), "service.tunnels.timeout", 5)?,
        })
    }

    fn key_pair(&self, raw: &raw::KeyPair, key: &str) -> Result<KeyPair, Error> {
        let certificate = self.file(&raw.certificate, key)?;
        let key = raw.key.as_ref().map_or_else(|| Ok(certificate.clone()), |file| self.file(file, key))?;
        Ok(KeyPair { certificate, key })
    }

    fn file(&self, path: &Spanned<String>, key: &str) -> Result<PathBuf, Error> {
        let value = Path::new(path.get_ref());
        if !value.is_absolute() || value.file_name().is_none() || path.get_ref().ends_with('/') {
            let problem = format!(
                "\"{}\" is no file's path; give an absolute path, such as \"/etc/dispatcher/web.pem\"",
                path.get_ref()
            );
            return Err(self.error(path.span(), key, problem));
        }
        Ok(value.to_owned())
    }
}
