//! `fastpath`: nanoseconds a packet by `BPF_PROG_RUN`, without any interface.
//!
//! A repeated run keeps what the program made of the frame. So a wrapper restores the frame for the
//! next flow and calls the program under test. Its cost is taken off: a figure is
//! wrapper and program, less wrapper and `floor_tx`, plus `floor_tx` alone.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, RingBuf},
    programs::Xdp,
};
use dispatcher_common::{
    abi, cookie,
    flow::{
        FLAG_L4, FLAG_QUIC, FLAG_TO_BACKEND, Flow, FlowKey, Link, MARK_SECURE, ports_swapped, ports_word,
    },
    http,
    reason::Reason,
    service::{BACKEND_UP, Backend, Frontend, MODE_PASSTHROUGH, VipKey, endpoint_index, stable_id},
    session::{KIND_COOKIE, KIND_TICKET_NAME, KIND_TLS_SESSION_ID, STATE_CONFIRMED, Session, SessionKey},
    stash::Slot,
};
use dispatcher_user::dataplane::{
    Capacities, Dataplane, Limits, interface_index, monotonic_ns, monotonic_seconds, object, test_run,
};

use crate::{
    bench::report::{Goal, Report, Row, median},
    hello,
    packet::{Body, Packet, Tcp, TcpOption, Udp, flags},
};

/// The object with the floor programs and wrappers; empty in a build without `cargo xtask build`.
pub(super) fn bench_object() -> &'static [u8] {
    // The ELF reader wants the alignment of a 64-bit header.
    #[repr(C, align(8))]
    struct Aligned<T: ?Sized>(T);
    static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/bench.bpf")));
    &OBJECT.0
}

/// Pairs of runs with and without limits, a round.
const PAIRS: usize = 8;
/// Numbers of flows that are measured.
const COUNTS: [u32; 3] = [1, 1024, 65_536];
/// Frames of one batch of first data; each binds a connection of its own.
const HELLOS: usize = 2048;
/// Longest frame of `restore_each`; four bytes of length go before it.
pub(super) const EACH_MAX: usize = 1020;
/// Length of a ClientHello: what OpenSSL pads to.
pub(super) const HELLO_LEN: usize = 517;

const PORT: u16 = 443;
/// Of flows that remember a QUIC connection ID.
const QUIC_PORT: u16 = 4433;
/// What they remember.
const CID: [u8; 4] = [1, 2, 3, 4];
const SERVICE: &str = "bench";
const BACKENDS: u32 = 3;
const TABLE: u32 = 1021;
const OUR_WSCALE: u8 = 9;
const BACKEND_WSCALE: u8 = 7;
/// A backend's sequence number less ours, and the same of timestamps.
const SEQ_DELTA: u32 = 0x9abc_def0;
const TS_DELTA: u32 = 0x1357_9bdf;

const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// How much is measured.
#[derive(Clone, Copy)]
struct Effort {
    rounds: usize,
    repeats: u32,
    /// Batches of [`HELLOS`] frames a round.
    batches: usize,
}

/// Measures the data path of this build, or another object of the same layout; with `only`, the cases whose name has it.
pub fn run(quick: bool, other: Option<&Path>, only: Option<&str>) -> Result<Report> {
    let effort = if quick {
        Effort { rounds: 5, repeats: 200_000, batches: 4 }
    } else {
        // 15 * 34 * 2048 is 1.04 million first segments.
        Effort { rounds: 15, repeats: 1_000_000, batches: 34 }
    };
    let other = other.map(|path| fs::read(path).with_context(|| format!("reading {}", path.display())));
    let other = other.transpose()?;
    let mut bench = Bench::new(other.as_deref().unwrap_or(object()))?;
    let mut cases = bench.cases()?;
    if let Some(only) = only {
        cases.retain(|case| case.name.contains(only));
        ensure!(!cases.is_empty(), "no case's name has \"{only}\" in it");
    }
    for case in &cases {
        bench
            .verify(case)
            .with_context(|| format!("{}: nothing is measured of a wrong verdict", case.name))?;
    }
    let mut samples: Vec<Sample> = cases.iter().map(|_| Sample::default()).collect();
    let mut floor = Vec::new();
    for round in 0..effort.rounds {
        floor.push(bench.floor(&cases, effort.repeats)?);
        for step in 0..cases.len() {
            let at = (round + step) % cases.len();
            if let (Some(case), Some(sample)) = (cases.get(at), samples.get_mut(at)) {
                bench.measure(case, sample, effort)?;
            }
        }
    }
    let mut report = report(&cases, &samples, &floor);
    if only.is_some() {
        report.goals.retain(|goal| goal.value.is_some());
    }
    Ok(report)
}

/// What runs on the frames of a case.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    Dispatcher,
    /// With records of the dispatcher's size.
    FloorLru,
    /// With a table that also holds the other direction, as the dispatcher's does.
    FloorLruBoth,
    /// With the shortest records that will do.
    FloorLruSmall,
}

/// What the tables know of a hello.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Nothing,
    /// Its session ID.
    Id,
    /// The name of the key that sealed its PSK.
    TicketKey,
    /// It is a request in clear, with a cookie.
    Cookie,
}

/// The backends have a bandwidth, bits a second: 40 Gbit/s, more than one CPU makes of short frames.
const LIMITED: &str = "backends with a bandwidth";
const BANDWIDTH: u64 = 40_000_000_000;
const HELLO: &str = "ClientHello, session known";
const HELLO_PSK: &str = "ClientHello with PSK, key known";
/// Name and value of a cookie.
const COOKIE: (&str, &str) = ("JSESSIONID", "F1A3C5E7092B4D6F8091A2B3C4D5E6F7");
/// Name of a ticket key.
const TICKET_KEY: [u8; 16] = [0x7e; 16];

