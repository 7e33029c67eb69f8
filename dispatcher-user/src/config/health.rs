//! `[service.health]`: how the daemon finds out whether backends serve.

use std::ops::RangeInclusive;

use hyper::{header::HeaderValue, http::uri::PathAndQuery};
use rustls::pki_types::ServerName;

use super::{Error, Spanned, TIMES, Text, raw};

/// How the addresses of a service's backends are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Seconds between two checks of an address.
    pub interval: u32,
    /// Seconds that a check may take.
    pub timeout: u32,
    /// Good checks in a row that bring an address back.
    pub rise: u32,
    /// Failed checks in a row that take it out.
    pub fall: u32,
    /// A TLS handshake is a part of the check.
    pub tls: bool,
    /// Server name (SNI) of the handshake; without one, no name is sent.
    pub server_name: Option<String>,
    /// A request is a part of the check.
    pub http: Option<HttpCheck>,
}

/// The request of a check, and what answers are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCheck {
    /// What is asked for.
    pub path: String,
    /// The `Host` header; without one it is the server name, or the address.
    pub host: Option<String>,
    /// Status codes of good answers.
    pub expect: Vec<RangeInclusive<u16>>,
}

/// Whether a check has a handshake, and whether it has a request.
pub(super) const CHECKS: [(&str, (bool, bool)); 4] =
    [("tcp", (false, false)), ("tls", (true, false)), ("http", (false, true)), ("https", (true, true))];

impl Text<'_> {
    pub(super) fn health(&self, raw: &raw::Service) -> Result<Option<Health>, Error> {
        let Some(health) = &raw.health else { return Ok(None) };
        let check = Some(&health.check);
        let (tls, http) = self.choice(check, "service.health.check", &CHECKS)?.unwrap_or_default();
        let name = health.check.get_ref();
        let misplaced =
            |value: Option<std::ops::Range<usize>>, key: &str, fits: bool, checks: &str| match value {
                Some(span) if !fits => {
                    let problem = format!("is for check = {checks}, not for \"{name}\"; remove it");
                    Err(self.error(span, key, problem))
                }
                _ => Ok(()),
            };
        let (path, host, expect) = (&health.path, &health.host, &health.expect);
        let server_name = &health.server_name;
        let span = |text: &raw::Text| text.as_ref().map(Spanned::span);
        misplaced(span(server_name), "service.health.server_name", tls, "\"tls\" or \"https\"")?;
        for (value, key) in [
            (span(path), "service.health.path"),
            (span(host), "service.health.host"),
            (expect.as_ref().map(Spanned::span), "service.health.expect"),
        ] {
            misplaced(value, key, http, "\"http\" or \"https\"")?;
        }
        if let Some(name) = server_name
            && !matches!(ServerName::try_from(name.get_ref().as_str()), Ok(ServerName::DnsName(_)))
        {
            let problem = format!(
                "\"{}\" is no host name; write it as clients ask for it, such as \"www.example.com\"",
                name.get_ref()
            );
            return Err(self.error(name.span(), "service.health.server_name", problem));
        }
        let times = |value: &raw::Number, key: &str, default| match value {
            Some(value) => self.number(value, key, TIMES),
            None => Ok(default),
        };
        Ok(Some(Health {
            interval: self.duration(health.interval.as_ref(), "service.health.interval", 5)?,
            timeout: self.duration(health.timeout.as_ref(), "service.health.timeout", 2)?,
            rise: times(&health.rise, "service.health.rise", 2)?,
            fall: times(&health.fall, "service.health.fall", 3)?,
            tls,
            server_name: server_name.as_ref().map(|name| name.get_ref().clone()),
            http: if http { Some(self.http_check(health)?) } else { None },
        }))
    }

    fn http_check(&self, raw: &raw::Health) -> Result<HttpCheck, Error> {
        let path = raw.path.as_ref().map_or("/", |path| path.get_ref());
        if let Some(given) = &raw.path
            && (!path.starts_with('/') || PathAndQuery::try_from(path).is_err())
        {
            let problem =
                format!("\"{path}\" is no path of a URL; write one from its \"/\" on, such as \"/health\"");
            return Err(self.error(given.span(), "service.health.path", problem));
        }
        if let Some(host) = &raw.host
            && (host.get_ref().is_empty()
                || host.get_ref().contains(char::is_whitespace)
                || HeaderValue::from_str(host.get_ref()).is_err())
        {
            let problem = format!(
                "\"{}\" is no value of a Host header; write a name, such as \"www.example.com\"",
                host.get_ref()
            );
            return Err(self.error(host.span(), "service.health.host", problem));
        }
        let mut expect = Vec::new();
        match &raw.expect {
            None => expect.push(200..=399),
            Some(list) => {
                for text in list.get_ref().as_slice() {
                    expect.push(codes(text).ok_or_else(|| {
                        let problem = format!(
                            "\"{text}\" is no status code and no range of them; write \"200\", \"200-399\" or a list of such"
                        );
                        self.error(self.element(list, text), "service.health.expect", problem)
                    })?);
                }
                if expect.is_empty() {
                    let problem = "the list is empty, so no answer would be good; write \"200-399\"";
                    return Err(self.error(list.span(), "service.health.expect", problem));
                }
            }
        }
        let host = raw.host.as_ref().map(|host| host.get_ref().clone());
        Ok(HttpCheck { path: path.to_owned(), host, expect })
    }
}

/// Status codes of "200" or "200-399".
fn codes(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (100 <= first && first <= last && last <= 599).then_some(first..=last)
}
