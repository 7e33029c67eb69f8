//! The command line: requests to the control socket, answers as tables or JSON.

use std::{
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
    time::Duration,
};

use clap::{Parser, Subcommand};
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, presets};
use dispatcher_common::{addr::Addr, http};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request,
    body::{Bytes, Incoming},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::{
    api::{self, Mistake, Problem, Traced},
    config::{self, AdminState, Config, DEFAULT_CONTROL, DEFAULT_PIN},
    control, counted, dataplane, explain,
};

/// Ask and steer a running dispatcherd
#[derive(Debug, Parser)]
#[command(name = "dispatcherctl", version)]
pub struct Args {
    /// The daemon's control socket
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_CONTROL)]
    socket: PathBuf,
    /// Answer in JSON; names of fields are stable
    #[arg(long, global = true)]
    json: bool,
    /// Tables with all columns, however narrow the terminal is
    #[arg(long, global = true)]
    wide: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Version, interfaces, sums
    Status,
    /// Services: VIPs, mode, how many backends are up
    Services,
    /// Backends with their state and counters
    Backends,
    /// A backend: show, enable, drain, disable, weigh, add or remove it
    ///
    /// What is said holds until the configuration is read again (`reload`), over restarts too if there is a
    /// state file. Sessions and connections that it does not concern stay as they are.
    ///
    /// Examples: dispatcherctl backend web/a drain --deadline 5m --wait
    ///           dispatcherctl backend web/d add 10.0.0.4:443 --weight 2
    #[command(verbatim_doc_comment)]
    Backend {
        /// SERVICE/NAME, as `dispatcherctl backends` lists them
        #[arg(value_parser = backend_name)]
        backend: (String, String),
        #[command(subcommand)]
        command: Option<BackendCommand>,
    },
    /// The mapping table: session identifier -> backend
    Sessions {
        #[command(subcommand)]
        command: Sessions,
    },
    /// Read the configuration file again and put it in force, all or nothing; prints what changes
    ///
    /// What does not change is not touched: connections and sessions stay. States that were set with
    /// `backend` give way to the file's. SIGHUP to dispatcherd does the same.
    Reload {
        /// Only say what would change
        #[arg(long)]
        dry_run: bool,
    },
    /// The configuration: check a file, show what is in force, describe the keys
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// End what goes on without a daemon: programs on interfaces, connections, sessions (root)
    ///
    /// Removes the links, programs and maps that dispatcherd has pinned, and says what it removes. A running
    /// daemon must be stopped before.
    Detach {
        /// Configuration that says where they are pinned
        #[arg(long, value_name = "FILE", conflicts_with = "pin")]
        config: Option<PathBuf>,
        /// Where they are pinned
        #[arg(long, value_name = "FOLDER", default_value = DEFAULT_PIN)]
        pin: PathBuf,
    },
    /// What is known of the backends' session tickets: which keys seal them, and who shares them
    Identities,
    /// Established TLS connections to the backends of services with mode = "terminate" or "relay"
    Tunnels {
        #[command(subcommand)]
        command: Option<tunnels::Command>,
    },
    /// Quality of service: classes, their shares of backends, sessions of a class
    Qos {
        #[command(subcommand)]
        command: Option<qos::Command>,
    },
    /// What happens now, each second: services, backends and classes, and what each has of it
    ///
    /// Rates are of the time since they were last shown; a dash stands where something is not counted, or was
    /// counted anew. On a terminal it stays in place and is cut to its size: rows in which most happens are kept.
    /// Ends with Ctrl-C. With --json, a line each time.
    Top {
        /// Time between two looks
        #[arg(long, value_name = "SECS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=86_400))]
        interval: u64,
        /// Stop after so many
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Connections: client, VIP, backend and state of each
    Flows {
        /// Stop after so many
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: usize,
    },
    /// Packets by reason
    Counters {
        /// Again every SECS seconds, with the difference
        #[arg(long, value_name = "SECS", num_args = 0..=1, default_missing_value = "1",
            value_parser = clap::value_parser!(u64).range(1..))]
        watch: Option<u64>,
        /// Reasons that have counted nothing too
        #[arg(long)]
        all: bool,
    },
    /// Decisions as they are made: connections bound, held hellos, refusals, what is learned
    ///
    /// `bound` tells the reason: by a known session (bound_hit), an unknown one (bound_miss, beside `miss`), TLS
    /// without one (bound_fresh), or none (bound_nonsecure). Ends with Ctrl-C. With --json, a line a decision.
    Trace {
        /// Only about this client address
        #[arg(long, value_name = "ADDR")]
        client: Option<IpAddr>,
        /// Only of this service
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// Stop after so many
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        limit: Option<u64>,
        /// Of so many bound connections, tell of one; 0 for none: on a busy machine, 1000 say
        #[arg(long, value_name = "N", default_value_t = 1)]
        one_in: u32,
    },
    /// Metrics in the text format of OpenMetrics, as Prometheus reads them
    Metrics,
    /// Description of the control API, in OpenAPI (needs no daemon)
    Openapi,
    /// Why the packets of a capture go where they go (root; needs no daemon)
    ///
    /// Runs every packet through the real program, in maps of its own, and says of each flow: secure or
    /// not, what its hello offers, which identifier decided, which backend it goes to and for what reason. With --json, a line a flow.
    ///
    /// The program answers a client's SYN with a sequence number of its own, so the capture's numbers are
    /// moved; the captured server's packets are taken as the chosen backend's. Capture at a client or on the
    /// way to the dispatcher (on the dispatcher tcpdump does not see what the program takes), whole packets,
    /// from the first SYN on. The capture is held in memory; time does not pass.
    ///
    /// Example:
    ///   tcpdump -i eth0 -s 0 -w file.pcap 'tcp port 443'
    ///   dispatcherctl explain file.pcap --config /etc/dispatcher.toml
    #[command(verbatim_doc_comment)]
    Explain(explain::Options),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a file as the daemon would (needs no daemon and no root); fails where it is not good
    ///
    /// Whether interfaces, addresses and the control_group exist is found out at the start only.
    Check {
        /// The file (TOML)
        file: PathBuf,
    },
    /// The configuration in force, with all defaults, as a file that loads again
    Show,
    /// JSON Schema of the file, for editors (needs no daemon)
    Schema,
}

