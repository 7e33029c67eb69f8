//! Tunnels: what is established to backends of services that end TLS.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State};
use serde::Deserialize;

use super::{Answer, Query, Segment, conflict, not_found, reading};
use crate::{
    api,
    dataplane::monotonic_seconds,
    state::Shared,
    tunnels::{self, Context},
};

fn described(context: Context, sessions: &BTreeMap<u32, u32>) -> api::Tunnel {
    let (service, backend) = context.name.split_once('/').unwrap_or_default();
    api::Tunnel {
        id: context.id,
        service: service.to_owned(),
        backend: backend.to_owned(),
        source: context.source,
        destination: context.destination,
        version: context.version.to_owned(),
        cipher_suite: context.cipher_suite.to_owned(),
        group: context.group.map(str::to_owned),
        alpn: context.alpn,
        age_seconds: context.age.as_secs(),
        sessions: sessions.get(&context.id).copied().unwrap_or(0),
        requests: context.requests,
        in_flight: context.in_flight,
        sent_bytes: context.sent,
        received_bytes: context.received,
        state: match context.state {
            tunnels::State::Open => "open",
            tunnels::State::Used => "used",
            tunnels::State::Retiring => "retiring",
        }
        .to_owned(),
    }
}

/// All tunnels, or one.
async fn list(shared: Arc<Shared>, id: Option<u32>) -> Answer<Vec<api::Tunnel>> {
    reading(shared, move |shared| {
        let now = monotonic_seconds();
        let mut sessions = BTreeMap::new();
        for (_, session) in shared.dataplane.sessions().iter() {
            if session.tunnel != 0 && !session.expired(now) {
                *sessions.entry(session.tunnel).or_insert(0) += 1;
            }
        }
        let all = shared.terminator.tunnels.list().into_iter();
        let found: Vec<_> =
            all.filter(|one| id.is_none_or(|id| one.id == id)).map(|one| described(one, &sessions)).collect();
        if found.is_empty() && id.is_some() {
            return Err(not_found("no such tunnel; `dispatcherctl tunnels` lists them"));
        }
        Ok(found)
    })
    .await
}

/// Established tunnels: the SSL contexts
#[utoipa::path(
    get,
    path = "/v1/tunnels",
    responses((status = 200, description = "Each tunnel, by its number", body = Vec<api::Tunnel>), super::Failure)
)]
pub(super) async fn tunnels(State(shared): State<Arc<Shared>>) -> Answer<Vec<api::Tunnel>> {
    list(shared, None).await
}

/// One tunnel
#[utoipa::path(
    get,
    path = "/v1/tunnels/{id}",
    params(("id" = u32, Path, description = "Its number")),
    responses((status = 200, description = "The tunnel", body = Vec<api::Tunnel>), super::Failure)
)]
pub(super) async fn tunnel(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<u32>,
) -> Answer<Vec<api::Tunnel>> {
    list(shared, Some(id)).await
}

/// Close a tunnel at once: its requests fail, and another takes its place
#[utoipa::path(
    delete,
    path = "/v1/tunnels/{id}",
    params(("id" = u32, Path, description = "Its number")),
    responses((status = 200, description = "The tunnel as it was", body = Vec<api::Tunnel>), super::Failure)
)]
pub(super) async fn close(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<u32>,
) -> Answer<Vec<api::Tunnel>> {
    let found = list(Arc::clone(&shared), Some(id)).await?;
    if !shared.terminator.tunnels.close(id) {
        return Err(conflict("it has ended by itself"));
    }
    Ok(found)
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct RotateQuery {
    /// Only those to this backend of this service, `service/backend`
    backend: Option<String>,
}

/// Replace tunnels: new ones first, then the old ones end with their last request
#[utoipa::path(
    post,
    path = "/v1/tunnels/rotate",
    params(RotateQuery),
    responses((status = 200, description = "How many", body = api::Rotated), super::Failure)
)]
pub(super) async fn rotate(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<RotateQuery>,
) -> Answer<api::Rotated> {
    let tunnels = &shared.terminator.tunnels;
    let backend = match &query.backend {
        None => None,
        Some(name) => {
            let all = tunnels.backends();
            let found = all.iter().find(|one| one.name == *name).ok_or_else(|| {
                not_found(format!(
                    "no tunnels are kept to \"{name}\"; `dispatcherctl tunnels backends` lists backends as SERVICE/BACKEND"
                ))
            })?;
            Some(found.backend)
        }
    };
    Ok(Json(api::Rotated { tunnels: tunnels.rotate(backend) }))
}

/// Backends to which tunnels are kept, and why they fail
#[utoipa::path(
    get,
    path = "/v1/tunnels/backends",
    responses((status = 200, description = "Each backend", body = Vec<api::TunnelBackend>), super::Failure)
)]
pub(super) async fn backends(State(shared): State<Arc<Shared>>) -> Answer<Vec<api::TunnelBackend>> {
    let described = |one: tunnels::Status| {
        let (service, backend) = one.name.split_once('/').unwrap_or_default();
        let since = one.error.as_ref().and_then(|(_, since)| since.elapsed().ok());
        api::TunnelBackend {
            service: service.to_owned(),
            backend: backend.to_owned(),
            established: one.established,
            handshakes: one.handshakes,
            failed: one.failed,
            error: one.error.map(|(error, _)| error),
            failing_for_seconds: since.map(|since| since.as_secs()),
        }
    };
    Ok(Json(shared.terminator.tunnels.backends().into_iter().map(described).collect()))
}
