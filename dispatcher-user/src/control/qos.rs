//! Quality of service: classes, their shares of backends, and the operator's word on both.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{Json, extract::State};
use dispatcher_common::{
    service::Histogram,
    session::{KIND_QUIC_SERVER, KIND_TICKET_NAME},
};

use super::{
    Answer, Body, Failure, Names, Segment, conflict, find_service, keys, kind, not_found, reading, shown,
};
use crate::{
    api, config,
    dataplane::{ClassCount, monotonic_seconds},
    qos::ClassStatus,
    reload,
    state::Shared,
};

fn described(class: &config::Class) -> api::QosClass {
    api::QosClass {
        name: class.name.clone(),
        weight: class.weight,
        priority: class.priority,
        lend: class.lend,
        borrow_limit: class.borrow_limit,
        ceil: class.ceil,
        dscp: class.dscp,
    }
}

/// Classes
#[utoipa::path(
    get,
    path = "/v1/qos/classes",
    responses((status = 200, description = "Each class, the default one first", body = Vec<api::QosClass>), Failure)
)]
pub(super) async fn classes(State(shared): State<Arc<Shared>>) -> Answer<Vec<api::QosClass>> {
    Ok(Json(shared.config().classes.iter().map(described).collect()))
}

/// Change the weight of a class, until the configuration is read again
#[utoipa::path(
    patch,
    path = "/v1/qos/classes/{class}",
    params(("class" = String, Path, description = "Its name")),
    request_body = api::QosWeight,
    responses((status = 200, description = "The class", body = Vec<api::QosClass>), Failure)
)]
pub(super) async fn weigh(
    State(shared): State<Arc<Shared>>,
    Segment(name): Segment<String>,
    Body(api::QosWeight { weight }): Body<api::QosWeight>,
) -> Answer<Vec<api::QosClass>> {
    class(&shared.config(), &name)?;
    reload::amend(&shared, |amendments, _| {
        amendments.weigh(&name, weight);
        true
    })
    .await?;
    Ok(Json(vec![described(class(&shared.config(), &name)?)]))
}

fn class<'c>(config: &'c config::Config, name: &str) -> Result<&'c config::Class, Failure> {
    config.classes.iter().find(|class| class.name == name).ok_or_else(|| {
        let names: Vec<&str> = config.classes.iter().map(|class| class.name.as_str()).collect();
        not_found(format!("no class \"{name}\"; there are: {}", names.join(", ")))
    })
}

/// Put a session into a class, whatever the rules say
#[utoipa::path(
    put,
    path = "/v1/qos/sessions/{id}",
    params(("id" = String, Path, description = "The identifier, hexadecimal", pattern = "^([0-9a-fA-F]{2}){1,32}$")),
    request_body = api::QosAssignment,
    responses((status = 200, description = "The session", body = Vec<api::Session>), Failure)
)]
pub(super) async fn assign(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<String>,
    Body(wanted): Body<api::QosAssignment>,
) -> Answer<Vec<api::Session>> {
    reading(shared, move |shared| {
        let config = shared.config();
        find_service(&config, &wanted.service)?;
        let class = match wanted.class.as_deref() {
            None => 0,
            Some(name) => config::named_class(&class(&config, name)?.name),
        };
        let kinds = match &wanted.kind {
            Some(name) => vec![kind(name)?],
            None => super::all_kinds(),
        };
        let (names, now) = (Names::new(shared), monotonic_seconds());
        let sessions = shared.dataplane.sessions();
        let mut found = Vec::new();
        for key in keys(shared, &id, Some(&wanted.service), &kinds)? {
            let Some(old) = sessions.get(&key)?.filter(|session| !session.expired(now)) else { continue };
            if matches!(key.kind, KIND_TICKET_NAME | KIND_QUIC_SERVER) {
                return Err(conflict(format!(
                    "{id} stands for a server and all its clients, not for one session; assign a cookie, a session ID or client:ADDRESS, or classify its clients by [[service.classify]]"
                )));
            }
            let session = dispatcher_common::session::Session { class, ..old };
            sessions.insert(key, session)?;
            found.push(shown(&names, &key, &session, now));
        }
        if found.is_empty() {
            return Err(not_found(format!(
                "service {} has no session {id}; `dispatcherctl sessions list` shows them",
                wanted.service
            )));
        }
        Ok(found)
    })
    .await
}

