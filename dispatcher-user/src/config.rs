//! The configuration: a TOML file becomes a [`Config`] in which everything fits together, or an error that
//! names the line and the key and says what to write instead.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::{Range, RangeInclusive},
    path::{Path, PathBuf},
};

use dispatcher_common::{
    http,
    quic::{SERVER_ID_MAX, UNROUTABLE},
    service::stable_id,
    session::{
        KIND_CLIENT, KIND_COOKIE, KIND_QUIC_CID, KIND_QUIC_SERVER, KIND_TICKET, KIND_TICKET_NAME,
        KIND_TLS_SESSION_ID, TICKET_NAMED, TICKET_OPAQUE,
    },
};
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};

use crate::{
    api,
    balancer::Balance,
    counted,
    dataplane::{AttachMode, Capacities, MAX_BACKENDS, is_mount_point},
};

mod amended;
mod changes;
mod health;
mod qos;
mod raw;
mod schema;
mod terminate;
mod written;

use self::raw::Spanned;
pub(crate) use self::written::written;
pub use self::{
    amended::Amendments,
    changes::{Changes, changes},
    health::{Health, HttpCheck},
    qos::{Class, DEFAULT_CLASS, Limits, Network, Over, Queueing, Rule, class_id, named_class},
    schema::schema,
    terminate::{Clear, DEFAULT_COOKIE, KeyPair, Secure, Terminate, Tunnels},
};

/// Where `dispatcherd` listens for `dispatcherctl`.
pub const DEFAULT_CONTROL: &str = "/run/dispatcher/control.sock";
/// Where a configuration's maps, programs and links are pinned.
pub const DEFAULT_PIN: &str = "/sys/fs/bpf/dispatcher";
/// Where a configuration's daemon keeps what must outlive a reboot.
pub const DEFAULT_STATE: &str = "/var/lib/dispatcher/state.redb";

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("reading {path}: {source}; give a text file in TOML, docs/config/minimal.toml is one")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file says something that cannot be.
    #[error("{}line {line}: {key}: {problem}", match path { Some(path) => format!("{}: ", path.display()), None => String::new() })]
    Invalid {
        /// The file, where there is one.
        path: Option<PathBuf>,
        /// Line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// What the operator said does not go with the file.
    #[error("{key}: {problem}")]
    Amended {
        /// The key, or the backend.
        key: String,
        /// What is wrong and what to do.
        problem: String,
    },
}

/// A configuration in which everything fits together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The control socket.
    pub control: PathBuf,
    /// Group that may use the control socket besides root.
    pub control_group: Option<String>,
    /// Folder in a BPF file system that keeps maps, programs and links when the daemon ends.
    pub pin: Option<PathBuf>,
    /// File that keeps sessions, and what the operator said, over a reboot.
    pub state: Option<PathBuf>,
    /// Where metrics are served over TCP.
    pub metrics: Option<SocketAddr>,
    /// Interfaces to attach to.
    pub interfaces: Vec<Interface>,
    /// Sizes of the maps.
    pub capacities: Capacities,
    /// The classes, [`DEFAULT_CLASS`] first.
    pub classes: Vec<Class>,
    /// The services.
    pub services: Vec<Service>,
}

/// Without a file nothing is served, so nothing is pinned or kept.
impl Default for Config {
    fn default() -> Self {
        Self {
            control: DEFAULT_CONTROL.into(),
            control_group: None,
            pin: None,
            state: None,
            metrics: None,
            interfaces: Vec::new(),
            capacities: Capacities::default(),
            classes: Vec::new(),
            services: Vec::new(),
        }
    }
}

/// An interface to attach to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// How.
    pub attach: AttachMode,
}

/// A service: one or more VIPs and the backends behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Stable id of the name.
    pub id: u32,
    /// Addresses and ports.
    pub vips: Vec<SocketAddr>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// When a connection is bound.
    pub mode: Mode,
    /// Who picks a backend for an unknown identifier.
    pub miss: Miss,
    /// Whose address backends see.
    pub source: Source,
    /// A PROXY protocol v2 header goes before the client's first byte.
    pub proxy_protocol: bool,
    /// Load-balancing algorithm.
    pub balance: Balance,
    /// Entries of the load-balancing table of each VIP.
    pub table_size: u32,
    /// Life of a confirmed session without use, seconds.
    pub session_ttl: u32,
    /// Life of a provisional session, seconds.
    pub provisional_ttl: u32,
    /// Window scale told to clients.
    pub wscale: u8,
    /// Largest MSS told to clients.
    pub mss: u16,
    /// Agree to timestamps with clients.
    pub timestamps: bool,
    /// Agree to SACK with clients.
    pub sack: bool,
    /// Identifiers in the order in which they are looked up.
    pub affinity: Vec<Affinity>,
    /// How key names of session tickets are found out; `None` where nobody asks for them.
    pub tickets: Option<Tickets>,
    /// Where the servers' tickets carry the name of their key (`session::TICKET_*`); `None` where that is
    /// found out as well.
    pub ticket: Option<u32>,
    /// How backends are checked; `None` where being reached by the kernel is enough.
    pub health: Option<Health>,
    /// Seconds in which the weight of a backend that comes up grows to all of it; 0: at once.
    pub slow_start: u32,
    /// How clients and backends are served where TLS ends here, with [`Mode::Terminate`].
    pub terminate: Option<Terminate>,
    /// The way to the backends, with [`Mode::Terminate`] and [`Mode::Relay`].
    pub tunnels: Option<Tunnels>,
    /// Clients' connections at a time, where the daemon serves them.
    pub max_connections: u32,
    /// Length of the server ID in QUIC connection IDs of configuration n, 0 where there is none.
    pub quic_lb: [u8; 8],
    /// The class of what no rule is about.
    pub class: String,
    /// Which class requests and connections belong to.
    pub rules: Vec<Rule>,
    /// What each backend can take that says nothing else.
    pub limits: Limits,
    /// What becomes of the rest.
    pub queueing: Queueing,
    /// The backends.
    pub backends: Vec<Backend>,
}

impl Service {
    /// VIPs that the data path serves.
    #[must_use]
    pub fn frontends(&self) -> &[SocketAddr] {
        if self.mode.is_local() { &[] } else { &self.vips }
    }

    /// Addresses that the daemon itself listens on.
    pub fn listeners(&self) -> impl Iterator<Item = SocketAddr> {
        let vips: &[SocketAddr] = if self.mode.is_local() { &self.vips } else { &[] };
        vips.iter().chain(self.clear_vips()).copied()
    }

    /// All addresses that clients connect to: those that the data path knows.
    pub fn published(&self) -> impl Iterator<Item = SocketAddr> {
        self.vips.iter().chain(self.clear_vips()).copied()
    }

    /// Those where clients speak in clear to a service that ends TLS.
    fn clear_vips(&self) -> &[SocketAddr] {
        let clear = self.terminate.as_ref().and_then(|terminate| terminate.clear.as_ref());
        clear.map_or(&[], |clear| &clear.vips)
    }

    /// Name of the cookie that sessions in clear are known by.
    #[must_use]
    pub fn cookie(&self) -> Option<&str> {
        self.affinity.iter().find_map(|one| match one {
            Affinity::HttpCookie(name) => Some(name.as_str()),
            Affinity::TlsTicket | Affinity::TlsSessionId | Affinity::ClientAddress | Affinity::QuicCid => {
                None
            }
        })
    }
}

