//! `dispatcherctl top`: what the counters say of the time since they were last read.

use std::{
    collections::BTreeMap,
    io::Write,
    time::{Duration, Instant},
};

use super::{Client, Error, Form, Look, Sheet, age, rendered, repeat, table, word};
use crate::api;

/// Lines of a terminal that does not say how many it has.
const ROWS: u16 = 24;

/// What is read of a daemon at once.
struct Reading {
    /// By our clock, which does not jump.
    at: Instant,
    status: api::Status,
    counters: api::Counters,
    services: Vec<api::Service>,
    backends: Vec<api::Backend>,
    tunnels: Vec<api::Tunnel>,
    shares: Vec<api::QosShare>,
    /// Of services that the daemon serves, of which only the metrics tell: clients, and requests.
    clients: BTreeMap<String, u64>,
    requests: BTreeMap<String, u64>,
}

impl Reading {
    async fn take(ask: &Client<'_>) -> Result<Self, Error> {
        let status = ask.get("/v1/status").await?;
        let counters = ask.get("/v1/counters").await?;
        let services = ask.get("/v1/services").await?;
        let backends = ask.get("/v1/backends").await?;
        let tunnels = ask.get("/v1/tunnels").await?;
        let shares = ask.get("/v1/qos").await?;
        let metrics = ask.text("/metrics").await?;
        Ok(Self {
            at: Instant::now(),
            status,
            counters,
            services,
            backends,
            tunnels,
            shares,
            clients: by_service(&metrics, "dispatcher_clients_total"),
            requests: by_service(&metrics, "dispatcher_requests_total"),
        })
    }

    fn packets(&self, kind: &str) -> u64 {
        self.counters.reasons.iter().filter(|one| one.kind == kind).map(|one| one.packets).sum()
    }
}

/// The sums of a family's samples by service. Names of services need no escapes.
fn by_service(metrics: &str, family: &str) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for line in metrics.lines() {
        let Some((labels, value)) =
            line.strip_prefix(family).and_then(|rest| rest.strip_prefix('{')?.split_once("} "))
        else {
            continue;
        };
        let service = labels.split(',').find_map(|label| label.strip_prefix("service=\"")?.strip_suffix('"'));
        if let (Some(service), Ok(value)) = (service, value.parse::<u64>()) {
            *sums.entry(service.to_owned()).or_default() += value;
        }
    }
    sums
}

/// Two readings, the earlier one first.
struct Pair<'r> {
    before: &'r Reading,
    now: &'r Reading,
}

