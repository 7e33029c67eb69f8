//! One arm and two, tags, generic mode, and whose address the backends see.

use std::net::SocketAddr;

use dispatcher_tests::{
    stage::{Stage, web},
    tls::{Manners, Version},
    topology::{Family, POOL, Plan, Shape},
};

/// Sessions, clear text, transfers and long hellos of both families.
fn everything_works(stage: &Stage) {
    for _ in 0..4 {
        let _ = stage.returns(6);
    }
    for family in Family::BOTH {
        let _ = stage.visit_in_clear(family, 2);
        for version in Version::BOTH {
            stage
                .transfer(version, family, 1_000_000)
                .unwrap_or_else(|error| panic!("{family:?}: {error:#}"));
            for length in [2500, 4900, 6000, 12_000] {
                let _ = stage.visit(&stage.user(version).with_long_hello(length), family, 1);
            }
        }
    }
}

fn in_shape(plan: Plan, attach: &str) {
    let stage = Stage::new(plan, attach, &web(), Manners::default());
    everything_works(&stage);
    for family in Family::BOTH {
        let peer: SocketAddr = stage.visit_in_clear(family, 3).peer.parse().expect("an address");
        assert_eq!(peer.ip(), stage.from(family, 3), "backends see the client's address");
    }
    let status = stage.daemon.status().expect("status");
    for interface in &status.interfaces {
        assert_eq!(interface.mode.to_string(), attach, "{status:?}");
    }
}

#[test]
fn one_interface_to_each_backend() {
    in_shape(Plan { shape: Shape::Links, ..Plan::default() }, "native");
}

#[test]
fn one_arm() {
    in_shape(Plan { shape: Shape::OneArm, ..Plan::default() }, "native");
}

#[test]
fn one_tag_on_the_clients_side() {
    in_shape(Plan { tags: 1, ..Plan::default() }, "native");
}

#[test]
fn two_tags_on_the_clients_side() {
    in_shape(Plan { tags: 2, ..Plan::default() }, "native");
}

#[test]
fn generic_mode() {
    in_shape(Plan::default(), "generic");
}

#[test]
fn generic_mode_with_one_arm() {
    in_shape(Plan { shape: Shape::OneArm, ..Plan::default() }, "generic");
}

/// The header is also for those who want it beside the client's own address.
#[test]
fn proxy_protocol_with_the_clients_address_as_source() {
    let service = web().with("proxy_protocol = \"v2\"");
    let stage =
        Stage::new(Plan::default(), "native", &service, Manners { proxy: true, ..Manners::default() });
    everything_works(&stage);
    for family in Family::BOTH {
        let identity = stage.visit(&stage.user(Version::Tls12), family, 3);
        assert_eq!(identity.proxied, identity.peer);
    }
}

fn from_the_pool(plan: Plan, attach: &str, proxy: bool) {
    let mut service = web()
        .with("source = \"dispatcher\"")
        .with(&format!("source_addresses = [\"{}\", \"{}\"]", POOL[0], POOL[1]))
        .with("source_ports = \"20000-29999\"");
    if proxy {
        service = service.with("proxy_protocol = \"v2\"");
    }
    let stage = Stage::new(plan, attach, &service, Manners { proxy, ..Manners::default() });
    everything_works(&stage);
    for (i, family) in Family::BOTH.into_iter().enumerate() {
        let user = stage.user(Version::Tls12);
        for identity in [stage.visit(&user, family, 2), stage.visit_in_clear(family, 2)] {
            let peer: SocketAddr = identity.peer.parse().expect("an address");
            assert_eq!(peer.ip(), POOL[i], "backends see the dispatcher: {identity:?}");
            assert!((20_000..30_000).contains(&peer.port()), "{identity:?}");
            if proxy {
                let client: SocketAddr = identity.proxied.parse().expect("an address in the PROXY header");
                assert_eq!(client.ip(), stage.from(family, 2), "{identity:?}");
                assert!(client.port() >= 1024, "{identity:?}");
            }
        }
    }
}

#[test]
fn the_dispatchers_address_as_source() {
    from_the_pool(Plan::default(), "native", false);
}

#[test]
fn the_dispatchers_address_as_source_with_one_arm() {
    from_the_pool(Plan { shape: Shape::OneArm, ..Plan::default() }, "native", false);
}

#[test]
fn proxy_protocol() {
    from_the_pool(Plan::default(), "native", true);
}

#[test]
fn proxy_protocol_in_generic_mode() {
    from_the_pool(Plan::default(), "generic", true);
}