/// What a connection is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// Session ticket: the name of the key that sealed it, or the ticket.
    TlsTicket,
    /// TLS session ID.
    TlsSessionId,
    /// HTTP cookie with this name, of connections in clear.
    HttpCookie(String),
    /// Client address.
    ClientAddress,
    /// QUIC connection ID.
    QuicCid,
}

impl Affinity {
    /// The kinds of session keys that are looked for.
    #[must_use]
    pub const fn kinds(&self) -> &'static [u8] {
        match self {
            Self::TlsTicket => &[KIND_TICKET_NAME, KIND_TICKET],
            Self::TlsSessionId => &[KIND_TLS_SESSION_ID],
            Self::HttpCookie(_) => &[KIND_COOKIE],
            Self::ClientAddress => &[KIND_CLIENT],
            Self::QuicCid => &[KIND_QUIC_CID, KIND_QUIC_SERVER],
        }
    }

    /// The kind in session keys, of several the first.
    #[must_use]
    pub const fn kind(&self) -> u8 {
        match self {
            Self::TlsTicket => KIND_TICKET_NAME,
            Self::TlsSessionId => KIND_TLS_SESSION_ID,
            Self::HttpCookie(_) => KIND_COOKIE,
            Self::ClientAddress => KIND_CLIENT,
            Self::QuicCid => KIND_QUIC_CID,
        }
    }
}

/// As in the file.
impl fmt::Display for Affinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TlsTicket => f.write_str("tls-ticket"),
            Self::TlsSessionId => f.write_str("tls-session-id"),
            Self::HttpCookie(name) => write!(f, "http-cookie:{name}"),
            Self::ClientAddress => f.write_str("client-address"),
            Self::QuicCid => f.write_str("quic-cid"),
        }
    }
}

/// How key names of session tickets are found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tickets {
    /// Server names (SNI) to ask backends for; without one, no name is sent.
    pub server_names: Vec<String>,
    /// Seconds between two looks at a backend.
    pub interval: u32,
}

/// A server of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Name.
    pub name: String,
    /// Stable id of `service/name`.
    pub id: u32,
    /// Its IPv4 address and port.
    pub v4: Option<SocketAddr>,
    /// Its IPv6 address and port.
    pub v6: Option<SocketAddr>,
    /// Weight; 0 takes no new connections.
    pub weight: u32,
    /// What the operator wants of it.
    pub state: AdminState,
    /// Its server IDs in QUIC connection IDs, each for the configurations with IDs of that length.
    pub quic_server_ids: Vec<Vec<u8>>,
    /// What it can take, where it is not what the service says.
    pub limits: Limits,
}

impl Backend {
    /// The address of a family.
    #[must_use]
    pub fn address(&self, v4: bool) -> Option<SocketAddr> {
        if v4 { self.v4 } else { self.v6 }
    }

    /// All addresses.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.v4.into_iter().chain(self.v6)
    }
}

/// Transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// When a connection is bound to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// By its first data.
    Passthrough,
    /// By its first packet.
    L4,
    /// TLS ends here: each request is bound by itself.
    Terminate,
    /// By its first data, and its bytes go through a tunnel.
    Relay,
}

impl Mode {
    /// True where clients are served by listeners of the daemon, not by the data path.
    #[must_use]
    pub const fn is_local(self) -> bool {
        matches!(self, Self::Terminate | Self::Relay)
    }
}

/// Who picks the backend when a session identifier is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Miss {
    /// The data path, by the load-balancing table.
    Table,
    /// The daemon, while the hello is held.
    Daemon,
}

/// Whose address backends see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The client's.
    Client,
    /// One of ours.
    Dispatcher {
        /// The pool.
        addresses: Vec<IpAddr>,
        /// Ports to take.
        ports: RangeInclusive<u16>,
    },
}

/// What the operator wants of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdminState {
    /// Takes connections.
    Enabled,
    /// Keeps its sessions, takes no new ones.
    Drain,
    /// Takes nothing; connections that it has go on.
    Disabled,
    /// Takes nothing, and connections that it has end.
    Offline,
}

impl AdminState {
    /// True where connections may go there, those of known sessions at least.
    #[must_use]
    pub const fn takes(self) -> bool {
        matches!(self, Self::Enabled | Self::Drain)
    }
}

impl fmt::Display for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enabled => "enabled",
            Self::Drain => "drain",
            Self::Disabled => "disabled",
            Self::Offline => "offline",
        })
    }
}

impl Config {
    /// Reads and checks a file. `interfaces` come on top of those in the file.
    pub fn load(path: &Path, interfaces: &[Interface]) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&text, interfaces).map_err(|error| match error {
            Error::Invalid { line, key, problem, .. } => {
                Error::Invalid { path: Some(path.to_owned()), line, key, problem }
            }
            Error::Read { .. } | Error::Amended { .. } => error,
        })
    }

    /// What is in it, for those who asked whether it is good.
    #[must_use]
    pub fn summary(&self) -> String {
        let backends: usize = self.services.iter().map(|service| service.backends.len()).sum();
        format!("{}, {}", counted(self.services.len(), "service"), counted(backends, "backend"))
    }

    /// Checks a text. `interfaces` come on top of those in the text.
    pub fn parse(text: &str, interfaces: &[Interface]) -> Result<Self, Error> {
        let source = Text { text };
        let (raw, config) = source.config(interfaces)?;
        source.check_idle(&raw, &config)?;
        Ok(config)
    }
}

/// An address that stands in two places.
struct Meeting {
    /// Number of the service.
    service: usize,
    place: Place,
    /// As it is written there.
    address: String,
    problem: String,
}

/// Where an address of a service stands.
#[derive(Clone, Copy)]
enum Place {
    Vip,
    /// With its number.
    Backend(usize),
    Source,
}

impl Place {
    fn key(self) -> &'static str {
        match self {
            Self::Vip => "service.vip",
            Self::Backend(_) => "service.backend.address",
            Self::Source => "service.source_addresses",
        }
    }
}

impl Config {
    /// The first place where VIPs, backends and source addresses meet.
    fn meeting(&self) -> Option<Meeting> {
        let mut vips = BTreeMap::new();
        for (number, service) in self.services.iter().enumerate() {
            for vip in service.vips.iter().chain(service.clear_vips()) {
                if let Some(other) = vips.insert((*vip, service.protocol.number()), &service.name) {
                    return Some(Meeting {
                        service: number,
                        place: Place::Vip,
                        address: vip.to_string(),
                        problem: format!(
                            "{vip} belongs to service {other} already; give each service its own address or port"
                        ),
                    });
                }
            }
        }
        let vips: BTreeSet<IpAddr> = vips.keys().map(|(vip, _)| vip.ip()).collect();
        let mut backends = BTreeSet::new();
        for (number, service) in self.services.iter().enumerate() {
            let mut seen: BTreeMap<SocketAddr, &str> = BTreeMap::new();
            for (place, backend) in service.backends.iter().enumerate() {
                for address in backend.addresses() {
                    backends.insert(address.ip());
                    let problem = if vips.contains(&address.ip()) {
                        format!(
                            "{} is a VIP too, so packets would come back here; give the server's own address",
                            address.ip()
                        )
                    } else if let Some(other) = seen.insert(address, &backend.name) {
                        format!("{address} is backend {other} already; give the weight there instead")
                    } else {
                        continue;
                    };
                    let place = Place::Backend(place);
                    return Some(Meeting { service: number, place, address: address.to_string(), problem });
                }
            }
        }
        for (number, service) in self.services.iter().enumerate() {
            let Source::Dispatcher { addresses, .. } = &service.source else { continue };
            if let Some(address) = addresses.iter().find(|one| vips.contains(one) || backends.contains(one)) {
                return Some(Meeting {
                    service: number,
                    place: Place::Source,
                    address: address.to_string(),
                    problem: format!(
                        "{address} is a VIP or a backend; give an address of the dispatcher that nothing else uses"
                    ),
                });
            }
        }
        None
    }
}

