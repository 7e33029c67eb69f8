//! ICMP errors about packets of our flows reach whoever sent the packet, in words it understands.

use std::net::IpAddr;

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    harness::{Far, Machine, Service, Talk, backend_macs},
    packet::{Body, Icmp, Packet, flags},
    topology::Family,
};

use crate::machine;

const HTTP: &[u8] = b"GET / HTTP/1.1\r\nHost: service.test\r\n\r\n";

/// A router on the way.
fn router(family: Family) -> IpAddr {
    match family {
        Family::V4 => "203.0.113.1".parse().expect("an address"),
        Family::V6 => "2001:db8:f::1".parse().expect("an address"),
    }
}

/// Type, code, and the word that carries an MTU.
fn errors(family: Family) -> Vec<(&'static str, u8, u8, [u8; 4])> {
    match family {
        Family::V4 => vec![
            ("fragmentation needed", 3, 4, [0, 0, 0x05, 0x14]),
            ("host unreachable", 3, 1, [0; 4]),
            ("time exceeded", 11, 0, [0; 4]),
        ],
        Family::V6 => vec![
            ("packet too big", 2, 0, [0, 0, 0x05, 0x14]),
            ("no route", 1, 0, [0; 4]),
            ("hop limit", 3, 0, [0; 4]),
        ],
    }
}

fn error(
    about: &Packet,
    to: IpAddr,
    from: IpAddr,
    (kind, code, rest): (u8, u8, [u8; 4]),
    quoted: usize,
) -> Packet {
    let mut payload = about.ip();
    payload.truncate(quoted);
    Packet::new(from, to, Body::Icmp(Icmp { kind, code, rest, payload }))
}

fn icmp(packet: &Packet) -> &Icmp {
    if let Body::Icmp(icmp) = &packet.body { icmp } else { panic!("no ICMP but {:?}", packet.body) }
}

fn established(machine: &Machine, family: Family, port: u16) -> (Talk, Far) {
    let mut talk = Talk::new(Service::Pool, family, port);
    let far = talk.establish(machine, HTTP, Reason::BoundNonsecure);
    (talk, far)
}

/// Of what is quoted, everything must be what the receiver once sent.
fn assert_quotes(got: &Packet, sent: &Packet, quoted: usize) {
    let inner = Packet::parse_quoted(&icmp(got).payload).expect("a packet inside");
    assert_eq!((inner.src, inner.dst), (sent.src, sent.dst));
    let (got, sent) = (inner.tcp().expect("TCP"), sent.tcp().expect("TCP"));
    assert_eq!((got.src, got.dst, got.seq), (sent.src, sent.dst, sent.seq), "{quoted} bytes quoted");
}

#[test]
fn errors_from_the_clients_side_reach_the_backend() {
    let machine = machine();
    for family in Family::BOTH {
        let header = if family == Family::V4 { 20 } else { 40 };
        let (_, far) = established(&machine, family, 8000);
        let sent = far.segment(flags::ACK, 4000, 38, &[1; 1000]);
        let seen = machine.expect("a large packet", &sent, Reason::ToClient).packet();
        for (what, kind, code, rest) in errors(family) {
            for quoted in [header + 8, header + 20, header + 500] {
                let packet = error(&seen, family.vip(), router(family), (kind, code, rest), quoted);
                let out = machine.expect(what, &packet, Reason::IcmpError).packet();
                assert_eq!(out.dst, far.backend.ip(), "{what}");
                assert_eq!(out.ttl, packet.ttl - 1, "{what}");
                assert_eq!(
                    out.macs[0],
                    backend_macs(
                        if far.backend.ip() == dispatcher_tests::harness::backend_at(family, 0).ip() {
                            0
                        } else {
                            1
                        }
                    )[0]
                );
                assert_eq!((icmp(&out).kind, icmp(&out).code, icmp(&out).rest), (kind, code, rest), "{what}");
                assert_quotes(&out, &sent, quoted);
            }
        }
    }
}

#[test]
fn errors_from_the_backends_side_reach_the_client() {
    let machine = machine();
    for family in Family::BOTH {
        let header = if family == Family::V4 { 20 } else { 40 };
        let (talk, far) = established(&machine, family, 8001);
        let sent = talk.data(60, &[2; 1000]);
        let seen = machine.expect("a large packet", &sent, Reason::ToBackend).packet();
        for (what, kind, code, rest) in errors(family) {
            // By a router on the way, and by the backend itself.
            for from in [router(family), far.backend.ip()] {
                let packet = error(&seen, far.client.ip(), from, (kind, code, rest), header + 8);
                let out = machine.expect(what, &packet, Reason::IcmpError).packet();
                assert_eq!(out.dst, talk.client.ip(), "{what}");
                let named = if from == far.backend.ip() { talk.vip.ip() } else { from };
                assert_eq!(out.src, named, "{what}: a backend is known to clients as the VIP");
                assert_quotes(&out, &sent, header + 8);
            }
        }
    }
}

#[test]
fn other_messages_are_left_alone() {
    let machine = machine();
    for family in Family::BOTH {
        let (talk, far) = established(&machine, family, 8002);
        let seen = machine.expect("data", &far.segment(flags::ACK, 0, 38, b"x"), Reason::ToClient).packet();
        let (_, kind, code, rest) = errors(family)[0];
        let mut stranger = seen.clone();
        let mut tcp = stranger.tcp().expect("TCP").clone();
        tcp.dst ^= 1;
        stranger.body = Body::Tcp(tcp);
        let about = error(&stranger, family.vip(), router(family), (kind, code, rest), 100);
        let outcome = machine.expect("about no flow of ours", &about, Reason::IcmpOther);
        assert_eq!(outcome.frame, about.frame(), "the kernel sees it as it came");
        let echo = if family == Family::V4 { 0 } else { 129 };
        let reply = error(&seen, family.vip(), talk.client.ip(), (echo, 0, rest), 100);
        let outcome = machine.expect("an echo reply that quotes", &reply, Reason::IcmpOther);
        assert_eq!(outcome.frame, reply.frame());
        let header = if family == Family::V4 { 20 } else { 40 };
        for quoted in [0, 1, header - 1, header, header + 7] {
            let packet = error(&seen, family.vip(), router(family), (kind, code, rest), quoted);
            let _ = machine.expect(&format!("{quoted} bytes quoted"), &packet, Reason::BadIcmp);
        }
    }
}
