//! The BPF programs and maps, loaded: the only file that knows how aya is called.
//!
//! Maps are typed by the layouts of `dispatcher-common` and can be used from several threads at once.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    fmt, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader, Pod,
    maps::{DevMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, ProgramArray, RingBuf},
    programs::{ProgramError, Xdp},
};
use dispatcher_common::{
    abi,
    addr::Addr,
    event::Release,
    flow::{Flow, FlowKey},
    globals::{GLOBAL_LOG, GLOBAL_NO_CLONES, Globals},
    http,
    reason::{REASONS_MAX, Reason},
    service::{Backend, BackendStats, BackendTimes, Frontend, VipKey},
    stash::{EMITTED, STAGE_HELD, Slot},
};

mod anchor;
mod capacity;
mod pins;
mod qos;
mod sessions;
mod syscall;
mod table;
mod test_run;

use anchor::Anchor;
use pins::Pins;
pub(crate) use pins::is_mount_point;
use qos::Qos;
use syscall::Link;

pub(crate) use capacity::MAX_BACKENDS;
pub use capacity::{Capacities, memory_bytes};
pub use pins::{has_file_system, remove as remove_pins};
pub use qos::{ClassCount, ClassSetting, Limits, NameClass, NetworkClass};
pub use sessions::{Sessions, Swept};
pub use table::{Cells, Table};
pub use test_run::{LIVE_FRAMES, TestRun, test_run};

/// What can go wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The program was compiled without a BPF object.
    #[error("built without the BPF object; build with `cargo xtask build`")]
    NoObject,
    /// The kernel does not let us.
    #[error("{action}: not permitted; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    NotPermitted {
        /// What was tried.
        action: String,
    },
    /// The kernel has no memory for a map, or the limit on locked memory forbids it.
    #[error(
        "creating map {map}: {source}; lower its size under [capacity], or raise the memory limit (`ulimit -l`, the cgroup's memory.max)"
    )]
    Memory {
        /// Name of the map.
        map: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The object cannot be used.
    #[error("loading the BPF object: {}; build it again with `cargo xtask build`", crate::one_line(.0))]
    Object(#[source] Box<EbpfError>),
    /// The object lacks a map or a program, or one has another layout.
    #[error(
        "the BPF object and this program disagree about {name} ({reason}); build both with `cargo xtask build`"
    )]
    Layout {
        /// The map or program.
        name: String,
        /// How they disagree.
        reason: String,
    },
    /// The verifier refuses a program.
    #[error(
        "the kernel's verifier refused program {program}; Dispatcher is tested on Linux 6.18, try that or a later one\n{log}"
    )]
    Verifier {
        /// Name of the program.
        program: &'static str,
        /// End of the verifier's log.
        log: String,
    },
    /// No such interface.
    #[error("interface {0} does not exist; `ip link` lists those that do")]
    NoInterface(String),
    /// Another XDP program is there already.
    #[error(
        "interface {interface} has an XDP program already; remove it with `ip link set dev {interface} xdp off`, or, if it is a dispatcherd's, by ending that one and `dispatcherctl detach`"
    )]
    Busy {
        /// The interface.
        interface: String,
    },
    /// Native mode does not work there.
    #[error(
        "attaching to {interface} in native mode: {source}; use attach = \"generic\", or lower the MTU (most drivers allow up to about 3500 bytes with XDP)"
    )]
    NativeUnsupported {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Any other failure to attach.
    #[error("attaching to {interface}: {reason}")]
    Attach {
        /// The interface.
        interface: String,
        /// What aya says.
        reason: String,
    },
    /// A map operation failed.
    #[error("map {map}: {action}: {}", crate::one_line(.source))]
    Map {
        /// Name of the map.
        map: String,
        /// What was tried.
        action: &'static str,
        /// What aya says.
        source: MapError,
    },
    /// A program could not be run.
    #[error("running program {program}: {source}")]
    Run {
        /// Name of the program.
        program: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A pin cannot be made, opened or removed.
    #[error(
        "pins: {path}: {action}: {source}; is the folder of `pin` in a BPF file system, and ours? Names there have no dots"
    )]
    Pin {
        /// The pin, or a folder of pins.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no BPF file system for pins.
    #[error("pins in {folder}: {reason}; or set pin = \"none\", and nothing outlives the daemon")]
    NoFileSystem {
        /// The folder for pins.
        folder: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The folder is locked.
    #[error("another dispatcherd uses the pins in {0}; stop it, or set another `pin`")]
    PinsInUse(PathBuf),
    /// The links there are on interfaces of another network namespace.
    #[error(
        "the pins in {0} are attached to interfaces of another network namespace; give each namespace its own `pin`"
    )]
    OtherNamespace(PathBuf),
    /// Maps of a version with other layouts.
    #[error(
        "the maps pinned in {folder} have layouts of version {theirs}, this dispatcherd has version {}; {REMEDY}",
        abi::ABI_VERSION
    )]
    Abi {
        /// The folder of pins.
        folder: PathBuf,
        /// Their version.
        theirs: u32,
    },
    /// A map of another layout.
    #[error(
        "map {map} pinned in {folder} is another ({theirs}) than that of this dispatcherd ({ours}); {REMEDY}"
    )]
    PinnedMap {
        /// Name of the map.
        map: &'static str,
        /// The folder of pins.
        folder: PathBuf,
        /// What is there.
        theirs: String,
        /// What is expected.
        ours: String,
    },
    /// Classes or limits that cannot be.
    #[error("classes and limits: {0}")]
    Qos(String),
    /// No random bytes for keys.
    #[error("reading random bytes for the cookie keys: {0}")]
    Random(getrandom::Error),
    /// A capacity that cannot be.
    #[error("capacity {name} = {value} {problem}")]
    Capacity {
        /// Which.
        name: &'static str,
        /// Its value.
        value: u32,
        /// What is wrong, and what would be right.
        problem: &'static str,
    },
}