/// A capacity that is too small.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shortage {
    /// Which, as under `[capacity]`.
    pub name: &'static str,
    /// What there is.
    pub have: u32,
    /// What the services need.
    pub need: u64,
}

impl Config {
    /// The first capacity that is too small for the services.
    #[must_use]
    pub fn shortage(&self, capacities: &Capacities) -> Option<Shortage> {
        shortages(&self.services, capacities).next()
    }
}

/// The capacities that are too small for services.
fn shortages(services: &[Service], capacities: &Capacities) -> impl Iterator<Item = Shortage> + use<> {
    let (mut frontends, mut backends, mut table, mut sources) = (0_u64, 0_u64, 0_u64, 0_u64);
    for service in services {
        let published = service.published().count() as u64;
        frontends += published;
        backends += service.backends.len() as u64;
        table += published * u64::from(service.table_size) * 2;
        if let Source::Dispatcher { addresses, .. } = &service.source {
            sources += addresses.len() as u64;
        }
    }
    let ours = services.iter().filter(|service| !service.mode.is_local());
    let cookies: BTreeSet<&str> = ours.filter_map(Service::cookie).collect();
    let all = [
        ("frontends", frontends, capacities.frontends),
        ("backends", backends, capacities.backends),
        ("lb_table", table, capacities.lb_table),
        ("sources", sources, capacities.sources),
        ("cookies", cookies.len() as u64, capacities.cookies),
    ];
    all.into_iter()
        .map(|(name, need, have)| Shortage { name, have, need })
        .filter(|one| one.need > u64::from(one.have))
}

/// The first prime number from here on.
fn prime(from: u32) -> u32 {
    (from..).find(|n| is_prime(*n)).unwrap_or(4093)
}

type Span = Range<usize>;

/// On one line, with nothing for a terminal to obey.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            plain.extend(c.escape_debug());
        } else {
            plain.push(c);
        }
    }
    plain
}

/// The text, for errors that point into it.
struct Text<'t> {
    text: &'t str,
}

