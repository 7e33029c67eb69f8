//! Daemons that end, crash and start again, while clients come and stay.

use std::{net::SocketAddr, time::Duration};

use aya::maps::{Array, Map, MapData};
use dispatcher_common::{abi, globals::Globals, reason::Reason};
use dispatcher_tests::{
    daemon::{Daemon, Folder, Pins, Process, Service, UNPINNED, config, program},
    netns::{Netns, execute},
    tls::{Authority, Manners, Server, User, Version, visit_in_clear},
    topology::{Family, Plan, Topology},
    town::{Crowd, Town, until},
};
use dispatcher_user::api;

const PORT: u16 = 443;
const OTHER: u16 = 444;
/// Nothing takes as long as this.
const LIMIT: Duration = Duration::from_secs(60);

/// Dropped in the order of its fields.
struct Scene {
    daemon: Daemon,
    pins: Pins,
    text: String,
    town: Town,
}

impl Scene {
    fn new(attach: &str, service: &Service) -> Self {
        let authority = Authority::new().expect("certificates");
        let topology = Topology::new(Plan::default()).expect("namespaces");
        let manners = Manners { tickets: true, ..Manners::default() };
        let mut servers = Vec::new();
        for (i, place) in topology.backends.iter().enumerate() {
            for port in [PORT, OTHER] {
                let name = format!("b{}", i + 1);
                servers
                    .push(Server::start(&place.netns, &name, port, &authority, manners).expect("a server"));
            }
        }
        let pins = Pins::new();
        let text = pins.within(&config(&topology, attach, std::slice::from_ref(service)));
        let daemon = Daemon::start_with(&topology.dispatcher, &text).expect("dispatcherd");
        let town = Town { authority, servers, topology };
        let scene = Self { daemon, pins, text, town };
        until("ticket keys are not found", || {
            let found: Vec<api::Identity> = scene.daemon.ask(&["identities"]).expect("identities");
            found.iter().all(|one| one.state == "routable")
        });
        scene
    }

    fn netns(&self) -> &Netns {
        &self.town.topology.dispatcher
    }

    fn again(&mut self) {
        let text = self.text.clone();
        self.again_with(&text);
    }

    fn again_with(&mut self, text: &str) {
        self.daemon.again(&self.town.topology.dispatcher, text).expect("dispatcherd again");
    }

    /// Users of both versions who have a session.
    fn users(&self) -> Vec<(User, String)> {
        let known = |turn: usize| {
            let user = self.town.user(Version::BOTH[turn % 2]);
            let home = self.town.visit(&user, turn).expect("an answer").backend;
            (user, home)
        };
        (0..6).map(known).collect()
    }

    /// Fails unless these come home and are known there.
    fn come_home<'u>(&self, users: impl IntoIterator<Item = &'u (User, String)>) {
        for (turn, (user, home)) in users.into_iter().enumerate() {
            let identity = self.town.visit(user, turn + 3).expect("an answer");
            assert_eq!((&identity.backend, identity.reused.as_str()), (home, "r"), "{identity:?}");
        }
    }
}

fn refused(netns: &Netns, text: &str) -> String {
    let folder = Folder::new().expect("a folder");
    let file = folder.write("dispatcher.toml", text).expect("a file");
    let mut command = netns.command(program("dispatcherd").expect("dispatcherd"));
    command.arg("--config").arg(file).arg("--control").arg(folder.path().join("control.sock"));
    let mut process = Process::start(command, None).expect("starts");
    let status = process.wait(LIMIT).expect("ends");
    assert!(!status.success(), "it was to refuse:\n{text}");
    process.log()
}

fn program_of(netns: &Netns, interface: &str) -> Option<u32> {
    let said = netns.execute("ip", &["link", "show", interface]).expect("ip link");
    let (_, rest) = said.split_once("prog/xdp id ")?;
    rest.split_whitespace().next()?.parse().ok()
}

fn detach(netns: &Netns, pins: &Pins) -> Result<String, String> {
    let program = program("dispatcherctl").expect("dispatcherctl");
    let arguments = ["detach", "--pin", &pins.path().to_string_lossy()];
    netns.execute(&program.to_string_lossy(), &arguments).map_err(|error| format!("{error:#}"))
}

