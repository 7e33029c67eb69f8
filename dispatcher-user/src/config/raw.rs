//! The file as it is written, before anything is checked.

use serde::Deserialize;
use toml::Spanned;

/// One value or a list of them.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(super) enum OneOrMany {
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) control: Text,
    pub(super) control_group: Text,
    pub(super) metrics: Text,
    pub(super) metrics_public: Option<bool>,
    #[serde(default)]
    pub(super) interfaces: Vec<Spanned<String>>,
    pub(super) attach: Text,
    #[serde(default)]
    pub(super) interface: Vec<Interface>,
    pub(super) capacity: Option<Capacity>,
    #[serde(default)]
    pub(super) service: Vec<Service>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Interface {
    pub(super) name: Spanned<String>,
    pub(super) attach: Text,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Capacity {
    pub(super) flows: Number,
    pub(super) sessions: Number,
    pub(super) provisional: Number,
    pub(super) frontends: Number,
    pub(super) backends: Number,
    pub(super) lb_table: Number,
    pub(super) sources: Number,
    pub(super) cookies: Number,
    pub(super) stash_slots: Number,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Service {
    pub(super) name: Spanned<String>,
    pub(super) vip: Spanned<OneOrMany>,
    pub(super) protocol: Text,
    pub(super) mode: Text,
    pub(super) miss: Text,
    pub(super) source: Text,
    pub(super) source_addresses: Option<Spanned<OneOrMany>>,
    pub(super) source_ports: Text,
    pub(super) proxy_protocol: Text,
    pub(super) balance: Text,
    pub(super) table_size: Number,
    pub(super) session_ttl: Text,
    pub(super) provisional_ttl: Text,
    pub(super) wscale: Number,
    pub(super) mss: Number,
    pub(super) timestamps: Option<bool>,
    pub(super) sack: Option<bool>,
    pub(super) affinity: Option<Spanned<OneOrMany>>,
    pub(super) tickets: Option<Tickets>,
    pub(super) health: Option<Health>,
    pub(super) slow_start: Text,
    #[serde(default)]
    pub(super) quic_lb: Vec<QuicLb>,
    #[serde(default)]
    pub(super) backend: Vec<Backend>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tickets {
    pub(super) discovery: Option<bool>,
    pub(super) key_name: Text,
    pub(super) server_names: Option<Spanned<OneOrMany>>,
    pub(super) interval: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Health {
    pub(super) check: Spanned<String>,
    pub(super) interval: Text,
    pub(super) timeout: Text,
    pub(super) rise: Number,
    pub(super) fall: Number,
    pub(super) server_name: Text,
    pub(super) path: Text,
    pub(super) host: Text,
    pub(super) expect: Option<Spanned<OneOrMany>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QuicLb {
    pub(super) config_id: Spanned<i64>,
    pub(super) server_id_length: Spanned<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Backend {
    pub(super) name: Spanned<String>,
    pub(super) address: Spanned<OneOrMany>,
    pub(super) weight: Number,
    pub(super) state: Text,
    pub(super) quic_server_id: Option<Spanned<OneOrMany>>,
}
