use super::*;

const TEXT: &str = r#"
interfaces = ["eth0"]
[[service]]
name = "web"
vip = ["192.0.2.10:443", "[2001:db8::10]:443"]
table_size = 251
[[service.backend]]
name = "a"
address = ["10.0.0.1:443", "[fd00::1]:443"]
[[service.backend]]
name = "b"
address = "10.0.0.2:443"
"#;

const QUIC: &str = r#"
interfaces = ["eth0"]
[[service]]
name = "quic"
vip = "192.0.2.10:443"
protocol = "udp"
mode = "l4"
affinity = "quic-cid"
[[service.quic_lb]]
config_id = 1
server_id_length = 2
[[service.quic_lb]]
config_id = 5
server_id_length = 2
[[service.backend]]
name = "a"
address = "10.0.0.1:443"
quic_server_id = "0a01"
[[service.backend]]
name = "b"
address = "10.0.0.2:443"
quic_server_id = ["0b01", "0b02"]
"#;

#[test]
fn server_ids_come_before_their_frontend_and_go_after_it() {
    let mut world = World::new(QUIC);
    let mut actual = Actual::default();
    let changes = world.settle(&mut actual);
    let service = &world.config.services[0];
    let expected: Vec<Change> = [1, 5]
        .into_iter()
        .flat_map(|config| [("a", [10, 1]), ("b", [11, 1]), ("b", [11, 2])].map(|(b, id)| (config, b, id)))
        .map(|(config, name, [high, low])| Change::ServerId {
            id: (service.id, vec![config, high, low]),
            backend: crate::config::backend_id("quic", name),
        })
        .collect();
    let place = |wanted: &dyn Fn(&Change) -> bool| changes.iter().position(wanted).expect("is there");
    let first = place(&|change| matches!(change, Change::ServerId { .. }));
    assert_eq!(changes[first..first + 6], expected);
    assert!(place(&|change| matches!(change, Change::Index { .. })) < first);
    assert!(first + 6 <= place(&|change| matches!(change, Change::Frontend { .. })));
    let (_, frontend) = actual.frontend(&(service.vips[0], 17)).expect("written");
    assert_eq!((frontend.quic_lb, frontend.cid_lengths), ([0, 2, 0, 0, 0, 2, 0, 0], 0));
    assert!(world.settle(&mut actual).is_empty());

    // An ID moves to the other backend, one goes.
    world.config.services[0].backends[0].quic_server_ids = vec![vec![11, 1]];
    world.config.services[0].backends[1].quic_server_ids = vec![vec![11, 2]];
    world.config.services[0].quic_lb[5] = 0;
    let a = world.config.services[0].backends[0].id;
    let changes = world.settle(&mut actual);
    let id = |bytes: [u8; 3]| (world.config.services[0].id, bytes.to_vec());
    assert_eq!(changes[0], Change::ServerId { id: id([1, 11, 1]), backend: a });
    assert!(matches!(changes[1], Change::Frontend { .. }), "{changes:?}");
    let gone = [[1, 10, 1], [5, 10, 1], [5, 11, 1], [5, 11, 2]];
    assert_eq!(changes[2..], gone.map(|bytes| Change::RemoveServerId { id: id(bytes) }));

    world.config.services.clear();
    let changes = world.settle(&mut actual);
    let vip = changes.iter().position(|change| matches!(change, Change::RemoveVip { .. }));
    let ids = changes.iter().position(|change| matches!(change, Change::RemoveServerId { .. }));
    let backend = changes.iter().position(|change| matches!(change, Change::RemoveBackend { .. }));
    assert!(vip < ids && ids < backend && vip.is_some(), "{changes:?}");
    assert_eq!(actual.server_ids.len(), 0);
}