/// Words of a flow's record.
const RECORD: usize = size_of::<Flow>() / 4;

impl Subject {
    const FLOORS: [Self; 3] = [Self::FloorLru, Self::FloorLruBoth, Self::FloorLruSmall];

    fn name(self) -> &'static str {
        match self {
            Self::Dispatcher => "dispatcher",
            Self::FloorLru => "floor-lru",
            Self::FloorLruBoth => "floor-lru-both",
            Self::FloorLruSmall => "floor-lru-small",
        }
    }
}

/// One line of the table.
struct Case {
    name: String,
    subject: Subject,
    load: Load,
    verdict: u32,
    reason: Option<Reason>,
    /// Number of flows of the `floor-lru` that it is compared with.
    floor: u32,
    /// The backends have limits, which the frames do not reach.
    limited: bool,
}

/// The frames of a case.
enum Load {
    /// One frame, with these differences between flows (none: it is always the same).
    Template { frame: Vec<u8>, patches: Vec<[u32; 4]> },
    /// Frames that each open a connection.
    Hellos { first_client: u32, known: Known },
}

/// Figures of a case, one a round, in nanoseconds.
#[derive(Default)]
struct Sample {
    with_program: Vec<f64>,
    with_floor: Vec<f64>,
    /// Of cases with a limit: what it adds to the same packets without one.
    added: Vec<f64>,
}

/// Both objects, loaded.
struct Bench {
    dataplane: Dataplane,
    _ebpf: Ebpf,
    control: Array<MapData, [u32; 4]>,
    template: Array<MapData, [u8; 128]>,
    patches: Array<MapData, [u32; 4]>,
    frames: Array<MapData, [u8; EACH_MAX + 4]>,
    callee: Array<MapData, u32>,
    floor: HashMap<MapData, FlowKey, [u32; RECORD]>,
    floor_both: HashMap<MapData, FlowKey, [u32; RECORD]>,
    floor_small: HashMap<MapData, FlowKey, [u32; 4]>,
    events: RingBuf<MapData>,
    dispatcher: OwnedFd,
    floor_tx: OwnedFd,
    floor_lru: OwnedFd,
    floor_lru_both: OwnedFd,
    floor_lru_small: OwnedFd,
    restore: OwnedFd,
    restore_each: OwnedFd,
    loopback: u32,
    /// A stash slot that nobody has used.
    empty: Box<Slot>,
    /// Connections of [`Load::Hellos`] that do not meet in the stash: client number and slot.
    hellos: Vec<(u32, u32)>,
}

impl Bench {
    fn new(object: &[u8]) -> Result<Self> {
        ensure!(!bench_object().is_empty(), "built without the BPF objects; build with `cargo xtask build`");
        let dataplane = Dataplane::load(object, &Capacities::default())?;
        let loopback = interface_index("lo").context("no loopback interface")?;
        let mut ebpf = Ebpf::load(bench_object()).context("loading the floor programs")?;
        let [floor_tx, floor_lru, floor_lru_both, floor_lru_small, restore, restore_each] =
            ["floor_tx", "floor_lru", "floor_lru_both", "floor_lru_small", "restore", "restore_each"]
                .map(|name| load(&mut ebpf, name));
        let Some(Map::ProgramArray(callee)) = ebpf.take_map("CALLEE") else { bail!("no map CALLEE") };
        let mut bench = Self {
            control: array(&mut ebpf, "CONTROL")?,
            template: array(&mut ebpf, "TEMPLATE")?,
            patches: array(&mut ebpf, "PATCHES")?,
            frames: array(&mut ebpf, "FRAMES")?,
            // A program array takes descriptors by number, also those of another object.
            callee: Array::try_from(Map::Array(callee))?,
            floor: HashMap::try_from(ebpf.take_map("FLOOR").context("no map FLOOR")?)?,
            floor_both: HashMap::try_from(ebpf.take_map("FLOOR_BOTH").context("no map FLOOR_BOTH")?)?,
            events: dataplane.take_events().context("the ring of events is taken")?,
            dispatcher: dataplane.program_fd(abi::PROGRAM)?,
            floor_small: HashMap::try_from(ebpf.take_map("FLOOR_SMALL").context("no map FLOOR_SMALL")?)?,
            floor_tx: floor_tx?,
            floor_lru: floor_lru?,
            floor_lru_both: floor_lru_both?,
            floor_lru_small: floor_lru_small?,
            restore: restore?,
            restore_each: restore_each?,
            empty: Box::new(dataplane.stash().get(0)?),
            hellos: Vec::new(),
            loopback,
            dataplane,
            _ebpf: ebpf,
        };
        bench.fill()?;
        Ok(bench)
    }