#[derive(Debug, Subcommand)]
enum Sessions {
    /// List sessions, of all services or of one
    List {
        /// Only sessions of this service
        #[arg(long)]
        service: Option<String>,
        /// Only sessions of the backends with this name
        #[arg(long)]
        backend: Option<String>,
        /// Stop after so many
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: usize,
    },
    /// Show the session of an identifier
    Show {
        /// Identifier: hexadecimal, or cookie:VALUE, or client:ADDRESS
        id: Identifier,
        /// Of this service only
        #[arg(long)]
        service: Option<String>,
    },
    /// Map an identifier to a backend, whatever servers say, until it is removed
    ///
    /// Examples: dispatcherctl sessions pin 6f0a…31 --service web --backend a
    ///           dispatcherctl sessions pin cookie:4f1c --service shop --backend b
    #[command(verbatim_doc_comment)]
    Pin {
        /// Identifier: hexadecimal, or cookie:VALUE, or client:ADDRESS
        id: Identifier,
        /// Kind of a hexadecimal identifier, as `sessions list` calls it, one that the service's affinity looks
        /// for [default: tls-session-id]
        #[arg(long)]
        kind: Option<String>,
        /// Service
        #[arg(long)]
        service: String,
        /// Backend
        #[arg(long)]
        backend: String,
    },
    /// Forget an identifier, pinned or not; prints what is removed
    Remove {
        /// Identifier: hexadecimal, or cookie:VALUE, or client:ADDRESS
        id: Identifier,
        /// Of this service only, else of all that know it
        #[arg(long)]
        service: Option<String>,
    },
    /// Save the sessions now, for the time after a reboot; says how many and where
    ///
    /// dispatcherd does so every 5 minutes and at its end, into the file `state` of the configuration. Sessions that
    /// only clients stand for are not saved.
    Save,
}

#[derive(Debug, Subcommand)]
enum BackendCommand {
    /// Show it, with the connections that are open
    Show,
    /// It takes known sessions and new ones
    #[command(alias = "enabled")]
    Enable,
    /// It takes known sessions, but no new ones
    Drain {
        /// After this time it goes offline: known sessions go elsewhere, and connections that are left end
        #[arg(long, value_name = "TIME", value_parser = duration)]
        deadline: Option<u32>,
        /// Wait until its last connection has ended, and say meanwhile how many are left
        ///
        /// Exits with 4 where the deadline, or the operator, ended connections; with 0 where all ended by themselves.
        #[arg(long)]
        wait: bool,
    },
    /// It takes nothing, its sessions go elsewhere; connections that are open go on
    #[command(alias = "disabled")]
    Disable,
    /// It takes nothing, its sessions go elsewhere, and connections that are open end
    Offline,
    /// Its part of new connections, beside those of the others
    Weight {
        /// 0 to 65535; 0: none
        #[arg(value_parser = clap::value_parser!(u32).range(..=65535))]
        weight: u32,
    },
    /// Add it to the service
    Add {
        /// Address and port, at most one of each family
        #[arg(required = true, num_args = 1..=2, value_name = "ADDRESS")]
        addresses: Vec<String>,
        /// Its part of new connections
        #[arg(long, value_parser = clap::value_parser!(u32).range(..=65535))]
        weight: Option<u32>,
        /// Its server ID in QUIC connection IDs, hexadecimal
        #[arg(long = "quic-server-id", value_name = "HEX")]
        quic_server_ids: Vec<String>,
    },
    /// Remove it: its sessions go elsewhere, and connections that are open end
    Remove,
}

fn duration(text: &str) -> Result<u32, String> {
    config::seconds(text).ok_or_else(|| "write a time such as 90s, 5m or 1h30m".to_owned())
}

fn backend_name(text: &str) -> Result<(String, String), String> {
    let (service, name) = text.split_once('/').ok_or("write SERVICE/NAME, such as web/a")?;
    Ok((service.to_owned(), name.to_owned()))
}

