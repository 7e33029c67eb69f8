//! Daemons with few and with many services, and what one sees of them from outside: their answers, their
//! maps, their processes.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, PerCpuArray},
};
use dispatcher_common::{
    abi,
    reason::Reason,
    service::{Frontend, VipKey},
};
use dispatcher_user::dataplane::remove_pins;

use crate::{
    daemon::{Daemon, Folder, Pins},
    topology::{Topology, VIP},
};

/// Backends of each service.
pub(super) const BACKENDS: u8 = 10;
/// Port of the service that nobody changes.
pub(super) const TRAFFIC: u16 = 80;
/// Port of the first of the others.
pub(super) const FIRST: u16 = 2000;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a configuration says beside its services.
#[derive(Clone, Copy)]
pub(super) struct Size {
    /// Services beside the one that nobody changes.
    pub(super) services: u16,
    /// `capacity.sessions`.
    pub(super) sessions: u32,
    /// `capacity.stash_slots`.
    pub(super) stash_slots: u32,
}

/// A configuration, to be written with changes.
#[derive(Clone)]
pub(super) struct Text {
    pub(super) size: Size,
    /// Lines of every service but the one that nobody changes.
    pub(super) lines: String,
    /// Services of these numbers have another weight for their first backend, and the next service has
    /// one backend less.
    pub(super) changed: Vec<u16>,
}

impl Text {
    pub(super) fn new(size: Size) -> Self {
        Self { size, lines: String::new(), changed: Vec::new() }
    }

    /// The whole file.
    pub(super) fn write(&self, pins: &Pins, state: &Path) -> String {
        let Size { services, sessions, stash_slots } = self.size;
        let all = u32::from(services) + 1;
        let mut text = format!(
            "pin = \"{}\"\nstate = \"{}\"\ninterfaces = [\"cl0\", \"be0\"]\nattach = \"native\"\n\n[capacity]\nflows = 524288\n\
             sessions = {sessions}\nstash_slots = {stash_slots}\nfrontends = {}\nbackends = {}\nlb_table = {}\n",
            pins.path().display(),
            state.display(),
            all.max(16),
            all * u32::from(BACKENDS),
            all * 2 * 4093,
        );
        self.service(&mut text, "traffic", TRAFFIC, None);
        for number in 0..services {
            self.service(&mut text, &name(number), FIRST + number, Some(number));
        }
        text
    }

    fn service(&self, text: &mut String, name: &str, port: u16, number: Option<u16>) {
        *text += &format!(
            "\n[[service]]\nname = \"{name}\"\nvip = \"{}:{port}\"\naffinity = [\"tls-session-id\"]\n",
            VIP[0]
        );
        if number.is_some() {
            *text += &self.lines;
        }
        let has = |number: Option<u16>| number.is_some_and(|number| self.changed.contains(&number));
        let fewer = has(number.and_then(|number| number.checked_sub(1)));
        for backend in 0..BACKENDS - u8::from(fewer) {
            let weight = if backend == 0 && has(number) { 3 } else { 1 };
            *text += &format!(
                "[[service.backend]]\nname = \"b{}\"\naddress = \"10.2.0.{}:{port}\"\nweight = {weight}\n",
                backend + 1,
                11 + backend
            );
        }
    }
}

/// The name of a service.
pub(super) fn name(number: u16) -> String {
    format!("s{number}")
}

fn state_file(folder: &Folder) -> PathBuf {
    folder.path().join("state.redb")
}

/// A daemon whose maps are pinned, so that others can look into them.
pub(super) struct Scene {
    // In the order in which they must end.
    pub(super) daemon: Daemon,
    pub(super) pins: Pins,
    folder: Folder,
}

impl Scene {
    /// Starts a daemon; how long that took, too.
    pub(super) fn start(topology: &Topology, text: &Text) -> Result<(Self, Duration)> {
        let (pins, folder) = (Pins::new(), Folder::new()?);
        let started = Instant::now();
        let daemon = Daemon::start_with(&topology.dispatcher, &text.write(&pins, &state_file(&folder)))?;
        Ok((Self { daemon, pins, folder }, started.elapsed()))
    }

    /// Ends the daemon and all its maps, as the end of the machine would, and starts it again.
    pub(super) fn reboot(&mut self, topology: &Topology, text: &Text) -> Result<Duration> {
        self.daemon.kill()?;
        remove_pins(self.pins.path())?;
        let started = Instant::now();
        self.daemon.again(&topology.dispatcher, &text.write(&self.pins, &state_file(&self.folder)))?;
        Ok(started.elapsed())
    }

    /// Size of the state file, MiB.
    pub(super) fn state_size(&self) -> Result<f64> {
        Ok(fs::metadata(state_file(&self.folder))?.len() as f64 / f64::from(1 << 20))
    }

