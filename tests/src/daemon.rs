//! The real `dispatcherd` in a namespace, started from a configuration file, and the real
//! `dispatcherctl` to ask it.

use std::{
    env,
    io::{BufRead as _, BufReader, Read},
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio, id},
    sync::{
        Arc, Mutex, Once, PoisonError,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dispatcher_user::{api, dataplane::remove_pins};
use serde::de::DeserializeOwned;

use crate::{
    netns::{Netns, PREFIX, execute, leftovers},
    sockets,
    topology::{Place, Topology, VIP},
};

/// How long the daemon may take to start.
const START: Duration = Duration::from_secs(120);
/// How long it may take to stop.
const STOP: Duration = Duration::from_secs(5);

/// A service in a configuration file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    name: String,
    port: u16,
    backend_port: u16,
    lines: Vec<String>,
    weights: Vec<u32>,
    each: Vec<String>,
}

impl Service {
    /// A service on a port of both VIPs, whose backends are all those of the topology, named `b1`
    /// and so on, on the same port.
    #[must_use]
    pub fn new(name: &str, port: u16) -> Self {
        Self {
            name: name.to_owned(),
            port,
            backend_port: port,
            lines: Vec::new(),
            weights: Vec::new(),
            each: Vec::new(),
        }
    }

    /// Adds a line, such as `miss = "daemon"`.
    #[must_use]
    pub fn with(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }

    /// Gives the backends weights, in their order; the others have 1.
    #[must_use]
    pub fn weights(mut self, weights: &[u32]) -> Self {
        self.weights = weights.to_vec();
        self
    }

    /// Adds a line to each backend; `{}` in it becomes its number, from 1.
    #[must_use]
    pub fn each(mut self, line: &str) -> Self {
        self.each.push(line.to_owned());
        self
    }

    /// Lets the backends listen on another port.
    #[must_use]
    pub fn backend_port(mut self, port: u16) -> Self {
        self.backend_port = port;
        self
    }

    fn toml(&self, places: &[Place]) -> String {
        let Self { name, port, backend_port, lines, weights, each } = self;
        let mut text = format!(
            "\n[[service]]\nname = \"{name}\"\nvip = [\"{}:{port}\", \"[{}]:{port}\"]\n{}\n",
            VIP[0],
            VIP[1],
            lines.join("\n")
        );
        for (i, place) in places.iter().enumerate() {
            let [v4, v6] = place.addresses;
            let weight = weights.get(i).copied().unwrap_or(1);
            text += &format!(
                "\n[[service.backend]]\nname = \"b{}\"\naddress = [\"{v4}:{backend_port}\", \"[{v6}]:{backend_port}\"]\nweight = {weight}\n",
                i + 1
            );
            for line in each {
                text += &format!("{}\n", line.replace("{}", &(i + 1).to_string()));
            }
        }
        text
    }
}

/// A configuration for a topology, as text. Nothing is pinned or kept.
#[must_use]
pub fn config(topology: &Topology, attach: &str, services: &[Service]) -> String {
    let interfaces: Vec<String> = topology.interfaces().iter().map(|name| format!("\"{name}\"")).collect();
    let mut text = format!(
        "{UNPINNED}\ninterfaces = [{}]\nattach = \"{attach}\"\n\n[capacity]\nflows = 65536\nsessions = 65536\nstash_slots = 1024\n",
        interfaces.join(", ")
    );
    for service in services {
        text += &service.toml(&topology.backends);
    }
    text
}

/// The lines of a configuration by which nothing outlives the daemon.
pub const UNPINNED: &str = "pin = \"none\"\nstate = \"none\"";

/// A place for the pins of one test's daemons, removed with all that is pinned there when dropped.
#[derive(Debug)]
pub struct Pins(PathBuf);

impl Pins {
    /// A place that nobody else has.
    #[must_use]
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        let all = Path::new("/sys/fs/bpf");
        SWEEP.call_once(|| {
            for name in leftovers(all) {
                let _ = remove_pins(&all.join(name));
            }
        });
        Self(all.join(format!("{PREFIX}-{}-{}", id(), COUNTER.fetch_add(1, Ordering::Relaxed))))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A configuration with pins here instead of none.
    #[must_use]
    pub fn within(&self, config: &str) -> String {
        config.replace("pin = \"none\"", &format!("pin = \"{}\"", self.0.display()))
    }
}