    /// A service with three backends, and the flows of all cases.
    fn fill(&mut self) -> Result<()> {
        let d = &self.dataplane;
        for replay in 0..abi::REPLAY_MAPS {
            d.set_replay(replay, self.loopback)?;
        }
        for backend in 0..BACKENDS {
            d.backend_index().insert(backend_id(backend), backend)?;
            for v4 in [true, false] {
                let at = backend_at(v4, backend);
                let endpoint = Backend {
                    addr: at.ip().into(),
                    port: at.port().to_be(),
                    flags: BACKEND_UP,
                    id: backend_id(backend),
                    link: self.link(backend as u8),
                    mtu: 1500,
                    ..Backend::default()
                };
                d.backends().set(endpoint_index(backend, v4), endpoint)?;
            }
        }
        let mut automaton = [0; http::TABLE];
        http::automaton(COOKIE.0, &mut automaton);
        d.cookies().set(0, automaton)?;
        for entry in 0..TABLE {
            d.lb_table().set(entry, entry % BACKENDS)?;
        }
        for (index, v4) in [(0, true), (1, false)] {
            let frontend = Frontend {
                addr: vip(v4).ip().into(),
                port: PORT.to_be(),
                proto: 6,
                mode: MODE_PASSTHROUGH,
                service: stable_id(SERVICE),
                table_len: TABLE,
                wscale: OUR_WSCALE,
                mss: 1440,
                session_ttl: 300,
                provisional_ttl: 10,
                ticket_formats: 1,
                affinity: [KIND_TICKET_NAME, KIND_TLS_SESSION_ID, KIND_COOKIE, 0],
                cookie: 1,
                ..Frontend::default()
            };
            d.frontends().set(index, frontend)?;
            d.publish(VipKey::new(vip(v4).ip(), PORT, 6), index)?;
        }
        d.update_globals(|globals| {
            for v4 in [true, false] {
                globals.filter_add(vip(v4).ip());
                (0..BACKENDS).for_each(|backend| globals.filter_add(backend_at(v4, backend).ip()));
            }
        })?;
        let most = COUNTS.into_iter().max().unwrap_or(1);
        for number in 0..most {
            self.connect(true, number)?;
            let hop = [0x0100_0002, 0x0002_0000, 0x0200_0000, self.loopback];
            let (client, backend) = (client(true, number), backend_at(true, number % BACKENDS));
            let mut record = [0; RECORD];
            record[..hop.len()].copy_from_slice(&hop);
            self.floor.insert(key(client, vip(true)), record, 0)?;
            self.floor_small.insert(key(client, vip(true)), hop, 0)?;
            self.floor_both.insert(key(client, vip(true)), record, 0)?;
            self.floor_both.insert(key(backend, client), record, 0)?;
        }
        self.connect(false, 0)?;
        self.connect_udp(PORT, 0)?;
        self.connect_udp(QUIC_PORT, FLAG_QUIC)
    }

    /// The entry toward the backend of a flow over UDP.
    fn connect_udp(&self, port: u16, flag: u16) -> Result<()> {
        let (client, backend) = (client(true, 0), backend_at(true, 0));
        let (old, new) = (key(client, SocketAddr::new(vip(true).ip(), port)), key(client, backend));
        let mut flow = Flow {
            flags: FLAG_TO_BACKEND | FLAG_L4 | flag,
            generation: self.dataplane.globals().generation as u16,
            ports: new.ports,
            seq_add: u32::from_ne_bytes(CID),
            created: monotonic_seconds(),
            ..Flow::default()
        };
        flow.set_link(&self.link(0));
        flow.set_src(&new.src);
        flow.set_dst(&new.dst);
        Ok(self.dataplane.flows().insert(FlowKey { proto: 17, ..old }, flow)?)
    }

    /// The entries of an established connection, as the data path makes them.
    fn connect(&self, v4: bool, number: u32) -> Result<()> {
        let (client, vip, backend) = (client(v4, number), vip(v4), backend_at(v4, number % BACKENDS));
        let generation = self.dataplane.globals().generation as u16;
        let base = Flow {
            generation,
            marks: MARK_SECURE,
            frontend: u16::from(!v4),
            backend: number % BACKENDS,
            created: monotonic_seconds(),
            ..Flow::default()
        };
        let entries = [
            // To the backend: the client's window scale is the backend's too.
            (key(client, vip), key(client, backend), FLAG_TO_BACKEND, 0, (number % BACKENDS) as u8),
            // To the client: what the backend scales by 7 we promised to scale by 9.
            (key(backend, client), key(vip, client), 0, BACKEND_WSCALE as i8 - OUR_WSCALE as i8, 0xc0),
        ];
        for (old, new, flag, win_shift, host) in entries {
            let (to_client, to_backend) = (flag == 0, flag != 0);
            let mut flow = Flow {
                flags: base.flags | flag,
                ports: new.ports,
                seq_add: if to_client { SEQ_DELTA.wrapping_neg() } else { SEQ_DELTA },
                ts_add: if to_backend { TS_DELTA } else { TS_DELTA.wrapping_neg() },
                ..base
            };
            flow.set_link(&self.link(host));
            flow.set_src(&new.src);
            flow.set_dst(&new.dst);
            flow.set_win_shift(win_shift);
            self.dataplane.flows().insert(old, flow)?;
        }
        Ok(())
    }

    fn link(&self, host: u8) -> Link {
        Link {
            ifindex: self.loopback,
            macs: [0x0000_0002, 0x0002_0000 | u32::from(host) << 8, 0x0100_0000],
            vlans: [0; 2],
        }
    }

