//! Packets that are not ours, malformed, or meaningless.

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    harness::{Action, Service, Talk, backend_at, client_at},
    hello::client_hello,
    packet::{Body, Icmp, Packet, Tcp, Udp, flags},
    topology::Family,
};

use crate::machine;

type Row = (&'static str, Vec<u8>, Reason);

/// A packet from a client to somewhere else.
fn elsewhere(family: Family, body: Body) -> Packet {
    let client = client_at(family, 0).ip();
    let other = match family {
        Family::V4 => "203.0.113.9".parse().expect("an address"),
        Family::V6 => "2001:db8:9::9".parse().expect("an address"),
    };
    Packet::new(client, other, body)
}

fn to_vip(family: Family, body: Body) -> Packet {
    Packet::new(client_at(family, 0).ip(), family.vip(), body)
}

/// Frame with a byte changed.
fn with(packet: &Packet, at: usize, value: u8) -> Vec<u8> {
    let mut frame = packet.frame();
    frame[at] = value;
    frame
}

/// An Ethernet frame of another kind.
fn other_kind(ethertype: [u8; 2]) -> Vec<u8> {
    let mut frame = vec![0xff; 12];
    frame.extend(ethertype);
    frame.extend([0; 46]);
    frame
}

fn rows(family: Family) -> Vec<Row> {
    let tcp = |dst| Body::Tcp(Tcp { src: 1, dst, flags: flags::SYN, ..Tcp::default() });
    let udp = |dst| Body::Udp(Udp { src: 1, dst, payload: vec![1], ..Udp::default() });
    let icmp = |kind| Body::Icmp(Icmp { kind, code: 0, rest: [0; 4], payload: vec![0; 8] });
    let echo = if family == Family::V4 { 8 } else { 128 };
    let from_backend = |body| Packet::new(backend_at(family, 0).ip(), client_at(family, 0).ip(), body);
    let fragment = |offset, more| {
        let mut packet = to_vip(family, Body::Raw(6, vec![0; 40]));
        packet.fragment = Some((offset, more));
        packet.dont_fragment = false;
        packet.frame()
    };
    let (plain, local) = (Service::Plain as u16, Service::Local as u16);
    let later = |flags| Body::Tcp(Tcp { src: 1, dst: local, flags, payload: vec![1; 9], ..Tcp::default() });
    let last_hop = Packet { ttl: 1, ..to_vip(family, later(flags::ACK)) };
    vec![
        ("TCP to someone else", elsewhere(family, tcp(443)).frame(), Reason::NotOurs),
        ("UDP to someone else", elsewhere(family, udp(443)).frame(), Reason::NotOurs),
        (
            "another protocol to someone else",
            elsewhere(family, Body::Raw(47, vec![0; 8])).frame(),
            Reason::NotOurs,
        ),
        ("a ping to someone else", elsewhere(family, icmp(echo)).frame(), Reason::IcmpOther),
        ("a port without service", to_vip(family, tcp(81)).frame(), Reason::NoService),
        ("UDP to a TCP service", to_vip(family, udp(plain)).frame(), Reason::NoService),
        ("another protocol to a VIP", to_vip(family, Body::Raw(47, vec![0; 8])).frame(), Reason::NoService),
        ("a ping to a VIP", to_vip(family, icmp(echo)).frame(), Reason::IcmpOther),
        ("a SYN to a listener that is not there", to_vip(family, tcp(local)).frame(), Reason::ToDaemon),
        ("data to a listener", to_vip(family, later(flags::ACK)).frame(), Reason::ToDaemon),
        ("an end to a listener", to_vip(family, later(flags::FIN | flags::ACK)).frame(), Reason::ToDaemon),
        ("nonsense to a listener", to_vip(family, later(flags::SYN | flags::RST)).frame(), Reason::ToDaemon),
        ("at its last hop, which is here", last_hop.frame(), Reason::ToDaemon),
        ("TCP of a backend without flow", from_backend(tcp(5000)).frame(), Reason::BackendOther),
        ("UDP of a backend without flow", from_backend(udp(53)).frame(), Reason::BackendOther),
        ("first fragment", fragment(0, true), Reason::Fragment),
        ("later fragment", fragment(1480, true), Reason::Fragment),
        ("last fragment", fragment(1480, false), Reason::Fragment),
    ]
}

#[test]
fn what_is_not_ours_or_has_no_service() {
    let machine = machine();
    for family in Family::BOTH {
        for (what, frame, reason) in rows(family) {
            let outcome = machine.run(&frame).unwrap_or_else(|error| panic!("{what}: {error:#}"));
            assert_eq!(outcome.reason, reason, "{what}, {family:?}");
            if outcome.action == Action::Pass {
                assert_eq!(outcome.frame, frame, "{what}, {family:?}: the kernel must see it as it came");
            }
        }
    }
}

#[test]
fn what_is_not_ip() {
    let machine = machine();
    for ethertype in [[8, 6], [0x88, 0xcc], [0x88, 0x47], [0, 38]] {
        let frame = other_kind(ethertype);
        let outcome = machine.run(&frame).expect("a verdict");
        assert_eq!((outcome.reason, outcome.frame), (Reason::NotIp, frame), "{ethertype:02x?}");
    }
    let mut tagged = other_kind([0x81, 0]);
    tagged[16..18].copy_from_slice(&[8, 6]);
    assert_eq!(machine.run(&tagged).expect("a verdict").reason, Reason::NotIp, "ARP with a tag");
}

#[test]
fn malformed_headers() {
    let machine = machine();
    let v4 = Talk::new(Service::Plain, Family::V4, 2000).syn();
    let v6 = Talk::new(Service::Plain, Family::V6, 2000).syn();
    let mut tags = v4.clone();
    tags.tags = vec![[0x88, 0xa8, 0, 1], [0x81, 0, 0, 2], [0x81, 0, 0, 3]];
    let mut short_options = v4.clone();
    short_options.ip_options = vec![1; 4];
    let mut short_options = short_options.frame();
    short_options.truncate(14 + 22);
    let mut extensions = v6.clone();
    extensions.extensions = vec![(0, vec![0; 7]); 7];
    let mut long = v6.clone();
    long.extensions = vec![(60, [vec![255], vec![0; 2046]].concat())];
    let rows = [
        ("IPv4 of version 5", with(&v4, 14, 0x55), Reason::BadIp),
        ("IPv4 header of 4 words", with(&v4, 14, 0x44), Reason::BadIp),
        ("IPv4 header of no words", with(&v4, 14, 0x40), Reason::BadIp),
        ("IPv4 header that reaches beyond the frame", with(&v4, 14, 0x4f), Reason::BadTransport),
        ("IPv4 longer than its frame", with(&v4, 16, 9), Reason::BadIp),
        ("IPv4 options cut short", short_options, Reason::BadTransport),
        ("IPv6 of version 4", with(&v6, 14, 0x40), Reason::BadIp),
        ("IPv6 longer than its frame", with(&v6, 18, 9), Reason::BadIp),
        ("TCP header of 4 words, IPv4", with(&v4, 34 + 12, 0x40), Reason::BadTransport),
        ("TCP header of no words, IPv6", with(&v6, 54 + 12, 0), Reason::BadTransport),
        ("TCP header longer than the packet, IPv4", with(&v4, 34 + 12, 0xf0), Reason::BadTransport),
        ("TCP header longer than the packet, IPv6", with(&v6, 54 + 12, 0xf0), Reason::BadTransport),
        ("three tags", tags.frame(), Reason::TooManyTags),
        ("seven extension headers", extensions.frame(), Reason::BadExtension),
        ("an extension header of 2 KB", long.frame(), Reason::BadExtension),
    ];
    for (what, frame, reason) in rows {
        let outcome = machine.run(&frame).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        assert_eq!(outcome.reason, reason, "{what}");
    }
}

/// Frames of all kinds that the program goes deep into.
fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let mut out = Vec::new();
    for family in Family::BOTH {
        let talk = Talk::new(Service::Plain, family, 2100);
        let mut tagged = talk.clone();
        tagged.tags = vec![[0x88, 0xa8, 0, 1], [0x81, 0, 0, 2]];
        let quoted = Packet::new(family.vip(), client_at(family, 1).ip(), talk.syn().body).ip();
        let kind = if family == Family::V4 { 3 } else { 2 };
        let error = Body::Icmp(Icmp { kind, code: 4, rest: [0, 0, 5, 0], payload: quoted });
        out.extend([
            ("a SYN", talk.syn().frame()),
            ("a SYN with two tags", tagged.syn().frame()),
            ("an ACK", talk.ack().frame()),
            ("data", talk.data(0, &client_hello(&[1; 32], 0)).frame()),
            ("an ICMP error", to_vip(family, error).frame()),
            (
                "UDP of an l4 service",
                to_vip(family, Body::Udp(Udp { src: 9, dst: 80, payload: vec![1; 9], ..Udp::default() }))
                    .frame(),
            ),
        ]);
    }
    let mut extensions = Talk::new(Service::Plain, Family::V6, 2101).syn();
    extensions.extensions = vec![(0, vec![0; 7]), (60, vec![0; 7])];
    out.push(("a SYN behind extension headers", extensions.frame()));
    out
}

