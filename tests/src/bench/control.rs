//! `control`: the daemon. How long do its commands take, with few services and with many; how many misses
//! does it answer; what does it cost?
//!
//! ```text
//! clients --- cl0 dispatcher be0 --- switch --- ten backends, of every service
//! ```
//!
//! The maps are pinned, so that this process can look into them, and let frames of its own run through the
//! programs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;
use dispatcher_common::{
    abi,
    service::stable_id,
    session::{KIND_TLS_SESSION_ID, STATE_CONFIRMED, Session, SessionKey},
};
use dispatcher_user::{balancer::Balance, dataplane::monotonic_seconds};

use crate::{
    bench::{
        fastpath,
        report::{Goal, Report, Row, median},
    },
    topology::{Plan, Topology},
};

mod misses;
mod scene;
mod traffic;

use misses::Generator;
use scene::{BACKENDS, FIRST, Scene, Size, TRAFFIC, Tables, Text, name};
use traffic::{Echo, Seen, Traffic};

/// Services of the large configuration.
const SERVICES: u16 = 1000;
/// Services that a reload changes.
const CHANGED: [u16; 3] = [100, 500, 900];
/// Sessions in the mapping table whose list is asked for.
const SESSIONS: u32 = 1_000_000;
/// Slots for first data: misses of a round fill an eighth.
const STASH: u32 = 131_072;
/// Most time until a table says what the operator said.
const PUBLISH_MS: f64 = 100.0;
/// Least misses a second.
const MISSES: f64 = 50_000.0;
/// How long a table may take to follow.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked at.
const LOOK: Duration = Duration::from_micros(100);

#[derive(Clone, Copy)]
struct Effort {
    rounds: usize,
    /// Of the long list.
    lists: usize,
    /// How long the daemon is watched at rest.
    rest: Duration,
}

/// Parts of the measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Part {
    /// Reloads, tables and memory with few and with many services.
    Services,
    /// Misses that the daemon answers.
    Misses,
    /// A long mapping table.
    Sessions,
}

/// Measures all of it, or one part.
pub fn run(quick: bool, only: Option<Part>) -> Result<Report> {
    let effort = if quick {
        Effort { rounds: 5, lists: 1, rest: Duration::from_secs(5) }
    } else {
        Effort { rounds: 9, lists: 5, rest: Duration::from_secs(15) }
    };
    let topology = Topology::new(Plan { backends: BACKENDS, ..Plan::default() })?;
    let _echo = Echo::start(&topology, TRAFFIC)?;
    let mut report = Report { bench: "control", rows: Vec::new(), goals: Vec::new() };
    for part in Part::value_variants().iter().filter(|part| only.is_none_or(|only| only == **part)) {
        let measure = match part {
            Part::Services => services,
            Part::Misses => answer_misses,
            Part::Sessions => sessions,
        };
        measure(&topology, effort, &mut report).with_context(|| format!("{part:?}"))?;
    }
    Ok(report)
}

const DISPATCHER: &str = "dispatcher";

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

fn many() -> Text {
    Text::new(Size { services: SERVICES, sessions: 65_536, stash_slots: 1024 })
}

fn few() -> Text {
    Text::new(Size { services: 1, ..many().size })
}

/// Reloads, tables and memory, with one service and with many.
fn services(topology: &Topology, effort: Effort, report: &mut Report) -> Result<()> {
    // One daemon after the other: both would attach to the same interfaces.
    let case_few = "1 service x 10 backends".to_owned();
    let case_many = format!("{SERVICES} services x {BACKENDS} backends");
    let mut publish = Vec::new();
    for (case, text, numbers) in [(&case_few, few(), [0; 3]), (&case_many, many(), CHANGED)] {
        let (mut scene, started) = Scene::start(topology, &text)?;
        thread::sleep(Duration::from_secs(1));
        let mut add = |metric: &str, unit, values: &[f64]| {
            report.rows.push(Row::new(case, DISPATCHER, metric, unit, values));
        };
        add("start until ready", "ms", &[ms(started)]);
        add("resident memory of the daemon, at rest", "MiB", &[scene.resident()?]);
        let [mut dry, mut full, mut same] = [const { Vec::new() }; 3];
        let traffic = Traffic::start(topology, TRAFFIC);
        for round in 0..effort.rounds {
            let mut next = text.clone();
            if round % 2 == 0 {
                next.changed = numbers.to_vec();
            }
            dry.push(ms(scene.reload(&next, true)?));
            full.push(ms(scene.reload(&next, false)?));
            same.push(ms(scene.reload(&next, false)?));
        }
        let Seen { messages, connections, lost, again } = traffic.end();
        add("reload of a few changes: POST /v1/reload", "ms", &full);
        add("the same with dry_run", "ms", &dry);
        add("reload without a change", "ms", &same);
        add("traffic meanwhile: connections made", "count", &[connections as f64]);
        add("traffic meanwhile: messages answered", "count", &[messages as f64]);
        add("traffic meanwhile: connections lost", "count", &[lost as f64]);
        add("traffic meanwhile: segments sent again", "count", &[again as f64]);
        scene.reload(&text, false)?;
        let number = numbers[1];
        let seen = Published::measure(&scene, number, effort.rounds)?;
        add("disable or enable a backend: until LB_TABLE says it", "ms", &seen.table);
        add("disable or enable a backend: until the API answers", "ms", &seen.answer);
        add("resident memory of the daemon, after all that", "MiB", &[scene.resident()?]);
        publish.push((case, seen));
        report.goals.push(Goal::at_most(&format!("connections lost, {case}"), Some(lost as f64), 0.0));
        if text.size.services == 1 {
            for (balance, _) in Balance::NAMES {
                let other = Text { lines: format!("balance = \"{balance}\"\n"), ..text.clone() };
                scene.reload(&other, false)?;
                let seen = Published::measure(&scene, 0, 2)?;
                let metric = "entries moved beyond those that had to, one of 10 backends";
                let case = format!("balance = \"{balance}\"");
                report.rows.push(Row::new(&case, DISPATCHER, metric, "percent", &seen.moved));
            }
        }
    }
    for (case, seen) in publish {
        let goal = format!("a table says what the operator said, ms, {case}");
        report.goals.push(Goal::at_most(&goal, median(&seen.table), PUBLISH_MS));
    }
    Ok(())
}

