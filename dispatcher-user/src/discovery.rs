//! Which ticket keys belong to which backend: found out by asking the backends for tickets.
//!
//! A TLS 1.3 ticket is sent encrypted, so nobody on the way sees it issued. But whoever gets two tickets
//! of one server sees what they have in common: the name of the key that sealed them, which most servers
//! put first. Clients that come with a ticket of that key are sent to that server.

pub(crate) mod probe;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dispatcher_common::session::{
    BACKENDS_MAX, KIND_TICKET_NAME, STATE_DISCOVERED, STATE_PINNED, Session, SessionKey, TICKET_FORMATS,
    TICKET_NAMED, TICKET_OPAQUE, TICKET_UNKNOWN,
};
use rustls::{
    SupportedProtocolVersion,
    version::{TLS12, TLS13},
};
use tokio::task::JoinSet;

use self::probe::{Client, Target};
use crate::{
    api,
    config::{Backend, Config, Mode, Service, Tickets},
    dataplane::{self, Dataplane, monotonic_seconds},
    state::Shared,
};

/// How often it is seen who is due.
const TICK: Duration = Duration::from_millis(500);
/// After a look that failed.
const RETRY: Duration = Duration::from_secs(15);
/// Between two looks that clients' rejected tickets ask for.
const AGAIN: Duration = Duration::from_secs(5);
/// Backends looked at together.
const AT_ONCE: usize = 16;

/// A backend, and the name it is asked for.
type Who = (u32, Option<String>);

/// What is known of all backends.
#[derive(Debug, Default)]
pub(crate) struct Discovery {
    records: Mutex<BTreeMap<Who, Record>>,
}

/// What is known of a backend under one name.
#[derive(Clone, Debug, Default)]
struct Record {
    looked: Option<Instant>,
    next: Option<Instant>,
    found: Found,
    /// Other backends of the service that know the keys.
    shared_with: BTreeSet<u32>,
}

/// What one look found.
#[derive(Clone, Debug, Default)]
struct Found {
    keys: BTreeSet<Vec<u8>>,
    /// `session::TICKET_*`.
    ticket: u32,
    versions: Vec<&'static str>,
    note: Option<String>,
    failed: bool,
    /// Clients with sessions of the backend, to try them elsewhere.
    clients: Vec<Client>,
}

impl Discovery {
    fn records(&self) -> MutexGuard<'_, BTreeMap<Who, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backend did not accept a ticket of its own: it has a new key, perhaps.
    pub(crate) fn look_again(&self, backend: u32) {
        for ((id, _), record) in self.records().iter_mut() {
            if *id == backend && record.looked.is_some_and(|looked| looked.elapsed() >= AGAIN) {
                record.next = None;
            }
        }
    }

    /// For the API.
    pub(crate) fn shown(&self, config: &Config) -> Vec<api::Identity> {
        let records = self.records();
        let mut all = Vec::new();
        for service in &config.services {
            let Some(tickets) = &service.tickets else { continue };
            for backend in &service.backends {
                for server_name in names(tickets) {
                    let record = records.get(&(backend.id, server_name.clone())).cloned().unwrap_or_default();
                    all.push(identity(service, backend, server_name, &record));
                }
            }
        }
        all
    }
}

fn identity(
    service: &Service,
    backend: &Backend,
    server_name: Option<String>,
    record: &Record,
) -> api::Identity {
    let others = service.backends.iter().filter(|one| record.shared_with.contains(&one.id));
    let shared_with: Vec<String> = others.map(|one| one.name.clone()).collect();
    let found = &record.found;
    let state = if record.looked.is_none() {
        "pending"
    } else if found.failed {
        "failed"
    } else if found.ticket >= TICKET_NAMED {
        if shared_with.len() + 1 == service.backends.len() && !shared_with.is_empty() {
            "shared"
        } else {
            "routable"
        }
    } else if found.ticket == TICKET_OPAQUE {
        "opaque"
    } else {
        "no-tickets"
    };
    api::Identity {
        service: service.name.clone(),
        backend: backend.name.clone(),
        server_name,
        state: state.to_owned(),
        keys: found.keys.iter().map(|key| api::to_hex(key)).collect(),
        versions: found.versions.iter().map(|version| (*version).to_owned()).collect(),
        shared_with,
        note: found.note.clone(),
        looked_seconds_ago: record.looked.map(|looked| looked.elapsed().as_secs()),
    }
}

