//! The control daemon: loads the data path, keeps its maps in line with what the operator wants, and
//! answers the command line.
//!
//! Desired state ([`config`], reachability, operator commands) and actual state (the maps, behind
//! [`dataplane`]) meet in one place, [`reconcile`].

pub mod api;
pub mod balancer;
pub mod config;
pub mod control;
pub mod ctl;
pub mod daemon;
pub mod dataplane;
mod discovery;
mod events;
pub mod explain;
pub mod gather;
mod health;
mod http2;
mod identify;
mod loads;
pub mod logging;
pub mod netlink;
mod policing;
pub mod privileges;
pub mod qos;
pub mod reconcile;
pub mod reload;
mod response_times;
mod saved;
mod slow_start;
mod state;
pub mod store;
pub mod terminate;
pub mod tunnels;
pub mod workers;

/// An error with those of its causes that it does not name itself, on one line.
#[must_use]
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// A number of things: `1 service`, `2 services`. The plural is the name with an s.
#[must_use]
pub fn counted<N: std::fmt::Display + PartialEq + From<u8>>(number: N, one: &str) -> String {
    let plural = if number == 1.into() { "" } else { "s" };
    format!("{number} {one}{plural}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_is_not_several() {
        let told = [0_u64, 1, 2].map(|number| super::counted(number, "service"));
        assert_eq!(told, ["0 services", "1 service", "2 services"]);
    }
}
