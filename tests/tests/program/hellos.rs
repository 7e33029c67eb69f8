//! Hellos as they are, and as they should not be: whatever comes ends in one counted reason, and leads to
//! a session's backend only by an identifier that is whole and in its place.

use dispatcher_common::{
    reason::Reason,
    session::{KIND_TICKET_NAME, STATE_CONFIRMED, Session, SessionKey},
};
use dispatcher_tests::{
    harness::{Far, Machine, Service, Talk, backend_at},
    hello::{
        client_hello, extension, hello_of, in_records, pre_shared_key, resuming_hello, server_hello_with,
        usual_extensions,
    },
    packet::flags::{ACK, PSH},
    topology::Family,
};

use crate::machine;

/// A session ID and the name of a ticket key that lead to the backend [`HOME`].
const KNOWN: [u8; 32] = [0x4b; 32];
const NAME: [u8; 16] = [0x6e; 16];
/// A backend that is in no table: only a session leads there.
const HOME: u32 = 2;

fn ticket(name: &[u8]) -> Vec<u8> {
    let mut ticket = name.to_vec();
    ticket.resize(192, 0x77);
    ticket
}

fn machine_that_knows() -> Machine {
    let machine = machine();
    let home = Session { state: STATE_CONFIRMED, ..Session::of(Machine::backend_id(HOME)) };
    machine.know(Service::Plain, &KNOWN, home).expect("a session");
    let name = SessionKey::new(Service::Plain.id(), KIND_TICKET_NAME, &NAME).expect("16 bytes");
    machine.dataplane().sessions().insert(name, home).expect("a key");
    machine
}

/// Sends each of these as the first data of connections of both families.
fn check<T: AsRef<str>>(first_port: u16, rows: &[(T, Vec<u8>, Reason)]) {
    let machine = machine_that_knows();
    for family in Family::BOTH {
        for (port, (what, data, reason)) in (first_port..).zip(rows) {
            let mut talk = Talk::new(Service::Plain, family, port);
            talk.shake(&machine);
            let answer = machine.expect(what.as_ref(), &talk.data(0, data), *reason).packet();
            let home = answer.dst == backend_at(family, HOME).ip();
            assert_eq!(home, *reason == Reason::BoundHit, "{}: only an identifier leads home", what.as_ref());
            // What was learned of an unknown identifier is no part of the next row.
            let strangers: Vec<_> = machine.dataplane().sessions().iter().collect();
            for (key, session) in strangers {
                if !session.has(Machine::backend_id(HOME)) {
                    machine.dataplane().sessions().remove(&key).expect("removed");
                }
            }
        }
    }
}

/// A hello with a PSK of the known key behind these extensions.
fn with_psk(before: Vec<(u16, Vec<u8>)>) -> Vec<u8> {
    let extensions = [before, vec![(41, pre_shared_key(&ticket(&NAME)))]].concat();
    hello_of(&[], &[0x13, 1], &extensions)
}

#[test]
fn what_browsers_put_into_hellos_hides_nothing() {
    use Reason::{BoundFresh, BoundHit, BoundMiss};
    let grease = |extra: Vec<(u16, Vec<u8>)>| {
        let mut all = vec![(0x4a4a, vec![])];
        all.extend(usual_extensions());
        // groups and versions with GREASE (RFC 8701), an empty key share of a GREASE group
        all.extend([
            (10, vec![0, 6, 0xda, 0xda, 0x11, 0xec, 0, 29]),
            (43, vec![6, 0x1a, 0x1a, 3, 4, 3, 3]),
            (51, vec![0, 5, 0xda, 0xda, 0, 1, 0]),
            (0xeaea, vec![0]),
        ]);
        all.extend(extra);
        all
    };
    let suites = [0x2a, 0x2a, 0x13, 1, 0xc0, 0x2b];
    let psk = |identity: &[u8]| (41, pre_shared_key(&ticket(identity)));
    // Encrypted ClientHello: outer, KDF and AEAD, config, encapsulated key, payload.
    let ech = (0xfe0d, [&[0, 0, 1, 0, 1, 9, 0, 32][..], &[0xec; 32], &[0, 200], &[0xec; 200]].concat());
    let share = (51, [&[4, 196, 0x11, 0xec, 4, 192][..], &[0x51; 1216]].concat());
    check(
        10_000,
        &[
            ("GREASE and a PSK", hello_of(&[7; 32], &suites, &grease(vec![psk(&NAME)])), BoundHit),
            ("GREASE and a session ID", hello_of(&KNOWN, &suites, &grease(vec![])), BoundHit),
            ("GREASE alone", hello_of(&[], &suites, &grease(vec![])), BoundFresh),
            ("a GREASE PSK", hello_of(&[7; 32], &suites, &grease(vec![psk(&[0x12; 16])])), BoundMiss),
            ("ECH", hello_of(&[], &suites, &grease(vec![ech.clone()])), BoundFresh),
            ("ECH and a PSK", hello_of(&[7; 32], &suites, &grease(vec![ech.clone(), psk(&NAME)])), BoundHit),
            ("ECH and a ticket", with_psk(grease(vec![(35, ticket(&[0x12; 16])), ech])), BoundHit),
            ("a post-quantum share", with_psk(vec![share]), BoundHit),
            (
                "an empty SessionTicket extension and a session ID",
                resuming_hello(&KNOWN, Some(&[]), &[], 0),
                BoundHit,
            ),
            (
                "an extension of every other kind",
                with_psk((44..80).map(|kind| (kind, vec![9; 3])).collect()),
                BoundHit,
            ),
            ("no extensions at all", without_extensions(&KNOWN), BoundHit),
        ],
    );
}