impl Text<'_> {
    /// What the text says. Keys that do nothing are for [`Self::check_idle`] to find: they may be idle because the
    /// operator removed a backend.
    fn config(&self, interfaces: &[Interface]) -> Result<(raw::File, Config), Error> {
        let raw: raw::File = toml::from_str(self.text).map_err(|error| self.syntax(&error))?;
        let services =
            raw.service.iter().map(|service| self.service(service)).collect::<Result<Vec<_>, _>>()?;
        let config = Config {
            control: self.control(raw.control.as_ref())?,
            control_group: raw.control_group.as_ref().map(|group| group.get_ref().clone()),
            pin: self.pin(raw.pin.as_ref())?,
            state: self.state(raw.state.as_ref())?,
            metrics: self.metrics(&raw)?,
            interfaces: self.interfaces(&raw, interfaces)?,
            capacities: self.capacities(raw.capacity.as_ref())?,
            classes: self.classes(&raw.class)?,
            services,
        };
        self.check_classes(&raw, &config.classes)?;
        self.check_limits(&raw, &config)?;
        self.check_names(&raw, &config)?;
        self.check_addresses(&raw, &config)?;
        self.check_sizes(&raw, &config)?;
        Ok((raw, config))
    }

    fn line(&self, at: usize) -> usize {
        1 + self.text.bytes().take(at).filter(|byte| *byte == b'\n').count()
    }

    fn error(&self, span: Span, key: &str, problem: impl Into<String>) -> Error {
        let line = self.line(span.start);
        Error::Invalid { path: None, line, key: plain(key), problem: plain(&problem.into()) }
    }

    /// Where an element of a list stands, which may have several lines.
    fn element(&self, list: &Spanned<raw::OneOrMany>, element: &str) -> Span {
        let span = list.span();
        let found = self.text.get(span.clone()).and_then(|text| text.find(&format!("\"{element}\"")));
        found.map_or(span.clone(), |offset| span.start + offset..span.end)
    }

    /// What the TOML reader refuses: the key is what stands before the `=` there.
    fn syntax(&self, error: &toml::de::Error) -> Error {
        let span = error.span().unwrap_or(0..0);
        let start = self.text.get(..span.start).and_then(|text| text.rfind('\n')).map_or(0, |at| at + 1);
        let line = self.text.get(start..).unwrap_or_default().lines().next().unwrap_or_default();
        let key = line.split('=').next().unwrap_or_default().trim().to_owned();
        // Within braces it is another's key.
        let before = self.text.get(start..span.start).and_then(|text| text.rsplit_once('='));
        let wanted =
            before.and_then(|(text, _)| text.split([',', '{', '.', ' ']).rfind(|word| !word.is_empty()));
        let wanted = wanted.unwrap_or_default();
        let message =
            error.message().trim().replace('\n', ", ").replace("expected i64", "expected a whole number");
        let number = message.split_once("integer `").and_then(|(_, rest)| rest.split_once('`'));
        let number = number.filter(|(_, rest)| rest.ends_with("expected a whole number"));
        let message = match number {
            Some((number, _)) => format!("{number} is beyond all bounds"),
            None => message,
        };
        let has = |text: &str| message.contains(text);
        let remedy = if message.starts_with("unknown field") {
            "; correct or remove it"
        } else if message.starts_with("missing field") {
            "; add it"
        } else if has("duplicate key") {
            "; remove one of them"
        } else if has("expected a whole number") {
            "; write it without quotes and fraction, such as 10"
        } else if has("beyond all bounds") {
            "; write a smaller number"
        } else if has("expected a boolean") {
            "; write true or false without quotes"
        } else if has("expected a string") && !has("list of strings") && wanted == "bandwidth" {
            "; write it in quotes and with its unit, such as \"800Mbit/s\""
        } else if has("expected a string") && !has("list of strings") {
            "; write it in quotes, such as \"10s\""
        } else if has("expected a sequence") && line.trim_start().starts_with('[') {
            "; there may be several: write the heading in double brackets, such as [[service]]"
        } else if has("expected a sequence") {
            "; write a list, such as [\"eth0\"]"
        } else {
            "; docs/config/full.toml shows every key"
        };
        self.error(span, if key.is_empty() { "file" } else { &key }, format!("{message}{remedy}"))
    }

    fn control(&self, path: Option<&Spanned<String>>) -> Result<PathBuf, Error> {
        let Some(path) = path else { return Ok(DEFAULT_CONTROL.into()) };
        let value = Path::new(path.get_ref());
        // sun_path has 108 bytes, one of them for the end.
        if !value.is_absolute() || value.file_name().is_none() || path.get_ref().len() > 107 {
            let problem = format!(
                "\"{}\" is no socket's path; give an absolute path of at most 107 bytes, such as \"{DEFAULT_CONTROL}\"",
                path.get_ref()
            );
            return Err(self.error(path.span(), "control", problem));
        }
        Ok(value.to_owned())
    }

    fn pin(&self, path: Option<&Spanned<String>>) -> Result<Option<PathBuf>, Error> {
        let Some(path) = path else { return Ok(Some(DEFAULT_PIN.into())) };
        let text = path.get_ref();
        if text == "none" {
            return Ok(None);
        }
        let value = Path::new(text);
        if is_mount_point(value) {
            let problem = format!(
                "\"{text}\" is the whole BPF file system, which others use too; give a folder in it, such as \"{DEFAULT_PIN}\", or \"none\""
            );
            return Err(self.error(path.span(), "pin", problem));
        }
        // Neither steps upward nor a BPF file system's own rule: no dots in names.
        if !value.is_absolute() || value.file_name().is_none() || text.contains('.') {
            let problem = format!(
                "\"{text}\" is no folder in a BPF file system; give an absolute path without dots, such as \"{DEFAULT_PIN}\", or \"none\""
            );
            return Err(self.error(path.span(), "pin", problem));
        }
        Ok(Some(value.to_owned()))
    }

    fn state(&self, path: Option<&Spanned<String>>) -> Result<Option<PathBuf>, Error> {
        let Some(path) = path else { return Ok(Some(DEFAULT_STATE.into())) };
        let text = path.get_ref();
        if text == "none" {
            return Ok(None);
        }
        let value = Path::new(text);
        if !value.is_absolute() || value.file_name().is_none() || text.ends_with('/') {
            let problem = format!(
                "\"{text}\" is no file's path; give an absolute path, such as \"{DEFAULT_STATE}\", or \"none\""
            );
            return Err(self.error(path.span(), "state", problem));
        }
        Ok(Some(value.to_owned()))
    }

    fn metrics(&self, raw: &raw::File) -> Result<Option<SocketAddr>, Error> {
        let Some(text) = &raw.metrics else { return Ok(None) };
        let value = text.get_ref();
        let problem = match value.parse::<SocketAddr>() {
            Ok(at) if at.port() == 0 => format!("{value} has port 0; give a port, such as 9100"),
            Ok(at) if !at.ip().is_loopback() && raw.metrics_public != Some(true) => format!(
                "{value} is no loopback address, and whoever reaches it reads the metrics without a password; \
                 give \"127.0.0.1:{}\", or set metrics_public = true if that is wanted",
                at.port()
            ),
            Ok(at) => return Ok(Some(at)),
            Err(_) => {
                format!("\"{value}\" is no address with a port; write one, such as \"127.0.0.1:9100\"")
            }
        };
        Err(self.error(text.span(), "metrics", problem))
    }

    fn interfaces(&self, raw: &raw::File, more: &[Interface]) -> Result<Vec<Interface>, Error> {
        let mode = |text: Option<&Spanned<String>>| {
            self.choice(text, "attach", &ATTACH).map(|mode| mode.unwrap_or_default())
        };
        let common = mode(raw.attach.as_ref())?;
        let mut found: Vec<Interface> = Vec::new();
        let mut add = |name: &Spanned<String>, attach, key: &str| {
            let text = name.get_ref();
            if text.is_empty() || text.len() > 15 || text.contains(|c: char| c == '/' || c.is_whitespace()) {
                let problem = format!("\"{text}\" is no interface's name; `ip link` lists them");
                return Err(self.error(name.span(), key, problem));
            }
            if found.iter().any(|one| one.name == *text) {
                let problem = format!("{text} is given twice; remove one");
                return Err(self.error(name.span(), key, problem));
            }
            found.push(Interface { name: text.clone(), attach });
            Ok(())
        };
        for name in &raw.interfaces {
            add(name, common, "interfaces")?;
        }
        for interface in &raw.interface {
            let attach = match &interface.attach {
                Some(_) => mode(interface.attach.as_ref())?,
                None => common,
            };
            add(&interface.name, attach, "interface.name")?;
        }
        for interface in more {
            if !found.iter().any(|one| one.name == interface.name) {
                found.push(interface.clone());
            }
        }
        if found.is_empty() {
            let problem =
                "none is given; add `interfaces = [\"eth0\"]` with the interfaces of clients and backends";
            return Err(self.error(0..0, "interfaces", problem));
        }
        Ok(found)
    }

    fn capacities(&self, raw: Option<&raw::Capacity>) -> Result<Capacities, Error> {
        let mut capacities = Capacities::default();
        let Some(raw) = raw else { return Ok(capacities) };
        let Capacities {
            flows,
            sessions,
            provisional,
            frontends,
            backends,
            lb_table,
            sources,
            cookies,
            stash_slots,
        } = &mut capacities;
        let mut spans = BTreeMap::new();
        for (name, value, target) in [
            ("flows", &raw.flows, flows),
            ("sessions", &raw.sessions, sessions),
            ("provisional", &raw.provisional, provisional),
            ("frontends", &raw.frontends, frontends),
            ("backends", &raw.backends, backends),
            ("lb_table", &raw.lb_table, lb_table),
            ("sources", &raw.sources, sources),
            ("cookies", &raw.cookies, cookies),
            ("stash_slots", &raw.stash_slots, stash_slots),
        ] {
            if let Some(value) = value {
                *target = self.number(value, &format!("capacity.{name}"), CAPACITY)?;
                spans.insert(name, value.span());
            }
        }
        capacities.check().map_err(|error| {
            let crate::dataplane::Error::Capacity { name, value, problem } = error else {
                return self.error(0..0, "capacity", error.to_string());
            };
            let span = spans.get(name).cloned().unwrap_or(0..0);
            self.error(span, &format!("capacity.{name}"), format!("{value} {problem}"))
        })?;
        Ok(capacities)
    }

    fn service(&self, raw: &raw::Service) -> Result<Service, Error> {
        let name = self.name(&raw.name, "service.name")?;
        let protocol = self.choice(raw.protocol.as_ref(), "service.protocol", &PROTOCOLS)?;
        let protocol = protocol.unwrap_or(Protocol::Tcp);
        let mode = self.choice(raw.mode.as_ref(), "service.mode", &MODES)?.unwrap_or(Mode::Passthrough);
        let miss = self.choice(raw.miss.as_ref(), "service.miss", &MISSES)?.unwrap_or(Miss::Table);
        let proxy_protocol = self.choice(raw.proxy_protocol.as_ref(), "service.proxy_protocol", &PROXY)?;
        let proxy_protocol = proxy_protocol.unwrap_or(false);
        let balance = self.choice(raw.balance.as_ref(), "service.balance", &Balance::NAMES)?;
        let at = |key: Option<&Spanned<String>>| key.map_or_else(|| raw.name.span(), Spanned::span);
        if protocol == Protocol::Udp && mode != Mode::L4 {
            let problem = "udp goes with mode = \"l4\" only; set that, or protocol = \"tcp\"";
            return Err(self.error(at(raw.protocol.as_ref()), "service.protocol", problem));
        }
        if mode == Mode::L4 && miss == Miss::Daemon {
            let problem = "\"daemon\" goes with mode = \"passthrough\" only: an l4 service reads no identifier; remove it";
            return Err(self.error(at(raw.miss.as_ref()), "service.miss", problem));
        }
        if mode == Mode::L4 && proxy_protocol {
            let problem = "\"v2\" goes with mode = \"passthrough\" only; set \"off\"";
            return Err(self.error(at(raw.proxy_protocol.as_ref()), "service.proxy_protocol", problem));
        }
        let vips = self.vips(&raw.vip, "service.vip", 443)?;
        let backends = raw.backend.iter().map(|backend| self.backend(&name, backend, mode, miss));
        let backends = backends.collect::<Result<Vec<_>, _>>()?;
        let affinity = self.affinity(raw, mode, protocol)?;
        let (terminate, tunnels) = self.local(raw, mode, miss)?;
        let number = |value: &raw::Number, key: &str, default: u32, range: RangeInclusive<i64>| match value {
            Some(value) => self.number(value, key, range),
            None => Ok(default),
        };
        let service = Service {
            id: stable_id(&name),
            vips,
            protocol,
            mode,
            miss,
            source: self.source(raw)?,
            proxy_protocol,
            balance: balance.unwrap_or_default(),
            // The daemon needs no table.
            table_size: if mode.is_local() { 1 } else { self.table_size(raw)? },
            session_ttl: self.duration(raw.session_ttl.as_ref(), "service.session_ttl", 3600)?,
            provisional_ttl: self.duration(raw.provisional_ttl.as_ref(), "service.provisional_ttl", 10)?,
            wscale: number(&raw.wscale, "service.wscale", 7, WSCALE)? as u8,
            mss: number(&raw.mss, "service.mss", 1460, MSS)? as u16,
            timestamps: raw.timestamps.unwrap_or(true),
            sack: raw.sack.unwrap_or(true),
            tickets: self.tickets(raw, mode, &affinity)?,
            ticket: self.ticket(raw)?,
            health: self.health(raw)?,
            slow_start: self.duration(raw.slow_start.as_ref(), "service.slow_start", 0)?,
            quic_lb: self.quic_lb(raw, &affinity, &backends)?,
            terminate,
            tunnels,
            max_connections: number(
                &raw.max_connections,
                "service.max_connections",
                20_000,
                terminate::CONNECTIONS,
            )?,
            class: raw.class.as_ref().map_or(DEFAULT_CLASS, |class| class.get_ref().as_str()).to_owned(),
            rules: self.rules(raw, mode)?,
            limits: self.limits(raw.limits.as_ref(), mode, miss, "service.limits")?,
            queueing: self.queueing(raw, mode, miss)?,
            affinity,
            backends,
            name,
        };
        self.check_backends(raw, &service)?;
        Ok(service)
    }

    /// Addresses and ports that clients connect to.
    fn vips(&self, list: &Spanned<raw::OneOrMany>, key: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
        let mut vips = Vec::new();
        for text in list.get_ref().as_slice() {
            let span = self.element(list, text);
            let vip = self.address(text, span.clone(), key)?;
            if vips.contains(&vip) {
                return Err(self.error(span, key, format!("{vip} is given twice; remove one")));
            }
            vips.push(vip);
        }
        if vips.is_empty() {
            let problem = format!(
                "the list is empty; give at least one address and port, such as \"192.0.2.10:{port}\""
            );
            return Err(self.error(list.span(), key, problem));
        }
        Ok(vips)
    }

    fn affinity(&self, raw: &raw::Service, mode: Mode, protocol: Protocol) -> Result<Vec<Affinity>, Error> {
        let Some(list) = &raw.affinity else {
            return Ok(match mode {
                Mode::Passthrough | Mode::Relay => vec![Affinity::TlsTicket, Affinity::TlsSessionId],
                Mode::L4 => Vec::new(),
                Mode::Terminate => Self::default_affinity(),
            });
        };
        if mode == Mode::L4 && protocol == Protocol::Tcp {
            let problem = "goes with mode = \"passthrough\" only: an l4 service goes by addresses and ports and looks for no session; remove it, or the mode";
            return Err(self.error(list.span(), "service.affinity", problem));
        }
        let mut found = Vec::new();
        for text in list.get_ref().as_slice() {
            let span = self.element(list, text);
            let one =
                affinity(text).map_err(|problem| self.error(span.clone(), "service.affinity", problem))?;
            if (one == Affinity::QuicCid) != (protocol == Protocol::Udp) {
                let problem = format!(
                    "\"{text}\" does not go with protocol = \"{}\": \"quic-cid\" is for \"udp\", and the only one there; remove it",
                    if protocol == Protocol::Udp { "udp" } else { "tcp" }
                );
                return Err(self.error(span, "service.affinity", problem));
            }
            if mode == Mode::Relay && matches!(one, Affinity::HttpCookie(_)) {
                let problem = format!(
                    "\"{text}\" does not go with mode = \"relay\", which does not end TLS; \"tls-ticket\", \"tls-session-id\" and \"client-address\" do"
                );
                return Err(self.error(span, "service.affinity", problem));
            }
            if mode == Mode::Terminate && !matches!(one, Affinity::HttpCookie(_)) {
                let problem = format!(
                    "\"{text}\" does not go with mode = \"terminate\", which knows sessions by a cookie: \"http-cookie:NAME\""
                );
                return Err(self.error(span, "service.affinity", problem));
            }
            if found.iter().any(|other: &Affinity| other.kind() == one.kind()) {
                let problem = match one {
                    Affinity::HttpCookie(_) => format!("\"{text}\" is a second cookie; a service has one"),
                    Affinity::TlsTicket
                    | Affinity::TlsSessionId
                    | Affinity::ClientAddress
                    | Affinity::QuicCid => format!("\"{text}\" is given twice; remove one"),
                };
                return Err(self.error(span, "service.affinity", problem));
            }
            if found.contains(&Affinity::ClientAddress) {
                let problem = format!(
                    "\"{text}\" would decide for new addresses only, as every connection has one; put \"client-address\" last"
                );
                return Err(self.error(span, "service.affinity", problem));
            }
            found.push(one);
        }
        Ok(found)
    }

    fn tickets(
        &self,
        raw: &raw::Service,
        mode: Mode,
        affinity: &[Affinity],
    ) -> Result<Option<Tickets>, Error> {
        let wanted = affinity.contains(&Affinity::TlsTicket);
        let Some(tickets) = &raw.tickets else {
            return Ok(wanted.then(|| Tickets { server_names: Vec::new(), interval: TICKETS_INTERVAL }));
        };
        if mode == Mode::L4 || !wanted {
            let problem = "there is a [service.tickets] table, but affinity does not have \"tls-ticket\"; add that, or remove the table";
            return Err(self.error(raw.name.span(), "service.tickets", problem));
        }
        let interval =
            self.duration(tickets.interval.as_ref(), "service.tickets.interval", TICKETS_INTERVAL)?;
        let mut server_names = Vec::new();
        if let Some(list) = &tickets.server_names {
            for text in list.get_ref().as_slice() {
                let span = self.element(list, text);
                if !matches!(ServerName::try_from(text.as_str()), Ok(ServerName::DnsName(_))) {
                    let problem = format!(
                        "\"{text}\" is no host name; write it as clients ask for it, such as \"www.example.com\""
                    );
                    return Err(self.error(span, "service.tickets.server_names", problem));
                }
                if server_names.contains(text) {
                    let problem = format!("\"{text}\" is given twice; remove one");
                    return Err(self.error(span, "service.tickets.server_names", problem));
                }
                server_names.push(text.clone());
            }
        }
        // Where there are no names, there is nothing to ask for.
        let asks = tickets.discovery.unwrap_or(true) && self.ticket(raw)? != Some(TICKET_OPAQUE);
        Ok(asks.then_some(Tickets { server_names, interval }))
    }

    fn ticket(&self, raw: &raw::Service) -> Result<Option<u32>, Error> {
        let name = raw.tickets.as_ref().and_then(|tickets| tickets.key_name.as_ref());
        Ok(self.choice(name, "service.tickets.key_name", &KEY_NAMES)?.flatten())
    }

    /// Configurations of connection IDs that name their server, and whether backends have IDs for them.
    fn quic_lb(
        &self,
        raw: &raw::Service,
        affinity: &[Affinity],
        backends: &[Backend],
    ) -> Result<[u8; 8], Error> {
        let mut lengths = [0_u8; 8];
        for one in &raw.quic_lb {
            if !affinity.contains(&Affinity::QuicCid) {
                let problem = "there is a [[service.quic_lb]] table, but affinity does not have \"quic-cid\"; add that, or remove the table";
                return Err(self.error(one.config_id.span(), "service.quic_lb", problem));
            }
            let config = self.number(&one.config_id, "service.quic_lb.config_id", CONFIG_ID)?;
            let key = "service.quic_lb.server_id_length";
            let length = self.number(&one.server_id_length, key, SERVER_ID)?;
            let place = lengths.get_mut(config as usize).filter(|place| **place == 0);
            *place.ok_or_else(|| {
                let problem = format!("configuration {config} is given twice; remove one");
                self.error(one.config_id.span(), "service.quic_lb.config_id", problem)
            })? = length as u8;
        }
        let mut owners: BTreeMap<&[u8], &str> = BTreeMap::new();
        for (raw, backend) in raw.backend.iter().zip(backends) {
            let Some(list) = &raw.quic_server_id else { continue };
            if !affinity.contains(&Affinity::QuicCid) {
                let problem =
                    "goes with protocol = \"udp\" and affinity = \"quic-cid\" only; add those, or remove it";
                return Err(self.error(list.span(), "service.backend.quic_server_id", problem.to_owned()));
            }
            for (text, id) in list.get_ref().as_slice().iter().zip(&backend.quic_server_ids) {
                let refused = |problem| {
                    Err(self.error(self.element(list, text), "service.backend.quic_server_id", problem))
                };
                if !lengths.contains(&(id.len() as u8)) {
                    return refused(format!(
                        "\"{text}\" has {}, but no [[service.quic_lb]] has server_id_length = {}; add one, or correct the ID",
                        counted(id.len(), "byte"),
                        id.len()
                    ));
                }
                if let Some(other) = owners.insert(id, &backend.name) {
                    return refused(format!(
                        "\"{text}\" is the ID of backend {other} already; give each backend its own"
                    ));
                }
            }
        }
        for one in &raw.quic_lb {
            let length = *one.server_id_length.get_ref();
            if !owners.keys().any(|id| id.len() as i64 == length) {
                let problem = format!(
                    "no backend has an ID of {}; give each its quic_server_id, such as \"{}\"",
                    counted(length, "byte"),
                    "0a".repeat(length as usize)
                );
                return Err(self.error(
                    one.server_id_length.span(),
                    "service.quic_lb.server_id_length",
                    problem,
                ));
            }
        }
        Ok(lengths)
    }

    fn check_backends(&self, raw: &raw::Service, service: &Service) -> Result<(), Error> {
        let Service { name, backends, .. } = service;
        if backends.is_empty() {
            let problem =
                format!("service {name} has no backend; add a [[service.backend]] with name and address");
            return Err(self.error(raw.name.span(), "service.backend", problem));
        }
        if backends.iter().all(|backend| backend.weight == 0) {
            let span = raw.backend.iter().find_map(|backend| backend.weight.as_ref().map(Spanned::span));
            let problem = format!(
                "all weights of service {name} are 0, so no backend takes connections; give one a weight of 1 or more"
            );
            return Err(self.error(
                span.unwrap_or_else(|| raw.name.span()),
                "service.backend.weight",
                problem,
            ));
        }
        for vip in service.frontends() {
            if !backends.iter().any(|backend| backend.address(vip.is_ipv4()).is_some()) {
                let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
                let span = self.element(&raw.vip, &vip.to_string());
                let problem = format!(
                    "no backend of service {name} has an {family} address for {vip}; give one, or remove the VIP"
                );
                return Err(self.error(span, "service.vip", problem));
            }
            if let Source::Dispatcher { addresses, .. } = &service.source
                && !addresses.iter().any(|address| address.is_ipv4() == vip.is_ipv4())
            {
                let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
                let span = raw.source_addresses.as_ref().map_or_else(|| raw.name.span(), Spanned::span);
                let problem = format!("no {family} address is there for {vip}; add one");
                return Err(self.error(span, "service.source_addresses", problem));
            }
        }
        Ok(())
    }

    fn source(&self, raw: &raw::Service) -> Result<Source, Error> {
        let dispatcher = self.choice(raw.source.as_ref(), "service.source", &SOURCES)?.unwrap_or(false);
        if !dispatcher {
            let extra = [
                (raw.source_addresses.as_ref().map(Spanned::span), "service.source_addresses"),
                (raw.source_ports.as_ref().map(Spanned::span), "service.source_ports"),
            ];
            for (span, key) in extra {
                if let Some(span) = span {
                    let problem = "is for source = \"dispatcher\" only; set that, or remove this";
                    return Err(self.error(span, key, problem));
                }
            }
            return Ok(Source::Client);
        }
        let span = raw.source.as_ref().map_or_else(|| raw.name.span(), Spanned::span);
        let missing =
            "source = \"dispatcher\" needs addresses to take; add source_addresses = [\"10.0.0.2\"]";
        let Some(list) = &raw.source_addresses else {
            return Err(self.error(span, "service.source_addresses", missing));
        };
        let mut addresses = Vec::new();
        for text in list.get_ref().as_slice() {
            let span = self.element(list, text);
            let address: IpAddr = text.parse().map_err(|_| {
                let problem =
                    format!("\"{text}\" is no IP address; write one without port, such as \"10.0.0.2\"");
                self.error(span.clone(), "service.source_addresses", problem)
            })?;
            self.usable(address, span.clone(), "service.source_addresses")?;
            if addresses.contains(&address) {
                let problem = format!("{address} is given twice; remove one");
                return Err(self.error(span, "service.source_addresses", problem));
            }
            addresses.push(address);
        }
        if addresses.is_empty() {
            return Err(self.error(list.span(), "service.source_addresses", missing));
        }
        let ports = match &raw.source_ports {
            None => 1024..=65535,
            Some(text) => port_range(text.get_ref()).ok_or_else(|| {
                let problem = format!("\"{}\" is no range of ports; write \"1024-65535\"", text.get_ref());
                self.error(text.span(), "service.source_ports", problem)
            })?,
        };
        Ok(Source::Dispatcher { addresses, ports })
    }

    fn table_size(&self, raw: &raw::Service) -> Result<u32, Error> {
        let span = raw.table_size.as_ref().map_or_else(|| raw.name.span(), Spanned::span);
        let refused = |problem| Err(self.error(span, "service.table_size", problem));
        let value = match &raw.table_size {
            Some(size) => self.number(size, "service.table_size", TABLE_SIZE)?,
            None => 4093,
        };
        if !is_prime(value) {
            return refused(format!("{value} is not a prime number; use {}", prime(value)));
        }
        Ok(value)
    }

    fn backend(&self, service: &str, raw: &raw::Backend, mode: Mode, miss: Miss) -> Result<Backend, Error> {
        let name = self.name(&raw.name, "service.backend.name")?;
        let (mut v4, mut v6) = (None, None);
        for text in raw.address.get_ref().as_slice() {
            let span = self.element(&raw.address, text);
            let address = self.address(text, span.clone(), "service.backend.address")?;
            let place = if address.is_ipv4() { &mut v4 } else { &mut v6 };
            if place.replace(address).is_some() {
                let problem = format!(
                    "backend {name} has two addresses of one family; make the second a backend of its own"
                );
                return Err(self.error(span, "service.backend.address", problem));
            }
        }
        if v4.is_none() && v6.is_none() {
            let problem = format!("backend {name} has no address; give one, such as \"10.0.0.1:443\"");
            return Err(self.error(raw.address.span(), "service.backend.address", problem));
        }
        let weight = match &raw.weight {
            Some(weight) => self.number(weight, "service.backend.weight", WEIGHT)?,
            None => 1,
        };
        let state = self.choice(raw.state.as_ref(), "service.backend.state", &STATES)?;
        let id = backend_id(service, &name);
        let mut quic_server_ids = Vec::new();
        if let Some(list) = &raw.quic_server_id {
            for text in list.get_ref().as_slice() {
                let id = api::from_hex(text).filter(|id| (1..=SERVER_ID_MAX).contains(&id.len()));
                quic_server_ids.push(id.ok_or_else(|| {
                    let problem = format!(
                        "\"{text}\" is no server ID; write 1 to {SERVER_ID_MAX} bytes in hexadecimal, such as \"0a0b0c\""
                    );
                    self.error(self.element(list, text), "service.backend.quic_server_id", problem)
                })?);
            }
        }
        let state = state.unwrap_or(AdminState::Enabled);
        let limits = raw.limits.clone().map(raw::Limits::from);
        let limits = self.limits(limits.as_ref(), mode, miss, "service.backend.limits")?;
        Ok(Backend { name, id, v4, v6, weight, state, quic_server_ids, limits })
    }

    fn address(&self, text: &str, span: Span, key: &str) -> Result<SocketAddr, Error> {
        let Ok(address) = text.parse::<SocketAddr>() else {
            let problem = match text.parse::<IpAddr>() {
                Ok(IpAddr::V4(ip)) => format!("\"{text}\" has no port; write \"{ip}:443\""),
                Ok(IpAddr::V6(ip)) => match text.rsplit_once(':') {
                    // The last group may have been meant as a port.
                    Some((address, port))
                        if address.parse::<Ipv6Addr>().is_ok() && port.parse::<u16>().is_ok() =>
                    {
                        format!(
                            "\"{text}\" has no brackets: write \"[{address}]:{port}\", or \"[{ip}]:443\" if {port} is a part of the address"
                        )
                    }
                    _ => format!("\"{text}\" has no port; write \"[{ip}]:443\""),
                },
                Err(_) => format!(
                    "\"{text}\" is no address and port; write \"192.0.2.10:443\" or \"[2001:db8::10]:443\" (names are not looked up)"
                ),
            };
            return Err(self.error(span, key, problem));
        };
        if address.port() == 0 {
            let problem = format!("\"{text}\" has port 0; give the service's port, such as 443");
            return Err(self.error(span, key, problem));
        }
        self.usable(address.ip(), span, key)?;
        Ok(address)
    }

    fn usable(&self, ip: IpAddr, span: Span, key: &str) -> Result<(), Error> {
        let what = match ip {
            _ if ip.is_unspecified() => "stands for all addresses",
            _ if ip.is_loopback() => "is a loopback address, which no other host reaches",
            _ if ip.is_multicast() => "is a multicast address",
            IpAddr::V4(v4) if v4.is_broadcast() => "is the broadcast address",
            IpAddr::V4(v4) if v4.is_link_local() => "is a link-local address",
            IpAddr::V6(v6) if v6.is_unicast_link_local() => "is a link-local address",
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => "is an IPv4 address in IPv6 form",
            IpAddr::V4(_) | IpAddr::V6(_) => return Ok(()),
        };
        Err(self.error(span, key, format!("{ip} {what}; give the address of one host")))
    }

    fn name(&self, name: &Spanned<String>, key: &str) -> Result<String, Error> {
        let text = name.get_ref();
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if text.is_empty() || text.len() > 63 || !text.chars().all(good) {
            let problem = format!("\"{text}\" is no name; use 1 to 63 letters, digits, '.', '_' and '-'");
            return Err(self.error(name.span(), key, problem));
        }
        Ok(text.clone())
    }

    fn choice<T: Clone>(
        &self,
        text: Option<&Spanned<String>>,
        key: &str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, Error> {
        let Some(text) = text else { return Ok(None) };
        if let Some((_, value)) = choices.iter().find(|(name, _)| name == text.get_ref()) {
            return Ok(Some(value.clone()));
        }
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let problem = format!("\"{}\" is unknown; use {}", text.get_ref(), names.join(" or "));
        Err(self.error(text.span(), key, problem))
    }

    fn number(&self, value: &Spanned<i64>, key: &str, range: RangeInclusive<i64>) -> Result<u32, Error> {
        let number = u32::try_from(*value.get_ref()).ok().filter(|n| range.contains(&i64::from(*n)));
        number.ok_or_else(|| {
            let problem =
                format!("{} is out of range; use {} to {}", value.get_ref(), range.start(), range.end());
            self.error(value.span(), key, problem)
        })
    }

    fn duration(&self, text: Option<&Spanned<String>>, key: &str, default: u32) -> Result<u32, Error> {
        let Some(text) = text else { return Ok(default) };
        seconds(text.get_ref()).filter(|seconds| *seconds > 0).ok_or_else(|| {
            let problem = format!(
                "\"{}\" is no duration from 1s to 136 years; write \"10s\", \"5m\", \"1h\" or \"1h30m\"",
                text.get_ref()
            );
            self.error(text.span(), key, problem)
        })
    }

    /// Names and the ids made of them must differ.
    fn check_names(&self, raw: &raw::File, config: &Config) -> Result<(), Error> {
        let mut services: BTreeMap<u32, &str> = BTreeMap::new();
        let mut backends: BTreeMap<u32, String> = BTreeMap::new();
        for (raw, service) in raw.service.iter().zip(&config.services) {
            if let Some(other) = services.insert(service.id, &service.name) {
                return Err(self.error(raw.name.span(), "service.name", clash(&service.name, other)));
            }
            for (raw, backend) in raw.backend.iter().zip(&service.backends) {
                let full = format!("{}/{}", service.name, backend.name);
                if let Some(other) = backends.insert(backend.id, full.clone()) {
                    return Err(self.error(raw.name.span(), "service.backend.name", clash(&full, &other)));
                }
            }
        }
        Ok(())
    }

    /// VIPs, backends and source addresses must not meet.
    fn check_addresses(&self, raw: &raw::File, config: &Config) -> Result<(), Error> {
        let Some(Meeting { service, place, address, problem }) = config.meeting() else { return Ok(()) };
        let Some(raw) = raw.service.get(service) else { return Ok(()) };
        let list = match place {
            Place::Vip => Some(&raw.vip),
            Place::Backend(number) => raw.backend.get(number).map(|backend| &backend.address),
            Place::Source => raw.source_addresses.as_ref(),
        };
        let span = list.map_or(0..0, |list| self.element(list, &address));
        Err(self.error(span, place.key(), problem))
    }

    /// Backends must fit their service's table, and everything the maps. One error says all that is to be raised.
    fn check_sizes(&self, raw: &raw::File, config: &Config) -> Result<(), Error> {
        // Place, key, what is wrong and what to do, and that in brief.
        let mut short: Vec<(Span, String, String, String)> = Vec::new();
        // With tables that are large enough.
        let mut services = config.services.clone();
        for (raw, service) in raw.service.iter().zip(&mut services) {
            let (size, backends) = (service.table_size, service.backends.len());
            if service.mode.is_local() || backends <= size as usize {
                continue;
            }
            // So that weights are told apart: a hundred entries a backend, as far as the range goes.
            let enough = prime((backends * 100).clamp(4093, 1 << 20) as u32);
            service.table_size = enough;
            let span = raw.table_size.as_ref().map_or_else(|| raw.name.span(), Spanned::span);
            let problem =
                format!("{size} entries are fewer than the {backends} backends; set it to {enough}");
            let brief = format!("table_size of service {} to {enough}", service.name);
            short.push((span, "service.table_size".to_owned(), problem, brief));
        }
        let none = raw::Capacity::default();
        let raw::Capacity { frontends, backends, lb_table, sources, cookies, .. } =
            raw.capacity.as_ref().unwrap_or(&none);
        let last = raw.service.last().map_or(0..0, |service| service.name.span());
        for Shortage { name, have, need } in shortages(&services, &config.capacities) {
            let given = [
                ("frontends", frontends),
                ("backends", backends),
                ("lb_table", lb_table),
                ("sources", sources),
                ("cookies", cookies),
            ];
            let given = given.into_iter().find(|(one, _)| *one == name).and_then(|(_, given)| given.as_ref());
            let span = given.map_or_else(|| last.clone(), Spanned::span);
            let key = format!("capacity.{name}");
            if name == "backends" && need > u64::from(MAX_BACKENDS) {
                let problem = format!(
                    "{need} backends are more than the {MAX_BACKENDS} that one dispatcher keeps; split them"
                );
                return Err(self.error(span, &key, problem));
            }
            let problem = format!(
                "{have} is too small, the services need {need}; set it to {need} or more under [capacity]"
            );
            let brief = format!("{key} to {need}");
            short.push((span, key, problem, brief));
        }
        let mut short = short.into_iter();
        let Some((span, key, problem, _)) = short.next() else { return Ok(()) };
        let rest: String = short.map(|(.., brief)| format!(", and {brief}")).collect();
        Err(self.error(span, &key, problem + &rest))
    }
}

