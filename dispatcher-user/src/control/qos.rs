//! Quality of service: classes, their shares of backends, and the operator's word on both.

use std::sync::Arc;

use axum::{Json, extract::State};

use super::{
    Answer, Body, Failure, Names, Segment, bad, find_service, keys, kind, not_found, reading, shown,
};
use crate::{api, config, dataplane::monotonic_seconds, reload, state::Shared};

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
        let class = match &wanted.class {
            Some(name) if name == config::DEFAULT_CLASS => {
                return Err(bad(format!(
                    "\"{name}\" is where the rules put what they do not name; leave the class out to let the rules decide"
                )));
            }
            Some(name) => class(&config, name)?.id,
            None => 0,
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
