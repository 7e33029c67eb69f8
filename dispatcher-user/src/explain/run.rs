//! The packets of a capture through the program, in their order.
//!
//! The program answers a SYN itself, with a sequence number of its own. The client of the capture has
//! talked to another server, so what it says of that server's numbers is moved to the program's. What the
//! server of the capture has said is given to the program as the chosen backend's answer.

use std::net::SocketAddr;

use dispatcher_common::{
    event::{EVENT_LEARNED, Event},
    flow::is_closed,
    proxy::ROOM,
    reason::{Kind, Reason},
    session::SessionKey,
    tcp::{ACK, Options, SYN},
};

use super::{
    Error,
    capture::Packet,
    flows::{Flow, Flows, Who},
    frame::{Parsed, Sum, Tcp},
    lookup::{self, Tried},
    machine::{Bound, Machine, Outcome},
};
use crate::config::{Miss, Mode};

/// Payload and options of a segment where nobody tells.
const MSS: usize = 1460;
/// Window scale of a SYN that is made.
const WSCALE: u8 = 7;

/// What became of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    /// The program's reason.
    Reason(Reason),
    /// The capture holds only the start of the packet.
    Cut,
    /// The packet depends on others that are not there.
    NotRun,
    /// No test run takes a frame of this length.
    BadLength,
}

impl Why {
    /// Stable name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Reason(reason) => reason.name(),
            Self::Cut => "cut_in_capture",
            Self::NotRun => "not_run",
            Self::BadLength => "bad_length",
        }
    }

    /// One sentence for people.
    pub(super) fn description(self) -> &'static str {
        match self {
            Self::Reason(reason) => reason.description(),
            Self::Cut => "The capture holds only a part of the packet: capture with `tcpdump -s 0`.",
            Self::NotRun => "The packet depends on what did not happen here; the notes say what.",
            Self::BadLength => "The frame is shorter than an Ethernet header or too long for a test run.",
        }
    }

    /// What happens to the packet.
    pub(super) fn verdict(self) -> &'static str {
        match self {
            Self::Reason(reason) => match reason.kind() {
                Kind::Forward => "forward",
                Kind::Pass => "pass",
                Kind::Consume => "consume",
                Kind::Drop => "drop",
            },
            Self::Cut | Self::NotRun | Self::BadLength => "unknown",
        }
    }

    /// How much it says about where a flow went.
    fn weight(self) -> u8 {
        match self {
            Self::Reason(reason) if binds(reason) => 3,
            Self::Reason(
                Reason::ResetClient | Reason::ResetNoBackend | Reason::ResetBackend | Reason::TimeExceeded,
            ) => 2,
            Self::Reason(reason) if reason.kind() == Kind::Drop => 2,
            Self::Reason(_) => 1,
            Self::Cut | Self::BadLength => 2,
            Self::NotRun => 0,
        }
    }
}

/// True for a reason with which a flow is bound.
pub(super) fn binds(reason: Reason) -> bool {
    use Reason::{BoundFresh, BoundHit, BoundL4, BoundMiss, BoundNonsecure};
    [BoundHit, BoundMiss, BoundFresh, BoundNonsecure, BoundL4].contains(&reason)
}

/// What became of a flow.
#[derive(Debug, Default)]
pub(super) struct Talk {
    /// Each run with the packet's index in the capture; packets that were made have none.
    pub(super) results: Vec<(Option<usize>, Why)>,
    /// What to know.
    pub(super) notes: Vec<&'static str>,
    /// Name of the backend; of a QUIC client that has come to know others on the same port: of the first.
    pub(super) backend: Option<String>,
    /// The identifiers that were looked up, in their order.
    pub(super) tried: Vec<Tried>,
    /// Of these: the one that decided, else the first that the program had.
    pub(super) identifier: Option<SessionKey>,
    /// The identifiers in what the client says.
    offered: Option<Vec<SessionKey>>,
    /// What the server's answer taught.
    pub(super) learned: Vec<SessionKey>,
    stage: Stage,
    /// Payload and options that fit a segment.
    mss: usize,
    /// Our sequence number and timestamp in the SYN-ACK.
    cookie: (u32, u32),
    /// The captured server's.
    server: Option<(u32, u32)>,
    client_spoke: bool,
    answered: bool,
    held: Vec<usize>,
}

