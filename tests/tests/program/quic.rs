//! Services that know connections by QUIC connection IDs.

use std::net::SocketAddr;

use dispatcher_common::{
    flow::{FLAG_LEARN, FLAG_QUIC, Flow, FlowKey, ports_word},
    reason::Reason,
    service::BackendStats,
    session::{KIND_QUIC_CID, KIND_QUIC_SERVER, STATE_CONFIRMED, STATE_PINNED, Session, SessionKey},
};
use dispatcher_tests::{
    harness::{BACKENDS, CLIENT_MACS, Machine, Service, backend_at, client_at},
    packet::{Body, Packet, Udp},
    topology::Family,
};

use crate::machine;

/// Versions of long headers: 1, 2, one that nobody knows.
const VERSIONS: [u32; 3] = [1, 0x6b33_43cf, 0x0a0a_0a0a];

/// A long header with a few bytes of something behind it.
fn long(version: u32, dcid: &[u8], scid: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xc3];
    bytes.extend(version.to_be_bytes());
    for cid in [dcid, scid] {
        bytes.push(cid.len() as u8);
        bytes.extend(cid);
    }
    bytes.extend([0x11; 30]);
    bytes
}

/// A short header, and some bytes behind it.
fn short(dcid: &[u8]) -> Vec<u8> {
    [&[0x43], dcid, &[0x77; 25]].concat()
}

fn datagram(from: SocketAddr, to: SocketAddr, payload: Vec<u8>) -> Packet {
    let body = Udp { src: from.port(), dst: to.port(), unchecked: false, payload };
    Packet { macs: CLIENT_MACS, ..Packet::new(from.ip(), to.ip(), Body::Udp(body)) }
}

/// A client at a port.
struct Client<'m> {
    machine: &'m Machine,
    family: Family,
    at: SocketAddr,
}

impl<'m> Client<'m> {
    fn new(machine: &'m Machine, family: Family, port: u16) -> Self {
        Self { machine, family, at: client_at(family, port) }
    }

    fn packet(&self, payload: Vec<u8>) -> Packet {
        datagram(self.at, Service::Quic.at(self.family), payload)
    }

    /// Sends a datagram; returns the backend that gets it.
    fn send(&self, what: &str, payload: Vec<u8>, reason: Reason) -> u32 {
        let out = self.machine.expect(what, &self.packet(payload.clone()), reason).packet();
        let backend = (0..BACKENDS).find(|b| backend_at(self.family, *b).ip() == out.dst);
        let Body::Udp(udp) = &out.body else { panic!("{what}: no UDP but {out:?}") };
        assert_eq!(udp.payload, payload, "{what}");
        backend.unwrap_or_else(|| panic!("{what}: {} is no backend", out.dst))
    }

    /// A backend's datagram to this client.
    fn answer(&self, what: &str, backend: u32, payload: Vec<u8>) {
        let packet = datagram(backend_at(self.family, backend), self.at, payload);
        let out = self.machine.expect(what, &packet, Reason::ToClient).packet();
        let Body::Udp(udp) = &out.body else { panic!("{what}: no UDP but {out:?}") };
        let to = (SocketAddr::new(out.src, udp.src), SocketAddr::new(out.dst, udp.dst));
        assert_eq!(to, (Service::Quic.at(self.family), self.at), "{what}");
    }

    /// A handshake in which the server gives the connection ID `scid`.
    fn shake(&self, dcid: &[u8], scid: &[u8]) -> u32 {
        let backend = self.send("the Initial", long(1, dcid, b"me"), Reason::BoundL4);
        self.answer("the server's Initial", backend, long(1, b"me", scid));
        assert_eq!(self.send("the client's Handshake", long(1, scid, b"me"), Reason::ToBackend), backend);
        self.answer("the server's first data", backend, short(b"me"));
        backend
    }

    fn flow(&self) -> Flow {
        self.entry(self.at, Service::Quic.at(self.family))
    }

    fn backward(&self, backend: u32) -> Flow {
        self.entry(backend_at(self.family, backend), self.at)
    }

