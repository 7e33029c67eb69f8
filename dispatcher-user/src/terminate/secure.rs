//! Which requests in clear are declared secure: where users' data is saved at the server.

use hyper::Method;
use percent_encoding::percent_decode_str;

use crate::config::Secure;

/// Whether a rule is for a request. A path counts as the server would read it.
pub(super) fn is_for(rule: &Secure, method: &Method, path: &str, session: bool) -> bool {
    (rule.methods.is_empty() || rule.methods.iter().any(|one| one == method.as_str()))
        && (rule.paths.is_empty() || rule.paths.iter().any(|pattern| fits(pattern, path)))
        && (session || !rule.session)
}

/// Whether a path, as any server might read it, is the pattern's, in which a `*` at the end stands for anything. Case does
/// not count: some servers ignore it.
pub(super) fn fits(pattern: &str, path: &str) -> bool {
    let path = normal(path);
    let is = |path: &str, other: &str| path.eq_ignore_ascii_case(other);
    match pattern.strip_suffix('*') {
        Some(start) => {
            path.get(..start.len()).is_some_and(|begin| is(begin, start))
                || start.strip_suffix('/').is_some_and(|folder| is(&path, folder))
        }
        None => is(path.strip_suffix('/').unwrap_or(&path), pattern.strip_suffix('/').unwrap_or(pattern)),
    }
}

/// A path without percent-encoding, dot segments, empty segments and parameters of segments (`;a=b`), with slashes for
/// backslashes, so that it cannot be written in two ways (RFC 3986 sections 3.3 and 6.2.2).
pub(crate) fn normal(path: &str) -> String {
    // Parameters may have slashes in percent-encoding, which are none.
    let plain = path.split(['/', '\\']).map(without_parameters).collect::<Vec<_>>().join("/");
    let decoded = percent_decode_str(&plain).decode_utf8_lossy();
    let mut segments: Vec<&str> = Vec::new();
    let mut all = decoded.split(['/', '\\']).map(without_parameters).peekable();
    let mut last = false;
    while let Some(segment) = all.next() {
        last = all.peek().is_none() && matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment),
        }
    }
    let end = if last && !segments.is_empty() { "/" } else { "" };
    format!("/{}{end}", segments.join("/"))
}

fn without_parameters(segment: &str) -> &str {
    segment.split(';').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_servers_do() {
        for (path, read) in [
            ("/", "/"),
            ("", "/"),
            ("*", "/*"),
            ("/a/b", "/a/b"),
            ("/a/b/", "/a/b/"),
            ("//a///b", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/a/..", "/"),
            ("/../../a", "/a"),
            ("/%61ccount", "/account"),
            ("/a%2fb", "/a/b"),
            ("/a/%2e%2e/b", "/b"),
            ("/%zz", "/%zz"),
            ("/login;jsessionid=1", "/login"),
            ("/a;b=c/d;e", "/a/d"),
            ("/x/..;/login", "/login"),
            ("/login;a%2fb", "/login"),
            ("/login%3Ba", "/login"),
            ("/x/..\\login", "/login"),
            ("/x/..%5clogin", "/login"),
        ] {
            assert_eq!(normal(path), read, "{path}");
        }
    }

    #[test]
    fn all_that_a_rule_says_must_hold() {
        let rule = |methods: &[&str], paths: &[&str], session| Secure {
            methods: methods.iter().map(|one| (*one).to_owned()).collect(),
            paths: paths.iter().map(|one| (*one).to_owned()).collect(),
            session,
        };
        let posts = rule(&["POST", "PUT"], &[], false);
        let account = rule(&[], &["/account/*", "/login"], false);
        let both = rule(&["POST"], &["/account/*"], false);
        let session = rule(&[], &[], true);
        for (rule, method, path, cookie, secure) in [
            (&posts, Method::POST, "/", false, true),
            (&posts, Method::GET, "/", true, false),
            (&account, Method::GET, "/account/1", false, true),
            (&account, Method::GET, "/account", false, true),
            (&account, Method::GET, "/%61ccount/1", false, true),
            (&account, Method::GET, "/x/..//account/1", false, true),
            (&account, Method::GET, "/accounts", false, false),
            (&account, Method::GET, "/LOGIN", false, true),
            (&account, Method::GET, "/Account/1", false, true),
            (&account, Method::GET, "/ACCOUNT", false, true),
            (&account, Method::GET, "/login;jsessionid=1", false, true),
            (&account, Method::GET, "/x/..\\login", false, true),
            (&account, Method::GET, "/login", false, true),
            (&account, Method::GET, "/login/", false, true),
            (&account, Method::GET, "/login/x", false, false),
            (&both, Method::POST, "/account/1", false, true),
            (&both, Method::GET, "/account/1", false, false),
            (&both, Method::POST, "/", false, false),
            (&session, Method::GET, "/", true, true),
            (&session, Method::GET, "/", false, false),
        ] {
            assert_eq!(is_for(rule, &method, path, cookie), secure, "{rule:?} {method} {path} {cookie}");
        }
    }
}
