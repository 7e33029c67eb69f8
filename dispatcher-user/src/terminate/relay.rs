//! Connections that are relayed: TLS passes through untouched, inside a tunnel of the backend's ready pool.
//!
//! ```text
//! accept -> first bytes -> session (ticket, ID, address) -> backend -> tunnel -> bytes both ways
//! ```
//!
//! What a connection is known by is read with the parsers of the data path, and learned from the server's answer as
//! there.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use dispatcher_common::{
    flow::{FlowKey, ports_word},
    proxy,
    session::{
        ID_MAX, KIND_TICKET, KIND_TICKET_NAME, KIND_TLS_SESSION_ID, SessionKey, TICKET_FORMATS, TICKET_HEAD,
        TICKET_NAMED,
    },
    stash::PAYLOAD_MAX,
    tls::{self, Later, Scan},
};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf, copy_bidirectional_with_sizes,
    },
    sync::watch,
    time::{Instant, sleep, timeout_at},
};

use super::{
    FAREWELL, Reached, Relay,
    connection::GRACE,
    counts::{Counts, Refusal},
    lingering::Lingering,
    session::{self, Binding},
};
use crate::{
    identify::{self, Wanted},
    state::Shared,
    tunnels::{Preference, Stream},
};

/// Within which a client must have said what it is known by.
const FIRST: Duration = Duration::from_secs(10);
/// A client that takes nothing of what there is for him for so long has gone.
const STALLED: Duration = Duration::from_secs(600);
/// How long a connection waits for a tunnel.
const PATIENCE: Duration = Duration::from_secs(5);
/// Tunnels that one connection is offered to.
const TRIES: usize = 5;
/// Bytes of an answer in which sessions are looked for: hello, certificates and ticket.
const ANSWER: usize = 32 << 10;
/// Bytes that are passed on at a time: two full records.
const PIECE: usize = 32 << 10;

/// Serves a client until either side ends it, or the service or the daemon ends.
pub(super) async fn serve(
    shared: Arc<Shared>,
    site: watch::Receiver<Arc<Relay>>,
    vip: SocketAddr,
    mut stream: Lingering,
    address: SocketAddr,
    counts: Arc<Counts>,
) {
    let relay = Arc::clone(&site.borrow());
    let name = &relay.service.name;
    stream.give_up_after(STALLED);
    let first = match timeout_at(Instant::now() + FIRST, first_bytes(&mut stream)).await {
        Ok(Ok(first)) if first.is_empty() => return,
        Ok(Ok(first)) => first,
        Ok(Err(error)) => return log::debug!("{name} {address}: {error}"),
        Err(_) => {
            counts.refuse(Refusal::Timeout);
            return log::debug!("{name} {address}: nothing to know it by within {} s", FIRST.as_secs());
        }
    };
    let mut reached = shared.terminator.reached(relay.service.id);
    let keys = reached.as_ref().map(|reached| keys(&relay, reached, address, &first)).unwrap_or_default();
    let bound = match &reached {
        Some(reached) => bind(&shared, &relay, reached, &keys, address).await,
        None => Err("no backend of this service can be reached".to_owned()),
    };
    let (mut tunnel, backend, known) = match bound {
        Ok(bound) => bound,
        Err(problem) => {
            counts.refuse(Refusal::NoBackend);
            return log::debug!("{name} {address}: {problem}");
        }
    };
    let sent = async {
        if relay.service.proxy_protocol {
            tunnel.write_all(&proxy_header(address, vip)).await?;
        }
        tunnel.write_all(&first).await?;
        tunnel.flush().await
    };
    if let Err(error) = sent.await {
        return log::debug!("{name} {address}: sending into the tunnel: {error}");
    }
    let answer = Answer { bytes: Vec::new(), offer: Offer::of(&first) };
    let learner =
        reached.take().map(|reached| Learner { shared: &shared, relay: &relay, reached, backend, known });
    let passed = AtomicU64::new(0);
    let answer = learner.map(|learner| (answer, learner));
    let mut tunnel = Learning { tunnel, answer, passed: &passed };
    let mut closing = shared.terminator.closing.subscribe();
    let mut watched = site.clone();
    let told_to_end = async {
        tokio::select! {
            _ = closing.wait_for(|closing| *closing) => {}
            () = async { while watched.changed().await.is_ok() {} } => {}
        }
        // What is under way may go on for as long as requests may.
        let end = Instant::now() + FAREWELL;
        let mut before = None;
        while Instant::now() < end && before.replace(passed.load(Relaxed)) != Some(passed.load(Relaxed)) {
            sleep(GRACE).await;
        }
    };
    tokio::select! {
        ended = copy_bidirectional_with_sizes(&mut stream, &mut tunnel, PIECE, PIECE) => {
            if let Err(error) = ended {
                log::debug!("{name} {address}: {error}");
            }
        }
        () = told_to_end => {}
    }
}