/// What the process ends with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// The request was carried out.
    Good = 0,
    /// The daemon refused it, or a configuration is not good, or a capture cannot be explained, or not to its end.
    Refused = 1,
    /// The command line is wrong (clap's own code).
    Usage = 2,
    /// No daemon answers.
    Unreachable = 3,
    /// The deadline of a drain that was waited for ended connections.
    Cut = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The longest that an answer takes: a reload waits for neighbours, a million sessions are saved in seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to do when nobody answers.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => "run as root, or as a member of the daemon's control_group",
        Some(libc::ENOENT) => "is dispatcherd running? Start it, or give its socket with --socket",
        Some(libc::ECONNREFUSED) => "is dispatcherd running? The one that made this socket has ended",
        None if error.kind() == io::ErrorKind::TimedOut => {
            "dispatcherd hangs, or has very much to do; packets go on without it"
        }
        _ => "is this dispatcherd's socket? Give it with --socket",
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody answers.
    #[error("connecting to {path}: {source}; {}", hint(source))]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or the answer is none.
    #[error("asking dispatcherd: {0}")]
    Protocol(String),
    /// The daemon says no.
    #[error("{0}")]
    Refused(String),
    /// A capture cannot be explained.
    #[error(transparent)]
    Explain(explain::Error),
    /// A configuration cannot be read, or is not good.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// Connections were left when a drain was over.
    #[error("{backend} went offline, which ended {}", counted(*open, "connection"))]
    Cut {
        /// SERVICE/NAME.
        backend: String,
        /// How many there were when they were last counted.
        open: u64,
    },
    /// Pins cannot be removed.
    #[error(transparent)]
    Detach(#[from] dataplane::Error),
    /// The answer cannot be printed.
    #[error("printing: {0}")]
    Output(#[from] io::Error),
}

impl From<explain::Error> for Error {
    fn from(error: explain::Error) -> Self {
        if let explain::Error::Output(error) = error { Self::Output(error) } else { Self::Explain(error) }
    }
}

impl Error {
    /// The exit code for it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Unreachable { .. } => Exit::Unreachable,
            Self::Cut { .. } => Exit::Cut,
            Self::Protocol(_)
            | Self::Refused(_)
            | Self::Explain(_)
            | Self::Config(_)
            | Self::Detach(_)
            | Self::Output(_) => Exit::Refused,
        }
    }
}

/// The size of a terminal, where it says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Terminal {
    /// Characters of a line.
    pub columns: Option<u16>,
    /// Lines.
    pub rows: Option<u16>,
}

/// Says how large the terminal is that is printed to, if it is one; that may change.
pub type Look<'l> = &'l dyn Fn() -> Option<Terminal>;