#[test]
fn an_unhealthy_address_leaves_its_table_and_goes_down() {
    let mut world = World::new(TEXT);
    let mut actual = Actual::default();
    world.settle(&mut actual);
    let a = world.config.services[0].backends[0].clone();
    let found = |reason: &str, dead| Unhealthy { reason: reason.into(), dead };
    world.health.insert((a.id, true), found("health: connecting: refused (3 of 3)", false));
    let changes = world.settle(&mut actual);
    let written = changes.iter().position(|change| matches!(change, Change::Table { .. }));
    let endpoint = changes.iter().position(|change| matches!(change, Change::Endpoint { .. }));
    assert!(written < endpoint && written.is_some(), "{changes:?}");
    assert!(!actual.is_up(a.id, true) && actual.is_up(a.id, false));
    let index = actual.backend_index(a.id).expect("is there");
    assert!(!table(&actual, "192.0.2.10:443").contains(&index));
    assert!(table(&actual, "[2001:db8::10]:443").contains(&index));
    let (state, reason) = status(&world.desired(), &actual, &a);
    let expected = "10.0.0.1: health: connecting: refused (3 of 3)";
    assert_eq!((state, reason.as_deref()), ("up", Some(expected)));

    world.health.insert((a.id, false), found("health: status 503", false));
    world.settle(&mut actual);
    assert_eq!(status(&world.desired(), &actual, &a).0, "down");
    assert!(!world.desired().takes_new(&a));
    world.health.clear();
    world.settle(&mut actual);
    assert_eq!(status(&world.desired(), &actual, &a), ("up", None));
    assert!(table(&actual, "192.0.2.10:443").contains(&index) && world.desired().takes_new(&a));
}

#[test]
fn flows_look_again_after_a_backend_died_or_went() {
    let mut world = World::new(TEXT);
    let mut actual = Actual::default();
    world.settle(&mut actual);
    let a = world.config.services[0].backends[0].clone();
    let last = |changes: &[Change]| matches!(changes.last(), Some(Change::Generation));
    for dead in [false, true] {
        world.health.insert((a.id, true), Unhealthy { reason: "health: x".into(), dead });
        let changes = world.settle(&mut actual);
        assert_eq!(last(&changes), dead, "{changes:?}");
        assert_eq!(actual.endpoint(a.id, true).flags & BACKEND_DEAD != 0, dead);
        world.health.clear();
        assert!(!last(&world.settle(&mut actual)), "what comes back ends no flow");
    }
    world.config.services[0].backends.remove(0);
    assert!(last(&world.settle(&mut actual)), "the backend was removed");
}

#[test]
fn a_backend_in_slow_start_has_a_part_of_its_share() {
    let mut world = World::new(TEXT);
    let mut actual = Actual::default();
    world.settle(&mut actual);
    let service = world.config.services[0].clone();
    let a = service.backends[0].id;
    let index = actual.backend_index(a).expect("is there");
    let vip = [(service.vips[0], 6)];
    assert!((actual.share(&vip, index) - 0.5).abs() < 0.02);
    for (percent, share) in [(10, 1.0 / 11.0), (50, 1.0 / 3.0)] {
        world.percent.insert(a, percent);
        world.settle(&mut actual);
        let found = actual.share(&vip, index);
        assert!((found - share).abs() < 0.02, "{percent} percent: {found}");
    }
    world.percent.clear();
    world.settle(&mut actual);
    assert!((actual.share(&vip, index) - 0.5).abs() < 0.02);
}

/// The world outside the maps, as a test sets it.
#[derive(Clone, Default)]
struct World {
    config: Config,
    reach: BTreeMap<IpAddr, Reach>,
    loads: BTreeMap<u32, u64>,
    responses: BTreeMap<u32, u64>,
    tickets: BTreeMap<u32, u32>,
    health: BTreeMap<(u32, bool), Unhealthy>,
    percent: BTreeMap<u32, u32>,
}

impl World {
    fn new(text: &str) -> Self {
        let config = Config::parse(text, &[]).expect("a good configuration");
        let mut world = Self { config, ..Self::default() };
        let backends = world.config.services.iter().flat_map(|service| service.backends.clone());
        for address in backends.collect::<Vec<_>>().iter().flat_map(Backend::addresses) {
            world.up(&address.ip().to_string(), 3, 0x11);
        }
        world
    }