    fn cases(&mut self) -> Result<Vec<Case>> {
        let forwarded = |name: String, frame: Packet, patches, reason, floor| Case {
            name,
            subject: Subject::Dispatcher,
            load: Load::Template { frame: frame.frame(), patches },
            verdict: XDP_REDIRECT,
            reason: Some(reason),
            floor,
            limited: false,
        };
        let mut cases = Vec::new();
        for count in COUNTS {
            let to_backend = || patches(count, |n| from_client(true, n, false));
            let flows = flows(count);
            for (name, subject) in [
                (flows.clone(), Subject::FloorLru),
                (format!("{flows}, table holds both directions"), Subject::FloorLruBoth),
                (format!("{flows}, shortest records"), Subject::FloorLruSmall),
            ] {
                let frame = from_client(true, 0, false).frame();
                cases.push(Case {
                    name,
                    subject,
                    load: Load::Template { frame, patches: to_backend() },
                    verdict: XDP_TX,
                    reason: None,
                    floor: count,
                    limited: false,
                });
            }
            cases.push(forwarded(
                format!("established, to backend, {flows}"),
                from_client(true, 0, false),
                to_backend(),
                Reason::ToBackend,
                count,
            ));
            cases.push(forwarded(
                format!("established, to client, {flows}"),
                from_backend(true, 0),
                patches(count, |n| from_backend(true, n)),
                Reason::ToClient,
                count,
            ));
            let ways = [
                (
                    (|v4, n| from_client(v4, n, false)) as fn(bool, u32) -> Packet,
                    "to backend",
                    Reason::ToBackend,
                ),
                (from_backend, "to client", Reason::ToClient),
            ];
            for (frame, way, reason) in ways {
                let name = format!("established, {way}, {LIMITED}, {flows}");
                let all = patches(count, |n| frame(true, n));
                cases.push(Case { limited: true, ..forwarded(name, frame(true, 0), all, reason, count) });
            }
            cases.push(forwarded(
                format!("established, to backend, SACK block, {flows}"),
                from_client(true, 0, true),
                patches(count, |n| from_client(true, n, true)),
                Reason::ToBackend,
                count,
            ));
        }
        let v6 = |what: &str, frame, reason| {
            forwarded(format!("established, {what}, IPv6, {}", flows(1)), frame, Vec::new(), reason, 1)
        };
        cases.push(v6("to backend", from_client(false, 0, false), Reason::ToBackend));
        cases.push(v6("to client", from_backend(false, 0), Reason::ToClient));
        for (what, port) in [("UDP", PORT), ("QUIC", QUIC_PORT)] {
            cases.push(forwarded(
                format!("established, to backend, {what}, {}", flows(1)),
                datagram(port),
                Vec::new(),
                Reason::ToBackend,
                1,
            ));
        }
        cases.push(forwarded("SYN -> SYN-ACK".to_owned(), syn(), Vec::new(), Reason::SynAnswered, 1));
        cases.push(Case {
            verdict: XDP_PASS,
            ..forwarded("neither VIP nor backend".to_owned(), stranger(), Vec::new(), Reason::NotOurs, 1)
        });
        for (name, known, first_client, reason) in [
            (HELLO, Known::Id, 0x2_0000, Reason::BoundHit),
            ("ClientHello, session not known", Known::Nothing, 0x4_0000, Reason::BoundMiss),
            (HELLO_PSK, Known::TicketKey, 0x6_0000, Reason::BoundHit),
            ("request of the same length, cookie known", Known::Cookie, 0x8_0000, Reason::BoundHit),
        ] {
            cases.push(Case {
                name: format!("{name} (each a new connection)"),
                subject: Subject::Dispatcher,
                load: Load::Hellos { first_client, known },
                verdict: XDP_REDIRECT,
                reason: Some(reason),
                floor: 1,
                limited: false,
            });
        }
        Ok(cases)
    }

    /// Does a case do what it says? Once for each of its flows.
    fn verify(&mut self, case: &Case) -> Result<()> {
        let (frame, count) = match &case.load {
            Load::Hellos { first_client, known } => return self.find_hellos(case, *first_client, *known),
            Load::Template { frame, patches } => (frame, patches.len().max(1)),
        };
        self.load(case)?;
        self.call(case.subject)?;
        let before = self.dataplane.reasons()?;
        for _ in 0..count {
            let run = test_run(self.restore.as_fd(), frame, None, 1, 0)?;
            ensure!(run.retval == case.verdict, "XDP action {}, not {}", run.retval, case.verdict);
            if case.reason.is_none_or(|reason| reason != Reason::NotOurs) {
                let out = Packet::parse(&run.data_out)?;
                ensure!(out.frame() != *frame, "the frame is as it was: {out:?}");
            }
        }
        let after = self.dataplane.reasons()?;
        let counted = difference(&before, &after);
        let expected: Vec<_> = case.reason.map(|reason| (reason, count as u64)).into_iter().collect();
        ensure!(counted == expected, "counted {counted:?}, not {expected:?}");
        Ok(())
    }