/// Carries out a command line and prints the answer to `out`, and what else is to be known to `hints`.
pub fn run(args: &Args, out: &mut dyn Write, hints: &mut dyn Write, look: Look<'_>) -> Result<(), Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Output)?;
    match runtime.block_on(answer(args, out, hints, look)) {
        // `dispatcherctl flows | head`: whoever reads has read enough.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

async fn answer(
    args: &Args,
    out: &mut dyn Write,
    hints: &mut dyn Write,
    look: Look<'_>,
) -> Result<(), Error> {
    let width = look().and_then(|terminal| terminal.columns);
    let ask = Client { socket: &args.socket, patience: PATIENCE };
    let json = args.json;
    let form = if json { Form::Json } else { Form::Table(width.filter(|_| !args.wide)) };
    match &args.command {
        Command::Status => show(out, form, &ask.get::<api::Status>("/v1/status").await?, status),
        Command::Services => {
            show(out, form, ask.get::<Vec<api::Service>>("/v1/services").await?.as_slice(), services)
        }
        Command::Backends => {
            show(out, form, ask.get::<Vec<api::Backend>>("/v1/backends").await?.as_slice(), backends)
        }
        Command::Backend { backend: (service, name), command } => {
            let path = format!("/v1/backends/{}/{}", escaped(service), escaped(name));
            let state = |state| api::BackendChange { state: Some(state), ..api::BackendChange::default() };
            let change = match command {
                None | Some(BackendCommand::Show) => None,
                Some(BackendCommand::Enable) => Some(state(AdminState::Enabled)),
                Some(BackendCommand::Drain { deadline, .. }) => {
                    Some(api::BackendChange { deadline_seconds: *deadline, ..state(AdminState::Drain) })
                }
                Some(BackendCommand::Disable) => Some(state(AdminState::Disabled)),
                Some(BackendCommand::Offline) => Some(state(AdminState::Offline)),
                Some(BackendCommand::Weight { weight }) => {
                    Some(api::BackendChange { weight: Some(*weight), ..api::BackendChange::default() })
                }
                Some(BackendCommand::Add { addresses, weight, quic_server_ids }) => {
                    let (addresses, quic_server_ids) = (addresses.clone(), quic_server_ids.clone());
                    let new = api::NewBackend { addresses, weight: *weight, state: None, quic_server_ids };
                    let answer: Vec<api::Backend> = ask.put(&path, &new).await?;
                    return show(out, form, answer.as_slice(), backends);
                }
                Some(BackendCommand::Remove) => {
                    let answer: Vec<api::Backend> = ask.delete(&path).await?;
                    return show(out, form, answer.as_slice(), backends);
                }
            };
            let mut answer: Vec<api::Backend> = match change {
                Some(change) => ask.patch(&path, &change).await?,
                None => ask.get(&path).await?,
            };
            let mut cut = None;
            if let Some(BackendCommand::Drain { wait: true, .. }) = command {
                (answer, cut) = drained(&ask, &path, answer, hints).await?;
            }
            show(out, form, answer.as_slice(), backends)?;
            cut.map_or(Ok(()), Err)
        }
        Command::Qos { command } => qos::run(command.as_ref(), &ask, out, form).await,
        Command::Tunnels { command } => tunnels::run(command.as_ref(), &ask, out, form).await,
        Command::Sessions { command } => {
            let answer: Vec<api::Session> = match command {
                Sessions::List { service, backend, limit } => {
                    let mut path = format!("/v1/sessions?limit={limit}");
                    for (key, value) in [("service", service), ("backend", backend)] {
                        if let Some(value) = value {
                            path.push_str(&format!("&{key}={}", escaped(value)));
                        }
                    }
                    ask.get(&path).await?
                }
                Sessions::Show { id, service } => {
                    id.named(ask.get(&session(id, service.as_deref())).await)?
                }
                Sessions::Pin { id, kind, service, backend } => {
                    let kind = id.kind(kind.as_deref())?;
                    let pin = api::Pin { service: service.clone(), backend: backend.clone(), kind };
                    id.named(ask.put(&session(id, None), &pin).await)?
                }
                Sessions::Remove { id, service } => {
                    id.named(ask.delete(&session(id, service.as_deref())).await)?
                }
                Sessions::Save => {
                    let saved: api::Saved = ask.post("/v1/sessions/save").await?;
                    if json {
                        return show(out, form, &saved, |_| Table::new());
                    }
                    writeln!(
                        out,
                        "saved {} in {}",
                        counted(saved.sessions, "session"),
                        saved.state.display()
                    )?;
                    return Ok(out.flush()?);
                }
            };
            show(out, form, answer.as_slice(), sessions)?;
            match command {
                Sessions::List { limit, .. } => cut(answer.len(), *limit, hints),
                Sessions::Show { .. } | Sessions::Pin { .. } | Sessions::Remove { .. } | Sessions::Save => {
                    Ok(())
                }
            }
        }
        Command::Reload { dry_run } => {
            let path = format!("/v1/reload?dry_run={dry_run}");
            let answer: api::Reload = ask.post(&path).await?;
            if json {
                return show(out, form, &answer, |_| Table::new());
            }
            out.write_all(reloaded(&answer).as_bytes())?;
            Ok(out.flush()?)
        }
        Command::Config { command: ConfigCommand::Check { file } } => check(out, form, file),
        Command::Config { command: ConfigCommand::Show } if json => {
            show(out, form, &ask.get::<serde_json::Value>("/v1/config").await?, |_| Table::new())
        }
        Command::Config { command: ConfigCommand::Show } => ask.print("/v1/config.toml", out).await,
        Command::Config { command: ConfigCommand::Schema } => {
            show(out, Form::Json, &config::schema(), |_| Table::new())
        }
        Command::Detach { config, pin } => {
            let pin = match config {
                Some(file) => Config::load(file, &[])?.pin.ok_or_else(|| {
                    Error::Refused(format!("{} says pin = \"none\": nothing is pinned", file.display()))
                })?,
                None => pin.clone(),
            };
            let done = dataplane::remove_pins(&pin)?;
            show(out, form, &api::Detached { pin, done }, detached)
        }
        Command::Identities => {
            show(out, form, ask.get::<Vec<api::Identity>>("/v1/identities").await?.as_slice(), identities)
        }
        Command::Flows { limit } => {
            let answer: Vec<api::Flow> = ask.get(&format!("/v1/flows?limit={limit}")).await?;
            show(out, form, answer.as_slice(), flows)?;
            cut(answer.len(), *limit, hints)
        }
        Command::Counters { watch, all } => {
            repeat(watch.map(Duration::from_secs), None, async |before: Option<api::Counters>| {
                let now: api::Counters = ask.get("/v1/counters").await?;
                show(out, form, &now, |now| counters(now, before.as_ref(), *all))?;
                Ok(now)
            })
            .await
        }
        Command::Top { interval, count } => top::run((*interval, *count), &ask, out, form, look).await,
        Command::Trace { client, service, limit, one_in } => {
            let one_in = Some(("one_in", one_in.to_string()));
            let client = client.map(|client| ("client", client.to_string()));
            let service = service.as_ref().map(|service| ("service", escaped(service)));
            let limit = limit.map(|limit| ("limit", limit.to_string()));
            let query: Vec<String> = [client, service, limit, one_in]
                .into_iter()
                .flatten()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            trace(
                out,
                json,
                ask.open(Method::GET, &format!("/v1/trace?{}", query.join("&")), Bytes::new()).await?,
            )
            .await
        }
        Command::Metrics => ask.print("/metrics", out).await,
        Command::Openapi => show(out, Form::Json, &control::openapi(), |_| Table::new()),
        Command::Explain(options) => {
            let known = if options.live {
                let sessions: Vec<api::Session> = ask.get("/v1/sessions").await?;
                let identities: Vec<api::Identity> = ask.get("/v1/identities").await?;
                explain::Known::new(&sessions, &identities)
            } else {
                explain::Known::default()
            };
            Ok(explain::run(options, known, json, out, hints)?)
        }
    }
}

/// Shows something once, or again and again with a pause between, so many times or without an end. `view` is given what
/// it returned the time before.
async fn repeat<T>(
    pause: Option<Duration>,
    count: Option<u64>,
    mut view: impl AsyncFnMut(Option<T>) -> Result<T, Error>,
) -> Result<(), Error> {
    let mut shown = view(None).await?;
    let Some(pause) = pause else { return Ok(()) };
    for _ in 1..count.unwrap_or(u64::MAX) {
        tokio::time::sleep(pause).await;
        shown = view(Some(shown)).await?;
    }
    Ok(())
}

/// Says that there may be more.
fn cut(shown: usize, limit: usize, hints: &mut dyn Write) -> Result<(), Error> {
    if shown == limit {
        writeln!(hints, "dispatcherctl: the first {limit}, there may be more: `--limit N` lists up to N")?;
    }
    Ok(())
}

/// Waits for the last connection of a backend that drains. An error beside the answer tells of connections that
/// did not end by themselves.
async fn drained(
    ask: &Client<'_>,
    path: &str,
    mut answer: Vec<api::Backend>,
    hints: &mut dyn Write,
) -> Result<(Vec<api::Backend>, Option<Error>), Error> {
    let (mut last, mut told) = (0, String::new());
    while let Some(one) = answer.first() {
        let backend = format!("{}/{}", one.service, one.name);
        let open = one.open.unwrap_or(0);
        if one.state == "offline" {
            let open = last.max(open);
            return Ok((answer, (open > 0).then_some(Error::Cut { backend, open })));
        }
        if open == 0 {
            break;
        }
        let left = one.deadline_seconds.map(|left| format!(", {left} s left")).unwrap_or_default();
        let line = format!("{backend}: {}{left}", counted(open, "connection"));
        if line != told {
            writeln!(hints, "{line}")?;
            told = line;
        }
        if one.state == "up" {
            return Err(Error::Refused(format!("{backend} was enabled again")));
        }
        last = open;
        // Near the end what is counted last is what is cut.
        let pause = if one.deadline_seconds.is_some_and(|left| left <= 1) { 100 } else { 1000 };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        answer = ask.get(path).await?;
    }
    Ok((answer, None))
}

/// Says whether a file is good. One that is not is an error, which with JSON is told there too.
fn check(out: &mut dyn Write, form: Form, file: &Path) -> Result<(), Error> {
    let loaded = Config::load(file, &[]);
    let mistake = |error: &config::Error| match error {
        config::Error::Read { .. } => Mistake { line: None, key: None, problem: error.to_string() },
        config::Error::Invalid { line, key, problem, .. } => {
            Mistake { line: Some(*line), key: Some(key.clone()), problem: problem.clone() }
        }
        config::Error::Amended { key, problem } => {
            Mistake { line: None, key: Some(key.clone()), problem: problem.clone() }
        }
    };
    let count = |of: fn(&Config) -> usize| loaded.as_ref().map_or(0, of);
    let checked = api::Checked {
        file: file.to_owned(),
        good: loaded.is_ok(),
        services: count(|config| config.services.len()),
        backends: count(|config| config.services.iter().map(|service| service.backends.len()).sum()),
        error: loaded.as_ref().err().map(mistake),
    };
    match (form, loaded) {
        (Form::Json, loaded) => {
            show(out, form, &checked, |_| Table::new())?;
            loaded.map(drop).map_err(Error::Config)
        }
        (Form::Table(_), Ok(config)) => Ok(writeln!(out, "{}: {}: good", file.display(), config.summary())?),
        (Form::Table(_), Err(error)) => Err(Error::Config(error)),
    }
}

/// What a session is known by, as the operator gives it.
#[derive(Clone, Debug)]
struct Identifier {
    given: String,
    hex: String,
    /// Where the form says it.
    kind: Option<&'static str>,
}

impl FromStr for Identifier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, hex) = if let Some(value) = text.strip_prefix("cookie:") {
            if value.is_empty() {
                return Err("an empty value is no session; write cookie:VALUE".to_owned());
            }
            (Some("http-cookie"), api::to_hex(&http::cookie_id(value.as_bytes())))
        } else if let Some(address) = text.strip_prefix("client:") {
            let address: IpAddr = address.parse().map_err(|_| {
                format!("{address} is no IP address; write client:192.0.2.1 or client:2001:db8::1")
            })?;
            (Some("client-address"), api::to_hex(&Addr::from(address).octets()))
        } else {
            (None, text.to_owned())
        };
        Ok(Self { given: text.to_owned(), hex, kind })
    }
}