    fn up(&mut self, ip: &str, ifindex: u32, mac: u32) {
        let link = Link { ifindex, macs: [mac; 3], vlans: [0; 2] };
        self.reach.insert(ip.parse().expect("address"), Reach::Up(Path { link, mtu: 1500 }));
    }

    fn down(&mut self, ip: &str) {
        self.reach.insert(ip.parse().expect("address"), Reach::Down("no neighbour".into()));
    }

    fn desired(&self) -> Desired<'_> {
        Desired {
            config: &self.config,
            reach: &self.reach,
            loads: &self.loads,
            responses: &self.responses,
            tickets: &self.tickets,
            health: &self.health,
            percent: &self.percent,
        }
    }

    fn backend(&mut self, id: u32) -> &mut Backend {
        let mut all = self.config.services.iter_mut().flat_map(|service| &mut service.backends);
        all.find(|one| one.id == id).expect("is there")
    }

    fn set(&mut self, id: u32, state: AdminState) {
        self.backend(id).state = state;
    }

    fn status(&mut self, actual: &Actual, id: u32) -> &'static str {
        let backend = self.backend(id).clone();
        status(&self.desired(), actual, &backend).0
    }

    /// Brings `actual` up to date and returns what was changed.
    fn settle(&self, actual: &mut Actual) -> Vec<Change> {
        let changes = diff(&self.desired(), actual);
        changes.iter().for_each(|change| actual.record(change));
        assert_eq!(kinds(&diff(&self.desired(), actual)), [""; 0], "a second look finds nothing to do");
        changes
    }
}

fn kinds(changes: &[Change]) -> Vec<&'static str> {
    changes
        .iter()
        .map(|change| match change {
            Change::Source { .. } => "source",
            Change::Replay { .. } => "replay",
            Change::Cookie { .. } => "cookie",
            Change::Endpoint { endpoint, .. } if endpoint.flags & BACKEND_UP != 0 => "up",
            Change::Endpoint { .. } => "down",
            Change::Index { .. } => "index",
            Change::Generation => "generation",
            Change::Filter { .. } => "filter",
            Change::Table { .. } => "table",
            Change::Frontend { .. } => "frontend",
            Change::Publish { .. } => "publish",
            Change::RemoveVip { .. } => "remove-vip",
            Change::RemoveBackend { .. } => "remove-backend",
            Change::ServerId { .. } => "server-id",
            Change::RemoveServerId { .. } => "remove-server-id",
        })
        .collect()
}

fn vip(text: &str) -> Vip {
    (text.parse().expect("address"), 6)
}

fn table(actual: &Actual, of: &str) -> BTreeSet<u32> {
    actual.table(&actual.frontends[&vip(of)].frontend).iter().copied().collect()
}

#[test]
fn the_first_time_everything_is_written_in_order() {
    let mut actual = Actual::default();
    let changes = World::new(TEXT).settle(&mut actual);
    assert_eq!(
        kinds(&changes),
        [
            "replay", "up", "up", "index", "up", "index", "filter", "table", "frontend", "publish", "table",
            "frontend", "publish"
        ]
    );
    assert_eq!(table(&actual, "192.0.2.10:443"), BTreeSet::from([0, 1]));
    // Only backend a has an IPv6 address.
    assert_eq!(table(&actual, "[2001:db8::10]:443"), BTreeSet::from([0]));
    let (index, frontend) = actual.frontend(&vip("[2001:db8::10]:443")).expect("is there");
    assert_eq!((index, frontend.table_base, frontend.table_len), (1, 502, 251));
}

#[test]
fn without_neighbours_tables_are_empty_and_services_answer_nobody() {
    let mut world = World::new(TEXT);
    world.reach.clear();
    let mut actual = Actual::default();
    world.settle(&mut actual);
    let (_, frontend) = actual.frontend(&vip("192.0.2.10:443")).expect("is there");
    assert_eq!(frontend.table_len, 0);
    let (state, reason) = status(&world.desired(), &actual, &world.config.services[0].backends[1]);
    assert_eq!((state, reason.as_deref()), ("down", Some("not looked up yet")));
}