/// The names to ask for; one without a name where none is configured.
fn names(tickets: &Tickets) -> Vec<Option<String>> {
    if tickets.server_names.is_empty() {
        vec![None]
    } else {
        tickets.server_names.iter().cloned().map(Some).collect()
    }
}

/// Looks at backends until the task is dropped.
pub(crate) async fn serve(shared: Arc<Shared>) -> (&'static str, String) {
    loop {
        let due = due(&shared);
        if !due.is_empty() {
            look(&shared, due).await;
        }
        tokio::time::sleep(TICK).await;
    }
}

/// Whom to look at now.
fn due(shared: &Shared) -> Vec<(Who, Target, Option<u32>)> {
    let now = Instant::now();
    let state = shared.state();
    let mut records = shared.discovery.records();
    let mut due = Vec::new();
    for service in &shared.config().services {
        let Some(tickets) = &service.tickets else { continue };
        for backend in &service.backends {
            let up = |v4: &bool| state.actual.is_up(backend.id, *v4);
            let address = [true, false].into_iter().find(up).and_then(|v4| backend.address(v4));
            for server_name in names(tickets) {
                let record = records.entry((backend.id, server_name.clone())).or_default();
                let Some(address) = address else {
                    // It is looked at as soon as it is back.
                    record.next = None;
                    continue;
                };
                // Through a tunnel, as soon as there is one.
                let there =
                    service.mode != Mode::Relay || shared.terminator.tunnels.load(backend.id).established > 0;
                if there && due.len() < AT_ONCE && record.next.is_none_or(|next| now >= next) {
                    let target = target(shared, service, backend, address, server_name.clone());
                    due.push(((backend.id, server_name), target, service.ticket));
                }
            }
        }
    }
    due
}

fn target(
    shared: &Shared,
    service: &Service,
    backend: &Backend,
    address: SocketAddr,
    server_name: Option<String>,
) -> Target {
    let tunnel = (service.mode == Mode::Relay).then(|| (Arc::clone(&shared.terminator.tunnels), backend.id));
    Target { address, tunnel, server_name, proxy: service.proxy_protocol }
}

async fn look(shared: &Arc<Shared>, due: Vec<(Who, Target, Option<u32>)>) {
    let mut looks = JoinSet::new();
    for (who, target, ticket) in due {
        looks.spawn(async move {
            let found = look_at(&target, ticket).await;
            (who, found)
        });
    }
    while let Some(done) = looks.join_next().await {
        match done {
            Ok((who, found)) => note(shared, who, found),
            Err(error) => log::error!("looking for ticket keys: {error}"),
        }
    }
    share(shared).await;
    publish(shared);
}

/// Takes note of a look.
fn note(shared: &Shared, who: Who, found: Found) {
    let config = shared.config();
    let mut services = config.services.iter();
    let of = services.find_map(|service| {
        let backend = service.backends.iter().find(|backend| backend.id == who.0)?;
        Some((service, backend))
    });
    let Some((service, backend)) = of else { return };
    let interval = service.tickets.as_ref().map_or(600, |tickets| tickets.interval);
    let wait = if found.failed { RETRY } else { Duration::from_secs(u64::from(interval)) };
    // Not all at the same moment.
    let wait = wait.mul_f64(0.9 + f64::from(who.0 % 100) / 1000.0);
    let mut records = shared.discovery.records();
    let record = records.entry(who).or_default();
    let now = Instant::now();
    (record.looked, record.next) = (Some(now), Some(now + wait));
    let name = format!("{}/{}", service.name, backend.name);
    match &found.note {
        Some(note) if record.found.note != found.note => log::info!("tickets of {name}: {note}"),
        _ if record.found.keys != found.keys && !found.keys.is_empty() => {
            let keys: Vec<String> = found.keys.iter().map(|key| api::to_hex(key)).collect();
            log::info!("tickets of {name}: key {}", keys.join(", "));
        }
        _ => {}
    }
    if found.failed {
        // Its tickets are still the same, for all we know.
        record.found.failed = true;
        record.found.note = found.note;
    } else {
        record.found = found;
    }
}