impl Identifier {
    /// The kind to ask for: the one that is given, or that the identifier's form says.
    fn kind(&self, given: Option<&str>) -> Result<Option<String>, Error> {
        match (given, self.kind) {
            (Some(given), Some(own)) if given != own => Err(Error::Refused(format!(
                "{} is of the kind {own}, not {given}; leave --kind out",
                self.given
            ))),
            (given, own) => Ok(given.or(own).map(str::to_owned)),
        }
    }

    /// An answer in the operator's own words.
    fn named<T>(&self, answer: Result<T, Error>) -> Result<T, Error> {
        let own = |text: String| match self.kind {
            Some(_) => text.replace(&self.hex, &self.given),
            None => text,
        };
        if let Err(Error::Refused(text)) = answer { Err(Error::Refused(own(text))) } else { answer }
    }
}

fn session(Identifier { hex: id, .. }: &Identifier, service: Option<&str>) -> String {
    let query = service.map(|service| format!("?service={}", escaped(service))).unwrap_or_default();
    format!("/v1/sessions/{}{query}", escaped(id))
}

/// Percent-encoding of everything that is not plain (RFC 3986 section 2.3).
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    let one = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(one).collect()
}

struct Client<'c> {
    socket: &'c Path,
    /// How long an answer may take to begin.
    patience: Duration,
}

