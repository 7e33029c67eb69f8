//! The life of flows: repeated packets, refusals, ends, the same ports again, and what is learned.

use dispatcher_common::{
    flow::{FlowKey, ports_word},
    proxy::ROOM,
    reason::Reason,
    session::{STATE_CONFIRMED, STATE_PROVISIONAL},
    stash::STAGE_BOUND,
};
use dispatcher_tests::{
    harness::{Far, Machine, Service, Talk, backend_at},
    hello::{client_hello, server_hello},
    packet::flags::{ACK, FIN, PSH, RST, SYN},
    topology::Family,
};

use crate::machine;

const HTTP: &[u8] = b"GET / HTTP/1.1\r\nHost: service.test\r\n\r\n";

#[test]
fn a_hello_that_comes_again_sends_the_syn_again() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 7000);
        let syn = talk.bind(&machine, HTTP, Reason::BoundNonsecure);
        let again = machine.expect("the same data", &talk.data(0, HTTP), Reason::SynRepeated).packet();
        assert_eq!(again, syn);
        let _ = machine.expect("an ACK meanwhile", &talk.ack(), Reason::WaitingBackend);
        let more = talk.data(HTTP.len() as u32, b"more");
        let _ = machine.expect("more data meanwhile", &more, Reason::Stashed);
    }
}

#[test]
fn a_backend_that_does_not_answer_is_left() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V4, 7001);
    let syn = talk.bind(&machine, HTTP, Reason::BoundNonsecure);
    let other = (0..10).find_map(|_| {
        let outcome = machine.run(&talk.data(0, HTTP).frame()).expect("a verdict");
        (outcome.reason == Reason::BoundNonsecure).then(|| outcome.packet())
    });
    let other = other.expect("another backend is tried in the end");
    assert_ne!(other.dst, syn.dst);
    // Only the second one's answer counts now.
    let _ = machine.expect("its answer", &Far::new(&other).syn_ack(), Reason::Replayed);
}

#[test]
fn a_late_answer_of_a_backend_that_was_left_opens_nothing() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 7005);
        let left = Far::new(&talk.bind(&machine, HTTP, Reason::BoundNonsecure));
        let _ = machine.expect("a refusal", &left.segment(RST | ACK, 0, 0, &[]), Reason::WaitingBackend);
        let syn = machine.expect("the data again", &talk.data(0, HTTP), Reason::BoundNonsecure).packet();
        let mut chosen = Far::new(&syn);
        chosen.own_isn = 0x1234;
        assert_ne!(chosen.backend, left.backend);
        let late = machine.run(&left.syn_ack().frame()).expect("a verdict");
        assert!(matches!(late.reason, Reason::ResetBackend | Reason::BadAnswer), "{late:?}");
        let _ = machine.expect("the answer that counts", &chosen.syn_ack(), Reason::Replayed);
        let late = machine.run(&left.syn_ack().frame()).expect("a verdict");
        assert!(matches!(late.reason, Reason::ResetBackend | Reason::BadAnswer), "once more: {late:?}");
        let answer = chosen.segment(ACK | PSH, 0, HTTP.len() as u32, b"hello");
        let answer = machine.expect("its data", &answer, Reason::ToClient).tcp();
        assert_eq!(answer.seq, talk.cookie.wrapping_add(1));
        let sent = machine.expect("and on", &talk.segment(ACK, 60, 5, b"x"), Reason::ToBackend).packet();
        assert_eq!((sent.dst, sent.tcp().expect("TCP").ack), (chosen.backend.ip(), 0x1234 + 6));
    }
}

#[test]
fn an_answer_whose_connection_is_gone_is_dropped() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 7006);
        let far = Far::new(&talk.bind(&machine, HTTP, Reason::BoundNonsecure));
        let syn = talk.syn();
        let ports = ports_word(talk.client.port(), talk.vip.port());
        let key = FlowKey { src: syn.src.into(), dst: syn.dst.into(), ports, proto: 6 };
        assert!(machine.dataplane().flows().remove(&key).expect("writable"), "as if it had been evicted");
        let _ = machine.expect("the answer", &far.syn_ack(), Reason::BadAnswer);
    }
}