/// What is pinned, by name.
fn names(pins: &Pins, folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(pins.path().join(folder)).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Lets clients come and go while something is done to the daemon; all must be served, and come home.
fn under_load(scene: &mut Scene, work: impl FnOnce(&mut Daemon, &str, &Town, &Crowd)) {
    let Scene { daemon, text, town, .. } = scene;
    Crowd::around(town, 4, 2, |crowd| work(daemon, text, town, crowd));
}

fn web() -> Service {
    Service::new("web", PORT)
}

/// A service of which the daemon decides misses.
fn held() -> Service {
    web().with("miss = \"daemon\"").with("balance = \"weighted-least-connections\"")
}

fn forwarded(daemon: &Daemon) -> u64 {
    let counters: api::Counters = daemon.ask(&["counters", "--all"]).expect("counters");
    counters.reasons.iter().filter(|one| one.kind == "forward").map(|one| one.packets).sum()
}

/// Ends the daemon in one way or the other and starts it again, under load.
fn restarts(attach: &str, service: &Service, ends: &[fn(&mut Daemon) -> anyhow::Result<()>]) {
    let mut scene = Scene::new(attach, service);
    under_load(&mut scene, |daemon, text, town, crowd| {
        for end in ends {
            let interfaces = town.topology.interfaces();
            let programs = || interfaces.iter().map(|one| program_of(&town.topology.dispatcher, one));
            let before: Vec<_> = programs().collect();
            let counted = (forwarded(daemon), daemon.status().expect("status").connections);
            end(daemon).expect("ends");
            crowd.go_on();
            // The heartbeat is old by now.
            std::thread::sleep(Duration::from_millis(1100));
            crowd.go_on();
            assert_eq!(programs().collect::<Vec<_>>(), before, "they run without a daemon");
            daemon.again(&town.topology.dispatcher, text).expect("dispatcherd again");
            assert!(forwarded(daemon) > counted.0, "counters go on");
            assert!(daemon.status().expect("status").connections >= counted.1 + 48);
            for (before, now) in before.iter().zip(programs()) {
                assert!(
                    before.is_some() && now.is_some() && *before != now,
                    "new programs: {before:?} {now:?}"
                );
            }
            crowd.go_on();
        }
    });
    // One generation of programs, a link an interface.
    let all = names(&scene.pins, "");
    assert_eq!(all, ["links".to_owned(), "maps".into(), format!("programs-{}", ends.len() + 1)]);
    assert_eq!(names(&scene.pins, "links").len(), scene.town.topology.interfaces().len());
    // A hello that was held when the daemon ended has gone by the table: the frame with which the next daemon
    // answers it all the same is its own.
    // And a packet that found its slot taken for long, or no slot, of which these scenarios have few, is repeated.
    let fine = [Reason::StaleRelease, Reason::StashBusy, Reason::StashFull].map(Reason::name);
    let mut drops = scene.daemon.drops().expect("counters");
    println!("dropped: {drops:?}");
    drops.retain(|(name, _)| !fine.contains(&name.as_str()));
    assert_eq!(drops, [], "packets were dropped");
}

#[test]
fn nothing_is_lost_between_two_daemons() {
    restarts("native", &web(), &[Daemon::kill, Daemon::stop, Daemon::kill]);
}

#[test]
fn nothing_is_lost_while_the_daemon_decides_misses() {
    restarts("native", &held(), &[Daemon::stop, Daemon::kill]);
}

#[test]
fn nothing_is_lost_in_generic_mode() {
    restarts("generic", &web(), &[Daemon::kill, Daemon::stop]);
}

#[test]
fn detach_leaves_nothing() {
    let mut scene = Scene::new("native", &web());
    let said = detach(scene.netns(), &scene.pins).expect_err("a daemon runs");
    assert!(said.contains("another dispatcherd uses the pins"), "{said}");
    scene.daemon.stop().expect("ends");
    let log = scene.daemon.process().log();
    assert!(log.contains("packets go on without a daemon") && log.contains("dispatcherctl detach"), "{log}");
    let user = scene.town.user(Version::Tls13);
    scene.town.visit(&user, 0).expect("packets go on");
    let said = detach(scene.netns(), &scene.pins).expect("detached");
    for line in ["detached from cl0", "detached from be0", "programs-1", "/maps"] {
        assert!(said.contains(line), "{line} is missing in: {said}");
    }
    assert!(!scene.pins.path().exists());
    for interface in ["cl0", "be0"] {
        assert_eq!(program_of(scene.netns(), interface), None);
    }
    let said = detach(scene.netns(), &scene.pins).expect("nothing to do");
    assert!(said.contains("nothing is pinned"), "{said}");
    scene.again();
    scene.town.visit(&user, 0).expect("a new start");
}

/// A daemon on a loopback, with one service, and its pins, which outlive it.
fn small(netns: &Netns) -> (Pins, Daemon, String) {
    let pins = Pins::new();
    let text = pins.within(&format!(
        "{UNPINNED}\ninterfaces = [\"lo\"]\nattach = \"generic\"\n\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:443\"\n\n\
         [[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1:443\"\n"
    ));
    let daemon = Daemon::start_with(netns, &text).expect("dispatcherd");
    (pins, daemon, text)
}

/// `ip netns exec` hides the host's BPF file system; whoever inherits it finds the pins.
#[test]
fn detach_in_another_mount_namespace() {
    let netns = Netns::new("restart").expect("a namespace");
    let (pins, mut daemon, _) = small(&netns);
    daemon.stop().expect("ends");
    let program = program("dispatcherctl").expect("dispatcherctl");
    let mut hidden = std::process::Command::new("ip");
    hidden.args(["netns", "exec", netns.name()]).arg(&program).args(["detach", "--pin"]).arg(pins.path());
    let said = format!("{:#}", execute(&mut hidden, None).expect_err("it cannot see them"));
    assert!(
        said.contains("`ip netns exec` makes one") && said.contains("nsenter --net=/run/netns/"),
        "{said}"
    );
    assert!(program_of(&netns, "lo").is_some() && pins.path().exists(), "nothing was done");
    let mut inherited = netns.command("unshare");
    inherited.args(["--mount", "--"]).arg(&program).args(["detach", "--pin"]).arg(pins.path());
    let said = execute(&mut inherited, None).expect("detached");
    assert!(said.contains("detached from lo") && said.contains("/maps"), "{said}");
    assert!(program_of(&netns, "lo").is_none() && !pins.path().exists());
}

#[test]
fn detach_leaves_what_is_not_ours() {
    let netns = Netns::new("restart").expect("a namespace");
    let (pins, mut daemon, _) = small(&netns);
    daemon.stop().expect("ends");
    let (theirs, folder) = (pins.path().join("theirs"), pins.path().join("things"));
    Array::<MapData, u64>::create(1, 0).expect("a map").pin(&theirs).expect("pins");
    std::fs::create_dir(&folder).expect("a folder");
    let said = detach(&netns, &pins).expect("detached");
    let left = format!(
        "left {}, as dispatcherd did not make {}, {}: ",
        pins.path().display(),
        theirs.display(),
        folder.display()
    );
    assert!(said.contains("detached from lo") && said.contains(&left) && said.contains("`rm -r`"), "{said}");
    assert_eq!(program_of(&netns, "lo"), None);
    assert_eq!(names(&pins, ""), ["theirs", "things"]);
    let said = detach(&netns, &pins).expect("nothing more to do");
    assert!(said.starts_with(&left), "{said}");
    std::fs::remove_file(theirs).expect("removes");
    std::fs::remove_dir(folder).expect("removes");
    let _ = detach(&netns, &pins).expect("the folder goes");
    assert!(!pins.path().exists());
}

#[test]
fn a_pinned_map_that_is_missing_begins_empty() {
    let netns = Netns::new("restart").expect("a namespace");
    let (pins, mut daemon, text) = small(&netns);
    let pin = ["sessions", "pin", "0a0b", "--service", "web", "--backend", "a"];
    let known = |daemon: &Daemon| daemon.sessions().expect("sessions").len();
    for (map, kept, line) in [
        ("REASONS", 1, "REASONS is missing in"),
        ("SESSIONS", 0, "SESSIONS is missing in"),
        ("GLOBALS", 0, "are not whole: GLOBALS is missing"),
    ] {
        let _: Vec<api::Session> = daemon.ask(&pin).expect("pinned");
        let all = names(&pins, "maps");
        assert!(all.iter().any(|one| one == map), "{all:?}");
        daemon.stop().expect("ends");
        let before = program_of(&netns, "lo").expect("it runs");
        std::fs::remove_file(pins.path().join("maps").join(map)).expect("removes");
        daemon.again(&netns, &text).expect("dispatcherd again");
        let log = daemon.process().log();
        assert_eq!(log.matches("is missing").count(), 1, "{log}");
        assert!(log.contains("WARN") && log.contains(line), "{map}: {log}");
        assert_eq!(known(&daemon), kept, "{map}");
        assert_eq!(names(&pins, "maps"), all, "{map}: it is there again");
        assert_eq!((names(&pins, "").len(), names(&pins, "links").len()), (3, 1), "one generation, one link");
        assert!(program_of(&netns, "lo").is_some_and(|now| now != before), "{map}: new programs");
        assert_eq!(daemon.status().expect("status").interfaces.len(), 1);
    }
}

#[test]
fn two_daemons_do_not_share_pins() {
    let scene = Scene::new("native", &web());
    let before = program_of(scene.netns(), "cl0");
    let said = refused(scene.netns(), &scene.text);
    assert!(said.contains("another dispatcherd uses the pins in") && said.contains("`pin`"), "{said}");
    assert_eq!(program_of(scene.netns(), "cl0"), before);
    // From another network namespace, when the first has ended.
    let mut scene = scene;
    scene.daemon.kill().expect("ends");
    let said = refused(&scene.town.topology.clients, &scene.text.replace("\"cl0\", \"be0\"", "\"lo\""));
    assert!(said.contains("another network namespace"), "{said}");
    assert_eq!(program_of(scene.netns(), "cl0"), before);
}

#[test]
fn maps_of_another_version_are_refused() {
    let mut scene = Scene::new("native", &web());
    let users = scene.users();
    scene.daemon.stop().expect("ends");
    let map = MapData::from_pin(scene.pins.path().join("maps/GLOBALS")).expect("pinned");
    let map = Map::from_map_data(map).expect("a map");
    let mut globals: Array<MapData, Globals> = map.try_into().expect("an array");
    let theirs = abi::ABI_VERSION + 41;
    let change = |globals: &mut Array<MapData, Globals>, abi| {
        let value = Globals { abi, ..globals.get(&0, 0).expect("reads") };
        globals.set(0, value, 0).expect("writes");
    };
    change(&mut globals, theirs);
    let said = refused(scene.netns(), &scene.text);
    for part in [format!("layouts of version {theirs}"), format!("version {}", abi::ABI_VERSION)] {
        assert!(said.contains(&part) && said.contains("dispatcherctl detach"), "{said}");
    }
    scene.come_home(&users);
    // The right version, another layout of one map.
    change(&mut globals, abi::ABI_VERSION);
    let sources = scene.pins.path().join("maps/SOURCES");
    std::fs::rename(&sources, scene.pins.path().join("maps/OTHER")).expect("moves");
    Array::<MapData, u64>::create(256, 0).expect("a map").pin(&sources).expect("pins");
    let said = refused(scene.netns(), &scene.text);
    for part in ["map SOURCES", "values of 8,", "values of 16,", "dispatcherctl detach"] {
        assert!(said.contains(part), "{part} is missing in: {said}");
    }
    scene.come_home(&users);
    std::fs::rename(scene.pins.path().join("maps/OTHER"), &sources).expect("moves");
    scene.again();
    scene.come_home(&users);
    assert_eq!(names(&scene.pins, "").len(), 3, "what was refused left nothing");
}

#[test]
fn a_start_that_fails_leaves_things_as_they_were() {
    let netns = Netns::new("restart").expect("a namespace");
    netns.ip("link add d0 type bridge\nlink set d0 up").expect("a device without native XDP");
    let pins = Pins::new();
    let text = format!(
        "{UNPINNED}\n[[interface]]\nname = \"lo\"\n[[interface]]\nname = \"d0\"\nattach = \"native\"\n"
    );
    let text = pins.within(&text);
    let said = refused(&netns, &text);
    assert!(said.contains("d0"), "{said}");
    assert_eq!(program_of(&netns, "lo"), None, "the first interface is let go");
    assert!(!pins.path().exists());
    // The same when something runs already: that goes on.
    let good = text.replace("native", "generic");
    let mut daemon = Daemon::start_with(&netns, &good).expect("dispatcherd");
    daemon.stop().expect("ends");
    let before = program_of(&netns, "lo");
    let said = refused(&netns, &good.replace("pin =", "control_group = \"no-such-group\"\npin ="));
    assert!(said.contains("no-such-group"), "{said}");
    assert!(before.is_some());
    assert_eq!(program_of(&netns, "lo"), before);
    daemon.again(&netns, &good).expect("starts");
    assert_eq!(names(&pins, ""), ["links", "maps", "programs-2"]);
}

/// `ip netns exec` makes a mount namespace with a `/sys` of its own: a BPF file system there would end with it.
#[test]
fn no_file_system_is_mounted_that_ends_with_the_process() {
    let netns = Netns::new("restart").expect("a namespace");
    let (pins, folder) = (Pins::new(), Folder::new().expect("a folder"));
    let text = pins.within(&format!("{UNPINNED}\ninterfaces = [\"lo\"]\n"));
    let file = folder.write("dispatcher.toml", &text).expect("a file");
    let mut command = std::process::Command::new("ip");
    command.args(["netns", "exec", netns.name()]).arg(program("dispatcherd").expect("dispatcherd"));
    command.arg("--config").arg(file).arg("--control").arg(folder.path().join("control.sock"));
    let mut process = Process::start(command, None).expect("starts");
    assert!(!process.wait(LIMIT).expect("ends").success());
    let said = process.log();
    assert!(said.contains("nsenter --net") && said.contains("pin = \"none\""), "{said}");
}

#[test]
fn interfaces_that_went_or_are_no_longer_wanted() {
    let netns = Netns::new("restart").expect("a namespace");
    let make = "link add d0 type bridge\nlink set d0 up";
    netns.ip(&format!("{make}\nlink add d1 type bridge\nlink set d1 up")).expect("devices");
    let pins = Pins::new();
    let text =
        |names: &str| pins.within(&format!("{UNPINNED}\nattach = \"generic\"\ninterfaces = [{names}]\n"));
    let all = "\"lo\", \"d0\", \"d1\"";
    let mut daemon = Daemon::start_with(&netns, &text(all)).expect("dispatcherd");
    assert_eq!(names(&pins, "links").len(), 3);
    daemon.kill().expect("ends");
    netns.ip(&format!("link del d0\n{make}\nlink set d1 name e1")).expect("changes");
    assert_eq!(program_of(&netns, "d0"), None);
    daemon.again(&netns, &text(&all.replace("d1", "e1"))).expect("dispatcherd again");
    let attached = daemon.status().expect("status").interfaces;
    let mut found: Vec<&str> = attached.iter().map(|one| one.name.as_str()).collect();
    found.sort_unstable();
    assert_eq!(found, ["d0", "e1", "lo"]);
    for interface in found {
        assert!(program_of(&netns, interface).is_some(), "{interface}");
    }
    assert_eq!(names(&pins, "links").len(), 3, "the link of what is gone is gone");
    // While it runs: the pin goes with the interface, and comes back with it.
    netns.ip("link del d0").expect("removes");
    until("the pin stays", || names(&pins, "links").len() == 2);
    netns.ip(make).expect("a device of the same name");
    until("not attached again", || names(&pins, "links").len() == 3);
    daemon.kill().expect("ends");
    daemon.again(&netns, &text("\"lo\"")).expect("dispatcherd again");
    assert!(daemon.process().log().contains("detached from e1"), "{}", daemon.process().log());
    for (interface, attached) in [("lo", true), ("d0", false), ("e1", false)] {
        assert_eq!(program_of(&netns, interface).is_some(), attached, "{interface}");
    }
    assert_eq!(names(&pins, "links").len(), 1);
}

#[test]
fn what_changed_meanwhile_is_put_in_force() {
    let both = [web(), Service::new("other", OTHER)];
    let mut scene = Scene::new("native", &web());
    let pinned = |scene: &Scene, services: &[Service]| {
        scene.pins.within(&config(&scene.town.topology, "native", services))
    };
    let users = scene.users();
    scene.daemon.kill().expect("ends");
    // A service comes, and of the other's backends only two are left.
    let text = pinned(&scene, &both);
    let third = text.find("\n[[service.backend]]\nname = \"b3\"").expect("the third of the first service");
    let other = text.find("\n[[service]]\nname = \"other\"").expect("the second service");
    let text = format!("{}{}", &text[..third], &text[other..]);
    scene.again_with(&text);
    let found = scene.daemon.backends().expect("backends");
    let found: Vec<String> =
        found.iter().map(|one| format!("{}/{} {}", one.service, one.name, one.state)).collect();
    assert_eq!(found, ["web/b1 up", "web/b2 up", "other/b1 up", "other/b2 up", "other/b3 up"]);
    scene.come_home(users.iter().filter(|(_, home)| home != "b3"));
    for (user, home) in &users {
        let identity = scene.town.visit(user, 0).expect("an answer");
        assert!(identity.backend != "b3" && (home == "b3" || identity.backend == *home), "{identity:?}");
    }
    let at = |family: Family| SocketAddr::new(family.vip(), OTHER);
    let clear = |scene: &Scene, family: Family| {
        let topology = &scene.town.topology;
        visit_in_clear(&topology.clients, topology.client(family, 0), at(family))
    };
    for family in Family::BOTH {
        clear(&scene, family).expect("the new service");
    }
    // The first service goes, and the third backend comes back.
    scene.daemon.stop().expect("ends");
    let text = pinned(&scene, &both[1..]);
    scene.again_with(&text);
    let services: Vec<api::Service> = scene.daemon.ask(&["services"]).expect("services");
    assert_eq!(services.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["other"]);
    for family in Family::BOTH {
        clear(&scene, family).expect("it goes on");
        let from = scene.town.topology.client(family, 0);
        let gone = visit_in_clear(&scene.town.topology.clients, from, SocketAddr::new(family.vip(), PORT));
        assert!(gone.is_err(), "the service that went answers: {gone:?}");
    }
}

#[test]
fn the_operators_word_stays() {
    let mut scene = Scene::new("native", &web());
    // Where it is kept.
    let folder = Folder::new().expect("a folder");
    let kept = format!("state = \"{}\"", folder.path().join("state.redb").display());
    scene.text = scene.text.replace("state = \"none\"", &kept);
    scene.daemon.stop().expect("ends");
    scene.again();
    let shown = |scene: &Scene| -> Vec<(String, String, u32)> {
        let backends = scene.daemon.backends().expect("backends").into_iter();
        backends.map(|one| (one.name, one.state, one.weight)).collect()
    };
    let expected = |list: &[(&str, &str, u32)]| -> Vec<(String, String, u32)> {
        list.iter().map(|(name, state, weight)| (name.to_string(), state.to_string(), *weight)).collect()
    };
    let tell = |scene: &Scene, words: &[&str]| {
        scene.daemon.ask::<serde_json::Value>(&[&["backend"], words].concat()).expect("told");
    };
    let place = scene.town.topology.backends[2].address(Family::V4).to_string();
    tell(&scene, &["web/b1", "drain", "--deadline", "1h"]);
    tell(&scene, &["web/b2", "disable"]);
    tell(&scene, &["web/b3", "weight", "7"]);
    tell(&scene, &["web/b4", "add", &format!("{place}:{OTHER}"), "--weight", "2"]);
    let pin = ["sessions", "pin", "0a0b", "--service", "web", "--backend", "b3"];
    scene.daemon.ask::<serde_json::Value>(&pin).expect("pinned");
    for end in [Daemon::kill, Daemon::stop] {
        end(&mut scene.daemon).expect("ends");
        scene.again();
        assert_eq!(
            shown(&scene),
            expected(&[("b1", "drain", 1), ("b2", "disabled", 1), ("b3", "up", 7), ("b4", "up", 2)])
        );
        let left = scene.daemon.backends().expect("backends")[0].deadline_seconds;
        assert!(left.is_some_and(|left| (3000..=3600).contains(&left)), "{left:?}");
        let shown: Vec<api::Session> = scene.daemon.ask(&["sessions", "show", "0a0b"]).expect("shown");
        assert_eq!((shown[0].state.as_str(), shown[0].backend.as_str()), ("pinned", "b3"));
    }
    let user = scene.town.user(Version::Tls12);
    assert_eq!(scene.town.visit(&user, 0).expect("an answer").backend, "b3");
    // A file in which one of them is no more: the rest holds.
    scene.daemon.stop().expect("ends");
    let text = scene.text.clone();
    let without = text.replace("name = \"b2\"", "name = \"b5\"");
    assert_ne!(without, text);
    scene.again_with(&without);
    assert!(scene.daemon.process().log().contains("web/b2: there is no such backend"));
    assert_eq!(
        shown(&scene),
        expected(&[("b1", "drain", 1), ("b5", "up", 1), ("b3", "up", 7), ("b4", "up", 2)])
    );
    scene.daemon.rewrite(&text).expect("written");
    scene.daemon.ask::<api::Reload>(&["reload"]).expect("reloaded");
    let file = expected(&[("b1", "up", 1), ("b2", "up", 1), ("b3", "up", 1)]);
    assert_eq!(shown(&scene), file);
    scene.daemon.stop().expect("ends");
    scene.again();
    assert_eq!(shown(&scene), file, "what the file says is said again");
}

#[test]
fn what_health_checks_took_out_stays_out() {
    let checks = "[service.health]\ncheck = \"tcp\"\ninterval = \"1s\"\nrise = 2\nfall = 1";
    let mut scene = Scene::new("native", &web().with(checks));
    let state = |scene: &Scene| scene.daemon.backends().expect("backends")[1].state.clone();
    assert_eq!(state(&scene), "up");
    // The second backend's server of the service; each has one for another port.
    let gone = scene.town.servers.remove(2);
    assert_eq!(gone.name, "b2");
    drop(gone);
    until("it is not missed", || state(&scene) == "down");
    scene.daemon.kill().expect("ends");
    let place = &scene.town.topology.backends[1];
    let server = Server::start(&place.netns, "b2", PORT, &scene.town.authority, Manners::default());
    scene.town.servers.push(server.expect("a server"));
    // One good check comes at once, the second in an hour.
    let seldom = scene.text.replace("interval = \"1s\"", "interval = \"1h\"");
    scene.again_with(&seldom);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(state(&scene), "down");
    scene.daemon.rewrite(&scene.text).expect("written");
    scene.daemon.ask::<api::Reload>(&["reload"]).expect("reloaded");
    until("it does not come back", || state(&scene) == "up");
}

#[test]
fn pinned_maps_keep_their_sizes() {
    let mut scene = Scene::new("native", &web());
    let users = scene.users();
    scene.daemon.stop().expect("ends");
    let larger = scene
        .text
        .replace("sessions = 65536", "sessions = 131072")
        .replace("stash_slots = 1024", "stash_slots = 512");
    assert_ne!(larger, scene.text);
    scene.again_with(&larger);
    let log = scene.daemon.process().log();
    for line in [
        "capacity sessions: the pinned map has 65536 and keeps them, not 131072",
        "stash_slots: the pinned map has 1024",
    ] {
        assert!(log.contains(line), "{line} is missing in: {log}");
    }
    let shown = scene.daemon.told(&["config", "show"]).expect("shown");
    let note = "# capacity.sessions: the pinned map keeps 65536; the file says 131072, which takes `dispatcherctl detach`";
    assert!(shown.starts_with(note) && shown.contains("\nsessions = 65536\n"), "{shown}");
    assert!(!shown.contains("capacity.flows:"), "{shown}");
    let json: serde_json::Value = scene.daemon.ask(&["config", "show"]).expect("shown");
    assert_eq!(
        (&json["capacity"]["sessions"], &json["capacity"]["stash_slots"]),
        (&65536.into(), &1024.into())
    );
    scene.come_home(&users);
    scene.daemon.stop().expect("ends");
    detach(scene.netns(), &scene.pins).expect("detached");
    let small = scene.text.replace("[capacity]", "[capacity]\nbackends = 3");
    scene.again_with(&small);
    scene.daemon.stop().expect("ends");
    let more =
        scene.pins.within(&config(&scene.town.topology, "native", &[web(), Service::new("other", OTHER)]));
    let said = refused(scene.netns(), &more);
    assert!(said.contains("capacity backends of 3, the services need 6"), "{said}");
    scene.town.visit(&users[0].0, 0).expect("packets go on");
    scene.again_with(&small);
    scene.daemon.rewrite(&more.replace("[capacity]", "[capacity]\nbackends = 3")).expect("written");
    let error = scene.daemon.ask::<api::Reload>(&["reload"]).expect_err("too many backends");
    assert!(format!("{error:#}").contains("3 is too small"), "{error:#}");
    assert_eq!(scene.daemon.counter(Reason::NoStage).expect("a counter"), 0);
}
