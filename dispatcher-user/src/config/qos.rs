//! Classes, which requests and connections belong to them, and what backends can take: `[[class]]`,
//! `[[service.classify]]` and `[service.limits]`.

use std::{collections::BTreeMap, fmt, net::IpAddr, ops::RangeInclusive};

use dispatcher_common::qos::{self, CLASSES_MAX, LIMITED_MAX, NAMES_MAX, NETWORKS_MAX};
use hyper::header::HeaderName;
use rustls::pki_types::ServerName;

use super::{Config, Error, Miss, Mode, Service, Span, Spanned, Text, clash, raw};
use crate::terminate::secure;

/// The class of what no rule names. It is always there; a `[[class]]` of this name sets its weight.
pub const DEFAULT_CLASS: &str = "default";

pub(super) const CLASS_WEIGHT: RangeInclusive<i64> = 1..=10_000;
pub(super) const PRIORITY: RangeInclusive<i64> = 0..=7;
pub(super) const PERCENT: RangeInclusive<i64> = 0..=100;
pub(super) const CEIL: RangeInclusive<i64> = 1..=100;
pub(super) const DSCP: RangeInclusive<i64> = 0..=63;
pub(super) const RATE: RangeInclusive<i64> = 1..=10_000_000;
pub(super) const INFLIGHT: RangeInclusive<i64> = 1..=1_000_000;
pub(super) const OVER: [(&str, Over); 3] =
    [("drop", Over::Drop), ("reset", Over::Reset), ("hold", Over::Hold)];
const ONLY_REQUESTS: &str = "goes with mode = \"terminate\" only; other services go by `clients`, \"passthrough\" by `server_name` too";
/// Bits a second.
const BANDWIDTH: RangeInclusive<u64> = 8_000..=100_000_000_000_000;

/// A class of requests and connections: those of one class share a part of each backend by its weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Name.
    pub name: String,
    /// See [`class_id`].
    pub id: u16,
    /// Its share is its weight by the sum of all weights.
    pub weight: u32,
    /// 0 to 7: what waits in a class of a higher one is served before all lower ones.
    pub priority: u8,
    /// What it leaves of its share, others may use.
    pub lend: bool,
    /// The most that it takes beyond its share, percent of a backend's rate or requests at a time.
    pub borrow_limit: u8,
    /// The most that it takes in all, percent of a backend's rate or requests at a time.
    pub ceil: u8,
    /// Its packets are marked with it (RFC 2474).
    pub dscp: Option<u8>,
}

impl Class {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            id: class_id(name),
            weight: 1,
            priority: 0,
            lend: true,
            borrow_limit: 100,
            ceil: 100,
            dscp: None,
        }
    }
}

/// The default class, where nothing is said of it.
impl Default for Class {
    fn default() -> Self {
        Self::new(DEFAULT_CLASS)
    }
}

/// The stable id of a class, which session entries hold: 0 for [`DEFAULT_CLASS`], and for no other.
#[must_use]
pub fn class_id(name: &str) -> u16 {
    if name == DEFAULT_CLASS {
        return 0;
    }
    qos::class_id(name)
}

/// What a backend can take. 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bits a second, in each direction.
    pub bandwidth: u64,
    /// New connections.
    pub connections_per_second: u32,
    /// Requests at a time.
    pub max_inflight: u32,
    /// Connections at a time.
    pub max_connections: u32,
}

impl Limits {
    /// These, and where they say nothing, others.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        const fn either(one: u32, other: u32) -> u32 {
            if one == 0 { other } else { one }
        }
        Self {
            bandwidth: if self.bandwidth == 0 { other.bandwidth } else { self.bandwidth },
            connections_per_second: either(self.connections_per_second, other.connections_per_second),
            max_inflight: either(self.max_inflight, other.max_inflight),
            max_connections: either(self.max_connections, other.max_connections),
        }
    }
}

/// What becomes of a new connection beyond its backend's rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Nothing: its client tries again.
    Drop,
    /// It is refused.
    Reset,
    /// It waits in the daemon.
    Hold,
}

/// What waits for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queueing {
    /// What becomes of connections beyond the rate.
    pub over: Over,
    /// No more wait for one backend.
    pub queue: u32,
    /// No longer than so many seconds.
    pub queue_timeout: u32,
    /// The number of requests at a time follows the backend's response times.
    pub adaptive: bool,
}

