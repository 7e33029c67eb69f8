//! Sessions in clear that are known by an HTTP cookie.

use dispatcher_common::{
    http::{self, TABLE},
    reason::Reason,
    session::{
        KIND_COOKIE, KIND_TICKET_NAME, KIND_TLS_SESSION_ID, STATE_CONFIRMED, STATE_PINNED, STATE_PROVISIONAL,
        Session, SessionKey,
    },
};
use dispatcher_tests::{
    harness::{BACKENDS, Far, Machine, Service, Talk, backend_at},
    hello::client_hello,
    packet::flags::{ACK, PSH},
    topology::Family,
};

/// A data path whose plain service knows sessions by the cookie "sid".
fn machine() -> Machine {
    let machine = crate::machine();
    let mut table = [0; TABLE];
    http::automaton("sid", &mut table);
    machine.dataplane().cookies().set(1, table).expect("writable");
    for family in Family::BOTH {
        machine
            .change(Service::Plain, family, |frontend| {
                frontend.affinity = [KIND_TICKET_NAME, KIND_TLS_SESSION_ID, KIND_COOKIE, 0];
                frontend.cookie = 2;
            })
            .expect("a frontend");
    }
    machine
}

fn key(value: &str) -> SessionKey {
    SessionKey::new(Service::Plain.id(), KIND_COOKIE, &http::cookie_id(value.as_bytes())).expect("16 bytes")
}

fn entry(machine: &Machine, value: &str) -> Option<Session> {
    machine.dataplane().sessions().get(&key(value)).expect("readable")
}

fn know(machine: &Machine, value: &str, backend: u32, state: u8) {
    let session = Session { state, ..Session::of(Machine::backend_id(backend)) };
    machine.dataplane().sessions().insert(key(value), session).expect("writable");
}

fn request(cookies: &str) -> Vec<u8> {
    format!("GET /cart HTTP/1.1\r\nHost: shop\r\nCookie: {cookies}\r\nAccept: */*\r\n\r\n").into_bytes()
}

fn id_of(far: &Far, family: Family) -> u32 {
    let backend = (0..BACKENDS).find(|one| backend_at(family, *one) == far.backend).expect("a backend");
    Machine::backend_id(backend)
}

#[test]
fn claim_c13_a_cookie_declares_a_request_secure_and_leads_to_its_backend() {
    let machine = machine();
    let long = "x".repeat(900);
    know(&machine, "abc", 2, STATE_CONFIRMED);
    know(&machine, &long, 2, STATE_CONFIRMED);
    let rows = [
        ("alone", request("sid=abc")),
        ("behind others", request("a=b; lang=en; sid=abc")),
        ("before others", request("sid=abc; a=b")),
        ("long", request(&format!("a=b; sid={long}; c=d"))),
        ("far behind", request(&format!("a={}; sid=abc", "y".repeat(400)))),
        ("in another case", b"POST / HTTP/1.0\ncOOKIE:sid=abc\n\n".to_vec()),
        ("after empty lines", [b"\r\n\n".as_slice(), &request("sid=abc")].concat()),
        ("before the header's end", b"GET / HTTP/1.1\r\nCookie: sid=abc;".to_vec()),
    ];
    for family in Family::BOTH {
        for (port, (what, data)) in (8000..).zip(&rows) {
            let mut talk = Talk::new(Service::Plain, family, port);
            talk.shake(&machine);
            let syn = machine.expect(what, &talk.data(0, data), Reason::BoundHit).packet();
            assert_eq!(syn.dst, backend_at(family, 2).ip(), "{what}");
        }
    }
    let hits = machine.dataplane().backend_stats(2).expect("readable");
    assert_eq!((hits.hits, hits.nonsecure), (2 * rows.len() as u64, 0));
}