    fn entry(&self, src: SocketAddr, dst: SocketAddr) -> Flow {
        let ports = ports_word(src.port(), dst.port());
        let key = FlowKey { src: src.ip().into(), dst: dst.ip().into(), ports, proto: 17 };
        self.machine.dataplane().flows().get(&key).expect("reads").expect("an entry")
    }
}

fn session(machine: &Machine, kind: u8, id: &[u8]) -> Option<Session> {
    let key = SessionKey::new(Service::Quic.id(), kind, id).expect("a key");
    machine.dataplane().sessions().get(&key).expect("reads")
}

fn sessions(machine: &Machine) -> usize {
    machine.dataplane().sessions().iter().count()
}

/// Makes `quic_lb` say that configuration 1 has server IDs of two bytes, `b0`, `b1` and so on.
fn with_server_ids(machine: &Machine) {
    for family in Family::BOTH {
        machine.change(Service::Quic, family, |frontend| frontend.quic_lb[1] = 2).expect("changes");
    }
    for backend in 0..BACKENDS {
        let key = SessionKey::new(Service::Quic.id(), KIND_QUIC_SERVER, &[1, b'b', b'0' + backend as u8]);
        let session = Session { state: STATE_PINNED, ..Session::of(Machine::backend_id(backend)) };
        machine.dataplane().sessions().insert(key.expect("a key"), session).expect("inserts");
    }
}

/// A connection ID of configuration 1 with a server ID and a nonce.
fn routable(backend: u32, nonce: &[u8]) -> Vec<u8> {
    [&[0x2b, b'b', b'0' + backend as u8], nonce].concat()
}

fn stats(machine: &Machine, backend: u32) -> BackendStats {
    machine.dataplane().backend_stats(backend).expect("reads")
}

#[test]
fn initials_go_by_the_hash_of_their_connection_id() {
    let machine = machine();
    for (family, version) in Family::BOTH.into_iter().flat_map(|f| VERSIONS.map(|v| (f, v))) {
        let mut shares = [0_u32; 2];
        let base = 2000 + 200 * VERSIONS.iter().position(|one| *one == version).expect("one of them") as u16;
        for n in 0..60_u16 {
            let dcid = [&n.to_be_bytes()[..], &version.to_be_bytes(), b"initial"].concat();
            let (first, moved) =
                (Client::new(&machine, family, base + n), Client::new(&machine, family, base + 100 + n));
            let payload = long(version, &dcid, b"");
            let reason = |client: &Client<'_>| {
                let outcome = machine.run(&client.packet(payload.clone()).frame()).expect("a verdict");
                assert!([Reason::BoundL4, Reason::ToBackend].contains(&outcome.reason), "{outcome:?}");
                outcome.packet().dst
            };
            assert_eq!(reason(&first), reason(&first), "sent again");
            assert_eq!(reason(&first), reason(&moved), "sent again from another port");
            shares[usize::from(reason(&first) == backend_at(family, 1).ip())] += 1;
        }
        assert!(shares.iter().all(|share| (15..=45).contains(share)), "{shares:?}");
    }
}

#[test]
fn a_learned_id_survives_nat_rebinding() {
    let machine = machine();
    let mut used = [false; 2];
    for family in Family::BOTH {
        for n in 0..20_u16 {
            let before = Client::new(&machine, family, 4000 + n);
            let scid = [&[n as u8, family as u8], &b"-server-id"[..]].concat();
            let learned = (0..BACKENDS).map(|b| stats(&machine, b).learned).sum::<u64>();
            let backend = before.shake(&[&n.to_be_bytes()[..], b"chosen"].concat(), &scid);
            used[backend as usize] = true;
            let known = session(&machine, KIND_QUIC_CID, &scid).expect("learned");
            assert_eq!((known.state, known.backends[0]), (STATE_CONFIRMED, Machine::backend_id(backend)));
            assert_eq!((0..BACKENDS).map(|b| stats(&machine, b).learned).sum::<u64>(), learned + 1);
            assert_eq!(before.send("data", short(&scid), Reason::ToBackend), backend);
            assert_eq!(before.backward(backend).flags & FLAG_LEARN, 0, "the server's packets are plain now");

            // Another port, then a long header from a third.
            let after = Client::new(&machine, family, 5000 + n);
            assert_eq!(after.send("from another port", short(&scid), Reason::BoundHit), backend);
            assert_eq!(after.send("and again", short(&scid), Reason::ToBackend), backend);
            after.answer("the answer", backend, short(b"me"));
            let third = Client::new(&machine, family, 6000 + n);
            assert_eq!(third.send("a long header", long(1, &scid, b"me"), Reason::BoundHit), backend);
        }
    }
    assert!(used.iter().all(|used| *used), "both backends");
}