#[test]
fn of_two_cpus_at_one_stash_slot_one_gives_way() {
    let machine = machine();
    let stash = machine.dataplane().stash();
    let lock_all = |lock| {
        for index in 0..stash.capacity() {
            let mut slot = stash.get(index).expect("readable");
            slot.lock = lock;
            stash.set(index, slot).expect("writable");
        }
    };
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 7007);
        let _ = talk.shake(&machine);
        // What another CPU does while it works on the slot.
        lock_all(1);
        let _ = machine.expect("while it is taken", &talk.data(0, HTTP), Reason::StashBusy);
        let other = Talk::new(Service::Plain, family, 7008);
        let _ = machine.expect("nobody is answered less", &other.syn(), Reason::SynAnswered);
        lock_all(0);
        let _ = machine.expect("the client's next try", &talk.data(0, HTTP), Reason::BoundNonsecure);
    }
}

/// The backend's answer is handled by one CPU, while another one takes the client's next segment.
#[test]
fn what_is_written_behind_the_data_meanwhile_stays() {
    let machine = machine();
    let stash = machine.dataplane().stash();
    let bound = || {
        let slots = (0..stash.capacity()).map(|index| (index, stash.get(index).expect("readable")));
        slots.filter(|(_, slot)| slot.stage == STAGE_BOUND).collect::<Vec<_>>()
    };
    for family in Family::BOTH {
        for (port, len) in (7050..).zip(13..HTTP.len()) {
            let (data, rest) = HTTP.split_at(len);
            let mut talk = Talk::new(Service::Plain, family, port);
            let syn = talk.bind(&machine, data, Reason::BoundNonsecure);
            let [(index, mut slot)] = bound().try_into().ok().expect("one");
            let end = ROOM + slot.len as usize;
            slot.buf[end..end + rest.len()].copy_from_slice(rest);
            stash.set(index, slot).expect("writable");
            let _ = machine.expect("the data", &Far::new(&syn).syn_ack(), Reason::Replayed);
            let slot = stash.get(index).expect("readable");
            assert_eq!(&slot.buf[end..end + rest.len()], rest, "{len} bytes");
        }
    }
}

#[test]
fn a_backend_that_refuses_is_left_at_once() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 7002);
        let syn = talk.bind(&machine, HTTP, Reason::BoundNonsecure);
        let far = Far::new(&syn);
        let refusal = machine.run(&far.segment(RST | ACK, 0, 0, &[]).frame()).expect("a verdict");
        assert_eq!(
            refusal.action,
            dispatcher_tests::harness::Action::Drop,
            "the client hears nothing: {refusal:?}"
        );
        let other = machine.expect("the data again", &talk.data(0, HTTP), Reason::BoundNonsecure).packet();
        assert_ne!(other.dst, syn.dst);
        let _ = machine.expect("its answer", &Far::new(&other).syn_ack(), Reason::Replayed);
        let sent = machine.expect("and on", &talk.data(HTTP.len() as u32, b"x"), Reason::ToBackend).packet();
        assert_eq!(sent.dst, other.dst);
    }
}

fn connections(machine: &Machine) -> u64 {
    (0..3).map(|n| machine.dataplane().backend_stats(n).expect("readable").connections).sum()
}

#[test]
fn when_every_backend_refuses_the_client_is_told() {
    let machine = machine();
    for family in Family::BOTH {
        let before = connections(&machine);
        let mut talk = Talk::new(Service::Plain, family, 7009);
        let mut syn = talk.bind(&machine, HTTP, Reason::BoundNonsecure);
        let mut tried = 1;
        let reset = loop {
            let refusal = Far::new(&syn).segment(RST | ACK, 0, 0, &[]);
            let _ = machine.expect("a refusal", &refusal, Reason::WaitingBackend);
            let outcome = machine.run(&talk.data(0, HTTP).frame()).expect("a verdict");
            if outcome.reason == Reason::ResetNoBackend {
                break outcome.tcp();
            }
            assert_eq!(outcome.reason, Reason::BoundNonsecure);
            syn = outcome.packet();
            tried += 1;
            assert!(tried < 10);
        };
        assert!(tried >= 3, "{tried} were tried");
        assert_eq!((reset.flags, reset.seq), (RST, talk.cookie.wrapping_add(1)));
        let counted = connections(&machine);
        assert_eq!(counted, before + 1, "one connection, however many backends refuse it");
        let _ = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
    }
}

