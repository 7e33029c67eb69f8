//! Limits of backends and classes: what passes, what is dropped or refused, and what is counted.

use std::{
    net::SocketAddr,
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use dispatcher_common::{
    abi,
    event::{REFUSED, Release},
    flow::{Flow, FlowKey, ports_word},
    qos::{NAME_MAX, NAMES_MAX, class_id},
    reason::Reason,
    service::{FRONTEND_NAMES, FRONTEND_OVER_HOLD, FRONTEND_OVER_RESET},
    session::{STATE_CONFIRMED, STATE_PROVISIONAL, Session},
    stash::{STAGE_FREE, STAGE_HELD},
};
use dispatcher_tests::{
    harness::{CLIENT_MACS, Far, Machine, Service, Talk, backend_at, client_at},
    hello::{client_hello, hello_of, in_records, server_name, usual_extensions},
    packet::{Body, Packet, Udp, flags},
    topology::Family,
};
use dispatcher_user::dataplane::{ClassSetting, Limits, NameClass, NetworkClass, test_run};

use crate::machine;

const HTTP: &[u8] = b"GET / HTTP/1.1\r\nHost: service.test\r\n\r\n";
/// Bits a second of most limits here, and bytes.
const BANDWIDTH: u64 = 16_000_000;
const RATE: f64 = BANDWIDTH as f64 / 8.0;

fn class(name: &str, weight: u32) -> ClassSetting {
    ClassSetting { id: class_id(name), weight, ..ClassSetting::default() }
}

/// A data path where one backend takes everything, with these limits.
fn limited(limits: Limits) -> Machine {
    let machine = machine();
    machine.set_up(1, false).expect("one backend is enough");
    machine.dataplane().set_limits(0, limits).expect("limits");
    machine
}

fn bandwidth() -> Limits {
    Limits { bandwidth: BANDWIDTH, connections_per_second: 0 }
}

fn connections(connections_per_second: u32) -> Limits {
    Limits { bandwidth: 0, connections_per_second }
}

fn datagram(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Packet {
    let body = Udp { src: from.port(), dst: to.port(), unchecked: false, payload: payload.to_vec() };
    Packet { macs: CLIENT_MACS, ..Packet::new(from.ip(), to.ip(), Body::Udp(body)) }
}

/// The entry of a client's packets.
fn flow(machine: &Machine, client: SocketAddr, vip: SocketAddr, proto: u32) -> Flow {
    let key = FlowKey {
        src: client.ip().into(),
        dst: vip.ip().into(),
        ports: ports_word(client.port(), vip.port()),
        proto,
    };
    machine.dataplane().flows().get(&key).expect("readable").expect("a flow")
}

/// Connections whose class the network says: of each family one, with data in both directions.
fn talk(machine: &Machine, service: Service, family: Family, port: u16) -> (Talk, Far) {
    let mut talk = Talk::new(service, family, port);
    let far = talk.establish(machine, HTTP, Reason::BoundNonsecure);
    (talk, far)
}

/// Bytes a second of each frame that pass, when all are sent in turn as fast as it goes. Before that what the buckets hold
/// at the start is spent, and those that nobody takes from are filled.
fn passing(machine: &Machine, packets: &[&Packet], time: Duration) -> Vec<f64> {
    let frames: Vec<Vec<u8>> = packets.iter().map(|packet| packet.frame()).collect();
    let mut rates = Vec::new();
    for time in [Duration::from_millis(400), time] {
        let began = Instant::now();
        let mut sums = vec![0; frames.len()];
        while began.elapsed() < time {
            for (sum, frame) in sums.iter_mut().zip(&frames) {
                let run = machine.dataplane().run("dispatcher", frame, None, 1, 0).expect("runs");
                match run.retval {
                    4 => *sum += frame.len(),
                    1 => {}
                    other => panic!("XDP action {other}"),
                }
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        rates = sums.into_iter().map(|sum| sum as f64 / seconds).collect();
    }
    rates
}

#[track_caller]
fn assert_near(what: &str, found: f64, wanted: f64) {
    assert!((found / wanted - 1.0).abs() < 0.08, "{what}: {found:.0} bytes a second, not {wanted:.0}");
}

const SOME: Duration = Duration::from_millis(600);

#[test]
fn the_rate_passes_and_what_is_over_is_dropped() {
    let machine = limited(bandwidth());
    for (port, family) in (3000..).zip(Family::BOTH) {
        let (talk, far) = talk(&machine, Service::Plain, family, port);
        let up = talk.data(100, &[7; 1200]);
        let down = far.segment(flags::ACK, 5000, 1, &[8; 1200]);
        let [rate] = *passing(&machine, &[&up], SOME) else { panic!("one rate") };
        assert_near("to the backend", rate, RATE);
        // The other direction has a rate of its own.
        let (mut passed, mut dropped) = (0, 0);
        let before = machine.dataplane().class_stats(0).expect("counted")[0];
        for _ in 0..1000 {
            let reason = machine.run(&down.frame()).expect("a verdict").reason;
            assert!([Reason::ToClient, Reason::OverBandwidth].contains(&reason), "{reason:?}");
            if reason == Reason::ToClient {
                passed += 1;
            } else {
                dropped += 1;
            }
        }
        let after = machine.dataplane().class_stats(0).expect("counted")[0];
        let length = down.frame().len() as u64;
        assert!(passed >= 65_536 / length && dropped > 0, "{passed} passed, {dropped} were dropped");
        assert_eq!(after.stats.dropped_to_client - before.stats.dropped_to_client, dropped);
        assert_eq!(
            after.stats.dropped_to_client_bytes - before.stats.dropped_to_client_bytes,
            dropped * length
        );
        assert_eq!(after.stats.dropped_to_backend, before.stats.dropped_to_backend);
        let taken = after.bytes[1] - before.bytes[1];
        let spare = taken as i64 - (passed * length) as i64;
        // 2 ms of the rate, and less than a frame, are in the hand of each of the CPUs that this ran on, now and before.
        let hand = 2 * (4_200 + length as i64);
        assert!((-hand..=hand).contains(&spare), "{taken} bytes taken, {spare} not spent");
        let [rate] = *passing(&machine, &[&down], SOME) else { panic!("one rate") };
        assert_near("to the client", rate, RATE);
    }
}

#[test]
fn what_cpus_have_in_hand_has_not_passed() {
    // 2 ms of which are 25 GB.
    let fast = |bandwidth| Limits { bandwidth, connections_per_second: 0 };
    let machine = limited(fast(100_000_000_000_000));
    let d = machine.dataplane();
    let (talk, far) = talk(&machine, Service::Plain, Family::V4, 3030);
    let packets = [talk.data(100, &[7; 1200]), far.segment(flags::ACK, 5000, 1, &[8; 1200])];
    let counted = || d.class_stats(0).expect("counted")[0];
    let before = counted().bytes;
    let mut sent = [0; 2];
    let mut send = || {
        for _ in 0..50 {
            for (sum, (packet, reason)) in
                sent.iter_mut().zip(packets.iter().zip([Reason::ToBackend, Reason::ToClient]))
            {
                let _ = machine.expect("far below the rate", packet, reason);
                *sum += packet.frame().len() as u64;
            }
        }
        sent
    };
    let passed = || [0, 1].map(|way| counted().bytes[way] - before[way]);
    assert_eq!(send(), passed());
    // What is in hand is taken back, and what it belongs to goes and comes.
    d.set_limits(0, fast(50_000_000_000_000)).expect("limits");
    assert_eq!(send(), passed());
    for classes in [vec![class("gold", 3)], Vec::new()] {
        d.set_classes(&classes).expect("classes");
        assert_eq!(send(), passed());
    }
    let last = counted();
    assert!((0..2).all(|way| last.borrowed[way] <= last.bytes[way]), "{last:?}");
    // Without the kind of limit nothing more is counted, and nothing is lost.
    d.set_limits(0, Limits { bandwidth: 0, connections_per_second: 1000 }).expect("limits");
    assert_eq!(counted().bytes, last.bytes);
    d.set_limits(0, Limits::default()).expect("none");
    d.set_limits(0, fast(100_000_000_000_000)).expect("limits");
    assert_eq!(counted().bytes, [0; 2], "a new number");
}

#[test]
fn cpus_that_send_at_once_keep_to_the_rate_together() {
    let machine = limited(bandwidth());
    let program = machine.dataplane().program_fd("dispatcher").expect("a program");
    let packets =
        [3050, 3051].map(|port| talk(&machine, Service::Plain, Family::V4, port).0.data(100, &[7; 1200]));
    let send = |frame: &[u8], time: Duration| {
        let (began, mut sum) = (Instant::now(), 0);
        while began.elapsed() < time {
            let run = test_run(program.as_fd(), frame, None, 1, 0).expect("runs");
            sum += if run.retval == 4 { frame.len() } else { 0 };
        }
        sum as f64 / began.elapsed().as_secs_f64()
    };
    let both = |time| {
        thread::scope(|scope| {
            let all = packets.each_ref().map(|packet| scope.spawn(|| send(&packet.frame(), time)));
            all.map(|one| one.join().expect("sends")).iter().sum::<f64>()
        })
    };
    both(Duration::from_millis(200));
    assert_near("two at once", both(SOME), RATE);
}

#[test]
fn every_kind_of_flow_is_policed_and_other_backends_are_not() {
    let machine = limited(bandwidth());
    let (client, quic) = (client_at(Family::V4, 3100), client_at(Family::V6, 3101));
    let datagrams = datagram(client, Service::L4.at(Family::V4), &[1; 1200]);
    let short = datagram(quic, Service::Quic.at(Family::V6), &[0x43; 1200]);
    let mut tagged = Talk::new(Service::Plain, Family::V4, 3102);
    tagged.tags = vec![[0x81, 0, 0, 100]];
    tagged.establish(&machine, HTTP, Reason::BoundNonsecure);
    for packet in [datagrams, short, tagged.data(100, &[7; 1200])] {
        let frame = packet.frame();
        let reason = |_| machine.run(&frame).expect("a verdict").reason;
        let reasons: Vec<Reason> = (0..1000).map(reason).collect();
        assert!(reasons.contains(&Reason::ToBackend) || reasons.contains(&Reason::BoundL4), "{packet:?}");
        assert!(reasons.contains(&Reason::OverBandwidth), "{packet:?}");
    }
    machine.set_up(1, true).expect("up");
    machine.set_up(0, false).expect("down");
    let (talk, _) = talk(&machine, Service::Plain, Family::V4, 3103);
    let free = talk.data(100, &[7; 1200]);
    for _ in 0..300 {
        let _ = machine.expect("a backend without limits", &free, Reason::ToBackend);
    }
    machine.dataplane().set_limits(1, bandwidth()).expect("limits");
    machine.dataplane().set_limits(0, Limits::default()).expect("no limits");
    assert!(machine.dataplane().class_stats(0).expect("counted").is_empty());
    let rates = passing(&machine, &[&free], SOME);
    assert_near("with the number that another had", rates[0], RATE);
    machine.dataplane().set_limits(1, Limits::default()).expect("no limits");
    for _ in 0..300 {
        let _ = machine.expect("no limit any more", &free, Reason::ToBackend);
    }
}

#[test]
fn rates_that_no_link_has_are_no_limit_and_tiny_ones_hold() {
    let machine = limited(Limits { bandwidth: u64::MAX, connections_per_second: u32::MAX });
    let (talk, _) = talk(&machine, Service::Plain, Family::V4, 3150);
    let packet = talk.data(100, &[7; 1200]);
    for _ in 0..300 {
        let _ = machine.expect("terabits", &packet, Reason::ToBackend);
    }
    machine.dataplane().set_limits(0, Limits { bandwidth: 1, connections_per_second: 1 }).expect("limits");
    let passed = |_: &u32| machine.run(&packet.frame()).expect("a verdict").reason == Reason::ToBackend;
    // The first fill is all that there is.
    assert!((0..400).filter(passed).count() <= 3 * 65_536 / 1200);
    assert_eq!((0..100).filter(passed).count(), 0);
}

#[test]
fn a_limit_that_comes_takes_what_was_free() {
    let machine = limited(Limits::default());
    // Where another backend has a limit, this one's frames are looked at.
    machine.dataplane().set_limits(1, bandwidth()).expect("limits");
    let (talk, far) = talk(&machine, Service::Plain, Family::V4, 3160);
    let packets = [
        (talk.data(100, &[7; 1200]), Reason::ToBackend),
        (far.segment(flags::ACK, 5000, 1, &[8; 1200]), Reason::ToClient),
    ];
    // More than a CPU is given at once.
    for (packet, reason) in &packets {
        for _ in 0..1000 {
            let _ = machine.expect("no limit", packet, *reason);
        }
    }
    machine.dataplane().set_limits(0, Limits { bandwidth: 1, connections_per_second: 0 }).expect("limits");
    for (packet, reason) in &packets {
        let passed = |_: &u32| machine.run(&packet.frame()).expect("a verdict").reason == *reason;
        assert!((0..400).filter(passed).count() <= 3 * 65_536 / 1200, "the first fill is all that there is");
        assert_eq!((0..100).filter(passed).count(), 0);
    }
}

/// Sets a class for the clients of both families at a service.
fn networks(machine: &Machine, rows: &[(Service, &str, u8, &str)]) {
    let networks: Vec<NetworkClass> = rows
        .iter()
        .map(|(service, address, prefix, class)| NetworkClass {
            service: service.id(),
            address: address.parse().expect("an address"),
            prefix: *prefix,
            class: class_id(class),
        })
        .collect();
    machine.dataplane().set_networks(&networks).expect("networks");
}

#[test]
fn the_class_is_the_sessions_the_networks_or_the_services() {
    let machine = machine();
    let d = machine.dataplane();
    d.set_classes(&[class("gold", 4), class("silver", 2), class("bronze", 1)]).expect("classes");
    let (gold, silver, bronze) = (1, 2, 3);
    networks(
        &machine,
        &[
            (Service::Plain, "10.1.0.0", 16, "bronze"),
            (Service::Plain, "10.1.0.0", 24, "silver"),
            (Service::Plain, "2001:db8:1::", 64, "silver"),
            (Service::L4, "10.1.0.10", 32, "gold"),
            (Service::L4, "2001:db8:1::a", 128, "gold"),
            (Service::Quic, "0.0.0.0", 0, "bronze"),
            (Service::Quic, "::", 0, "bronze"),
        ],
    );
    let mut port = 3200;
    for family in Family::BOTH {
        for service in [Service::Pool, Service::L4] {
            machine.change(service, family, |frontend| frontend.set_class(class_id("silver"))).expect("set");
        }
        for (what, id, name, expected) in [
            ("no class in the session", [1; 32], "", silver),
            ("the session's", [2; 32], "gold", gold),
            ("a class that is not there", [3; 32], "copper", 0),
        ] {
            port += 1;
            let class = if name.is_empty() { 0 } else { class_id(name) };
            let session = Session { state: STATE_CONFIRMED, class, ..Session::of(Machine::backend_id(2)) };
            machine.know(Service::Plain, &id, session).expect("a session");
            let mut talk = Talk::new(Service::Plain, family, port);
            talk.bind(&machine, &client_hello(&id, 0), Reason::BoundHit);
            let entry = flow(&machine, talk.client, talk.vip, 6);
            assert_eq!(entry.class(), expected, "{what}");
            assert_eq!(entry.marks & 0xf, 3, "secure and a hit, beside the class");
        }
        port += 1;
        let mut fresh = Talk::new(Service::Pool, family, port);
        fresh.bind(&machine, HTTP, Reason::BoundNonsecure);
        assert_eq!(flow(&machine, fresh.client, fresh.vip, 6).class(), silver, "the service's");
        let mut other = Talk::new(Service::Proxy, family, port);
        other.bind(&machine, HTTP, Reason::BoundNonsecure);
        assert_eq!(flow(&machine, other.client, other.vip, 6).class(), 0, "nobody says anything");
        let client = client_at(family, port);
        for (service, expected) in [(Service::L4, gold), (Service::Quic, bronze)] {
            let packet = datagram(client, service.at(family), &[0x43; 40]);
            let _ = machine.expect("a datagram", &packet, Reason::BoundL4);
            let entry = flow(&machine, client, service.at(family), 17);
            assert_eq!(entry.class(), expected, "{service:?}");
        }
    }
    // What is set replaces what was.
    networks(&machine, &[(Service::Plain, "10.1.0.0", 16, "bronze")]);
    for (family, expected) in [(Family::V4, bronze), (Family::V6, 0)] {
        port += 1;
        let mut talk = Talk::new(Service::Plain, family, port);
        talk.bind(&machine, HTTP, Reason::BoundNonsecure);
        assert_eq!(flow(&machine, talk.client, talk.vip, 6).class(), expected);
    }
}

/// Sets a class for those who ask for names.
fn names(machine: &Machine, rows: &[(Service, &str, &str)]) {
    let names: Vec<NameClass> = rows
        .iter()
        .map(|(service, name, class)| NameClass {
            service: service.id(),
            name: (*name).to_owned(),
            class: class_id(class),
        })
        .collect();
    machine.dataplane().set_names(&names).expect("names");
}

/// A hello with this server_name extension, if any, for TLS 1.2 or 1.3.
fn hello_for(name: Option<(u16, Vec<u8>)>, tls13: bool) -> Vec<u8> {
    let mut extensions = usual_extensions();
    extensions.remove(0);
    extensions.extend(name);
    if tls13 {
        let share = [&[0, 36, 0, 29, 0, 32][..], &[0x51; 32]].concat();
        extensions.extend([(43, vec![4, 3, 4, 3, 3]), (51, share)]);
    }
    hello_of(&[], &[0x13, 1, 0xc0, 0x2b], &extensions)
}

/// The numbers that classes get here.
const GOLD: u32 = 1;
const SILVER: u32 = 2;
const BRONZE: u32 = 3;

/// A data path with three classes, where some services look at names, and everybody else is of bronze at `Plain`.
fn machine_with_names() -> Machine {
    let machine = machine();
    let d = machine.dataplane();
    d.set_classes(&[class("gold", 4), class("silver", 2), class("bronze", 1)]).expect("classes");
    networks(
        &machine,
        &[(Service::Plain, "10.1.0.0", 16, "bronze"), (Service::Plain, "2001:db8:1::", 64, "bronze")],
    );
    for family in Family::BOTH {
        for service in [Service::Plain, Service::Pool, Service::Held] {
            machine.change(service, family, |one| one.flags |= FRONTEND_NAMES).expect("set");
        }
    }
    machine
}

#[test]
fn the_name_in_the_hello_says_the_class() {
    let machine = machine_with_names();
    let longest = "l".repeat(NAME_MAX);
    names(
        &machine,
        &[
            (Service::Plain, "gold.example", "gold"),
            (Service::Plain, "Silver.Example", "silver"),
            (Service::Plain, &longest, "gold"),
            (Service::Plain, "eight.ex", "silver"),
            (Service::Plain, "gone.example", "copper"),
            (Service::Plain, "gold.example", "silver"),
            (Service::Pool, "pool.example", "gold"),
        ],
    );
    let mut port = 4200;
    for (family, tls13) in Family::BOTH.into_iter().flat_map(|one| [(one, false), (one, true)]) {
        let mut bound = |service, hello: &[u8], reason| {
            port += 1;
            let mut talk = Talk::new(service, family, port);
            talk.bind(&machine, hello, reason);
            flow(&machine, talk.client, talk.vip, 6).class()
        };
        for (what, service, name, expected) in [
            ("a known name", Service::Plain, "gold.example", GOLD),
            ("in capitals", Service::Plain, "GOLD.exAmple", GOLD),
            ("a rule in capitals", Service::Plain, "silver.example", SILVER),
            ("of eight bytes", Service::Plain, "eight.ex", SILVER),
            ("the longest", Service::Plain, &longest, GOLD),
            ("one byte more", Service::Plain, &format!("{longest}l"), BRONZE),
            ("another name", Service::Plain, "other.example", BRONZE),
            ("one that is longer", Service::Plain, "gold.example.", BRONZE),
            ("with a NUL", Service::Plain, "gold.example\0", BRONZE),
            ("one that is shorter", Service::Plain, "gold.exampl", BRONZE),
            ("one below it", Service::Plain, "www.gold.example", BRONZE),
            ("no capital letter", Service::Plain, "gold\x0eexample", BRONZE),
            ("an empty one", Service::Plain, "", BRONZE),
            ("a class that is not there", Service::Plain, "gone.example", 0),
            ("another service's", Service::Plain, "pool.example", BRONZE),
            ("and there", Service::Pool, "pool.example", GOLD),
            ("where nobody else says anything", Service::Pool, "gold.example", 0),
            ("a service without names", Service::Proxy, "gold.example", 0),
        ] {
            let hello = hello_for(Some(server_name(name.as_bytes())), tls13);
            assert_eq!(bound(service, &hello, Reason::BoundFresh), expected, "{what}, {family:?}, {tls13}");
            // What this CPU read before is nobody else's.
            assert_eq!(bound(Service::Plain, HTTP, Reason::BoundNonsecure), BRONZE, "after {what}");
        }
        let list = |bytes: &[u8]| hello_for(Some((0, bytes.to_vec())), tls13);
        for (what, hello) in [
            ("no name", hello_for(None, tls13)),
            ("another type of name", list(&[&[0, 15, 1, 0, 12][..], b"gold.example"].concat())),
            ("a list that lies", list(&[&[0, 16, 0, 0, 12][..], b"gold.example"].concat())),
            ("a name that lies", list(&[&[0, 15, 0, 0, 13][..], b"gold.example"].concat())),
            ("nothing", list(&[])),
        ] {
            assert_eq!(bound(Service::Plain, &hello, Reason::BoundFresh), BRONZE, "{what}");
        }
        // A hello that is spread over records and segments.
        let padding = (21, vec![0; 1600]);
        let mut extensions = vec![padding];
        extensions.extend(usual_extensions());
        extensions[1] = server_name(b"gold.example");
        let whole = hello_of(&[], &[0x13, 1], &extensions);
        let name = whole.windows(4).position(|part| part == b"gold").expect("the name");
        for hello in [whole.clone(), in_records(&whole, &[3, name - 2, name + 3])] {
            let at = hello.windows(2).position(|part| part == b"go").expect("the name");
            for cut in [700, at - 1, at + 1] {
                port += 1;
                let mut talk = Talk::new(Service::Plain, family, port);
                talk.shake(&machine);
                let _ = machine.expect("a part", &talk.data(0, &hello[..cut]), Reason::AckedPart);
                let rest = talk.data(cut as u32, &hello[cut..]);
                let reason = machine.run(&rest.frame()).expect("a verdict").reason;
                assert_eq!(reason, Reason::BoundFresh, "cut at {cut}");
                assert_eq!(flow(&machine, talk.client, talk.vip, 6).class(), GOLD, "cut at {cut}");
            }
        }
    }
}

#[test]
fn a_session_says_more_than_a_name_and_a_name_more_than_a_network() {
    let machine = machine_with_names();
    // The name that tests ask for.
    names(&machine, &[(Service::Plain, "service.test", "gold"), (Service::Pool, "service.test", "gold")]);
    for (at, family) in (0_u16..).zip(Family::BOTH) {
        machine
            .change(Service::Pool, family, |frontend| frontend.set_class(class_id("silver")))
            .expect("set");
        let bound = |service, port: u16, id: [u8; 32], reason| {
            let mut talk = Talk::new(service, family, port + at);
            talk.bind(&machine, &client_hello(&id, 0), reason);
            flow(&machine, talk.client, talk.vip, 6).class()
        };
        for (port, class) in [(4900, "silver"), (4902, "")] {
            let id = [port as u8 + at as u8; 32];
            let class = if class.is_empty() { 0 } else { class_id(class) };
            let session = Session { state: STATE_CONFIRMED, class, ..Session::of(Machine::backend_id(2)) };
            machine.know(Service::Plain, &id, session).expect("a session");
            let expected = if class == 0 { GOLD } else { SILVER };
            assert_eq!(bound(Service::Plain, port, id, Reason::BoundHit), expected);
        }
        let id = [0x90 + at as u8; 32];
        assert_eq!(bound(Service::Plain, 4904, id, Reason::BoundMiss), GOLD, "not the network's");
        assert_eq!(bound(Service::Pool, 4906, id, Reason::BoundMiss), GOLD, "not the service's");
    }
}

#[test]
fn names_come_and_go_and_have_a_limit() {
    let machine = machine_with_names();
    let hello = hello_for(Some(server_name(b"a.example")), true);
    let class = |family, port| {
        let mut talk = Talk::new(Service::Plain, family, port);
        talk.bind(&machine, &hello, Reason::BoundFresh);
        (flow(&machine, talk.client, talk.vip, 6).class(), talk)
    };
    for (port, family) in [(5000, Family::V4), (5010, Family::V6)] {
        names(&machine, &[(Service::Plain, "a.example", "gold"), (Service::Plain, "b.example", "gold")]);
        let (before, talk) = class(family, port);
        assert_eq!(before, GOLD);
        names(&machine, &[(Service::Plain, "a.example", "silver")]);
        assert_eq!(class(family, port + 1).0, SILVER, "another class");
        names(&machine, &[(Service::Plain, "b.example", "gold")]);
        assert_eq!(class(family, port + 2).0, BRONZE, "the name is gone");
        assert_eq!(flow(&machine, talk.client, talk.vip, 6).class(), GOLD, "those who are there stay");
    }
    names(&machine, &[(Service::Plain, "a.example", "gold")]);
    machine.dataplane().set_classes(&[]).expect("no classes");
    assert_eq!(class(Family::V4, 5020).0, 0, "no classes at all");
    let many = |number: u32| -> Vec<NameClass> {
        let one = |n| NameClass { service: Service::Plain.id(), name: format!("{n}.example"), class: 1 };
        (0..number).map(one).collect()
    };
    let d = machine.dataplane();
    d.set_names(&many(NAMES_MAX)).expect("so many");
    // All of them are others: there is room for them.
    let others: Vec<NameClass> =
        many(NAMES_MAX).into_iter().map(|one| NameClass { name: format!("x{}", one.name), ..one }).collect();
    d.set_names(&others).expect("as many others");
    let error = d.set_names(&many(NAMES_MAX + 1)).expect_err("too many").to_string();
    assert!(error.contains("4097 server names") && error.contains("4096 are possible"), "{error}");
    let long = NameClass { service: 1, name: "a".repeat(NAME_MAX + 1), class: 1 };
    let error = d.set_names(&[long]).expect_err("too long").to_string();
    assert!(error.contains("is no server name"), "{error}");
}

#[test]
fn the_daemon_is_told_the_class_of_what_is_held() {
    let machine = machine_with_names();
    names(&machine, &[(Service::Held, "gold.example", "gold")]);
    let mut ring = machine.dataplane().take_held().expect("the ring");
    for (port, family) in [(5100, Family::V4), (5110, Family::V6)] {
        for (port, name, expected, number) in
            [(port, "gold.example", class_id("gold"), GOLD), (port + 1, "other.example", 0, 0)]
        {
            machine.beat(true).expect("alive");
            let mut talk = Talk::new(Service::Held, family, port);
            talk.shake(&machine);
            let hello = hello_for(Some(server_name(name.as_bytes())), true);
            let (first, second) = hello.split_at(60);
            let _ = machine.expect("a part", &talk.data(0, first), Reason::AckedPart);
            let _ = machine.expect("the rest", &talk.data(60, second), Reason::Held);
            let bytes = ring.next().expect("the daemon is told").to_vec();
            let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
            assert_eq!((half(0), half(2)), (dispatcher_common::event::EVENT_HELD, expected), "{name}");
            let slot = u32::from(half(12)) | u32::from(half(14)) << 16;
            machine.dataplane().release(&[Release { slot, backend: 1, flow: key(&talk) }]).expect("released");
            let entry = flow(&machine, talk.client, talk.vip, 6);
            assert_eq!((entry.backend, entry.class()), (1, number), "{name}");
        }
    }
}

/// The key of a client's packets.
fn key(talk: &Talk) -> FlowKey {
    FlowKey {
        src: talk.client.ip().into(),
        dst: talk.vip.ip().into(),
        ports: ports_word(talk.client.port(), talk.vip.port()),
        proto: 6,
    }
}

/// A gold and a default connection at one backend with a limit: data of both.
fn two_classes(machine: &Machine, family: Family, port: u16) -> (Packet, Packet) {
    let d = machine.dataplane();
    networks(
        machine,
        &[(Service::Plain, "10.1.0.0", 16, "gold"), (Service::Plain, "2001:db8:1::", 64, "gold")],
    );
    let (gold, _) = talk(machine, Service::Plain, family, port);
    d.set_networks(&[]).expect("none");
    let (default, _) = talk(machine, Service::Plain, family, port + 1);
    assert_eq!(
        [&gold, &default].map(|talk| flow(machine, talk.client, talk.vip, 6).class()),
        [1, 0],
        "classes of the two"
    );
    (gold.data(100, &[7; 1200]), default.data(100, &[7; 1200]))
}

#[test]
fn classes_share_by_weight_and_a_new_weight_acts_at_once() {
    let machine = limited(bandwidth());
    let d = machine.dataplane();
    d.set_classes(&[class("gold", 3)]).expect("classes");
    for (port, family) in [(3300, Family::V4), (3302, Family::V6)] {
        d.set_classes(&[class("gold", 3)]).expect("classes");
        let (gold, default) = two_classes(&machine, family, port);
        let rates = passing(&machine, &[&gold, &default], SOME);
        assert_near("three quarters", rates[0], RATE * 0.75);
        assert_near("a quarter", rates[1], RATE * 0.25);
        d.set_classes(&[class("gold", 1), ClassSetting { weight: 4, ..ClassSetting::default() }])
            .expect("classes");
        let rates = passing(&machine, &[&gold, &default], SOME);
        assert_near("a fifth", rates[0], RATE * 0.2);
        assert_near("four fifths", rates[1], RATE * 0.8);
        let borrowed = |at: usize| d.class_stats(0).expect("counted")[at].borrowed[0];
        let before = borrowed(1);
        let alone = passing(&machine, &[&gold], SOME);
        assert_near("what the other leaves is used", alone[0], RATE);
        let lent = (borrowed(1) - before) as f64;
        assert!(lent > 0.5 * RATE * 0.8, "{lent} bytes were borrowed");
    }
}

#[test]
fn lending_borrowing_and_ceilings_hold_on_frames() {
    let machine = limited(bandwidth());
    let d = machine.dataplane();
    d.set_classes(&[class("gold", 1)]).expect("classes");
    let (gold, default) = two_classes(&machine, Family::V4, 3400);
    let rows = [
        (
            "the other lends nothing",
            ClassSetting { lend: false, ..ClassSetting::default() },
            class("gold", 1),
            0.5,
        ),
        (
            "a limit to what it borrows",
            ClassSetting::default(),
            ClassSetting { borrow_limit: 20, ..class("gold", 1) },
            0.7,
        ),
        ("a ceiling", ClassSetting::default(), ClassSetting { ceil: 30, ..class("gold", 1) }, 0.3),
    ];
    for (what, other, gold_class, part) in rows {
        d.set_classes(&[other, gold_class]).expect("classes");
        let rates = passing(&machine, &[&gold], SOME);
        assert_near(what, rates[0], RATE * part);
    }
    let rates = passing(&machine, &[&gold, &default], SOME);
    assert_near("what a ceiling leaves", rates[1], RATE * 0.7);
}

#[test]
fn a_class_that_is_deleted_while_in_use_counts_as_the_default_one() {
    let machine = limited(bandwidth());
    let d = machine.dataplane();
    d.set_classes(&[class("gold", 3), class("silver", 1)]).expect("classes");
    let (gold, default) = two_classes(&machine, Family::V4, 3500);
    d.set_classes(&[class("silver", 1)]).expect("classes");
    let rates = passing(&machine, &[&gold, &default], SOME);
    // Nobody has silver's half, so they get all of it.
    assert_near("together", rates[0] + rates[1], RATE);
    let stats = d.class_stats(0).expect("counted");
    assert_eq!(stats.iter().map(|one| one.id).collect::<Vec<_>>(), [0, class_id("silver")]);
    assert_eq!(stats[1].bytes, [0, 0]);
    let session =
        Session { state: STATE_CONFIRMED, class: class_id("gold"), ..Session::of(Machine::backend_id(0)) };
    machine.know(Service::Plain, &[5; 32], session).expect("a session");
    let mut talk = Talk::new(Service::Plain, Family::V4, 3510);
    talk.bind(&machine, &client_hello(&[5; 32], 0), Reason::BoundHit);
    assert_eq!(flow(&machine, talk.client, talk.vip, 6).class(), 0);
    // A class without limits and none at all.
    d.set_classes(&[]).expect("classes");
    let rates = passing(&machine, &[&gold], SOME);
    assert_near("no class", rates[0], RATE);
}

#[test]
fn a_class_that_gets_anothers_number_begins_to_count_at_zero() {
    let machine = limited(bandwidth());
    let d = machine.dataplane();
    // No number is left: the next class gets that of one that goes.
    let others: Vec<ClassSetting> = (0..14).map(|n| class(&format!("other{n}"), 1)).collect();
    let with = |name: &str| [&[class(name, 3)], &others[..]].concat();
    let count = |name: &str| {
        let all = d.class_stats(0).expect("counted");
        all.into_iter().find(|one| one.id == class_id(name)).expect("it is there")
    };
    d.set_classes(&with("gold")).expect("classes");
    let (gold, _) = two_classes(&machine, Family::V4, 3600);
    let _ = passing(&machine, &[&gold], SOME);
    let before = count("gold");
    assert!(
        before.bytes[0] > 0 && before.borrowed[0] > 0 && before.stats.dropped_to_backend > 0,
        "{before:?}"
    );
    // It goes and comes back: it counts on.
    d.set_classes(&others).expect("classes");
    d.set_classes(&with("gold")).expect("classes");
    let back = count("gold");
    assert_eq!((back.bytes, back.stats), (before.bytes, before.stats));
    // At once, and after a time in which nobody had the number.
    for (name, gone) in [("brass", false), ("bronze", true)] {
        if gone {
            d.set_classes(&others).expect("classes");
        }
        d.set_classes(&with(name)).expect("classes");
        let new = count(name);
        assert_eq!((new.bytes, new.borrowed, new.stats), Default::default(), "{name}");
        // The flow has the number, whoever's it is.
        let _ = passing(&machine, &[&gold], SOME);
        let after = count(name);
        assert!(after.bytes[0] > 0 && after.bytes[0] < 2 * before.bytes[0], "{after:?} of {before:?}");
        assert!(after.borrowed[0] > 0 && after.borrowed[0] < after.bytes[0], "{after:?}");
    }
}

/// How often it may take to use up what the buckets hold at the start.
const MANY: u16 = 40;

/// Opens connections until one is over the rate: its number and packet, before which all were bound.
fn until_over(mut open: impl FnMut(u16) -> Reason, bound: Reason) -> (u16, Reason) {
    for number in 0..MANY {
        let reason = open(number);
        if reason != bound {
            assert!(number > 0, "the first one: {reason:?}");
            return (number, reason);
        }
    }
    panic!("{MANY} connections at once");
}

#[test]
fn connections_over_the_rate_are_dropped_and_come_again() {
    for (family, base) in [(Family::V4, 3600), (Family::V6, 3700)] {
        let machine = limited(connections(20));
        let mut talks = Vec::new();
        let (over, reason) = until_over(
            |number| {
                let mut talk = Talk::new(Service::Plain, family, base + number);
                talk.shake(&machine);
                talks.push(talk.clone());
                machine.run(&talk.data(0, HTTP).frame()).expect("a verdict").reason
            },
            Reason::BoundNonsecure,
        );
        assert_eq!(reason, Reason::OverConnections);
        let stats = machine.dataplane().class_stats(0).expect("counted")[0].stats;
        assert_eq!((stats.connections, stats.connections_over), (u64::from(over), 1));
        assert_eq!(machine.dataplane().backend_stats(0).expect("counted").connections, u64::from(over));
        // Those that are open go on.
        let far = Far::new(&machine.expect("again", &talks[0].data(0, HTTP), Reason::SynRepeated).packet());
        let _ = machine.expect("its answer", &far.syn_ack(), Reason::Replayed);
        thread::sleep(Duration::from_millis(120));
        let late = &talks[usize::from(over)];
        let _ = machine.expect("the client repeats itself", &late.data(0, HTTP), Reason::BoundNonsecure);
    }
}

#[test]
fn connections_over_the_rate_can_be_refused() {
    for family in Family::BOTH {
        let machine = limited(connections(1));
        for service in [Service::Plain, Service::L4] {
            machine.change(service, family, |one| one.flags |= FRONTEND_OVER_RESET).expect("set");
        }
        let mut last = None;
        let (_, reason) = until_over(
            |number| {
                let mut talk = Talk::new(Service::Plain, family, 3800 + number);
                talk.shake(&machine);
                let outcome = machine.run(&talk.data(0, HTTP).frame()).expect("a verdict");
                let reason = outcome.reason;
                last = Some((talk, outcome));
                reason
            },
            Reason::BoundNonsecure,
        );
        assert_eq!(reason, Reason::ResetOverRate);
        let (talk, outcome) = last.expect("one");
        let reset = outcome.tcp();
        assert_eq!((reset.flags, reset.seq), (flags::RST, talk.cookie.wrapping_add(1)));
        assert_eq!(outcome.packet().dst, talk.client.ip());
        let syn = Talk::new(Service::L4, family, 3850).syn();
        let reset = machine.expect("l4", &syn, Reason::ResetOverRate).tcp();
        assert_eq!(reset.flags, flags::RST | flags::ACK);
        // There is nothing to refuse a datagram with.
        for service in [Service::L4, Service::Quic] {
            let packet = datagram(client_at(family, 3851), service.at(family), &[0x43; 40]);
            let _ = machine.expect("a datagram", &packet, Reason::OverConnections);
        }
    }
}

#[test]
fn connections_over_the_rate_can_wait_for_the_daemon() {
    let family = Family::V4;
    let machine = limited(connections(1));
    machine.change(Service::Held, family, |one| one.flags |= FRONTEND_OVER_HOLD).expect("set");
    let mut ring = machine.dataplane().take_held().expect("the ring");
    let known = |number: u16| {
        let id = [number as u8 + 1; 32];
        let session = Session { state: STATE_CONFIRMED, ..Session::of(Machine::backend_id(0)) };
        machine.know(Service::Held, &id, session).expect("a session");
        client_hello(&id, 0)
    };
    let mut last = None;
    let (_, reason) = until_over(
        |number| {
            machine.beat(true).expect("alive");
            let mut talk = Talk::new(Service::Held, family, 3900 + number);
            talk.shake(&machine);
            let data = talk.data(0, &known(number));
            let reason = machine.run(&data.frame()).expect("a verdict").reason;
            last = Some((talk, data));
            reason
        },
        Reason::BoundHit,
    );
    assert_eq!(reason, Reason::Held, "also with a session that is known");
    let (talk, data) = last.expect("one");
    let bytes = ring.next().expect("the daemon is told").to_vec();
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let kind = u32::from(dispatcher_common::event::EVENT_TURN);
    assert_eq!((word(0), word(8)), (kind, 0), "kind and class, and backend");
    // As long as the daemon lives its word is waited for, however often the client repeats itself.
    thread::sleep(Duration::from_millis(150));
    machine.beat(true).expect("alive");
    let _ = machine.expect("repeated", &data, Reason::Stashed);
    // Its rate is not asked for again, so others find less.
    let release = Release { slot: word(12), backend: 0, flow: key(&talk) };
    machine.dataplane().release(&[release]).expect("released");
    assert_eq!(flow(&machine, talk.client, talk.vip, 6).backend, 0);
    machine.beat(false).expect("dead");
    let mut other = Talk::new(Service::Held, family, 3990);
    other.shake(&machine);
    let _ = machine.expect("nobody to ask", &other.data(0, &known(90)), Reason::OverConnections);
}

#[test]
fn the_daemon_can_refuse_what_is_held() {
    let machine = machine();
    let d = machine.dataplane();
    let mut ring = d.take_held().expect("the ring");
    let refused = || d.reason(Reason::ResetOverRate).expect("counted");
    for (port, family) in [(5200, Family::V4), (5210, Family::V6)] {
        for tags in [Vec::new(), vec![[0x81, 0, 0, 100]]] {
            let mut talk = Talk::new(Service::Held, family, port + tags.len() as u16);
            talk.tags = tags;
            talk.shake(&machine);
            let hello = client_hello(&[port as u8; 32], 0);
            let (first, second) = hello.split_at(50);
            machine.beat(true).expect("alive");
            let _ = machine.expect("a part", &talk.data(0, first), Reason::AckedPart);
            let data = talk.data(50, second);
            let _ = machine.expect("the rest", &data, Reason::Held);
            let bytes = ring.next().expect("the daemon is told").to_vec();
            let slot = u32::from_ne_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
            let flow = key(&talk);
            let stranger = Release { slot, backend: REFUSED, flow: FlowKey { ports: 1, ..flow } };
            // As the daemon does when it picks.
            let id = [port as u8; 32];
            let made = Session { state: STATE_PROVISIONAL, ..Session::of(Machine::backend_id(0)) };
            machine.know(Service::Held, &id, made).expect("a session");
            let before = refused();
            d.release(&[stranger]).expect("runs");
            assert!(machine.session(Service::Held, &id).expect("readable").is_some());
            assert_eq!(refused(), before, "another flow's slot is left alone");
            d.release(&[stranger, Release { slot, backend: REFUSED, flow }]).expect("runs");
            assert_eq!(refused(), before + 1);
            assert_eq!(d.stash().get(slot).expect("readable").stage, STAGE_FREE);
            assert_eq!(machine.session(Service::Held, &id).expect("readable"), None, "it is not known");
            assert_eq!(d.flows().get(&flow).expect("readable"), None);
            d.release(&[stranger, Release { slot, backend: REFUSED, flow }]).expect("runs");
            assert_eq!(refused(), before + 1, "once");

            // The same once more, where the frame can be seen: what was the second is still the second.
            let _ = machine.expect("a part", &talk.data(0, first), Reason::AckedPart);
            let _ = machine.expect("the rest", &data, Reason::Held);
            assert!(ring.next().is_some());
            d.release(&[stranger]).expect("runs");
            let run = d.run(abi::PROGRAM_RELEASE, &[0; 128], None, 1, 0).expect("runs");
            assert_eq!((run.retval, refused()), (4, before + 2));
            let packet = Packet::parse(&run.data_out).expect("a good packet");
            let reset = packet.tcp().expect("TCP");
            assert_eq!((packet.src, packet.dst), (talk.vip.ip(), talk.client.ip()));
            assert_eq!((reset.src, reset.dst), (talk.vip.port(), talk.client.port()));
            assert_eq!((reset.flags, reset.seq, reset.ack), (flags::RST, talk.cookie.wrapping_add(1), 0));
            assert!(reset.payload.is_empty() && reset.options.is_empty());
            let [to_us, from_client] = CLIENT_MACS;
            assert_eq!((packet.macs, &packet.tags), ([from_client, to_us], &talk.tags));
        }
    }
}

#[test]
fn who_leaves_while_his_hello_is_held_is_not_let_in() {
    let machine = machine();
    let d = machine.dataplane();
    let mut ring = d.take_held().expect("the ring");
    let stale = || d.reason(Reason::StaleRelease).expect("counted");
    let ways = [(flags::RST, Reason::ResetIgnored), (flags::FIN | flags::ACK, Reason::ResetClient)];
    for (port, family) in [(5300, Family::V4), (5310, Family::V6)] {
        for (port, (flags, reason)) in (port..).zip(ways) {
            machine.beat(true).expect("alive");
            let mut talk = Talk::new(Service::Held, family, port);
            talk.shake(&machine);
            let hello = client_hello(&[port as u8; 32], 0);
            let _ = machine.expect("a hello", &talk.data(0, &hello), Reason::Held);
            let bytes = ring.next().expect("the daemon is told").to_vec();
            let slot = u32::from_ne_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
            let stage = || d.stash().get(slot).expect("readable").stage;
            let end = hello.len() as u32;
            for wrong in [0, end - 1, end + 1] {
                let _ = machine.expect("anybody's", &talk.segment(flags, wrong, 0, &[]), reason);
                assert_eq!(stage(), STAGE_HELD, "{wrong}");
            }
            let _ = machine.expect("the client's", &talk.segment(flags, end, 0, &[]), reason);
            assert_eq!(stage(), STAGE_FREE);
            let before = stale();
            let connections = d.backend_stats(1).expect("counted").connections;
            d.release(&[Release { slot, backend: 1, flow: key(&talk) }]).expect("runs");
            assert_eq!(stale(), before + 1);
            assert_eq!(d.flows().get(&key(&talk)).expect("readable"), None);
            assert_eq!(d.backend_stats(1).expect("counted").connections, connections);
        }
    }
}

#[test]
fn frames_get_the_dscp_of_their_class() {
    let machine = machine();
    let d = machine.dataplane();
    machine.set_up(1, false).expect("one backend is enough");
    let marked = ClassSetting { dscp: Some(46), ..class("gold", 1) };
    d.set_classes(&[marked]).expect("classes");
    networks(
        &machine,
        &[(Service::Plain, "10.1.0.0", 16, "gold"), (Service::Plain, "2001:db8:1::", 64, "gold")],
    );
    for (port, family) in (4000..).zip(Family::BOTH) {
        let mut talk = Talk::new(Service::Plain, family, port);
        let syn = talk.bind(&machine, HTTP, Reason::BoundNonsecure);
        assert_eq!(syn.tos, 46 << 2, "the SYN");
        let far = Far::new(&syn);
        let _ = machine.expect("the backend's SYN-ACK", &far.syn_ack(), Reason::Replayed);
        for ecn in 0..4 {
            for fin in [0, flags::FIN] {
                let mut packet = talk.segment(flags::ACK | fin, 100, 1, b"data");
                packet.tos = 0x48 | ecn;
                let out = machine.run(&packet.frame()).expect("a verdict").packet();
                assert_eq!((out.tos, out.dst), (46 << 2 | ecn, backend_at(family, 0).ip()));
                let mut packet = far.segment(flags::ACK, 100, 1, b"data");
                packet.tos = ecn;
                let out = machine.run(&packet.frame()).expect("a verdict").packet();
                assert_eq!((out.tos, out.dst), (46 << 2 | ecn, talk.client.ip()));
                assert_eq!(out.id, packet.id, "the flow label is kept");
            }
        }
        // Another service's are left alone.
        let packet = datagram(client_at(family, port), Service::L4.at(family), b"data");
        let packet = Packet { tos: 0x49, ..packet };
        let out = machine.expect("a datagram", &packet, Reason::BoundL4).packet();
        assert_eq!(out.tos, 0x49);
    }
    d.set_classes(&[ClassSetting { dscp: Some(0), ..ClassSetting::default() }]).expect("classes");
    let packet = datagram(client_at(Family::V4, 4100), Service::L4.at(Family::V4), b"data");
    let out = machine.expect("a datagram", &Packet { tos: 0x4b, ..packet }, Reason::BoundL4).packet();
    assert_eq!(out.tos, 3, "zero is a DSCP too");
    d.set_classes(&[]).expect("classes");
    let packet = datagram(client_at(Family::V4, 4100), Service::L4.at(Family::V4), b"data");
    let out = machine.expect("a datagram", &Packet { tos: 0x4b, ..packet }, Reason::ToBackend).packet();
    assert_eq!(out.tos, 0x4b, "nothing is set any more");
}
