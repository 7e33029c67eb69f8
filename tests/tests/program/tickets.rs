//! Session tickets: found in hellos, learned from what servers accept and issue.

use dispatcher_common::reason::Reason;
use dispatcher_common::{
    service::endpoint_index,
    session::{
        KIND_CLIENT, KIND_TICKET, KIND_TICKET_NAME, KIND_TLS_SESSION_ID, STATE_CONFIRMED, STATE_DISCOVERED,
        Session, SessionKey, TICKET_NAMED, TICKET_OPAQUE, TICKET_UNKNOWN,
    },
};
use dispatcher_tests::{
    harness::{BACKENDS, Far, Machine, Service, Talk, backend_at},
    hello::{in_records, new_session_ticket, resuming_hello, server_hello_with},
    packet::flags::{ACK, PSH},
    topology::Family,
};

use crate::machine;

const NAME: [u8; 16] = [0xab; 16];

fn ticket(name: &[u8], rest: u8) -> Vec<u8> {
    let mut ticket = name.to_vec();
    ticket.resize(192, rest);
    ticket
}

fn key(kind: u8, id: &[u8]) -> SessionKey {
    SessionKey::new(Service::Plain.id(), kind, id).expect("1 to 32 bytes")
}

fn entry(machine: &Machine, kind: u8, id: &[u8]) -> Option<Session> {
    machine.dataplane().sessions().get(&key(kind, id)).expect("readable")
}

fn know(machine: &Machine, kind: u8, id: &[u8], backends: &[u32]) {
    let mut session = Session { state: STATE_DISCOVERED, ..Session::default() };
    for (place, backend) in session.backends.iter_mut().zip(backends) {
        *place = Machine::backend_id(*backend);
    }
    machine.dataplane().sessions().insert(key(kind, id), session).expect("writable");
}

fn set_format(machine: &Machine, ticket: u32) {
    for backend in 0..BACKENDS {
        for v4 in [true, false] {
            let index = endpoint_index(backend, v4);
            let mut endpoint = machine.dataplane().backends().get(index).expect("readable");
            endpoint.ticket = ticket;
            machine.dataplane().backends().set(index, endpoint).expect("writable");
        }
    }
}

fn backend_of(far: &Far, family: Family) -> u32 {
    (0..BACKENDS).find(|backend| backend_at(family, *backend) == far.backend).expect("a backend")
}

/// Establishes a connection by a hello; sends `answer` as the server's first data.
fn answered(machine: &Machine, port: u16, hello: &[u8], reason: Reason, answer: &[u8]) -> (Talk, Far) {
    let mut talk = Talk::new(Service::Plain, Family::V4, port);
    let far = talk.establish(machine, hello, reason);
    let packet = far.segment(ACK | PSH, 0, hello.len() as u32, answer);
    let _ = machine.expect("the server's first data", &packet, Reason::ToClient);
    (talk, far)
}

#[test]
fn claim_c2_the_key_name_of_a_ticket_leads_to_its_backend() {
    let machine = machine();
    know(&machine, KIND_TICKET_NAME, &NAME, &[2]);
    let rows = [
        ("a ticket of TLS 1.2", resuming_hello(&[7; 32], Some(&ticket(&NAME, 1)), &[], 0)),
        ("a PSK of TLS 1.3", resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0)),
        ("both: the PSK counts", resuming_hello(&[8; 32], Some(&ticket(&[1; 16], 1)), &ticket(&NAME, 2), 0)),
        ("without a session ID", resuming_hello(&[], Some(&ticket(&NAME, 1)), &[], 0)),
        (
            "over several records",
            in_records(&resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0), &[3, 90, 300]),
        ),
    ];
    for family in Family::BOTH {
        for (port, (what, hello)) in (8000..).zip(&rows) {
            let mut talk = Talk::new(Service::Plain, family, port);
            talk.shake(&machine);
            let syn = machine.expect(what, &talk.data(0, hello), Reason::BoundHit).packet();
            assert_eq!(syn.dst, backend_at(family, 2).ip(), "{what}");
        }
    }
    let made_up = entry(&machine, KIND_TLS_SESSION_ID, &[7; 32]);
    assert_eq!(made_up, None, "a session ID beside a ticket is made up by the client");
}

