//! Classes, which requests and connections belong to them, and what backends can take: `[[class]]`,
//! `[[service.classify]]` and `[service.limits]`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    ops::RangeInclusive,
};

use dispatcher_common::qos::{self, CLASSES_MAX, LIMITED_MAX, NAMES_MAX, NETWORKS_MAX};
use hyper::header::{HeaderName, HeaderValue};
use rustls::pki_types::ServerName;

use super::{Config, Error, Miss, Mode, Protocol, Service, Span, Spanned, Text, clash, raw};
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
const OF_PACKETS: &str = "goes with mode = \"passthrough\" or \"l4\" only; set that, or remove it";
const OF_REQUESTS: &str = "goes with mode = \"terminate\" only; set that, or remove it";
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

/// The same of a class that somebody names: also the default one's is none that would leave it to what comes next. No
/// other class has that id, and what has an id that no class has counts as the default one's.
#[must_use]
pub fn named_class(name: &str) -> u16 {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
        // Clients of this form are IPv4 clients, which no IPv6 network has.
        if let (IpAddr::V6(v6), 96..) = (address, prefix)
            && let Some(v4) = v6.to_ipv4_mapped()
        {
            return Err(format!(
                "\"{text}\" is an IPv4 network in IPv6 form; write \"{v4}/{}\"",
                prefix - 96
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

/// Where a key stands that is given.
fn span<T>(key: &Option<Spanned<T>>) -> Option<Span> {
    key.as_ref().map(Spanned::span)
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
        table: &str,
    ) -> Result<Limits, Error> {
        let Some(raw) = raw else { return Ok(Limits::default()) };
        let ours = !mode.is_local();
        let connections = match mode {
            Mode::Passthrough => "goes with miss = \"daemon\" only; set that, or remove it",
            Mode::L4 => {
                "goes with mode = \"passthrough\" and miss = \"daemon\" only; set these, or remove it"
            }
            Mode::Terminate | Mode::Relay => {
                "goes with mode = \"passthrough\" only; remove it: `max_connections` of the service bounds clients' connections"
            }
        };
        for (given, key, goes, problem) in [
            (span(&raw.bandwidth), "bandwidth", ours, OF_PACKETS),
            (span(&raw.connections_per_second), "connections_per_second", ours, OF_PACKETS),
            (span(&raw.max_inflight), "max_inflight", mode == Mode::Terminate, OF_REQUESTS),
            (span(&raw.max_connections), "max_connections", miss == Miss::Daemon, connections),
        ] {
            if let (Some(span), false) = (given, goes) {
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
                            "\"{}\" is no rate from {} to {}; write a whole number of bit/s, kbit/s, Mbit/s, Gbit/s or Tbit/s, such as \"800Mbit/s\", or remove it where there is no limit",
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
        let requests = mode == Mode::Terminate;
        for (given, key, goes, problem) in [
            (span(&limits.over), "over", !mode.is_local(), OF_PACKETS),
            (
                span(&limits.queue),
                "queue",
                requests || miss == Miss::Daemon,
                "goes with mode = \"terminate\", or \"passthrough\" with miss = \"daemon\", only; set that, or remove it",
            ),
            (
                span(&limits.queue_timeout),
                "queue_timeout",
                requests,
                "goes with mode = \"terminate\" only: clients wait no longer than 2.5 s for the answer to a hello; remove it",
            ),
            (span(&limits.adaptive), "adaptive", requests, OF_REQUESTS),
        ] {
            if let (Some(span), false) = (given, goes) {
                return Err(self.error(span, &format!("service.limits.{key}"), problem));
            }
        }
        let over = self.choice(limits.over.as_ref(), "service.limits.over", &OVER)?.unwrap_or(default.over);
        if let (Some(span), Over::Hold, Miss::Table) = (span(&limits.over), over, miss) {
            let problem = "\"hold\" goes with mode = \"passthrough\" and miss = \"daemon\" only: connections wait in the daemon; set that, or \"drop\" or \"reset\"";
            return Err(self.error(span, "service.limits.over", problem));
        }
        let queue = match &limits.queue {
            Some(queue) => self.number(queue, "service.limits.queue", INFLIGHT)?,
            None => default.queue,
        };
        let key = "service.limits.queue_timeout";
        let queue_timeout = self.duration(limits.queue_timeout.as_ref(), key, default.queue_timeout)?;
        Ok(Queueing {
            over,
            queue,
            queue_timeout,
            adaptive: limits.adaptive.as_ref().is_some_and(|adaptive| *adaptive.get_ref()),
        })
    }

    /// Which class what comes to a service belongs to.
    pub(super) fn rules(&self, raw: &raw::Service, mode: Mode) -> Result<Vec<Rule>, Error> {
        if mode == Mode::Relay {
            let rule = raw.classify.first().map(|rule| (&rule.class, "service.classify"));
            if let Some((class, key)) = raw.class.as_ref().map(|class| (class, "service.class")).or(rule) {
                let problem =
                    "goes with other modes only: connections that are relayed have no classes; remove it";
                return Err(self.error(class.span(), key, problem));
            }
        }
        let rules = raw.classify.iter().map(|rule| self.rule(rule, mode)).collect::<Result<Vec<_>, _>>()?;
        let mut before = BTreeSet::<Network>::new();
        for (raw, rule) in raw.classify.iter().zip(&rules).filter(|(_, rule)| rule.is_by_network()) {
            let Some(list) = &raw.clients else { continue };
            let texts = list.get_ref().as_slice();
            if let Some((text, network)) =
                texts.iter().zip(&rule.clients).find(|(_, network)| before.contains(network))
            {
                let problem = format!("{network} is in two rules of this service; remove it from one");
                return Err(self.error(self.element(list, text), "service.classify.clients", problem));
            }
            before.extend(&rule.clients);
        }
        Ok(rules)
    }

    /// Keys that change nothing, for want of others: those who wrote them expect something of them.
    pub(super) fn check_idle(&self, raw: &raw::File, config: &Config) -> Result<(), Error> {
        for (raw, service) in raw.service.iter().zip(&config.services) {
            let Some(limits) = &raw.limits else { continue };
            let requests = service.limits_requests();
            let resets = service.protocol == Protocol::Udp && service.queueing.over == Over::Reset;
            let adapts = service.queueing.adaptive;
            let queue = if service.mode == Mode::Terminate {
                "goes with max_inflight only, of the service or of a backend; set that, or remove it"
            } else {
                "goes with connections_per_second and over = \"hold\", or with max_connections, only; set these, or remove it"
            };
            for (given, key, goes, problem) in [
                (
                    span(&limits.over),
                    "over",
                    service.limits_any(|limits| limits.connections_per_second > 0),
                    "goes with connections_per_second only, of the service or of a backend; set that, or remove it",
                ),
                (
                    span(&limits.over),
                    "over",
                    !resets,
                    "\"reset\" goes with protocol = \"tcp\" only: UDP has no RST; set \"drop\"",
                ),
                (span(&limits.queue), "queue", service.queues(), queue),
                (span(&limits.queue_timeout), "queue_timeout", requests, queue),
                (
                    span(&limits.adaptive),
                    "adaptive",
                    requests || !adapts,
                    "goes with max_inflight only; set the most that it may grow to",
                ),
            ] {
                if let (Some(span), false) = (given, goes) {
                    return Err(self.error(span, &format!("service.limits.{key}"), problem));
                }
            }
        }
        Ok(())
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
            let Some((name, value)) = text.get_ref().split_once('=').filter(|(name, value)| {
                let ends = |c: char| c == ';' || c.is_whitespace() || c.is_control();
                HeaderName::try_from(*name).is_ok() && !value.contains(ends)
            }) else {
                let problem = "is no cookie; write \"NAME=VALUE\", one cookie without spaces and \";\"";
                return refused(text, "cookie", problem);
            };
            rule.cookie = Some((name.to_owned(), value.to_owned()));
        }
        if let Some(text) = &raw.header {
            let pair = text.get_ref().split_once(':');
            let Some((name, value)) = pair.filter(|(name, value)| {
                HeaderName::try_from(*name).is_ok() && HeaderValue::try_from(*value).is_ok()
            }) else {
                let problem = "is no header; write \"NAME: VALUE\", without control characters";
                return refused(text, "header", problem);
            };
            rule.header = Some((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        if let Some(text) = &raw.path {
            let path = text.get_ref().strip_suffix('*').unwrap_or(text.get_ref());
            if !path.starts_with('/') || secure::normal(path) != path || path.contains(['?', '*']) {
                return refused(
                    text,
                    "path",
                    "is no plain path; begin with \"/\", without \"%\", \"?\", \";\", \"\\\", \"//\" and \"..\", and with \"*\" at the end only",
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

    /// True if the service, or one of its backends, has this.
    fn limits_any(&self, has: impl Fn(Limits) -> bool) -> bool {
        has(self.limits) || self.backends.iter().any(|backend| has(backend.limits))
    }

    /// True where new connections may be too many for a backend.
    pub(super) fn limits_connections(&self) -> bool {
        self.limits_any(|limits| limits.connections_per_second > 0 || limits.max_connections > 0)
    }

    /// True where requests may be too many for a backend.
    pub(super) fn limits_requests(&self) -> bool {
        self.limits_any(|limits| limits.max_inflight > 0)
    }

    /// True where something may wait.
    pub(super) fn queues(&self) -> bool {
        self.limits_requests() || self.holds_connections() && self.limits_connections()
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

    /// A service that ends TLS.
    const TERMINATE: &str =
        "mode = \"terminate\"\nterminate = { certificates = [{ certificate = \"/x.pem\" }] }\n";

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
            (
                "",
                "limits = { over = \"hold\" }",
                "",
                "goes with mode = \"passthrough\" and miss = \"daemon\" only",
            ),
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

    /// The service's lines begin with line 5.
    #[test]
    fn errors_give_the_line_of_the_key() {
        let terminate = |lines: &str| format!("{TERMINATE}{lines}");
        let table = |keys: &str| format!("miss = \"daemon\"\n[service.limits]\n{keys}");
        let local = |keys: &str| format!("{TERMINATE}[service.limits]\nqueue = 5\n{keys}");
        let only_requests = "goes with mode = \"terminate\" only; set that, or remove it";
        let only_packets = "goes with mode = \"passthrough\" or \"l4\" only; set that, or remove it";
        let clients = "goes with mode = \"passthrough\" only; remove it: `max_connections` of the service bounds clients' connections";
        let waits = "clients wait no longer than 2.5 s for the answer to a hello; remove it";
        let relay = "mode = \"relay\"\n";
        for (service, backend, line, expected) in [
            (
                "classify = [{ class = \"gold\", clients = \"10.0.0.0/8\" },\n{ class = \"default\", clients = [\"10.1.0.0/16\",\n\"10.0.0.0/8\"] }]".to_owned(),
                "",
                7,
                "service.classify.clients: 10.0.0.0/8 is in two rules of this service; remove it from one",
            ),
            (
                "classify = [{ class = \"gold\", clients = \"10.0.0.1\" },\n{ class = \"gold\", clients = \"10.0.0.1/32\" }]".to_owned(),
                "",
                6,
                "service.classify.clients: 10.0.0.1/32 is in two rules of this service",
            ),
            (
                "classify = [{ class = \"gold\", clients = \"::ffff:10.0.0.0/104\" }]".to_owned(),
                "",
                5,
                "is an IPv4 network in IPv6 form; write \"10.0.0.0/8\"",
            ),
            (
                terminate("[service.limits]\nadaptive = true"),
                "",
                8,
                "service.limits.adaptive: goes with max_inflight only; set the most that it may grow to",
            ),
            (
                table("queue = 5\nadaptive = true"),
                "",
                8,
                &format!("service.limits.adaptive: {only_requests}"),
            ),
            (table("queue = 5\nmax_inflight = 1"), "", 8, &format!("service.limits.max_inflight: {only_requests}")),
            (local("bandwidth = \"1Gbit/s\""), "", 9, &format!("service.limits.bandwidth: {only_packets}")),
            (
                local("connections_per_second = 1"),
                "",
                9,
                &format!("service.limits.connections_per_second: {only_packets}"),
            ),
            (local("max_connections = 1"), "", 9, &format!("service.limits.max_connections: {clients}")),
            (local("over = \"drop\""), "", 9, &format!("service.limits.over: {only_packets}")),
            (
                terminate(""),
                "limits = {\nmax_connections = 1 }",
                12,
                &format!("service.backend.limits.max_connections: {clients}"),
            ),
            (
                terminate(""),
                "[service.backend.limits]\nbandwidth = \"1Gbit/s\"",
                12,
                &format!("service.backend.limits.bandwidth: {only_packets}"),
            ),
            (
                "mode = \"l4\"\n[service.limits]\nmax_connections = 1".to_owned(),
                "",
                7,
                "goes with mode = \"passthrough\" and miss = \"daemon\" only; set these, or remove it",
            ),
            (table("max_connections = 1\nqueue_timeout = \"1s\""), "", 8, waits),
            (
                "mode = \"l4\"\nprotocol = \"udp\"\n[service.limits]\nconnections_per_second = 1\nover = \"reset\"".to_owned(),
                "",
                9,
                "service.limits.over: \"reset\" goes with protocol = \"tcp\" only: UDP has no RST; set \"drop\"",
            ),
            (
                "[service.limits]\nbandwidth = \"1Gbit/s\"\nover = \"drop\"".to_owned(),
                "",
                7,
                "service.limits.over: goes with connections_per_second only, of the service or of a backend",
            ),
            (
                "miss = \"daemon\"\n[service.limits]\nmax_connections = 9\nover = \"drop\"".to_owned(),
                "",
                8,
                "service.limits.over: goes with connections_per_second only, of the service or of a backend",
            ),
            (
                table("bandwidth = \"1Gbit/s\"\nqueue = 5"),
                "",
                8,
                "service.limits.queue: goes with connections_per_second and over = \"hold\", or with max_connections, only",
            ),
            (table("connections_per_second = 5\nqueue = 5"), "", 8, "service.limits.queue: goes with"),
            (local(""), "", 8, "service.limits.queue: goes with max_inflight only"),
            (
                terminate("limits = { queue_timeout = \"1s\" }"),
                "",
                7,
                "service.limits.queue_timeout: goes with max_inflight only, of the service or of a backend",
            ),
            (
                format!("{relay}class = \"gold\""),
                "",
                6,
                "service.class: goes with other modes only: connections that are relayed have no classes",
            ),
            (
                format!("{relay}classify = [{{ class = \"gold\", clients = \"10.0.0.0/8\" }}]"),
                "",
                6,
                "service.classify: goes with other modes only: connections that are relayed have no classes",
            ),
            (
                terminate("classify = [{ class = \"gold\", cookie = \"a=b; c=d\" }]"),
                "",
                7,
                "\"a=b; c=d\" is no cookie; write \"NAME=VALUE\", one cookie without spaces",
            ),
            (
                terminate("classify = [{ class = \"gold\", cookie = \"a = b\" }]"),
                "",
                7,
                "\"a = b\" is no cookie",
            ),
            (
                terminate("classify = [{ class = \"gold\", header = \"X-A: b\\r\\nX-B: c\" }]"),
                "",
                7,
                "\"X-A: b\\r\\nX-B: c\" is no header; write \"NAME: VALUE\", without control characters",
            ),
            (
                "limits = { bandwidth = \"1.5Gbit/s\" }".to_owned(),
                "",
                5,
                "write a whole number of bit/s, kbit/s, Mbit/s, Gbit/s or Tbit/s, such as \"800Mbit/s\"",
            ),
            ("class = \"go\\nld\\u001b\"".to_owned(), "", 5, "there is no class \"go\\nld\\u{1b}\"; add"),
        ] {
            let text = text(GOLD, &service, backend);
            let error = Config::parse(&text, &[]).expect_err(&text).to_string();
            assert!(error.contains(expected) && error.starts_with(&format!("line {line}: ")), "{error}\n{text}");
            assert!(!error.contains(char::is_control), "{error:?}");
        }
        let name = text("[[class]]\nname = \"a\\nb\"\n", "", "");
        let error = Config::parse(&name, &[]).expect_err(&name).to_string();
        assert!(error.contains("class.name: \"a\\nb\" is no name"), "{error}");
    }

    #[test]
    fn a_limit_of_one_backend_is_enough() {
        let waiting = format!("{TERMINATE}limits = {{ queue = 5, queue_timeout = \"2s\", adaptive = true }}");
        let config = good("", &waiting, "limits = { max_inflight = 5 }");
        assert!(config.services[0].queueing.adaptive);
        let rate = "limits = { connections_per_second = 5 }";
        good("", "miss = \"daemon\"\nlimits = { over = \"hold\", queue = 5 }", rate);
        // A network may be in several rules that ask for more than it.
        let rule = |path| format!("{{ class = \"gold\", clients = \"10.0.0.0/8\", path = \"{path}\" }}");
        good(GOLD, &format!("{TERMINATE}classify = [{}, {}]", rule("/a"), rule("/b")), "");
        // The operator may remove this backend.
        let other = "[[service.backend]]\nname = \"b\"\naddress = \"10.0.0.2:443\"\n";
        let config = good(other, &waiting, "limits = { max_inflight = 5 }");
        let mut said = crate::config::Amendments::default();
        said.remove("web", "a", &config);
        let less = config.amended(&said).expect("without it");
        assert_eq!(less.services[0].backends.len(), 1);
        Config::parse(&toml::to_string(&written(&less)).expect("written"), &[]).expect("good as a file too");
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
