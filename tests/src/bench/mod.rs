//! The measurements of `cargo xtask bench`, one file each, and their common report.

pub mod affinity;
pub mod connections;
pub mod control;
pub mod fastpath;
pub mod floor;
pub mod load;
pub mod origin;
pub mod qos;
pub mod report;
pub mod sniff;
pub mod tunnels;
pub mod usage;

/// No socket waits in TIME_WAIT: generators often close first, and the 28k ports toward one address would be used
/// up within seconds.
pub(crate) const FORGET: &str = "ipv4/tcp_max_tw_buckets=0";