/// A hello that ends behind the compression methods, as before RFC 3546.
fn without_extensions(session_id: &[u8]) -> Vec<u8> {
    let mut hello = hello_of(session_id, &[0, 0x2f], &[]);
    hello.truncate(hello.len() - 2);
    set(&mut hello, 3, -2);
    set(&mut hello, 7, -2);
    hello
}

#[test]
fn session_ids_have_up_to_32_bytes() {
    let machine = machine();
    let home = Session { state: STATE_CONFIRMED, ..Session::of(Machine::backend_id(HOME)) };
    for len in 0..=32_u8 {
        let id: Vec<u8> = (0..len).map(|i| i ^ 0x55).collect();
        let reason = if len == 0 { Reason::BoundFresh } else { Reason::BoundHit };
        if len > 0 {
            machine.know(Service::Plain, &id, home).expect("a session");
        }
        let mut talk = Talk::new(Service::Plain, Family::BOTH[usize::from(len % 2)], 10_100 + u16::from(len));
        let _ = talk.bind(&machine, &client_hello(&id, 0), reason);
    }
}

#[test]
fn extensions_count_once_and_only_where_they_stand() {
    use Reason::{BoundFresh, BoundHit, BoundMiss};
    let (known, other) = (ticket(&NAME), ticket(&[0x12; 16]));
    let hello = |extensions: &[(u16, &[u8])]| {
        let list: Vec<(u16, Vec<u8>)> =
            extensions.iter().map(|(kind, body)| (*kind, body.to_vec())).collect();
        hello_of(&[], &[0x13, 1], &list)
    };
    let (psk, other_psk) = (pre_shared_key(&known), pre_shared_key(&other));
    let empty = |count: u16| (0..count).map(|kind| (0x5000 + kind, vec![])).collect::<Vec<_>>();
    check(
        10_200,
        &[
            ("two tickets, the first known", hello(&[(35, &known), (35, &other)]), BoundHit),
            ("two tickets, the second known", hello(&[(35, &other), (35, &known)]), BoundMiss),
            ("two PSKs, the first known", hello(&[(41, &psk), (41, &other_psk)]), BoundHit),
            ("two PSKs, the second known", hello(&[(41, &other_psk), (41, &psk)]), BoundMiss),
            // The server will refuse it (RFC 8446 section 4.2.11); which one does not matter.
            ("a PSK that is not last", hello(&[(41, &psk), (23, &[])]), BoundHit),
            ("a ticket inside another extension", hello(&[(0x5000, &extension(35, &known))]), BoundFresh),
            ("a PSK inside the padding", hello(&[(21, &extension(41, &psk))]), BoundFresh),
            ("a ticket inside a ticket", hello(&[(35, &extension(35, &known))]), BoundMiss),
            (
                "the known name not at the start of a ticket",
                hello(&[(35, &[&[1][..], &known].concat())]),
                BoundMiss,
            ),
            ("a ticket shorter than a name", hello(&[(35, &NAME[..15])]), BoundFresh),
            ("a PSK extension without content", hello(&[(41, &[])]), BoundFresh),
            ("as many extensions as are looked at", with_psk(empty(39)), BoundHit),
            ("one extension more", with_psk(empty(40)), BoundFresh),
        ],
    );
}