#[test]
fn a_backend_that_is_lost_leaves_tables_before_it_goes_down() {
    let mut world = World::new(TEXT);
    let mut actual = Actual::default();
    world.settle(&mut actual);
    let before = actual.frontend(&vip("192.0.2.10:443")).expect("is there").1.table_base;
    world.down("10.0.0.2");
    let changes = world.settle(&mut actual);
    assert_eq!(kinds(&changes), ["table", "frontend", "down"]);
    let (_, frontend) = actual.frontend(&vip("192.0.2.10:443")).expect("is there");
    assert_ne!(frontend.table_base, before, "the table in use is not written over");
    assert_eq!(table(&actual, "192.0.2.10:443"), BTreeSet::from([0]));
    let b = &world.config.services[0].backends[1];
    assert_eq!(actual.endpoint(b.id, true).link.ifindex, 3, "the last path stays");
    assert_eq!(status(&world.desired(), &actual, b), ("down", Some("no neighbour".into())));
    // And back again, into the first half.
    world.up("10.0.0.2", 3, 0x11);
    assert_eq!(kinds(&world.settle(&mut actual)), ["up", "table", "frontend"]);
    assert_eq!(actual.frontend(&vip("192.0.2.10:443")).expect("is there").1.table_base, before);
}

#[test]
fn a_new_mac_address_raises_the_generation_and_leaves_tables_alone() {
    let mut world = World::new(TEXT);
    let mut actual = Actual::default();
    world.settle(&mut actual);
    world.up("10.0.0.2", 3, 0x22);
    assert_eq!(kinds(&world.settle(&mut actual)), ["up", "generation"]);
}

#[test]
fn drain_and_disable() {
    let mut world = World::new(TEXT);
    let mut actual = Actual::default();
    world.settle(&mut actual);
    let b = world.config.services[0].backends[1].clone();
    world.set(b.id, AdminState::Drain);
    world.settle(&mut actual);
    assert_eq!(actual.endpoint(b.id, true).flags, BACKEND_UP | BACKEND_DRAIN);
    assert_eq!(table(&actual, "192.0.2.10:443"), BTreeSet::from([0]));
    let pool = &pools(&world.desired(), &actual)[&0];
    assert_eq!((pool.candidates.len(), pool.known.len()), (1, 2), "known sessions still go there");
    assert_eq!(world.status(&actual, b.id), "drain");
    world.set(b.id, AdminState::Disabled);
    assert_eq!(kinds(&world.settle(&mut actual)), ["down"], "connections that it has go on");
    assert_eq!(actual.endpoint(b.id, true).flags, BACKEND_DISABLED);
    assert_eq!(world.status(&actual, b.id), "disabled");
    world.set(b.id, AdminState::Offline);
    assert_eq!(kinds(&world.settle(&mut actual)), ["down", "generation"], "they end");
    assert_eq!(actual.endpoint(b.id, true).flags, BACKEND_DISABLED | BACKEND_DEAD);
    assert_eq!(world.status(&actual, b.id), "offline");
}

#[test]
fn slots_stay_when_others_go() {
    let mut actual = Actual::default();
    World::new(TEXT).settle(&mut actual);
    let without_a = TEXT
        .replace("[[service.backend]]\nname = \"a\"\naddress = [\"10.0.0.1:443\", \"[fd00::1]:443\"]\n", "")
        .replace(", \"[2001:db8::10]:443\"", "");
    let changes = World::new(&without_a).settle(&mut actual);
    assert_eq!(
        kinds(&changes),
        ["filter", "table", "frontend", "remove-vip", "remove-backend", "generation"]
    );
    assert_eq!(actual.backend_index(backend_id("b")), Some(1));
    // A newcomer takes the free slot when there is no other.
    actual.room = 2;
    let with_c = format!("{without_a}[[service.backend]]\nname = \"c\"\naddress = \"10.0.0.3:443\"\n");
    World::new(&with_c).settle(&mut actual);
    assert_eq!(actual.backend_index(backend_id("c")), Some(0));
    assert_eq!(actual.backend_index(backend_id("b")), Some(1));
}