impl Pair<'_> {
    fn seconds(&self) -> f64 {
        self.now.at.duration_since(self.before.at).as_secs_f64()
    }

    /// The growth of a counter in a second. None of one that was not there before, or that fell: the daemon that
    /// counted began anew.
    fn rate(&self, now: Option<u64>, before: Option<u64>) -> Option<f64> {
        Some(now?.checked_sub(before?)? as f64 / self.seconds().max(1e-3))
    }

    /// The same of the sum of several counters.
    fn sum(rates: impl IntoIterator<Item = Option<f64>>) -> Option<f64> {
        rates.into_iter().flatten().reduce(|a, b| a + b)
    }

    fn service(&self, one: &api::Service, backends: &[api::TopBackend]) -> api::TopService {
        let (now, before) = (self.now, self.before);
        let of = |read: fn(&api::TopBackend) -> Option<f64>| {
            Self::sum(backends.iter().filter(|backend| backend.service == one.name).map(read))
        };
        let named = |read: fn(&Reading) -> &BTreeMap<String, u64>| {
            self.rate(read(now).get(&one.name).copied(), read(before).get(&one.name).copied())
        };
        let local = one.mode.is_local();
        api::TopService {
            name: one.name.clone(),
            mode: one.mode,
            connections_per_second: if local {
                named(|one| &one.clients)
            } else {
                of(|one| one.connections_per_second)
            },
            hits_per_second: of(|one| one.hits_per_second),
            misses_per_second: of(|one| one.misses_per_second),
            requests_per_second: if local { named(|one| &one.requests) } else { None },
            bytes_per_second: of(|one| one.bytes_per_second),
            backends_up: one.backends_up,
            backends: one.backends,
        }
    }

    fn backend(&self, one: &api::Backend) -> api::TopBackend {
        let same = |other: &&api::Backend| (&other.service, &other.name) == (&one.service, &one.name);
        let before = self.before.backends.iter().find(same);
        let its = |service: &str, backend: &str| (service, backend) == (&one.service, &one.name);
        let service = self.now.services.iter().find(|service| service.name == one.service);
        let local = service.is_some_and(|service| service.mode.is_local());
        // The data path counts these.
        let rate = |read: fn(&api::Backend) -> u64| {
            if local { None } else { self.rate(Some(read(one)), before.map(read)) }
        };
        let tunnels: Vec<_> =
            self.now.tunnels.iter().filter(|tunnel| its(&tunnel.service, &tunnel.backend)).collect();
        // Of each tunnel by itself, so that one that was closed takes nothing away. Those that are new began at 0; a
        // daemon that began anew gives their numbers again.
        let through = |read: fn(&api::Tunnel) -> u64| {
            let old = |id| self.before.tunnels.iter().find(|old| old.id == id).map_or(0, read);
            let all = tunnels.iter().map(|tunnel| self.rate(Some(read(tunnel)), Some(old(tunnel.id))));
            let same_daemon = self.now.status.uptime_seconds >= self.before.status.uptime_seconds;
            if local && same_daemon { Some(Self::sum(all).unwrap_or(0.0)) } else { None }
        };
        let shares = self.now.shares.iter().filter(|share| its(&share.service, &share.backend));
        let (mut queued, mut policed) = (0, Vec::new());
        for share in shares {
            queued += share.queued;
            // Where no bandwidth is limited, bytes are not counted.
            if share.bytes > 0 {
                policed.push(self.class_rate(share, |one| one.bytes));
            }
        }
        api::TopBackend {
            service: one.service.clone(),
            name: one.name.clone(),
            state: one.state.clone(),
            connections_per_second: rate(|one| one.connections),
            hits_per_second: rate(|one| one.hits),
            misses_per_second: rate(|one| one.misses),
            requests_per_second: through(|tunnel| tunnel.requests),
            in_flight: local.then(|| tunnels.iter().map(|tunnel| tunnel.in_flight as u64).sum()),
            queued,
            bytes_per_second: if local {
                through(|tunnel| tunnel.sent_bytes + tunnel.received_bytes)
            } else {
                Self::sum(policed)
            },
        }
    }

    fn class_rate(&self, one: &api::QosShare, read: fn(&api::QosShare) -> u64) -> Option<f64> {
        let name = |one: &api::QosShare| (one.service.clone(), one.backend.clone(), one.class.clone());
        let before = self.before.shares.iter().find(|before| name(before) == name(one));
        self.rate(Some(read(one)), before.map(read))
    }

    fn class(&self, one: &api::QosShare) -> api::TopClass {
        let rate = |read| self.class_rate(one, read);
        api::TopClass {
            service: one.service.clone(),
            backend: one.backend.clone(),
            class: one.class.clone(),
            weight_percent: one.weight_percent,
            share_percent: one.share_percent,
            admitted_per_second: rate(|one| one.admitted),
            shed_per_second: rate(|one| one.shed),
            queued: one.queued,
            bytes_per_second: rate(|one| one.bytes),
            dropped_bytes_per_second: rate(|one| one.dropped_bytes),
        }
    }

    fn top(&self) -> api::Top {
        let packets = |kind| self.rate(Some(self.now.packets(kind)), Some(self.before.packets(kind)));
        let backends: Vec<_> = self.now.backends.iter().map(|one| self.backend(one)).collect();
        api::Top {
            seconds: self.seconds(),
            uptime_seconds: Some(self.now.status.uptime_seconds),
            error: None,
            forward_per_second: packets("forward"),
            pass_per_second: packets("pass"),
            consume_per_second: packets("consume"),
            drop_per_second: packets("drop"),
            services: self.now.services.iter().map(|one| self.service(one, &backends)).collect(),
            backends,
            classes: self.now.shares.iter().map(|one| self.class(one)).collect(),
        }
    }
}

/// What there is to say while no daemon answers.
fn silent(error: &Error, last: &Reading) -> api::Top {
    api::Top {
        seconds: last.at.elapsed().as_secs_f64(),
        error: Some(error.to_string()),
        ..api::Top::default()
    }
}

