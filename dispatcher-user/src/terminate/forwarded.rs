//! What backends are told of the client: `Forwarded` (RFC 7239) and its older kin.

use std::{net::IpAddr, sync::Mutex};

use hyper::{
    HeaderMap,
    header::{FORWARDED, HeaderName, HeaderValue, TRAILER},
    http::uri::Authority,
};

use memchr::memchr;

use super::lock;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What is told of one connection's client.
pub(super) struct Told {
    client: IpAddr,
    protocol: &'static str,
    address: HeaderValue,
    /// For the host of the last request: the next is mostly for the same.
    last: Mutex<Option<Named>>,
}

/// What is told of a host.
#[derive(Clone)]
struct Named {
    authority: Authority,
    host: HeaderValue,
    forwarded: HeaderValue,
}

impl Told {
    pub(super) fn of(client: IpAddr, clear: bool) -> Self {
        let protocol = if clear { "http" } else { "https" };
        Self { client, protocol, address: value(client.to_string()), last: Mutex::default() }
    }

    /// Tells the backend whom a request is from, and for which host, which it returns. What the client said of that
    /// itself is not believed.
    pub(super) fn tell(&self, headers: &mut HeaderMap, authority: &Authority, id: &str) -> HeaderValue {
        let Named { host, forwarded, .. } = self.named(authority);
        // Each time another: no table of HTTP/2 is to hold it.
        let mut id = value(id.to_owned());
        id.set_sensitive(true);
        headers.reserve(5);
        for (name, value) in [
            (FORWARDED_FOR, self.address.clone()),
            (FORWARDED_PROTO, HeaderValue::from_static(self.protocol)),
            (FORWARDED_HOST, host.clone()),
            (FORWARDED, forwarded),
            (REQUEST_ID, id),
        ] {
            headers.insert(name, value);
        }
        headers.remove(TRAILER);
        host
    }

    fn named(&self, authority: &Authority) -> Named {
        let mut last = lock(&self.last);
        // Byte by byte: as it was said.
        if let Some(named) = last.as_ref().filter(|named| named.authority.as_str() == authority.as_str()) {
            return named.clone();
        }
        let ip = self.client;
        let quoted = if ip.is_ipv6() { format!("\"[{ip}]\"") } else { ip.to_string() };
        let forwarded = format!("for={quoted};host=\"{authority}\";proto={}", self.protocol);
        let named = Named {
            authority: authority.clone(),
            host: value(authority.to_string()),
            forwarded: value(forwarded),
        };
        last.insert(named).clone()
    }
}

/// Whether a server that takes `_` for `-` (as those of CGI and WSGI do) would take a field for one of ours.
pub(super) fn is_alike(name: &HeaderName) -> bool {
    let ours = [FORWARDED_FOR, FORWARDED_PROTO, FORWARDED_HOST, REQUEST_ID];
    memchr(b'_', name.as_str().as_bytes()).is_some() && {
        let read = name.as_str().replace('_', "-");
        ours.iter().any(|one| *one == read.as_str())
    }
}

/// All that is told is visible ASCII.
fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""))
}