/// Gets two tickets of each version, and looks what they have in common. `ticket` is what the configuration
/// says of it.
async fn look_at(target: &Target, ticket: Option<u32>) -> Found {
    let mut found = Found::default();
    let mut problems = Vec::new();
    let mut refused = Vec::new();
    for (version, name) in [(&TLS13, "TLSv1.3"), (&TLS12, "TLSv1.2")] {
        match tickets(target, version).await {
            Err(problem) => problems.push(format!("{name}: {problem}")),
            Ok(Samples { tickets, client, resumed }) => {
                if tickets.len() < 2 {
                    refused.push(format!("{name}: issues no tickets"));
                    continue;
                }
                found.versions.push(name);
                if !resumed {
                    refused.push(format!("{name}: does not accept its own tickets"));
                }
                match common_name(&tickets, ticket) {
                    Some((format, key)) => {
                        // What a backend's answers are read by: the newest version's format.
                        if found.ticket < TICKET_NAMED {
                            found.ticket = TICKET_NAMED + format as u32;
                        }
                        found.keys.insert(key);
                        found.clients.push(client);
                    }
                    None => {
                        found.ticket = found.ticket.max(TICKET_OPAQUE);
                        refused.push(format!("{name}: tickets carry no key name"));
                    }
                }
            }
        }
    }
    found.failed = problems.len() == 2;
    let notes = if found.failed { problems } else { refused };
    found.note = (!notes.is_empty()).then(|| notes.join("; "));
    found
}

struct Samples {
    tickets: Vec<Vec<u8>>,
    client: Client,
    resumed: bool,
}

/// Two tickets of a version, from two sessions.
async fn tickets(target: &Target, version: &'static SupportedProtocolVersion) -> Result<Samples, String> {
    let mut samples = Samples { tickets: Vec::new(), client: probe::client(&[version])?, resumed: true };
    for _ in 0..2 {
        let client = probe::client(&[version])?;
        probe::connect(target, &client).await?;
        let again = probe::connect(target, &client).await?;
        samples.resumed &= again.resumed;
        samples.client = client;
        if !again.ticket.is_empty() {
            samples.tickets.push(again.ticket);
        }
    }
    Ok(samples)
}

/// The name that tickets begin with, and its format: this one (`session::TICKET_*`), or the longest that
/// they have in common.
fn common_name(tickets: &[Vec<u8>], ticket: Option<u32>) -> Option<(usize, Vec<u8>)> {
    let (first, others) = tickets.split_first()?;
    let common =
        others.iter().map(|other| first.iter().zip(other).take_while(|(a, b)| a == b).count()).min()?;
    // A version byte before the name (s2n) makes 17 common bytes: its first 16 will do as well.
    let (format, (offset, len)) = TICKET_FORMATS
        .into_iter()
        .enumerate()
        .filter(|(format, _)| ticket.is_none_or(|ticket| ticket == TICKET_NAMED + *format as u32))
        .find(|(_, (offset, len))| common >= usize::from(offset + len))?;
    Some((format, first.get(usize::from(offset)..usize::from(offset + len))?.to_vec()))
}

/// Finds out which backends know one another's keys. That their tickets begin alike is not enough: one
/// must resume the other's session.
async fn share(shared: &Arc<Shared>) {
    for service in &shared.config().services {
        let Some(tickets) = &service.tickets else { continue };
        for server_name in names(tickets) {
            let known: Vec<(u32, Record)> = {
                let records = shared.discovery.records();
                let get = |backend: &Backend| {
                    Some((backend.id, records.get(&(backend.id, server_name.clone()))?.clone()))
                };
                service.backends.iter().filter_map(get).collect()
            };
            for (id, record) in &known {
                let mut others = BTreeSet::new();
                let mut alike = false;
                for (other, their) in &known {
                    if other == id || record.found.keys.is_disjoint(&their.found.keys) {
                        continue;
                    }
                    alike = true;
                    let target = service.backends.iter().find(|one| one.id == *other).and_then(|one| {
                        let state = shared.state();
                        let up = |v4: &bool| state.actual.is_up(one.id, *v4);
                        let address = [true, false].into_iter().find(up).and_then(|v4| one.address(v4))?;
                        Some(target(shared, service, one, address, server_name.clone()))
                    });
                    let before = record.shared_with.contains(other);
                    let shares = match (target, record.found.clients.first()) {
                        (Some(target), Some(client)) if !before => {
                            probe::connect(&target, client).await.is_ok_and(|seen| seen.resumed)
                        }
                        _ => before,
                    };
                    if shares {
                        others.insert(*other);
                    }
                }
                let mut records = shared.discovery.records();
                if let Some(own) = records.get_mut(&(*id, server_name.clone())) {
                    if alike && others.is_empty() {
                        own.found.ticket = TICKET_OPAQUE;
                        own.found.keys.clear();
                        own.found.note = Some(
                            "tickets of several backends begin alike, but none accepts another's".to_owned(),
                        );
                    }
                    own.shared_with = others;
                }
            }
        }
    }
}

