//! Which class a request belongs to.

use dispatcher_common::session::Session;
use hyper::{
    HeaderMap,
    header::COOKIE,
    http::{HeaderName, request::Parts},
};

use super::{Site, connection::Client, secure, session};
use crate::config::{Rule, Service, class_id};

/// The class that the operator gave the session; else that of the first rule that fits, of the client's network, or
/// of the service.
pub(super) fn class(client: &Client, site: &Site, head: &Parts, session: Option<&Session>) -> u16 {
    match session {
        Some(session) if session.class != 0 => session.class,
        _ if site.service.rules.is_empty() => class_id(&site.service.class),
        _ => class_id(by_rules(&site.service, client, head)),
    }
}

fn by_rules<'s>(service: &'s Service, client: &Client, head: &Parts) -> &'s str {
    let mut rules = service.rules.iter().filter(|rule| !rule.is_by_network());
    match rules.find(|rule| fits(rule, client, head)) {
        Some(rule) => &rule.class,
        None => service.class_of(client.address.ip()),
    }
}

/// All that is given must hold.
fn fits(rule: &Rule, client: &Client, head: &Parts) -> bool {
    let Rule { class: _, clients, server_name, cookie, header, path } = rule;
    let ip = client.address.ip();
    (clients.is_empty() || clients.iter().any(|network| network.has(ip)))
        && server_name.as_ref().is_none_or(|name| client.server_name.as_ref() == Some(name))
        && cookie.as_ref().is_none_or(|(name, value)| has_cookie(&head.headers, name, value))
        && header.as_ref().is_none_or(|(name, value)| has_header(&head.headers, name, value))
        && path.as_ref().is_none_or(|path| secure::fits(path, head.uri.path()))
}

/// Any of several with this name.
fn has_cookie(headers: &HeaderMap, name: &str, value: &str) -> bool {
    let pairs =
        headers.get_all(COOKIE).into_iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b';'));
    pairs.filter_map(|pair| session::value(pair, name)).any(|found| found == value.as_bytes())
}

fn has_header(headers: &HeaderMap, name: &str, value: &str) -> bool {
    let Ok(name) = HeaderName::try_from(name) else { return false };
    headers.get_all(name).into_iter().any(|line| line.as_bytes().trim_ascii() == value.as_bytes())
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn cookies_and_headers_are_compared_whole() {
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, HeaderValue::from_static("a=1; tier=silver"));
        headers.append(COOKIE, HeaderValue::from_static("tier=gold"));
        headers.append("x-tier", HeaderValue::from_static("gold"));
        assert!(has_cookie(&headers, "tier", "gold") && has_cookie(&headers, "tier", "silver"));
        assert!(!has_cookie(&headers, "tier", "gol") && !has_cookie(&headers, "ier", "gold"));
        assert!(has_header(&headers, "x-tier", "gold") && !has_header(&headers, "x-tier", "gold2"));
        assert!(!has_header(&headers, "x-other", "gold"));
    }
}
