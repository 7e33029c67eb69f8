//! Packets of established flows, in both directions, compared as a whole.

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    harness::{
        BACKEND_WSCALE, CLIENT_MACS, Far, Machine, OUR_WSCALE, Service, Talk, backend_at, backend_macs,
    },
    packet::{Body, Packet, Tcp, TcpOption, flags},
    topology::Family,
};

use crate::machine;

use TcpOption::{Nop, Raw, Sack, Timestamps};
use flags::{ACK, FIN, PSH, RST, URG};

const HTTP: &[u8] = b"GET / HTTP/1.1\r\nHost: service.test\r\n\r\n";

/// Changes the TCP segment of a packet.
fn tcp(mut packet: Packet, change: impl FnOnce(&mut Tcp)) -> Packet {
    let mut segment = packet.tcp().expect("TCP").clone();
    change(&mut segment);
    packet.body = Body::Tcp(segment);
    packet
}

/// What a client's packet must be at the backend, by the rules: addresses and ports, the
/// acknowledgment by the difference of the initial sequence numbers, TSecr by that of the clocks.
fn at_backend(talk: &Talk, far: &Far, packet: Packet) -> Packet {
    let delta = far.own_isn.wrapping_sub(talk.cookie);
    let clocks = far.clock.wrapping_sub(talk.echo);
    let mut packet = tcp(packet, |tcp| {
        (tcp.src, tcp.dst) = (far.client.port(), far.backend.port());
        if tcp.flags & ACK != 0 {
            tcp.ack = tcp.ack.wrapping_add(delta);
        }
        for option in &mut tcp.options {
            if let Timestamps(_, echo) = option {
                *echo = echo.wrapping_add(clocks);
            } else if let Sack(blocks) = option {
                for (left, right) in blocks {
                    *left = left.wrapping_add(delta);
                    *right = right.wrapping_add(delta);
                }
            }
        }
    });
    (packet.src, packet.dst) = (far.client.ip(), far.backend.ip());
    packet.macs = backend_macs(0);
    packet.tags.clear();
    packet.ttl -= 1;
    packet
}

/// What a backend's packet must be at the client.
fn at_client(talk: &Talk, far: &Far, packet: Packet) -> Packet {
    let delta = far.own_isn.wrapping_sub(talk.cookie);
    let clocks = far.clock.wrapping_sub(talk.echo);
    let mut packet = tcp(packet, |tcp| {
        (tcp.src, tcp.dst) = (talk.vip.port(), talk.client.port());
        tcp.seq = tcp.seq.wrapping_sub(delta);
        tcp.window >>= OUR_WSCALE - BACKEND_WSCALE;
        for option in &mut tcp.options {
            if let Timestamps(clock, _) = option {
                *clock = clock.wrapping_sub(clocks);
            }
        }
    });
    (packet.src, packet.dst) = (talk.vip.ip(), talk.client.ip());
    packet.macs = [CLIENT_MACS[1], CLIENT_MACS[0]];
    packet.tags.clone_from(&talk.tags);
    packet.ttl -= 1;
    packet
}

/// Options in all the forms that must survive: the usual ones, odd orders and alignments.
fn option_rows(stamps: &[TcpOption]) -> Vec<(&'static str, Vec<TcpOption>)> {
    let block = |n: u32| (n.wrapping_mul(1000), n.wrapping_mul(1000).wrapping_add(500));
    let blocks = |count: u32| Sack((1..=count).map(block).collect());
    let with = |more: Vec<TcpOption>| [stamps, &more].concat();
    let Some(stamp) = stamps.last().cloned() else {
        return vec![
            ("none", vec![]),
            ("one SACK block", vec![Nop, Nop, blocks(1)]),
            ("four SACK blocks", vec![Nop, Nop, blocks(4)]),
            ("SACK, unaligned", vec![Nop, blocks(2)]),
            ("unknown", vec![Raw(vec![253, 3, 1])]),
        ];
    };
    vec![
        ("timestamps", with(vec![])),
        ("one SACK block", with(vec![Nop, Nop, blocks(1)])),
        ("two SACK blocks", with(vec![Nop, Nop, blocks(2)])),
        ("three SACK blocks", with(vec![Nop, Nop, blocks(3)])),
        ("SACK around the wrap", with(vec![Nop, Nop, Sack(vec![(0xffff_ff00, 0x100)])])),
        ("SACK before timestamps", vec![Nop, Nop, blocks(1), Nop, Nop, stamp.clone()]),
        ("timestamps without NOPs", vec![stamp.clone()]),
        ("timestamps at an odd offset", vec![Nop, stamp.clone(), Nop]),
        ("SACK at an odd offset", vec![stamp.clone(), Nop, blocks(2)]),
        ("an unknown option first", vec![Raw(vec![253, 4, 1, 2]), Nop, Nop, stamp]),
    ]
}

#[test]
fn every_packet_of_an_established_flow_is_translated() {
    let machine = machine();
    machine.set_up(1, false).expect("one backend is enough");
    let mut port = 6000;
    for family in Family::BOTH {
        for tags in [vec![], vec![[0x81, 0, 0, 100]], vec![[0x88, 0xa8, 0, 200], [0x81, 0, 0, 100]]] {
            for stamps in [true, false] {
                port += 1;
                let mut talk = Talk::new(Service::Plain, family, port);
                talk.tags.clone_from(&tags);
                if !stamps {
                    talk.options.retain(|option| !matches!(option, Timestamps(..)));
                }
                let far = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
                assert_eq!(far.backend, backend_at(family, 0));
                both_ways(&machine, &talk, &far);
            }
        }
    }
}