/// What a client says first: its whole hello, or what is surely none.
async fn first_bytes(stream: &mut Lingering) -> io::Result<Vec<u8>> {
    let mut first = Vec::with_capacity(2048);
    loop {
        let enough = !first.is_empty() && tls::scan_client_hello(&first[..]) != Scan::Partial;
        if enough || first.len() >= PAYLOAD_MAX || stream.read_buf(&mut first).await? == 0 {
            return Ok(first);
        }
    }
}

fn keys(relay: &Relay, reached: &Reached, client: SocketAddr, first: &[u8]) -> Vec<SessionKey> {
    let (service, ticket_formats) = (relay.service.id, reached.ticket_formats);
    let wanted = Wanted { service, affinity: &relay.kinds, ticket_formats };
    identify::keys(&wanted, client.ip(), first, None)
}

/// A tunnel to the backend of the connection's session, or to the balancer's choice; the backend; and the key by
/// which it was known.
async fn bind(
    shared: &Shared,
    relay: &Relay,
    reached: &Reached,
    keys: &[SessionKey],
    client: SocketAddr,
) -> Result<(Stream, u32, Option<SessionKey>), String> {
    let terminator = &shared.terminator;
    let sessions = shared.dataplane.sessions();
    let until = Instant::now() + PATIENCE;
    let mut avoid = Vec::new();
    for _ in 0..TRIES {
        let mut known = None;
        for key in keys {
            let found = session::find(sessions, key, reached).map_err(|error| error.to_string())?;
            let usable =
                |backend: u32| !avoid.contains(&backend) && !terminator.tunnels.load(backend).failing;
            if let Some((_, backend)) = found.filter(|(_, backend)| usable(*backend)) {
                known = Some((*key, backend));
                break;
            }
        }
        let pick = || {
            let (qos, road) = (&shared.qos, &terminator.tunnels);
            terminator.pick(qos, road, &relay.service, &reached.pool, client.ip(), &avoid)
        };
        let backend = known.map(|(_, backend)| backend).or_else(|| pick().map(|one| one.id));
        let backend = backend.ok_or("no backend takes connections")?;
        let patience = until.saturating_duration_since(Instant::now());
        let lease = match terminator.tunnels.wait(backend, Preference::Any, patience).await {
            Ok(lease) => lease,
            Err(error) => {
                log::debug!("{}: {error}", relay.service.name);
                avoid.push(backend);
                continue;
            }
        };
        let id = lease.id();
        // It may have ended this moment: then there are others.
        let Some(stream) = lease.stream().await else { continue };
        // A key's name is one for many clients: only a server's acceptance says whose it is.
        let first = keys.first().filter(|key| key.kind != KIND_TICKET_NAME);
        if let Some(key) = known.map(|(key, _)| key).as_ref().or(first) {
            let tunnel = if key.kind == KIND_TICKET_NAME { 0 } else { id };
            let binding = Binding { backend, tunnel, confirmed: false };
            let bound =
                session::bind(sessions, key, binding, &relay.service, reached, &session::Recent::default());
            // Of two racing first connections both go to one backend.
            let bound = bound.map_err(|error| error.to_string())?;
            if bound != backend && known.is_none() && !avoid.contains(&bound) {
                continue;
            }
        }
        return Ok((stream, backend, known.map(|(key, _)| key)));
    }
    Err("no tunnel to a backend was free in time".to_owned())
}