#[test]
fn hellos_of_ssl_2_and_other_bytes_are_not_secure() {
    // A hello of SSL 2 (RFC 5246 appendix E.2): length, type, version, lengths of suites, ID and challenge.
    let ssl2 = |version: u8, id: &[u8]| {
        let rest = [&[1, 3, version, 0, 3, 0, id.len() as u8, 0, 16, 0, 0, 0x2f][..], id, &[9; 16]].concat();
        [&[0x80, rest.len() as u8][..], &rest].concat()
    };
    let hello = resuming_hello(&KNOWN, None, &ticket(&NAME), 0);
    let changed = |at: usize, byte: u8| {
        let mut bytes = hello.clone();
        bytes[at] = byte;
        bytes
    };
    let many: Vec<usize> = (1..=16).collect();
    let rows: Vec<(String, Vec<u8>, Reason)> = [
        ("SSL 2 of SSL 3", ssl2(0, &[])),
        ("SSL 2 of TLS 1.0", ssl2(1, &[])),
        ("SSL 2 of TLS 1.2 with a session ID", ssl2(3, &KNOWN)),
        ("SSL 2 with padding", [&[0x00, 0x2c, 0][..], &ssl2(1, &KNOWN)[2..]].concat()),
        ("another kind of record", changed(0, 23)),
        ("another version of records", changed(1, 2)),
        ("another message", changed(5, 2)),
        ("a message of 16 MB", changed(6, 0xff)),
        ("a message that is too short for a hello", [&[22, 3, 1, 0, 38, 1, 0, 0, 34][..], &[0; 34]].concat()),
        (
            "an empty record",
            changed(4, 0).into_iter().enumerate().map(|(i, b)| if i == 3 { 0 } else { b }).collect(),
        ),
        ("an empty record inside", in_records(&hello, &[20, 20])),
        ("17 records", in_records(&hello, &many)),
        ("a record of another kind inside", {
            let mut bytes = in_records(&hello, &[20]);
            bytes[25] = 21;
            bytes
        }),
    ]
    .into_iter()
    .map(|(what, data)| (what.to_owned(), data, Reason::BoundNonsecure))
    .collect();
    check(10_300, &rows);
    check(10_340, &[("16 records", in_records(&hello, &many[1..]), Reason::BoundHit)]);
}

/// Adds to two bytes of big-endian length.
fn set(bytes: &mut [u8], at: usize, by: i32) {
    let value = i32::from(u16::from_be_bytes([bytes[at], bytes[at + 1]])) + by;
    bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
}

/// A hello with this field, two bytes, changed by so much.
fn lying(hello: &[u8], at: usize, by: i32) -> Vec<u8> {
    let mut bytes = hello.to_vec();
    set(&mut bytes, at, by);
    bytes
}

