//! What the control socket says, in JSON. Names of fields are stable: add, never rename.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    balancer::Balance,
    config::{AdminState, Miss, Mode, Protocol},
    dataplane::Attached,
};

/// `GET /v1/status`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Version of the maps' layouts.
    pub abi: u32,
    /// Seconds since start.
    pub uptime_seconds: u64,
    /// Where the dispatcher is attached.
    pub interfaces: Vec<Attached>,
    /// Estimate of the memory of the maps.
    pub memory_bytes: u64,
    /// Where maps, programs and links are pinned; `null`: they end with the daemon.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub pin: Option<PathBuf>,
    /// Number of services.
    pub services: usize,
    /// Number of backends.
    pub backends: usize,
    /// Backends that take connections.
    pub backends_up: usize,
    /// Connections bound.
    pub connections: u64,
    /// Of these, by a session known before.
    pub hits: u64,
    /// Of these, secure with an identifier that was not known.
    pub misses: u64,
    /// Of these, secure without an identifier.
    pub fresh: u64,
    /// Of these, not secure.
    pub nonsecure: u64,
    /// Sessions learned from servers.
    pub learned: u64,
    /// Age of the daemon's sign of life in the maps.
    pub heartbeat_age_ms: u64,
    /// Times that the cookie key was changed.
    pub cookie_epoch: u32,
    /// Records of the event ring so far.
    pub events: Events,
}

/// What `dispatcherctl detach --json` prints.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Detached {
    /// The folder of the pins.
    pub pin: PathBuf,
    /// What was done, a line each; nothing when nothing was pinned.
    pub done: Vec<String>,
}

/// What `dispatcherctl top --json` prints each time: what was counted since the time before, in a second. Null: that is
/// not counted, or was counted anew.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Top {
    /// The time since then.
    pub seconds: f64,
    /// Seconds since the daemon's start; null where none answers.
    pub uptime_seconds: Option<u64>,
    /// Why none answers.
    pub error: Option<String>,
    /// Packets of the kind `forward`, as the next ones of theirs.
    pub forward_per_second: Option<f64>,
    /// `pass`.
    pub pass_per_second: Option<f64>,
    /// `consume`.
    pub consume_per_second: Option<f64>,
    /// `drop`.
    pub drop_per_second: Option<f64>,
    /// Services.
    pub services: Vec<TopService>,
    /// Backends.
    pub backends: Vec<TopBackend>,
    /// Each class at each backend that it used.
    pub classes: Vec<TopClass>,
}

/// A service in [`Top`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TopService {
    /// Name.
    pub name: String,
    /// Mode.
    pub mode: Mode,
    /// Connections bound, or, where the daemon serves it, accepted.
    pub connections_per_second: Option<f64>,
    /// Of these, by a session known before.
    pub hits_per_second: Option<f64>,
    /// Of these, with an identifier that was not known.
    pub misses_per_second: Option<f64>,
    /// Requests answered; where the daemon serves it.
    pub requests_per_second: Option<f64>,
    /// Of its backends.
    pub bytes_per_second: Option<f64>,
    /// Backends that take connections.
    pub backends_up: usize,
    /// Number of backends.
    pub backends: usize,
}

/// A backend in [`Top`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TopBackend {
    /// Service.
    pub service: String,
    /// Name.
    pub name: String,
    /// As in [`Backend::state`].
    pub state: String,
    /// Connections bound.
    pub connections_per_second: Option<f64>,
    /// Of these, by a session known before.
    pub hits_per_second: Option<f64>,
    /// Of these, with an identifier that was not known.
    pub misses_per_second: Option<f64>,
    /// Requests through its tunnels.
    pub requests_per_second: Option<f64>,
    /// Of these, those that are not answered yet.
    pub in_flight: Option<u64>,
    /// Requests and hellos that wait for it.
    pub queued: u64,
    /// Through its tunnels; else of frames, where its bandwidth is limited.
    pub bytes_per_second: Option<f64>,
}