/// A PROXY header of version 2, which says whom the connection is from.
fn proxy_header(client: SocketAddr, vip: SocketAddr) -> Vec<u8> {
    let flow = FlowKey {
        src: client.ip().into(),
        dst: vip.ip().into(),
        ports: ports_word(client.port(), vip.port()),
        proto: 6,
    };
    let mut room = [0; proxy::ROOM_WORDS];
    let len = proxy::write(&flow, &mut room) as usize;
    let bytes: Vec<u8> = room.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.get(proxy::ROOM - len..).unwrap_or_default().to_vec()
}

/// What a client offers to resume.
#[derive(Default)]
struct Offer {
    session_id: Vec<u8>,
    ticket: bool,
    psk: bool,
}

impl Offer {
    fn of(first: &[u8]) -> Self {
        let Some((message, found)) = identify::client_hello(first) else { return Self::default() };
        Self {
            session_id: found.session_id.of(&message).to_vec(),
            ticket: found.ticket.len != 0,
            psk: found.psk.len != 0,
        }
    }
}

/// The start of a server's answer.
struct Answer {
    bytes: Vec<u8>,
    offer: Offer,
}

/// What an answer teaches.
#[derive(Debug, PartialEq, Eq)]
enum Taught {
    /// More of it is needed.
    More,
    /// Nothing.
    Nothing,
    /// The server resumes what the client offered, or not.
    Resumes(bool),
    /// A session ID that the server issued, or accepted.
    Id(Vec<u8>),
    /// The start of a ticket that it issued; and the ID, where it has one.
    Ticket(Vec<u8>, Vec<u8>),
}

impl Answer {
    fn teaches(&self) -> Taught {
        let bytes = &self.bytes[..];
        let mut at = 0;
        let mut id = [0; ID_MAX];
        let hello = loop {
            let Some(rest) = bytes.get(at..) else { return Taught::More };
            match tls::server_hello(rest, &mut id) {
                Some(hello) if !hello.retry => break hello,
                // A HelloRetryRequest, and the ChangeCipherSpec behind it, come before the hello that counts.
                _ => match rest {
                    [20 | 22, 3, _, high, low, ..] => {
                        let next = at + 5 + usize::from(u16::from_be_bytes([*high, *low]));
                        if next > bytes.len() {
                            return Taught::More;
                        }
                        at = next;
                    }
                    [] | [20 | 22] | [20 | 22, 3] | [20 | 22, 3, _] | [20 | 22, 3, _, _] => {
                        return Taught::More;
                    }
                    _ => return Taught::Nothing,
                },
            }
        };
        let id = id.get(..usize::from(hello.id_len)).unwrap_or_default();
        if hello.tls13 {
            return if self.offer.psk { Taught::Resumes(hello.psk) } else { Taught::Nothing };
        }
        // A server that accepts a ticket repeats the session ID that came with it (RFC 5077 section 3.4).
        if self.offer.ticket && !id.is_empty() && *id == self.offer.session_id {
            return Taught::Resumes(true);
        }
        if !hello.ticket {
            return if id.is_empty() { Taught::Nothing } else { Taught::Id(id.to_vec()) };
        }
        self.ticket(at, &hello, id)
    }