/// Most releases of one run: `RELEASES` has an entry for a cursor too.
pub const RELEASES_AT_ONCE: usize = abi::RELEASES_MAX as usize - 1;

/// What to do about maps that cannot be used.
const REMEDY: &str = "start the version that made it, or let go of its connections and sessions with `dispatcherctl detach` and start again";

/// How a program is attached to an interface.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// Native, and generic where the driver does not support that.
    #[default]
    Auto,
    /// In the driver.
    Native,
    /// In the network stack: slower, and frames cannot be cloned for replay.
    Generic,
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// The object with the XDP programs; empty in a build without `cargo xtask build`.
#[must_use]
pub fn object() -> &'static [u8] {
    // The ELF reader wants the alignment of a 64-bit header.
    #[repr(C, align(8))]
    struct Aligned<T: ?Sized>(T);
    static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/dispatcher.bpf")));
    &OBJECT.0
}

/// The loaded programs and their maps. Dropping it detaches and unloads everything that is not pinned.
pub struct Dataplane {
    ebpf: Mutex<Ebpf>,
    links: Mutex<BTreeMap<u32, Attachment>>,
    pins: Option<Pins>,
    taken_over: bool,
    capacities: Capacities,
    copy: Mutex<Globals>,
    flows: Table<FlowKey, Flow>,
    sessions: Sessions,
    vips: Table<VipKey, u32>,
    frontends: Cells<Frontend>,
    backends: Cells<Backend>,
    backend_index: Table<u32, u32>,
    lb_table: Cells<u32>,
    sources: Cells<Addr>,
    cookies: Cells<[u8; http::TABLE]>,
    stash: Cells<Slot>,
    qos: Qos,
    globals: Cells<Globals>,
    releases: Cells<Release>,
    reasons: PerCpuArray<MapData, u64>,
    backend_stats: Counters<BackendStats>,
    backend_times: Counters<BackendTimes>,
    replay: Vec<Mutex<DevMap<MapData>>>,
    single: Vec<Mutex<DevMap<MapData>>>,
    events: Mutex<Option<RingBuf<MapData>>>,
    held: Mutex<Option<RingBuf<MapData>>>,
    /// Of the `release` program.
    anchor: OnceLock<Anchor>,
    /// The kernel empties a program array when its last descriptor is closed and its last pin is gone.
    _stages: ProgramArray<MapData>,
}

/// Counters, one set a CPU.
type Counters<V> = Mutex<PerCpuArray<MapData, V>>;

struct Attachment {
    interface: String,
    mode: AttachMode,
    link: Link,
    pin: Option<PathBuf>,
    /// Attached by a daemon before us.
    taken_over: bool,
}

/// An interface that the dispatcher is attached to.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Attached {
    /// Name when it was attached.
    pub name: String,
    /// Interface index.
    pub ifindex: u32,
    /// How; never [`AttachMode::Auto`].
    pub mode: AttachMode,
}

impl Dataplane {
    /// Makes the maps, loads the programs and writes new cookie keys. Nothing is attached yet, and nothing
    /// outlives this process.
    pub fn load(object: &[u8], capacities: &Capacities) -> Result<Self, Error> {
        Self::load_with(object, capacities, None)
    }

    /// As [`load`](Self::load), with everything pinned in a folder: it outlives this process. Maps that are
    /// pinned there already are taken over with all that they hold, whatever their capacities.
    pub fn load_pinned(object: &[u8], capacities: &Capacities, folder: &Path) -> Result<Self, Error> {
        Self::load_with(object, capacities, Some(folder))
    }