const CAPACITY: RangeInclusive<i64> = 1..=1 << 26;
const TABLE_SIZE: RangeInclusive<i64> = 2..=1 << 24;
const WSCALE: RangeInclusive<i64> = 0..=14;
const MSS: RangeInclusive<i64> = 536..=1460;
const WEIGHT: RangeInclusive<i64> = 0..=65535;
/// Checks in a row.
const TIMES: RangeInclusive<i64> = 1..=100;
const CONFIG_ID: RangeInclusive<i64> = 0..=UNROUTABLE as i64 - 1;
const SERVER_ID: RangeInclusive<i64> = 1..=SERVER_ID_MAX as i64;
const ATTACH: [(&str, AttachMode); 3] =
    [("auto", AttachMode::Auto), ("native", AttachMode::Native), ("generic", AttachMode::Generic)];
const PROTOCOLS: [(&str, Protocol); 2] = [("tcp", Protocol::Tcp), ("udp", Protocol::Udp)];
const MODES: [(&str, Mode); 4] = [
    ("passthrough", Mode::Passthrough),
    ("l4", Mode::L4),
    ("terminate", Mode::Terminate),
    ("relay", Mode::Relay),
];
const MISSES: [(&str, Miss); 2] = [("table", Miss::Table), ("daemon", Miss::Daemon)];
/// In the order of `session::TICKET_FORMATS`.
const KEY_NAMES: [(&str, Option<u32>); 4] = [
    ("auto", None),
    ("16-bytes", Some(TICKET_NAMED)),
    ("4-bytes", Some(TICKET_NAMED + 1)),
    ("none", Some(TICKET_OPAQUE)),
];
/// Seconds between two looks at a backend's ticket keys. Servers change keys after hours.
const TICKETS_INTERVAL: u32 = 600;
const SOURCES: [(&str, bool); 2] = [("client", false), ("dispatcher", true)];
const PROXY: [(&str, bool); 2] = [("off", false), ("v2", true)];
const STATES: [(&str, AdminState); 4] = [
    ("enabled", AdminState::Enabled),
    ("drain", AdminState::Drain),
    ("disabled", AdminState::Disabled),
    ("offline", AdminState::Offline),
];