#[test]
fn claim_c5_what_has_no_cookie_goes_by_the_table_each_anew() {
    let machine = machine();
    know(&machine, "abc", 2, STATE_CONFIRMED);
    let rows: [(&str, &[u8]); 8] = [
        ("no cookie", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("another one", b"GET / HTTP/1.1\r\nCookie: sidd=abc; SID=abc\r\n\r\n"),
        ("in the body", b"POST / HTTP/1.1\r\n\r\nCookie: sid=abc\r\n\r\n"),
        ("in the target", b"GET /?Cookie:sid=abc HTTP/1.1\r\n\r\n"),
        ("empty", b"GET / HTTP/1.1\r\nCookie: sid=\r\n\r\n"),
        ("not HTTP", b"SSH-2.0-OpenSSH\r\nCookie: sid=abc\r\n\r\n"),
        ("a TLS alert", &[21, 3, 3, 0, 2, 1, 0]),
        ("NULs", &[0; 64]),
    ];
    for (port, (what, data)) in (8100..).zip(rows) {
        for (family, ports) in [(Family::V4, 0), (Family::V6, 100), (Family::V4, 200)] {
            let mut talk = Talk::new(Service::Plain, family, port + ports);
            talk.shake(&machine);
            let _ = machine.expect(what, &talk.data(0, data), Reason::BoundNonsecure);
        }
    }
    assert_eq!(machine.dataplane().sessions().iter().count(), 1, "nothing was learned");
}

#[test]
fn a_request_in_parts_is_waited_for() {
    let machine = machine();
    know(&machine, "0123456789abcdef", 1, STATE_CONFIRMED);
    let data = request("a=b; sid=0123456789abcdef; c=d");
    let end = data.windows(4).position(|w| w == b"; c=").expect("there");
    for (port, cut) in (8400..).zip((1..end).step_by(3)) {
        let mut talk = Talk::new(Service::Plain, Family::V4, port);
        talk.shake(&machine);
        let (one, two) = data.split_at(cut);
        let _ = machine.expect("the first part", &talk.data(0, one), Reason::AckedPart);
        let syn = machine.expect("the rest", &talk.data(cut as u32, two), Reason::BoundHit).packet();
        assert_eq!(syn.dst, backend_at(Family::V4, 1).ip(), "cut at {cut}");
    }
}

#[test]
fn a_header_that_does_not_end_is_bound_by_what_was_seen() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V4, 8600);
    talk.shake(&machine);
    let start = b"GET / HTTP/1.1\r\nCookie: sid=";
    let _ = machine.expect("the start", &talk.data(0, start), Reason::AckedPart);
    let mut at = start.len() as u32;
    let mut reasons = Vec::new();
    while reasons.last() != Some(&Reason::BoundNonsecure) {
        let outcome = machine.run(&talk.data(at, &[b'x'; 1000]).frame()).expect("runs");
        reasons.push(outcome.reason);
        at += 1000;
        assert!(reasons.len() < 8, "{reasons:?}");
    }
    assert!(reasons.iter().rev().skip(1).all(|reason| *reason == Reason::AckedPart), "{reasons:?}");
    assert_eq!(machine.dataplane().sessions().iter().count(), 0);
}

#[test]
fn an_unknown_cookie_makes_a_provisional_entry_that_a_server_overrides() {
    let machine = machine();
    let mut talk = Talk::new(Service::Plain, Family::V4, 8700);
    let far = talk.establish(&machine, &request("sid=new"), Reason::BoundMiss);
    let own = id_of(&far, Family::V4);
    let made = entry(&machine, "new").expect("made");
    assert_eq!((made.backends[0], made.state), (own, STATE_PROVISIONAL));
    for family in Family::BOTH {
        let mut again = Talk::new(Service::Plain, family, 8701);
        let far = again.establish(&machine, &request("sid=new"), Reason::BoundHit);
        assert_eq!(id_of(&far, family), own);
    }
    // A server that sets it knows better.
    let other = (0..BACKENDS).find(|one| Machine::backend_id(*one) != own).expect("another");
    know(&machine, "login", other, STATE_CONFIRMED);
    let mut third = Talk::new(Service::Plain, Family::V4, 8702);
    let far = third.establish(&machine, &request("sid=login"), Reason::BoundHit);
    let sets = b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=new\r\n\r\n";
    let taken = request("sid=login").len() as u32;
    let _ = machine.expect("the response", &far.segment(ACK | PSH, 0, taken, sets), Reason::ToClient);
    let moved = entry(&machine, "new").expect("there");
    assert_eq!((moved.backends[0], moved.state), (Machine::backend_id(other), STATE_CONFIRMED));
}

