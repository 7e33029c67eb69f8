//! The configuration in force, as a file would say it.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
};

use super::Failure;
use crate::{config::written, state::Shared};

/// Configuration in force, with all defaults
///
/// The keys are those of the file; docs/config/schema.json describes them. A file has no secrets.
#[utoipa::path(
    get,
    path = "/v1/config",
    responses((status = 200, description = "As a file in JSON would say it", body = serde_json::Value), Failure)
)]
pub(super) async fn config(State(shared): State<Arc<Shared>>) -> Result<impl IntoResponse, Failure> {
    Ok(Json(written(&shared.config())))
}

/// Configuration in force, with all defaults, as a file that loads again
#[utoipa::path(
    get,
    path = "/v1/config.toml",
    responses((status = 200, description = "In TOML", body = String, content_type = "application/toml"), Failure)
)]
pub(super) async fn config_toml(State(shared): State<Arc<Shared>>) -> Result<impl IntoResponse, Failure> {
    let text = toml::to_string_pretty(&written(&shared.config()));
    let text =
        text.map_err(|error| Failure(StatusCode::INTERNAL_SERVER_ERROR, format!("writing TOML: {error}")))?;
    Ok(([(CONTENT_TYPE, "application/toml")], text))
}