/// An element of `affinity`, or what is wrong with it.
fn affinity(text: &str) -> Result<Affinity, String> {
    Ok(match (text, text.strip_prefix("http-cookie:")) {
        ("tls-ticket", _) => Affinity::TlsTicket,
        ("tls-session-id", _) => Affinity::TlsSessionId,
        ("client-address", _) => Affinity::ClientAddress,
        ("quic-cid", _) => Affinity::QuicCid,
        (_, Some(name)) if http::is_cookie_name(name) => Affinity::HttpCookie(name.to_owned()),
        _ if text.get(..11).is_some_and(|start| start.eq_ignore_ascii_case("http-cookie")) => {
            return Err(format!(
                "\"{text}\" does not name a cookie; write \"http-cookie:NAME\" with a name of 1 to {} letters, digits or other characters of a token (RFC 6265)",
                http::NAME_MAX
            ));
        }
        _ => {
            return Err(format!(
                "\"{text}\" is unknown; use \"tls-ticket\" or \"tls-session-id\" or \"http-cookie:NAME\" or \"client-address\" or \"quic-cid\""
            ));
        }
    })
}

/// The stable id of a backend of a service.
#[must_use]
pub fn backend_id(service: &str, backend: &str) -> u32 {
    stable_id(&format!("{service}/{backend}"))
}

fn clash(name: &str, other: &str) -> String {
    if name == other {
        format!("{name} is given twice; rename one")
    } else {
        format!("{name} and {other} have the same id; rename one")
    }
}

fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-')?;
    let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first > 0 && first <= last).then_some(first..=last)
}

/// Seconds of "1h30m", "10s" and the like.
pub(crate) fn seconds(text: &str) -> Option<u32> {
    let mut total = 0_u32;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, after) = rest.split_at(digits);
        let unit = match after.chars().next()? {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86400,
            _ => return None,
        };
        total = total.checked_add(number.parse::<u32>().ok()?.checked_mul(unit)?)?;
        rest = after.get(1..)?;
    }
    Some(total)
}

fn is_prime(n: u32) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

#[cfg(test)]
mod tests;