    fn load_with(object: &[u8], capacities: &Capacities, folder: Option<&Path>) -> Result<Self, Error> {
        if object.is_empty() {
            return Err(Error::NoObject);
        }
        capacities.check()?;
        let pins = folder.map(Pins::open).transpose()?;
        let there = match &pins {
            Some(pins) => pins.check(capacities)?,
            None => None,
        };
        let loaded =
            Self::load_programs(object, &there.unwrap_or(*capacities), pins.as_ref(), there.is_some());
        match loaded {
            Ok(dataplane) => Ok(Self { pins, ..dataplane }),
            Err(error) => {
                if let Some(pins) = pins {
                    pins.give_up(there.is_none());
                }
                Err(error)
            }
        }
    }

    fn load_programs(
        object: &[u8],
        capacities: &Capacities,
        pins: Option<&Pins>,
        taken_over: bool,
    ) -> Result<Self, Error> {
        let mut ebpf = load_maps(object, capacities, pins)?;
        for program in programs() {
            load_program(&mut ebpf, program)?;
        }
        let e = &mut ebpf;
        if let Some(pins) = pins {
            if let Some(Map::ProgramArray(stages)) = e.map(abi::MAP_STAGES) {
                pins.keep(abi::MAP_STAGES, stages.fd().as_fd())?;
            }
            for program in programs() {
                pins.keep(program, xdp(e, program)?.fd().map_err(layout(program))?.as_fd())?;
            }
        }
        let mut stages: ProgramArray<MapData> = take_map(e, abi::MAP_STAGES)?;
        for (index, program) in (0..).zip(abi::STAGE_PROGRAMS) {
            let fd = xdp(e, program)?.fd().map_err(layout(program))?;
            stages.set(index, fd, 0).map_err(map_error(abi::MAP_STAGES, "writing"))?;
        }
        let dataplane = Self {
            flows: Table::take(e, abi::MAP_FLOWS)?,
            sessions: Sessions::take(e)?,
            vips: Table::take(e, abi::MAP_VIPS)?,
            frontends: Cells::take(e, abi::MAP_FRONTENDS)?,
            backends: Cells::take(e, abi::MAP_BACKENDS)?,
            backend_index: Table::take(e, abi::MAP_BACKEND_INDEX)?,
            lb_table: Cells::take(e, abi::MAP_LB_TABLE)?,
            sources: Cells::take(e, abi::MAP_SOURCES)?,
            cookies: Cells::take(e, abi::MAP_COOKIES)?,
            stash: Cells::take(e, abi::MAP_STASH)?,
            qos: Qos::take(e)?,
            globals: Cells::take(e, abi::MAP_GLOBALS)?,
            releases: Cells::take(e, abi::MAP_RELEASES)?,
            reasons: take_map(e, abi::MAP_REASONS)?,
            backend_stats: Mutex::new(take_map(e, abi::MAP_BACKEND_STATS)?),
            backend_times: Mutex::new(take_map(e, abi::MAP_BACKEND_TIMES)?),
            replay: replay_maps(e, abi::MAP_REPLAY_PREFIX)?,
            single: replay_maps(e, abi::MAP_SINGLE_PREFIX)?,
            _stages: stages,
            events: Mutex::new(Some(take_map(e, abi::MAP_EVENTS)?)),
            held: Mutex::new(Some(take_map(e, abi::MAP_HELD)?)),
            anchor: OnceLock::new(),
            links: Mutex::default(),
            pins: None,
            taken_over,
            copy: Mutex::new(Globals::default()),
            capacities: *capacities,
            ebpf: Mutex::new(ebpf),
        };
        if taken_over {
            dataplane.take_over_globals()?;
        } else {
            let keys = [random_key()?, random_key()?];
            dataplane.update_globals(|globals| {
                globals.abi = abi::ABI_VERSION;
                globals.stash_mask = capacities.stash_slots - 1;
                globals.cookie_keys = keys;
                globals.heartbeat = monotonic_ns();
            })?;
        }
        Ok(dataplane)
    }

    /// Begins with what the daemon before us wrote: its cookie keys are in sequence numbers that clients have.
    /// What it may have left half done is made good.
    fn take_over_globals(&self) -> Result<(), Error> {
        *lock(&self.copy) = self.globals.get(0)?;
        self.sessions.recall();
        self.qos.recall()?;
        let vips: Vec<(VipKey, u32)> = self.vips.iter().collect();
        self.update_globals(|globals| {
            globals.stash_mask = self.stash.capacity() - 1;
            globals.flags &= !GLOBAL_LOG;
            globals.trace = 0;
            globals.generation = globals.generation.wrapping_add(1);
            globals.vips.fill(0);
            for (vip, index) in &vips {
                globals.set_hint(vip, *index);
            }
        })
    }