#[test]
fn a_retry_and_the_id_after_it_are_both_learned() {
    let machine = machine();
    for family in Family::BOTH {
        let client = Client::new(&machine, family, 4100);
        let [retry, real] = [[b'r', family as u8, 1, 2, 3, 4], [b's', family as u8, 1, 2, 3, 4]];
        let backend = client.send("the Initial", long(1, b"chosen-1", b"me"), Reason::BoundL4);
        client.answer("Retry", backend, long(1, b"me", &retry));
        assert_eq!(client.send("the second Initial", long(1, &retry, b"me"), Reason::ToBackend), backend);
        client.answer("the server's Initial", backend, long(1, b"me", &real));
        assert_eq!(client.send("Handshake", long(1, &real, b"me"), Reason::ToBackend), backend);
        for id in [retry, real] {
            let known = session(&machine, KIND_QUIC_CID, &id).expect("learned");
            assert_eq!(known.backends[0], Machine::backend_id(backend));
        }
    }
}

/// Datagrams with made-up sources make servers answer, but teach nothing.
#[test]
fn an_id_that_no_client_uses_is_not_noted() {
    let machine = machine();
    for n in 0..50 {
        let client = Client::new(&machine, Family::V4, 7000 + n);
        let backend = client.send("an Initial", long(1, &[n as u8; 8], b""), Reason::BoundL4);
        client.answer("the server's", backend, long(1, b"", &[&n.to_be_bytes()[..], b"server"].concat()));
    }
    assert_eq!(sessions(&machine), 0);
}

#[test]
fn only_servers_teach() {
    let machine = machine();
    for family in Family::BOTH {
        let client = Client::new(&machine, family, 4200);
        let id = [&[family as u8], &b"-mine-is-mine"[..]].concat();
        let backend = client.send("the Initial", long(1, b"chosen-2", &id), Reason::BoundL4);
        client.send("as destination too", long(1, &id, &id), Reason::ToBackend);
        client.send("in short", short(&id), Reason::ToBackend);
        // Version Negotiation has the IDs of the client's packet.
        client.answer("Version Negotiation", backend, long(0, &id, b"chosen-2"));
        client.send("the Initial again", long(1, b"chosen-2", &id), Reason::ToBackend);
        // The start of what the server gave, more than it, or one byte else.
        client.answer("the server's Initial", backend, long(1, &id, b"server's own"));
        for other in [&b"server's ow"[..], b"server's own!", b"server's owN"] {
            client.send("nearly", long(1, other, &id), Reason::ToBackend);
        }
        client.send("nearly, in short", short(b"server's owN"), Reason::ToBackend);
        assert_eq!(sessions(&machine), 0, "{family:?}");
    }
}

