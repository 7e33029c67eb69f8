//! Large transfers arrive intact. `DISPATCHER_FULL=1` makes them 100 MB.

use dispatcher_tests::{
    stage::Stage,
    tls::Version,
    topology::{Family, Topology},
};

fn bytes() -> u64 {
    if std::env::var_os("DISPATCHER_FULL").is_some() { 100_000_000 } else { 20_000_000 }
}

fn transfer(version: Version, family: Family) {
    let stage = Stage::usual();
    stage.transfer(version, family, bytes()).unwrap_or_else(|error| panic!("{error:#}"));
    stage.only_drops(&[]).expect("nothing is dropped without a reason");
    for side in [&stage.topology.clients, &stage.topology.backends[0].netns] {
        Topology::lose(side, 2).expect("loss");
    }
    stage.transfer(version, family, bytes()).unwrap_or_else(|error| panic!("with loss: {error:#}"));
}

#[test]
fn tls_1_2_over_ipv4_with_and_without_loss() {
    transfer(Version::Tls12, Family::V4);
}

#[test]
fn tls_1_2_over_ipv6_with_and_without_loss() {
    transfer(Version::Tls12, Family::V6);
}

#[test]
fn tls_1_3_over_ipv4_with_and_without_loss() {
    transfer(Version::Tls13, Family::V4);
}

#[test]
fn tls_1_3_over_ipv6_with_and_without_loss() {
    transfer(Version::Tls13, Family::V6);
}