impl Client<'_> {
    async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.request(Method::POST, path, Bytes::new()).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// An answer that is a text.
    async fn text(&self, path: &str) -> Result<String, Error> {
        let text = whole(self.open(Method::GET, path, Bytes::new()).await?).await?;
        String::from_utf8(text.into()).map_err(|error| Error::Protocol(error.to_string()))
    }

    /// Prints it.
    async fn print(&self, path: &str, out: &mut dyn Write) -> Result<(), Error> {
        out.write_all(self.text(path).await?.as_bytes())?;
        Ok(out.flush()?)
    }

    async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.request(Method::DELETE, path, Bytes::new()).await
    }

    async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Error> {
        self.send(Method::PUT, path, body).await
    }

    async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Error> {
        self.send(Method::PATCH, path, body).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let body = serde_json::to_vec(body).map_err(|error| Error::Protocol(error.to_string()))?;
        self.request(method, path, body.into()).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, Error> {
        serde_json::from_slice(&whole(self.open(method, path, body).await?).await?).map_err(other_version)
    }

    /// The body of an answer that is a success, as it comes.
    async fn open(&self, method: Method, path: &str, body: Bytes) -> Result<Incoming, Error> {
        let silent = || Error::Unreachable {
            path: self.socket.to_owned(),
            source: io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {:?}", self.patience)),
        };
        tokio::time::timeout(self.patience, self.ask(method, path, body)).await.map_err(|_| silent())?
    }

    async fn ask(&self, method: Method, path: &str, body: Bytes) -> Result<Incoming, Error> {
        let unreachable = |source| Error::Unreachable { path: self.socket.to_owned(), source };
        let stream = UnixStream::connect(self.socket).await.map_err(unreachable)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "dispatcher")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| Error::Protocol(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let bytes = whole(response.into_body()).await?;
        let problem = serde_json::from_slice(&bytes).map_or_else(
            |_| format!("{status}: {}", String::from_utf8_lossy(&bytes)),
            |problem: Problem| problem.error,
        );
        Err(Error::Refused(problem))
    }
}

fn broken(error: hyper::Error) -> Error {
    Error::Protocol(error.to_string())
}

fn other_version(error: serde_json::Error) -> Error {
    Error::Protocol(format!("an answer of another version: {error}"))
}

async fn whole(body: Incoming) -> Result<Bytes, Error> {
    Ok(body.collect().await.map_err(broken)?.to_bytes())
}

/// Prints decisions as they come.
async fn trace(out: &mut dyn Write, json: bool, mut body: Incoming) -> Result<(), Error> {
    if !json {
        writeln!(
            out,
            "{:<24}  {:<15}  {:<12}  {:<22}  {:<12}  IDENTIFIER",
            "TIME", "WHAT", "SERVICE", "CLIENT", "BACKEND"
        )?;
        out.flush()?;
    }
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        rest.extend_from_slice(&data);
        let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for line in
            rest.drain(..whole).as_slice().split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
        {
            let traced: Traced = serde_json::from_slice(line).map_err(other_version)?;
            if json {
                writeln!(out, "{}", serde_json::to_string(&traced).map_err(other_version)?)?;
            } else {
                writeln!(out, "{}", trace_line(&traced))?;
            }
        }
        out.flush()?;
    }
    Ok(())
}

fn trace_line(traced: &Traced) -> String {
    match traced {
        Traced::Decision(one) => {
            let api::Decision { time, what, service, client, backend, .. } = one;
            let what = one.reason.as_ref().unwrap_or(what);
            let id = match (&one.kind, &one.id) {
                (Some(kind), Some(id)) => format!("{kind} {id}"),
                _ => "-".to_owned(),
            };
            let client = client.to_string();
            format!("{time:<24}  {what:<15}  {service:<12}  {client:<22}  {backend:<12}  {id}")
        }
        Traced::Lost(api::Lost { lost }) => format!("({lost} events were lost: this reader is too slow)"),
    }
}

/// How answers are printed.
#[derive(Clone, Copy, Debug)]
enum Form {
    Json,
    /// As tables no wider than so many columns, where that is known: those that can be spared are left out, then
    /// long cells go over several lines.
    Table(Option<u16>),
}

/// An answer as a table.
struct Sheet {
    table: Table,
    /// Columns that can be left out, the least important first.
    spare: &'static [&'static str],
}

impl From<Table> for Sheet {
    fn from(table: Table) -> Self {
        Self { table, spare: &[] }
    }
}

