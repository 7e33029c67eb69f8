//! `dispatcherctl explain`: why the packets of a capture go where they go.
//!
//! Every packet runs through the real program (`BPF_PROG_RUN`), loaded once more into maps of its own and
//! attached to nothing, so no daemon is needed and none is disturbed. No frame leaves: a test run does
//! everything but the redirect.
//!
//! ```text
//! capture -> flows -> machine: services, maps -> run: a packet at a time -> report
//! ```

use std::{
    collections::{BTreeSet, HashSet},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

mod capture;
mod flows;
mod frame;
mod hello;
mod live;
mod lookup;
mod machine;
mod report;
mod run;

pub use live::Known;

use crate::{
    config::{self, Config, Interface},
    dataplane::{self, AttachMode},
};
use flows::{Flows, Who};
use machine::Machine;
use run::Runner;

/// Most addresses that stand for services where no configuration says which do.
const SERVICES_MAX: usize = 1024;

/// VIPs that are named where a capture has none of them.
const VIPS_SHOWN: usize = 16;

/// What to explain, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The capture: pcap or pcapng
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Decide with the services of this dispatcher.toml; without it, each address that a connection is
    /// opened to is a service with one backend
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// With the sessions and ticket keys that the running daemon knows now
    #[arg(long, requires = "config")]
    pub live: bool,
    /// In text, too, the reason of each packet
    #[arg(long)]
    pub packets: bool,
}

/// Why a capture cannot be explained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("reading {path}: {source}; give a file that `tcpdump -w` has written")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is no capture, or one of another kind.
    #[error("{path}: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The file holds no packets.
    #[error("no packets in {0}; was the filter of the capture right, and did it run long enough?")]
    Empty(PathBuf),
    /// The file is larger than what is held in memory.
    #[error(
        "{path} has more than {most} bytes; take a part of it: tcpdump -r {path} -w part.pcap 'host ADDRESS'"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read.
        most: u64,
    },
    /// The capture ends early; what it holds was explained.
    #[error("{path}: {problem}; what comes before is explained above")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The program cannot be loaded or run.
    #[error("running packets through the BPF program: {0}")]
    Dataplane(#[from] dataplane::Error),
    /// The ring of events was taken.
    #[error("the ring of events is taken already: a defect, please report it")]
    Events,
    /// A run counted no reason.
    #[error("the program ended with XDP action {0} and counted no reason: a defect, please report it")]
    Uncounted(u32),
    /// The answer cannot be printed.
    #[error("printing: {0}")]
    Output(#[from] io::Error),
}

/// Explains a capture: a line of JSON, or a block of text, for each flow in the order of first packets.
/// What concerns the whole of it is said to `hints`.
pub fn run(
    options: &Options,
    known: Known,
    json: bool,
    out: &mut dyn Write,
    hints: &mut dyn Write,
) -> Result<(), Error> {
    let capture = capture::read(&options.file)?;
    if capture.packets.is_empty() {
        let path = options.file.clone();
        return Err(match capture.broken {
            Some(problem) => Error::Format { path, problem },
            None => Error::Empty(path),
        });
    }
    let config = match &options.config {
        Some(path) => {
            // Which interfaces it names does not matter here.
            let any = Interface { name: "lo".to_owned(), attach: AttachMode::Auto };
            Some(Config::load(path, &[any])?)
        }
        None => None,
    };
    let mut flows = Flows::new(&capture.packets);
    let config = match config {
        Some(config) => config,
        None => supposed(&flows)?,
    };
    flows.find_services(&flows::vips(&config));
    if flows.flows.iter().all(|flow| flow.service.is_none()) {
        writeln!(hints, "{}: {}", options.file.display(), no_service(&config))?;
    }
    let mut machine = Machine::new(config, known, flows.flows.len())?;
    let talks = Runner::run(&capture.packets, &flows, &mut machine)?;
    let lines = flows.flows.iter().zip(talks);
    let lines = lines
        .map(|(flow, talk)| report::Line::new(flow, &flows, talk, &capture.packets, &machine))
        .collect::<Result<Vec<_>, _>>()?;
    if !options.live && lines.iter().any(report::Line::missed) {
        writeln!(
            hints,
            "{}: the table of sessions began empty; with --config FILE --live it has those that the running daemon knows",
            options.file.display()
        )?;
    }
    if json {
        report::json(&lines, out)?;
    } else {
        report::text(&lines, options.packets, out)?;
    }
    match capture.broken {
        Some(problem) => Err(Error::Broken { path: options.file.clone(), problem }),
        None => Ok(()),
    }
}

/// Why nothing in a capture concerns a service.
fn no_service(config: &Config) -> String {
    let vips = config.services.iter().flat_map(|one| {
        let protocol = report::protocol_name(one.protocol.number());
        one.published().map(move |vip| format!("{vip}/{protocol} ({})", one.name))
    });
    let vips: Vec<String> = vips.collect();
    let more = vips.len().saturating_sub(VIPS_SHOWN);
    let shown = vips.get(..VIPS_SHOWN).unwrap_or(&vips).join(", ");
    match (vips.is_empty(), more) {
        (true, _) => "no TCP or UDP packet in it".to_owned(),
        (false, 0) => format!("no TCP or UDP packet of a VIP in it; the VIPs are {shown}"),
        (false, _) => format!("no TCP or UDP packet of a VIP in it; the VIPs are {shown} and {more} more"),
    }
}

/// The configuration in which every server of the capture is the VIP of a service with one backend.
fn supposed(flows: &Flows) -> Result<Config, Error> {
    const TEMPLATE: &str = r#"
interfaces = ["lo"]
[[service]]
name = "tcp"
vip = "192.0.2.1:1"
[[service.backend]]
name = "backend"
address = "198.18.0.1:1"
[[service]]
name = "udp"
vip = "192.0.2.1:1"
protocol = "udp"
mode = "l4"
[[service.backend]]
name = "backend"
address = "198.18.0.1:1"
"#;
    let mut config = Config::parse(TEMPLATE, &[])?;
    let mut servers = BTreeSet::new();
    let mut taken: HashSet<IpAddr> = HashSet::new();
    for flow in &flows.flows {
        let Who::Ports { proto, client, server } = flow.who else { continue };
        taken.extend([client.ip(), server.ip()]);
        if servers.len() < SERVICES_MAX {
            servers.insert((server, proto));
        }
    }
    let templates = std::mem::take(&mut config.services);
    for (vip, proto) in servers {
        let Some(template) = templates.iter().find(|one| one.protocol.number() == proto) else { continue };
        let mut service = template.clone();
        service.name = format!("{vip}/{}", template.name);
        service.id = dispatcher_common::service::stable_id(&service.name);
        service.vips = vec![vip];
        service.table_size = 1;
        for backend in &mut service.backends {
            let address = Some(free_address(&mut taken, vip));
            (backend.v4, backend.v6) = if vip.is_ipv4() { (address, None) } else { (None, address) };
            backend.id = config::backend_id(&service.name, &backend.name);
        }
        config.services.push(service);
    }
    Ok(config)
}

/// An address for a backend: of the networks for benchmarks (RFC 2544, RFC 5180), and not in the capture.
fn free_address(taken: &mut HashSet<IpAddr>, vip: SocketAddr) -> SocketAddr {
    let nth = |n: u32| match vip {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::from(0xc612_0000 + n)),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::from((0x2001_0002_u128 << 96) + u128::from(n))),
    };
    let mut n = 1;
    while !taken.insert(nth(n)) {
        n += 1;
    }
    SocketAddr::new(nth(n), vip.port())
}
