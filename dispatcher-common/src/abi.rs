//! Names and default capacities of the maps, and the version of their layout.

/// Version of every layout in this crate, written to `Globals::abi` by whoever makes the maps.
///
/// Pinned maps outlive the programs and the daemon that made them. Raise this whenever another version
/// would misread what it finds in a map: a field that moves, changes its size or its meaning, a constant of
/// `service.rs`, `session.rs`, `flow.rs` or `stash.rs` that gets another number, another order in which
/// old programs and new ones may write. A new map, a new field in bytes that were unused and zero, and a new
/// flag that was 0 are no reason if 0 means what was done before. A daemon refuses maps of another version,
/// and maps whose type, sizes or fixed number of entries differ. Maps that programs and daemon make anew
/// at each start (`STAGES`, `SCRATCH`, the replay maps) are free to change.
pub const ABI_VERSION: u32 = 1;

/// Name of the XDP program attached to interfaces.
pub const PROGRAM: &str = "dispatcher";
/// Name of the XDP program that binds new connections; `dispatcher` calls it through `STAGES`.
pub const PROGRAM_FIRST_DATA: &str = "first_data";
/// Name of the XDP program for the first answers of a backend; `dispatcher` calls it through `STAGES`.
pub const PROGRAM_ANSWER: &str = "answer";
/// Name of the XDP program for datagrams of QUIC services; `dispatcher` calls it through `STAGES`.
pub const PROGRAM_DATAGRAM: &str = "datagram";
/// Name of the XDP program for SYNs to listeners of the daemon; `dispatcher` calls it through `STAGES`.
pub const PROGRAM_LISTENER: &str = "listener";
/// Name of the XDP program that runs on frames leaving through a replay map.
pub const PROGRAM_EMIT: &str = "emit";
/// Name of the XDP program through which the daemon releases held hellos.
pub const PROGRAM_RELEASE: &str = "release";

/// `FLOWS`: LRU hash, [`FlowKey`](crate::flow::FlowKey) -> [`Flow`](crate::flow::Flow); two entries a connection.
pub const MAP_FLOWS: &str = "FLOWS";
/// `SESSIONS`: LRU hash, [`SessionKey`](crate::session::SessionKey) -> [`Session`](crate::session::Session):
/// what servers, the daemon and the operator said.
pub const MAP_SESSIONS: &str = "SESSIONS";
/// `PROVISIONAL`: as `SESSIONS`, for identifiers that only clients came with.
pub const MAP_PROVISIONAL: &str = "PROVISIONAL";
/// `VIPS`: hash, [`VipKey`](crate::service::VipKey) -> index into `FRONTENDS` (u32).
pub const MAP_VIPS: &str = "VIPS";
/// `FRONTENDS`: array of [`Frontend`](crate::service::Frontend).
pub const MAP_FRONTENDS: &str = "FRONTENDS";
/// `BACKENDS`: array of [`Backend`](crate::service::Backend), two a backend: see [`endpoint_index`](crate::service::endpoint_index).
pub const MAP_BACKENDS: &str = "BACKENDS";
/// `BACKEND_INDEX`: hash, stable backend id (u32) -> backend index (u32).
pub const MAP_BACKEND_INDEX: &str = "BACKEND_INDEX";
/// `LB_TABLE`: array of backend indexes (u32); each frontend owns a range of it.
pub const MAP_LB_TABLE: &str = "LB_TABLE";
/// `SOURCES`: array of [`Addr`](crate::addr::Addr): the source addresses of `source = "dispatcher"` services.
pub const MAP_SOURCES: &str = "SOURCES";
/// `COOKIES`: array of [automata](crate::http::automaton), one a cookie's name.
pub const MAP_COOKIES: &str = "COOKIES";
/// `STASH`: array of [`Slot`](crate::stash::Slot); the number of entries is a power of two.
pub const MAP_STASH: &str = "STASH";
/// `GLOBALS`: array with one [`Globals`](crate::globals::Globals).
pub const MAP_GLOBALS: &str = "GLOBALS";
/// `REASONS`: per-CPU array of u64 indexed by [`Reason`](crate::reason::Reason).
pub const MAP_REASONS: &str = "REASONS";
/// `BACKEND_STATS`: per-CPU array of [`BackendStats`](crate::service::BackendStats) indexed by backend index.
pub const MAP_BACKEND_STATS: &str = "BACKEND_STATS";
/// `BACKEND_TIMES`: per-CPU array of [`BackendTimes`](crate::service::BackendTimes) indexed by backend index.
pub const MAP_BACKEND_TIMES: &str = "BACKEND_TIMES";
/// `EVENTS`: ring buffer of [`Event`](crate::event::Event), where the daemon looks now and then.
pub const MAP_EVENTS: &str = "EVENTS";
/// `HELD`: ring buffer of [`Event`](crate::event::Event) of the kind
/// [`EVENT_HELD`](crate::event::EVENT_HELD), for which the daemon is woken.
pub const MAP_HELD: &str = "HELD";
/// `RELEASES`: array of [`Release`](crate::event::Release), read by the `release` program.
pub const MAP_RELEASES: &str = "RELEASES";
/// `CLASSES`: array of [`ClassEntry`](crate::qos::ClassEntry).
pub const MAP_CLASSES: &str = "CLASSES";
/// `NETWORKS`: trie, [`Network`](crate::qos::Network) -> id of a class (u32).
pub const MAP_NETWORKS: &str = "NETWORKS";
/// `NAMES`: hash, [`Name`](crate::qos::Name) -> id of a class (u32).
pub const MAP_NAMES: &str = "NAMES";
/// `LIMITED`: array by backend index of [`limited_word`](crate::qos::limited_word).
pub const MAP_LIMITED: &str = "LIMITED";
/// `RATES`: array of [`Rates`](crate::qos::Rates), see [`limit_index`](crate::qos::limit_index).
pub const MAP_RATES: &str = "RATES";
/// `BUCKETS`: array of [`Buckets`](crate::qos::Buckets), at the same indexes.
pub const MAP_BUCKETS: &str = "BUCKETS";
/// `TOKENS`: per-CPU array of [`Credits`](crate::qos::Credits) by backend index.
pub const MAP_TOKENS: &str = "TOKENS";
/// `TAKEN_BACK`: array of [`TakenBack`](crate::qos::TakenBack) by the number of the backend among those with limits. The
/// daemon's own.
pub const MAP_TAKEN_BACK: &str = "TAKEN_BACK";
/// `CLASS_STATS`: per-CPU array of [`ClassStats`](crate::qos::ClassStats), see [`stats_index`](crate::qos::stats_index).
pub const MAP_CLASS_STATS: &str = "CLASS_STATS";
/// `STAGES`: program array; the daemon puts [`STAGE_PROGRAMS`] at their indexes.
pub const MAP_STAGES: &str = "STAGES";
/// Index of the `first_data` program in `STAGES`.
pub const STAGE_FIRST_DATA: u32 = 0;
/// Index of the `answer` program in `STAGES`.
pub const STAGE_ANSWER: u32 = 1;
/// Index of the `datagram` program in `STAGES`.
pub const STAGE_DATAGRAM: u32 = 2;
/// Index of the `listener` program in `STAGES`.
pub const STAGE_LISTENER: u32 = 3;
/// The programs of `STAGES`, in order of their indexes.
pub const STAGE_PROGRAMS: [&str; 4] =
    [PROGRAM_FIRST_DATA, PROGRAM_ANSWER, PROGRAM_DATAGRAM, PROGRAM_LISTENER];
