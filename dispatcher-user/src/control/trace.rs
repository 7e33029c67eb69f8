//! Decisions as they are made, for those who listen.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    body::Body,
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use dispatcher_common::{
    event::{
        EVENT_BOUND, EVENT_HELD, EVENT_LEARNED, EVENT_MISS, EVENT_REFUSED, EVENT_REJECTED, EVENT_TURN, Event,
    },
    flow::{FlowKey, ports_of},
    reason::Reason,
};
use futures_util::stream;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::broadcast::{
    self, Receiver, Sender,
    error::{RecvError, TryRecvError},
};

use super::{Failure, Names, Query, find_service, kind_name};
use crate::{
    api::{self, Traced},
    config::{self, Protocol},
    dataplane::Dataplane,
    state::Shared,
};

/// What a listener may be behind before it loses events.
const ROOM: usize = 4096;
/// Events that are written at a time.
const BATCH: usize = 256;

/// Kinds of events, as the API calls them.
const EVENTS: [(u16, &str); 7] = [
    (EVENT_BOUND, "bound"),
    (EVENT_MISS, "miss"),
    (EVENT_HELD, "held"),
    (EVENT_TURN, "held"),
    (EVENT_REFUSED, "refused"),
    (EVENT_LEARNED, "learned"),
    (EVENT_REJECTED, "rejected"),
];

/// An event, and when it came.
type Told = (Timestamp, Event);

/// Where events go in and listeners take them out.
#[derive(Debug)]
pub(crate) struct Trace {
    events: Sender<Told>,
    /// Of how many bound connections each listener wants one.
    wanted: Mutex<Vec<u32>>,
}

impl Default for Trace {
    fn default() -> Self {
        Self { events: broadcast::channel(ROOM).0, wanted: Mutex::default() }
    }
}

impl Trace {
    /// Tells all listeners; costs nothing when there are none.
    pub(crate) fn tell(&self, event: &Event) {
        if self.events.receiver_count() > 0 {
            // That the last one has just left is no fault.
            drop(self.events.send((Timestamp::now(), *event)));
        }
    }

    /// Changes what listeners want; the data path then tells what the most curious one wants.
    fn want(&self, dataplane: &Dataplane, change: impl FnOnce(&mut Vec<u32>)) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut wanted);
        let least = wanted.iter().copied().min().unwrap_or(0);
        if let Err(error) = dataplane.update_globals(|globals| globals.trace = least) {
            log::warn!("trace: {error}");
        }
    }
}