impl Default for Queueing {
    fn default() -> Self {
        Self { over: Over::Drop, queue: 1000, queue_timeout: 5, adaptive: false }
    }
}

/// What belongs to a class: all that is given holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// The class.
    pub class: String,
    /// Clients of one of these networks; of none: any.
    pub clients: Vec<Network>,
    /// The name asked for by SNI.
    pub server_name: Option<String>,
    /// A cookie and its value.
    pub cookie: Option<(String, String)>,
    /// A header, in lower case, and its value.
    pub header: Option<(String, String)>,
    /// A path, where a `*` at the end stands for anything.
    pub path: Option<String>,
}

impl Rule {
    /// True if it goes by the client's address alone: of these rules the longest prefix decides.
    #[must_use]
    pub const fn is_by_network(&self) -> bool {
        self.server_name.is_none() && self.cookie.is_none() && self.header.is_none() && self.path.is_none()
    }
}

/// A network of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its first address.
    pub address: IpAddr,
    /// Bits that all its addresses share.
    pub prefix: u8,
}

impl Network {
    /// Whether an address belongs to it.
    #[must_use]
    pub fn has(&self, address: IpAddr) -> bool {
        let same = |one: u128, other: u128, bits: u32| {
            one.checked_shr(bits - u32::from(self.prefix)).unwrap_or(0)
                == other.checked_shr(bits - u32::from(self.prefix)).unwrap_or(0)
        };
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(one), IpAddr::V4(other)) => same(u32::from(one).into(), u32::from(other).into(), 32),
            (IpAddr::V6(one), IpAddr::V6(other)) => same(one.into(), other.into(), 128),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let (address, prefix) = text.split_once('/').unwrap_or((text, ""));
        let bad = || format!("\"{text}\" is no network; write \"192.0.2.0/24\" or \"2001:db8::/32\"");
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix = if prefix.is_empty() { bits } else { prefix.parse().map_err(|_| bad())? };
        if prefix > bits {
            return Err(format!("\"{text}\" has a prefix of more than {bits} bits"));
        }
        let rest = |whole: u128, bits: u8| whole.checked_shl(128 - u32::from(bits - prefix)).unwrap_or(0);
        let outside = match address {
            IpAddr::V4(one) if prefix < 32 => rest(u128::from(u32::from(one)), 32),
            IpAddr::V6(one) if prefix < 128 => rest(one.into(), 128),
            IpAddr::V4(_) | IpAddr::V6(_) => 0,
        };
        if outside != 0 {
            return Err(format!(
                "\"{text}\" has bits set beyond its prefix; write the network's first address"
            ));
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

const UNITS: [(&str, u64); 5] = [
    ("Tbit/s", 1_000_000_000_000),
    ("Gbit/s", 1_000_000_000),
    ("Mbit/s", 1_000_000),
    ("kbit/s", 1_000),
    ("bit/s", 1),
];

/// Bits a second of "800Mbit/s" and the like.
fn bandwidth(text: &str) -> Option<u64> {
    let (number, unit) =
        UNITS.iter().find_map(|(name, unit)| Some((text.trim().strip_suffix(name)?, *unit)))?;
    number.trim().parse::<u64>().ok()?.checked_mul(unit)
}

/// In the largest unit that needs no fraction.
pub(super) fn bandwidth_text(bits: u64) -> String {
    let unit = UNITS.iter().find(|(_, unit)| bits.is_multiple_of(*unit)).unwrap_or(&("bit/s", 1));
    format!("{}{}", bits / unit.1, unit.0)
}

impl Text<'_> {
    /// The classes, the default one first.
    pub(super) fn classes(&self, raw: &[raw::Class]) -> Result<Vec<Class>, Error> {
        let mut classes = vec![Class::new(DEFAULT_CLASS)];
        let mut ids = BTreeMap::from([(qos::class_id(DEFAULT_CLASS), DEFAULT_CLASS.to_owned())]);
        for one in raw {
            let name = self.name(&one.name, "class.name")?;
            let mut class = Class::new(&name);
            if let Some(other) = ids.insert(class.id, name.clone()) {
                return Err(self.error(one.name.span(), "class.name", clash(&name, &other)));
            }
            let number = |value: &raw::Number, key: &str, default: u32, range| match value {
                Some(value) => self.number(value, key, range),
                None => Ok(default),
            };
            class.weight = number(&one.weight, "class.weight", 1, CLASS_WEIGHT)?;
            class.priority = number(&one.priority, "class.priority", 0, PRIORITY)? as u8;
            class.lend = one.lend.unwrap_or(true);
            class.borrow_limit = number(&one.borrow_limit, "class.borrow_limit", 100, PERCENT)? as u8;
            class.ceil = number(&one.ceil, "class.ceil", 100, CEIL)? as u8;
            class.dscp = one
                .dscp
                .as_ref()
                .map(|dscp| self.number(dscp, "class.dscp", DSCP))
                .transpose()?
                .map(|n| n as u8);
            if class.id == 0 {
                classes[0] = class;
            } else {
                classes.push(class);
            }
            if classes.len() > CLASSES_MAX {
                let problem = format!(
                    "there are more than {CLASSES_MAX} classes, \"{DEFAULT_CLASS}\" among them; remove some"
                );
                return Err(self.error(one.name.span(), "class.name", problem));
            }
        }
        Ok(classes)
    }

    /// All classes that services name must be there.
    pub(super) fn check_classes(&self, raw: &raw::File, classes: &[Class]) -> Result<(), Error> {
        let known = |name: &Spanned<String>, key: &str| {
            if classes.iter().any(|class| class.name == *name.get_ref()) {
                return Ok(());
            }
            let problem = format!("there is no class \"{}\"; add a [[class]] of this name", name.get_ref());
            Err(self.error(name.span(), key, problem))
        };
        for service in &raw.service {
            if let Some(class) = &service.class {
                known(class, "service.class")?;
            }
            for rule in &service.classify {
                known(&rule.class, "service.classify.class")?;
            }
        }
        Ok(())
    }

    /// The data path keeps so many limits, networks and names.
    pub(super) fn check_limits(&self, raw: &raw::File, config: &Config) -> Result<(), Error> {
        let (mut limited, mut networks, mut names) = (0, 0, 0);
        for (raw, service) in raw.service.iter().zip(&config.services).filter(|(_, one)| !one.mode.is_local())
        {
            let polices = |limits: Limits| limits.bandwidth > 0 || limits.connections_per_second > 0;
            limited += service.backends.iter().filter(|one| polices(service.limits_of(one))).count();
            networks += service.rules.iter().map(|rule| rule.clients.len()).sum::<usize>();
            names += service.rules.iter().filter(|rule| rule.server_name.is_some()).count();
            for (have, most, what, key) in [
                (limited, LIMITED_MAX, "backends with limits", "service.limits"),
                (networks, NETWORKS_MAX, "networks", "service.classify"),
                (names, NAMES_MAX, "server names with classes", "service.classify"),
            ] {
                if have > most as usize {
                    let problem = format!(
                        "there are more than {most} {what}, which is the most that one dispatcher keeps"
                    );
                    return Err(self.error(raw.name.span(), key, problem));
                }
            }
        }
        Ok(())
    }

    /// What a service's backends can take.
    pub(super) fn limits(
        &self,
        raw: Option<&raw::Limits>,
        mode: Mode,
        miss: Miss,
        span: Span,
        table: &str,
    ) -> Result<Limits, Error> {
        let Some(raw) = raw else { return Ok(Limits::default()) };
        let ours = !mode.is_local();
        for (given, key, goes, with) in [
            (raw.bandwidth.is_some(), "bandwidth", ours, "mode = \"passthrough\" or \"l4\""),
            (
                raw.connections_per_second.is_some(),
                "connections_per_second",
                ours,
                "mode = \"passthrough\" or \"l4\"",
            ),
            (raw.max_inflight.is_some(), "max_inflight", mode == Mode::Terminate, "mode = \"terminate\""),
            (raw.max_connections.is_some(), "max_connections", miss == Miss::Daemon, "miss = \"daemon\""),
        ] {
            if given && !goes {
                let problem = format!("goes with {with} only; set that, or remove it");
                return Err(self.error(span, &format!("{table}.{key}"), problem));
            }
        }
        let number = |value: &raw::Number, key: &str, range| match value {
            Some(value) => self.number(value, &format!("{table}.{key}"), range),
            None => Ok(0),
        };
        Ok(Limits {
            bandwidth: match &raw.bandwidth {
                None => 0,
                Some(text) => {
                    let rate = bandwidth(text.get_ref()).filter(|rate| BANDWIDTH.contains(rate));
                    rate.ok_or_else(|| {
                        let problem = format!(
                            "\"{}\" is no rate from {} to {}; write \"800Mbit/s\" or \"10Gbit/s\", or remove it where there is no limit",
                            text.get_ref(),
                            bandwidth_text(*BANDWIDTH.start()),
                            bandwidth_text(*BANDWIDTH.end())
                        );
                        self.error(text.span(), &format!("{table}.bandwidth"), problem)
                    })?
                }
            },
            connections_per_second: number(&raw.connections_per_second, "connections_per_second", RATE)?,
            max_inflight: number(&raw.max_inflight, "max_inflight", INFLIGHT)?,
            max_connections: number(&raw.max_connections, "max_connections", INFLIGHT)?,
        })
    }

    /// How it waits for them.
    pub(super) fn queueing(&self, raw: &raw::Service, mode: Mode, miss: Miss) -> Result<Queueing, Error> {
        let default = Queueing::default();
        let Some(limits) = &raw.limits else { return Ok(default) };
        let waits = mode == Mode::Terminate || miss == Miss::Daemon;
        let span = |key: Option<Span>| key.unwrap_or_else(|| raw.name.span());
        for (given, key, goes, with) in [
            (limits.over.as_ref().map(Spanned::span), "over", !mode.is_local(), "connections_per_second"),
            (
                limits.queue.as_ref().map(Spanned::span),
                "queue",
                waits,
                "mode = \"terminate\" or miss = \"daemon\"",
            ),
            (
                limits.queue_timeout.as_ref().map(Spanned::span),
                "queue_timeout",
                mode == Mode::Terminate,
                "mode = \"terminate\": clients do not wait longer for the answer to a hello",
            ),
            (
                limits.adaptive.map(|_| raw.name.span()),
                "adaptive",
                mode == Mode::Terminate,
                "mode = \"terminate\"",
            ),
        ] {
            if given.is_some() && !goes {
                let problem = format!("goes with {with} only; set that, or remove it");
                return Err(self.error(span(given), &format!("service.limits.{key}"), problem));
            }
        }
        let over = self.choice(limits.over.as_ref(), "service.limits.over", &OVER)?.unwrap_or(default.over);
        if over == Over::Hold && miss != Miss::Daemon {
            let problem = "\"hold\" goes with miss = \"daemon\" only: connections wait in the daemon; set that, or \"drop\" or \"reset\"";
            return Err(self.error(
                span(limits.over.as_ref().map(Spanned::span)),
                "service.limits.over",
                problem,
            ));
        }
        let queue = match &limits.queue {
            Some(queue) => self.number(queue, "service.limits.queue", INFLIGHT)?,
            None => default.queue,
        };
        let key = "service.limits.queue_timeout";
        let queue_timeout = self.duration(limits.queue_timeout.as_ref(), key, default.queue_timeout)?;
        Ok(Queueing { over, queue, queue_timeout, adaptive: limits.adaptive.unwrap_or(false) })
    }

    /// Which class what comes to a service belongs to.
    pub(super) fn rules(&self, raw: &raw::Service, mode: Mode) -> Result<Vec<Rule>, Error> {
        raw.classify.iter().map(|rule| self.rule(rule, mode)).collect()
    }

    fn rule(&self, raw: &raw::Classify, mode: Mode) -> Result<Rule, Error> {
        let key = |name: &str| format!("service.classify.{name}");
        let (requests, named) = (mode == Mode::Terminate, mode == Mode::Passthrough);
        for (text, name, goes, problem) in [
            (
                &raw.server_name,
                "server_name",
                requests || named,
                "goes with mode = \"passthrough\" or \"terminate\" only; other services go by `clients`",
            ),
            (&raw.cookie, "cookie", requests, ONLY_REQUESTS),
            (&raw.header, "header", requests, ONLY_REQUESTS),
            (&raw.path, "path", requests, ONLY_REQUESTS),
        ] {
            if let Some(text) = text
                && !goes
            {
                return Err(self.error(text.span(), &key(name), problem));
            }
        }
        if let (true, Some(name), Some(_)) = (named, &raw.server_name, &raw.clients) {
            let problem = "goes together with `clients` with mode = \"terminate\" only; leave one of the two out, or write two rules, of which the one with `server_name` comes first";
            return Err(self.error(name.span(), &key("server_name"), problem));
        }
        let mut rule = Rule { class: raw.class.get_ref().clone(), ..Rule::default() };
        if let Some(list) = &raw.clients {
            for text in list.get_ref().as_slice() {
                let network = Network::parse(text);
                rule.clients.push(
                    network
                        .map_err(|problem| self.error(self.element(list, text), &key("clients"), problem))?,
                );
            }
        }
        let refused = |text: &Spanned<String>, name: &str, problem: &str| {
            let problem = format!("\"{}\" {problem}", text.get_ref());
            Err(self.error(text.span(), &key(name), problem))
        };
        if let Some(text) = &raw.server_name {
            if !matches!(ServerName::try_from(text.get_ref().as_str()), Ok(ServerName::DnsName(_))) {
                return refused(text, "server_name", "is no host name; write it as clients ask for it");
            }
            rule.server_name = Some(text.get_ref().to_ascii_lowercase());
        }
        if let Some(text) = &raw.cookie {
            let Some((name, value)) = text.get_ref().split_once('=').filter(|(name, _)| !name.is_empty())
            else {
                return refused(text, "cookie", "is no cookie; write \"NAME=VALUE\"");
            };
            rule.cookie = Some((name.to_owned(), value.to_owned()));
        }
        if let Some(text) = &raw.header {
            let pair = text.get_ref().split_once(':');
            let Some((name, value)) = pair.filter(|(name, _)| HeaderName::try_from(*name).is_ok()) else {
                return refused(text, "header", "is no header; write \"NAME: VALUE\"");
            };
            rule.header = Some((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        if let Some(text) = &raw.path {
            let path = text.get_ref().strip_suffix('*').unwrap_or(text.get_ref());
            if !path.starts_with('/') || secure::normal(path) != path || path.contains(['?', '*']) {
                return refused(
                    text,
                    "path",
                    "is no plain path; begin with \"/\", without \"%\", \"?\", \"//\" and \"..\", and with \"*\" at the end only",
                );
            }
            rule.path = Some(text.get_ref().clone());
        }
        if rule.is_by_network() && rule.clients.is_empty() {
            let problem = "a rule that says nothing would be for all; give `clients` or another key, or set the service's `class`";
            return Err(self.error(raw.class.span(), "service.classify", problem));
        }
        Ok(rule)
    }
}

impl Service {
    /// What one of its backends can take.
    #[must_use]
    pub fn limits_of(&self, backend: &super::Backend) -> Limits {
        backend.limits.or(self.limits)
    }

    /// True where the data path looks at the name that a client asks for.
    #[must_use]
    pub fn classifies_names(&self) -> bool {
        !self.mode.is_local() && self.rules.iter().any(|rule| rule.server_name.is_some())
    }

    /// True when connections beyond what backends can take wait in the daemon: where that is said, and where there
    /// may be only so many at a time, which nobody else knows.
    #[must_use]
    pub fn holds_connections(&self) -> bool {
        let limited = || self.backends.iter().any(|backend| self.limits_of(backend).max_connections > 0);
        self.queueing.over == Over::Hold || self.miss == Miss::Daemon && limited()
    }

    /// The class of a client that no other rule is about.
    #[must_use]
    pub fn class_of(&self, client: IpAddr) -> &str {
        let networks = self.rules.iter().filter(|rule| rule.is_by_network());
        let fits = networks.flat_map(|rule| rule.clients.iter().map(move |one| (one, &rule.class)));
        let longest = fits.filter(|(one, _)| one.has(client)).max_by_key(|(one, _)| one.prefix);
        longest.map_or(&self.class, |(_, class)| class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::written;

    /// Lines at the top, of the service, and of its backend.
    fn text(top: &str, service: &str, backend: &str) -> String {
        format!(
            "interfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:443\"\n{service}\n\
             [[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1:443\"\n{backend}\n{top}"
        )
    }

    fn good(top: &str, service: &str, backend: &str) -> Config {
        let text = text(top, service, backend);
        let config = Config::parse(&text, &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let again = toml::to_string(&written(&config)).expect("written");
        assert_eq!(Config::parse(&again, &[]).unwrap_or_else(|error| panic!("{error}\n{again}")), config);
        config
    }

    const GOLD: &str = "[[class]]\nname = \"gold\"\nweight = 8\n";

    #[test]
    fn the_default_class_is_always_there() {
        let config = good("", "", "");
        assert_eq!(config.classes, [Class::new(DEFAULT_CLASS)]);
        assert_eq!((config.classes[0].id, config.classes[0].weight), (0, 1));
        let config = good("[[class]]\nname = \"default\"\nweight = 3\n", "", "");
        assert_eq!((config.classes.len(), config.classes[0].weight), (1, 3));
    }

    #[test]
    fn all_keys_are_read_and_written() {
        let class = "[[class]]\nname = \"gold\"\nweight = 8\npriority = 2\nlend = false\nborrow_limit = 10\n\
                     ceil = 50\ndscp = 46\n";
        let config = good(
            class,
            "miss = \"daemon\"\nclass = \"gold\"\nclassify = [{ class = \"default\", clients = [\"10.0.0.0/8\", \"fd00::/8\"] }]\n\
             limits = { bandwidth = \"1500Mbit/s\", connections_per_second = 200, max_connections = 9, over = \"hold\", queue = 7 }",
            "limits = { bandwidth = \"1Gbit/s\" }",
        );
        let gold = Class {
            weight: 8,
            priority: 2,
            lend: false,
            borrow_limit: 10,
            ceil: 50,
            dscp: Some(46),
            ..Class::new("gold")
        };
        assert_eq!(config.classes[1], gold);
        let service = &config.services[0];
        let limits = service.limits_of(&service.backends[0]);
        assert_eq!(
            limits,
            Limits {
                bandwidth: 1_000_000_000,
                connections_per_second: 200,
                max_inflight: 0,
                max_connections: 9
            }
        );
        assert_eq!((service.queueing.over, service.queueing.queue), (Over::Hold, 7));
        let terminate =
            "mode = \"terminate\"\nterminate = { certificates = [{ certificate = \"/x.pem\" }] }\n";
        let config = good(
            GOLD,
            &format!(
                "{terminate}limits = {{ max_inflight = 4, queue_timeout = \"2s\", adaptive = true }}\n\
                 classify = [{{ class = \"gold\", server_name = \"A.example\", cookie = \"tier=gold\", header = \"X-Tier: gold\", path = \"/pay/*\" }}]"
            ),
            "",
        );
        let service = &config.services[0];
        assert_eq!((service.limits.max_inflight, service.queueing.queue_timeout), (4, 2));
        assert!(service.queueing.adaptive);
        let rule = &service.rules[0];
        assert_eq!(rule.header, Some(("x-tier".to_owned(), "gold".to_owned())));
        assert_eq!(rule.server_name.as_deref(), Some("a.example"));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (top, service, backend, expected) in [
            (
                "[[class]]\nname = \"gold\"\nweight = 0\n",
                "",
                "",
                "class.weight: 0 is out of range; use 1 to 10000",
            ),
            (
                "[[class]]\nname = \"gold\"\nweight = 4294967296\n",
                "",
                "",
                "class.weight: 4294967296 is out of range",
            ),
            ("[[class]]\nname = \"go ld\"\n", "", "", "is no name"),
            (&GOLD.repeat(2), "", "", "gold is given twice"),
            ("[[class]]\nname = \"gold\"\nceil = 0\n", "", "", "class.ceil: 0 is out of range"),
            ("[[class]]\nname = \"gold\"\ndscp = 64\n", "", "", "class.dscp: 64 is out of range"),
            ("", "class = \"gold\"", "", "there is no class \"gold\"; add a [[class]]"),
            (GOLD, "classify = [{ class = \"gold\" }]", "", "a rule that says nothing"),
            (
                GOLD,
                "classify = [{ class = \"gold\", clients = \"10.0.0.1/8\" }]",
                "",
                "bits set beyond its prefix",
            ),
            (GOLD, "classify = [{ class = \"gold\", clients = \"10.0.0.0/33\" }]", "", "more than 32 bits"),
            (GOLD, "classify = [{ class = \"gold\", clients = \"x\" }]", "", "is no network"),
            (
                GOLD,
                "classify = [{ class = \"gold\", path = \"/\" }]",
                "",
                "goes with mode = \"terminate\" only",
            ),
            (
                GOLD,
                "mode = \"l4\"\nclassify = [{ class = \"gold\", server_name = \"a.example\" }]",
                "",
                "service.classify.server_name: goes with mode = \"passthrough\" or \"terminate\" only",
            ),
            (
                GOLD,
                "classify = [{ class = \"gold\", server_name = \"a.example\", clients = \"10.0.0.0/8\" }]",
                "",
                "service.classify.server_name: goes together with `clients` with mode = \"terminate\" only",
            ),
            (
                GOLD,
                "classify = [{ class = \"gold\", server_name = \"a.example\", cookie = \"a=b\" }]",
                "",
                "service.classify.cookie: goes with mode = \"terminate\" only",
            ),
            (
                GOLD,
                "classify = [{ class = \"gold\", header = \"X-A: b\" }]",
                "",
                "service.classify.header: goes with mode = \"terminate\" only",
            ),
            (GOLD, "classify = [{ class = \"gold\", server_name = \"*.example\" }]", "", "is no host name"),
            (GOLD, "classify = [{ class = \"gold\", server_name = \"10.0.0.1\" }]", "", "is no host name"),
            ("", "limits = { bandwidth = \"0Mbit/s\" }", "", "is no rate from 8kbit/s to 100Tbit/s"),
            ("", "limits = { bandwidth = \"900Tbit/s\" }", "", "is no rate from"),
            ("", "limits = { bandwidth = \"99999999999999999999Tbit/s\" }", "", "is no rate from"),
            ("", "limits = { bandwidth = \"800\" }", "", "is no rate from"),
            ("", "limits = { connections_per_second = 0 }", "", "0 is out of range"),
            ("", "limits = { max_inflight = 5 }", "", "goes with mode = \"terminate\" only"),
            ("", "limits = { max_connections = 5 }", "", "goes with miss = \"daemon\" only"),
            ("", "limits = { over = \"hold\" }", "", "goes with miss = \"daemon\" only"),
            ("", "", "limits = { max_inflight = 5 }", "service.backend.limits.max_inflight: goes with"),
        ] {
            let text = text(top, service, backend);
            let error = Config::parse(&text, &[]).expect_err(&text).to_string();
            assert!(error.contains(expected) && error.starts_with("line "), "{error}\n{text}");
        }
        let many: String = (0..16).map(|n| format!("[[class]]\nname = \"c{n}\"\n")).collect();
        let error = Config::parse(&text(&many, "", ""), &[]).expect_err("too many").to_string();
        assert!(error.contains("more than 16 classes"), "{error}");
        let named = |number: u32| {
            let rule = |n| format!("{{ class = \"default\", server_name = \"{n}.example\" }}");
            let rules: Vec<String> = (0..number).map(rule).collect();
            text("", &format!("classify = [{}]", rules.join(", ")), "")
        };
        Config::parse(&named(NAMES_MAX), &[]).expect("so many names");
        let error = Config::parse(&named(NAMES_MAX + 1), &[]).expect_err("too many").to_string();
        assert!(error.starts_with("line 3: service.classify: "), "{error}");
        assert!(error.contains("more than 4096 server names with classes"), "{error}");
    }

    #[test]
    fn passthrough_goes_by_names_too() {
        let rules = "classify = [{ class = \"gold\", server_name = \"A.example\" }, { class = \"default\", clients = \"10.0.0.0/8\" }]";
        let config = good(GOLD, rules, "");
        let service = &config.services[0];
        assert_eq!(service.rules[0].server_name.as_deref(), Some("a.example"));
        assert!(
            service.classifies_names() && !good(GOLD, "class = \"gold\"", "").services[0].classifies_names()
        );
        let terminate = format!(
            "mode = \"terminate\"\nterminate = {{ certificates = [{{ certificate = \"/x.pem\" }}] }}\n{rules}"
        );
        assert!(!good(GOLD, &terminate, "").services[0].classifies_names(), "the daemon looks itself");
    }

    #[test]
    fn the_longest_prefix_decides() {
        let classes = format!("{GOLD}[[class]]\nname = \"silver\"\n");
        let config = good(
            &classes,
            "classify = [{ class = \"gold\", clients = [\"10.0.0.0/8\", \"fd00::/8\"] }, { class = \"silver\", clients = \"10.1.0.0/16\" }]",
            "",
        );
        let of = |client: &str| config.services[0].class_of(client.parse().expect("an address"));
        assert_eq!([of("10.0.0.1"), of("10.1.2.3"), of("192.0.2.1")], ["gold", "silver", "default"]);
        assert_eq!([of("fd12::1"), of("::ffff:10.1.0.1"), of("2001:db8::1")], ["gold", "silver", "default"]);
    }

    #[test]
    fn rates_are_written_in_the_largest_unit() {
        for text in ["800Mbit/s", "8kbit/s", "1500Mbit/s", "10Gbit/s", "12345bit/s", "100Tbit/s"] {
            assert_eq!(bandwidth(text).map(bandwidth_text).as_deref(), Some(text));
        }
    }
}