impl Sheet {
    /// Makes it fit as far as that goes; returns which columns are left out.
    fn fit(&mut self, width: u16) -> Vec<&'static str> {
        let mut left_out = Vec::new();
        let titles: Vec<String> = self
            .table
            .header()
            .into_iter()
            .flat_map(|row| row.cell_iter())
            .map(|cell| cell.content())
            .collect();
        let mut widths = self.table.column_max_content_widths();
        for (column, width) in self.table.column_iter().zip(&mut widths) {
            *width += column.padding_width();
        }
        for name in self.spare {
            if widths.iter().sum::<u16>() <= width {
                break;
            }
            let Some(at) = titles.iter().position(|title| title.eq_ignore_ascii_case(name)) else { continue };
            if let (Some(column), Some(width)) = (self.table.column_mut(at), widths.get_mut(at)) {
                column.set_constraint(ColumnConstraint::Hidden);
                *width = 0;
                left_out.push(*name);
            }
        }
        self.table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        left_out
    }
}

fn show<T: Serialize + ?Sized, S: Into<Sheet>>(
    out: &mut dyn Write,
    form: Form,
    answer: &T,
    table: impl FnOnce(&T) -> S,
) -> Result<(), Error> {
    match form {
        Form::Json => {
            let text =
                serde_json::to_string_pretty(answer).map_err(|error| Error::Protocol(error.to_string()))?;
            writeln!(out, "{text}")?;
        }
        Form::Table(width) => {
            let (text, left_out) = rendered(table(answer).into(), width);
            writeln!(out, "{text}")?;
            if !left_out.is_empty() {
                writeln!(out, "(left out: {}; --wide or --json shows all)", left_out.join(", "))?;
            }
        }
    }
    Ok(out.flush()?)
}

/// A table's lines, and which columns were left out for its width.
fn rendered(mut sheet: Sheet, width: Option<u16>) -> (String, Vec<&'static str>) {
    let left_out = width.map(|width| sheet.fit(width)).unwrap_or_default();
    (sheet.table.trim_fmt(), left_out)
}

/// A table without lines; columns of numbers, from `numbers` on, are set to the right. Where it is too wide, columns
/// of `spare` are left out, the first first.
fn table(
    header: &[&str],
    numbers: usize,
    spare: &'static [&'static str],
    rows: impl IntoIterator<Item = Vec<String>>,
) -> Sheet {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(|name| name.to_uppercase()));
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(numbers) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    Sheet { table, spare }
}

fn status(status: &api::Status) -> Table {
    let interfaces: Vec<String> =
        status.interfaces.iter().map(|one| format!("{} ({})", one.name, one.mode)).collect();
    let events = &status.events;
    let rows = [
        ("version", format!("{} (abi {})", status.version, status.abi)),
        ("uptime", age(status.uptime_seconds)),
        ("interfaces", interfaces.join(", ")),
        ("memory", format!("{:.1} MiB", status.memory_bytes as f64 / f64::from(1 << 20))),
        ("pinned", status.pin.as_ref().map_or_else(|| "no".to_owned(), |pin| pin.display().to_string())),
        ("services", status.services.to_string()),
        ("backends", format!("{} of {} up", status.backends_up, status.backends)),
        ("connections", status.connections.to_string()),
        ("hits", status.hits.to_string()),
        ("misses", status.misses.to_string()),
        ("fresh", status.fresh.to_string()),
        ("nonsecure", status.nonsecure.to_string()),
        ("learned", status.learned.to_string()),
        (
            "events",
            format!(
                "{} misses, {} held, {} released, {} refused, {} learned",
                events.miss, events.held, events.released, events.refused, events.learned
            ),
        ),
        ("rejected", format!("{} of known keys", counted(events.rejected, "ticket"))),
        ("swept", counted(events.swept, "expired session")),
        ("heartbeat", format!("{} ms ago", status.heartbeat_age_ms)),
        ("cookie epoch", status.cookie_epoch.to_string()),
    ];
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.add_rows(rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]));
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    table
}

fn services(services: &[api::Service]) -> Sheet {
    let header =
        ["name", "vips", "protocol", "mode", "miss", "source", "balance", "refused", "backends", "up"];
    let row = |one: &api::Service| {
        vec![
            one.name.clone(),
            list(&one.vips),
            word(&one.protocol),
            word(&one.mode),
            passed_up(one, word(&one.miss)),
            passed_up(one, one.source.clone()),
            word(&one.balance),
            if one.refused_options.is_empty() { "-".to_owned() } else { one.refused_options.join(",") },
            one.backends.to_string(),
            one.backends_up.to_string(),
        ]
    };
    table(&header, 8, &["refused", "source", "miss", "balance", "mode"], services.iter().map(row))
}

/// What only the data path has, of a service whose packets are passed up to the daemon.
fn passed_up(service: &api::Service, text: String) -> String {
    if service.mode.is_local() { "-".to_owned() } else { text }
}