#[test]
fn an_index_that_was_given_up_is_handed_on_last() {
    let mut actual = Actual { room: 4, ..Actual::default() };
    World::new(TEXT).settle(&mut actual);
    let mut last = "b".to_owned();
    // b stays at 1 only until c has come; a has 0 all the time.
    for (name, index) in [("c", 2), ("d", 3), ("e", 1), ("f", 2), ("g", 3)] {
        let both = |name: &str| TEXT.replace("name = \"b\"", &format!("name = \"{name}\""));
        World::new(&both(name)).settle(&mut actual);
        assert_eq!(actual.backend_index(backend_id(name)), Some(index), "{name} after {last}");
        assert_eq!(actual.backend_index(backend_id(&last)), None);
        assert_eq!(actual.backend_index(backend_id("a")), Some(0));
        last = name.to_owned();
    }
    // Without room the number is one that no map has, which the write tells.
    actual.room = 2;
    World::new(&TEXT.replace("name = \"b\"", "name = \"h\"")).settle(&mut actual);
    assert_eq!(actual.backend_index(backend_id("h")), Some(1));
    World::new(TEXT).settle(&mut actual);
    assert_eq!(actual.backend_index(backend_id("b")), Some(2));
}

fn backend_id(name: &str) -> u32 {
    crate::config::backend_id("web", name)
}

#[test]
fn a_table_of_another_size_gets_another_region() {
    let mut actual = Actual::default();
    World::new(TEXT).settle(&mut actual);
    let changes = World::new(&TEXT.replace("251", "509")).settle(&mut actual);
    assert_eq!(kinds(&changes), ["table", "frontend", "table", "frontend"]);
    let region = |slot: &FrontendSlot| (slot.frontend.table_region, slot.frontend.table_size);
    let regions: Vec<(u32, u32)> = actual.frontends.values().map(region).collect();
    assert_eq!(regions, [(1004, 509), (2022, 509)]);
    for slot in actual.frontends.values() {
        assert_eq!(slot.frontend.table_base, slot.frontend.table_region);
    }
}

#[test]
fn more_interfaces_than_replay_maps_are_a_clear_reason() {
    let mut text =
        "interfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:1\"\ntable_size = 251\n"
            .to_owned();
    for n in 1..=9 {
        text.push_str(&format!("[[service.backend]]\nname = \"b{n}\"\naddress = \"10.0.0.{n}:1\"\n"));
    }
    let mut world = World::new(&text);
    for n in 1..=9 {
        world.up(&format!("10.0.0.{n}"), n, n);
    }
    let mut actual = Actual::default();
    world.settle(&mut actual);
    let (state, reason) = status(&world.desired(), &actual, &world.config.services[0].backends[8]);
    assert_eq!(state, "down");
    assert!(reason.expect("a reason").contains("more than 8 interfaces"));
    // One of the interfaces is given up: its map is free for the ninth.
    world.down("10.0.0.4");
    world.settle(&mut actual);
    assert_eq!(actual.replay[3], 9);
}

#[test]
fn sources_are_written_per_family() {
    let text = TEXT.replace(
        "table_size",
        "source = \"dispatcher\"\nsource_addresses = [\"10.0.0.9\", \"fd00::9\", \"10.0.0.8\"]\nsource_ports = \"2000-2999\"\ntable_size",
    );
    let mut actual = Actual::default();
    World::new(&text).settle(&mut actual);
    let (_, v4) = actual.frontend(&vip("192.0.2.10:443")).expect("is there");
    assert_eq!((v4.source_base, v4.source_len, v4.port_min, v4.port_max), (0, 2, 2000, 2999));
    let (_, v6) = actual.frontend(&vip("[2001:db8::10]:443")).expect("is there");
    assert_eq!((v6.source_base, v6.source_len), (2, 1));
    assert_eq!(v6.flags, FRONTEND_SOURCE_DISPATCHER);
}