/// What is there now, at least one; of those that were lost, how many. `None` when the daemon ends.
async fn batch(events: &mut Receiver<Told>) -> Option<Vec<Result<Told, u64>>> {
    let mut found = vec![match events.recv().await {
        Ok(told) => Ok(told),
        Err(RecvError::Lagged(lost)) => Err(lost),
        Err(RecvError::Closed) => return None,
    }];
    while found.len() < BATCH {
        found.push(match events.try_recv() {
            Ok(told) => Ok(told),
            Err(TryRecvError::Lagged(lost)) => Err(lost),
            Err(TryRecvError::Empty | TryRecvError::Closed) => break,
        });
    }
    Some(found)
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TraceQuery {
    /// Only decisions of this service.
    service: Option<String>,
    /// Only decisions about this client address.
    #[param(value_type = Option<String>)]
    client: Option<IpAddr>,
    /// End after so many.
    #[param(format = "uint32", maximum = 4294967295_u32)]
    limit: Option<u32>,
    /// Of so many bound connections, tell of one; 0 for none. Default: 1. Another listener can want more.
    #[param(format = "uint32", maximum = 4294967295_u32)]
    one_in: Option<u32>,
}

/// Decisions as they are made, a line of JSON each
///
/// A listener that is too slow loses events and is told how many.
#[utoipa::path(
    get,
    path = "/v1/trace",
    params(TraceQuery),
    responses(
        (status = 200, description = "Lines without end", body = Traced, content_type = "application/x-ndjson"),
        Failure
    )
)]
pub(super) async fn trace(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<TraceQuery>,
) -> Result<Response, Failure> {
    if let Some(service) = &query.service {
        find_service(&shared.config(), service)?;
    }
    let left = query.limit.map_or(usize::MAX, |limit| limit as usize);
    let one_in = query.one_in.unwrap_or(1);
    if one_in != 0 {
        shared.trace.want(&shared.dataplane, |wanted| wanted.push(one_in));
    }
    let listener = Listener { events: shared.trace.events.subscribe(), shared, query, left, one_in };
    let lines = stream::unfold(listener, |mut listener| async {
        let lines = listener.next().await?;
        Some((Ok::<_, std::convert::Infallible>(lines), listener))
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

struct Listener {
    shared: Arc<Shared>,
    events: Receiver<Told>,
    query: TraceQuery,
    left: usize,
    one_in: u32,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.trace.want(&self.shared.dataplane, |wanted| {
            if let Some(at) = wanted.iter().position(|one| *one == self.one_in) {
                wanted.swap_remove(at);
            }
        });
    }
}

impl Listener {
    /// Some lines; `None` at the end.
    async fn next(&mut self) -> Option<String> {
        let mut lines = String::new();
        while lines.is_empty() && self.left > 0 {
            let batch = batch(&mut self.events).await?;
            let (names, frontends) = (Names::new(&self.shared), Frontends::new(&self.shared));
            for told in batch {
                let traced = match told {
                    Ok((time, event)) => match self.decision(&names, &frontends, time, &event) {
                        Some(decision) => Traced::Decision(decision),
                        None => continue,
                    },
                    Err(lost) => Traced::Lost(api::Lost { lost }),
                };
                if matches!(traced, Traced::Decision(_)) {
                    self.left -= 1;
                }
                match serde_json::to_string(&traced) {
                    Ok(line) => lines.extend([line.as_str(), "\n"]),
                    Err(error) => log::warn!("trace: {error}"),
                }
                if self.left == 0 {
                    break;
                }
            }
        }
        Some(lines).filter(|lines| !lines.is_empty())
    }

    /// The decision of an event, if it was asked for.
    fn decision(
        &self,
        names: &Names,
        frontends: &Frontends,
        time: Timestamp,
        event: &Event,
    ) -> Option<api::Decision> {
        let (_, what) = EVENTS.iter().find(|(kind, _)| *kind == event.kind)?;
        let bound = event.kind == EVENT_BOUND;
        if bound && self.one_in == 0 {
            return None;
        }
        let reason = Reason::ALL.iter().find(|reason| **reason as u32 == event.slot).filter(|_| bound);
        // One whose service has just gone is nobody's.
        let (vip, protocol, service) = frontends.0.get(&event.frontend)?;
        if self.query.service.as_ref().is_some_and(|wanted| wanted != service) {
            return None;
        }
        let client = self.client(event, *vip);
        if self.query.client.is_some_and(|wanted| wanted != client.ip()) {
            return None;
        }
        let known = event.session.len != 0;
        Some(api::Decision {
            time: format!("{time:.3}"),
            what: (*what).to_owned(),
            reason: reason.map(|reason| reason.name().to_owned()),
            service: service.clone(),
            client,
            vip: *vip,
            protocol: *protocol,
            backend: names.backend_at(event.backend),
            kind: known.then(|| kind_name(event.session.kind)),
            id: known.then(|| api::to_hex(event.session.id())),
        })
    }
}

impl Listener {
    /// The client. What a server's packet taught has the flow of that packet, which its entry turns into the
    /// client's.
    fn client(&self, event: &Event, vip: SocketAddr) -> SocketAddr {
        let FlowKey { src, dst, ports, .. } = event.flow;
        let (from, to) = ports_of(ports);
        if SocketAddr::new(IpAddr::from(dst), to) == vip {
            return SocketAddr::new(IpAddr::from(src), from);
        }
        match self.shared.dataplane.flows().get(&event.flow) {
            Ok(Some(flow)) => SocketAddr::new(IpAddr::from(flow.dst()), ports_of(flow.ports).1),
            // Its entry is gone: where the packet went, which is the client with `source = "client"`.
            Ok(None) | Err(_) => SocketAddr::new(IpAddr::from(dst), to),
        }
    }
}

/// VIP, protocol and service of each frontend index.
struct Frontends(BTreeMap<u32, (SocketAddr, Protocol, String)>);

impl Frontends {
    fn new(shared: &Shared) -> Self {
        let state = shared.state();
        let config = shared.config();
        let of = |service: &config::Service| -> Vec<_> {
            let found = service.vips.iter().filter_map(|vip| {
                let (index, _) = state.actual.frontend(&(*vip, service.protocol.number()))?;
                Some((index, (*vip, service.protocol, service.name.clone())))
            });
            found.collect()
        };
        Self(config.services.iter().flat_map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(slot: u32) -> Event {
        Event { kind: EVENT_MISS, slot, ..Event::default() }
    }

    #[tokio::test]
    async fn each_listener_is_told_all_of_it() {
        let trace = Trace::default();
        trace.tell(&event(0));
        let mut listeners = [trace.events.subscribe(), trace.events.subscribe()];
        for slot in 1..=3 {
            trace.tell(&event(slot));
        }
        for listener in &mut listeners {
            let told = batch(listener).await.expect("told");
            let slots: Vec<_> = told.iter().map(|one| one.as_ref().map(|(_, event)| event.slot)).collect();
            assert_eq!(slots, [Ok(1), Ok(2), Ok(3)], "what was before it listened is not for it");
        }
        drop(trace);
        assert!(batch(&mut listeners[0]).await.is_none());
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_what_it_lost() {
        let trace = Trace::default();
        let mut slow = trace.events.subscribe();
        for slot in 0..ROOM as u32 + 10 {
            trace.tell(&event(slot));
        }
        let told = batch(&mut slow).await.expect("told");
        assert_eq!(told.len(), BATCH);
        assert_eq!(told[0].as_ref().map(|_| ()), Err(&10));
        assert_eq!(told[1].as_ref().map(|(_, event)| event.slot), Ok(10));
    }
}