/// A class at a backend in [`Top`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TopClass {
    /// Service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// The class.
    pub class: String,
    /// As in [`QosShare`].
    pub weight_percent: f64,
    /// As in [`QosShare`].
    pub share_percent: Option<f64>,
    /// Requests and hellos that were let through.
    pub admitted_per_second: Option<f64>,
    /// Refused because too many waited.
    pub shed_per_second: Option<f64>,
    /// Requests and hellos that wait.
    pub queued: u64,
    /// Bytes of frames that the data path let through.
    pub bytes_per_second: Option<f64>,
    /// Bytes of frames that it dropped because of the backend's bandwidth.
    pub dropped_bytes_per_second: Option<f64>,
}

/// Records of the event ring.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Events {
    /// Requests with an unknown identifier that the table bound.
    pub miss: u64,
    /// Hellos held for the daemon.
    pub held: u64,
    /// Of these, released.
    pub released: u64,
    /// Connections that a backend refused or did not answer.
    pub refused: u64,
    /// Identifiers learned.
    pub learned: u64,
    /// Tickets that a backend did not accept although their key is known as its own.
    pub rejected: u64,
    /// Expired sessions removed.
    pub swept: u64,
}

/// An element of `GET /v1/services`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Stable id.
    pub id: u32,
    /// VIPs.
    #[schema(value_type = Vec<String>)]
    pub vips: Vec<SocketAddr>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Mode.
    pub mode: Mode,
    /// Who decides on a miss. Of no meaning for services that the daemon serves itself.
    pub miss: Miss,
    /// `client` or `dispatcher`. As `miss`: backends of those always see the dispatcher.
    pub source: String,
    /// `off` or `v2`.
    pub proxy_protocol: String,
    /// Balancing algorithm.
    pub balance: Balance,
    /// Entries of each table.
    pub table_size: u32,
    /// TCP options that are not offered to clients because a backend refused them: `sack`, `timestamps`,
    /// `wscale`.
    pub refused_options: Vec<String>,
    /// Number of backends.
    pub backends: usize,
    /// Backends that take connections.
    pub backends_up: usize,
}

/// An element of `GET /v1/backends`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Backend {
    /// Name.
    pub name: String,
    /// Service.
    pub service: String,
    /// Stable id.
    pub id: u32,
    /// Index in the maps.
    pub index: u32,
    /// Addresses.
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<SocketAddr>,
    /// `up`, `down`, `drain`, `disabled` or `offline`.
    pub state: String,
    /// Seconds until a drain is over and it goes offline.
    #[serde(default)]
    pub deadline_seconds: Option<u64>,
    /// Why an address is not reached or not healthy.
    pub reason: Option<String>,
    /// Weight.
    pub weight: u32,
    /// Share of the load-balancing tables, 0 to 1; none of services that the daemon serves itself.
    pub share: Option<f64>,
    /// Connections that are open; only where one backend is asked for.
    #[serde(default)]
    pub open: Option<u64>,
    /// Connections bound.
    pub connections: u64,
    /// Of these, by a session known before.
    pub hits: u64,
    /// Of these, secure with an identifier that was not known.
    pub misses: u64,
    /// Of these, secure without an identifier.
    pub fresh: u64,
    /// Of these, not secure.
    pub nonsecure: u64,
    /// Connections that the backend accepted.
    pub established: u64,
    /// Connections that it refused or did not answer.
    pub refused: u64,
    /// Sessions learned from it.
    pub learned: u64,
    /// Milliseconds that it took to accept a connection, on average.
    pub connect_ms: Option<f64>,
    /// Milliseconds that it took to answer a hello, or a request with a cookie's service, on average.
    pub response_ms: Option<f64>,
}

/// Body of `PATCH /v1/backends/{service}/{name}`: what is left out stays.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackendChange {
    /// What it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<AdminState>,
    /// With `drain`: after so many seconds it goes offline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = "uint32", maximum = 4294967295_u32)]
    pub deadline_seconds: Option<u32>,
    /// Weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = "uint32", maximum = 65535)]
    pub weight: Option<u32>,
}