pub(super) async fn run(
    (interval, count): (u64, Option<u64>),
    ask: &Client<'_>,
    out: &mut dyn Write,
    form: Form,
    look: Look<'_>,
) -> Result<(), Error> {
    let mut last = Reading::take(ask).await?;
    let pause = Duration::from_secs(interval);
    // Nobody waits longer for the first view.
    tokio::time::sleep(pause.min(Duration::from_secs(1))).await;
    repeat(Some(pause), count, async |_| {
        // A daemon that ends is waited for: its successor goes on counting.
        let top = match Reading::take(ask).await {
            Ok(now) => {
                let top = Pair { before: &last, now: &now }.top();
                last = now;
                top
            }
            Err(error @ (Error::Unreachable { .. } | Error::Protocol(_))) => silent(&error, &last),
            Err(error) => return Err(error),
        };
        let text = match (form, look()) {
            (Form::Json, _) => {
                serde_json::to_string(&top).map_err(|error| Error::Protocol(error.to_string()))? + "\n"
            }
            (Form::Table(_), None) => page(&top, None, None) + "\n",
            (Form::Table(width), Some(terminal)) => {
                let columns = terminal.columns.filter(|_| width.is_some());
                in_place(&page(&top, columns, terminal.rows.or(Some(ROWS))))
            }
        };
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    })
    .await
}

/// Writes lines over those that are there, from the upper left corner, and clears what is left of those.
fn in_place(text: &str) -> String {
    let lines: String = text.lines().map(|line| format!("{line}\x1b[K\n")).collect();
    format!("\x1b[H{lines}\x1b[J")
}

/// A table's rows, each with how much happens there.
type Rows = Vec<(f64, Vec<String>)>;
/// Makes the table of them.
type Make = fn(Rows) -> Sheet;

/// The whole view: no wider than this, and, with the line of the cursor, no higher.
fn page(top: &api::Top, columns: Option<u16>, rows: Option<u16>) -> String {
    let mut text = headline(top);
    if let Some(error) = &top.error {
        text += &format!("{error}\n");
    }
    let mut tables: Vec<(Rows, Make)> = vec![
        (top.services.iter().map(service_row).collect(), services),
        (top.backends.iter().map(backend_row).collect(), backends),
        (top.classes.iter().map(class_row).collect(), classes),
    ];
    tables.retain(|(rows, _)| !rows.is_empty());
    let wanted: Vec<usize> = tables.iter().map(|(rows, _)| rows.len()).collect();
    let mut left = usize::MAX;
    if let Some(rows) = rows {
        // The cursor's line; and of each table a blank one, a header, and, where not all fits, how many are left out.
        left = usize::from(rows).saturating_sub(text.lines().count() + 1 + 2 * tables.len());
        if left < wanted.iter().sum() {
            left = left.saturating_sub(tables.len());
        }
    }
    for ((rows, make), most) in tables.into_iter().zip(parts(&wanted, left)) {
        let hidden = rows.len() - most;
        let (table, _) = rendered(make(busiest(rows, most)), columns);
        text += &format!("\n{table}\n");
        if hidden > 0 {
            text += &format!("({hidden} more)\n");
        }
    }
    // A line that goes on in the next one would move all others, as would one too many.
    let columns = columns.map_or(usize::MAX, usize::from);
    let lines = rows.map_or(usize::MAX, |rows| usize::from(rows.max(2)) - 1);
    let cut = |line: &str| line.chars().take(columns).chain(['\n']).collect::<String>();
    text.lines().take(lines).map(cut).collect()
}

/// Divides so many lines among tables: each gets what it wants, or as much as the others that want more.
fn parts(wanted: &[usize], mut lines: usize) -> Vec<usize> {
    let mut parts = vec![0; wanted.len()];
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|at| wanted[*at]);
    for (done, at) in order.into_iter().enumerate() {
        parts[at] = wanted[at].min(lines / (wanted.len() - done));
        lines -= parts[at];
    }
    parts
}