#[test]
fn ports_that_another_client_gets() {
    let machine = machine();
    for family in Family::BOTH {
        // Two connections at different backends.
        let mut talks: [Option<(u16, Vec<u8>)>; 2] = [None, None];
        for n in 0..30_u16 {
            let scid = [&[n as u8, family as u8], &b"-whose-port"[..]].concat();
            let backend = Client::new(&machine, family, 4300 + n).shake(&[n as u8 + 1; 8], &scid);
            talks[backend as usize].get_or_insert((4300 + n, scid));
        }
        let [(port, a), (_, b)] = talks.map(|talk| talk.expect("both backends"));
        let client = Client::new(&machine, family, port);
        let learned = sessions(&machine);

        // The NAT gives the port to the other client: its packets go where its connection is.
        assert_eq!(client.send("the other's packet", short(&b), Reason::BoundHit), 1);
        assert_eq!(client.send("the next", short(&b), Reason::ToBackend), 1);
        client.answer("its answer", 1, short(b"me"));
        // The first one is not lost (and somebody with a false source has not stolen it).
        assert_eq!(client.send("the first one's packet", short(&a), Reason::BoundHit), 0);
        assert_eq!(client.send("the next", short(&a), Reason::ToBackend), 0);
        client.answer("its answer", 0, short(b"me"));
        // An ID that nobody knows, such as one that came in a NEW_CONNECTION_ID frame, belongs to the
        // connection with which the flow began, whatever else came between.
        assert_eq!(client.send("the other's again", short(&b), Reason::BoundHit), 1);
        assert_eq!(client.send("an unknown ID", short(b"came encrypted"), Reason::BoundL4), 0);
        assert_eq!(client.send("an unknown ID again", short(b"came encrypted"), Reason::ToBackend), 0);
        assert_eq!(sessions(&machine), learned);

        // A new connection on the port is learned like any other.
        let c = [&[family as u8], &b"-third"[..]].concat();
        assert_eq!(client.send("a new Initial", long(1, b"new-one!", b"x"), Reason::ToBackend), 0);
        client.answer("the server's Initial", 0, long(1, b"x", &c));
        assert_eq!(client.send("Handshake", long(1, &c, b"x"), Reason::ToBackend), 0);
        client.answer("the server's first data", 0, short(b"x"));
        assert!(session(&machine, KIND_QUIC_CID, &c).is_some());
        assert_eq!(client.backward(0).flags & FLAG_LEARN, 0);
    }
}

#[test]
fn server_ids_in_connection_ids_lead_to_their_server() {
    let machine = machine();
    with_server_ids(&machine);
    let made = sessions(&machine);
    for family in Family::BOTH {
        for backend in 0..BACKENDS {
            let port = 4400 + backend as u16 * 10;
            let first = Client::new(&machine, family, port);
            let send = |client: &Client<'_>, nonce: &[u8], reason| {
                assert_eq!(client.send("a routable ID", short(&routable(backend, nonce)), reason), backend);
            };
            send(&first, b"0001", Reason::BoundHit);
            send(&first, b"0001", Reason::ToBackend);
            // A new ID on the same path, and migration to another path with a third.
            send(&first, b"0002", Reason::ToBackend);
            let moved = Client::new(&machine, family, port + 1);
            send(&moved, b"0003", Reason::BoundHit);
            assert_eq!(
                moved.send(
                    "another's server",
                    short(&routable((backend + 1) % BACKENDS, b"0004")),
                    Reason::BoundHit
                ),
                (backend + 1) % BACKENDS
            );
            // Long headers too; what is routable need not be learned.
            let third = Client::new(&machine, family, port + 2);
            let cid = routable(backend, b"0005");
            assert_eq!(third.send("long", long(1, &cid, b"me"), Reason::BoundHit), backend);
            third.answer("the server's Initial", backend, long(1, b"me", &cid));
            assert_eq!(third.send("long again", long(1, &cid, b"me"), Reason::ToBackend), backend);
        }
        // Not routable: too short for a nonce, no such configuration, the reserved one, no such server.
        for (n, cid) in
            [&routable(2, b"123")[..], b"\x0bb20001", b"\xebb20001", b"\x2bb90001"].iter().enumerate()
        {
            let client = Client::new(&machine, family, 4500 + n as u16);
            client.send("not routable", long(1, cid, b"me"), Reason::BoundL4);
        }
        let client = Client::new(&machine, family, 4510);
        let short_one = [&[0x43], &routable(2, b"123")[..]].concat();
        client.send("a short header without room for a nonce", short_one, Reason::BoundL4);
    }
    assert_eq!(sessions(&machine), made, "nothing is learned");
}

