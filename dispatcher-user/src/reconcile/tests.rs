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
#[derive(Default)]
struct World {
    config: Config,
    admin: BTreeMap<u32, AdminState>,
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
            admin: &self.admin,
            reach: &self.reach,
            loads: &self.loads,
            responses: &self.responses,
            tickets: &self.tickets,
            health: &self.health,
            percent: &self.percent,
        }
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
    world.admin.insert(b.id, AdminState::Drain);
    world.settle(&mut actual);
    assert_eq!(actual.endpoint(b.id, true).flags, BACKEND_UP | BACKEND_DRAIN);
    assert_eq!(table(&actual, "192.0.2.10:443"), BTreeSet::from([0]));
    let pool = &pools(&world.desired(), &actual)[&0];
    assert_eq!((pool.candidates.len(), pool.known.len()), (1, 2), "known sessions still go there");
    assert_eq!(status(&world.desired(), &actual, &b).0, "drain");
    world.admin.insert(b.id, AdminState::Disabled);
    world.settle(&mut actual);
    assert_eq!(actual.endpoint(b.id, true).flags, 0);
    assert_eq!(status(&world.desired(), &actual, &b).0, "disabled");
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
    // A newcomer takes the free slot.
    let with_c = format!("{without_a}[[service.backend]]\nname = \"c\"\naddress = \"10.0.0.3:443\"\n");
    World::new(&with_c).settle(&mut actual);
    assert_eq!(actual.backend_index(backend_id("c")), Some(0));
    assert_eq!(actual.backend_index(backend_id("b")), Some(1));
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
    let regions: Vec<(u32, u32)> = actual.frontends.values().map(|slot| (slot.region, slot.size)).collect();
    assert_eq!(regions, [(1004, 509), (2022, 509)]);
    for slot in actual.frontends.values() {
        assert_eq!(slot.frontend.table_base, slot.region);
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