#[test]
fn lengths_that_lie_hide_identifiers_and_make_none() {
    use Reason::{AckedPart, BoundFresh, BoundHit, BoundMiss, BoundNonsecure};
    // Offsets in a hello of one record: its length, the message's (low bytes), the session ID's (one byte,
    // so with the last byte of the random value before it).
    const RECORD: usize = 3;
    const MESSAGE: usize = 7;
    const ID: usize = 42;
    let id = client_hello(&KNOWN, 0);
    let psk = resuming_hello(&[], None, &ticket(&NAME), 0);
    let tls12 = resuming_hello(&[], Some(&ticket(&NAME)), &[], 0);
    let suites = |hello: &[u8]| ID + 2 + usize::from(hello[ID + 1]);
    let place = |hello: &[u8], start: &[u8]| {
        hello.windows(start.len()).position(|window| window == start).expect("it is there")
    };
    // Two of the four bytes of suites are between their length and that of the compression methods.
    let methods = |hello: &[u8]| suites(hello) + 2 + 3;
    let all = |hello: &[u8]| suites(hello) + 2 + 4 + 2;
    let host = place(&psk, &[0, 0, 0, 17]) + 2;
    let own = place(&psk, &[0, 41, 0, 233 + 2]) + 2;
    let sealed = place(&tls12, &[0, 35, 0, 192]) + 2;
    let rows: Vec<(String, Vec<u8>, Reason)> = [
        ("record", &id, RECORD, [(1, BoundHit), (-1, BoundNonsecure)]),
        ("record", &psk, RECORD, [(1, BoundHit), (-1, BoundNonsecure)]),
        ("message", &id, MESSAGE, [(1, AckedPart), (-1, BoundHit)]),
        ("message", &psk, MESSAGE, [(1, AckedPart), (-1, BoundHit)]),
        ("session ID", &id, ID, [(1, BoundFresh), (-1, BoundMiss)]),
        ("session ID", &id, ID, [(223, BoundFresh), (-32, BoundFresh)]),
        // A byte of the suites' length becomes an ID, and the rest stands elsewhere.
        ("session ID", &psk, ID, [(1, BoundMiss), (2, BoundMiss)]),
        ("suites", &id, suites(&id), [(1, BoundHit), (-1, BoundHit)]),
        // With one more, the null method reads as an empty list of methods, and the rest stands where it stood.
        ("suites", &psk, suites(&psk), [(1, BoundHit), (-1, BoundFresh)]),
        // Offsets are not counted modulo anything: nothing behind the end is read at its start.
        ("suites", &psk, suites(&psk), [(0x4000, BoundFresh), (0xc000, BoundFresh)]),
        ("compression", &id, methods(&id), [(1, BoundHit), (-1, BoundHit)]),
        ("compression", &psk, methods(&psk), [(1, BoundFresh), (-1, BoundFresh)]),
        ("extensions", &psk, all(&psk), [(1, BoundHit), (-1, BoundFresh)]),
        ("extensions", &tls12, all(&tls12), [(1, BoundHit), (-1, BoundHit)]),
        ("host name", &psk, host, [(1, BoundFresh), (-1, BoundFresh)]),
        ("PSK", &psk, own, [(1, BoundFresh), (-1, BoundHit)]),
        ("PSK", &psk, own, [(-60, BoundFresh), (0x4000, BoundFresh)]),
        // The name is whole, whatever follows it.
        ("identities", &psk, own + 2, [(1, BoundHit), (-1, BoundHit)]),
        ("identity", &psk, own + 4, [(1, BoundHit), (-1, BoundHit)]),
        ("identity", &psk, own + 4, [(1000, BoundFresh), (-192, BoundFresh)]),
        ("identity", &psk, own + 4, [(-176, BoundHit), (-177, BoundFresh)]),
        ("ticket", &tls12, sealed, [(1, BoundHit), (-1, BoundHit)]),
        ("ticket", &tls12, sealed, [(0x4000, BoundFresh), (-177, BoundFresh)]),
    ]
    .into_iter()
    .flat_map(|(field, hello, at, lies)| {
        lies.map(|(by, reason)| (format!("length of {field} {by:+}"), lying(hello, at, by), reason))
    })
    .collect();
    check(10_400, &rows);
    // Two lies that agree: all extensions and the first of them are said to be 16384 bytes longer.
    let both = lying(&lying(&psk, all(&psk), 0x4000), host, 0x4000 - 17);
    check(10_500, &[("extensions and host name", both, BoundFresh)]);
}

#[test]
fn a_hello_may_be_cut_anywhere_in_its_first_bytes() {
    let machine = machine_that_knows();
    let hello = resuming_hello(&[7; 32], None, &ticket(&NAME), 0);
    let records = in_records(&hello, &[1, 2, 3]);
    for (first, hello) in [(10_600, &hello), (10_700, &records)] {
        for family in Family::BOTH {
            for cut in 1..=16_u16 {
                let mut talk = Talk::new(Service::Plain, family, first + cut);
                talk.shake(&machine);
                let (one, two) = hello.split_at(usize::from(cut));
                let _ = machine.expect("the first bytes", &talk.data(0, one), Reason::AckedPart);
                let syn = machine.expect("the rest", &talk.data(cut.into(), two), Reason::BoundHit).packet();
                assert_eq!(syn.dst, backend_at(family, HOME).ip(), "cut at {cut}");
            }
        }
    }
}