/// From the operator's command to the table.
#[derive(Default)]
struct Published {
    table: Vec<f64>,
    answer: Vec<f64>,
    /// Percent of entries that moved although nothing of theirs changed.
    moved: Vec<f64>,
}

impl Published {
    /// Disables and enables a backend of a service in turn.
    fn measure(scene: &Scene, service: u16, rounds: usize) -> Result<Self> {
        let mut found = Self::default();
        for round in 0..rounds {
            for state in ["disabled", "enabled"] {
                let backend = format!("b{}", 1 + round % usize::from(BACKENDS));
                found.once(scene, service, &backend, state)?;
            }
        }
        Ok(found)
    }

    fn once(&mut self, scene: &Scene, service: u16, backend: &str, state: &str) -> Result<()> {
        let tables = scene.tables(FIRST + service)?;
        let before = tables.read()?;
        let watch = Watch::start(tables)?;
        let started = Instant::now();
        self.answer.push(ms(scene.set_state(&name(service), backend, state)?));
        let (tables, seen) = watch.end()?;
        self.table.push(ms(seen.duration_since(started)));
        let after = tables.read()?;
        ensure!(before.len() == after.len(), "a table has another size");
        // Who is in one of them only.
        let differs = |index: &u32| before.contains(index) != after.contains(index);
        let moved =
            before.iter().zip(&after).filter(|(old, new)| old != new && !differs(old) && !differs(new));
        self.moved.push(moved.count() as f64 * 100.0 / before.len() as f64);
        Ok(())
    }
}

/// Waits on a thread of its own until a frontend points to another table.
struct Watch {
    thread: thread::JoinHandle<Result<(Tables, Instant)>>,
}

impl Watch {
    fn start(tables: Tables) -> Result<Self> {
        let before = tables.place()?;
        let ready = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let ready = Arc::clone(&ready);
            move || {
                ready.store(true, Ordering::Relaxed);
                let deadline = Instant::now() + PATIENCE;
                while tables.place()? == before {
                    ensure!(Instant::now() < deadline, "the table stays as it was");
                    thread::sleep(LOOK);
                }
                Ok((tables, Instant::now()))
            }
        });
        while !ready.load(Ordering::Relaxed) {
            thread::sleep(LOOK);
        }
        Ok(Self { thread })
    }

    fn end(self) -> Result<(Tables, Instant)> {
        self.thread.join().map_err(|_| anyhow::anyhow!("the thread that watches a table panicked"))?
    }
}

/// Misses a second with `miss = "daemon"`.
fn answer_misses(topology: &Topology, effort: Effort, report: &mut Report) -> Result<()> {
    // The SYNs end at the next device, as they would on a wire.
    let switch = topology.switch.as_ref().context("no switch")?;
    switch.nft(
        "table netdev misses { chain c { type filter hook ingress device \"p0\" priority 0; \
         tcp flags syn drop\n }\n }",
    )?;
    let mut text = Text::new(Size { services: 1, sessions: 65_536, stash_slots: STASH });
    let mut first: Option<f64> = None;
    for (balance, _) in Balance::NAMES.into_iter().filter(|(name, _)| MISS_BALANCES.contains(name)) {
        text.lines = format!("miss = \"daemon\"\nbalance = \"{balance}\"\n");
        let (mut scene, _) = Scene::start(topology, &text)?;
        let mut generator = Generator::new(&scene)?;
        // The first is for warming up.
        generator.round(&mut scene, 0)?;
        let rounds = (0..effort.rounds).map(|_| generator.round(&mut scene, 0));
        let rounds = rounds.collect::<Result<Vec<_>>>()?;
        let case = format!("miss = \"daemon\", balance = \"{balance}\"");
        let values = |of: fn(&misses::Round) -> f64| rounds.iter().map(of).collect::<Vec<f64>>();
        let mut add = |metric: &str, unit, values: &[f64]| {
            report.rows.push(Row::new(&case, DISPATCHER, metric, unit, values));
        };
        add("sessions bound by the daemon", "1/s", &values(|round| round.rate));
        add("time of the daemon a session", "us", &values(|round| round.daemon_us));
        add("time of the data path until a hello is held", "us", &values(|round| round.held_us));
        add("hellos bound by the table, or without a slot", "count", &values(|round| round.others));
        first = first.or(median(&values(|round| round.rate)));
    }
    switch.nft("delete table netdev misses")?;
    report.goals.push(Goal::at_least("misses that the daemon answers, a second", first, MISSES));
    Ok(())
}