fn backends(backends: &[api::Backend]) -> Sheet {
    let header = [
        "service",
        "name",
        "addresses",
        "state",
        "reason",
        "weight",
        "share",
        "open",
        "conns",
        "hits",
        "misses",
        "fresh",
        "nonsecure",
        "estab",
        "refused",
        "learned",
        "connect",
        "response",
    ];
    let ms = |time: Option<f64>| time.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.2} ms"));
    let state = |one: &api::Backend| match one.deadline_seconds {
        Some(left) => format!("{}, {left} s left", one.state),
        None => one.state.clone(),
    };
    let row = |one: &api::Backend| {
        vec![
            one.service.clone(),
            one.name.clone(),
            list(&one.addresses),
            state(one),
            one.reason.clone().unwrap_or_else(|| "-".to_owned()),
            one.weight.to_string(),
            one.share.map_or_else(|| "-".to_owned(), |share| format!("{:.1}%", share * 100.0)),
            one.open.map_or_else(|| "-".to_owned(), |open| open.to_string()),
            one.connections.to_string(),
            one.hits.to_string(),
            one.misses.to_string(),
            one.fresh.to_string(),
            one.nonsecure.to_string(),
            one.established.to_string(),
            one.refused.to_string(),
            one.learned.to_string(),
            ms(one.connect_ms),
            ms(one.response_ms),
        ]
    };
    table(
        &header,
        5,
        &[
            "learned",
            "refused",
            "estab",
            "nonsecure",
            "fresh",
            "misses",
            "hits",
            "connect",
            "response",
            "share",
            "conns",
        ],
        backends.iter().map(row),
    )
}

fn sessions(sessions: &[api::Session]) -> Sheet {
    let header =
        ["id", "kind", "service", "backend", "state", "tunnel", "class", "hits", "age", "idle", "expires"];
    let row = |one: &api::Session| {
        vec![
            one.id.clone(),
            one.kind.clone(),
            one.service.clone(),
            one.backend.clone(),
            one.state.clone(),
            if one.tunnel == 0 { "-".to_owned() } else { one.tunnel.to_string() },
            one.class.clone().unwrap_or_else(|| "-".to_owned()),
            one.hits.to_string(),
            age(one.age_seconds.into()),
            age(one.idle_seconds.into()),
            one.expires_in_seconds.map_or_else(|| "never".to_owned(), |seconds| age(seconds.into())),
        ]
    };
    table(&header, 5, &["class", "tunnel", "age", "expires", "hits"], sessions.iter().map(row))
}

/// What a reload changes, a line each.
fn reloaded(done: &api::Reload) -> String {
    let number = counted(done.changes.len(), "change");
    let end = match (done.applied, done.changes.is_empty()) {
        (true, true) => "nothing changes".to_owned(),
        (true, false) => format!("in force: {number}"),
        (false, true) => "dry run: nothing would change".to_owned(),
        (false, false) => format!("dry run: {number}, none made"),
    };
    done.changes.iter().chain([&end]).map(|line| format!("{line}\n")).collect()
}

fn detached(what: &api::Detached) -> Table {
    let nothing = || vec![format!("nothing is pinned in {}", what.pin.display())];
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    for line in if what.done.is_empty() { nothing() } else { what.done.clone() } {
        table.add_row([line]);
    }
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    table
}

fn identities(identities: &[api::Identity]) -> Sheet {
    let header = ["service", "backend", "name", "state", "keys", "versions", "shared with", "looked", "note"];
    let some = |list: &[String]| if list.is_empty() { "-".to_owned() } else { list.join(",") };
    let row = |one: &api::Identity| {
        vec![
            one.service.clone(),
            one.backend.clone(),
            one.server_name.clone().unwrap_or_else(|| "-".to_owned()),
            one.state.clone(),
            some(&one.keys),
            some(&one.versions),
            some(&one.shared_with),
            one.looked_seconds_ago.map_or_else(|| "never".to_owned(), age),
            one.note.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    };
    table(&header, 9, &["looked", "versions", "shared with"], identities.iter().map(row))
}

fn flows(flows: &[api::Flow]) -> Sheet {
    let header = ["client", "vip", "proto", "service", "backend", "state", "secure", "hit", "age", "class"];
    let yes = |value| if value { "yes" } else { "no" }.to_owned();
    let row = |one: &api::Flow| {
        vec![
            one.client.to_string(),
            one.vip.to_string(),
            word(&one.protocol),
            one.service.clone(),
            one.backend.clone(),
            one.state.clone(),
            yes(one.secure),
            yes(one.hit),
            age(one.age_seconds.into()),
            one.class.clone(),
        ]
    };
    table(&header, 8, &["class", "hit", "secure", "proto"], flows.iter().map(row))
}

fn counters(now: &api::Counters, before: Option<&api::Counters>, all: bool) -> Sheet {
    let difference = |one: &api::Counter| {
        let old = before?.reasons.iter().find(|old| old.number == one.number)?;
        Some(one.packets.saturating_sub(old.packets).to_string())
    };
    let mut header = vec!["reason", "kind", "description", "packets"];
    if before.is_some() {
        header.push("more");
    }
    let row = |one: &api::Counter| {
        let mut row =
            vec![one.name.clone(), one.kind.clone(), one.description.clone(), one.packets.to_string()];
        row.extend(difference(one));
        row
    };
    table(&header, 3, &[], now.reasons.iter().filter(|one| all || one.packets > 0).map(row))
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The word that JSON has for a value.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

mod qos;
mod top;
mod tunnels;

#[cfg(test)]
mod tests;