#[test]
fn claim_c2_a_psk_in_the_second_segment_is_found() {
    let machine = machine();
    know(&machine, KIND_TICKET_NAME, &NAME, &[1]);
    // As long as with a post-quantum key share.
    let hello = resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 1300);
    for (port, cut) in (8100..).zip([1, 5, 100, 1300, 1460, hello.len() - 40]) {
        for family in Family::BOTH {
            let mut talk = Talk::new(Service::Plain, family, port);
            talk.shake(&machine);
            let (one, two) = hello.split_at(cut.min(1400));
            let _ = machine.expect("the first part", &talk.data(0, one), Reason::AckedPart);
            let rest = talk.data(one.len() as u32, two);
            let syn = machine.expect("the rest", &rest, Reason::BoundHit).packet();
            assert_eq!(syn.dst, backend_at(family, 1).ip());
        }
    }
}

#[test]
fn an_unknown_key_goes_by_the_table_and_makes_no_entry() {
    let machine = machine();
    let hello = resuming_hello(&[7; 32], Some(&ticket(&NAME, 1)), &[], 0);
    let mut talk = Talk::new(Service::Plain, Family::V4, 8200);
    let _ = talk.bind(&machine, &hello, Reason::BoundMiss);
    assert_eq!(machine.dataplane().sessions().iter().count(), 0, "only a server says whose a key is");
    let short = resuming_hello(&[7; 32], Some(&[1; 3]), &[], 0);
    let mut talk = Talk::new(Service::Plain, Family::V4, 8201);
    let _ = talk.bind(&machine, &short, Reason::BoundFresh);
    let asks = resuming_hello(&[], Some(&[]), &[], 0);
    let mut talk = Talk::new(Service::Plain, Family::V4, 8202);
    let _ = talk.bind(&machine, &asks, Reason::BoundFresh);
}

#[test]
fn a_key_of_several_backends_leads_to_any_that_is_there() {
    let machine = machine();
    know(&machine, KIND_TICKET_NAME, &NAME, &[0, 2]);
    let hello = resuming_hello(&[7; 32], Some(&ticket(&NAME, 1)), &[], 0);
    let visit = |port| {
        let mut talk = Talk::new(Service::Plain, Family::V4, port);
        let syn = talk.bind(&machine, &hello, Reason::BoundHit);
        (0..BACKENDS).find(|backend| backend_at(Family::V4, *backend).ip() == syn.dst).expect("a backend")
    };
    let visited: Vec<u32> = (8300..8340).map(visit).collect();
    assert!(visited.contains(&0) && visited.contains(&2) && !visited.contains(&1), "{visited:?}");
    machine.set_up(0, false).expect("writable");
    assert!((8340..8350).map(visit).all(|backend| backend == 2));
}

#[test]
fn claim_c11_an_accepted_psk_confirms_its_key() {
    let machine = machine();
    set_format(&machine, TICKET_NAMED);
    let hello = resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0);
    let accepts = server_hello_with(&[8; 32], &[(43, &[3, 4]), (41, &[0, 0])]);
    let (_, far) = answered(&machine, 8400, &hello, Reason::BoundMiss, &accepts);
    let learned = entry(&machine, KIND_TICKET_NAME, &NAME).expect("learned");
    let own = Machine::backend_id(backend_of(&far, Family::V4));
    assert_eq!((learned.backends, learned.state), ([own, 0, 0, 0], STATE_CONFIRMED));
    let (_, again) = answered(&machine, 8401, &hello, Reason::BoundHit, &accepts);
    assert_eq!(again.backend, far.backend);
}

#[test]
fn a_psk_that_is_not_accepted_teaches_nothing() {
    let machine = machine();
    set_format(&machine, TICKET_NAMED);
    let hello = resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0);
    let refuses = server_hello_with(&[8; 32], &[(43, &[3, 4])]);
    answered(&machine, 8500, &hello, Reason::BoundMiss, &refuses);
    assert_eq!(machine.dataplane().sessions().iter().count(), 0);
    know(&machine, KIND_TICKET_NAME, &NAME, &[1]);
    answered(&machine, 8501, &hello, Reason::BoundHit, &refuses);
    let kept = entry(&machine, KIND_TICKET_NAME, &NAME).expect("one ticket's end is not the key's");
    assert_eq!(kept.backends[0], Machine::backend_id(1));
}

