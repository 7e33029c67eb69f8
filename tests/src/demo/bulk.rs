//! The demo's third service: datagrams of two classes to one server, which is given less than both want.

use anyhow::{Context as _, Result};
use dispatcher_user::api;

use crate::{
    daemon::{Daemon, Service},
    flood::Flood,
    topology::{Family, Topology},
};

/// Its name.
pub(super) const NAME: &str = "bulk";
/// Port of the service and of the server.
const PORT: u16 = 9000;
/// Bits a second that the server takes, and that each class wants.
const BANDWIDTH: u64 = 4_000_000;
/// Classes with their weights; each has a client address.
const CLASSES: [(&str, u32); 2] = [("gold", 3), ("bronze", 1)];

/// The classes, in the words of the file.
pub(super) fn classes() -> String {
    CLASSES.map(|(name, weight)| format!("\n[[class]]\nname = \"{name}\"\nweight = {weight}\n")).concat()
}

/// The service, all of which is the first server's.
pub(super) fn service(topology: &Topology) -> Service {
    let rules: Vec<String> = CLASSES
        .iter()
        .enumerate()
        .map(|(number, (name, _))| {
            format!("{{ class = \"{name}\", clients = \"{}\" }}", topology.client(Family::V4, number))
        })
        .collect();
    let mut weights = vec![0; topology.backends.len()];
    weights[0] = 1;
    Service::new(NAME, PORT)
        .with("protocol = \"udp\"")
        .with("mode = \"l4\"")
        .with(&format!("classify = [{}]", rules.join(", ")))
        .with(&format!("limits = {{ bandwidth = \"{BANDWIDTH}bit/s\" }}"))
        .weights(&weights)
}

/// Starts senders and the server.
pub(super) fn start(topology: &Topology) -> Result<Flood> {
    let mut flood = Flood::new(topology.backends.first().context("no backend")?, PORT)?;
    for number in 0..CLASSES.len() {
        flood.send(&topology.clients, topology.client(Family::V4, number), BANDWIDTH)?;
    }
    Ok(flood)
}

/// What the daemon says of the classes.
pub(super) fn table(daemon: &Daemon) -> Result<String> {
    let shares: Vec<api::QosShare> = daemon.ask(&["qos"])?;
    let mut text =
        format!("{NAME}, {} Mbit/s |  weight   share now |   passed MB  dropped MB\n", BANDWIDTH / 1_000_000);
    for one in shares.iter().filter(|one| one.service == NAME) {
        let share = one.share_percent.map_or_else(|| "-".to_owned(), |share| format!("{share:.1} %"));
        let mega = |bytes: u64| bytes as f64 / 1e6;
        text += &format!(
            "{:<14} | {:5.1} %  {share:>10} |  {:10.1}  {:10.1}\n",
            one.class,
            one.weight_percent,
            mega(one.bytes),
            mega(one.dropped_bytes)
        );
    }
    Ok(text)
}