    /// Finds connections that do not meet in the stash, and checks each.
    fn find_hellos(&mut self, case: &Case, first_client: u32, known: Known) -> Result<()> {
        self.call(Subject::Dispatcher)?;
        let reason = case.reason.context("first data has a reason")?;
        let mut found = Vec::new();
        for number in first_client..first_client + 2 * HELLOS as u32 {
            if found.len() == HELLOS {
                break;
            }
            let session = Session {
                state: STATE_CONFIRMED,
                created: monotonic_seconds(),
                ..Session::of(backend_id(number % BACKENDS))
            };
            match known {
                Known::Id => self.dataplane.sessions().insert(session_key(number)?, session)?,
                Known::TicketKey => self.dataplane.sessions().insert(ticket_key()?, session)?,
                Known::Cookie => self.dataplane.sessions().insert(cookie_key()?, session)?,
                Known::Nothing => {}
            }
            self.set_frames(&[number], known)?;
            let before = self.dataplane.reasons()?;
            let run = test_run(self.restore_each.as_fd(), &[0; 64], None, 1, 0)?;
            let counted = difference(&before, &self.dataplane.reasons()?);
            match *counted {
                [(got, 1)] if got == reason && run.retval == case.verdict => {}
                [(Reason::StashFull, 1)] => continue,
                _ => bail!("XDP action {}, counted {counted:?}, not {reason:?}", run.retval),
            }
            let tcp = Packet::parse(&run.data_out)?;
            ensure!(tcp.tcp()?.flags == flags::SYN, "no SYN to the backend: {tcp:?}");
            let key = key(client(true, number), vip(true));
            let flow = self.dataplane.flows().get(&key)?.context("no flow was made")?;
            found.push((number, flow.slot));
        }
        ensure!(found.len() == HELLOS, "only {} connections fit the stash", found.len());
        self.hellos = found;
        self.forget(known)
    }

    /// Undoes what a batch of first data has left.
    fn forget(&mut self, known: Known) -> Result<()> {
        let d = &self.dataplane;
        for (number, slot) in &self.hellos {
            let forward = key(client(true, *number), vip(true));
            let flow = d.flows().get(&forward)?.context("a flow is missing")?;
            ensure!(flow.slot == *slot, "client {number} took slot {}, not {slot}", flow.slot);
            let back =
                FlowKey { src: flow.dst(), dst: flow.src(), ports: ports_swapped(flow.ports), proto: 6 };
            ensure!(d.flows().remove(&forward)? && d.flows().remove(&back)?, "a flow is missing");
            d.stash().set(*slot, *self.empty)?;
            if known == Known::Nothing {
                ensure!(d.sessions().remove(&session_key(*number)?)?, "no session was made");
            }
        }
        while self.events.next().is_some() {}
        Ok(())
    }

    /// Writes the first data of connections, with cookies of now.
    fn set_frames(&mut self, numbers: &[u32], known: Known) -> Result<()> {
        let globals = self.dataplane.globals();
        let key = globals.cookie_keys.get(globals.epoch as usize & 1).context("no cookie key")?;
        for (index, number) in (0..).zip(numbers) {
            let frame = first_data(*key, *number, known).frame();
            let mut each = [0; EACH_MAX + 4];
            let (len, bytes) = each.split_at_mut(4);
            len.copy_from_slice(&(frame.len() as u32).to_ne_bytes());
            bytes.get_mut(..frame.len()).context("a frame is too long")?.copy_from_slice(&frame);
            self.frames.set(index, each, 0)?;
        }
        Ok(self.control.set(0, [0, numbers.len() as u32, 0, 0], 0)?)
    }

    /// Gives all backends a limit, or none.
    fn limit(&self, limited: bool) -> Result<()> {
        let limits = Limits { bandwidth: if limited { BANDWIDTH } else { 0 }, ..Limits::default() };
        Ok((0..BACKENDS).try_for_each(|backend| self.dataplane.set_limits(backend, limits))?)
    }

    /// Gives the wrapper the frames of a case with a template.
    fn load(&mut self, case: &Case) -> Result<()> {
        self.limit(case.limited)?;
        let Load::Template { frame, patches } = &case.load else { return Ok(()) };
        let mut template = [0; 128];
        template.get_mut(..frame.len()).context("a frame is too long")?.copy_from_slice(frame);
        self.template.set(0, template, 0)?;
        for (index, patch) in (0..).zip(patches) {
            self.patches.set(index, *patch, 0)?;
        }
        let count = patches.len().max(1) as u32;
        Ok(self.control.set(0, [0, count, frame.len() as u32, u32::from(!patches.is_empty())], 0)?)
    }

    fn call(&mut self, subject: Subject) -> Result<()> {
        let fd = match subject {
            Subject::Dispatcher => &self.dispatcher,
            Subject::FloorLru => &self.floor_lru,
            Subject::FloorLruBoth => &self.floor_lru_both,
            Subject::FloorLruSmall => &self.floor_lru_small,
        };
        Ok(self.callee.set(0, fd.as_raw_fd().unsigned_abs(), 0)?)
    }

    /// `floor_tx` alone.
    fn floor(&self, cases: &[Case], repeats: u32) -> Result<f64> {
        let frame = cases.iter().find_map(|case| match &case.load {
            Load::Template { frame, .. } => Some(frame.as_slice()),
            Load::Hellos { .. } => None,
        });
        // It reads nothing of the frame.
        let frame = frame.unwrap_or(&[0; 64]);
        let run = test_run(self.floor_tx.as_fd(), frame, None, repeats, 0)?;
        ensure!(run.retval == XDP_TX, "floor_tx: XDP action {}", run.retval);
        Ok(f64::from(run.duration_ns))
    }

