//! A day in the life of a dispatcher, in a minute and under load: nobody notices.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::{Daemon, Pins, Service, config},
    stage::{PORT, web},
    tls::{Authority, Manners, Server, visit_in_clear},
    topology::{Family, Plan, Topology},
    town::{Crowd, Town, until},
};
use dispatcher_user::api;

const OTHER: u16 = 444;
/// The whole of it.
const DAY: Duration = Duration::from_secs(60);
/// Between two events.
const WHILE: Duration = Duration::from_secs(4);

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn start(town: &Town, number: usize, port: u16) -> Server {
    let place = &town.topology.backends[number];
    let manners = Manners { tickets: true, ..Manners::default() };
    let server = Server::start(&place.netns, &format!("b{}", number + 1), port, &town.authority, manners);
    server.unwrap_or_else(|error| panic!("{error:#}"))
}

fn identities_are_known(daemon: &Daemon) {
    until("ticket keys are not found", || {
        let found: Vec<api::Identity> = daemon.ask(&["identities"]).expect("identities");
        found.iter().all(|one| one.state == "routable")
    });
}

#[test]
fn a_day_under_load() {
    let authority = Authority::new().expect("certificates");
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let mut town = Town { authority, servers: Vec::new(), topology };
    // The last is the one that is lost.
    let mut last = Some(start(&town, 2, PORT));
    town.servers = vec![start(&town, 0, PORT), start(&town, 1, PORT)];
    town.servers.extend((0..3).map(|number| start(&town, number, OTHER)).collect::<Vec<_>>());
    let town = &town;

    let pins = Pins::new();
    let checks = "[service.health]\ncheck = \"tcp\"\ninterval = \"1s\"\nrise = 1\nfall = 1";
    let web = || web().with(checks);
    let file = |services: &[Service]| {
        // As many slots as there are by default.
        let text = config(&town.topology, "native", services).replace("stash_slots = 1024\n", "");
        pins.within(&text)
    };
    let text = file(&[web()]);
    let netns = &town.topology.dispatcher;
    let mut daemon = Daemon::start_with(netns, &text).expect("dispatcherd");
    identities_are_known(&daemon);
    let state = |daemon: &Daemon, number: usize| daemon.backends().expect("backends")[number].state.clone();

    let began = Instant::now();
    Crowd::around(town, 6, 2, |crowd| {
        let pass = || {
            sleep(WHILE);
            crowd.go_on();
        };
        pass();

        // Reload: a service comes and another weight.
        let both = file(&[web().weights(&[2, 1, 1]), Service::new("other", OTHER)]);
        daemon.rewrite(&both).expect("written");
        let done: api::Reload = daemon.ask(&["reload"]).expect("reloaded");
        assert_eq!(done.changes, ["~ backend web/b1: weight: 1 -> 2", "+ service other (3 backends)"],);
        let (from, to) = (town.topology.client(Family::V4, 9), SocketAddr::new(Family::V4.vip(), OTHER));
        let _ = visit_in_clear(&town.topology.clients, from, to).expect("an answer");
        pass();

        // Drain: sessions stay (the crowd sees to that), nobody new comes.
        daemon.told(&["backend", "web/b2", "drain"]).expect("drains");
        sleep(Duration::from_secs(1));
        let _ = crowd.newcomers();
        pass();
        assert_eq!(crowd.newcomers(), names(&["b1", "b3"]));
        daemon.told(&["backend", "web/b2", "enable"]).expect("enabled");
        pass();

        // The daemon dies, and is missed by nobody.
        daemon.kill().expect("ends");
        pass();
        daemon.again(netns, &both).expect("dispatcherd again");
        pass();

        // A server dies with all it knows.
        crowd.lose("b3", || drop(last.take()));
        until("its loss is not found out", || state(&daemon, 2) == "down");
        sleep(Duration::from_secs(1));
        let _ = crowd.newcomers();
        pass();
        assert_eq!(crowd.newcomers(), names(&["b1", "b2"]));
        last = Some(start(town, 2, PORT));
        until("it does not come back", || state(&daemon, 2) == "up");
        pass();
        assert_eq!(crowd.newcomers(), names(&["b1", "b2", "b3"]));

        // Other programs take over from those that run.
        daemon.stop().expect("ends");
        daemon.again(netns, &text).expect("dispatcherd again");
        pass();
        while began.elapsed() < DAY {
            pass();
        }
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "{} visits in {seconds:.0} s ({:.0} a second), {} of them ended with their server",
            crowd.visits(),
            crowd.visits() as f64 / seconds,
            crowd.excused(),
        );
    });
    let mut drops = daemon.drops().expect("counters");
    // A packet that found its slot taken for longer than is waited, as when the machine below took this CPU away,
    // was sent again.
    let fine = |name: &str, packets: u64| {
        name == Reason::StaleRelease.name() || name == Reason::StashBusy.name() && packets < 20
    };
    drops.retain(|(name, packets)| !fine(name, *packets));
    assert_eq!(drops, [], "packets were dropped");
}