#[test]
fn a_hello_that_never_ends_is_bound_by_what_was_seen() {
    let machine = machine_that_knows();
    let hello = client_hello(&KNOWN, 0);
    let endless = lying(&hello, 7, 0x1000);
    // Bytes in a piece, and what 32 pieces say.
    let rows = [
        ("bytes", &hello, 1, Reason::BoundFresh),
        ("half a session ID", &endless, 2, Reason::BoundFresh),
        ("a whole session ID", &endless, 3, Reason::BoundHit),
        ("everything but the end", &endless, hello.len() / 32, Reason::BoundHit),
    ];
    for family in Family::BOTH {
        for (port, (what, hello, size, reason)) in (10_800..).zip(rows) {
            let mut talk = Talk::new(Service::Plain, family, port);
            talk.shake(&machine);
            for (number, piece) in (0..32).zip(hello.chunks(size)) {
                let expected = if number < 31 { Reason::AckedPart } else { reason };
                let packet = talk.data(number * size as u32, piece);
                let _ = machine.expect(&format!("{what}, piece {number}"), &packet, expected);
            }
        }
    }
}

#[test]
fn the_second_hello_goes_where_the_first_went() {
    let machine = machine_that_knows();
    let first = resuming_hello(&[8; 32], None, &ticket(&[0x12; 16]), 0);
    let mut retry = server_hello_with(&[8; 32], &[(43, &[3, 4])]);
    retry[11..19].copy_from_slice(&[0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11]);
    // Longer than a segment, and with the name of another backend's key.
    let second = resuming_hello(&[8; 32], None, &ticket(&NAME), 1300);
    for family in Family::BOTH {
        let mut talk = Talk::new(Service::Plain, family, 10_900);
        let far: Far = talk.establish(&machine, &first, Reason::BoundMiss);
        assert_ne!(far.backend, backend_at(family, HOME));
        let answer = far.segment(ACK | PSH, 0, first.len() as u32, &retry);
        let _ = machine.expect("HelloRetryRequest", &answer, Reason::ToClient);
        let (one, two) = second.split_at(1000);
        for (offset, part) in [(0, one), (one.len(), two)] {
            let offset = first.len() + offset;
            let packet = talk.segment(ACK | PSH, offset as u32, retry.len() as u32, part);
            let sent = machine.expect("the second hello", &packet, Reason::ToBackend).packet();
            assert_eq!(sent.dst, far.backend.ip());
        }
    }
}

#[test]
fn mangled_hellos_end_in_one_reason_and_reach_home_only_by_its_name() {
    const TURNS: u16 = 1500;
    let machine = machine_that_knows();
    let hellos = [
        resuming_hello(&KNOWN, Some(&ticket(&NAME)), &ticket(&NAME), 40),
        in_records(&resuming_hello(&[], None, &ticket(&NAME), 0), &[3, 9, 60]),
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut seen = std::collections::BTreeSet::new();
    for turn in 0..TURNS {
        let mut bytes = hellos[usize::from(turn % 2)].clone();
        for _ in 0..=next() % 4 {
            // Mostly in the headers, where lengths are.
            let span = if next() % 3 == 0 { bytes.len() } else { 160 };
            let at = next() as usize % span.min(bytes.len());
            bytes[at] = next() as u8;
        }
        let family = Family::BOTH[usize::from(turn / 2 % 2)];
        // The same ports again and again, so that there is a slot: the flow is forgotten, the numbers differ.
        for (flow, _) in machine.dataplane().flows().iter().collect::<Vec<_>>() {
            machine.dataplane().flows().remove(&flow).expect("forgotten");
        }
        let mut talk = Talk::new(Service::Plain, family, 11_000);
        talk.isn = u32::from(turn) << 16;
        talk.shake(&machine);
        let outcome = machine.run(&talk.data(0, &bytes).frame()).expect("one reason");
        seen.insert(outcome.reason.name());
        let fine = [
            Reason::BoundHit,
            Reason::BoundMiss,
            Reason::BoundFresh,
            Reason::BoundNonsecure,
            Reason::AckedPart,
        ];
        assert!(fine.contains(&outcome.reason), "{outcome:?} of {bytes:02x?}");
        let holds = |id: &[u8]| bytes.windows(id.len()).any(|window| window == id);
        if outcome.packet().dst == backend_at(family, HOME).ip() {
            assert_eq!(outcome.reason, Reason::BoundHit);
            assert!(holds(&NAME) || holds(&KNOWN), "{bytes:02x?}");
        }
    }
    assert_eq!(seen.len(), 5, "the mangling is mild enough to reach everything: {seen:?}");
}
