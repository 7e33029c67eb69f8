//! Session tickets of real servers: found out by asking them, and followed by clients that come back.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::Daemon,
    stage::{Stage, web},
    system::{Nginx, OpensslUser},
    tls::{Authority, Identity, Manners, Version},
    topology::{Family, Plan, Topology},
};
use dispatcher_user::api;

const PORT: u16 = 443;

/// What is known of each backend's tickets, once that is `settled`.
fn identities(daemon: &Daemon, settled: impl Fn(&api::Identity) -> bool) -> Vec<api::Identity> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let found: Vec<api::Identity> = daemon.ask(&["identities"]).expect("identities");
        if found.iter().all(&settled) {
            return found;
        }
        assert!(Instant::now() < deadline, "this is all that was found: {found:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// All visits reached one server, and all but the first resumed.
fn came_home(visits: &[Identity]) -> String {
    let servers: BTreeSet<_> = visits.iter().map(|identity| identity.backend.clone()).collect();
    assert_eq!(servers.len(), 1, "one session, several servers: {visits:#?}");
    let reused: String = visits.iter().map(|identity| identity.reused.as_str()).collect();
    assert_eq!(reused, format!(".{}", "r".repeat(visits.len() - 1)), "{visits:#?}");
    servers.into_iter().next().unwrap_or_default()
}

#[test]
fn claim_c2_tickets_of_both_versions_lead_home() {
    let manners = Manners { tickets: true, ..Manners::default() };
    let stage = Stage::new(Plan::default(), "native", &web(), manners);
    let found = identities(&stage.daemon, |one| one.state == "routable");
    let keys: BTreeSet<_> = found.iter().flat_map(|one| &one.keys).collect();
    assert_eq!(keys.len(), 3, "each server has a key of its own: {found:#?}");
    let mut homes = BTreeSet::new();
    for version in Version::BOTH {
        for round in 0..6 {
            let mut user = stage.user(version).with_tickets();
            if round % 2 == 1 {
                // As long as with a post-quantum key share: the PSK comes in the second segment.
                user = user.with_long_hello(1300);
            }
            let visit = |turn: usize| stage.visit(&user, Family::BOTH[turn % 2], turn + round);
            homes.insert(came_home(&(0..6).map(visit).collect::<Vec<_>>()));
        }
    }
    assert!(homes.len() > 1, "the balancer spreads users: {homes:?}");
    let sessions = stage.daemon.sessions().expect("sessions");
    let keys: Vec<_> = sessions.iter().filter(|one| one.kind == "tls-ticket-key").collect();
    assert_eq!(keys.len(), 3, "{sessions:#?}");
    let assigned = stage.daemon.told(&["qos", "assign", &keys[0].id, "default", "--service", "web"]);
    let refused = assigned.expect_err("it is not one client's").to_string();
    assert!(refused.contains("stands for a server and all its clients"), "{refused}");
    assert_eq!(stage.daemon.counter(Reason::BoundHit).expect("a counter"), 60);
}

#[test]
fn servers_whose_tickets_carry_no_name_are_told() {
    let stage = Stage::usual();
    let found = identities(&stage.daemon, |one| one.state == "opaque");
    assert!(found.iter().all(|one| one.note.as_deref().is_some_and(|note| note.contains("no key name"))));
    // And what worked before works.
    let _ = stage.returns(4);
}

#[test]
fn a_new_key_is_found_when_clients_are_turned_away() {
    let manners = Manners { tickets: true, ..Manners::default() };
    let mut stage = Stage::new(Plan::default(), "native", &web(), manners);
    let before = identities(&stage.daemon, |one| one.state == "routable");
    let user = stage.user(Version::Tls13);
    let home = stage.visit(&user, Family::V4, 0).backend;
    let number: usize = home.trim_start_matches('b').parse().expect("a number");
    stage.restart(number - 1, manners);
    // A restart makes a new key. Nobody tells us; but the user's ticket is not accepted. Rejections make the
    // daemon look again no sooner than five seconds after its last look.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(stage.visit(&user, Family::V6, 1).backend, home, "its old key is still its own");
    let old = &before.iter().find(|one| one.backend == home).expect("listed").keys;
    identities(&stage.daemon, |one| one.backend != home || one.keys != *old);
    let visits: Vec<_> = (0..4).map(|turn| stage.visit(&user, Family::V4, turn)).collect();
    assert!(
        visits.iter().all(|one| (one.backend.as_str(), one.reused.as_str()) == (&home, "r")),
        "{visits:#?}"
    );
}

#[test]
fn claim_c11_rotated_keys_are_learned_from_what_servers_accept() {
    let manners = Manners { tickets: true, ..Manners::default() };
    let stage = Stage::new(Plan::default(), "native", &web(), manners);
    let before: BTreeSet<String> = identities(&stage.daemon, |one| one.state == "routable")
        .into_iter()
        .flat_map(|one| one.keys)
        .collect();
    let user = stage.user(Version::Tls13);
    let home = stage.visit(&user, Family::V4, 0);
    // As GnuTLS does every 18 hours, rustls every 6: the old key still opens. The daemon looks every ten
    // minutes and is not told.
    for server in &stage.servers {
        server.rotate().expect("a key");
    }
    let again = stage.visit(&user, Family::V6, 1);
    assert_eq!((again.backend, again.reused.as_str()), (home.backend, "r"), "the old key leads home");
    let learned = || {
        let sessions = stage.daemon.sessions().expect("sessions");
        let keys = sessions.into_iter().filter(|one| one.kind == "tls-ticket-key");
        keys.filter(|one| !before.contains(&one.id)).count()
    };
    // A ticket of a new key goes anywhere, until it happens to come home.
    let mut visits = 0;
    while learned() < 3 {
        let user = stage.user(Version::Tls13);
        for turn in 0..4 {
            let _ = stage.visit(&user, Family::BOTH[turn % 2], turn);
        }
        visits += 1;
        assert!(visits < 50, "{} of 3 new keys are known", learned());
    }
    for turn in 0..6 {
        let user = stage.user(Version::Tls13);
        let visit = |visit: usize| stage.visit(&user, Family::BOTH[visit % 2], visit + turn);
        came_home(&(0..4).map(visit).collect::<Vec<_>>());
    }
}

#[test]
fn claim_c2_nginx_and_openssl_with_shared_and_own_keys() {
    let authority = Authority::new().expect("certificates");
    let topology = Topology::new(Plan::default()).expect("namespaces");
    // b1 and b2 share a key, b3 has its own.
    let shared = std::array::from_fn(|i| (i * 7 + 3) as u8);
    let certificate = authority.issue("shared").expect("a certificate");
    let _servers: Vec<Nginx> = topology
        .backends
        .iter()
        .enumerate()
        .map(|(i, place)| {
            let key = (i < 2).then_some((&shared, &certificate));
            Nginx::with_tickets(&place.netns, &format!("b{}", i + 1), PORT, &authority, key).expect("nginx")
        })
        .collect();
    let service = web().with("tickets = { server_names = [\"service.test\"] }");
    let daemon = Daemon::start(&topology, "native", &[service]).expect("the daemon");
    let found = identities(&daemon, |one| one.state == "routable");
    let with: Vec<String> = found.iter().map(|one| one.shared_with.join(",")).collect();
    assert_eq!(with, ["b2", "b1", ""], "{found:#?}");
    assert!(found.iter().all(|one| one.versions == ["TLSv1.3", "TLSv1.2"]), "{found:#?}");
    for version in Version::BOTH {
        for round in 0..4 {
            let user = OpensslUser::new(&authority, version).expect("a user").with_tickets();
            let visits: Vec<Identity> = (0..5)
                .map(|turn| {
                    let family = Family::BOTH[turn % 2];
                    let to = std::net::SocketAddr::new(family.vip(), PORT);
                    let from = topology.client(family, turn + round);
                    user.visit(&topology.clients, from, to).expect("an answer")
                })
                .collect();
            let reused: String = visits.iter().map(|identity| identity.reused.as_str()).collect();
            assert_eq!(reused, ".rrrr", "{version:?}: {visits:#?}");
            let own = visits.iter().filter(|one| one.backend == "b3").count();
            assert!(own == 0 || own == visits.len(), "{version:?}: {visits:#?}");
        }
    }
}