/// Prefix of the replay device maps `REPLAY0` .. `REPLAY7`, one an interface through which backends
/// are reached. Every one has [`REPLAY_WIDTH`] entries, all the same interface with the `emit` program.
pub const MAP_REPLAY_PREFIX: &str = "REPLAY";

/// Number of replay maps, so of interfaces through which passthrough backends can be reached.
pub const REPLAY_MAPS: u32 = 8;
/// Entries of a replay map: clones of one frame that can become segments, plus the frame itself.
pub const REPLAY_WIDTH: u32 = 5;
/// First and third word of a frame on its way to the `emit` program, around the index of its stash slot; a locally
/// administered MAC.
pub const REPLAY_MARK: u32 = u32::from_ne_bytes([0x02, 0xd1, 0x5b, 0xa7]);

/// Prefix of `SINGLE0` .. `SINGLE7`: as the replay maps, for what fits one segment.
pub const MAP_SINGLE_PREFIX: &str = "SINGLE";
/// Entries of those: a clone, and the frame itself.
pub const SINGLE_WIDTH: u32 = 2;

/// Default capacity of `FLOWS` in entries.
pub const DEFAULT_FLOWS: u32 = 262_144;
/// Default capacity of `SESSIONS` in entries.
pub const DEFAULT_SESSIONS: u32 = 262_144;
/// Default capacity of `PROVISIONAL` in entries.
pub const DEFAULT_PROVISIONAL: u32 = 65_536;
/// Default number of stash slots (a power of two).
pub const DEFAULT_STASH_SLOTS: u32 = 4096;
/// Default capacity of `VIPS` and `FRONTENDS`.
pub const DEFAULT_FRONTENDS: u32 = 1024;
/// Default number of backends (`BACKENDS` has twice as many entries).
pub const DEFAULT_BACKENDS: u32 = 4096;
/// Default capacity of `LB_TABLE` in entries; a frontend's table of N entries needs 2 N, so that a
/// new table is written beside the one in use.
pub const DEFAULT_LB_TABLE: u32 = 1_048_576;
/// Default capacity of `SOURCES`.
pub const DEFAULT_SOURCES: u32 = 256;
/// Default capacity of `COOKIES`.
pub const DEFAULT_COOKIES: u32 = 16;
/// Size of each of the rings `EVENTS` and `HELD` in bytes.
pub const EVENTS_BYTES: u32 = 1 << 20;
/// Capacity of `RELEASES`: held hellos that one run of the `release` program can release.
pub const RELEASES_MAX: u32 = 256;