/// Body of `PUT /v1/backends/{service}/{name}`.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewBackend {
    /// Address and port, at most one of each family.
    pub addresses: Vec<String>,
    /// Weight; 1 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = "uint32", maximum = 65535)]
    pub weight: Option<u32>,
    /// What it takes; `enabled` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<AdminState>,
    /// Its server IDs in QUIC connection IDs, hexadecimal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quic_server_ids: Vec<String>,
}

/// An element of `GET /v1/sessions`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// The identifier, hexadecimal.
    pub id: String,
    /// `tls-session-id`, `tls-ticket-key` (the name of the key that sealed a ticket), `tls-ticket` (the
    /// start of a ticket), `http-cookie` (a hash of its value), `client-address`, `quic-cid` or
    /// `quic-server-id` (the configuration ID in one byte, then the server ID).
    pub kind: String,
    /// Service.
    pub service: String,
    /// Name of the backend; of several that share a ticket key, all names with commas between.
    pub backend: String,
    /// Tunnel, 0 for none.
    pub tunnel: u32,
    /// Class that the operator put it into; null where the rules decide.
    pub class: Option<String>,
    /// `provisional`, `confirmed`, `pinned` or `discovered`.
    pub state: String,
    /// Connections that came with it.
    pub hits: u32,
    /// Seconds since it was made.
    pub age_seconds: u32,
    /// Seconds since it was used.
    pub idle_seconds: u32,
    /// Seconds until it expires; null for never.
    pub expires_in_seconds: Option<u32>,
}

/// An element of `GET /v1/qos/classes`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct QosClass {
    /// Name; `default` is the class of what no rule names.
    pub name: String,
    /// Its share of a backend is its weight by the sum of all weights.
    pub weight: u32,
    /// What waits in a class of a higher one is served before all lower ones.
    pub priority: u8,
    /// Others may use what it leaves of its share.
    pub lend: bool,
    /// The most of a backend's rate that it takes beyond its share, percent.
    pub borrow_limit: u8,
    /// The most of a backend's rate that it takes, percent.
    pub ceil: u8,
    /// Code point that its packets are marked with; null for none.
    pub dscp: Option<u8>,
}

/// An element of `GET /v1/qos`: a class at a backend that it used.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
pub struct QosShare {
    /// Service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// The class.
    pub class: String,
    /// Its weight by the sum of all weights, percent.
    pub weight_percent: f64,
    /// Its part of what the backend was given in the last seconds, percent: of the requests, or, where there are none,
    /// of the bytes if the backend has a bandwidth, else of the connections. Null where there was nothing, and at the
    /// first look after a start.
    pub share_percent: Option<f64>,
    /// Requests under way, or connections where there is `max_connections`.
    pub in_flight: u64,
    /// Requests or hellos that wait.
    pub queued: u64,
    /// Requests and hellos that were let through.
    pub admitted: u64,
    /// Of these, beyond the class's share.
    pub borrowed: u64,
    /// Refused because too many waited.
    pub shed: u64,
    /// Refused because they waited too long.
    pub late: u64,
    /// Whose client went away while they waited.
    pub cancelled: u64,
    /// Half of those that waited did so for no longer, milliseconds, as `histogram_quantile` of Prometheus estimates it; null
    /// where none has waited.
    pub wait_p50_ms: Option<f64>,
    /// The same for 99 of 100.
    pub wait_p99_ms: Option<f64>,
    /// Bytes of frames that the data path let through.
    pub bytes: u64,
    /// Of these, beyond the class's share.
    pub borrowed_bytes: u64,
    /// Bytes of frames that it dropped because of the backend's bandwidth.
    pub dropped_bytes: u64,
    /// New connections that it let through.
    pub connections: u64,
    /// New connections beyond the backend's rate.
    pub connections_over: u64,
}

