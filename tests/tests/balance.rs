//! Who gets new connections (rows C3, C4 and C5).

use std::collections::{BTreeMap, BTreeSet};

use dispatcher_tests::{
    stage::{Stage, web},
    tls::{Manners, Version},
    topology::{Family, Plan},
};
use dispatcher_user::api;

/// Answers by server name over so many requests in clear.
fn shares(stage: &Stage, requests: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for request in 0..requests {
        let identity = stage.visit_in_clear(Family::BOTH[request % 2], request);
        *shares.entry(identity.backend).or_default() += 1;
    }
    shares
}

fn by_weights(algorithm: &str) {
    let service = web().with(&format!("balance = \"{algorithm}\"")).weights(&[1, 2, 5]);
    let stage = Stage::new(Plan::default(), "native", &service, Manners::default());
    const REQUESTS: usize = 400;
    let shares = shares(&stage, REQUESTS);
    for (backend, weight) in [("b1", 1.0), ("b2", 2.0), ("b3", 5.0)] {
        let share = shares.get(backend).copied().unwrap_or_default() as f64 / REQUESTS as f64;
        // Four standard deviations of a random choice are less than 0.1 here.
        assert!((share - weight / 8.0).abs() < 0.1, "{algorithm}: {backend} got {share}: {shares:?}");
    }
}

#[test]
fn claim_c3_maglev_follows_the_weights() {
    by_weights("maglev");
}

#[test]
fn claim_c3_weighted_round_robin_follows_the_weights() {
    by_weights("weighted-round-robin");
}

#[test]
fn claim_c3_least_connections_uses_every_backend() {
    let service = web().with("balance = \"weighted-least-connections\"");
    let stage = Stage::new(Plan::default(), "native", &service, Manners::default());
    let shares = shares(&stage, 90);
    assert_eq!(shares.len(), 3, "{shares:?}");
}

#[test]
fn power_of_two_choices_uses_every_backend() {
    for miss in ["table", "daemon"] {
        let lines = format!("balance = \"power-of-two-choices\"\nmiss = \"{miss}\"");
        let stage = Stage::new(Plan::default(), "native", &web().with(&lines), Manners::default());
        let shares = shares(&stage, 90);
        assert_eq!(shares.len(), 3, "{miss}: {shares:?}");
    }
}

#[test]
fn claim_c3_a_backend_of_weight_zero_gets_nothing_new() {
    let stage = Stage::new(Plan::default(), "native", &web().weights(&[1, 0, 1]), Manners::default());
    let shares = shares(&stage, 60);
    assert_eq!(shares.keys().collect::<Vec<_>>(), ["b1", "b3"], "{shares:?}");
}

#[test]
fn claim_c3_a_drained_backend_keeps_its_sessions_and_gets_no_new_ones() {
    let stage = Stage::usual();
    let user = stage.user(Version::Tls12);
    let home = stage.visit(&user, Family::V4, 0).backend;
    let _: Vec<api::Backend> =
        stage.daemon.ask(&["backend", &format!("web/{home}"), "drain"]).expect("drains");
    let shares = shares(&stage, 60);
    assert!(!shares.contains_key(&home), "{home} is drained: {shares:?}");
    assert_eq!(shares.len(), 2, "{shares:?}");
    for family in Family::BOTH {
        let identity = stage.visit(&user, family, 1);
        assert_eq!((identity.backend.as_str(), identity.reused.as_str()), (home.as_str(), "r"));
    }
    let _: Vec<api::Backend> =
        stage.daemon.ask(&["backend", &format!("web/{home}"), "enabled"]).expect("enables");
    assert_eq!(self::shares(&stage, 60).len(), 3);
}

#[test]
fn claim_c4_tls_and_clear_text_on_one_port_are_told_apart() {
    let stage = Stage::usual();
    for family in Family::BOTH {
        let user = stage.user(Version::Tls12);
        assert_eq!(stage.visit(&user, family, 0).protocol, "TLSv1.2");
        assert_eq!(stage.visit_in_clear(family, 0).protocol, "");
        assert_eq!(stage.visit(&user, family, 0).reused, "r");
        assert_eq!(stage.visit(&stage.user(Version::Tls13), family, 0).protocol, "TLSv1.3");
    }
    let status = stage.daemon.status().expect("status");
    let kinds = (status.fresh, status.hits, status.misses, status.nonsecure);
    assert_eq!(kinds, (2, 2, 2, 2), "fresh, hits, misses, clear: {status:?}");
}

#[test]
fn claim_c5_requests_without_tls_are_balanced_each_anew() {
    let stage = Stage::usual();
    for family in Family::BOTH {
        // One client address throughout.
        let servers: BTreeSet<String> = (0..40).map(|_| stage.visit_in_clear(family, 0).backend).collect();
        assert_eq!(servers.len(), 3, "{servers:?}");
    }
    let status = stage.daemon.status().expect("status");
    assert_eq!((status.nonsecure, status.connections), (80, 80), "{status:?}");
    assert!(stage.daemon.sessions().expect("sessions").is_empty());
}