/// Writes what is known to the maps.
fn publish(shared: &Shared) {
    let mut formats = BTreeMap::new();
    for service in &shared.config().services {
        let Some(tickets) = &service.tickets else { continue };
        let mut owners: BTreeMap<Vec<u8>, BTreeSet<u32>> = BTreeMap::new();
        {
            let records = shared.discovery.records();
            for ((id, _), record) in records.iter() {
                if !service.backends.iter().any(|backend| backend.id == *id) {
                    continue;
                }
                let known = formats.entry(*id).or_insert(0);
                *known = record.found.ticket.max(*known);
                for key in &record.found.keys {
                    let owners = owners.entry(key.clone()).or_default();
                    owners.insert(*id);
                    owners.extend(&record.shared_with);
                }
            }
        }
        for (key, ids) in owners {
            let all = ids.len() == service.backends.len();
            if let Err(error) = write(&shared.dataplane, service, tickets, &key, &ids, all) {
                log::error!("{error}");
            }
        }
    }
    shared.reconcile(|state| {
        state.tickets.retain(|id, _| formats.contains_key(id));
        // Of a backend that was not looked at yet, a daemon before us may have known.
        state.tickets.extend(formats.into_iter().filter(|(_, ticket)| *ticket != TICKET_UNKNOWN));
    });
}

fn write(
    dataplane: &Dataplane,
    service: &Service,
    tickets: &Tickets,
    key: &[u8],
    ids: &BTreeSet<u32>,
    all: bool,
) -> Result<(), dataplane::Error> {
    let Some(key) = SessionKey::new(service.id, KIND_TICKET_NAME, key) else { return Ok(()) };
    let sessions = dataplane.sessions();
    let old = sessions.get(&key)?;
    if old.is_some_and(|old| old.state == STATE_PINNED) {
        return Ok(());
    }
    if all && service.backends.len() > 1 {
        // Any backend will do, so the balancer decides.
        return sessions.remove(&key).map(drop);
    }
    let now = monotonic_seconds();
    let mut session = Session { state: STATE_DISCOVERED, created: now, used: now, ..old.unwrap_or_default() };
    session.backends = [0; BACKENDS_MAX];
    for (place, id) in session.backends.iter_mut().zip(ids) {
        *place = *id;
    }
    // A key that is no longer used still opens older tickets, for a while.
    session.expires = now.saturating_add(tickets.interval.saturating_mul(3).max(service.session_ttl));
    sessions.insert(key, session)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(start: &[u8], rest: u8) -> Vec<u8> {
        let mut ticket = start.to_vec();
        ticket.resize(100, rest);
        ticket
    }

    #[test]
    fn the_common_start_of_tickets_is_the_name() {
        let name: Vec<u8> = (0..16).collect();
        let found = common_name(&[ticket(&name, 1), ticket(&name, 2)], None);
        assert_eq!(found, Some((0, name.clone())));
        let versioned: Vec<u8> = (0..17).collect();
        assert_eq!(
            common_name(&[ticket(&versioned, 1), ticket(&versioned, 2)], None),
            Some((0, name.clone()))
        );
        assert_eq!(
            common_name(&[ticket(&name[..5], 77), ticket(&name[..5], 78)], None),
            Some((1, name[..4].to_vec()))
        );
        assert_eq!(common_name(&[ticket(&[], 1), ticket(&[], 2)], None), None);
        assert_eq!(common_name(&[ticket(&name[..3], 77), ticket(&name[..3], 78)], None), None);
        assert_eq!(common_name(&[ticket(&name, 1)], None), None, "one ticket says nothing");
        assert_eq!(common_name(&[], None), None);
        let both = [ticket(&name, 1), ticket(&name, 2)];
        assert_eq!(
            common_name(&both, Some(TICKET_NAMED + 1)),
            Some((1, name[..4].to_vec())),
            "as it is told"
        );
        let short = [ticket(&name[..5], 77), ticket(&name[..5], 78)];
        assert_eq!(common_name(&short, Some(TICKET_NAMED)), None);
    }
}