    /// True when maps were there that a daemon before us had pinned.
    #[must_use]
    pub fn taken_over(&self) -> bool {
        self.taken_over
    }

    /// Where everything is pinned.
    #[must_use]
    pub fn pinned(&self) -> Option<&Path> {
        self.pins.as_ref().map(Pins::folder)
    }

    /// Attaches the dispatcher to an interface and says in which mode.
    pub fn attach(&self, interface: &str, mode: AttachMode) -> Result<AttachMode, Error> {
        let ifindex = find_interface(interface)?;
        let program = self.program_fd(abi::PROGRAM)?;
        let before = match &self.pins {
            Some(pins) => pins.take_over(program.as_fd(), ifindex, mode)?,
            None => None,
        };
        let attachment = if let Some((link, mode, pin)) = before {
            Attachment { interface: interface.to_owned(), mode, link, pin: Some(pin), taken_over: true }
        } else {
            let new = |mode| attach(program.as_fd(), interface, ifindex, mode);
            let (link, mode) = match mode {
                AttachMode::Native | AttachMode::Generic => (new(mode)?, mode),
                AttachMode::Auto => match new(AttachMode::Native) {
                    Ok(link) => (link, AttachMode::Native),
                    Err(Error::NativeUnsupported { source, .. }) => {
                        log::warn!(
                            "{interface}: no native XDP here ({source}); attaching in generic mode, which is slower"
                        );
                        (new(AttachMode::Generic)?, AttachMode::Generic)
                    }
                    Err(error) => return Err(error),
                },
            };
            let pin = match &self.pins {
                Some(pins) => Some(pins.keep_link(&link, ifindex, mode)?),
                None => None,
            };
            Attachment { interface: interface.to_owned(), mode, link, pin, taken_over: false }
        };
        let mode = attachment.mode;
        lock(&self.links).insert(ifindex, attachment);
        if mode == AttachMode::Generic {
            // Only `settled` and `detach` take it back: at a start some interfaces are yet to come.
            self.update_globals(|globals| globals.flags |= GLOBAL_NO_CLONES)?;
        }
        Ok(mode)
    }

    /// After the last interface at a start: lets go of interfaces that a daemon before us was attached to and
    /// we are not, and of its programs. Returns these interfaces.
    pub fn settled(&self) -> Result<Vec<String>, Error> {
        let used: Vec<PathBuf> = lock(&self.links).values().filter_map(|one| one.pin.clone()).collect();
        let gone = match &self.pins {
            Some(pins) => pins.settle(&used)?,
            None => Vec::new(),
        };
        self.update_clones()?;
        Ok(gone)
    }

    /// When a start fails: detaches what it attached. What daemons before us left goes on.
    pub fn give_up(self) {
        let links = std::mem::take(&mut *lock(&self.links));
        let mut programs_go_on = false;
        for link in links.into_values() {
            if link.taken_over {
                programs_go_on = true;
            } else if let Err(error) = self.let_go(link) {
                log::warn!("{error}");
            }
        }
        if let Some(pins) = self.pins
            && !programs_go_on
        {
            pins.give_up(!self.taken_over);
        }
    }

    /// Detaches from an interface; false when the dispatcher was not attached to it.
    pub fn detach(&self, interface: &str) -> Result<bool, Error> {
        let link = {
            let mut links = lock(&self.links);
            let ifindex = links.iter().find(|(_, link)| link.interface == interface).map(|(index, _)| *index);
            ifindex.and_then(|ifindex| links.remove(&ifindex))
        };
        let Some(link) = link else { return Ok(false) };
        self.let_go(link)?;
        self.update_clones()?;
        Ok(true)
    }

    fn let_go(&self, attachment: Attachment) -> Result<(), Error> {
        let Attachment { interface, link, pin, .. } = attachment;
        match pin {
            Some(pin) => pins::remove_link(&pin).map(drop),
            None => link.detach().map_err(|error| Error::Attach { interface, reason: error.to_string() }),
        }
    }

    /// Detaches from an interface that is gone.
    pub fn forget(&self, interface: &str) {
        if let Err(error) = self.detach(interface) {
            // The interface took its end with it.
            log::debug!("{error}");
        }
    }

    /// The interfaces that the dispatcher is attached to.
    #[must_use]
    pub fn attached(&self) -> Vec<Attached> {
        lock(&self.links)
            .iter()
            .map(|(ifindex, link)| Attached {
                name: link.interface.clone(),
                ifindex: *ifindex,
                mode: link.mode,
            })
            .collect()
    }

    /// In generic mode frames cannot be cloned: the program must know.
    fn update_clones(&self) -> Result<(), Error> {
        let generic = lock(&self.links).values().any(|link| link.mode == AttachMode::Generic);
        self.update_globals(|globals| {
            globals.flags = globals.flags & !GLOBAL_NO_CLONES | if generic { GLOBAL_NO_CLONES } else { 0 };
        })
    }