/// Body of `PATCH /v1/qos/classes/{class}`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QosWeight {
    /// 1 to 10000.
    #[schema(minimum = 1, maximum = 10000)]
    pub weight: u32,
}

/// Body of `PUT /v1/qos/sessions/{id}`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QosAssignment {
    /// Service.
    pub service: String,
    /// The class; left out: the rules decide again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// Kind of the identifier, as in [`Session::kind`]; all kinds when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        pattern = "^(tls-session-id|tls-ticket-key|tls-ticket|http-cookie|client-address|quic-cid|quic-server-id)$"
    )]
    pub kind: Option<String>,
}

/// An element of `GET /v1/tunnels`: an established TLS connection to a backend, an SSL context.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Tunnel {
    /// Its number, as sessions name it.
    pub id: u32,
    /// Service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// Our address and port.
    #[schema(value_type = String)]
    pub source: SocketAddr,
    /// The backend's address and port.
    #[schema(value_type = String)]
    pub destination: SocketAddr,
    /// TLS version, such as `TLSv1_3`.
    pub version: String,
    /// Cipher suite, such as `TLS13_AES_256_GCM_SHA384`.
    pub cipher_suite: String,
    /// Group of the key exchange, such as `X25519MLKEM768`; null where there was none.
    pub group: Option<String>,
    /// HTTP version by ALPN; null for none, which is HTTP/1.1.
    pub alpn: Option<String>,
    /// Seconds since its handshake.
    pub age_seconds: u64,
    /// Sessions whose last request went through it.
    pub sessions: u32,
    /// Requests so far.
    pub requests: u64,
    /// Requests that are not answered yet.
    pub in_flight: usize,
    /// Bytes sent, before encryption.
    pub sent_bytes: u64,
    /// Bytes received, after decryption.
    pub received_bytes: u64,
    /// `open`; `used`: it carries one flow to its end; or `retiring`: it takes no new requests.
    pub state: String,
}

/// An element of `GET /v1/tunnels/backends`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct TunnelBackend {
    /// Service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// Tunnels that take requests.
    pub established: usize,
    /// TLS handshakes made so far.
    pub handshakes: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Why attempts fail; null where they do not.
    pub error: Option<String>,
    /// Seconds since they began to fail.
    pub failing_for_seconds: Option<u64>,
}

/// Answer of `POST /v1/tunnels/rotate`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Rotated {
    /// Tunnels that will be replaced.
    pub tunnels: usize,
}

/// An element of `GET /v1/identities`: what is known of a backend's session tickets.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Identity {
    /// Service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// The server name that it was asked for; null for none.
    pub server_name: Option<String>,
    /// `routable` (its tickets name their key), `shared` (all backends know the key), `opaque` (its tickets
    /// carry no name), `no-tickets`, `failed` or `pending`.
    pub state: String,
    /// Names of its keys, hexadecimal.
    pub keys: Vec<String>,
    /// Versions of TLS whose tickets were seen.
    pub versions: Vec<String>,
    /// Backends of the service that know the key too.
    pub shared_with: Vec<String>,
    /// What went wrong, or what to know.
    pub note: Option<String>,
    /// Seconds since the last look; null before the first.
    pub looked_seconds_ago: Option<u64>,
}

/// Body of `PUT /v1/sessions/{id}`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// Kind of the identifier, as in [`Session::kind`]; `tls-session-id` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        pattern = "^(tls-session-id|tls-ticket-key|tls-ticket|http-cookie|client-address|quic-cid|quic-server-id)$"
    )]
    pub kind: Option<String>,
}

/// Answer to `POST /v1/sessions/save`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Saved {
    /// How many sessions were saved.
    pub sessions: u64,
    /// The state file.
    #[schema(value_type = String)]
    pub state: PathBuf,
}