#[test]
fn acceptance_where_tickets_carry_no_name_teaches_nothing() {
    let machine = machine();
    for (port, format) in [(8600, TICKET_UNKNOWN), (8601, TICKET_OPAQUE)] {
        set_format(&machine, format);
        let hello = resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0);
        let accepts = server_hello_with(&[8; 32], &[(43, &[3, 4]), (41, &[0, 0])]);
        answered(&machine, port, &hello, Reason::BoundMiss, &accepts);
        assert_eq!(machine.dataplane().sessions().iter().count(), 0);
    }
}

#[test]
fn a_key_that_two_servers_accept_is_both_s() {
    let machine = machine();
    set_format(&machine, TICKET_NAMED);
    know(&machine, KIND_TICKET_NAME, &NAME, &[1]);
    machine.set_up(1, false).expect("writable");
    let hello = resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0);
    let accepts = server_hello_with(&[8; 32], &[(43, &[3, 4]), (41, &[0, 0])]);
    let (_, far) = answered(&machine, 8700, &hello, Reason::BoundMiss, &accepts);
    let other = Machine::backend_id(backend_of(&far, Family::V4));
    let both = entry(&machine, KIND_TICKET_NAME, &NAME).expect("there");
    assert_eq!((both.backends, both.state), ([Machine::backend_id(1), other, 0, 0], STATE_DISCOVERED));
}

#[test]
fn claim_c11_a_ticket_issued_in_clear_is_learned() {
    let machine = machine();
    let asks = resuming_hello(&[], Some(&[]), &[], 0);
    let will_issue = server_hello_with(&[], &[(35, &[])]);
    let issued = ticket(&NAME, 9);
    for (port, format, kind, id) in [
        (8800, TICKET_NAMED, KIND_TICKET_NAME, &issued[..16]),
        (8801, TICKET_NAMED + 1, KIND_TICKET_NAME, &issued[..4]),
        (8802, TICKET_OPAQUE, KIND_TICKET, &issued[..32]),
    ] {
        set_format(&machine, format);
        let (_, far) = answered(&machine, port, &asks, Reason::BoundFresh, &will_issue);
        let taken = asks.len() as u32;
        // The certificate, then the ticket after the client's own messages.
        let at = will_issue.len() as u32;
        let middle = far.segment(ACK | PSH, at, taken, &[22, 3, 3, 0, 4, 11, 0, 0, 0]);
        let _ = machine.expect("a certificate", &middle, Reason::ToClient);
        let message = new_session_ticket(&issued);
        let last = far.segment(ACK | PSH, at + 9, taken, &message);
        let _ = machine.expect("the ticket", &last, Reason::ToClient);
        let learned = entry(&machine, kind, id).expect("learned");
        assert_eq!(learned.backends[0], Machine::backend_id(backend_of(&far, Family::V4)));
        let later = far.segment(ACK | PSH, at + 9 + message.len() as u32, taken, &[23, 3, 3, 0, 1, 0]);
        let _ = machine.expect("data", &later, Reason::ToClient);
    }
    // The ticket itself is an identifier where its key has no name.
    let hello = resuming_hello(&[7; 32], Some(&issued), &[], 0);
    machine.dataplane().sessions().remove(&key(KIND_TICKET_NAME, &NAME)).expect("writable");
    let mut talk = Talk::new(Service::Plain, Family::V6, 8810);
    let _ = talk.bind(&machine, &hello, Reason::BoundHit);
}

#[test]
fn claim_c11_a_ticket_behind_the_server_hello_is_learned() {
    let machine = machine();
    set_format(&machine, TICKET_NAMED);
    let old = ticket(&[0x11; 16], 3);
    let hello = resuming_hello(&[7; 32], Some(&old), &[], 0);
    // Abbreviated: the ID is repeated, and a new ticket, of another key, comes at once.
    let mut answer = server_hello_with(&[7; 32], &[(35, &[])]);
    answer.extend(new_session_ticket(&ticket(&NAME, 4)));
    let (_, far) = answered(&machine, 8900, &hello, Reason::BoundMiss, &answer);
    let own = Machine::backend_id(backend_of(&far, Family::V4));
    for name in [&[0x11; 16], &NAME] {
        let learned = entry(&machine, KIND_TICKET_NAME, name).expect("learned");
        assert_eq!((learned.backends[0], learned.state), (own, STATE_CONFIRMED));
    }
    assert_eq!(entry(&machine, KIND_TLS_SESSION_ID, &[7; 32]), None);
}