    /// The capacities that the maps were made with.
    #[must_use]
    pub fn capacities(&self) -> &Capacities {
        &self.capacities
    }

    /// The flow table.
    #[must_use]
    pub fn flows(&self) -> &Table<FlowKey, Flow> {
        &self.flows
    }

    /// The mapping table.
    #[must_use]
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// VIP -> frontend index.
    #[must_use]
    pub fn vips(&self) -> &Table<VipKey, u32> {
        &self.vips
    }

    /// The frontends.
    #[must_use]
    pub fn frontends(&self) -> &Cells<Frontend> {
        &self.frontends
    }

    /// The endpoints of the backends.
    #[must_use]
    pub fn backends(&self) -> &Cells<Backend> {
        &self.backends
    }

    /// Stable backend id -> backend index.
    #[must_use]
    pub fn backend_index(&self) -> &Table<u32, u32> {
        &self.backend_index
    }

    /// The load-balancing tables.
    #[must_use]
    pub fn lb_table(&self) -> &Cells<u32> {
        &self.lb_table
    }

    /// Source addresses of `source = "dispatcher"` services.
    #[must_use]
    pub fn sources(&self) -> &Cells<Addr> {
        &self.sources
    }

    /// `COOKIES`.
    #[must_use]
    pub fn cookies(&self) -> &Cells<[u8; http::TABLE]> {
        &self.cookies
    }

    /// The stash.
    #[must_use]
    pub fn stash(&self) -> &Cells<Slot> {
        &self.stash
    }

    /// Our copy of the globals; nothing but [`update_globals`](Self::update_globals) writes them.
    #[must_use]
    pub fn globals(&self) -> Globals {
        *lock(&self.copy)
    }

    /// Changes the globals and writes them.
    pub fn update_globals(&self, change: impl FnOnce(&mut Globals)) -> Result<(), Error> {
        let mut globals = lock(&self.copy);
        change(&mut globals);
        self.globals.set(0, *globals)
    }

    /// Packets to a VIP begin to find its frontend.
    pub fn publish(&self, vip: VipKey, index: u32) -> Result<(), Error> {
        self.vips.insert(vip, index)?;
        self.update_globals(|globals| globals.set_hint(&vip, index))
    }

    /// Packets to a VIP find its frontend no more.
    pub fn withdraw(&self, vip: &VipKey) -> Result<(), Error> {
        let index = self.vips.get(vip)?;
        self.update_globals(|globals| {
            if let Some(hint) = globals.vips.get_mut(vip.hint())
                && index.is_some_and(|index| index + 1 == u32::from(*hint))
            {
                *hint = 0;
            }
        })?;
        self.vips.remove(vip).map(drop)
    }

    /// Packets by reason, of all CPUs together, in the order of [`Reason::ALL`].
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, Error> {
        debug_assert!(self.reasons.len() >= REASONS_MAX);
        Reason::ALL.iter().map(|reason| Ok((*reason, self.reason(*reason)?))).collect()
    }

    /// Packets with one reason, of all CPUs together.
    pub fn reason(&self, reason: Reason) -> Result<u64, Error> {
        let values = self.reasons.get(&(reason as u32), 0).map_err(map_error(abi::MAP_REASONS, "reading"))?;
        Ok(values.iter().sum())
    }

    /// Counters of a backend, of all CPUs together.
    pub fn backend_stats(&self, backend: u32) -> Result<BackendStats, Error> {
        let values = lock(&self.backend_stats)
            .get(&backend, 0)
            .map_err(map_error(abi::MAP_BACKEND_STATS, "reading"))?;
        Ok(values.iter().fold(BackendStats::default(), |sum, one| BackendStats {
            connections: sum.connections + one.connections,
            hits: sum.hits + one.hits,
            misses: sum.misses + one.misses,
            fresh: sum.fresh + one.fresh,
            nonsecure: sum.nonsecure + one.nonsecure,
            established: sum.established + one.established,
            refused: sum.refused + one.refused,
            learned: sum.learned + one.learned,
        }))
    }

    /// How long a backend took to answer, of all CPUs together.
    pub fn backend_times(&self, backend: u32) -> Result<BackendTimes, Error> {
        let values = lock(&self.backend_times)
            .get(&backend, 0)
            .map_err(map_error(abi::MAP_BACKEND_TIMES, "reading"))?;
        let mut sum = BackendTimes::default();
        for one in values.iter() {
            for (sum, one) in [(&mut sum.connect, one.connect), (&mut sum.response, one.response)] {
                sum.sum += one.sum;
                sum.buckets.iter_mut().zip(one.buckets).for_each(|(sum, one)| *sum += one);
            }
        }
        Ok(sum)
    }

