//! `dispatcherctl tunnels`.

use clap::Subcommand;
use comfy_table::Table;

use super::{Client, Error, Form, Sheet, age, escaped, show, table};
use crate::{api, counted};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List them: from where to where, with which encryption, and what goes through
    List,
    /// Show one
    Show {
        /// Its number
        id: u32,
    },
    /// Backends to which tunnels are kept, and why they fail
    Backends,
    /// Replace them: new ones first, then the old ones end with their last request
    Rotate {
        /// Only those to this backend
        #[arg(value_name = "SERVICE/BACKEND")]
        backend: Option<String>,
    },
    /// Close one at once: its requests fail, and another takes its place
    Close {
        /// Its number
        id: u32,
    },
}

pub(super) async fn run(
    command: Option<&Command>,
    ask: &Client<'_>,
    out: &mut dyn std::io::Write,
    form: Form,
) -> Result<(), Error> {
    let answer: Vec<api::Tunnel> = match command {
        None | Some(Command::List) => ask.get("/v1/tunnels").await?,
        Some(Command::Show { id }) => ask.get(&format!("/v1/tunnels/{id}")).await?,
        Some(Command::Close { id }) => ask.delete(&format!("/v1/tunnels/{id}")).await?,
        Some(Command::Backends) => {
            let answer: Vec<api::TunnelBackend> = ask.get("/v1/tunnels/backends").await?;
            return show(out, form, answer.as_slice(), backends);
        }
        Some(Command::Rotate { backend }) => {
            let query =
                backend.as_ref().map(|name| format!("?backend={}", escaped(name))).unwrap_or_default();
            let rotated: api::Rotated = ask.post(&format!("/v1/tunnels/rotate{query}")).await?;
            if matches!(form, Form::Json) {
                return show(out, form, &rotated, |_| Table::new());
            }
            writeln!(out, "{} will be replaced", counted(rotated.tunnels as u64, "tunnel"))?;
            return Ok(out.flush()?);
        }
    };
    show(out, form, answer.as_slice(), list)
}

fn list(tunnels: &[api::Tunnel]) -> Sheet {
    let header = [
        "id",
        "service",
        "backend",
        "source",
        "destination",
        "algorithm",
        "group",
        "alpn",
        "state",
        "sessions",
        "requests",
        "open",
        "sent",
        "received",
        "age",
    ];
    let row = |one: &api::Tunnel| {
        vec![
            one.id.to_string(),
            one.service.clone(),
            one.backend.clone(),
            one.source.to_string(),
            one.destination.to_string(),
            one.cipher_suite.clone(),
            one.group.clone().unwrap_or_else(|| "-".to_owned()),
            one.alpn.clone().unwrap_or_else(|| "-".to_owned()),
            one.state.clone(),
            one.sessions.to_string(),
            one.requests.to_string(),
            one.in_flight.to_string(),
            one.sent_bytes.to_string(),
            one.received_bytes.to_string(),
            age(one.age_seconds),
        ]
    };
    let spare = &["received", "sent", "alpn", "group", "open", "age", "state"];
    table(&header, 9, spare, tunnels.iter().map(row))
}

fn backends(backends: &[api::TunnelBackend]) -> Sheet {
    let header = ["service", "backend", "error", "failing", "established", "handshakes", "failed"];
    let row = |one: &api::TunnelBackend| {
        vec![
            one.service.clone(),
            one.backend.clone(),
            one.error.clone().unwrap_or_else(|| "-".to_owned()),
            one.failing_for_seconds.map_or_else(|| "-".to_owned(), age),
            one.established.to_string(),
            one.handshakes.to_string(),
            one.failed.to_string(),
        ]
    };
    table(&header, 3, &["handshakes", "failed"], backends.iter().map(row))
}
