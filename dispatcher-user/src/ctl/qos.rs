//! `dispatcherctl qos`.

use std::time::Duration;

use clap::Subcommand;

use super::{Client, Error, Form, Identifier, Sheet, escaped, repeat, sessions, show, table};
use crate::api;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Each class at each backend that it used: its share beside its weight, what waits, what was refused
    Shares {
        /// Again every SECS seconds
        #[arg(long, value_name = "SECS", num_args = 0..=1, default_missing_value = "1",
            value_parser = clap::value_parser!(u64).range(1..))]
        watch: Option<u64>,
    },
    /// Classes with their weights
    Classes,
    /// Change the weight of a class at once, until the next reload; with a state file restarts keep it
    Weight {
        /// The class
        class: String,
        /// 1 to 10000
        #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
        weight: u32,
    },
    /// Put a session into a class, whatever the rules say; connections that it has keep theirs
    ///
    /// The key of a server's tickets stands for all its clients and cannot be assigned.
    ///
    /// Examples: dispatcherctl qos assign cookie:4f1c gold --service shop
    ///           dispatcherctl qos assign cookie:4f1c --by-rules --service shop
    #[command(
        verbatim_doc_comment,
        override_usage = "dispatcherctl qos assign [OPTIONS] --service <SERVICE> <ID> <CLASS|--by-rules>"
    )]
    Assign {
        /// Identifier: hexadecimal, or cookie:VALUE, or client:ADDRESS
        id: Identifier,
        /// The class
        #[arg(required_unless_present = "by_rules")]
        class: Option<String>,
        /// The rules decide again
        #[arg(long, conflicts_with = "class")]
        by_rules: bool,
        /// Service
        #[arg(long)]
        service: String,
        /// Kind of a hexadecimal identifier, as `sessions list` calls it [default: all kinds]
        #[arg(long)]
        kind: Option<String>,
    },
}

pub(super) async fn run(
    command: Option<&Command>,
    ask: &Client<'_>,
    out: &mut dyn std::io::Write,
    form: Form,
) -> Result<(), Error> {
    match command {
        None => shares(None, ask, out, form).await,
        Some(Command::Shares { watch }) => shares(*watch, ask, out, form).await,
        Some(Command::Classes) => {
            show(out, form, ask.get::<Vec<api::QosClass>>("/v1/qos/classes").await?.as_slice(), classes)
        }
        Some(Command::Weight { class, weight }) => {
            let path = format!("/v1/qos/classes/{}", escaped(class));
            let weight = api::QosWeight { weight: *weight };
            show(out, form, ask.patch::<Vec<api::QosClass>>(&path, &weight).await?.as_slice(), classes)
        }
        Some(Command::Assign { id, class, by_rules: _, service, kind }) => {
            let class = class.clone();
            let kind = id.kind(kind.as_deref())?;
            let wanted = api::QosAssignment { service: service.clone(), class, kind };
            let path = format!("/v1/qos/sessions/{}", escaped(&id.hex));
            let answer: Vec<api::Session> = id.named(ask.put(&path, &wanted).await)?;
            show(out, form, answer.as_slice(), sessions)
        }
    }
}

async fn shares(
    watch: Option<u64>,
    ask: &Client<'_>,
    out: &mut dyn std::io::Write,
    form: Form,
) -> Result<(), Error> {
    repeat(watch.map(Duration::from_secs), None, async |_| {
        let answer: Vec<api::QosShare> = ask.get("/v1/qos").await?;
        show(out, form, answer.as_slice(), share_table)
    })
    .await
}

pub(super) fn classes(classes: &[api::QosClass]) -> Sheet {
    let header = ["class", "weight", "priority", "lends", "borrows", "ceil", "dscp"];
    let row = |one: &api::QosClass| {
        vec![
            one.name.clone(),
            one.weight.to_string(),
            one.priority.to_string(),
            if one.lend { "yes" } else { "no" }.to_owned(),
            format!("{}%", one.borrow_limit),
            format!("{}%", one.ceil),
            one.dscp.map_or_else(|| "-".to_owned(), |dscp| dscp.to_string()),
        ]
    };
    table(&header, 1, &[], classes.iter().map(row))
}

pub(super) fn share_table(shares: &[api::QosShare]) -> Sheet {
    let header = [
        "service", "backend", "class", "weight", "share", "open", "waiting", "admitted", "borrowed", "shed",
        "late", "left", "wait p99", "bytes", "dropped", "conns", "over",
    ];
    let percent = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}%"));
    let row = |one: &api::QosShare| {
        vec![
            one.service.clone(),
            one.backend.clone(),
            one.class.clone(),
            percent(Some(one.weight_percent)),
            percent(one.share_percent),
            one.in_flight.to_string(),
            one.queued.to_string(),
            one.admitted.to_string(),
            one.borrowed.to_string(),
            one.shed.to_string(),
            one.late.to_string(),
            one.cancelled.to_string(),
            one.wait_p99_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms")),
            one.bytes.to_string(),
            one.dropped_bytes.to_string(),
            one.connections.to_string(),
            one.connections_over.to_string(),
        ]
    };
    let spare = &["left", "late", "borrowed", "conns", "bytes", "admitted", "wait p99"];
    table(&header, 3, spare, shares.iter().map(row))
}
