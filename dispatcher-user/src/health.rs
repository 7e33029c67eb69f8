//! Health checks: whether what answers at a backend's address is a server.
//!
//! Each address of a backend is checked by itself, as long as the kernel reaches it. An address that fails
//! takes no connections, neither new ones nor those of known sessions, until it is back.

mod probe;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use self::probe::Target;
use crate::{
    config::{Config, Health},
    reconcile::{Reach, Unhealthy},
    state::{Shared, State},
};

/// How often it is seen who is due.
const TICK: Duration = Duration::from_millis(100);
/// Tables are made anew this often while a backend is in slow start.
const STEP: Duration = Duration::from_secs(1);
/// Checks under way together.
const AT_ONCE: usize = 256;
/// So many connections that a backend refuses since its last check make it due at once.
const SUSPECT: u32 = 3;
/// Between two checks that refused connections ask for.
const AGAIN: Duration = Duration::from_secs(1);

/// An address: backend id, and true for its IPv4 address.
type Who = (u32, bool);

/// Connections that backends refused or did not answer since they were last checked, by backend id.
#[derive(Debug, Default)]
pub(crate) struct Suspects(Mutex<BTreeMap<u32, u32>>);

impl Suspects {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<u32, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backend refused a connection, or did not answer.
    pub(crate) fn refused(&self, backend: u32) {
        let mut counts = self.counts();
        let count = counts.entry(backend).or_insert(0);
        *count = count.saturating_add(1);
    }
}

/// What checks say of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Standing {
    /// Not checked yet: it counts as up, and its first check decides alone.
    #[default]
    New,
    /// Up, with so many failed checks since the last good one.
    Up { failed: u32 },
    /// Down, with so many good checks since the last failed one.
    Down { good: u32 },
}

impl Standing {
    fn is_down(self) -> bool {
        matches!(self, Self::Down { .. })
    }

    /// After one more check.
    fn step(self, good: bool, health: &Health) -> Self {
        match (self, good) {
            (Self::Down { good }, true) if good + 1 < health.rise => Self::Down { good: good + 1 },
            (Self::New | Self::Up { .. } | Self::Down { .. }, true) => Self::Up { failed: 0 },
            (Self::Up { failed }, false) if failed + 1 < health.fall => Self::Up { failed: failed + 1 },
            (Self::New | Self::Up { .. } | Self::Down { .. }, false) => Self::Down { good: 0 },
        }
    }
}

/// What is known of an address.
#[derive(Debug)]
struct Record {
    /// What is checked, by the configuration in force.
    target: Target,
    standing: Standing,
    /// When it is checked next; `None` for at once.
    next: Option<Instant>,
    checked: Option<Instant>,
    under_way: bool,
    /// What the last failed check found.
    problem: Unhealthy,
}

impl Record {
    fn new(target: Target) -> Self {
        Self {
            target,
            standing: Standing::New,
            next: None,
            checked: None,
            under_way: false,
            problem: Unhealthy::default(),
        }
    }

    /// After a reload: another address is another server; another way to check it is tried at once.
    fn follow(mut self, target: Target) -> Self {
        if self.target.address != target.address {
            return Self::new(target);
        }
        (self.target, self.next, self.under_way) = (target, None, false);
        self
    }
}

/// Checks addresses, and lets slow starts go on, until the task is dropped.
pub(crate) async fn serve(shared: Arc<Shared>) -> (&'static str, String) {
    const TASK: &str = "health checks";
    let client = match probe::client() {
        Ok(client) => client,
        Err(error) => return (TASK, error),
    };
    let mut records: BTreeMap<Who, Record> = BTreeMap::new();
    let mut checks: JoinSet<(Who, Target, Result<(), Unhealthy>)> = JoinSet::new();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stepped = Instant::now();
    loop {
        let mut news: BTreeMap<Who, Option<Unhealthy>> = BTreeMap::new();
        tokio::select! {
            _ = tick.tick() => {
                let due = look_round(&shared, &mut records, &mut news, AT_ONCE.saturating_sub(checks.len()));
                for (who, target) in due {
                    let client = Arc::clone(&client);
                    checks.spawn(async move {
                        let result = probe::check(&target, client).await;
                        (who, target, result)
                    });
                }
            }
            Some(done) = checks.join_next() => match done {
                Ok((who, target, result)) => {
                    // What was checked under an older configuration says nothing.
                    if let Some(record) = records.get_mut(&who).filter(|record| record.target == target) {
                        let was_down = record.standing.is_down();
                        if let Some(down) = note(record, &target.health, result) {
                            if was_down != down.is_some() {
                                tell(&shared.config(), who, target.address, down.as_ref());
                            }
                            news.insert(who, down);
                        }
                    }
                }
                Err(error) => return (TASK, error.to_string()),
            }
        }
        let grows = stepped.elapsed() >= STEP && !shared.state().slow_start.percent().is_empty();
        if news.is_empty() && !grows {
            continue;
        }
        stepped = Instant::now();
        let shared = Arc::clone(&shared);
        let written = tokio::task::spawn_blocking(move || shared.reconcile(|state| publish(state, news)));
        if let Err(error) = written.await {
            return (TASK, error.to_string());
        }
    }
}