/// Balancers that misses are measured with, the first for the goal.
const MISS_BALANCES: [&str; 2] = ["maglev", "weighted-least-connections"];

/// A mapping table with a million entries: its list, and what it costs the daemon.
fn sessions(topology: &Topology, effort: Effort, report: &mut Report) -> Result<()> {
    let text = Text::new(Size { services: 1, sessions: SESSIONS + SESSIONS / 8, stash_slots: 1024 });
    let (mut scene, started) = Scene::start(topology, &text)?;
    report.rows.push(Row::new("no session", DISPATCHER, "start until ready", "ms", &[ms(started)]));
    thread::sleep(Duration::from_secs(1));
    let rest = |scene: &mut Scene, case: &str, report: &mut Report| -> Result<()> {
        let (before, started) = (scene.cpu()?, Instant::now());
        thread::sleep(effort.rest);
        let used = scene.cpu()?.saturating_sub(before).as_secs_f64() / started.elapsed().as_secs_f64();
        let mut add = |metric: &str, unit, value| {
            report.rows.push(Row::new(case, DISPATCHER, metric, unit, &[value]));
        };
        add("time of the daemon, at rest", "percent of a core", used * 100.0);
        add("resident memory of the daemon, at rest", "MiB", scene.resident()?);
        Ok(())
    };
    rest(&mut scene, "no session", report)?;
    let mut table = scene.lru::<SessionKey, Session>(abi::MAP_SESSIONS)?;
    let now = monotonic_seconds();
    for number in 0..SESSIONS {
        let id = fastpath::session_id(number);
        let key = SessionKey::new(stable_id(&name(0)), KIND_TLS_SESSION_ID, &id).context("32 bytes")?;
        let backend = stable_id(&format!("{}/b{}", name(0), 1 + number % u32::from(BACKENDS)));
        let session = Session {
            state: STATE_CONFIRMED,
            created: now,
            used: now,
            expires: now + 3600,
            ..Session::of(backend)
        };
        table.insert(key, session, 0)?;
    }
    let case = format!("{SESSIONS} sessions");
    rest(&mut scene, &case, report)?;
    let [mut whole, mut bytes, mut limited] = [const { Vec::new() }; 3];
    for _ in 0..effort.lists {
        let (took, answer) = scene.call("GET", "/v1/sessions", "")?;
        let listed = answer.windows(6).filter(|window| window == b"\"hits\"").count();
        ensure!(listed >= SESSIONS as usize / 100 * 99, "{listed} sessions were listed");
        whole.push(ms(took));
        bytes.push(answer.len() as f64 / f64::from(1 << 20));
    }
    for _ in 0..effort.rounds {
        limited.push(ms(scene.call("GET", "/v1/sessions?limit=100", "")?.0));
    }
    let resident = scene.resident()?;
    let saves = (0..effort.lists).map(|_| Ok(ms(scene.call("POST", "/v1/sessions/save", "")?.0)));
    let saves = saves.collect::<Result<Vec<_>>>()?;
    let size = scene.state_size()?;
    let restored = scene.reboot(topology, &text)?;
    let answer = scene.call("GET", "/v1/sessions", "")?.1;
    let listed = answer.windows(6).filter(|window| window == b"\"hits\"").count();
    ensure!(listed >= SESSIONS as usize / 100 * 99, "{listed} sessions were restored");
    let mut add = |metric: &str, unit, values: &[f64]| {
        report.rows.push(Row::new(&case, DISPATCHER, metric, unit, values));
    };
    add("POST /v1/sessions/save", "ms", &saves);
    add("state file", "MiB", &[size]);
    add("start until ready, with new maps", "ms", &[ms(restored)]);
    add("GET /v1/sessions", "ms", &whole);
    add("GET /v1/sessions, size", "MiB", &bytes);
    add("GET /v1/sessions?limit=100", "ms", &limited);
    add("resident memory of the daemon, after these lists", "MiB", &[resident]);
    Ok(())
}