/// Those rows in which most happens, in the order in which they were.
fn busiest(rows: Rows, most: usize) -> Rows {
    let mut kept: Vec<(usize, (f64, Vec<String>))> = rows.into_iter().enumerate().collect();
    kept.sort_by(|(_, (a, _)), (_, (b, _))| b.total_cmp(a));
    kept.truncate(most);
    kept.sort_by_key(|(at, _)| *at);
    kept.into_iter().map(|(_, row)| row).collect()
}

fn headline(top: &api::Top) -> String {
    let packets = [
        ("forward", top.forward_per_second),
        ("pass", top.pass_per_second),
        ("consume", top.consume_per_second),
        ("drop", top.drop_per_second),
    ];
    let packets = packets.map(|(what, rate)| format!("{} {what}", short(rate))).join(", ");
    let up =
        top.uptime_seconds.map_or_else(|| "no daemon".to_owned(), |seconds| format!("up {}", age(seconds)));
    format!("{up}; packets/s: {packets}\n")
}

/// A number in few characters; a dash where there is none.
fn short(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".to_owned() };
    let (scaled, unit) = match value {
        ..1e3 => (value, ""),
        ..1e6 => (value / 1e3, "k"),
        ..1e9 => (value / 1e6, "M"),
        _ => (value / 1e9, "G"),
    };
    if scaled == 0.0 || (unit.is_empty() && scaled >= 10.0) {
        format!("{scaled:.0}")
    } else {
        format!("{scaled:.1}{unit}")
    }
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}%"))
}

fn count(value: Option<u64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn busy(rates: &[Option<f64>]) -> f64 {
    rates.iter().flatten().sum()
}

fn cells(rows: Rows) -> impl Iterator<Item = Vec<String>> {
    rows.into_iter().map(|(_, cells)| cells)
}

fn service_row(one: &api::TopService) -> (f64, Vec<String>) {
    let row = vec![
        one.name.clone(),
        word(&one.mode),
        short(one.connections_per_second),
        short(one.hits_per_second),
        short(one.misses_per_second),
        short(one.requests_per_second),
        short(one.bytes_per_second),
        format!("{}/{}", one.backends_up, one.backends),
    ];
    (busy(&[one.connections_per_second, one.requests_per_second]), row)
}

fn services(rows: Rows) -> Sheet {
    let header = ["service", "mode", "conns/s", "hits/s", "misses/s", "reqs/s", "bytes/s", "up"];
    table(&header, 2, &["mode", "misses/s", "hits/s", "bytes/s"], cells(rows))
}

fn backend_row(one: &api::TopBackend) -> (f64, Vec<String>) {
    let row = vec![
        one.service.clone(),
        one.name.clone(),
        one.state.clone(),
        short(one.connections_per_second),
        short(one.hits_per_second),
        short(one.misses_per_second),
        short(one.requests_per_second),
        count(one.in_flight),
        one.queued.to_string(),
        short(one.bytes_per_second),
    ];
    (busy(&[one.connections_per_second, one.requests_per_second]), row)
}

fn backends(rows: Rows) -> Sheet {
    let header = [
        "service", "backend", "state", "conns/s", "hits/s", "misses/s", "reqs/s", "open", "waiting",
        "bytes/s",
    ];
    table(&header, 3, &["misses/s", "hits/s", "bytes/s", "open"], cells(rows))
}

fn class_row(one: &api::TopClass) -> (f64, Vec<String>) {
    let row = vec![
        one.service.clone(),
        one.backend.clone(),
        one.class.clone(),
        percent(Some(one.weight_percent)),
        percent(one.share_percent),
        short(one.admitted_per_second),
        short(one.shed_per_second),
        one.queued.to_string(),
        short(one.bytes_per_second),
        short(one.dropped_bytes_per_second),
    ];
    (busy(&[one.admitted_per_second, one.bytes_per_second]), row)
}

fn classes(rows: Rows) -> Sheet {
    let header = [
        "service",
        "backend",
        "class",
        "weight",
        "share",
        "admitted/s",
        "shed/s",
        "waiting",
        "bytes/s",
        "dropped/s",
    ];
    table(&header, 3, &["dropped/s", "bytes/s", "waiting"], cells(rows))
}

#[cfg(test)]
pub(super) fn sheets() -> [Sheet; 3] {
    [services(Rows::new()), backends(Rows::new()), classes(Rows::new())]
}

#[cfg(test)]
pub(super) mod tests;
