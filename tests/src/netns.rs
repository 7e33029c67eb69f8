//! Network namespaces as guards: made under a unique name, removed when dropped.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write as _,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    panic::resume_unwind,
    path::Path,
    process::{Command, Stdio, id},
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, bail};

/// Where `ip netns` keeps its names.
const FOLDER: &str = "/run/netns";
/// What our names begin with; the owner's process id and a counter follow.
pub(crate) const PREFIX: &str = "dispatcher";

/// A network namespace.
#[derive(Debug)]
pub struct Netns {
    name: String,
    handle: Arc<File>,
}

impl Netns {
    /// Makes a namespace with its loopback up. `role` ends its name.
    pub fn new(role: &str) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let name = format!("{PREFIX}-{}-{}-{role}", id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        execute(Command::new("ip").args(["netns", "add", &name]), None)
            .context("making a network namespace; is this root, and is iproute2 installed?")?;
        let path = format!("{FOLDER}/{name}");
        let handle = match File::open(&path) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                remove(&name);
                return Err(error).with_context(|| format!("opening {path}"));
            }
        };
        let namespace = Self { name, handle };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name, for `ip netns exec`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a closure on a thread inside the namespace. Sockets that it makes stay inside, wherever
    /// they are used later.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    enter(&self.handle).expect("an open namespace can be entered");
                    work()
                })
                .join()
        });
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Starts a thread that lives inside the namespace.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let handle = Arc::clone(&self.handle);
        thread::spawn(move || {
            enter(&handle).expect("an open namespace can be entered");
            work()
        })
    }

    /// A command that will run inside the namespace. It dies with the thread that starts it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let handle = Arc::clone(&self.handle);
        // SAFETY: setns and prctl are async-signal-safe, and nothing is allocated or locked
        // between fork and exec.
        unsafe {
            command.pre_exec(move || {
                enter(&handle)?;
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command
    }

    /// Runs a program to its end and returns what it printed.
    pub fn execute(&self, program: &str, arguments: &[&str]) -> Result<String> {
        execute(self.command(program).args(arguments), None).with_context(|| format!("in {}", self.name))
    }

    /// Runs `ip` on commands, one a line.
    pub fn ip(&self, commands: &str) -> Result<()> {
        let mut ip = self.command("ip");
        execute(ip.args(["-batch", "-"]), Some(commands))
            .with_context(|| format!("in {}, with these commands:\n{commands}", self.name))?;
        Ok(())
    }

    /// Runs `nft` on a script.
    pub fn nft(&self, script: &str) -> Result<()> {
        let mut nft = self.command("nft");
        execute(nft.args(["-f", "-"]), Some(script))
            .with_context(|| format!("in {}, with this script:\n{script}", self.name))?;
        Ok(())
    }

    /// Sets values under /proc/sys/net, given as `path=value`.
    pub fn sysctl(&self, settings: &[&str]) -> Result<()> {
        self.run(|| {
            for setting in settings {
                let (path, value) = setting.split_once('=').context("a setting is PATH=VALUE")?;
                let path = Path::new("/proc/sys/net").join(path);
                std::fs::write(&path, value)
                    .with_context(|| format!("writing {value} to {} in {}", path.display(), self.name))?;
            }
            Ok(())
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // The name goes at once; the namespace and its devices when the last socket in it is closed.
        remove(&self.name);
    }
}

/// Runs a command to its end; its standard output, or an error that holds its standard error.
pub fn execute(command: &mut Command, input: Option<&str>) -> Result<String> {
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {command:?}; is it installed?"))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // A command that ends early says why on standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("waiting for {command:?}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}: {}", output.status, errors.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn enter(handle: &File) -> std::io::Result<()> {
    // SAFETY: the descriptor is open for as long as `handle` lives, and only this thread changes.
    if unsafe { libc::setns(handle.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

fn remove(name: &str) {
    if let Err(error) = execute(Command::new("ip").args(["netns", "delete", name]), None) {
        eprintln!("network namespace {name} stays: {error:#}");
    }
}

/// Removes what killed processes have left.
fn sweep() {
    leftovers(Path::new(FOLDER)).iter().for_each(|name| remove(name));
}

/// Names in a folder that begin with our prefix and the id of a process that is no more.
pub(crate) fn leftovers(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| {
            let rest = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('-'));
            let owner = rest.and_then(|rest| rest.split('-').next());
            owner.is_some_and(|id| id.parse::<u32>().is_ok() && !Path::new("/proc").join(id).exists())
        })
        .collect()
}