/// The last backend is in no table: only its IDs lead to it. When it is down they lead elsewhere.
#[test]
fn a_backend_that_is_down_is_not_used() {
    let machine = machine();
    with_server_ids(&machine);
    for family in Family::BOTH {
        let client = Client::new(&machine, family, 4600);
        let cid = short(&routable(2, b"0001"));
        assert_eq!(client.send("up", cid.clone(), Reason::BoundHit), 2);
        machine.set_up(2, false).expect("down");
        let other = Client::new(&machine, family, 4601);
        assert_ne!(other.send("down, another path", cid.clone(), Reason::BoundL4), 2);
        assert_ne!(client.send("down, a new connection", long(1, b"new-one!", b""), Reason::BoundL4), 2);
        machine.set_up(2, true).expect("up");
        assert_eq!(client.send("up again", cid, Reason::BoundHit), 2);
    }
    (0..BACKENDS).for_each(|backend| machine.set_up(backend, false).expect("down"));
    let client = Client::new(&machine, Family::V4, 4602);
    let _ = machine.expect("no backend", &client.packet(long(1, b"new-one!", b"")), Reason::NoBackend);
}

#[test]
fn malformed_headers() {
    let machine = machine();
    for family in Family::BOTH {
        let bad = |what: &str, payload: Vec<u8>, reason| {
            let client = Client::new(&machine, family, 4700);
            let _ = machine.expect(what, &client.packet(payload), reason);
        };
        let whole = long(1, &[5; 20], &[6; 20]);
        for len in 1..47 {
            bad("cut short", whole[..len].to_vec(), Reason::BadQuic);
        }
        bad("a destination ID of 21 bytes", long(1, &[5; 21], b""), Reason::BadQuic);
        bad("a source ID of 21 bytes", long(1, b"", &[5; 21]), Reason::BadQuic);
        let mut lying = long(1, b"id", b"");
        lying[5] = 255;
        bad("a destination ID that is longer than the datagram", lying.clone(), Reason::BadQuic);
        lying[5] = 2;
        lying[8] = 40;
        bad("a source ID that is longer than the datagram", lying, Reason::BadQuic);
        // Datagrams without a connection ID, and IDs that are longer than any version's, are no mistake.
        for (n, payload) in [vec![], vec![0x40], long(9, &[5; 21], b""), long(9, b"", &[5; 255][..200])]
            .into_iter()
            .enumerate()
        {
            let client = Client::new(&machine, family, 4710 + n as u16);
            let mut payload = payload;
            payload.extend([0; 200]);
            if n < 2 {
                payload.truncate(n);
            }
            let backend = client.send("no mistake", payload.clone(), Reason::BoundL4);
            assert_eq!(client.send("no mistake", payload, Reason::ToBackend), backend);
        }
        // On a flow that is there as well.
        let client = Client::new(&machine, family, 4720);
        client.shake(b"chosen-3", &[&[family as u8], &b"-server"[..]].concat());
        let _ = machine.expect("cut short", &client.packet(whole[..40].to_vec()), Reason::BadQuic);
        // UDP lengths that lie.
        for len in [0_u16, 7, 2000] {
            let mut frame = client.packet(long(1, b"chosen-3", b"")).frame();
            let at = 14 + if family == Family::V4 { 20 } else { 40 } + 4;
            frame[at..at + 2].copy_from_slice(&len.to_be_bytes());
            assert_eq!(machine.run(&frame).expect("a verdict").reason, Reason::BadTransport, "{len}");
        }
    }
    assert_eq!(sessions(&machine), 2, "one for each family's handshake");
}