/// What was counted at the last looks, from which shares of the time between follow.
#[derive(Default)]
pub(crate) struct Looks(Mutex<[Look; 2]>);

/// Bytes and connections by the ids of backend and class.
type Passed = BTreeMap<(u32, u16), [u64; 2]>;

#[derive(Default)]
struct Look {
    at: Option<Instant>,
    passed: Passed,
}

/// Looks are at least so far apart.
const APART: Duration = Duration::from_secs(1);

impl Looks {
    /// What was counted since the look before. Nothing if there was none: who was before us may have counted for days.
    fn since(&self, now: Passed) -> Passed {
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [before, last] = &mut *looks;
        if last.at.is_none_or(|at| at.elapsed() >= APART) {
            *before = std::mem::take(last);
            *last = Look { at: Some(Instant::now()), passed: now.clone() };
        }
        if before.at.is_none() {
            return Passed::new();
        }
        let since = |(key, now): ((u32, u16), [u64; 2])| {
            let then = before.passed.get(&key).copied().unwrap_or_default();
            (key, [0, 1].map(|at| now[at].saturating_sub(then[at])))
        };
        now.into_iter().map(since).collect()
    }
}

/// Classes' shares of backends
#[utoipa::path(
    get,
    path = "/v1/qos",
    responses((status = 200, description = "Each class at each backend that it used", body = Vec<api::QosShare>), Failure)
)]
pub(super) async fn shares(State(shared): State<Arc<Shared>>) -> Answer<Vec<api::QosShare>> {
    reading(shared, |shared| Ok(read_shares(shared)?.into_iter().map(|(share, _)| share).collect())).await
}

/// What there is to say of each class at each backend that it used, with the times that its requests and hellos waited.
pub(super) fn read_shares(shared: &Shared) -> Result<Vec<(api::QosShare, Histogram)>, Failure> {
    let config = shared.config();
    let places: BTreeMap<u32, u32> = shared.state().actual.backend_indexes().collect();
    let queues = shared.qos.snapshot();
    let mut counts = BTreeMap::new();
    for (id, index) in &places {
        for count in shared.dataplane.class_stats(*index)? {
            counts.insert((*id, count.id), count);
        }
    }
    let bytes = |count: &ClassCount| count.bytes.iter().sum::<u64>();
    let passed = counts.iter().map(|(key, count)| (*key, [bytes(count), count.stats.connections]));
    let recent = shared.looks.since(passed.collect());
    let weights: u64 = config.classes.iter().map(|class| u64::from(class.weight)).sum();
    let mut found = Vec::new();
    for service in &config.services {
        for backend in &service.backends {
            // Where bytes are not limited, they are not counted.
            let measure = usize::from(service.limits_of(backend).bandwidth == 0);
            let of = |id| recent.get(&(backend.id, id)).map_or(0, |passed| passed[measure]);
            let all: u64 = config.classes.iter().map(|class| of(class.id)).sum();
            for class in &config.classes {
                let none = ClassCount::default();
                let count = counts.get(&(backend.id, class.id)).unwrap_or(&none);
                let waits = queues.iter().filter(|status| status.backend == backend.id);
                let waits: Vec<_> =
                    waits.flat_map(|status| &status.classes).filter(|one| one.id == class.id).collect();
                let sum = |read: fn(&ClassStatus) -> u64| waits.iter().map(|one| read(one)).sum::<u64>();
                let part = waits.iter().map(|one| one.share).find(|share| *share > 0.0);
                let part = part.or_else(|| (all > 0).then(|| of(class.id) as f64 / all as f64));
                let mut times = Histogram::default();
                for one in &waits {
                    times.sum += one.waits.sum;
                    times.buckets.iter_mut().zip(one.waits.buckets).for_each(|(sum, count)| *sum += count);
                }
                let share = api::QosShare {
                    service: service.name.clone(),
                    backend: backend.name.clone(),
                    class: class.name.clone(),
                    weight_percent: f64::from(class.weight) / weights as f64 * 100.0,
                    share_percent: part.map(|part| part * 100.0),
                    in_flight: sum(|one| one.in_flight.into()),
                    queued: sum(|one| one.queued.into()),
                    admitted: sum(|one| one.admitted),
                    borrowed: sum(|one| one.borrowed),
                    shed: sum(|one| one.shed),
                    late: sum(|one| one.late),
                    cancelled: sum(|one| one.cancelled),
                    wait_p50_ms: quantile(&times, 0.5),
                    wait_p99_ms: quantile(&times, 0.99),
                    bytes: bytes(count),
                    borrowed_bytes: count.borrowed.iter().sum(),
                    dropped_bytes: count.stats.dropped_to_backend_bytes + count.stats.dropped_to_client_bytes,
                    connections: count.stats.connections,
                    connections_over: count.stats.connections_over,
                };
                if used(&share) {
                    found.push((share, times));
                }
            }
        }
    }
    Ok(found)
}