/// XDP_ABORTED would be a verdict that no reason stands for; `run` refuses it.
#[test]
fn every_prefix_has_one_verdict() {
    let machine = machine();
    for (what, frame) in samples() {
        for length in 14..=frame.len() {
            machine
                .run(&frame[..length])
                .unwrap_or_else(|error| panic!("{length} bytes of {what}: {error:#}"));
        }
    }
}

#[test]
fn every_changed_byte_has_one_verdict() {
    let machine = machine();
    for (what, frame) in samples() {
        for at in 12..frame.len().min(120) {
            for value in [0, 1, 0x45, 0x7f, 0xff, !frame[at]] {
                let mut frame = frame.clone();
                frame[at] = value;
                machine
                    .run(&frame)
                    .unwrap_or_else(|error| panic!("{what} with byte {at} = {value:#x}: {error:#}"));
            }
        }
    }
}

/// All combinations of the six classic flags on a packet of no flow.
#[test]
fn nonsense_flags() {
    use flags::{ACK, FIN, RST, SYN};
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 2200);
        talk.shake(&machine);
        for flags in 0..64_u8 {
            let expected = match flags & (SYN | FIN | RST | ACK) {
                SYN => Reason::SynAnswered,
                ACK => Reason::CookieAck,
                // Its sender wants nothing any more, and we hold nothing.
                mixed if mixed == FIN | ACK => Reason::ResetClient,
                mixed if mixed & RST != 0 && mixed & SYN == 0 => Reason::ResetIgnored,
                _ => Reason::BadFlags,
            };
            let mut packet = talk.segment(flags, 0, 0, &[]);
            if expected == Reason::SynAnswered {
                packet = talk.syn();
            }
            let _ = machine.expect(&format!("flags {flags:#04x}, {family:?}"), &packet, expected);
        }
    }
}

