//! Hellos with identifiers that nobody knows, held for the daemon: made by program runs in a wrapper, out of
//! frames that were prepared, while the daemon that owns the maps answers them.

use std::{
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData},
    programs::{ProgramFd, ProgramInfo, Xdp, XdpMode},
};
use dispatcher_common::{
    abi,
    globals::Globals,
    reason::Reason,
    service::stable_id,
    session::{KIND_TLS_SESSION_ID, Session, SessionKey},
    stash::Slot,
};
use dispatcher_user::dataplane::test_run;

use super::scene::{FIRST, Reasons, Scene, name};
use crate::{
    bench::fastpath::{self, EACH_MAX},
    netns::Netns,
    topology::VIP,
};

/// Sessions of a round.
pub(super) const SESSIONS: u32 = 16_384;
/// Hellos of one program run.
const CHUNK: u32 = 512;
/// Most hellos that wait for the daemon: the ring has room for 10,000.
const WAITING: u64 = 6144;
/// How long a round may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the counters are looked at.
const LOOK: Duration = Duration::from_micros(50);

/// What a round found.
pub(super) struct Round {
    /// Sessions bound by the daemon, a second.
    pub(super) rate: f64,
    /// Time of the daemon's threads a session, microseconds.
    pub(super) daemon_us: f64,
    /// Time of the data path a hello until it was held, microseconds.
    pub(super) held_us: f64,
    /// Hellos that the daemon did not bind.
    pub(super) others: f64,
}

/// Makes hellos for one daemon.
pub(super) struct Generator {
    _ebpf: Ebpf,
    /// The wrapper is attached there.
    _runs: Netns,
    _program: ProgramFd,
    /// The kernel empties a program array when its last descriptor is closed.
    _callee: Array<MapData, u32>,
    restore_each: OwnedFd,
    frames: Array<MapData, [u8; EACH_MAX + 4]>,
    control: Array<MapData, [u32; 4]>,
    globals: Array<MapData, Globals>,
    stash: Array<MapData, Slot>,
    provisional: HashMap<MapData, SessionKey, Session>,
    reasons: Reasons,
    empty: Box<Slot>,
    /// The next client.
    next: u32,
}