#[derive(Clone, Copy, Default, Debug)]
enum Stage {
    /// Nothing was sent.
    #[default]
    New,
    /// The program has answered the SYN.
    Answered,
    /// There is a backend.
    Bound(Ends),
    /// The rest depends on what is not there.
    Stopped,
}

/// Addresses toward a backend.
#[derive(Clone, Copy, Debug)]
struct Ends {
    source: SocketAddr,
    backend: SocketAddr,
}

impl From<&Bound> for Ends {
    fn from(bound: &Bound) -> Self {
        Self { source: bound.src, backend: bound.dst }
    }
}

impl Talk {
    /// Why the flow went where it went: what bound it, else what ended it, else what came last.
    pub(super) fn why(&self) -> Why {
        let most = self.results.iter().map(|(_, why)| why.weight()).max().unwrap_or(0);
        let mut fitting = self.results.iter().map(|(_, why)| *why).filter(|why| why.weight() == most);
        if most > 1 { fitting.next() } else { fitting.next_back() }.unwrap_or(Why::NotRun)
    }

    fn note(&mut self, note: &'static str) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn stop(&mut self, note: &'static str) {
        self.note(note);
        self.stage = Stage::Stopped;
    }
}

/// A capture on its way through the program.
pub(super) struct Runner<'r> {
    packets: &'r [Packet],
    flows: &'r Flows,
    machine: &'r mut Machine,
    talks: Vec<Talk>,
}

/// One packet with all that is known of it.
#[derive(Clone, Copy)]
struct One<'r> {
    index: usize,
    flow: usize,
    frame: &'r [u8],
    parsed: &'r Parsed,
    client: SocketAddr,
    vip: SocketAddr,
    mode: Mode,
}

impl<'r> Runner<'r> {
    /// Runs all packets; a talk for each flow.
    pub(super) fn run(
        packets: &'r [Packet],
        flows: &'r Flows,
        machine: &'r mut Machine,
    ) -> Result<Vec<Talk>, Error> {
        let talks = flows.flows.iter().map(|_| Talk { mss: MSS, ..Talk::default() }).collect();
        let mut runner = Self { packets, flows, machine, talks };
        for index in 0..packets.len() {
            runner.packet(index)?;
        }
        for talk in &mut runner.talks {
            for index in std::mem::take(&mut talk.held) {
                talk.results.push((Some(index), Why::NotRun));
                talk.note("what the server sent has nowhere to go, because the flow was not bound");
            }
        }
        Ok(runner.talks)
    }

    fn packet(&mut self, index: usize) -> Result<(), Error> {
        let packets = self.packets;
        let flow = self.flows.of_packet[index];
        let frame = packets[index].frame.as_slice();
        let Flow { who, service, .. } = &self.flows.flows[flow];
        let service = service.and_then(|service| self.machine.service(service));
        let (Some(parsed), Some(service), Who::Ports { client, server, .. }) =
            (&self.flows.parsed[index], service, who)
        else {
            return self.as_it_is(flow, index, frame);
        };
        let (mode, waits) = (service.mode, service.miss == Miss::Daemon);
        if mode.is_local() {
            return self.served_by_daemon(flow, index, parsed.src == *client);
        }
        let one = One { index, flow, frame, parsed, client: *client, vip: *server, mode };
        let talk = &mut self.talks[flow];
        if waits {
            talk.note("miss = \"daemon\": the daemon would pick; here the table does, as when it is gone");
        }
        if !parsed.whole {
            talk.results.push((Some(index), Why::Cut));
            let first = parsed.src == *client && !matches!(talk.stage, Stage::Bound(_));
            if first && mode == Mode::Passthrough {
                talk.stop("the client's first data are cut in the capture: capture with `tcpdump -s 0`");
            }
            return Ok(());
        }
        match (mode, parsed.src == *client) {
            (Mode::L4, true) => self.direct(one),
            (Mode::Passthrough | Mode::Terminate | Mode::Relay, true) => self.client_says(one),
            (_, false) => self.server_says(one),
        }
    }

    /// A packet that no service is asked about.
    fn as_it_is(&mut self, flow: usize, index: usize, frame: &[u8]) -> Result<(), Error> {
        let whole = self.flows.parsed[index].as_ref().map_or(!self.packets[index].cut, |one| one.whole);
        let why = if whole { self.machine.run(frame)?.why() } else { Why::Cut };
        self.talks[flow].results.push((Some(index), why));
        Ok(())
    }