#[test]
fn no_packet_is_forwarded_beyond_its_ttl() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 2300);
        let far = talk.establish(&machine, b"GET / HTTP/1.1\r\n\r\n", Reason::BoundNonsecure);
        for ttl in [0, 1] {
            for mut packet in [
                talk.ack(),
                far.segment(flags::ACK, 0, 0, b"x"),
                talk.segment(flags::ACK | flags::FIN, 0, 0, &[]),
            ] {
                packet.ttl = ttl;
                let what = format!("TTL {ttl}");
                let answer = machine.expect(&what, &packet, Reason::TimeExceeded).packet();
                assert_eq!(answer.dst, packet.src, "the sender is told");
                assert_eq!(answer.src, talk.vip.ip(), "in the name of the VIP");
                let Body::Icmp(icmp) = answer.body else { panic!("{answer:?}") };
                assert_eq!(icmp.kind, if family == Family::V4 { 11 } else { 3 });
                assert_eq!(icmp.payload, packet.ip()[..icmp.payload.len()], "its own packet is quoted");
                assert!(icmp.payload.len() >= 28);
            }
        }
        let mut packet = talk.ack();
        packet.ttl = 2;
        assert_eq!(machine.expect("TTL 2", &packet, Reason::ToBackend).packet().ttl, 1);
    }
}