impl Default for Pins {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Err(error) = remove_pins(&self.0) {
            eprintln!("{error}");
        }
    }
}

/// A folder for the files of one test or demo, removed when dropped.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Makes one.
    pub fn new() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        let all = env::temp_dir();
        SWEEP.call_once(|| {
            for name in leftovers(&all) {
                let _ = std::fs::remove_dir_all(all.join(name));
            }
        });
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = all.join(format!("{PREFIX}-{}-{number}", id()));
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    /// Writes a file into it.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process whose output is kept; it is stopped when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts a command; each line of its output is also sent to `lines`.
    pub fn start(mut command: Command, lines: Option<mpsc::Sender<String>>) -> Result<Self> {
        // A group of its own: Ctrl-C is for us, and we stop it in order.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let pipes: [Option<Box<dyn Read + Send>>; 2] =
            [child.stdout.take().map(|o| Box::new(o) as _), child.stderr.take().map(|e| Box::new(e) as _)];
        let mut readers = Vec::new();
        for pipe in pipes.into_iter().flatten() {
            let (log, lines) = (Arc::clone(&log), lines.clone());
            readers.push(std::thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    log.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
                    if let Some(lines) = &lines {
                        let _ = lines.send(line);
                    }
                }
            }));
        }
        Ok(Self { child, log, readers })
    }

    /// Waits until something listens at this address of the namespace, as long as the process lives.
    pub fn listens(&mut self, netns: &Netns, at: SocketAddr) -> Result<()> {
        let deadline = Instant::now() + sockets::PATIENCE;
        while sockets::connect(netns, at.ip(), at).is_err() {
            if let Some(status) = self.ended() {
                bail!("{status}; it said:\n{}", self.log());
            }
            ensure!(Instant::now() < deadline, "nothing listens at {at}; it said:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What it has said so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its end, if it has come.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end, and until all that it said has been read.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.ended() {
                for reader in self.readers.drain(..) {
                    let _ = reader.join();
                }
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("process {} does not end; it said:\n{}", self.id(), self.log())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain system call. The child has not been waited for, so the id is still its.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.signal(libc::SIGTERM);
            if self.wait(STOP).is_err() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

/// Name of the configuration's file.
const FILE: &str = "dispatcher.toml";

/// Name of the control socket.
const SOCKET: &str = "control.sock";

/// A running `dispatcherd`.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    socket: PathBuf,
    folder: Folder,
}

impl Daemon {
    /// Starts it in the dispatcher's namespace and waits until it is ready.
    pub fn start(topology: &Topology, attach: &str, services: &[Service]) -> Result<Self> {
        Self::start_with(&topology.dispatcher, &config(topology, attach, services))
    }

    /// Starts it from the text of a configuration.
    pub fn start_with(netns: &Netns, config: &str) -> Result<Self> {
        Self::start_program(&program("dispatcherd")?, netns, config)
    }

    /// The same with another program.
    pub fn start_program(program: &Path, netns: &Netns, config: &str) -> Result<Self> {
        let folder = Folder::new()?;
        let socket = folder.path().join(SOCKET);
        let process = Self::launch(program, netns, &folder, config)?;
        Ok(Self { process, socket, folder })
    }

    /// Starts it again after its end, with a configuration.
    pub fn again(&mut self, netns: &Netns, config: &str) -> Result<()> {
        ensure!(self.process.ended().is_some(), "it still runs");
        self.process = Self::launch(&program("dispatcherd")?, netns, &self.folder, config)?;
        Ok(())
    }

    fn launch(program: &Path, netns: &Netns, folder: &Folder, config: &str) -> Result<Process> {
        let file = folder.write(FILE, config)?;
        let mut command = netns.command(program);
        command.arg("--config").arg(&file).arg("--control").arg(folder.path().join(SOCKET));
        let (sender, lines) = mpsc::channel();
        let mut process = Process::start(command, Some(sender))?;
        let deadline = Instant::now() + START;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line == "dispatcherd: ready" => break,
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let status = process.wait(STOP)?;
                    bail!(
                        "dispatcherd: {status}; it said:\n{}\nof this configuration:\n{config}",
                        process.log()
                    );
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    bail!("dispatcherd is not ready after {START:?}; it said:\n{}", process.log());
                }
            }
        }
        Ok(process)
    }

    /// Writes another configuration into its file; nothing happens until it is told to reload.
    pub fn rewrite(&self, config: &str) -> Result<()> {
        self.folder.write(FILE, config).map(drop)
    }

    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Asks with `dispatcherctl --json`.
    pub fn ask<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let mut command = Command::new(program("dispatcherctl")?);
        let text = execute(command.arg("--socket").arg(&self.socket).arg("--json").args(arguments), None)?;
        serde_json::from_str(&text)
            .with_context(|| format!("`dispatcherctl {}` said {text}", arguments.join(" ")))
    }

    /// Runs `dispatcherctl`, for what it prints.
    pub fn told(&self, arguments: &[&str]) -> Result<String> {
        execute(
            Command::new(program("dispatcherctl")?).arg("--socket").arg(&self.socket).args(arguments),
            None,
        )
    }

    /// `dispatcherctl status`.
    pub fn status(&self) -> Result<api::Status> {
        self.ask(&["status"])
    }

    /// `dispatcherctl backends`, in the order of the configuration.
    pub fn backends(&self) -> Result<Vec<api::Backend>> {
        self.ask(&["backends"])
    }

    /// `dispatcherctl sessions list`.
    pub fn sessions(&self) -> Result<Vec<api::Session>> {
        self.ask(&["sessions", "list"])
    }

    /// Packets of one reason so far.
    pub fn counter(&self, reason: dispatcher_common::reason::Reason) -> Result<u64> {
        let counters: api::Counters = self.ask(&["counters", "--all"])?;
        let counter = counters.reasons.iter().find(|counter| counter.name == reason.name());
        Ok(counter.with_context(|| format!("no counter {}", reason.name()))?.packets)
    }

    /// Packets dropped so far, by reason.
    pub fn drops(&self) -> Result<Vec<(String, u64)>> {
        let counters: api::Counters = self.ask(&["counters"])?;
        let drops = counters.reasons.into_iter().filter(|c| c.kind == "drop" && c.packets > 0);
        Ok(drops.map(|counter| (counter.name, counter.packets)).collect())
    }

    /// Tells it to end, and waits for that.
    pub fn stop(&mut self) -> Result<()> {
        self.process.signal(libc::SIGTERM);
        let status = self.process.wait(STOP)?;
        ensure!(status.success(), "{status}; it said:\n{}", self.process.log());
        Ok(())
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.process.signal(libc::SIGKILL);
        self.process.wait(STOP)?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("dispatcherd said:\n{}", self.process.log());
            if let Ok(counters) = self.ask::<api::Counters>(&["counters"]) {
                let counted = counters.reasons.iter().filter(|counter| counter.packets > 0);
                let list: Vec<_> =
                    counted.map(|counter| format!("{} {}", counter.name, counter.packets)).collect();
                eprintln!("packets: {}", list.join(", "));
            }
            for b in self.backends().unwrap_or_default() {
                eprintln!(
                    "{} {}: {} bound, {} hits, {} misses, {} fresh, {} clear, {} established, {} refused",
                    b.name,
                    b.state,
                    b.connections,
                    b.hits,
                    b.misses,
                    b.fresh,
                    b.nonsecure,
                    b.established,
                    b.refused
                );
            }
        }
    }
}

/// Where one of the project's programs is: beside this one, or, for tests, a folder above.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("finding this program's folder")?;
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    let found = found
        .with_context(|| format!("{name} is not beside {}; build with `cargo xtask build`", own.display()))?;
    ensure!(found.is_absolute(), "{} is no absolute path", found.display());
    Ok(found)
}