    /// A packet of a service that the daemon itself serves: what it answers never comes in at an interface.
    fn served_by_daemon(&mut self, flow: usize, index: usize, from_client: bool) -> Result<(), Error> {
        self.talks[flow].note(
            "the daemon serves this service itself, and picks a backend for each request or connection: \
             `dispatcherctl sessions` and the access log tell which",
        );
        if from_client {
            return self.as_it_is(flow, index, &self.packets[index].frame);
        }
        self.talks[flow].results.push((Some(index), Why::NotRun));
        Ok(())
    }

    /// A client's packet to an l4 service.
    fn direct(&mut self, one: One<'_>) -> Result<(), Error> {
        if matches!(self.talks[one.flow].stage, Stage::New) {
            self.end_earlier(&one)?;
        }
        let before = self.look(&one)?;
        for frame in self.pieces(&one, one.frame.to_vec()) {
            let (why, _) = self.step(one.flow, Some(one.index), &frame)?;
            if let Why::Reason(reason) = why
                && binds(reason)
            {
                self.looked_up(&one, &before, reason)?;
                self.bound(&one)?;
            }
            // A QUIC client uses the ID that its server gave.
            self.learn(one.flow);
        }
        Ok(())
    }

    /// A client's segment to a passthrough service.
    fn client_says(&mut self, one: One<'_>) -> Result<(), Error> {
        let tcp = &one.parsed.tcp;
        if matches!(self.talks[one.flow].stage, Stage::New) {
            self.end_earlier(&one)?;
            if !tcp.is_syn() {
                self.talks[one.flow]
                    .note("no SYN in the capture: what comes first is taken as the connection's start");
                let syn = Tcp { seq: tcp.seq.wrapping_sub(1), ack: 0, flags: SYN, options: Options::NONE };
                let options = first_options(one.parsed, (tcp.options.tsval.wrapping_sub(1), 0));
                let (frame, _) = one.parsed.segment(one.frame, &syn, &options);
                self.syn(&one, None, &frame)?;
            }
        }
        if tcp.is_syn() {
            if !one.parsed.payload.is_empty() {
                self.talks[one.flow].note(
                    "the SYN carries data (TCP Fast Open); the program leaves them out, and the client would send them again",
                );
            }
            return self.syn(&one, Some(one.index), one.frame);
        }
        let talk = &mut self.talks[one.flow];
        if matches!(talk.stage, Stage::Stopped | Stage::New) {
            talk.results.push((Some(one.index), Why::NotRun));
            return Ok(());
        }
        talk.client_spoke |= !one.parsed.payload.is_empty();
        let captured = self.flows.flows[one.flow].syn_ack.and_then(|index| self.flows.parsed[index].as_ref());
        let talk = &mut self.talks[one.flow];
        let (isn, clock) = *talk.server.get_or_insert_with(|| match captured {
            Some(syn_ack) => (syn_ack.tcp.seq, syn_ack.tcp.options.tsval),
            None => (tcp.ack.wrapping_sub(1), tcp.options.tsecr),
        });
        let mut frame = one.frame.to_vec();
        one.parsed.shift(&mut frame, talk.cookie.0.wrapping_sub(isn), talk.cookie.1.wrapping_sub(clock));
        let before = self.look(&one)?;
        for frame in self.pieces(&one, frame) {
            let (why, _) = self.step(one.flow, Some(one.index), &frame)?;
            if let Why::Reason(reason) = why
                && binds(reason)
            {
                self.looked_up(&one, &before, reason)?;
                self.bound(&one)?;
            }
        }
        Ok(())
    }

    /// The identifiers that will be looked up if this packet binds its flow.
    fn look(&mut self, one: &One<'_>) -> Result<Vec<Tried>, Error> {
        let bound = matches!(self.talks[one.flow].stage, Stage::Bound(_));
        if bound || one.parsed.payload.is_empty() {
            return Ok(Vec::new());
        }
        if self.talks[one.flow].offered.is_none() || one.mode == Mode::L4 {
            let frontend = self.machine.frontend(one.vip, one.parsed.proto)?;
            self.talks[one.flow].offered = Some(match frontend {
                Some(frontend) if one.mode == Mode::Passthrough => {
                    let stream = self.flows.stream(&self.flows.flows[one.flow], self.packets, one.client);
                    lookup::of_stream(self.machine, &frontend, one.client.ip(), &stream)?
                }
                Some(frontend) => lookup::of_datagram(&frontend, one.parsed.payload(one.frame)),
                None => Vec::new(),
            });
        }
        let offered = self.talks[one.flow].offered.iter().flatten();
        offered.map(|key| Ok(Tried { key: *key, session: self.machine.session(key)? })).collect()
    }