#[test]
fn claim_c11_a_cookie_that_a_response_sets_is_the_backend_s() {
    let machine = machine();
    let plain = b"GET / HTTP/1.1\r\n\r\n";
    let rows: [(&str, &str, &[&str]); 6] = [
        ("in the first line", "HTTP/1.1 200 OK\r\nSet-Cookie: sid=a1; Path=/\r\n\r\nbody", &["a1"]),
        ("further on", "HTTP/1.1 302 Found\r\nServer: x\r\nset-cookie: sid=a2\r\n\r\n", &["a2"]),
        ("twice", "HTTP/1.1 200 OK\r\nSet-Cookie: sid=a3\r\nSet-Cookie: sid=a4\r\n\r\n", &["a3", "a4"]),
        ("after 100", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nSet-Cookie: sid=a5\r\n\r\n", &["a5"]),
        ("removed", "HTTP/1.1 200 OK\r\nSet-Cookie: sid=; Max-Age=0\r\n\r\n", &[]),
        ("in the body", "HTTP/1.1 200 OK\r\n\r\nSet-Cookie: sid=evil\r\n\r\n", &[]),
    ];
    for family in Family::BOTH {
        for (port, (what, response, learned)) in (8800..).zip(rows) {
            machine.dataplane().sessions().keys().for_each(|key| {
                machine.dataplane().sessions().remove(&key).expect("writable");
            });
            let mut talk = Talk::new(Service::Plain, family, port);
            let far = talk.establish(&machine, plain, Reason::BoundNonsecure);
            let answer = far.segment(ACK | PSH, 0, plain.len() as u32, response.as_bytes());
            let _ = machine.expect(what, &answer, Reason::ToClient);
            assert_eq!(machine.dataplane().sessions().iter().count(), learned.len(), "{what}");
            for value in learned {
                let entry = entry(&machine, value).unwrap_or_else(|| panic!("{what}: {value} is not known"));
                assert_eq!(
                    (entry.backends[0], entry.state),
                    (id_of(&far, family), STATE_CONFIRMED),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn a_response_in_parts_teaches_wherever_it_is_cut() {
    let machine = machine();
    let plain = b"GET / HTTP/1.1\r\n\r\n";
    let response = b"HTTP/1.1 200 OK\r\nA: b\r\nSet-Cookie: sid=0123456789abcdef; Path=/\r\n\r\nbody";
    for (port, cut) in (9000..).zip(4..response.len()) {
        let value = "0123456789abcdef";
        machine.dataplane().sessions().remove(&key(value)).expect("writable");
        let mut talk = Talk::new(Service::Plain, Family::V4, port);
        let far = talk.establish(&machine, plain, Reason::BoundNonsecure);
        let taken = plain.len() as u32;
        let (one, two) = response.split_at(cut);
        for (at, part) in [(0, one), (cut, two)] {
            let packet = far.segment(ACK | PSH, at as u32, taken, part);
            let _ = machine.expect("a part", &packet, Reason::ToClient);
        }
        assert!(entry(&machine, value).is_some(), "cut at {cut}");
    }
}

#[test]
fn a_later_response_on_the_connection_teaches_too() {
    let machine = machine();
    let plain = b"GET / HTTP/1.1\r\n\r\n";
    let mut talk = Talk::new(Service::Plain, Family::V4, 9200);
    let far = talk.establish(&machine, plain, Reason::BoundNonsecure);
    let taken = plain.len() as u32;
    let mut at = 0;
    let mut answer = |data: &[u8]| {
        let packet = far.segment(ACK | PSH, at, taken, data);
        at += data.len() as u32;
        let _ = machine.expect("a packet of the backend", &packet, Reason::ToClient);
    };
    answer(b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n");
    for _ in 0..30 {
        answer(&[b'x'; 1000]);
    }
    assert_eq!(machine.dataplane().sessions().iter().count(), 0);
    answer(b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=late\r\n\r\n");
    let learned = entry(&machine, "late").expect("learned");
    assert_eq!(learned.backends[0], id_of(&far, Family::V4));
}

#[test]
fn empty_lines_before_a_request_may_come_alone() {
    let machine = machine();
    know(&machine, "abc", 2, STATE_CONFIRMED);
    let mut talk = Talk::new(Service::Plain, Family::V4, 9400);
    talk.shake(&machine);
    let _ = machine.expect("an empty line", &talk.data(0, b"\r\n"), Reason::AckedPart);
    let _ = machine.expect("a request", &talk.data(2, &request("sid=abc")), Reason::BoundHit);
}

#[test]
fn made_up_cookies_push_out_nothing_that_others_said() {
    let machine = machine();
    know(&machine, "confirmed", 2, STATE_CONFIRMED);
    know(&machine, "pinned", 1, STATE_PINNED);
    let room = machine.dataplane().capacities().sessions;
    for number in 0..room as u16 * 6 {
        let mut talk = Talk::new(Service::Plain, Family::V4, 10_000 + number);
        talk.establish(&machine, &request(&format!("sid=made-up-{number}")), Reason::BoundMiss);
    }
    for (value, backend) in [("confirmed", 2), ("pinned", 1)] {
        let entry = entry(&machine, value).unwrap_or_else(|| panic!("{value} is forgotten"));
        assert_eq!(entry.backends[0], Machine::backend_id(backend));
    }
}

#[test]
fn while_its_backend_is_away_a_session_has_another_one() {
    let machine = machine();
    know(&machine, "abc", 2, STATE_CONFIRMED);
    machine.set_up(2, false).expect("away");
    let request = request("sid=abc");
    let mut ports = 9500..;
    let mut connect = |reason| {
        let mut talk = Talk::new(Service::Plain, Family::V4, ports.next().expect("a port"));
        id_of(&talk.establish(&machine, &request, reason), Family::V4)
    };
    let stand_in = connect(Reason::BoundMiss);
    for _ in 0..8 {
        assert_eq!(connect(Reason::BoundHit), stand_in);
    }
    machine.set_up(2, true).expect("back");
    assert_eq!(connect(Reason::BoundHit), Machine::backend_id(2));
    // When the one that stood in is away too, a third does.
    machine.set_up(2, false).expect("away");
    let index = (0..BACKENDS).find(|one| Machine::backend_id(*one) == stand_in).expect("a backend");
    machine.set_up(index, false).expect("away");
    let third = connect(Reason::BoundMiss);
    assert_ne!(third, stand_in);
    assert_eq!(connect(Reason::BoundHit), third);
    assert_eq!(entry(&machine, "abc").expect("there").backends[0], Machine::backend_id(2));
}

#[test]
fn a_server_takes_no_cookie_from_another_that_is_there() {
    let machine = machine();
    know(&machine, "abc", 2, STATE_CONFIRMED);
    let plain = b"GET / HTTP/1.1\r\n\r\n";
    // Also where it is a body that looks like a response, or takes the cookie away.
    let sets: [&[u8]; 2] = [
        b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=abc; Max-Age=0\r\n\r\n",
    ];
    let mut other = 0;
    for (port, sets) in (9600..).zip(sets) {
        let mut talk = Talk::new(Service::Plain, Family::V4, port);
        let far = talk.establish(&machine, plain, Reason::BoundNonsecure);
        other = id_of(&far, Family::V4);
        let answer = far.segment(ACK | PSH, 0, plain.len() as u32, sets);
        let _ = machine.expect("a response", &answer, Reason::ToClient);
        assert_eq!(entry(&machine, "abc").expect("there").backends[0], Machine::backend_id(2));
    }
    assert_ne!(other, Machine::backend_id(2), "the table leads elsewhere");
    machine.set_up(2, false).expect("away");
    let mut talk = Talk::new(Service::Plain, Family::V4, 9610);
    let far = talk.establish(&machine, plain, Reason::BoundNonsecure);
    let answer = far.segment(ACK | PSH, 0, plain.len() as u32, sets[0]);
    let _ = machine.expect("a response", &answer, Reason::ToClient);
    assert_eq!(entry(&machine, "abc").expect("there").backends[0], id_of(&far, Family::V4));
}

#[test]
fn a_pinned_cookie_stays_and_tls_is_as_before() {
    let machine = machine();
    know(&machine, "vip", 2, STATE_PINNED);
    let mut talk = Talk::new(Service::Plain, Family::V4, 9300);
    let plain = b"GET / HTTP/1.1\r\n\r\n";
    let far = talk.establish(&machine, plain, Reason::BoundNonsecure);
    let sets = b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=vip\r\n\r\n";
    let _ =
        machine.expect("a response", &far.segment(ACK | PSH, 0, plain.len() as u32, sets), Reason::ToClient);
    assert_eq!(entry(&machine, "vip").expect("there").backends[0], Machine::backend_id(2));
    let mut secure = Talk::new(Service::Plain, Family::V4, 9301);
    let _ = secure.bind(&machine, &client_hello(&[9; 32], 0), Reason::BoundMiss);
}