#[test]
fn a_repeated_syn_ack_is_answered_again() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V6, 7003);
    let far = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
    let _ = machine.expect("once more", &far.syn_ack(), Reason::Replayed);
}

#[test]
fn a_wrong_answer_to_our_syn_opens_nothing() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V4, 7004);
    let far = Far::new(&talk.bind(&machine, HTTP, Reason::BoundNonsecure));
    let mut stranger = far.clone();
    stranger.isn = far.isn.wrapping_add(100);
    let reset = machine.expect("acknowledges another SYN", &stranger.syn_ack(), Reason::ResetBackend).tcp();
    assert_eq!((reset.flags, reset.seq), (RST, stranger.isn.wrapping_add(1)));
    let _ = machine.expect("no SYN-ACK", &far.segment(ACK, 0, 0, &[]), Reason::ResetBackend);
    let _ = machine.expect("the right one", &far.syn_ack(), Reason::Replayed);
}

/// After the end of a connection its ports serve a new one, all the way.
#[test]
fn the_same_ports_again() {
    let machine = machine();
    let mut port = 7100;
    for family in Family::BOTH {
        for service in [Service::Plain, Service::Pool] {
            for (what, ends) in [
                ("FIN by both", &[(true, FIN | ACK), (false, FIN | ACK), (true, ACK)][..]),
                ("RST by the client", &[(true, RST | ACK)]),
                ("RST by the backend", &[(false, RST)]),
            ] {
                port += 1;
                let what = format!("{what}, {service:?}, {family:?}");
                let mut talk = Talk::new(service, family, port);
                let far = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
                for &(by_client, flags) in ends {
                    let packet = if by_client {
                        talk.segment(flags, 60, 1, &[])
                    } else {
                        far.segment(flags, 0, 60, &[])
                    };
                    machine.run(&packet.frame()).expect("a verdict");
                }
                talk.isn = talk.isn.wrapping_add(0x1234_5678);
                talk.clock += 500;
                talk.shake(&machine);
                let _ = machine.expect(&format!("{what}: the new ACK"), &talk.ack(), Reason::CookieAck);
                let syn = machine
                    .expect(&format!("{what}: the new data"), &talk.data(0, HTTP), Reason::BoundNonsecure)
                    .packet();
                assert_eq!(syn.tcp().expect("TCP").seq, talk.isn, "{what}");
                let mut far = Far::new(&syn);
                far.own_isn = 77;
                let _ = machine.expect(&format!("{what}: the new SYN-ACK"), &far.syn_ack(), Reason::Replayed);
                let data =
                    machine.expect(&what, &far.segment(ACK | PSH, 0, 1, b"hello"), Reason::ToClient).tcp();
                assert_eq!(data.seq, talk.cookie.wrapping_add(1), "{what}");
                let ack = machine.expect(&what, &talk.segment(ACK, 60, 5, &[]), Reason::ToBackend).tcp();
                assert_eq!(ack.ack, far.own_isn.wrapping_add(6), "{what}");
            }
        }
    }
}

#[test]
fn a_syn_on_a_living_flow_is_for_the_backend_to_judge() {
    let machine = machine();
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 7200);
        let far = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
        let mut again = talk.clone();
        again.isn = talk.isn.wrapping_add(0x0100_0000);
        let sent = machine.expect("the SYN", &again.syn(), Reason::Control).packet();
        assert_eq!(sent.dst, far.backend.ip());
        // It knows the connection: its challenge ACK goes to the client, and the flow lives on.
        let challenge =
            machine.expect("the challenge", &far.segment(ACK, 0, 38, &[]), Reason::ToClient).tcp();
        assert_eq!(challenge.ack, talk.isn.wrapping_add(39));
        let _ = machine.expect("data", &talk.data(60, b"x"), Reason::ToBackend);
        // It does not know it any more: what it says to the SYN ends the flow here, silently.
        let _ = machine.expect("the SYN", &again.syn(), Reason::Control);
        let _ = machine.expect("its RST", &far.segment(RST | ACK, 0, 0, &[]), Reason::StaleFlow);
        again.shake(&machine);
        let _ = machine.expect("the client's third SYN has worked", &again.ack(), Reason::CookieAck);
        let _ = machine.expect("so have its data", &again.data(0, HTTP), Reason::BoundNonsecure);
    }
}