    /// Forgets what was counted of a backend, and its limits: its place is given to another one.
    pub fn forget_stats(&self, backend: u32) -> Result<(), Error> {
        clear(&self.backend_stats, backend).map_err(map_error(abi::MAP_BACKEND_STATS, "clearing"))?;
        clear(&self.backend_times, backend).map_err(map_error(abi::MAP_BACKEND_TIMES, "clearing"))?;
        self.set_limits(backend, Limits::default())
    }

    /// Points the replay maps with a number at an interface.
    pub fn set_replay(&self, number: u32, ifindex: u32) -> Result<(), Error> {
        let mut ebpf = lock(&self.ebpf);
        let emit = xdp(&mut ebpf, abi::PROGRAM_EMIT)?.fd().map_err(layout(abi::PROGRAM_EMIT))?;
        for (prefix, width, maps) in [
            (abi::MAP_REPLAY_PREFIX, abi::REPLAY_WIDTH, &self.replay),
            (abi::MAP_SINGLE_PREFIX, abi::SINGLE_WIDTH, &self.single),
        ] {
            let name = || format!("{prefix}{number}");
            let Some(map) = maps.get(number as usize) else {
                return Err(Error::Map {
                    map: name(),
                    action: "writing",
                    source: MapError::OutOfBounds { index: number, max_entries: abi::REPLAY_MAPS },
                });
            };
            let mut map = lock(map);
            for entry in 0..width {
                map.set(entry, ifindex, Some(emit), 0).map_err(|error| Error::Layout {
                    name: name(),
                    reason: format!("pointing it at interface {ifindex}: {}", crate::one_line(&error)),
                })?;
            }
        }
        Ok(())
    }

    /// The ring of events; `None` after the first call.
    pub fn take_events(&self) -> Option<RingBuf<MapData>> {
        lock(&self.events).take()
    }

    /// The ring of held hellos; `None` after the first call.
    pub fn take_held(&self) -> Option<RingBuf<MapData>> {
        lock(&self.held).take()
    }

    /// Starts to hand on what the programs log, where they do.
    pub fn logger(&self) -> Option<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut lock(&self.ebpf)).ok()
    }

    /// Lets several held hellos be released at once without delay. It takes CAP_SYS_ADMIN.
    pub fn anchor_release(&self) -> Result<(), Error> {
        let program = self.program_fd(abi::PROGRAM_RELEASE)?;
        let anchor = Anchor::new(program)
            .map_err(|source| Error::Run { program: abi::PROGRAM_RELEASE.to_owned(), source })?;
        // A second one is as good as the first.
        drop(self.anchor.set(anchor));
        Ok(())
    }

    /// True when the hello of a flow is still held there: its client has not left. Also where that cannot be known.
    pub fn holds(&self, slot: u32, flow: &FlowKey) -> bool {
        match self.stash().get(slot) {
            Ok(slot) => slot.key == *flow && slot.stage == STAGE_HELD,
            Err(error) => {
                log::warn!("{error}");
                true
            }
        }
    }

    /// Answers held hellos with the daemon's picks.
    pub fn release(&self, releases: &[Release]) -> Result<(), Error> {
        for batch in releases.chunks(RELEASES_AT_ONCE) {
            // Entry 0 is the program's cursor.
            let cursor = Release { slot: 1, ..Release::default() };
            let values: Vec<Release> = std::iter::once(cursor).chain(batch.iter().copied()).collect();
            self.releases.set_all(0, &values)?;
            self.run(abi::PROGRAM_RELEASE, &[0; 128], None, batch.len() as u32, LIVE_FRAMES)?;
        }
        Ok(())
    }

    /// Runs a program on a frame without any interface. A frame that is to be cloned is not: that the clones of
    /// its slot have passed is noted all the same, or the slot would wait for them.
    pub fn run(
        &self,
        program: &str,
        frame: &[u8],
        ifindex: Option<u32>,
        repeat: u32,
        flags: u32,
    ) -> Result<TestRun, Error> {
        let run = {
            let mut ebpf = lock(&self.ebpf);
            let fd = xdp(&mut ebpf, program)?.fd().map_err(layout(program))?;
            test_run(fd.as_fd(), frame, ifindex, repeat, flags)
                .map_err(|source| Error::Run { program: program.to_owned(), source })?
        };
        self.let_clones_leave(&run.data_out)?;
        Ok(run)
    }

    /// Notes that all clones of a frame have left, if the program would have cloned it.
    pub fn let_clones_leave(&self, frame: &[u8]) -> Result<(), Error> {
        if let Some([mark, index, again]) = first_words(frame)
            && (mark, again) == (abi::REPLAY_MARK, abi::REPLAY_MARK)
        {
            let mut slot = self.stash().get(index)?;
            slot.emitted = abi::REPLAY_WIDTH * EMITTED;
            self.stash().set(index, slot)?;
        }
        Ok(())
    }

    /// A descriptor of a program, for those who run it themselves.
    pub fn program_fd(&self, program: &str) -> Result<std::os::fd::OwnedFd, Error> {
        let mut ebpf = lock(&self.ebpf);
        let fd = xdp(&mut ebpf, program)?.fd().map_err(layout(program))?;
        fd.as_fd().try_clone_to_owned().map_err(|source| Error::Run { program: program.to_owned(), source })
    }
}