/// Takes note of what has changed: why an address is down, or that it is not.
fn publish(state: &mut State, news: BTreeMap<Who, Option<Unhealthy>>) {
    for (who, down) in news {
        match down {
            Some(found) => state.health.insert(who, found),
            None => state.health.remove(&who),
        };
    }
}

/// Who is to be checked now, `room` at most. What need not be checked any more is forgotten.
fn look_round(
    shared: &Shared,
    records: &mut BTreeMap<Who, Record>,
    news: &mut BTreeMap<Who, Option<Unhealthy>>,
    room: usize,
) -> Vec<(Who, Target)> {
    let now = Instant::now();
    let config = shared.config();
    let state = shared.state();
    let mut suspects = shared.suspects.counts();
    let mut due = Vec::new();
    let mut wanted: BTreeMap<Who, Record> = BTreeMap::new();
    for service in &config.services {
        let Some(health) = &service.health else { continue };
        for backend in &service.backends {
            if !backend.state.takes() {
                continue;
            }
            for address in backend.addresses() {
                let who = (backend.id, address.is_ipv4());
                let proxy = service.proxy_protocol;
                let target = || Target { address, proxy, health: health.clone() };
                let mut record = match records.remove(&who) {
                    Some(record) if record.target.is(address, proxy, health) => record,
                    Some(record) => record.follow(target()),
                    None => match state.health.get(&who) {
                        // By a daemon before us: good checks bring it back.
                        Some(known) => Record {
                            standing: Standing::Down { good: 0 },
                            problem: known.clone(),
                            ..Record::new(target())
                        },
                        None => Record::new(target()),
                    },
                };
                if !record.standing.is_down() && state.health.contains_key(&who) {
                    news.insert(who, None);
                }
                if !matches!(state.reach.get(&address.ip()), Some(Reach::Up(_))) {
                    if !record.standing.is_down() {
                        let reason =
                            format!("health: was not reached; {} good checks bring it back", health.rise);
                        news.insert(who, Some(Unhealthy { reason, dead: true }));
                    }
                    // It is checked as soon as it is back.
                    (record.standing, record.next) = (Standing::Down { good: 0 }, None);
                } else if !record.under_way {
                    let refused = suspects.get(&backend.id).is_some_and(|count| *count >= SUSPECT)
                        && record.checked.is_none_or(|checked| now >= checked + AGAIN);
                    if refused || record.next.is_none_or(|next| now >= next) {
                        due.push((record.next, who));
                    }
                }
                wanted.insert(who, record);
            }
        }
    }
    // Those first that have waited longest: where there is too much to do, all are checked more seldom.
    due.sort_unstable_by_key(|(next, _)| *next);
    due.truncate(room);
    let mut checks = Vec::new();
    for (_, who) in due {
        suspects.remove(&who.0);
        if let Some(record) = wanted.get_mut(&who) {
            record.next = Some(now + spread(record.target.health.interval));
            (record.checked, record.under_way) = (Some(now), true);
            checks.push((who, record.target.clone()));
        }
    }
    suspects.retain(|id, _| wanted.contains_key(&(*id, true)) || wanted.contains_key(&(*id, false)));
    news.extend(state.health.keys().filter(|who| !wanted.contains_key(*who)).map(|who| (*who, None)));
    *records = wanted;
    checks
}

/// Takes note of a check. Where there is news of an address: `None` inside for up, or why it is down.
fn note(record: &mut Record, health: &Health, result: Result<(), Unhealthy>) -> Option<Option<Unhealthy>> {
    let old = record.standing;
    record.under_way = false;
    record.standing = old.step(result.is_ok(), health);
    let Err(problem) = result else {
        return (old.is_down() && !record.standing.is_down()).then_some(None);
    };
    let known = old.is_down() && problem == record.problem;
    record.problem.clone_from(&problem);
    if known || !record.standing.is_down() {
        return None;
    }
    let Unhealthy { reason, dead } = problem;
    let reason = match old {
        Standing::Up { failed } => format!("health: {reason} ({} of {})", failed + 1, health.fall),
        Standing::New => format!("health: {reason} (the first check)"),
        Standing::Down { .. } => format!("health: {reason}"),
    };
    Some(Some(Unhealthy { reason, dead }))
}