fn both_ways(machine: &Machine, talk: &Talk, far: &Far) {
    let data = [7; 1000];
    let length = HTTP.len() as u32;
    for (kind, flags, payload) in [
        ("ACK", ACK, &data[..0]),
        ("data", ACK | PSH, &data[..]),
        ("odd length", ACK, &data[..333]),
        ("urgent", ACK | URG, &data[..10]),
    ] {
        let packet = talk.segment(flags, length, 99, payload);
        for (options, list) in option_rows(&packet.tcp().expect("TCP").options) {
            let what = format!("{kind} with {options} to the backend");
            let packet = tcp(packet.clone(), |tcp| tcp.options = list);
            let out = machine.expect(&what, &packet, Reason::ToBackend).packet();
            assert_eq!(out, at_backend(talk, far, packet), "{what}");
        }
        let packet = far.segment(flags, 5000, length, payload);
        for (options, list) in option_rows(&packet.tcp().expect("TCP").options) {
            let what = format!("{kind} with {options} to the client");
            let packet = tcp(packet.clone(), |tcp| tcp.options = list);
            let out = machine.expect(&what, &packet, Reason::ToClient).packet();
            assert_eq!(out, at_client(talk, far, packet), "{what}");
        }
    }
    for flags in [FIN | ACK, FIN | ACK | PSH, RST | ACK, RST] {
        let packet = talk.segment(flags, length, 1, &[]);
        let out = machine.expect("control to the backend", &packet, Reason::Control).packet();
        assert_eq!(out, at_backend(talk, far, packet), "flags {flags:#x}");
        let packet = far.segment(flags, 1, length, &[]);
        let out = machine.expect("control to the client", &packet, Reason::Control).packet();
        assert_eq!(out, at_client(talk, far, packet), "flags {flags:#x}");
    }
}

#[test]
fn padding_behind_the_packet_does_no_harm() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 6100);
        let far = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
        let packet = talk.segment(ACK, 50, 0, b"x");
        let mut frame = packet.frame();
        frame.extend([0xee; 7]);
        let out = machine.run(&frame).expect("a verdict");
        let mut expected = at_backend(&talk, &far, packet);
        expected.macs = out.packet().macs;
        assert_eq!(out.packet(), expected);
    }
}

#[test]
fn options_that_the_backend_refused_do_not_reach_it() {
    let machine = machine();
    machine.set_up(1, false).expect("one backend is enough");
    for (port, family) in (6200..).zip(Family::BOTH) {
        let mut talk = Talk::new(Service::Plain, family, port);
        let mut far = Far::new(&talk.bind(&machine, HTTP, Reason::BoundNonsecure));
        far.options = vec![TcpOption::Mss(1460)];
        far.echo = None;
        let _ = machine.expect("a plain SYN-ACK", &far.syn_ack(), Reason::Replayed);
        let stamps = talk.ack().tcp().expect("TCP").options.clone();
        let list = [stamps, vec![Nop, Nop, Sack(vec![(1, 2)])]].concat();
        let packet = tcp(talk.segment(ACK, 50, 0, b"data"), |tcp| tcp.options = list);
        let out = machine.expect("data with SACK", &packet, Reason::ToBackend).tcp();
        assert!(out.options.iter().all(|option| *option == Nop), "{:?}", out.options);
        // It scales nothing: the client's window is shifted for it, ours not at all.
        assert_eq!(u32::from(out.window), u32::from(dispatcher_tests::harness::CLIENT_WINDOW) << 7);
        let answer = machine.expect("its data", &far.segment(ACK, 0, 1, b"data"), Reason::ToClient).tcp();
        assert_eq!(answer.window, 509 >> OUR_WSCALE);
        // The next client is not offered what the backends of this service do not have.
        let mut next = Talk::new(Service::Plain, family, port + 10);
        let answer = next.shake(&machine).meaningful_options();
        assert!(matches!(answer[..], [TcpOption::Mss(_)]), "{answer:?}");
    }
}

#[test]
fn a_flow_follows_its_backends_new_neighbour() {
    let machine = machine();
    machine.set_up(1, false).expect("one backend is enough");
    let mut talk = Talk::new(Service::Plain, Family::V4, 6300);
    let far = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
    let index = dispatcher_common::service::endpoint_index(0, true);
    let mut endpoint = machine.dataplane().backends().get(index).expect("readable");
    endpoint.link.macs[0] ^= 0xff00_0000;
    let old = backend_macs(0);
    machine.dataplane().backends().set(index, endpoint).expect("writable");
    machine.dataplane().update_globals(|globals| globals.generation += 1).expect("writable");
    for _ in 0..2 {
        let packet = talk.segment(ACK, 50, 0, b"x");
        let out = machine.expect("after the change", &packet, Reason::ToBackend).packet();
        assert_ne!(out.macs, old);
        assert_eq!(Packet { macs: old, ..out }, at_backend(&talk, &far, packet));
    }
}
