//! `dispatcherd`: attaches the dispatcher to interfaces and keeps it in line with a configuration.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{ArgGroup, Parser};
use dispatcher_user::{
    config::{Config, Interface},
    daemon::{self, Options},
    dataplane::{self, AttachMode},
    logging,
    reload::Source,
    terminate,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Keep TLS sessions on their backend, in XDP
#[derive(Parser)]
#[command(name = "dispatcherd", version, group(ArgGroup::new("what").required(true).multiple(true).args(["config", "interface"])))]
struct Args {
    /// Configuration (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach to this interface too; may be given several times. Without --config everything passes
    #[arg(long, value_name = "IF")]
    interface: Vec<String>,
    /// How to attach to the interfaces of --interface
    #[arg(long, value_name = "MODE", default_value = "auto")]
    attach: Attach,
    /// The control socket, instead of the configuration's
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Check the configuration, its certificates, and whether its folder of pins can be used; change nothing
    #[arg(long, requires = "config")]
    check: bool,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: log::LevelFilter,
    /// Lines for people, or an object in JSON a line, on stderr
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: logging::Format,
    /// Do not drop capabilities after start
    #[arg(long)]
    keep_privileges: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Attach {
    Auto,
    Native,
    Generic,
}

impl From<Attach> for AttachMode {
    fn from(attach: Attach) -> Self {
        match attach {
            Attach::Auto => Self::Auto,
            Attach::Native => Self::Native,
            Attach::Generic => Self::Generic,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let format = args.log_format;
    logging::start(args.log_level, format);
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::last_word(format, dispatcher_user::one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let attach = args.attach.into();
    let interfaces: Vec<Interface> =
        args.interface.into_iter().map(|name| Interface { name, attach }).collect();
    let control = args.control.map(std::path::absolute).transpose().context("--control")?;
    let source = match args.config {
        Some(path) => {
            let path = std::path::absolute(path).context("--config")?;
            Some(Source { path, interfaces: interfaces.clone(), control: control.clone() })
        }
        None => None,
    };
    let config = match &source {
        Some(source) => source.load()?,
        None => {
            let standard = Config::default();
            Config { interfaces, control: control.unwrap_or(standard.control.clone()), ..standard }
        }
    };
    if args.check {
        if let Some(folder) = &config.pin {
            dataplane::has_file_system(folder)?;
        }
        terminate::check(&config)?;
        println!("{}: good", config.summary());
        return Ok(());
    }
    allow_files();
    let options = Options { keep_privileges: args.keep_privileges, source };
    Ok(daemon::run(config, options, &mut std::io::stdout(), shutdown())?)
}

/// Each client and each tunnel is an open file: as many as the system allows.
fn allow_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::warn!("more open files than usual cannot be had: {error}");
    }
}

/// Ready at the first SIGINT or SIGTERM.
async fn shutdown() {
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        (Err(error), _) | (_, Err(error)) => log::error!("waiting for signals: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        for line in [
            "--config x",
            "--interface a --interface b",
            "--config x --interface a --check",
            "--config x --log-format json",
        ] {
            let line = format!("dispatcherd {line}");
            Args::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        for line in [
            "dispatcherd",
            "dispatcherd --interface a --check",
            "dispatcherd --interface a --attach x",
            "dispatcherd --interface a --log-format xml",
        ] {
            let error = Args::try_parse_from(line.split(' ')).err().expect(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
