//! The file as it is written, before anything is checked. The same types write it again
//! (`written.rs`) and describe it (`schema.rs`, where the comments here are the descriptions).

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::{
    ATTACH, CAPACITY, CONFIG_ID, KEY_NAMES, MISSES, MODES, MSS, PROTOCOLS, PROXY, SERVER_ID, SOURCES, STATES,
    TABLE_SIZE, TIMES, WEIGHT, WSCALE,
    health::CHECKS,
    qos::{CEIL, CLASS_WEIGHT, DSCP, INFLIGHT, OVER, PERCENT, PRIORITY, RATE},
    schema::{duration, hexadecimal, name, one_of, within},
    terminate::{CONNECTIONS, ESTABLISHED, HTTP, PORT, VERSIONS},
};
use crate::balancer::Balance;

/// A value and where it stands in the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Spanned<T>(toml::Spanned<T>);

impl<T> Spanned<T> {
    pub(super) fn span(&self) -> std::ops::Range<usize> {
        self.0.span()
    }

    pub(super) fn get_ref(&self) -> &T {
        self.0.get_ref()
    }
}

/// A value that comes from no file.
impl<T> From<T> for Spanned<T> {
    fn from(value: T) -> Self {
        Self(toml::Spanned::new(0..0, value))
    }
}

/// Where it stands is no part of its form.
impl<T: JsonSchema> JsonSchema for Spanned<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// One value or a list of them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
#[schemars(inline)]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub(super) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

pub(super) type Text = Option<Spanned<String>>;
pub(super) type Number = Option<Spanned<i64>>;

/// Configuration of dispatcherd.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "dispatcher.toml")]
pub(crate) struct File {
    /// Path of the socket on which dispatcherctl finds the daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) control: Text,
    /// Group that may use this socket besides root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) control_group: Text,
    /// Folder beneath a bpffs in which maps, programs and links are pinned, so that they outlive the daemon, or
    /// "none".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pin: Text,
    /// File in which sessions, and what the operator said, outlive a reboot, or "none".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) state: Text,
    /// Address and port on which GET /metrics is served over TCP, such as "127.0.0.1:9100".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metrics: Text,
    /// Metrics may be served on another address than loopback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metrics_public: Option<bool>,
    /// Names of interfaces of clients and backends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) interfaces: Vec<Spanned<String>>,
    /// How to attach to those that do not say it themselves: "native" in the driver, "generic" in the network
    /// stack, "auto": native where the driver can.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&ATTACH))]
    pub(super) attach: Text,
    /// Interfaces with settings of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) interface: Vec<Interface>,
    /// Sizes of the tables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) capacity: Option<Capacity>,
    /// Classes of requests and connections, which share backends by their weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) class: Vec<Class>,
    /// Services.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) service: Vec<Service>,
}

/// A class of requests and connections.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Class {
    /// Name; "default" is the class of what no rule names.
    #[schemars(transform = name)]
    pub(super) name: Spanned<String>,
    /// Its share of a backend is its weight by the sum of all weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CLASS_WEIGHT))]
    pub(super) weight: Number,
    /// What waits in a class of a higher one is served before all lower ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(PRIORITY))]
    pub(super) priority: Number,
    /// Others may use what it leaves of its share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) lend: Option<bool>,
    /// The most that it takes beyond its share, percent of a backend's rate, or of its requests or connections at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(PERCENT))]
    pub(super) borrow_limit: Number,
    /// The most that it takes in all, percent of a backend's rate, or of its requests or connections at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CEIL))]
    pub(super) ceil: Number,
    /// Packets are marked with this code point (RFC 2474).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(DSCP))]
    pub(super) dscp: Number,
}

/// An interface of clients, of backends, or of both.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Interface {
    /// Name, as `ip link` lists it.
    pub(super) name: Spanned<String>,
    /// How to attach to it, instead of the common `attach`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&ATTACH))]
    pub(super) attach: Text,
}