    /// Behind a hello that promises one.
    fn ticket(&self, at: usize, hello: &tls::ServerHello, id: &[u8]) -> Taught {
        let bytes = &self.bytes[..];
        let record = |at: usize| {
            let [_, _, _, high, low] = *bytes.get(at..at + 5)? else { return None };
            Some(at + 5 + usize::from(u16::from_be_bytes([high, low])))
        };
        let (mut place, mut open, mut next) = (at + hello.end, hello.open, record(at));
        while let Some(end) = next {
            match tls::new_session_ticket(bytes, place, open) {
                Later::Ticket(ticket) => {
                    let head = ticket.of(bytes).get(..TICKET_HEAD).unwrap_or_default();
                    return Taught::Ticket(head.to_vec(), id.to_vec());
                }
                Later::Encrypted => return Taught::Nothing,
                Later::Other => {}
            }
            if end > bytes.len() {
                break;
            }
            (place, open, next) = (end, false, record(end));
            if next.is_none() || bytes.len() < end + 5 + 10 {
                break;
            }
        }
        Taught::More
    }
}

/// Where what is learned of one connection goes.
struct Learner<'l> {
    shared: &'l Shared,
    relay: &'l Relay,
    reached: Arc<Reached>,
    backend: u32,
    /// The key by which the connection was bound.
    known: Option<SessionKey>,
}

impl Learner<'_> {
    fn learn(&self, taught: &Taught) {
        match taught {
            Taught::More | Taught::Nothing => {}
            Taught::Resumes(true) => {
                if let Some(key) = &self.known {
                    self.confirm(*key);
                }
            }
            Taught::Resumes(false) => {
                if self.known.is_some_and(|key| key.kind == KIND_TICKET_NAME) {
                    // It has a new key, perhaps.
                    self.shared.discovery.look_again(self.backend);
                }
            }
            Taught::Id(id) => self.key(KIND_TLS_SESSION_ID, id),
            Taught::Ticket(head, id) => {
                if !id.is_empty() {
                    self.key(KIND_TLS_SESSION_ID, id);
                }
                let known =
                    self.reached.tickets.get(&self.backend).and_then(|one| one.checked_sub(TICKET_NAMED));
                match known.and_then(|format| TICKET_FORMATS.get(format as usize)) {
                    Some((at, len)) => {
                        if let Some(name) = head.get(usize::from(*at)..usize::from(at + len)) {
                            self.key(KIND_TICKET_NAME, name);
                        }
                    }
                    None if head.len() == TICKET_HEAD => self.key(KIND_TICKET, head),
                    None => {}
                }
            }
        }
    }

    fn key(&self, kind: u8, id: &[u8]) {
        // What the service does not look for is not kept.
        let looked_for = match kind {
            KIND_TICKET => KIND_TICKET_NAME,
            other => other,
        };
        if self.relay.kinds.contains(&looked_for)
            && let Some(key) = SessionKey::new(self.relay.service.id, kind, id)
        {
            self.confirm(key);
        }
    }

    fn confirm(&self, key: SessionKey) {
        let sessions = self.shared.dataplane.sessions();
        if let Err(error) = session::confirm(sessions, &key, self.backend, self.relay.service.session_ttl) {
            log::error!("{error}");
        }
    }
}

/// A tunnel whose first bytes are looked at.
struct Learning<'l> {
    tunnel: Stream,
    answer: Option<(Answer, Learner<'l>)>,
    /// Counts how often something passed, either way.
    passed: &'l AtomicU64,
}

