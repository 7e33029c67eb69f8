//! Servers of other makes as backends: what is found out of their tickets, and who comes home.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::{Daemon, Service},
    servers::{Make, Resumed, Running, Way},
    stage::web,
    tls::Authority,
    topology::{Family, Plan, Topology},
};
use dispatcher_user::api;

const PORT: u16 = 443;
const USERS: usize = 5;
const RETURNS: usize = 5;

/// Three servers of a make, each with keys of its own, behind a dispatcher that asks them for tickets.
struct Scene {
    // Dropped in this order.
    daemon: Daemon,
    _servers: Vec<Running>,
    authority: Authority,
    topology: Topology,
}

impl Scene {
    fn new(make: Make, service: Service) -> Self {
        let authority = Authority::new().expect("certificates");
        let topology = Topology::new(Plan::default()).expect("namespaces");
        let servers = (1..)
            .zip(&topology.backends)
            .map(|(n, place)| {
                let started = make.start(&place.netns, &format!("b{n}"), PORT, &authority);
                started.unwrap_or_else(|error| panic!("{error:#}"))
            })
            .collect();
        let service = service.with("tickets = { server_names = [\"service.test\"] }");
        let daemon = Daemon::start(&topology, "native", &[service]).expect("the daemon");
        Self { daemon, _servers: servers, authority, topology }
    }

    /// What is known of the backends' tickets, once all were looked at.
    fn identities(&self) -> Vec<api::Identity> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let found: Vec<api::Identity> = self.daemon.ask(&["identities"]).expect("identities");
            if found.iter().all(|one| one.state != "pending") {
                return found;
            }
            assert!(Instant::now() < deadline, "not all were looked at: {found:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// How many returns of some users were resumed. Each visit comes from another port, and from the
    /// address that `client` says.
    fn resumed(&self, way: Way, client: impl Fn(usize, usize) -> (Family, usize)) -> usize {
        let mut resumed = 0;
        for number in 0..USERS {
            let user = way.user(&self.authority).expect("a user");
            for visit in 0..=RETURNS {
                let (family, client) = client(number, visit);
                let from = self.topology.client(family, client);
                let to = SocketAddr::new(family.vip(), PORT);
                let again = user
                    .resumes(&self.topology.clients, from, to)
                    .unwrap_or_else(|error| panic!("{}, user {number}, visit {visit}: {error}", way.name));
                assert!(visit > 0 || !again, "{}: the first visit was resumed", way.name);
                resumed += usize::from(again);
            }
        }
        resumed
    }
}

/// Another address on each visit, by turns of families.
fn roaming(user: usize, visit: usize) -> (Family, usize) {
    (Family::BOTH[visit % 2], (user + visit / 2) % 4)
}

fn check(make: Make) {
    let expected = make.expected();
    let scene = Scene::new(make, web());
    let found = scene.identities();
    assert_eq!(found.len(), 3);
    for one in &found {
        assert_eq!(one.state, expected.state, "{found:#?}");
        assert_eq!(one.versions, expected.versions, "{found:#?}");
        assert_eq!(one.keys.is_empty(), expected.name_len == 0, "{found:#?}");
        assert!(one.keys.iter().all(|key| key.len() == 2 * expected.name_len), "{found:#?}");
        assert!(one.shared_with.is_empty(), "each has keys of its own: {found:#?}");
    }
    for (way, expected) in Way::ALL.into_iter().zip(expected.resumed) {
        let what = || format!("{}, {}", make.name(), way.name);
        if expected == Resumed::Unspoken {
            let user = way.user(&scene.authority).expect("a user");
            let to = SocketAddr::new(Family::V4.vip(), PORT);
            let from = scene.topology.client(Family::V4, 0);
            assert!(user.resumes(&scene.topology.clients, from, to).is_err(), "{}", what());
            continue;
        }
        let resumed = scene.resumed(way, roaming);
        let all = USERS * RETURNS;
        let right = match expected {
            Resumed::All => resumed == all,
            // All 25 by chance: once in 3^25.
            Resumed::Chance => resumed < all,
            Resumed::Never | Resumed::Unspoken => resumed == 0,
        };
        assert!(right, "{}: {resumed} of {all} returns were resumed, expected {expected:?}", what());
    }
    assert!(scene.daemon.counter(Reason::BoundHit).expect("a counter") > 0);
}

#[test]
fn claim_c2_nginx() {
    check(Make::Nginx);
}

#[test]
fn claim_c2_gnutls() {
    check(Make::Gnutls);
}

#[test]
fn gnutls_without_tickets() {
    check(Make::Ticketless);
}

#[test]
fn claim_c2_rustls() {
    check(Make::Rustls);
}

#[test]
fn claim_c2_mbedtls_with_names_of_four_bytes() {
    check(Make::Mbedtls);
}

#[test]
fn openssl_without_tickets() {
    check(Make::Stateful);
}

#[test]
fn rustls_with_tickets_without_a_name() {
    check(Make::Nameless);
}

#[test]
fn nameless_tickets_come_home_by_address_where_a_service_asks_for_it() {
    for make in [Make::Stateful, Make::Nameless] {
        let affinity = "affinity = [\"tls-ticket\", \"tls-session-id\", \"client-address\"]";
        let scene = Scene::new(make, web().with(affinity));
        let found = scene.identities();
        assert!(found.iter().all(|one| one.state == "opaque"), "{found:#?}");
        // Each user stays at one address.
        let tls13 = Way::ALL[2];
        assert_eq!(scene.resumed(tls13, |user, _| (Family::BOTH[user % 2], user % 4)), USERS * RETURNS);
    }
}