#[test]
fn a_ticket_is_not_looked_for_for_ever() {
    let machine = machine();
    let asks = resuming_hello(&[], Some(&[]), &[], 0);
    let will_issue = server_hello_with(&[], &[(35, &[])]);
    let (_, far) = answered(&machine, 9000, &asks, Reason::BoundFresh, &will_issue);
    let slow = |machine: &Machine| {
        let flows = machine.dataplane().flows();
        flows.iter().any(|(_, flow)| flow.flags & dispatcher_common::flow::FLAG_LEARN != 0)
    };
    assert!(slow(&machine));
    for i in 0..20 {
        let data = far.segment(
            ACK | PSH,
            will_issue.len() as u32 + i * 9,
            asks.len() as u32,
            &[22, 3, 3, 0, 4, 11, 0, 0, 0],
        );
        let _ = machine.expect("more of the handshake", &data, Reason::ToClient);
    }
    assert!(!slow(&machine), "the fast path has it again");
}

#[test]
fn a_retry_request_is_not_the_answer() {
    let machine = machine();
    set_format(&machine, TICKET_NAMED);
    let hello = resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0);
    let mut retry = server_hello_with(&[8; 32], &[(43, &[3, 4])]);
    retry[11..19].copy_from_slice(&[0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11]);
    let (talk, far) = answered(&machine, 9100, &hello, Reason::BoundMiss, &retry);
    assert_eq!(entry(&machine, KIND_TICKET_NAME, &NAME), None);
    let second = talk.segment(ACK | PSH, hello.len() as u32, retry.len() as u32, &hello);
    let _ = machine.expect("the second hello", &second, Reason::ToBackend);
    let accepts = server_hello_with(&[8; 32], &[(43, &[3, 4]), (41, &[0, 0])]);
    let answer = far.segment(ACK | PSH, retry.len() as u32, 2 * hello.len() as u32, &accepts);
    let _ = machine.expect("the answer", &answer, Reason::ToClient);
    assert!(entry(&machine, KIND_TICKET_NAME, &NAME).is_some());
}

#[test]
fn a_client_address_is_the_last_resort_of_a_service_that_asks_for_it() {
    let machine = machine();
    for family in Family::BOTH {
        machine
            .change(Service::Plain, family, |frontend| {
                frontend.affinity = [KIND_TICKET_NAME, KIND_TLS_SESSION_ID, KIND_CLIENT, 0];
            })
            .expect("a frontend");
        let hello = resuming_hello(&[], Some(&[]), &[], 0);
        let mut talk = Talk::new(Service::Plain, family, 9200);
        let first = talk.bind(&machine, &hello, Reason::BoundMiss);
        for (port, data) in (9201..).zip([&hello[..], b"GET / HTTP/1.1\r\n\r\n", &hello[..]]) {
            let mut talk = Talk::new(Service::Plain, family, port);
            let again = talk.bind(&machine, data, Reason::BoundHit);
            assert_eq!(again.dst, first.dst);
        }
        // A better identifier goes first, and the address follows it.
        let other = (0..BACKENDS).find(|one| backend_at(family, *one).ip() != first.dst).expect("another");
        know(&machine, KIND_TICKET_NAME, &NAME, &[other]);
        let resuming = resuming_hello(&[8; 32], None, &ticket(&NAME, 2), 0);
        let mut talk = Talk::new(Service::Plain, family, 9210);
        assert_eq!(talk.bind(&machine, &resuming, Reason::BoundHit).dst, backend_at(family, other).ip());
        let mut talk = Talk::new(Service::Plain, family, 9211);
        assert_eq!(talk.bind(&machine, &hello, Reason::BoundHit).dst, backend_at(family, other).ip());
    }
}