impl AsyncRead for Learning<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(pin!(&mut self.tunnel).poll_read(context, buffer))?;
        self.passed.fetch_add(1, Relaxed);
        let Some((answer, learner)) = &mut self.answer else { return Poll::Ready(Ok(())) };
        answer.bytes.extend_from_slice(buffer.filled().get(before..).unwrap_or_default());
        let taught = answer.teaches();
        learner.learn(&taught);
        if taught != Taught::More || answer.bytes.len() > ANSWER {
            self.answer = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Learning<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(pin!(&mut self.tunnel).poll_write(context, bytes));
        self.passed.fetch_add(1, Relaxed);
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(&mut self.tunnel).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(&mut self.tunnel).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![kind, 3, 3];
        out.extend(u16::try_from(body.len()).expect("short").to_be_bytes());
        out.extend(body);
        out
    }

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len()).expect("short").to_be_bytes();
        [&[kind], &len[1..], body].concat()
    }

    /// A ServerHello with an ID and these extensions.
    fn hello(random: u8, id: &[u8], extensions: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([random; 32]);
        body.push(id.len() as u8);
        body.extend(id);
        body.extend([0xc0, 0x2f, 0]);
        let mut all = Vec::new();
        for (kind, value) in extensions {
            all.extend(kind.to_be_bytes());
            all.extend((value.len() as u16).to_be_bytes());
            all.extend(*value);
        }
        body.extend((all.len() as u16).to_be_bytes());
        body.extend(all);
        message(2, &body)
    }

    fn taught(bytes: &[u8], offer: Offer) -> Taught {
        Answer { bytes: bytes.to_vec(), offer }.teaches()
    }

    #[test]
    fn session_ids_are_learned() {
        let bytes = record(22, &hello(1, &[7; 32], &[]));
        assert_eq!(taught(&bytes, Offer::default()), Taught::Id(vec![7; 32]));
        // Up to where the cipher suite is.
        for end in 0..bytes.len() - 5 {
            assert_eq!(taught(&bytes[..end], Offer::default()), Taught::More, "{end}");
        }
        assert_eq!(taught(&record(22, &hello(1, &[], &[])), Offer::default()), Taught::Nothing);
        assert_eq!(taught(b"HTTP/1.1 200 OK\r\n", Offer::default()), Taught::Nothing);
        assert_eq!(taught(&record(21, &[2, 40]), Offer::default()), Taught::Nothing);
    }

    #[test]
    fn tickets_are_learned_wherever_they_come() {
        let ticket = message(4, &[&[0, 0, 1, 0, 0, 40][..], &[9; 40]].concat());
        let first = hello(1, &[], &[(35, &[])]);
        let certificate = message(11, &[5; 3000]);
        let apart =
            [record(22, &first), record(22, &certificate), record(22, &ticket), record(20, &[1])].concat();
        assert_eq!(taught(&apart, Offer::default()), Taught::Ticket(vec![9; TICKET_HEAD], vec![]));
        let short = record(22, &first).len() + record(22, &certificate).len();
        for end in 0..short + 15 {
            assert_eq!(taught(&apart[..end], Offer::default()), Taught::More, "{end}");
        }
        // An abbreviated handshake has it in the hello's record.
        let joined = record(22, &[first.clone(), ticket].concat());
        assert_eq!(taught(&joined, Offer::default()), Taught::Ticket(vec![9; TICKET_HEAD], vec![]));
        let never = [record(22, &first), record(22, &certificate), record(20, &[1])].concat();
        assert_eq!(taught(&never, Offer::default()), Taught::More);
        let never = [never, record(23, &[0; 40])].concat();
        assert_eq!(taught(&never, Offer::default()), Taught::Nothing);
    }

    #[test]
    fn what_is_resumed_is_seen() {
        let tls13: &[(u16, &[u8])] = &[(43, &[3, 4])];
        let resumed: &[(u16, &[u8])] = &[(43, &[3, 4]), (41, &[0, 0])];
        let offer = || Offer { session_id: vec![7; 32], ticket: false, psk: true };
        assert_eq!(taught(&record(22, &hello(1, &[7; 32], resumed)), offer()), Taught::Resumes(true));
        assert_eq!(taught(&record(22, &hello(1, &[7; 32], tls13)), offer()), Taught::Resumes(false));
        assert_eq!(taught(&record(22, &hello(1, &[7; 32], tls13)), Offer::default()), Taught::Nothing);
        let ticket = || Offer { session_id: vec![7; 32], ticket: true, psk: false };
        assert_eq!(taught(&record(22, &hello(1, &[7; 32], &[])), ticket()), Taught::Resumes(true));
    }

    #[test]
    fn random_answers_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..20_000 {
            let bytes: Vec<u8> = (0..round % 120)
                .map(|at| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if at < 6 { [22, 3, 3, 0, 80, 2][at] } else { (state >> 56) as u8 }
                })
                .collect();
            taught(&bytes, Offer { session_id: vec![], ticket: true, psk: true });
        }
    }
}