    /// One round of a case: the wrapper with `floor_tx`, then with the program.
    fn measure(&mut self, case: &Case, sample: &mut Sample, effort: Effort) -> Result<()> {
        match &case.load {
            Load::Template { frame, .. } => {
                self.load(case)?;
                self.callee.set(0, self.floor_tx.as_raw_fd().unsigned_abs(), 0)?;
                let floor = test_run(self.restore.as_fd(), frame, None, effort.repeats, 0)?;
                ensure!(floor.retval == XDP_TX, "{}: the wrapper: XDP action {}", case.name, floor.retval);
                self.call(case.subject)?;
                let before = self.counted(case)?;
                let run = test_run(self.restore.as_fd(), frame, None, effort.repeats, 0)?;
                let counted = self.counted(case)?.wrapping_sub(before);
                let expected = if case.reason.is_some() { u64::from(effort.repeats) } else { 0 };
                ensure!(
                    run.retval == case.verdict && counted == expected,
                    "{}: XDP action {}, counted {counted} of {expected}",
                    case.name,
                    run.retval
                );
                sample.with_floor.push(f64::from(floor.duration_ns));
                sample.with_program.push(f64::from(run.duration_ns));
                if case.limited {
                    sample.added.push(self.added(frame, effort)?);
                }
            }
            Load::Hellos { first_client, known } => {
                if self.hellos.first().is_none_or(|(number, _)| number != first_client) {
                    self.find_hellos(case, *first_client, *known)?;
                }
                let numbers: Vec<u32> = self.hellos.iter().map(|(number, _)| *number).collect();
                self.set_frames(&numbers, *known)?;
                self.callee.set(0, self.floor_tx.as_raw_fd().unsigned_abs(), 0)?;
                let wrapper = test_run(self.restore_each.as_fd(), &[0; 64], None, effort.repeats, 0)?;
                sample.with_floor.push(f64::from(wrapper.duration_ns));
                self.call(case.subject)?;
                let mut durations = Vec::new();
                for _ in 0..effort.batches {
                    // Cookies age; these are never older than a batch.
                    self.set_frames(&numbers, *known)?;
                    let before = self.dataplane.reasons()?;
                    let run = test_run(self.restore_each.as_fd(), &[0; 64], None, HELLOS as u32, 0)?;
                    let counted = difference(&before, &self.dataplane.reasons()?);
                    let expected: Vec<_> = case.reason.map(|r| (r, HELLOS as u64)).into_iter().collect();
                    ensure!(counted == expected, "{}: counted {counted:?}, not {expected:?}", case.name);
                    durations.push(f64::from(run.duration_ns));
                    self.forget(*known)?;
                }
                sample.with_program.push(median(&durations).context("no batch")?);
            }
        }
        Ok(())
    }

    /// What the limits add to the packets that are loaded: short runs with and without them, turn by turn, because
    /// the machine's speed changes by more within a round.
    fn added(&self, frame: &[u8], effort: Effort) -> Result<f64> {
        let mut added = Vec::new();
        for pair in 0..PAIRS {
            let mut times = [0.0; 2];
            // With first, then without first.
            for limited in [pair % 2 == 0, pair % 2 != 0] {
                self.limit(limited)?;
                let run = test_run(self.restore.as_fd(), frame, None, effort.repeats / 4, 0)?;
                ensure!(run.retval == XDP_REDIRECT, "XDP action {}", run.retval);
                times[usize::from(limited)] = f64::from(run.duration_ns);
            }
            added.push(times[1] - times[0]);
        }
        median(&added).context("no pair")
    }

    fn counted(&self, case: &Case) -> Result<u64> {
        Ok(case.reason.map(|reason| self.dataplane.reason(reason)).transpose()?.unwrap_or(0))
    }
}

fn report(cases: &[Case], samples: &[Sample], floor: &[f64]) -> Report {
    let own = |sample: &Sample| -> Vec<f64> {
        let pairs = sample.with_program.iter().zip(&sample.with_floor);
        pairs.zip(floor).map(|((with, without), floor)| with - without + floor).collect()
    };
    let floors = |count, subject| {
        let found = cases.iter().zip(samples).find(|(c, _)| c.subject == subject && c.floor == count);
        found.map(|(_, sample)| own(sample)).unwrap_or_default()
    };
    let mut rows = vec![Row::new("immediate XDP_TX", "floor-tx", "time a packet", "ns", floor)];
    let mut ratios = Vec::new();
    let mut wrapper = Vec::new();
    for (case, sample) in cases.iter().zip(samples) {
        let values = own(sample);
        let subject = case.subject.name();
        rows.push(Row::new(&case.name, subject, "time a packet", "ns", &values));
        if case.limited {
            rows.push(Row::new(&case.name, subject, "added to the same without", "ns", &sample.added));
        }
        wrapper.push(Row::new(&case.name, "restore", "wrapper, taken off", "ns", &sample.with_floor));
        if case.subject == Subject::Dispatcher {
            for floor in Subject::FLOORS {
                let floors = floors(case.floor, floor);
                let values: Vec<f64> = values.iter().zip(&floors).map(|(own, floor)| own / floor).collect();
                let metric = format!("ratio to {}, {}", floor.name(), flows(case.floor));
                ratios.push(Row::new(&case.name, subject, &metric, "ratio", &values));
            }
        }
    }
    let ratio = |to: Subject, starts: &[String]| {
        let to = format!("ratio to {},", to.name());
        let one = |row: &&Row, start: &String| row.case == *start && row.metric.starts_with(&to);
        let rows = starts.iter().map(|start| ratios.iter().find(|row| one(row, start))?.median);
        rows.collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::max)
    };
    let established =
        |count| ["to backend", "to client"].map(|way| format!("established, {way}, {}", flows(count)));
    let mut goals = Vec::new();
    for floor in Subject::FLOORS {
        for (count, limit) in COUNTS.into_iter().zip([1.5, 1.4, 1.1]) {
            let goal = format!("established, worse direction, to {}, {}", floor.name(), flows(count));
            goals.push(Goal::at_most(&goal, ratio(floor, &established(count)), limit));
        }
        let one = |case: &str, goal: &str, limit| {
            Goal::at_most(&format!("{goal} to {}", floor.name()), ratio(floor, &[case.to_owned()]), limit)
        };
        goals.push(one("SYN -> SYN-ACK", "SYN -> SYN-ACK", 2.6));
        goals.push(one("neither VIP nor backend", "non-VIP", 0.6));
    }
    for count in COUNTS {
        for way in ["to backend", "to client"] {
            let name = format!("established, {way}, {LIMITED}, {}", flows(count));
            let found = cases.iter().zip(samples).find(|(case, _)| case.name == name);
            let added = found.map(|(_, sample)| sample.added.as_slice()).unwrap_or_default();
            let goal = format!("what a bandwidth adds, ns, {way}, {}", flows(count));
            goals.push(Goal::at_most(&goal, median(added), 10.0));
        }
    }
    let hello = |name: &str| {
        let found = cases.iter().zip(samples).find(|(case, _)| case.name.starts_with(name));
        found.map(|(_, sample)| own(sample)).unwrap_or_default()
    };
    let psk: Vec<f64> = hello(HELLO_PSK).iter().zip(hello(HELLO)).map(|(psk, id)| psk / id).collect();
    goals.push(Goal::at_most("ClientHello with PSK to one without", median(&psk), 1.5));
    rows.extend(ratios);
    rows.extend(wrapper);
    Report { bench: "fastpath", rows, goals }
}