fn first_words(frame: &[u8]) -> Option<[u32; 3]> {
    let bytes = frame.first_chunk::<12>()?;
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Some([word(0), word(4), word(8)])
}

impl fmt::Debug for Dataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dataplane").field("attached", &self.attached()).finish_non_exhaustive()
    }
}

/// Nanoseconds of CLOCK_MONOTONIC: the clock of the data path.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock(libc::CLOCK_MONOTONIC);
    now.as_secs() * 1_000_000_000 + u64::from(now.subsec_nanos())
}

/// Seconds of CLOCK_MONOTONIC, as flows and sessions carry them.
#[must_use]
pub fn monotonic_seconds() -> u32 {
    coarse().as_secs() as u32
}

/// CLOCK_MONOTONIC, some milliseconds behind at most: to ask for it costs less.
#[must_use]
pub fn coarse() -> Duration {
    clock(libc::CLOCK_MONOTONIC_COARSE)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for one timespec, which is all that the call writes.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// A key for SYN cookies that nobody can guess.
pub fn random_key() -> Result<[u64; 2], Error> {
    Ok([getrandom::u64().map_err(Error::Random)?, getrandom::u64().map_err(Error::Random)?])
}

/// The index of an interface, if it exists.
#[must_use]
pub fn interface_index(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: `name` is a string that ends with a zero byte and outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

fn replay_maps(ebpf: &mut Ebpf, prefix: &str) -> Result<Vec<Mutex<DevMap<MapData>>>, Error> {
    (0..abi::REPLAY_MAPS).map(|n| take_map(ebpf, &format!("{prefix}{n}")).map(Mutex::new)).collect()
}

/// The name of an interface, or words for it.
fn interface_name(index: u32) -> String {
    let mut name: [libc::c_char; libc::IF_NAMESIZE] = [0; libc::IF_NAMESIZE];
    // SAFETY: `name` has room for the longest name of an interface and its end.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    if found.is_null() {
        return format!("interface {index}");
    }
    // SAFETY: the call has written a string that ends with a zero byte.
    unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned()
}

/// The names of all programs.
fn programs() -> impl Iterator<Item = &'static str> {
    [abi::PROGRAM, abi::PROGRAM_EMIT, abi::PROGRAM_RELEASE].into_iter().chain(abi::STAGE_PROGRAMS)
}

fn load_maps(object: &[u8], capacities: &Capacities, pins: Option<&Pins>) -> Result<Ebpf, Error> {
    let mut loader = EbpfLoader::new();
    for map in capacities.maps() {
        loader.map_max_entries(map.name, map.entries);
        if let Some(pins) = pins {
            loader.map_pin_path(map.name, pins.map(map.name));
        }
    }
    loader.load(object).map_err(|error| {
        if let EbpfError::MapError(MapError::CreateError { name, io_error }) = &error {
            match io_error.raw_os_error() {
                Some(libc::EPERM) => return Error::NotPermitted { action: format!("creating map {name}") },
                Some(code @ (libc::ENOMEM | libc::E2BIG)) => {
                    return Error::Memory { map: name.clone(), source: io::Error::from_raw_os_error(code) };
                }
                _ => {}
            }
        }
        if matches!(&error, EbpfError::BtfError(inner) if crate::one_line(inner).contains("os error 1)")) {
            return Error::NotPermitted { action: "loading type information (BTF)".to_owned() };
        }
        Error::Object(Box::new(error))
    })
}

/// The index of an interface.
pub fn find_interface(name: &str) -> Result<u32, Error> {
    interface_index(name).ok_or_else(|| Error::NoInterface(name.to_owned()))
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), Error> {
    match xdp(ebpf, name)?.load() {
        Ok(()) => Ok(()),
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            // The verifier says of a missing CAP_PERFMON what it says of a bad program.
            let refused = matches!(io_error.raw_os_error(), Some(libc::EPERM | libc::EACCES));
            if refused && (log.trim().is_empty() || !crate::privileges::may_load()) {
                return Err(Error::NotPermitted { action: format!("loading program {name}") });
            }
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            Err(Error::Verifier { program: name, log: format!("{io_error}\n{tail}") })
        }
        Err(error) => Err(Error::Layout { name: name.to_owned(), reason: crate::one_line(&error) }),
    }
}