/// Sizes of the tables. All memory is taken at start.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Capacity {
    /// Two for each connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) flows: Number,
    /// Sessions that servers, probes or the operator vouch for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) sessions: Number,
    /// Sessions that only clients stand for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) provisional: Number,
    /// VIPs of all services.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) frontends: Number,
    /// Backends of all services.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) backends: Number,
    /// Twice table_size for each VIP.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) lb_table: Number,
    /// source_addresses of all services.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) sources: Number,
    /// Different names of cookies in all services.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) cookies: Number,
    /// Connections that wait for a backend at the same time; a power of two.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CAPACITY))]
    pub(super) stash_slots: Number,
}

/// A service: one or more VIPs and the backends behind them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Service {
    /// Name; sessions are kept under it.
    #[schemars(transform = name)]
    pub(super) name: Spanned<String>,
    /// Addresses and ports that clients connect to, such as "192.0.2.10:443".
    pub(super) vip: Spanned<OneOrMany>,
    /// "udp" goes with mode = "l4" only.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&PROTOCOLS))]
    pub(super) protocol: Text,
    /// When a connection is bound: "passthrough" by its first data, so that TLS sessions stay on their
    /// backend; "l4" by its first packet. "terminate": TLS ends here, and each request goes through an
    /// established tunnel to the backend of its session. "relay": TLS is not ended here, but the connection's
    /// bytes go through an established tunnel.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&MODES))]
    pub(super) mode: Text,
    /// Who picks a backend for an unknown session: the data path by its "table", or the "daemon".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&MISSES))]
    pub(super) miss: Text,
    /// Whose address backends see: the "client"'s, or one of source_addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&SOURCES))]
    pub(super) source: Text,
    /// Addresses to take with source = "dispatcher".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source_addresses: Option<Spanned<OneOrMany>>,
    /// Ports to take with source = "dispatcher": "1024-65535".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source_ports: Text,
    /// "v2" tells backends the client's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&PROXY))]
    pub(super) proxy_protocol: Text,
    /// Load-balancing algorithm.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&Balance::NAMES))]
    pub(super) balance: Text,
    /// Entries of the load-balancing table of each VIP: a prime, about 100 times the number of backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(TABLE_SIZE))]
    pub(super) table_size: Number,
    /// Life of a confirmed session without use.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) session_ttl: Text,
    /// Life of a session that no server has confirmed yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) provisional_ttl: Text,
    /// Window scale told to clients: no more than that of the backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(WSCALE))]
    pub(super) wscale: Number,
    /// Largest MSS told to clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(MSS))]
    pub(super) mss: Number,
    /// Agree to timestamps with clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) timestamps: Option<bool>,
    /// Agree to SACK with clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sack: Option<bool>,
    /// What a connection is known by, in the order in which it is looked up: "tls-ticket", "tls-session-id",
    /// "http-cookie:NAME", "client-address"; "quic-cid" of a udp service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) affinity: Option<Spanned<OneOrMany>>,
    /// Time in which the weight of a backend that begins to take connections grows from a tenth to all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) slow_start: Text,
    /// How it is found out which ticket keys belong to which backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tickets: Option<Tickets>,
    /// Checks of each address of each backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) health: Option<Health>,
    /// TLS and HTTP toward clients, with mode = "terminate".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) terminate: Option<Terminate>,
    /// Requests in clear to the same service, with mode = "terminate".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) clear: Option<Clear>,
    /// Established TLS connections to the backends, with mode = "terminate" or "relay".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tunnels: Option<Tunnels>,
    /// Clients' connections at a time, with mode = "terminate" or "relay"; more are closed at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(CONNECTIONS))]
    pub(super) max_connections: Number,
    /// The class of what no rule of `classify` is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) class: Text,
    /// Which class requests and connections belong to: the first rule that fits; of those that go by `clients`
    /// alone, which come after the others, the one with the longest prefix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) classify: Vec<Classify>,
    /// What each backend can take, and what becomes of the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) limits: Option<Limits>,
    /// Connection IDs that name their server, in clear (draft-ietf-quic-load-balancers-21).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) quic_lb: Vec<QuicLb>,
    /// Servers; one at least.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) backend: Vec<Backend>,
}

