//! Services in `l4` mode: bound on the first packet, nothing but addresses and ports translated.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    harness::{BACKENDS, CLIENT_MACS, Service, Talk, backend_at, backend_macs, client_at},
    packet::{Body, Packet, Tcp, Udp, flags},
    topology::Family,
};

use crate::machine;

/// The packet with other addresses, one hop later.
fn moved(packet: &Packet, from: SocketAddr, to: SocketAddr, macs: [[u8; 6]; 2]) -> Packet {
    let mut packet = packet.clone();
    (packet.src, packet.dst) = (from.ip(), to.ip());
    packet.macs = macs;
    packet.ttl -= 1;
    if let Body::Tcp(Tcp { src, dst, .. }) | Body::Udp(Udp { src, dst, .. }) = &mut packet.body {
        (*src, *dst) = (from.port(), to.port());
    }
    packet
}

fn backend_of(ip: IpAddr) -> (u32, SocketAddr) {
    let all = (0..BACKENDS).flat_map(|b| Family::BOTH.map(|family| (b, backend_at(family, b))));
    all.into_iter().find(|(_, at)| at.ip() == ip).expect("a backend's address")
}

#[test]
fn tcp_is_bound_at_the_syn() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::L4, family, 9000);
        let syn = talk.syn();
        let out = machine.expect("the SYN", &syn, Reason::BoundL4).packet();
        let (backend, at) = backend_of(out.dst);
        assert_eq!(out, moved(&syn, talk.client, at, backend_macs(backend)));
        let answer = Packet {
            macs: [[9; 6]; 2],
            ..Packet::new(
                at.ip(),
                talk.client.ip(),
                Body::Tcp(Tcp {
                    src: at.port(),
                    dst: talk.client.port(),
                    seq: 5,
                    ack: talk.isn.wrapping_add(1),
                    flags: flags::SYN | flags::ACK,
                    options: talk.options.clone(),
                    ..Tcp::default()
                }),
            )
        };
        let out = machine.run(&answer.frame()).expect("a verdict").packet();
        assert_eq!(out, moved(&answer, talk.vip, talk.client, [CLIENT_MACS[1], CLIENT_MACS[0]]));
        talk.cookie = 5;
        for packet in [talk.ack(), talk.data(0, b"data"), talk.segment(flags::ACK | flags::FIN, 4, 0, &[])] {
            let out = machine.run(&packet.frame()).expect("a verdict").packet();
            assert_eq!(out, moved(&packet, talk.client, at, backend_macs(backend)));
        }
    }
}

#[test]
fn udp_goes_both_ways() {
    let machine = machine();
    for family in Family::BOTH {
        for unchecked in [false, true] {
            if unchecked && family == Family::V6 {
                continue;
            }
            let (client, vip) = (client_at(family, 9100 + u16::from(unchecked)), Service::L4.at(family));
            let udp = |from: SocketAddr, to: SocketAddr| {
                let body = Udp { src: from.port(), dst: to.port(), unchecked, payload: b"odd".to_vec() };
                Packet { macs: CLIENT_MACS, ..Packet::new(from.ip(), to.ip(), Body::Udp(body)) }
            };
            let packet = udp(client, vip);
            let out = machine.expect("the first datagram", &packet, Reason::BoundL4).packet();
            let (backend, at) = backend_of(out.dst);
            assert_eq!(out, moved(&packet, client, at, backend_macs(backend)));
            let out = machine.expect("the second", &packet, Reason::ToBackend).packet();
            assert_eq!(out, moved(&packet, client, at, backend_macs(backend)));
            let answer = udp(at, client);
            let out = machine.expect("the answer", &answer, Reason::ToClient).packet();
            assert_eq!(out, moved(&answer, vip, client, [CLIENT_MACS[1], CLIENT_MACS[0]]));
        }
    }
}

/// A checksum that comes out as zero is sent as ffff (RFC 768), whatever the payload.
#[test]
fn udp_checksums_are_right_for_all_sums() {
    let machine = machine();
    let (client, vip) = (client_at(Family::V4, 9200), Service::L4.at(Family::V4));
    for word in (0..=u16::MAX).step_by(31) {
        let body = Udp {
            src: client.port(),
            dst: vip.port(),
            unchecked: false,
            payload: word.to_be_bytes().to_vec(),
        };
        let packet = Packet::new(client.ip(), vip.ip(), Body::Udp(body));
        let out = machine.run(&packet.frame()).expect("a verdict").packet();
        let Body::Udp(udp) = &out.body else { panic!("no UDP but {out:?}") };
        assert!(!udp.unchecked, "payload {word:#06x}: the checksum was lost");
    }
}

#[test]
fn the_hash_is_the_same_for_the_same_connection_and_uses_every_backend() {
    let (first, second) = (machine(), machine());
    let mut shares: BTreeMap<IpAddr, u32> = BTreeMap::new();
    for port in 9300..9500 {
        let syn = Talk::new(Service::L4, Family::V6, port).syn();
        let one = first.expect("here", &syn, Reason::BoundL4).packet();
        let other = second.expect("there", &syn, Reason::BoundL4).packet();
        assert_eq!(one.dst, other.dst, "a second dispatcher, or one that lost its flows, agrees");
        *shares.entry(one.dst).or_default() += 1;
    }
    assert_eq!(shares.len(), 2, "{shares:?}");
    assert!(shares.values().all(|share| (60..=140).contains(share)), "{shares:?}");
}

#[test]
fn without_a_backend_a_syn_is_refused() {
    let machine = machine();
    for backend in 0..BACKENDS {
        machine.set_up(backend, false).expect("down");
    }
    let syn = Talk::new(Service::L4, Family::V4, 9600).syn();
    let reset = machine.expect("no backend", &syn, Reason::ResetNoBackend).tcp();
    assert_eq!(reset.flags, flags::RST | flags::ACK);
    let _ = machine.expect(
        "RST",
        &Talk::new(Service::L4, Family::V4, 9601).segment(flags::RST, 0, 0, &[]),
        Reason::ResetIgnored,
    );
}