fn xdp<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Xdp, Error> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| Error::Layout { name: name.to_owned(), reason: "no such program".to_owned() })?;
    program.try_into().map_err(layout(name))
}

fn take_map<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &str) -> Result<M, Error> {
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| Error::Layout { name: name.to_owned(), reason: "no such map".to_owned() })?;
    M::try_from(map).map_err(layout(name))
}

fn attach(program: BorrowedFd<'_>, interface: &str, ifindex: u32, mode: AttachMode) -> Result<Link, Error> {
    Link::attach(program, ifindex, mode).map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => Error::NotPermitted { action: format!("attaching to {interface}") },
        Some(libc::EBUSY | libc::EEXIST) => Error::Busy { interface: interface.to_owned() },
        Some(libc::ENODEV) => Error::NoInterface(interface.to_owned()),
        _ if mode != AttachMode::Generic => {
            Error::NativeUnsupported { interface: interface.to_owned(), source }
        }
        _ => Error::Attach { interface: interface.to_owned(), reason: source.to_string() },
    })
}

fn layout<E: std::error::Error>(name: &str) -> impl FnOnce(E) -> Error {
    move |error| Error::Layout { name: name.to_owned(), reason: crate::one_line(&error) }
}

fn map_error(map: &str, action: &'static str) -> impl FnOnce(MapError) -> Error {
    move |source| Error::Map { map: map.to_owned(), action, source }
}

fn clear<V: Pod + Default>(counters: &Counters<V>, index: u32) -> Result<(), MapError> {
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
    let zeros = PerCpuValues::try_from(vec![V::default(); cpus])?;
    lock(counters).set(index, zeros, 0)
}

/// Locks; a panic elsewhere does not make the maps unusable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use dispatcher_common::session::{Session, SessionKey};

    use super::*;

    #[test]
    fn an_empty_object_says_how_to_build() {
        let error = Dataplane::load(&[], &Capacities::default()).expect_err("nothing to load");
        assert!(error.to_string().contains("cargo xtask build"), "{error}");
    }

    #[test]
    fn rubbish_is_no_object() {
        let error = Dataplane::load(&[1; 64], &Capacities::default()).expect_err("not an object");
        assert!(matches!(error, Error::Object(_)), "{error:?}");
    }

    #[test]
    fn the_loopback_interface_has_an_index() {
        assert!(interface_index("lo").is_some());
        assert_eq!(interface_index("no-such-interface"), None);
        assert_eq!(interface_index("a\0b"), None);
    }

    /// In a build with the object, as root: the object and this program agree about every layout.
    #[test]
    fn the_embedded_object_loads_and_runs() {
        // SAFETY: takes nothing, touches nothing.
        if object().is_empty() || unsafe { libc::geteuid() } != 0 {
            return;
        }
        let capacities = Capacities { flows: 64, sessions: 64, stash_slots: 16, ..Capacities::default() };
        let dataplane = Dataplane::load(object(), &capacities).expect("loads");
        assert_eq!(dataplane.stash().capacity(), 16);
        assert_eq!(dataplane.globals().stash_mask, 15);
        let key = SessionKey::new(1, 1, b"id").expect("a key");
        assert!(dataplane.sessions().insert_new(key, Session::of(7)).expect("new"));
        assert!(!dataplane.sessions().insert_new(key, Session::default()).expect("not new"));
        assert_eq!(dataplane.sessions().get(&key).expect("reads").expect("is there").backends[0], 7);
        assert_eq!(dataplane.sessions().iter().count(), 1);
        assert!(dataplane.sessions().remove(&key).expect("removes"));
        assert!(!dataplane.sessions().remove(&key).expect("is gone"));
        let lo = interface_index("lo").expect("lo");
        dataplane.set_replay(7, lo).expect("points at lo");
        assert!(dataplane.set_replay(8, lo).is_err());
        // An ARP frame is not ours.
        let mut frame = [0; 60];
        frame[12..14].copy_from_slice(&[8, 6]);
        let run = dataplane.run(abi::PROGRAM, &frame, None, 1, 0).expect("runs");
        assert_eq!((run.retval, run.data_out.as_slice()), (2, frame.as_slice()));
        let passed: u64 = dataplane.reasons().expect("reads").iter().map(|(_, packets)| packets).sum();
        assert_eq!(passed, 1);
        let release = Release { slot: 3, backend: 0, flow: FlowKey::default() };
        dataplane.release(&[release, release]).expect("releases");
        assert_eq!(dataplane.releases.get(0).expect("reads").slot, 3);
        assert!(matches!(dataplane.attach("no-such-if", AttachMode::Auto), Err(Error::NoInterface(_))));
    }
}