    /// Notes what was looked up for a flow that was bound now: up to the identifier whose entry was used.
    fn looked_up(&mut self, one: &One<'_>, before: &[Tried], reason: Reason) -> Result<(), Error> {
        let mut tried = Vec::new();
        let mut decided = None;
        for was in before {
            tried.push(*was);
            let hits = self.machine.session(&was.key)?.map(|session| session.hits);
            if reason == Reason::BoundHit && was.session.is_some_and(|was| Some(was.hits) != hits) {
                decided = Some(was.key);
                break;
            }
        }
        let talk = &mut self.talks[one.flow];
        // What bound the flow first is told.
        if talk.backend.is_some() {
            return Ok(());
        }
        talk.identifier = decided.or_else(|| tried.first().map(|one| one.key));
        talk.tried = tried;
        Ok(())
    }

    /// Runs a SYN and takes note of the answer.
    fn syn(&mut self, one: &One<'_>, number: Option<usize>, frame: &[u8]) -> Result<(), Error> {
        let (why, out) = self.step(one.flow, number, frame)?;
        let talk = &mut self.talks[one.flow];
        match (why, super::frame::parse(&out, false)) {
            (Why::Reason(Reason::SynAnswered), Some(answer)) => {
                if !matches!(talk.stage, Stage::Bound(_)) {
                    talk.stage = Stage::Answered;
                    talk.cookie = (answer.tcp.seq, answer.tcp.options.tsval);
                    talk.mss = usize::from(answer.tcp.options.mss);
                }
            }
            _ if matches!(talk.stage, Stage::Bound(_)) => {}
            _ => talk.stop("the SYN got no SYN-ACK, so nothing follows"),
        }
        Ok(())
    }

    /// An earlier connection of the same ports that did not end in the capture would take a new one's SYN.
    fn end_earlier(&mut self, one: &One<'_>) -> Result<(), Error> {
        let earlier = self.machine.bound(one.client, one.vip, one.parsed.proto)?;
        if earlier.is_some_and(|earlier| !is_closed(earlier.entry.flags)) {
            self.talks[one.flow]
                .note("an earlier connection of these ports does not end in the capture; taken as ended");
        }
        if earlier.is_some() {
            self.machine.forget(one.client, one.vip, one.parsed.proto)?;
        }
        Ok(())
    }

    /// A flow has a backend: it gets the server's SYN-ACK, and what the server has sent meanwhile.
    fn bound(&mut self, one: &One<'_>) -> Result<(), Error> {
        let Some(bound) = self.machine.bound(one.client, one.vip, one.parsed.proto)? else { return Ok(()) };
        let talk = &mut self.talks[one.flow];
        if talk.backend.is_none() {
            talk.backend = self.machine.backend(&bound);
        }
        talk.stage = Stage::Bound(Ends::from(&bound));
        if one.mode == Mode::Passthrough && !talk.answered {
            talk.answered = true;
            let slot = self.machine.slot(&bound)?;
            // What the program noted counts, should it have read less than there is in the capture.
            if slot.session.len > 0 && !talk.tried.iter().any(|one| one.key == slot.session) {
                talk.identifier = Some(slot.session);
                talk.tried = vec![Tried { key: slot.session, session: None }];
            }
            // A PROXY header takes the numbers before the client's first.
            let header = (ROOM as u32).wrapping_sub(slot.start);
            let ack = slot.isn.wrapping_add(1).wrapping_sub(header);
            let captured = self.flows.flows[one.flow].syn_ack;
            talk.held.retain(|index| Some(*index) != captured);
            let (isn, clock) = talk.server.unwrap_or_default();
            let parsed = captured.and_then(|index| Some((index, self.flows.parsed[index].as_ref()?)));
            let (number, mut frame, parsed) = match parsed {
                Some((index, parsed)) => (Some(index), self.packets[index].frame.clone(), parsed.clone()),
                None => {
                    let tcp = Tcp { seq: isn, ack, flags: SYN | ACK, options: Options::NONE };
                    let options = first_options(one.parsed, (clock, one.parsed.tcp.options.tsval));
                    let (frame, parsed) = one.parsed.segment(one.frame, &tcp, &options);
                    (None, frame, parsed)
                }
            };
            parsed.set_ack(&mut frame, ack);
            parsed.set_ends(&mut frame, bound.dst, bound.src);
            let parsed = self.mended(one.flow, &parsed, false);
            parsed.seal(&mut frame);
            self.step(one.flow, number, &frame)?;
        }
        // The ring holds what misses tell the daemon too: it must not fill up.
        self.learn(one.flow);
        for index in std::mem::take(&mut self.talks[one.flow].held) {
            self.packet(index)?;
        }
        Ok(())
    }