#[test]
fn where_tickets_name_their_key_is_found_out_or_told() {
    for (told, formats, ticket) in
        [("auto", 1, 0), ("16-bytes", 1, TICKET_NAMED), ("4-bytes", 2, TICKET_NAMED + 1), ("none", 0, 1)]
    {
        let text = TEXT.replace("table_size", &format!("tickets = {{ key_name = \"{told}\" }}\ntable_size"));
        let mut actual = Actual::default();
        World::new(&text).settle(&mut actual);
        let (_, frontend) = actual.frontend(&vip("192.0.2.10:443")).expect("is there");
        let endpoint = actual.endpoint(backend_id("a"), true);
        assert_eq!((frontend.ticket_formats, endpoint.ticket), (formats, ticket), "{told}");
    }
}

#[test]
fn a_cookie_gets_a_place_that_no_frontend_points_to() {
    let with = |cookie: &str| TEXT.replace("table_size", &format!("affinity = \"{cookie}\"\ntable_size"));
    let mut actual = Actual::default();
    let place = |actual: &Actual| actual.frontend(&vip("192.0.2.10:443")).expect("is there").1.cookie;
    World::new(&with("http-cookie:a")).settle(&mut actual);
    assert_eq!(place(&actual), 1);
    let changes = World::new(&with("http-cookie:b")).settle(&mut actual);
    assert_eq!(kinds(&changes), ["cookie", "frontend", "frontend"]);
    assert_eq!(place(&actual), 2, "connections of a moment ago may still use the first");
    World::new(&with("http-cookie:c")).settle(&mut actual);
    assert_eq!((place(&actual), actual.cookies.clone()), (1, vec!["c".to_owned(), "b".to_owned()]));
    assert_eq!(kinds(&World::new(TEXT).settle(&mut actual)), ["frontend", "frontend"]);
    assert_eq!(place(&actual), 0);
}

#[test]
fn the_lowest_free_number() {
    for (taken, free) in [(&[][..], 0), (&[0, 1, 2], 3), (&[1, 2], 0), (&[0, 2], 1)] {
        assert_eq!(lowest_free(&taken.iter().copied().collect()), free);
    }
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len() as u64) as usize]
    }
}

