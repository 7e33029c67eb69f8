//! The configuration in force, as a file would say it.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
};

use super::Failure;
use crate::{
    config::{Config, written},
    state::Shared,
};

/// Configuration in force, with all defaults
///
/// The keys are those of the file; docs/config/schema.json describes them. Capacities are those of the maps, where
/// pinned ones keep others than the file says. A file has no secrets.
#[utoipa::path(
    get,
    path = "/v1/config",
    responses((status = 200, description = "As a file in JSON would say it", body = serde_json::Value), Failure)
)]
pub(super) async fn config(State(shared): State<Arc<Shared>>) -> Result<impl IntoResponse, Failure> {
    Ok(Json(written(&in_force(&shared))))
}

/// Configuration in force, with all defaults, as a file that loads again
///
/// It begins with a comment for each capacity that the file says otherwise.
#[utoipa::path(
    get,
    path = "/v1/config.toml",
    responses((status = 200, description = "In TOML", body = String, content_type = "application/toml"), Failure)
)]
pub(super) async fn config_toml(State(shared): State<Arc<Shared>>) -> Result<impl IntoResponse, Failure> {
    let text = toml::to_string_pretty(&written(&in_force(&shared)));
    let text =
        text.map_err(|error| Failure(StatusCode::INTERNAL_SERVER_ERROR, format!("writing TOML: {error}")))?;
    let kept = shared.dataplane.capacities().differences(&shared.config().capacities);
    let note = |(name, there, wanted)| {
        format!(
            "# capacity.{name}: the pinned map keeps {there}; the file says {wanted}, which takes `dispatcherctl detach` and a start\n"
        )
    };
    let text = kept.into_iter().map(note).collect::<String>() + &text;
    Ok(([(CONTENT_TYPE, "application/toml")], text))
}

/// The configuration with the capacities that the maps have.
fn in_force(shared: &Shared) -> Config {
    Config { capacities: *shared.dataplane.capacities(), ..(*shared.config()).clone() }
}