    /// One request: how long until the answer was here, and the answer.
    pub(super) fn call(&self, method: &str, path: &str, body: &str) -> Result<(Duration, Vec<u8>)> {
        call(self.daemon.socket(), method, path, body)
    }

    /// Sets a backend's state.
    pub(super) fn set_state(&self, service: &str, backend: &str, state: &str) -> Result<Duration> {
        let path = format!("/v1/backends/{service}/{backend}");
        self.call("PATCH", &path, &format!("{{\"state\":\"{state}\"}}")).map(|(took, _)| took)
    }

    /// Puts another configuration in force.
    pub(super) fn reload(&self, text: &Text, dry_run: bool) -> Result<Duration> {
        self.daemon.rewrite(&text.write(&self.pins, &state_file(&self.folder)))?;
        let path = if dry_run { "/v1/reload?dry_run=true" } else { "/v1/reload" };
        self.call("POST", path, "").map(|(took, _)| took)
    }

    fn data(&self, name: &str) -> Result<MapData> {
        let path = self.pins.path().join("maps").join(name);
        MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))
    }

    pub(super) fn array<V: Pod>(&self, name: &str) -> Result<Array<MapData, V>> {
        Ok(Array::try_from(Map::Array(self.data(name)?))?)
    }

    /// A table that forgets what was not used for longest.
    pub(super) fn lru<K: Pod, V: Pod>(&self, name: &str) -> Result<HashMap<MapData, K, V>> {
        Ok(HashMap::try_from(Map::LruHashMap(self.data(name)?))?)
    }

    /// Where its programs are pinned.
    pub(super) fn program(&self, name: &str) -> Result<PathBuf> {
        let folder = self.pins.path();
        let generations = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
        let found = generations.flatten().map(|entry| entry.path().join(name)).find(|path| path.exists());
        found.with_context(|| format!("no program {name} in {}", folder.display()))
    }

    pub(super) fn reasons(&self) -> Result<Reasons> {
        Ok(Reasons(PerCpuArray::try_from(Map::PerCpuArray(self.data(abi::MAP_REASONS)?))?))
    }

    pub(super) fn tables(&self, port: u16) -> Result<Tables> {
        let vips: HashMap<MapData, VipKey, u32> = HashMap::try_from(Map::HashMap(self.data(abi::MAP_VIPS)?))?;
        let index = vips.get(&VipKey::new(VIP[0], port, 6), 0).context("no such VIP")?;
        Ok(Tables {
            index,
            frontends: self.array(abi::MAP_FRONTENDS)?,
            entries: self.array(abi::MAP_LB_TABLE)?,
        })
    }

    /// Resident memory of the daemon, MiB.
    pub(super) fn resident(&mut self) -> Result<f64> {
        let path = format!("/proc/{}/status", self.daemon.process().id());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kibibytes / 1024.0)
    }

    /// Time that the daemon's threads have run.
    pub(super) fn cpu(&mut self) -> Result<Duration> {
        let folder = format!("/proc/{}/task", self.daemon.process().id());
        let mut sum = 0;
        for task in fs::read_dir(&folder).with_context(|| format!("reading {folder}"))?.flatten() {
            // A thread may have ended meanwhile.
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            sum += text.split_whitespace().next().and_then(|first| first.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(sum))
    }
}

fn call(socket: &Path, method: &str, path: &str, body: &str) -> Result<(Duration, Vec<u8>)> {
    let started = Instant::now();
    let mut stream = UnixStream::connect(socket).with_context(|| format!("asking {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: d\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(|| format!("{method} {path}"))?;
    let took = started.elapsed();
    if !answer.starts_with(b"HTTP/1.0 200 ") {
        bail!("{method} {path}: {}", String::from_utf8_lossy(&answer));
    }
    Ok((took, answer))
}

/// Packets by reason.
pub(super) struct Reasons(PerCpuArray<MapData, u64>);

impl Reasons {
    pub(super) fn read(&self, reason: Reason) -> Result<u64> {
        Ok(self.0.get(&(reason as u32), 0)?.iter().sum())
    }
}

/// A frontend's load-balancing table, as packets meet it.
pub(super) struct Tables {
    index: u32,
    frontends: Array<MapData, Frontend>,
    entries: Array<MapData, u32>,
}

impl Tables {
    /// Where the table in use is.
    pub(super) fn place(&self) -> Result<(u32, u32)> {
        let frontend = self.frontends.get(&self.index, 0)?;
        Ok((frontend.table_base, frontend.table_len))
    }

    /// The table in use.
    pub(super) fn read(&self) -> Result<Vec<u32>> {
        let (base, len) = self.place()?;
        ensure!(len > 0, "a table is empty");
        (base..base + len).map(|at| Ok(self.entries.get(&at, 0)?)).collect()
    }
}