/// Answer to `POST /v1/reload`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Reload {
    /// The file is in force; false with `dry_run=true`.
    pub applied: bool,
    /// What is different from the configuration that was in force, a line each.
    pub changes: Vec<String>,
}

/// What `dispatcherctl config check` says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checked {
    /// The file.
    pub file: PathBuf,
    /// It would be put in force.
    pub good: bool,
    /// Its services.
    pub services: usize,
    /// Their backends.
    pub backends: usize,
    /// What is wrong with it.
    pub error: Option<Mistake>,
}

/// A mistake in a configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mistake {
    /// Line, from 1; null where the file cannot be read.
    pub line: Option<usize>,
    /// The key.
    pub key: Option<String>,
    /// What is wrong and what to do.
    pub problem: String,
}

/// An element of `GET /v1/flows`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Flow {
    /// The client.
    #[schema(value_type = String)]
    pub client: SocketAddr,
    /// The VIP.
    #[schema(value_type = String)]
    pub vip: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// Service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// `syn-sent`, `established`, `closing` or `closed`.
    pub state: String,
    /// Seconds since it was bound.
    pub age_seconds: u32,
    /// It carries TLS.
    pub secure: bool,
    /// Its session was known.
    pub hit: bool,
    /// Class.
    pub class: String,
}

/// `GET /v1/counters`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Counters {
    /// One for each reason, in order of number.
    pub reasons: Vec<Counter>,
}

/// Packets of one reason.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Counter {
    /// Number of the reason.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// `forward`, `pass`, `consume` or `drop`.
    pub kind: String,
    /// Packets so far.
    pub packets: u64,
    /// What it means.
    pub description: String,
}

/// A line of `GET /v1/trace`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
#[expect(clippy::large_enum_variant, reason = "one at a time is made, and written at once")]
pub enum Traced {
    /// What was decided.
    Decision(Decision),
    /// Some were missed.
    Lost(Lost),
}

/// A decision of the data path about a connection, as it was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// When the daemon was told, RFC 3339.
    pub time: String,
    /// `miss` (bound by the table, the identifier is not known), `held` (for the daemon to pick a backend),
    /// `refused` (by the backend, or not answered), `learned` (an identifier, from a server) or `rejected` (a
    /// ticket that the backend did not accept although its key is known as its own), or `bound`.
    pub what: String,
    /// Of `bound`: the packet's reason, such as `bound_hit`; else null.
    pub reason: Option<String>,
    /// Service.
    pub service: String,
    /// The client.
    #[schema(value_type = String)]
    pub client: SocketAddr,
    /// The VIP.
    #[schema(value_type = String)]
    pub vip: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// Name of the backend; when held, the one that the table would pick.
    pub backend: String,
    /// Kind of the identifier, as in [`Session::kind`]; null where there is none.
    pub kind: Option<String>,
    /// The identifier, hexadecimal; null where there is none.
    pub id: Option<String>,
}

/// Events that a listener was too slow for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Lost {
    /// How many, of all services and clients.
    pub lost: u64,
}

/// Body of every answer that is no success.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What is wrong and what to do.
    pub error: String,
}

/// Bytes as hexadecimal digits.
#[must_use]
pub fn to_hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from(b"0123456789abcdef"[usize::from(half & 15)]);
    let mut text = String::with_capacity(2 * bytes.len());
    text.extend(bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]));
    text
}

/// The reverse of [`to_hex`]; colons between bytes are allowed, as OpenSSL prints some identifiers.
#[must_use]
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    digits
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some((digit(*high)? << 4 | digit(*low)?) as u8),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_there_and_back() {
        assert_eq!(to_hex(&[0, 0xab, 0x10]), "00ab10");
        assert_eq!(from_hex("00AB10"), Some(vec![0, 0xab, 0x10]));
        assert_eq!(from_hex("00:ab:10"), Some(vec![0, 0xab, 0x10]));
        for text in ["0", "0g", "é", "+1"] {
            assert_eq!(from_hex(text), None, "{text}");
        }
    }
}
