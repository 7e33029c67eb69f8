//! SYN, SYN-ACK with a cookie, and what comes back.

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    harness::{CLIENT_MACS, OUR_MSS, OUR_WSCALE, Service, Talk},
    packet::{Packet, Tcp, TcpOption, flags},
    topology::Family,
};

use crate::machine;

use TcpOption::{Mss, Nop, Sack, SackPermitted, Timestamps, Wscale};

/// The client's clock in these SYNs.
const CLOCK: u32 = 77;

/// What a SYN offers, and what its answer must say (`u32::MAX` stands for our clock).
fn rows() -> Vec<(&'static str, Vec<TcpOption>, Vec<TcpOption>)> {
    const OURS: u32 = u32::MAX;
    let mss = Mss(OUR_MSS);
    vec![
        (
            "Linux",
            vec![Mss(1460), SackPermitted, Timestamps(CLOCK, 0), Nop, Wscale(7)],
            vec![mss.clone(), SackPermitted, Timestamps(OURS, CLOCK), Wscale(OUR_WSCALE)],
        ),
        (
            "Windows",
            vec![Mss(1460), Nop, Wscale(8), Nop, Nop, SackPermitted],
            vec![mss.clone(), SackPermitted, Wscale(OUR_WSCALE)],
        ),
        (
            "macOS",
            vec![Mss(1460), Nop, Wscale(6), Nop, Nop, Timestamps(CLOCK, 0), SackPermitted],
            vec![mss.clone(), SackPermitted, Timestamps(OURS, CLOCK), Wscale(OUR_WSCALE)],
        ),
        ("MSS only", vec![Mss(536)], vec![mss.clone()]),
        ("MSS and window scale", vec![Mss(1400), Nop, Wscale(2)], vec![mss.clone(), Wscale(OUR_WSCALE)]),
        ("MSS and SACK", vec![Mss(1400), Nop, Nop, SackPermitted], vec![mss.clone(), SackPermitted]),
        (
            "MSS and timestamps",
            vec![Mss(9000), Nop, Nop, Timestamps(CLOCK, 0)],
            vec![mss, Timestamps(OURS, CLOCK)],
        ),
        ("timestamps only", vec![Nop, Nop, Timestamps(CLOCK, 0)], vec![Timestamps(OURS, CLOCK)]),
        ("nothing", vec![], vec![]),
        ("an unknown option", vec![TcpOption::Raw(vec![254, 4, 1, 2])], vec![]),
        ("a lying length", vec![TcpOption::Raw(vec![2, 0, 5, 5])], vec![]),
    ]
}

#[test]
fn a_syn_is_answered_with_the_options_it_offered() {
    let machine = machine();
    for family in Family::BOTH {
        for tags in [vec![], vec![[0x81, 0, 0, 100]], vec![[0x88, 0xa8, 0, 200], [0x81, 0, 0, 100]]] {
            for (what, offered, agreed) in rows() {
                let mut talk = Talk::new(Service::Plain, family, 3000).with_options(offered);
                talk.tags.clone_from(&tags);
                let syn = talk.syn();
                let answer = machine.expect(what, &syn, Reason::SynAnswered).packet();
                let tcp = answer.tcp().expect("TCP");
                let ours = tcp.timestamps().map_or(0, |stamps| stamps.0);
                let agreed: Vec<_> = agreed
                    .into_iter()
                    .map(
                        |option| {
                            if let Timestamps(_, echo) = option { Timestamps(ours, echo) } else { option }
                        },
                    )
                    .collect();
                assert_eq!(tcp.meaningful_options(), agreed, "{what}");
                assert_eq!(tcp.flags, flags::SYN | flags::ACK, "{what}");
                assert_eq!(tcp.ack, talk.isn.wrapping_add(1), "{what}");
                assert_eq!((tcp.src, tcp.dst), (talk.vip.port(), talk.client.port()), "{what}");
                assert_eq!((answer.src, answer.dst), (syn.dst, syn.src), "{what}");
                assert_eq!(answer.macs, [CLIENT_MACS[1], CLIENT_MACS[0]], "{what}");
                assert_eq!(answer.tags, tags, "{what}");
                let mss = syn
                    .tcp()
                    .expect("TCP")
                    .options
                    .iter()
                    .find_map(|o| if let Mss(m) = o { Some(*m) } else { None });
                let segments = u32::from(tcp.window) / u32::from(mss.unwrap_or(536).min(OUR_MSS));
                assert!(
                    (2..=4).contains(&segments),
                    "{what}: a window of {} is {segments} segments",
                    tcp.window
                );
                assert!(tcp.payload.is_empty(), "{what}");
            }
        }
    }
}

#[test]
fn cookies_differ_from_connection_to_connection() {
    let machine = machine();
    let mut seen = std::collections::HashSet::new();
    for port in 1..=200 {
        seen.insert(Talk::new(Service::Plain, Family::V6, port).shake(&machine).seq);
    }
    assert_eq!(seen.len(), 200);
}