fn used(share: &api::QosShare) -> bool {
    let waited = share.admitted + share.queued + share.shed + share.late + share.cancelled;
    waited + share.bytes + share.dropped_bytes + share.connections + share.connections_over > 0
}

/// How long a part of all waited at most, milliseconds, as `histogram_quantile` of Prometheus has it: times are taken as spread
/// evenly over their bucket, and those of the last one as its beginning.
fn quantile(times: &Histogram, part: f64) -> Option<f64> {
    let due = times.count() as f64 * part;
    let mut before = 0.0;
    for (at, count) in times.buckets.iter().enumerate() {
        let count = *count as f64;
        if count > 0.0 && before + count >= due {
            let from = at.checked_sub(1).and_then(Histogram::end).unwrap_or(0) as f64;
            let to = Histogram::end(at).map_or(from, |end| end as f64);
            return Some((from + (to - from) * ((due - before) / count)) / 1e6);
        }
        before += count;
    }
    None
}

#[cfg(test)]
mod tests {
    use dispatcher_common::service::BUCKETS;

    use super::*;

    #[test]
    fn quantiles_are_within_their_buckets() {
        let mut times = Histogram::default();
        assert_eq!(quantile(&times, 0.5), None);
        times.buckets[0] = 96;
        times.buckets[10] = 4;
        assert_eq!(quantile(&times, 0.48), Some(0.000_512));
        assert_eq!(quantile(&times, 0.96), Some(0.001_024));
        assert_eq!(quantile(&times, 0.99), Some(0.917_504));
        assert_eq!(quantile(&times, 1.0), Some(1.048_576));
        times.buckets[BUCKETS - 1] = 900;
        assert_eq!(quantile(&times, 0.99), Some(4_294.967_296));
    }

    #[test]
    fn shares_are_of_the_time_between_looks() {
        let looks = Looks::default();
        let at = |bytes, connections| BTreeMap::from([((1, 2), [bytes, connections])]);
        let later = || looks.0.lock().expect("whole")[1].at = Instant::now().checked_sub(APART);
        // Counted by the daemon before us, whenever that was.
        assert_eq!(looks.since(at(10, 7)), Passed::new());
        assert_eq!(looks.since(at(10, 7)), Passed::new(), "too soon");
        later();
        assert_eq!(looks.since(at(15, 7)), at(5, 0));
        assert_eq!(looks.since(at(18, 8)), at(8, 1), "too soon: still since the first");
        later();
        assert_eq!(looks.since(at(30, 9)), at(15, 2));
    }
}