/// A world in which anything may be: services, addresses, sizes, sources, cookies, server IDs; addresses that
/// are reached through one of some interfaces or not; what the operator said.
fn any_world(dice: &mut Dice, interfaces: &[u32]) -> World {
    let mut text = "interfaces = [\"lo\"]\n".to_owned();
    for service in 0..dice.roll(5) {
        let quic = service == 3;
        let families = dice.pick(&[&[4][..], &[6], &[4, 6]]);
        let addresses = |host: u64, port: u64| {
            let one = |family: &u64| match family {
                4 => format!("\"10.0.{service}.{host}:{port}\""),
                _ => format!("\"[fd00::{service}:{host}]:{port}\""),
            };
            families.iter().map(one).collect::<Vec<_>>().join(", ")
        };
        text += &format!(
            "[[service]]\nname = \"s{service}\"\nvip = [{}]\ntable_size = {}\nsack = {}\nbalance = \"{}\"\n",
            addresses(200, 443 + dice.roll(2)),
            dice.pick(&[11, 13, 251]),
            dice.pick(&[true, false]),
            dice.pick(&["maglev", "weighted-round-robin"]),
        );
        if quic {
            text += "protocol = \"udp\"\nmode = \"l4\"\naffinity = \"quic-cid\"\n[[service.quic_lb]]\nconfig_id = 1\nserver_id_length = 2\n";
        } else {
            if dice.roll(2) == 0 {
                text += &format!("affinity = \"http-cookie:{}\"\n", dice.pick(&["a", "JSESSIONID", "b"]));
            }
            if dice.roll(2) == 0 {
                let pool: Vec<String> = (0..=dice.roll(3))
                    .map(|n| format!("\"10.9.{service}.{n}\", \"fd09::{service}:{n}\""))
                    .collect();
                text += &format!("source = \"dispatcher\"\nsource_addresses = [{}]\n", pool.join(", "));
            }
        }
        for number in 0..=dice.roll(3) {
            let backend = number + dice.roll(2) * 4;
            // Somebody must take connections.
            let least = u64::from(number == 0);
            if text.contains(&addresses(backend, 443)) {
                continue;
            }
            text += &format!(
                "[[service.backend]]\nname = \"b{backend}\"\naddress = [{}]\nweight = {}\nstate = \"{}\"\n",
                addresses(backend, 443),
                least + dice.roll(2),
                dice.pick(&["enabled", "enabled", "drain", "disabled"]),
            );
            if quic {
                text += &format!("quic_server_id = \"{backend:02x}{:02x}\"\n", dice.roll(2));
            }
        }
    }
    let config = Config::parse(&text, &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let mut world = World { config, ..World::default() };
    let backends: Vec<Backend> =
        world.config.services.iter().flat_map(|service| service.backends.clone()).collect();
    for backend in backends {
        for address in backend.addresses() {
            match dice.roll(4) {
                0 => world.down(&address.ip().to_string()),
                _ => world.up(&address.ip().to_string(), dice.pick(interfaces), 0x11 + dice.roll(2) as u32),
            }
        }
        for address in backend.addresses() {
            if dice.roll(6) == 0 {
                let found = Unhealthy { reason: "?".into(), dead: dice.roll(2) == 0 };
                world.health.insert((backend.id, address.is_ipv4()), found);
            }
        }
        if dice.roll(3) == 0 {
            let states = [AdminState::Enabled, AdminState::Drain, AdminState::Disabled, AdminState::Offline];
            world.set(backend.id, dice.pick(&states));
        }
        if dice.roll(2) == 0 {
            world.tickets.insert(backend.id, dice.pick(&[1, TICKET_NAMED, TICKET_NAMED + 1]));
        }
    }
    world
}

/// A frontend, its table, its cookie, its sources.
type Seen = (Frontend, Vec<u32>, Option<String>, Vec<IpAddr>);

/// What packets meet, without the places where it stands.
#[derive(Debug, PartialEq)]
struct Meaning {
    frontends: BTreeMap<Vip, Seen>,
    endpoints: BTreeMap<u32, [(Endpoint, u32); 2]>,
    filter: BTreeSet<IpAddr>,
    server_ids: BTreeMap<ServerId, u32>,
}

fn meaning(actual: &Actual) -> Meaning {
    let frontend = |slot: &FrontendSlot| {
        assert!(slot.published);
        let mut frontend = slot.frontend;
        let table = actual.table(&frontend).iter().map(|index| actual.backend_id(*index).expect("known"));
        let table = table.collect();
        let cookie = frontend.cookie.checked_sub(1).map(|at| actual.cookies[at as usize].clone());
        let pool = frontend.source_base as usize..(frontend.source_base + frontend.source_len) as usize;
        (frontend.table_base, frontend.table_region, frontend.source_base) = (0, 0, 0);
        frontend.cookie = 0;
        (frontend, table, cookie, actual.sources[pool].to_vec())
    };
    let endpoint = |mut one: Endpoint| {
        let up = one.flags & BACKEND_UP != 0;
        let ifindex = if up { actual.replay[usize::from(one.replay)] } else { 0 };
        one.replay = 0;
        if !up {
            (one.link, one.mtu) = (Link::default(), 0);
        }
        (one, ifindex)
    };
    Meaning {
        frontends: actual.frontends.iter().map(|(vip, slot)| (*vip, frontend(slot))).collect(),
        endpoints: actual.backends.iter().map(|(id, slot)| (*id, slot.endpoints.map(endpoint))).collect(),
        filter: actual.filter.clone(),
        server_ids: actual.server_ids.clone(),
    }
}

/// In a build with the object, as root: daemons that end anywhere, each of which has another configuration,
/// leave maps from which the next one makes what it should.
#[test]
fn a_daemon_goes_on_where_another_one_ended() {
    // SAFETY: takes nothing, touches nothing.
    if crate::dataplane::object().is_empty() || unsafe { libc::geteuid() } != 0 {
        return;
    }
    let capacities = crate::dataplane::Capacities {
        flows: 64,
        sessions: 1024,
        provisional: 64,
        frontends: 16,
        backends: 32,
        lb_table: 8192,
        sources: 64,
        cookies: 8,
        stash_slots: 16,
    };
    let dataplane = Dataplane::load(crate::dataplane::object(), &capacities).expect("loads");
    let lo = crate::dataplane::interface_index("lo").expect("lo");
    let second = (lo + 1..lo + 100).find(|index| {
        let replay = dataplane.set_replay(7, *index);
        replay.is_ok()
    });
    let interfaces: Vec<u32> = std::iter::once(lo).chain(second).collect();
    let mut dice = Dice(1);
    let mut cut_short = 0;
    for round in 0..300 {
        let world = any_world(&mut dice, &interfaces);
        let mut actual = Actual::take_over(&dataplane).expect("reads");
        let changes = diff(&world.desired(), &actual);
        let all = changes.len() as u64;
        let done = if dice.roll(2) == 0 { dice.roll(all + 1) } else { all };
        for change in changes.iter().take(done as usize) {
            actual.apply(change, &dataplane).expect("writes");
        }
        // The daemon ends here. The next one has another configuration or the same.
        let mut actual = Actual::take_over(&dataplane).expect("reads");
        let mut world = match done == all || dice.roll(2) == 0 {
            true => world,
            false => any_world(&mut dice, &interfaces),
        };
        let left = diff(&world.desired(), &actual);
        if done == all {
            assert_eq!(left, [], "round {round}: nothing is left to do");
            assert_eq!(actual.tickets(), world.tickets, "round {round}");
            let dead = |health: &BTreeMap<(u32, bool), Unhealthy>| -> Vec<_> {
                health.iter().map(|(who, found)| (*who, found.dead)).collect()
            };
            // Connections of one that is offline are over too: the maps do not tell why.
            let mut expected = dead(&world.health);
            for ((id, _), dead) in &mut expected {
                *dead |= world.backend(*id).state == AdminState::Offline;
            }
            assert_eq!(dead(&actual.health()), expected, "round {round}");
        } else {
            cut_short += 1;
        }
        for change in &left {
            actual.apply(change, &dataplane).expect("writes");
        }
        let read = Actual::take_over(&dataplane).expect("reads");
        let mut fresh = Actual::default();
        world.settle(&mut fresh);
        assert_eq!(meaning(&read), meaning(&fresh), "round {round}: the maps say what was wanted");
        assert_eq!(meaning(&actual), meaning(&fresh), "round {round}: and the daemon knows it");
    }
    assert!(cut_short > 50, "{cut_short} daemons ended in the middle");
}

#[test]
fn an_operators_server_id_stays() {
    // SAFETY: takes nothing, touches nothing.
    if crate::dataplane::object().is_empty() || unsafe { libc::geteuid() } != 0 {
        return;
    }
    let capacities =
        crate::dataplane::Capacities { flows: 64, sessions: 64, stash_slots: 16, ..Default::default() };
    let dataplane = Dataplane::load(crate::dataplane::object(), &capacities).expect("loads");
    let mut world = World::new(QUIC);
    let lo = crate::dataplane::interface_index("lo").expect("lo");
    ["10.0.0.1", "10.0.0.2"].iter().for_each(|ip| world.up(ip, lo, 0x11));
    let service = world.config.services[0].id;
    let pinned = |id: &[u8]| {
        let key = SessionKey::new(service, KIND_QUIC_SERVER, id).expect("a key");
        (key, Session { state: STATE_PINNED, ..Session::of(77) })
    };
    let all = [pinned(&[1, 0x0a, 1]), pinned(&[1, 9, 9])];
    for (key, session) in all {
        dataplane.sessions().insert(key, session).expect("inserts");
    }
    let backend = |id: &[u8]| {
        let (key, _) = pinned(id);
        dataplane.sessions().get(&key).expect("reads").map(|session| session.backends[0])
    };
    for keep in [true, false] {
        if !keep {
            world.config.services.clear();
        }
        let mut actual = Actual::take_over(&dataplane).expect("reads");
        for change in diff(&world.desired(), &actual) {
            actual.apply(&change, &dataplane).expect("writes");
        }
        assert_eq!((backend(&[1, 0x0a, 1]), backend(&[1, 9, 9])), (Some(77), Some(77)));
        assert_eq!(backend(&[1, 0x0b, 2]).is_some(), keep);
    }
}