/// How it is found out which ticket keys belong to which backend.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tickets {
    /// Ask backends for tickets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) discovery: Option<bool>,
    /// Where tickets name their key: at their start, with so many bytes, or nowhere; "auto": found out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&KEY_NAMES))]
    pub(super) key_name: Text,
    /// Names to ask for by SNI; without one, no name is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server_names: Option<Spanned<OneOrMany>>,
    /// Time between two looks at a backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) interval: Text,
}

/// Checks, over TCP, of each address of each backend.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Health {
    /// "tcp": it accepts a connection. "tls": a handshake. "http", "https": a request.
    #[schemars(transform = one_of(&CHECKS))]
    pub(super) check: Spanned<String>,
    /// Time between two checks of an address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) interval: Text,
    /// Time that a whole check may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) timeout: Text,
    /// Good checks in a row that bring an address back.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(TIMES))]
    pub(super) rise: Number,
    /// Failed checks in a row that take it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(TIMES))]
    pub(super) fall: Number,
    /// Name to ask for by SNI; without one, no name is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server_name: Text,
    /// What is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path: Text,
    /// The Host header; without it server_name, or the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) host: Text,
    /// Status codes of good answers: "200-399", or a list of such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expect: Option<Spanned<OneOrMany>>,
}

/// TLS and HTTP toward clients.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Terminate {
    /// Certificates; a client gets the first that is for the name it asks for, or the first of all.
    #[serde(default)]
    pub(super) certificates: Vec<KeyPair>,
    /// Give clients that come without the session cookie one, unless the backend does; as a default only where
    /// affinity names no cookie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) assign_cookie: Option<bool>,
    /// Time that a handshake may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) handshake_timeout: Text,
    /// Time that a backend may take to begin its answer, or to go on with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) response_timeout: Text,
    /// Time that a connection may stay without a request; and that the header of an HTTP/1.1 request may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) idle_timeout: Text,
    /// File to which a line of JSON is added for each request; a reload opens it anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) access_log: Text,
}

/// Files of a certificate chain and of its key, PEM.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeyPair {
    /// The chain, the server's own certificate first.
    pub(super) certificate: Spanned<String>,
    /// The private key; without it, it is in the file of the chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key: Text,
}

/// Requests in clear to a service that ends TLS.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Clear {
    /// Addresses and ports where they come in, such as "192.0.2.10:80".
    pub(super) vip: Spanned<OneOrMany>,
    /// Port of the backends to which they are passed on in clear.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(PORT))]
    pub(super) port: Number,
    /// Which of them go through a tunnel all the same: one such rule is enough.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) secure: Vec<Secure>,
}

/// What a request must be like; all that is given must hold.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Secure {
    /// One of these methods: "POST".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) methods: Option<Spanned<OneOrMany>>,
    /// One of these paths: "/login", or "/account/*" for all beneath.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) paths: Option<Spanned<OneOrMany>>,
    /// It has the session cookie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) session: Option<bool>,
}

/// Established TLS connections to the backends.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tunnels {
    /// The name that the backends' certificates must be for, and that is asked for by SNI; without one, the
    /// backend's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server_name: Text,
    /// File (PEM) with the certificates that are trusted; without one, those that this machine trusts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) roots: Text,
    /// File (PEM) of our own certificate chain, for backends that ask for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) certificate: Text,
    /// File (PEM) of its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key: Text,
    /// HTTP toward backends: what they choose, HTTP/2 first ("auto"), or "1.1" only, which WebSocket needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&HTTP))]
    pub(super) http: Text,
    /// The oldest TLS version to use.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&VERSIONS))]
    pub(super) min_version: Text,
    /// Tunnels kept established ahead of need, to each backend. As a default one for each processor, and
    /// at least 2, or 4 with mode = "relay".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(ESTABLISHED))]
    pub(super) established: Number,
    /// No more than so many to each backend, which HTTP/1.1 takes under load: one for each request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(ESTABLISHED))]
    pub(super) most: Number,
    /// Age at which a tunnel is replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) max_age: Text,
    /// Time that establishing one may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) timeout: Text,
}