impl Generator {
    pub(super) fn new(scene: &Scene) -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("FRAMES", SESSIONS)
            .load(fastpath::bench_object())
            .context("loading the wrapper")?;
        let restore_each = fastpath::load(&mut ebpf, "restore_each")?;
        // A program that is attached nowhere waits for a grace period of RCU before and after each run.
        let runs = Netns::new("runs")?;
        let wrapper: &mut Xdp = ebpf.program_mut("restore_each").context("no wrapper")?.try_into()?;
        runs.run(|| wrapper.attach("lo", XdpMode::Skb)).context("attaching the wrapper")?;
        let program = ProgramInfo::from_pin(scene.program(abi::PROGRAM)?)?.fd()?;
        let Some(Map::ProgramArray(callee)) = ebpf.take_map("CALLEE") else { bail!("no map CALLEE") };
        // A program array takes descriptors by number, also those of another object.
        let mut callee: Array<MapData, u32> = Array::try_from(Map::Array(callee))?;
        callee.set(0, program.as_fd().as_raw_fd().unsigned_abs(), 0)?;
        let stash: Array<MapData, Slot> = scene.array(abi::MAP_STASH)?;
        let generator = Self {
            restore_each,
            frames: fastpath::array(&mut ebpf, "FRAMES")?,
            control: fastpath::array(&mut ebpf, "CONTROL")?,
            globals: scene.array(abi::MAP_GLOBALS)?,
            provisional: scene.lru(abi::MAP_PROVISIONAL)?,
            reasons: scene.reasons()?,
            empty: Box::new(stash.get(&0, 0)?),
            stash,
            next: 0,
            _program: program,
            _callee: callee,
            _ebpf: ebpf,
            _runs: runs,
        };
        Ok(generator)
    }

    /// One round with a service.
    pub(super) fn round(&mut self, scene: &mut Scene, service: u16) -> Result<Round> {
        for slot in 0..self.stash.len() {
            self.stash.set(slot, *self.empty, 0)?;
        }
        let numbers = self.next..self.next + SESSIONS;
        self.next = numbers.end;
        self.prepare(numbers.clone(), service)?;
        let reasons = [Reason::Held, Reason::Released, Reason::BoundMiss, Reason::StashFull];
        let read = |reasons_of: &Reasons| -> Result<[u64; 4]> {
            let mut counts = [0; 4];
            for (count, reason) in counts.iter_mut().zip(reasons) {
                *count = reasons_of.read(reason)?;
            }
            Ok(counts)
        };
        let before = read(&self.reasons)?;
        let since = |now: [u64; 4]| -> [u64; 4] { std::array::from_fn(|i| now[i] - before[i]) };
        let cpu = scene.cpu()?;
        let (started, mut in_program) = (Instant::now(), 0.0);
        let mut fed = 0;
        let [held, released, missed, full] = loop {
            let now = since(read(&self.reasons)?);
            let waiting = now[0].saturating_sub(now[1]);
            ensure!(
                started.elapsed() < PATIENCE,
                "{waiting} hellos wait for the daemon, which said:\n{}",
                scene.daemon.process().log()
            );
            if fed < SESSIONS && waiting <= WAITING {
                let run = test_run(self.restore_each.as_fd(), &[0; 64], None, CHUNK, 0)?;
                in_program += f64::from(run.duration_ns) * f64::from(CHUNK);
                fed += CHUNK;
            } else if fed == SESSIONS && waiting == 0 {
                break now;
            } else {
                thread::sleep(LOOK);
            }
        };
        let took = started.elapsed().as_secs_f64();
        let cpu = scene.cpu()?.saturating_sub(cpu).as_secs_f64();
        ensure!(
            held + missed + full == u64::from(SESSIONS),
            "of {SESSIONS} hellos {held} were held, {missed} bound by the table, {full} found no slot"
        );
        let known = self.known(numbers, service)?;
        ensure!(known >= released, "{released} hellos were released, but only {known} sessions are known");
        Ok(Round {
            rate: released as f64 / took,
            daemon_us: cpu * 1e6 / released as f64,
            held_us: in_program / 1000.0 / f64::from(SESSIONS),
            others: (missed + full) as f64,
        })
    }

    /// Writes the first data of connections, with cookies of now.
    fn prepare(&mut self, numbers: std::ops::Range<u32>, service: u16) -> Result<()> {
        let globals = self.globals.get(&0, 0)?;
        let key = globals.cookie_keys.get(globals.epoch as usize & 1).context("no cookie key")?;
        let vip = SocketAddr::new(VIP[0], FIRST + service);
        for (index, number) in (0..).zip(numbers) {
            let hello = fastpath::padded_hello(&fastpath::session_id(number), &[]);
            let frame = fastpath::with_cookie(*key, fastpath::client(true, number), vip, hello).frame();
            let mut each = [0; EACH_MAX + 4];
            let (len, bytes) = each.split_at_mut(4);
            len.copy_from_slice(&(frame.len() as u32).to_ne_bytes());
            bytes.get_mut(..frame.len()).context("a frame is too long")?.copy_from_slice(&frame);
            self.frames.set(index, each, 0)?;
        }
        Ok(self.control.set(0, [0, SESSIONS, 0, 0], 0)?)
    }

    /// How many of these sessions the mapping table knows.
    fn known(&self, numbers: std::ops::Range<u32>, service: u16) -> Result<u64> {
        let mut known = 0;
        for number in numbers {
            let id = fastpath::session_id(number);
            let key = SessionKey::new(stable_id(&name(service)), KIND_TLS_SESSION_ID, &id);
            known += u64::from(self.provisional.get(&key.context("32 bytes")?, 0).is_ok());
        }
        Ok(known)
    }
}