#[test]
fn a_client_that_gives_up_while_the_backend_is_asked() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V4, 7300);
    let far = Far::new(&talk.bind(&machine, HTTP, Reason::BoundNonsecure));
    let _ = machine.expect("RST", &talk.segment(RST, 38, 0, &[]), Reason::ResetIgnored);
    let late = machine.run(&far.syn_ack().frame()).expect("a verdict");
    assert_ne!(late.reason, Reason::Replayed, "nobody waits for this connection any more");
    talk.isn ^= 0x5555;
    let _ = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
}

/// Establishes a flow with a hello of this ID and lets the backend say `answer`; the backend.
fn answered(
    machine: &Machine,
    service: Service,
    port: u16,
    hello: &[u8],
    reason: Reason,
    answer: &[u8],
) -> u32 {
    let mut talk = Talk::new(service, Family::V4, port);
    let far = talk.establish(machine, hello, reason);
    let packet = far.segment(ACK | PSH, 0, hello.len() as u32, answer);
    let out = machine.expect("the ServerHello", &packet, Reason::ToClient).tcp();
    assert_eq!(out.payload, answer, "it reaches the client as it is");
    (0..3).find(|backend| backend_at(Family::V4, *backend) == far.backend).expect("a backend")
}

#[test]
fn claim_c1_the_id_that_a_server_issues_is_bound_to_it() {
    let machine = machine();
    let issued = [0x11; 32];
    let server = server_hello(&issued, false);
    let backend =
        answered(&machine, Service::Plain, 7400, &client_hello(&[], 0), Reason::BoundFresh, &server);
    let entry = machine.session(Service::Plain, &issued).expect("readable").expect("learned");
    assert_eq!((entry.backends[0], entry.state), (Machine::backend_id(backend), STATE_CONFIRMED));
    assert!(entry.expires > entry.created);
    // From another port and family: the same backend.
    let mut talk = Talk::new(Service::Plain, Family::V6, 7401);
    let syn = talk.bind(&machine, &client_hello(&issued, 0), Reason::BoundHit);
    assert_eq!(syn.dst, backend_at(Family::V6, backend).ip());
}

#[test]
fn an_accepted_id_is_confirmed_and_a_refused_one_is_not() {
    let machine = machine();
    let (accepted, refused, issued) = ([0x22; 32], [0x33; 32], [0x44; 16]);
    let hello = client_hello(&accepted, 0);
    answered(&machine, Service::Plain, 7500, &hello, Reason::BoundMiss, &server_hello(&accepted, false));
    let state = |id: &[u8]| machine.session(Service::Plain, id).expect("readable").map(|entry| entry.state);
    assert_eq!(state(&accepted), Some(STATE_CONFIRMED));
    let hello = client_hello(&refused, 0);
    answered(&machine, Service::Plain, 7501, &hello, Reason::BoundMiss, &server_hello(&issued, false));
    assert_eq!(state(&issued), Some(STATE_CONFIRMED));
    assert_ne!(state(&refused), Some(STATE_CONFIRMED));
}

#[test]
fn the_random_id_of_tls_1_3_is_not_kept() {
    let machine = machine();
    let random = [0x55; 32];
    let hello = client_hello(&random, 0);
    answered(&machine, Service::Plain, 7600, &hello, Reason::BoundMiss, &server_hello(&random, true));
    let entry = machine.session(Service::Plain, &random).expect("readable");
    assert_eq!(entry, None, "it will never come back");
}