/// What belongs to a class: all that is given must hold.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Classify {
    /// The class.
    pub(super) class: Spanned<String>,
    /// Networks of clients: "192.0.2.0/24".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) clients: Option<Spanned<OneOrMany>>,
    /// The name asked for by SNI, as a whole and in whatever case: with mode = "terminate", and in a rule of its own with
    /// mode = "passthrough".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) server_name: Text,
    /// A cookie, "NAME=VALUE", with mode = "terminate".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cookie: Text,
    /// A header, "NAME: VALUE", with mode = "terminate".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) header: Text,
    /// A path, where a `*` at the end stands for anything, with mode = "terminate".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path: Text,
}

/// What a backend can take.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limits {
    /// In each direction: "800Mbit/s", "10Gbit/s".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bandwidth: Text,
    /// New connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(RATE))]
    pub(super) connections_per_second: Number,
    /// Requests at a time, with mode = "terminate".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(INFLIGHT))]
    pub(super) max_inflight: Number,
    /// Connections at a time, with miss = "daemon"; known sessions are not held up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(INFLIGHT))]
    pub(super) max_connections: Number,
    /// What becomes of connections beyond connections_per_second: "drop" (clients try again), "reset", or "hold"
    /// (they wait in the daemon, with miss = "daemon").
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&OVER))]
    pub(super) over: Text,
    /// No more wait for one backend; the class furthest above its share loses first.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(INFLIGHT))]
    pub(super) queue: Number,
    /// No request waits longer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = duration)]
    pub(super) queue_timeout: Text,
    /// The number of requests at a time follows the backend's response times, up to max_inflight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) adaptive: Option<Spanned<bool>>,
}

/// What one backend can take, where it is not what the service says.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct OwnLimits {
    /// In each direction: "800Mbit/s", "10Gbit/s".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bandwidth: Text,
    /// New connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(RATE))]
    pub(super) connections_per_second: Number,
    /// Requests at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(INFLIGHT))]
    pub(super) max_inflight: Number,
    /// Connections at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(INFLIGHT))]
    pub(super) max_connections: Number,
}

impl From<OwnLimits> for Limits {
    fn from(own: OwnLimits) -> Self {
        let OwnLimits { bandwidth, connections_per_second, max_inflight, max_connections } = own;
        Self { bandwidth, connections_per_second, max_inflight, max_connections, ..Self::default() }
    }
}

/// Connection IDs of one configuration.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct QuicLb {
    /// The upper three bits of the connection ID.
    #[schemars(transform = within(CONFIG_ID))]
    pub(super) config_id: Spanned<i64>,
    /// Bytes of the server ID.
    #[schemars(transform = within(SERVER_ID))]
    pub(super) server_id_length: Spanned<i64>,
}

/// A server of the service.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Backend {
    /// Name, one a service.
    #[schemars(transform = name)]
    pub(super) name: Spanned<String>,
    /// Address and port, at most one of each family.
    pub(super) address: Spanned<OneOrMany>,
    /// Its part of new connections; 0: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = within(WEIGHT))]
    pub(super) weight: Number,
    /// "drain": keeps its sessions, gets no new ones. "disabled": gets nothing, and its connections go on.
    /// "offline": gets nothing, and its connections end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = one_of(&STATES))]
    pub(super) state: Text,
    /// Its server IDs in connection IDs, hexadecimal; a list for configurations of different lengths.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(transform = hexadecimal)]
    pub(super) quic_server_id: Option<Spanned<OneOrMany>>,
    /// What it can take, where it is not what the service says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) limits: Option<OwnLimits>,
}