fn flows(count: u32) -> String {
    match count {
        1 => "1 flow".to_owned(),
        1024 => "1k flows".to_owned(),
        _ => format!("{}k flows", count / 1024),
    }
}

fn difference(before: &[(Reason, u64)], after: &[(Reason, u64)]) -> Vec<(Reason, u64)> {
    let pairs = before.iter().zip(after).filter(|(before, after)| before.1 != after.1);
    pairs.map(|(before, after)| (after.0, after.1.wrapping_sub(before.1))).collect()
}

pub(super) fn load(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd> {
    let program: &mut Xdp =
        ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
    program.load().with_context(|| format!("loading {name}"))?;
    Ok(program.fd()?.as_fd().try_clone_to_owned()?)
}

pub(super) fn array<V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Array<MapData, V>> {
    Ok(Array::try_from(ebpf.take_map(name).with_context(|| format!("no map {name}"))?)?)
}

fn vip(v4: bool) -> SocketAddr {
    let ip = if v4 { IpAddr::from([198, 51, 100, 1]) } else { v6_address(0x100, 1) };
    SocketAddr::new(ip, PORT)
}

fn backend_at(v4: bool, backend: u32) -> SocketAddr {
    let host = 11 + backend as u16;
    let ip = if v4 { IpAddr::from([10, 2, 0, host as u8]) } else { v6_address(2, host) };
    SocketAddr::new(ip, 8443)
}

fn backend_id(backend: u32) -> u32 {
    stable_id(&format!("{SERVICE}/b{backend}"))
}

/// A client of a number below 2^20: another address each, ports that differ too.
pub(super) fn client(v4: bool, number: u32) -> SocketAddr {
    let ip = if v4 {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 0).to_bits() | number).into()
    } else {
        v6_address(1, number as u16)
    };
    SocketAddr::new(ip, 32_768 + (number.wrapping_mul(7919) % 28_000) as u16)
}

fn v6_address(net: u16, host: u16) -> IpAddr {
    IpAddr::from([0x2001, 0xdb8, net, 0, 0, 0, 0, host])
}

fn key(from: SocketAddr, to: SocketAddr) -> FlowKey {
    FlowKey {
        src: from.ip().into(),
        dst: to.ip().into(),
        ports: ports_word(from.port(), to.port()),
        proto: 6,
    }
}

fn session_key(number: u32) -> Result<SessionKey> {
    SessionKey::new(stable_id(SERVICE), KIND_TLS_SESSION_ID, &session_id(number)).context("32 bytes")
}

fn cookie_key() -> Result<SessionKey> {
    let id = http::cookie_id(COOKIE.1.as_bytes());
    SessionKey::new(stable_id(SERVICE), KIND_COOKIE, &id).context("16 bytes")
}

fn ticket_key() -> Result<SessionKey> {
    SessionKey::new(stable_id(SERVICE), KIND_TICKET_NAME, &TICKET_KEY).context("16 bytes")
}

pub(super) fn session_id(number: u32) -> [u8; 32] {
    let mut id = [0x5e; 32];
    id[..4].copy_from_slice(&number.to_be_bytes());
    id
}

fn segment(from: SocketAddr, to: SocketAddr, tcp: Tcp) -> Packet {
    let tcp = Tcp { src: from.port(), dst: to.port(), ..tcp };
    Packet::new(from.ip(), to.ip(), Body::Tcp(tcp))
}

fn stamps(val: u32, ecr: u32) -> Vec<TcpOption> {
    vec![TcpOption::Nop, TcpOption::Nop, TcpOption::Timestamps(val, ecr)]
}

/// An acknowledgment, as Linux sends it.
fn from_client(v4: bool, number: u32, sack: bool) -> Packet {
    let mut options = stamps(1000, 2000);
    if sack {
        let block = TcpOption::Sack(vec![(0x2000_0000, 0x2000_05a8)]);
        options.extend([TcpOption::Nop, TcpOption::Nop, block]);
    }
    let (seq, ack) = (0x1000_0000, 0x1fff_0000);
    let tcp = Tcp { seq, ack, flags: flags::ACK, window: 501, options, ..Tcp::default() };
    segment(client(v4, number), vip(v4), tcp)
}