#[test]
fn answers_that_are_no_server_hello_teach_nothing() {
    let machine = machine();
    let good = server_hello(&[0x66; 32], false);
    let mut rows: Vec<Vec<u8>> = (1..good.len()).step_by(7).map(|length| good[..length].to_vec()).collect();
    rows.push(b"HTTP/1.1 200 OK\r\n\r\n".to_vec());
    rows.push(vec![21, 3, 3, 0, 2, 2, 40]);
    let mut long_id = good.clone();
    long_id[43] = 33;
    rows.push(long_id);
    for (port, answer) in (7700..).zip(rows) {
        answered(&machine, Service::Plain, port, &client_hello(&[], 0), Reason::BoundFresh, &answer);
    }
    let learned: Vec<_> =
        machine.dataplane().sessions().iter().filter(|(_, s)| s.state != STATE_PROVISIONAL).collect();
    assert!(learned.is_empty(), "{learned:?}");
}

#[test]
fn both_directions_are_entries_of_the_flow_table() {
    let machine = machine();
    let mut talk = Talk::new(Service::Pool, Family::V6, 7800);
    let far = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
    let key = |src: std::net::SocketAddr, dst: std::net::SocketAddr| FlowKey {
        src: src.ip().into(),
        dst: dst.ip().into(),
        ports: ports_word(src.port(), dst.port()),
        proto: 6,
    };
    let forward =
        machine.dataplane().flows().get(&key(talk.client, talk.vip)).expect("readable").expect("there");
    let backward =
        machine.dataplane().flows().get(&key(far.backend, far.client)).expect("readable").expect("there");
    assert_eq!(forward.ports, key(far.client, far.backend).ports);
    assert_eq!(backward.ports, key(talk.vip, talk.client).ports);
    assert_eq!(forward.seq_add, 0_u32.wrapping_sub(backward.seq_add));
}

#[test]
fn unexpected_flags_on_a_living_flow_do_not_stop_it() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V4, 7900);
    let _ = talk.establish(&machine, HTTP, Reason::BoundNonsecure);
    for flags in [0, PSH, SYN | FIN, SYN | ACK] {
        machine.run(&talk.segment(flags, 60, 0, &[]).frame()).expect("a verdict");
        let _ = machine.expect(&format!("after {flags:#x}"), &talk.data(60, b"x"), Reason::ToBackend);
    }
}

#[test]
fn times_of_backends_are_counted_once_a_connection() {
    let machine = machine();
    for (id, family) in [0x44, 0x46].into_iter().zip(Family::BOTH) {
        let mut talk = Talk::new(Service::Plain, family, 7400);
        let hello = client_hello(&[id; 32], 0);
        let syn = talk.bind(&machine, &hello, Reason::BoundMiss);
        let far = Far::new(&syn);
        let backend =
            (0..3).find(|one| backend_at(family, *one) == far.backend).expect("one of the table's backends");
        let counts = || {
            let times = machine.dataplane().backend_times(backend).expect("readable");
            assert_eq!(times.connect.count() != 0, times.connect.sum != 0);
            (times.connect.count(), times.response.count())
        };
        machine.dataplane().forget_stats(backend).expect("writable");
        assert_eq!(counts(), (0, 0));
        std::thread::sleep(std::time::Duration::from_millis(2));
        let _ = machine.expect("the SYN-ACK", &far.syn_ack(), Reason::Replayed);
        assert_eq!(counts(), (1, 0));
        let times = machine.dataplane().backend_times(backend).expect("readable");
        assert!(times.connect.sum >= 2_000_000, "{times:?}");
        let taken = hello.len() as u32;
        let _ = machine.expect("an ACK", &far.segment(ACK, 0, taken, &[]), Reason::ToClient);
        assert_eq!(counts(), (1, 0));
        let answer = server_hello(&[0x45; 32], false);
        let _ = machine.expect("the answer", &far.segment(ACK | PSH, 0, taken, &answer), Reason::ToClient);
        assert_eq!(counts(), (1, 1));
        let more = far.segment(ACK | PSH, answer.len() as u32, taken, b"more");
        let _ = machine.expect("more", &more, Reason::ToClient);
        assert_eq!(counts(), (1, 1));
    }
}