fn tell(config: &Config, (id, _): Who, address: SocketAddr, down: Option<&Unhealthy>) {
    let mut services = config.services.iter();
    let name = services.find_map(|service| {
        let backend = service.backends.iter().find(|backend| backend.id == id)?;
        Some(format!("{}/{}", service.name, backend.name))
    });
    let Some(name) = name else { return };
    match down {
        Some(Unhealthy { reason, .. }) => log::warn!("backend {name} at {address}: down ({reason})"),
        None => log::info!("backend {name} at {address}: up (health: good again)"),
    }
}

/// So many seconds and a tenth more or less, so that not all are checked at the same moment.
fn spread(seconds: u32) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    Duration::from_secs(u64::from(seconds)).mul_f64(0.9 + 0.2 * f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        Health { interval: 5, timeout: 2, rise: 2, fall: 3, tls: false, server_name: None, http: None }
    }

    fn target(address: &str, health: Health) -> Target {
        Target { address: address.parse().expect("an address"), proxy: false, health }
    }

    #[test]
    fn a_reload_keeps_what_is_known_of_an_address() {
        let known = || Record {
            standing: Standing::Down { good: 1 },
            next: Some(Instant::now()),
            under_way: true,
            ..Record::new(target("10.0.0.1:443", health()))
        };
        let often = target("10.0.0.1:443", Health { interval: 1, ..health() });
        assert!(!known().target.is(often.address, often.proxy, &often.health));
        let now = known().follow(often.clone());
        assert_eq!((now.standing, now.next, now.under_way), (Standing::Down { good: 1 }, None, false));
        assert_eq!(now.target, often);
        let moved = known().follow(target("10.0.0.2:443", health()));
        assert_eq!(moved.standing, Standing::New, "another server");
    }

    /// After each check (`+`: good) `u` for up, `d` for down.
    fn course(checks: &str) -> String {
        let mut standing = Standing::New;
        let after = checks.chars().map(|check| {
            standing = standing.step(check == '+', &health());
            if standing.is_down() { 'd' } else { 'u' }
        });
        after.collect()
    }

    #[test]
    fn checks_in_a_row_decide() {
        for (checks, expected) in [
            ("+", "u"),
            ("-", "d"),
            ("+---", "uuud"),
            ("+--+--+--", "uuuuuuuuu"),
            ("---++", "ddddu"),
            ("-+-+-+", "dddddd"),
            ("-++--+---", "dduuuuuud"),
        ] {
            assert_eq!(course(checks), expected, "{checks}");
        }
        let once = Health { rise: 1, fall: 1, ..health() };
        assert_eq!(Standing::Up { failed: 0 }.step(false, &once), Standing::Down { good: 0 });
        assert_eq!(Standing::Down { good: 0 }.step(true, &once), Standing::Up { failed: 0 });
    }

    #[test]
    fn only_what_changes_is_told_and_why() {
        let mut record = Record { under_way: true, ..Record::new(target("10.0.0.1:443", health())) };
        let mut check = |result: Result<(), &str>| {
            let problem = |reason: &str| Unhealthy { reason: reason.to_owned(), dead: false };
            let told = note(&mut record, &health(), result.map_err(problem));
            told.map(|down| down.map(|found| found.reason))
        };
        assert_eq!(check(Ok(())), None);
        assert_eq!(check(Err("status 503")), None);
        assert_eq!(check(Err("status 503")), None);
        let reason = "health: connecting: refused (3 of 3)".to_owned();
        assert_eq!(check(Err("connecting: refused")), Some(Some(reason)));
        assert_eq!(check(Err("connecting: refused")), None);
        assert_eq!(check(Err("status 503")), Some(Some("health: status 503".to_owned())));
        assert_eq!(check(Ok(())), None);
        assert_eq!(check(Ok(())), Some(None));
        assert!(!record.under_way);
    }

    #[test]
    fn intervals_are_spread_by_a_tenth() {
        for _ in 0..100 {
            let spread = spread(10);
            assert!(Duration::from_secs(9) <= spread && spread <= Duration::from_secs(11), "{spread:?}");
        }
    }
}
