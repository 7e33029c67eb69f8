//! Saving on request.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};

use super::{Answer, Failure, conflict, reading};
use crate::{api, saved, state::Shared};

/// Save the sessions now, as it is done every few minutes and at the end
#[utoipa::path(
    post,
    path = "/v1/sessions/save",
    responses((status = 200, description = "How many, and where", body = api::Saved), Failure)
)]
pub(super) async fn save(State(shared): State<Arc<Shared>>) -> Answer<api::Saved> {
    reading(shared, |shared| {
        let store = shared.store.as_ref().ok_or_else(|| {
            conflict("there is no state file: name one with `state`, and start dispatcherd again")
        })?;
        let sessions = saved::save(&shared.dataplane, store)
            .map_err(|error| Failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        Ok(api::Saved { sessions, state: store.path().to_owned() })
    })
    .await
}