#[test]
fn a_syn_behind_options_or_extension_headers_is_answered() {
    let machine = machine();
    let mut v4 = Talk::new(Service::Plain, Family::V4, 3100).syn();
    v4.ip_options = vec![1, 1, 1, 0];
    let mut v6 = Talk::new(Service::Plain, Family::V6, 3100).syn();
    v6.extensions = vec![(0, vec![0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 1, 4, 0, 0, 0, 0])];
    for syn in [v4, v6] {
        let answer = machine.expect("a SYN", &syn, Reason::SynAnswered).tcp();
        assert_eq!(answer.ack, syn.tcp().expect("TCP").seq.wrapping_add(1));
    }
}

#[test]
fn a_syn_with_data_is_answered_without_it() {
    let machine = machine();
    let talk = Talk::new(Service::Plain, Family::V4, 3200);
    let mut syn = talk.syn();
    let mut tcp = syn.tcp().expect("TCP").clone();
    tcp.payload = b"early".to_vec();
    syn.body = dispatcher_tests::packet::Body::Tcp(tcp);
    let answer = machine.expect("a SYN with data", &syn, Reason::SynAnswered).tcp();
    assert_eq!(answer.ack, talk.isn.wrapping_add(1), "the data are not acknowledged");
    assert!(answer.payload.is_empty());
}

/// The answer to a packet without state: RST as RFC 9293 section 3.10.7.1 has it.
fn assert_reset(answer: &Packet, to: &Packet) {
    let (answer_tcp, to_tcp) = (answer.tcp().expect("TCP"), to.tcp().expect("TCP"));
    assert_eq!(answer_tcp.flags, flags::RST);
    assert_eq!(answer_tcp.seq, to_tcp.ack);
    assert_eq!((answer.src, answer.dst), (to.dst, to.src));
    assert_eq!((answer_tcp.src, answer_tcp.dst), (to_tcp.dst, to_tcp.src));
    assert_eq!(answer.macs, [to.macs[1], to.macs[0]]);
    assert!(answer_tcp.payload.is_empty());
}

#[test]
fn only_the_right_cookie_is_taken() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 3300);
        talk.shake(&machine);
        let _ = machine.expect("the right cookie", &talk.ack(), Reason::CookieAck);
        let mut strangers = Vec::new();
        for difference in [1_u32, 1 << 4, 1 << 11] {
            let mut stranger = talk.clone();
            // The options' bits alone are not guarded, the address bits are.
            stranger.cookie ^= difference << 20 | difference;
            strangers.push(("another cookie", stranger));
        }
        // Of a bare ACK only the address MAC is checked: one in a thousand passes by chance.
        let mut passed = 0;
        for port in 3301..3365 {
            let mut other = talk.clone();
            other.client.set_port(port);
            passed +=
                u32::from(machine.run(&other.ack().frame()).expect("a verdict").reason == Reason::CookieAck);
            let data = other.data(0, b"GET / HTTP/1.1\r\n\r\n");
            let answer = machine.expect("data from another port", &data, Reason::ResetClient).packet();
            assert_reset(&answer, &data);
        }
        assert!(passed < 4, "{passed} of 64");
        for (what, stranger) in strangers {
            let packet = stranger.data(0, b"GET / HTTP/1.1\r\n\r\n");
            let answer = machine.expect(what, &packet, Reason::ResetClient).packet();
            assert_reset(&answer, &packet);
        }
    }
}

#[test]
fn cookies_outlive_one_change_of_keys_only() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V4, 3400);
    talk.shake(&machine);
    let rotate = |value| {
        machine
            .dataplane()
            .update_globals(|globals| {
                globals.epoch += 1;
                globals.cookie_keys[(globals.epoch & 1) as usize] = [value; 2];
            })
            .expect("new keys");
    };
    rotate(1);
    let _ = machine.expect("the key before", &talk.ack(), Reason::CookieAck);
    rotate(2);
    let _ = machine.expect("the key before that", &talk.ack(), Reason::ResetClient);
    talk.shake(&machine);
    let _ = machine.expect("the new key", &talk.ack(), Reason::CookieAck);
}

#[test]
fn packets_without_state_get_rst_not_silence() {
    let machine = machine();
    for family in Family::BOTH {
        let talk = Talk::new(Service::Plain, family, 3500);
        for packet in [talk.data(5000, b"lost flow"), talk.segment(flags::ACK | flags::FIN, 5000, 0, &[])] {
            let answer = machine.expect("no state", &packet, Reason::ResetClient).packet();
            assert_reset(&answer, &packet);
        }
        let sacked = talk.packet(Tcp {
            seq: 1,
            ack: 2,
            flags: flags::ACK,
            options: vec![Nop, Nop, Sack(vec![(1, 2)])],
            ..Tcp::default()
        });
        assert_reset(&machine.expect("with SACK", &sacked, Reason::ResetClient).packet(), &sacked);
        // Also of a flow that was one a moment ago.
        let mut talk = Talk::new(Service::Plain, family, 3501);
        talk.shake(&machine);
        talk.echo = talk.echo.wrapping_add(123_456);
        for taken in [0, 1, 5000] {
            let data = talk.segment(flags::ACK, 300, taken, b"lost flow");
            assert_reset(&machine.expect("lost", &data, Reason::ResetClient).packet(), &data);
        }
        let _ = machine.expect("RST", &talk.segment(flags::RST, 0, 0, &[]), Reason::ResetIgnored);
    }
}