fn from_backend(v4: bool, number: u32) -> Packet {
    let tcp = Tcp {
        seq: 0x1fff_0000,
        ack: 0x1000_0000,
        flags: flags::ACK,
        window: 509,
        options: stamps(2000, 1000),
        ..Tcp::default()
    };
    segment(backend_at(v4, number % BACKENDS), client(v4, number), tcp)
}

/// A short QUIC header with a connection ID, and some bytes.
fn datagram(port: u16) -> Packet {
    let (src, payload) = (client(true, 0), [&[0x40], &CID[..], &[7; 35]].concat());
    let udp = Udp { src: src.port(), dst: port, unchecked: false, payload };
    Packet::new(src.ip(), vip(true).ip(), Body::Udp(udp))
}

fn syn() -> Packet {
    let options = vec![
        TcpOption::Mss(1460),
        TcpOption::SackPermitted,
        TcpOption::Timestamps(1000, 0),
        TcpOption::Nop,
        TcpOption::Wscale(7),
    ];
    let tcp = Tcp { seq: 7, flags: flags::SYN, window: 64_240, options, ..Tcp::default() };
    segment(client(true, 0x8_0000), vip(true), tcp)
}

fn stranger() -> Packet {
    let tcp = Tcp { flags: flags::ACK, options: stamps(1, 2), ..Tcp::default() };
    segment(SocketAddr::from(([192, 0, 2, 7], 40_000)), SocketAddr::from(([192, 0, 2, 8], 443)), tcp)
}

/// The first data of a hello that the tables know, or not.
fn first_data(cookie_key: [u64; 2], number: u32, known: Known) -> Packet {
    // Like nginx's tickets of TLS 1.3.
    let psk = if known == Known::TicketKey { [&TICKET_KEY[..], &[0x77; 192]].concat() } else { Vec::new() };
    let payload = if known == Known::Cookie { request() } else { padded_hello(&session_id(number), &psk) };
    with_cookie(cookie_key, client(true, number), vip(true), payload)
}

/// A ClientHello of [`HELLO_LEN`] bytes.
pub(super) fn padded_hello(id: &[u8], psk: &[u8]) -> Vec<u8> {
    let hello = |padding| hello::resuming_hello(id, None, psk, padding);
    let bare = hello(0).len();
    // The header of the padding extension has four bytes.
    hello(HELLO_LEN - bare - 4)
}

/// The first data of a connection, with a valid cookie.
pub(super) fn with_cookie(
    cookie_key: [u64; 2],
    client: SocketAddr,
    vip: SocketAddr,
    payload: Vec<u8>,
) -> Packet {
    let isn = 0x3000_0000;
    // The data path's clock is up to a tick behind ours, and it knows no cookie of the future.
    let now = monotonic_ns().saturating_sub(20_000_000);
    let hash = cookie::hash(cookie_key, &key(client, vip), now >> cookie::WINDOW_SHIFT);
    let options = cookie::Options { mss: cookie::mss_index(1440), wscale: 7, sack: true };
    let tcp = Tcp {
        seq: isn + 1,
        ack: cookie::make(hash, isn, options).wrapping_add(1),
        flags: flags::ACK | flags::PSH,
        window: 502,
        options: stamps(1001, isn),
        payload,
        ..Tcp::default()
    };
    segment(client, vip, tcp)
}

/// A request with a cookie behind what browsers send.
fn request() -> Vec<u8> {
    let ((name, value), host) = (COOKIE, "www.example.com");
    let request = |agent: &str| {
        format!(
            "GET /cart?item=1 HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {agent}\r\nAccept: text/html,*/*;q=0.8\r\n\
             Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n\
             Cookie: _ga=GA1.2.1234567890.1700000000; {name}={value}\r\n\r\n"
        )
    };
    let bare = request("").len();
    request(&"x".repeat(HELLO_LEN - bare)).into_bytes()
}

/// What differs between the frames of flows: addresses, ports, checksums. Flows do not follow one
/// another as they were made: neighbours in the table would come with the prefetcher's help.
fn patches(count: u32, packet: impl Fn(u32) -> Packet) -> Vec<[u32; 4]> {
    let patch = |number| {
        let frame = packet(number).frame();
        let word = |at: usize| [frame[at], frame[at + 1], frame[at + 2], frame[at + 3]];
        let checks = [frame[24], frame[25], frame[50], frame[51]];
        [word(26), word(30), word(34), checks].map(u32::from_ne_bytes)
    };
    (0..count).map(|at| patch(shuffled(at, count))).collect()
}

/// A permutation of the numbers below `count`, a power of two: every step can be undone.
fn shuffled(number: u32, count: u32) -> u32 {
    let (bits, mask) = (count.trailing_zeros(), count - 1);
    let mut mixed = number;
    for factor in [0x9e37_79b1, 0x85eb_ca6b, 0xc2b2_ae35] {
        mixed = mixed.wrapping_mul(factor) & mask;
        mixed ^= mixed >> (bits / 2 + 1);
    }
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffling_loses_no_flow() {
        for count in COUNTS {
            let mut seen: Vec<u32> = (0..count).map(|number| shuffled(number, count)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn hellos_have_the_length_that_the_table_names() {
        for known in [Known::Nothing, Known::TicketKey, Known::Cookie] {
            let packet = first_data([1, 2], 3, known);
            assert_eq!(packet.tcp().expect("TCP").payload.len(), HELLO_LEN);
            assert!(packet.frame().len() <= EACH_MAX);
        }
    }
}