    /// A server's packet, as the backend's.
    fn server_says(&mut self, one: One<'_>) -> Result<(), Error> {
        let flow = &self.flows.flows[one.flow];
        let talk = &mut self.talks[one.flow];
        let ends = match talk.stage {
            Stage::Bound(ends) => ends,
            Stage::Stopped => {
                talk.results.push((Some(one.index), Why::NotRun));
                return Ok(());
            }
            Stage::New | Stage::Answered => {
                talk.held.push(one.index);
                let first = !talk.client_spoke && !one.parsed.payload.is_empty() && flow.isn.is_some();
                if first && one.mode == Mode::Passthrough {
                    talk.stop(
                        "the server speaks first, and a passthrough service waits for the client: it needs mode = \"l4\"",
                    );
                }
                return Ok(());
            }
        };
        if talk.answered && flow.syn_ack == Some(one.index) {
            return Ok(());
        }
        let mut frame = one.frame.to_vec();
        one.parsed.set_ends(&mut frame, ends.backend, ends.source);
        for frame in self.pieces(&one, frame) {
            self.step(one.flow, Some(one.index), &frame)?;
            self.learn(one.flow);
        }
        Ok(())
    }

    fn learn(&mut self, flow: usize) {
        for Event { kind, session, .. } in self.machine.events() {
            let talk = &mut self.talks[flow];
            if kind == EVENT_LEARNED {
                talk.learned.push(session);
            } else {
                talk.note("the backend did not accept a ticket whose key is known as its own");
            }
        }
    }

    /// A changed frame with good checksums, or as several if it is larger than any segment on the wire.
    fn pieces(&mut self, one: &One<'_>, mut frame: Vec<u8>) -> Vec<Vec<u8>> {
        let mss = self.talks[one.flow].mss;
        let large = one.parsed.proto == super::frame::TCP && one.parsed.segment_len() > mss;
        let parsed = self.mended(one.flow, one.parsed, large);
        if large {
            self.talks[one.flow]
                .note("segments that the network card would cut or has merged are cut to the MSS");
            return parsed.split(&frame, mss);
        }
        parsed.seal(&mut frame);
        vec![frame]
    }

    /// What stands where, with a checksum that is to be mended if it is the hardware's to finish.
    fn mended(&mut self, flow: usize, parsed: &Parsed, large: bool) -> Parsed {
        let offloaded = parsed.sum == Sum::Unfinished || self.flows.is_offloaded(parsed.src.ip());
        let mut parsed = parsed.clone();
        if parsed.sum != Sum::Right && (large || offloaded) {
            parsed.sum = Sum::Right;
            if !large {
                self.talks[flow].note("unfinished checksums (the network card's to write) are finished");
            }
        }
        parsed
    }

    /// One run, noted.
    fn step(&mut self, flow: usize, number: Option<usize>, frame: &[u8]) -> Result<(Why, Vec<u8>), Error> {
        let outcome = self.machine.run(frame)?;
        let why = outcome.why();
        self.talks[flow].results.push((number, why));
        Ok((why, if let Outcome::Ran(_, out) = outcome { out } else { Vec::new() }))
    }
}

impl Outcome {
    fn why(&self) -> Why {
        match self {
            Self::Ran(reason, _) => Why::Reason(*reason),
            Self::BadLength => Why::BadLength,
        }
    }
}

/// Options of a SYN or SYN-ACK that is made: those that stacks send, with timestamps if the client has them.
fn first_options(client: &Parsed, (tsval, tsecr): (u32, u32)) -> Vec<u8> {
    let mss = if client.src.is_ipv4() { MSS } else { MSS - 20 } as u16;
    let mut out = vec![2, 4];
    out.extend(mss.to_be_bytes());
    if client.tcp.options.ts != 0 {
        out.extend([4, 2, 8, 10]);
        out.extend(tsval.to_be_bytes());
        out.extend(tsecr.to_be_bytes());
    } else {
        out.extend([1, 1, 4, 2]);
    }
    out.extend([1, 3, 3, WSCALE]);
    out
}