/// Each byte of a header in turn, on a flow that is there and without one: one verdict, no other address than
/// a backend's, nothing learned.
#[test]
fn every_changed_byte_has_one_verdict() {
    let machine = machine();
    with_server_ids(&machine);
    for family in Family::BOTH {
        let scid = [&[family as u8], &b"-changed"[..]].concat();
        let talking = Client::new(&machine, family, 1000);
        talking.shake(b"chosen-7", &scid);
        let known = sessions(&machine);
        for (whole, head) in
            [(long(1, &scid, b"me"), 18), (short(&scid), 22), (long(9, &routable(1, b"0001"), b""), 15)]
        {
            for (at, bits) in (0..head).flat_map(|at| [0x01, 0x80, 0xff].map(|bits| (at, bits))) {
                let mut payload = whole.clone();
                payload[at] ^= bits;
                let fresh = Client::new(&machine, family, 1001 + (at * 3) as u16);
                for client in [&talking, &fresh] {
                    let outcome = machine.run(&client.packet(payload.clone()).frame()).expect("a verdict");
                    if outcome.reason != Reason::BadQuic {
                        let sent = [Reason::BoundHit, Reason::BoundL4, Reason::ToBackend];
                        assert!(
                            sent.contains(&outcome.reason),
                            "byte {at} changed by {bits:#x}: {outcome:?}"
                        );
                        let to = outcome.packet().dst;
                        assert!((0..BACKENDS).any(|b| backend_at(family, b).ip() == to), "{to}");
                    }
                }
            }
        }
        assert_eq!(sessions(&machine), known);
    }
}

/// Servers without connection IDs, or with IDs of less than four bytes, are followed by addresses and ports.
#[test]
fn short_connection_ids() {
    let machine = machine();
    let client = Client::new(&machine, Family::V4, 4800);
    let backend = client.send("the Initial", long(1, b"chosen-4", b"me"), Reason::BoundL4);
    client.answer("the server's Initial", backend, long(1, b"me", b""));
    assert_eq!(client.backward(backend).flags & FLAG_LEARN, 0, "nothing more to learn");
    assert_eq!(client.send("data", short(b"1234"), Reason::ToBackend), backend);
    assert_eq!(client.flow().flags & FLAG_QUIC, 0);
    assert_eq!(client.send("other data", short(b"5678"), Reason::ToBackend), backend);

    let client = Client::new(&machine, Family::V6, 4800);
    let backend = client.shake(b"chosen-5", b"abc");
    assert_eq!(client.flow().flags & FLAG_QUIC, 0);
    let moved = Client::new(&machine, Family::V6, 4801);
    assert_eq!(moved.send("from another port", short(b"abc"), Reason::BoundHit), backend);
    assert_eq!(moved.flow().flags & FLAG_QUIC, 0);
}

/// A server whose long header was lost does not keep its packets off the fast path for ever.
#[test]
fn a_long_header_is_not_waited_for_for_ever() {
    let machine = machine();
    for family in Family::BOTH {
        let client = Client::new(&machine, family, 4900);
        let backend = client.send("the Initial", long(1, b"chosen-6", b"me"), Reason::BoundL4);
        for n in 0..17 {
            assert_ne!(client.backward(backend).flags & FLAG_LEARN, 0, "{n}");
            client.answer("short", backend, short(b"me"));
        }
        assert_eq!(client.backward(backend).flags & FLAG_LEARN, 0);
    }
}

/// Lengths are tried from the shortest, no more than four.
#[test]
fn servers_with_ids_of_several_lengths() {
    let machine = machine();
    let ids: Vec<Vec<u8>> = (0..5).map(|n| vec![n + 1; 4 + 3 * usize::from(n)]).collect();
    let backends: Vec<u32> = (0..)
        .zip(&ids)
        .map(|(n, id)| Client::new(&machine, Family::V4, 5000 + n).shake(&[n as u8; 8], id))
        .collect();
    for (n, id) in (0..).zip(&ids) {
        let client = Client::new(&machine, Family::V4, 5100 + n);
        if n < 4 {
            assert_eq!(client.send("known", short(id), Reason::BoundHit), backends[usize::from(n)]);
        } else {
            client.send("the fifth length", short(id), Reason::BoundL4);
        }
    }
}
