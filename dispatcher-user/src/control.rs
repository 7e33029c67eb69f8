//! The control API: HTTP and JSON on a Unix socket. [`crate::api`] has what it says.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::CString,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::{
        fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Json, Router,
    body::{Body as Answered, Bytes},
    extract::{
        FromRequest, FromRequestParts, Request, State,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use dispatcher_common::{
    abi::ABI_VERSION,
    flow::{
        FLAG_FIN, FLAG_FIN_PEER, FLAG_SYN_SENT, FLAG_TO_BACKEND, Flow, FlowKey, MARK_HIT, MARK_SECURE,
        is_closed, ports_of,
    },
    reason::{Kind, Reason},
    service::{
        BackendStats, BackendTimes, FRONTEND_REFUSED_SACK, FRONTEND_REFUSED_TS, FRONTEND_REFUSED_WSCALE,
        Histogram,
    },
    session::{
        COOKIE_LEN, KIND_CLIENT, KIND_COOKIE, KIND_QUIC_CID, KIND_QUIC_SERVER, KIND_TICKET, KIND_TICKET_NAME,
        KIND_TLS_SESSION_ID, STATE_CONFIGURED, STATE_CONFIRMED, STATE_DISCOVERED, STATE_PINNED,
        STATE_PROVISIONAL, Session, SessionKey, TICKET_HEAD,
    },
};
use futures_util::stream;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream, unix::SocketAddr as UnixAddr},
    sync::mpsc,
};
use utoipa::{
    PartialSchema as _, ToSchema as _,
    openapi::{
        Components, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, Ref, RefOr, ResponseBuilder,
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    api::{self, Problem},
    config::{self, AdminState, Config, Protocol, named_class},
    counted,
    dataplane::{self, memory_bytes, monotonic_ns, monotonic_seconds},
    reconcile::{self, Vip},
    reload,
    state::Shared,
};

pub(crate) mod metrics;
pub(crate) mod qos;
mod saved;
mod settings;
pub(crate) mod trace;
mod tunnels;

/// What can go wrong with the socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody answers there.
    #[error("another dispatcherd listens on {0}; stop it, or set another `control` path")]
    InUse(PathBuf),
    /// No such group.
    #[error("group {0} (control_group) does not exist; `getent group` lists those that do")]
    NoGroup(String),
    /// Something else has the path.
    #[error("{0} is there and is no socket; it is left alone: remove it, or set another `control` path")]
    NoSocket(PathBuf),
    /// There is no folder for it.
    #[error("the folder of the control socket, {0}, does not exist; make it, or set another `control` path")]
    NoFolder(PathBuf),
    /// A file operation failed.
    #[error(
        "control socket {path}: {action}: {source}; set another `control` path if this one cannot be used"
    )]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// A socket that listens and goes when this is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: Option<StdListener>,
    /// Whether others than root may be there: those that the group's permission lets in.
    group: bool,
}

impl Socket {
    /// Makes the socket, for root and a group.
    pub fn bind(path: &Path, group: Option<&str>) -> Result<Self, Error> {
        let failed = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
            // One of our own, such as /run/dispatcher, but no path that is a slip of the pen.
            if folder.parent().is_some_and(|above| !above.exists()) {
                return Err(Error::NoFolder(folder.to_owned()));
            }
            fs::DirBuilder::new().mode(0o755).create(folder).map_err(failed("making its folder"))?;
        }
        if fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(Error::NoSocket(path.to_owned()));
        }
        if StdStream::connect(path).is_ok() {
            return Err(Error::InUse(path.to_owned()));
        }
        let group_id = group.map(group_id).transpose()?;
        // Nobody can connect before the permissions are right: it gets its name last.
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", std::process::id()));
        let hidden = PathBuf::from(hidden);
        let listener = StdListener::bind(&hidden).map_err(failed("binding"))?;
        let prepared = fs::set_permissions(&hidden, fs::Permissions::from_mode(0o660))
            .and_then(|()| match group_id {
                Some(id) => std::os::unix::fs::chown(&hidden, None, Some(id)),
                None => Ok(()),
            })
            .and_then(|()| fs::rename(&hidden, path))
            .and_then(|()| listener.set_nonblocking(true));
        if let Err(source) = prepared {
            drop(fs::remove_file(&hidden));
            return Err(failed("setting permissions")(source));
        }
        Ok(Self { path: path.to_owned(), listener: Some(listener), group: group_id.is_some() })
    }

    fn listener(&mut self) -> io::Result<Listener> {
        let listener = self.listener.take().ok_or_else(|| io::Error::other("served twice"))?;
        Ok(Listener { inner: UnixListener::from_std(listener)?, group: self.group })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::debug!("removing {}: {error}", self.path.display());
        }
    }
}

fn group_id(name: &str) -> Result<u32, Error> {
    let missing = || Error::NoGroup(name.to_owned());
    let text = CString::new(name).map_err(|_| missing())?;
    // SAFETY: `text` ends with a zero byte and outlives the call. The record that comes back is libc's own
    // and is valid until the next such call; this process makes them one after the other, at start.
    unsafe {
        let group = libc::getgrnam(text.as_ptr());
        if group.is_null() { Err(missing()) } else { Ok((*group).gr_gid) }
    }
}

/// Accepts those who may.
struct Listener {
    inner: UnixListener,
    group: bool,
}

impl axum::serve::Listener for Listener {
    type Io = UnixStream;
    type Addr = UnixAddr;

    async fn accept(&mut self) -> (UnixStream, UnixAddr) {
        loop {
            match self.inner.accept().await {
                Ok((stream, address)) => match stream.peer_cred() {
                    // SAFETY: takes nothing, touches nothing.
                    Ok(peer) if self.group || peer.uid() == 0 || peer.uid() == unsafe { libc::geteuid() } => {
                        return (stream, address);
                    }
                    Ok(peer) => {
                        log::warn!("control: user {} is not root; refused", peer.uid());
                        tokio::spawn(refuse(stream));
                    }
                    Err(error) => log::warn!("control: peer without credentials: {error}"),
                },
                Err(error) => {
                    log::warn!("control: accepting: {error}");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<UnixAddr> {
        self.inner.local_addr()
    }
}

/// Tells somebody who may not ask why.
async fn refuse(mut stream: UnixStream) {
    let problem = "only root may ask, or, if control_group names a group, its members";
    let body = serde_json::json!(Problem { error: problem.to_owned() }).to_string();
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    // All that is asked is read, or closing would take the answer with it.
    let told = async {
        let mut asked = [0; 1024];
        let _ = stream.read(&mut asked).await?;
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        while stream.read(&mut asked).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    if let Ok(Err(error)) = tokio::time::timeout(std::time::Duration::from_secs(1), told).await {
        log::debug!("control: {error}");
    }
}

/// Answers requests until the task is dropped.
pub(crate) async fn serve(shared: Arc<Shared>, socket: &mut Socket) -> io::Result<()> {
    axum::serve(socket.listener()?, router(shared)).await
}

fn router(shared: Arc<Shared>) -> Router {
    resources()
        .split_for_parts()
        .0
        .fallback(|| async { not_found("no such resource") })
        .method_not_allowed_fallback(|| async {
            let problem = "not for this resource; the header Allow says what is".to_owned();
            Failure(StatusCode::METHOD_NOT_ALLOWED, problem)
        })
        .with_state(shared)
}

/// All resources: what is served is what is described.
fn resources() -> OpenApiRouter<Arc<Shared>> {
    let info = InfoBuilder::new()
        .title("Dispatcher")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("The control API of dispatcherd, on its Unix socket."));
    let components = Components::builder().schema(Problem::name(), Problem::schema()).build();
    let document = OpenApiBuilder::new().info(info.build()).components(Some(components)).build();
    OpenApiRouter::with_openapi(document)
        .routes(routes!(status))
        .routes(routes!(services))
        .routes(routes!(backends))
        .routes(routes!(backend, change_backend, add_backend, remove_backend))
        .routes(routes!(identities))
        .routes(routes!(sessions))
        .routes(routes!(session, pin, remove))
        .routes(routes!(saved::save))
        .routes(routes!(flows))
        .routes(routes!(counters))
        .routes(routes!(reload_now))
        .routes(routes!(settings::config))
        .routes(routes!(settings::config_toml))
        .routes(routes!(trace::trace))
        .routes(routes!(qos::shares))
        .routes(routes!(qos::classes))
        .routes(routes!(qos::weigh))
        .routes(routes!(qos::assign))
        .routes(routes!(tunnels::tunnels))
        .routes(routes!(tunnels::tunnel, tunnels::close))
        .routes(routes!(tunnels::rotate))
        .routes(routes!(tunnels::backends))
        .routes(routes!(metrics::metrics))
        .routes(routes!(description))
}

/// The description of the API, in OpenAPI 3.1.
#[must_use]
pub fn openapi() -> OpenApi {
    resources().into_openapi()
}

/// This description, in OpenAPI
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value))
)]
async fn description() -> Json<OpenApi> {
    Json(openapi())
}

/// An answer that is no success.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(Problem { error: self.1 })).into_response()
    }
}

impl utoipa::IntoResponses for Failure {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let problem = ContentBuilder::new().schema(Some(Ref::from_schema_name(Problem::name())));
        let response = ResponseBuilder::new()
            .description("What is wrong and what to do")
            .content("application/json", problem.build());
        BTreeMap::from([("default".to_owned(), response.build().into())])
    }
}

impl From<dataplane::Error> for Failure {
    fn from(error: dataplane::Error) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }
}

impl From<reload::Error> for Failure {
    fn from(error: reload::Error) -> Self {
        let status = match error {
            reload::Error::NoFile
            | reload::Error::Config(_)
            | reload::Error::Restart(_)
            | reload::Error::Shortage(_)
            | reload::Error::Interface(_)
            | reload::Error::Terminate(_) => StatusCode::CONFLICT,
            reload::Error::Store(_) => StatusCode::INSUFFICIENT_STORAGE,
            reload::Error::Maps(_) | reload::Error::Panic => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

/// The query, or an answer in JSON like all others.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Failure))]
struct Query<T>(T);

/// What stands in the path, or an answer in JSON like all others.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Failure))]
struct Segment<T>(T);

/// The body, an object, or an answer in JSON like all others.
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        // Of the type itself an array would be taken too.
        let Json(mut object) = Json::<Map<String, Value>>::from_request(request, state).await?;
        object.values_mut().for_each(whole);
        match T::deserialize(Value::Object(object)) {
            Ok(body) => Ok(Self(body)),
            Err(error) => Err(Failure(StatusCode::UNPROCESSABLE_ENTITY, error.to_string())),
        }
    }
}

/// 51.0 is an integer (JSON Schema, section 6.1.1 of its validation vocabulary).
fn whole(value: &mut Value) {
    if let Some(number) = value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 1e15) {
        *value = Value::from(number as i64);
    }
}

fn not_found(what: impl Into<String>) -> Failure {
    Failure(StatusCode::NOT_FOUND, what.into())
}

fn bad(what: impl Into<String>) -> Failure {
    Failure(StatusCode::BAD_REQUEST, what.into())
}

/// A good request that does not go with the configuration.
fn conflict(what: impl Into<String>) -> Failure {
    Failure(StatusCode::CONFLICT, what.into())
}

type Answer<T> = Result<Json<T>, Failure>;

/// Maps are read where that blocks nobody.
async fn blocking<T: Send + 'static>(
    shared: Arc<Shared>,
    read: impl FnOnce(&Shared) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(move || read(&shared)).await {
        Ok(result) => result,
        Err(error) => Err(Failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

async fn reading<T: Send + 'static>(
    shared: Arc<Shared>,
    read: impl FnOnce(&Shared) -> Result<T, Failure> + Send + 'static,
) -> Answer<T> {
    blocking(shared, read).await.map(Json)
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ReloadQuery {
    /// Only say what would change
    #[serde(default)]
    dry_run: bool,
}

/// Read the configuration file again and put it in force, all or nothing
#[utoipa::path(
    post,
    path = "/v1/reload",
    params(ReloadQuery),
    responses((status = 200, description = "What changes", body = api::Reload), Failure)
)]
async fn reload_now(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<ReloadQuery>,
) -> Answer<api::Reload> {
    Ok(Json(reload::reload(&shared, query.dry_run).await?))
}

/// Version, interfaces, sums
#[utoipa::path(
    get,
    path = "/v1/status",
    responses((status = 200, description = "The daemon and its sums", body = api::Status), Failure)
)]
async fn status(State(shared): State<Arc<Shared>>) -> Answer<api::Status> {
    reading(shared, |shared| Ok(status_of(shared, &read_backends(shared, None)?))).await
}

fn status_of(shared: &Shared, backends: &[api::Backend]) -> api::Status {
    let globals = shared.dataplane.globals();
    let sum = |field: fn(&api::Backend) -> u64| backends.iter().map(field).sum();
    api::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        abi: ABI_VERSION,
        uptime_seconds: shared.started.elapsed().as_secs(),
        interfaces: shared.dataplane.attached(),
        memory_bytes: memory_bytes(shared.dataplane.capacities()),
        pin: shared.dataplane.pinned().map(Path::to_owned),
        services: shared.config().services.len(),
        backends: backends.len(),
        backends_up: backends.iter().filter(|backend| backend.state == "up").count(),
        connections: sum(|backend| backend.connections),
        hits: sum(|backend| backend.hits),
        misses: sum(|backend| backend.misses),
        fresh: sum(|backend| backend.fresh),
        nonsecure: sum(|backend| backend.nonsecure),
        learned: sum(|backend| backend.learned),
        heartbeat_age_ms: monotonic_ns().saturating_sub(globals.heartbeat) / 1_000_000,
        cookie_epoch: globals.epoch,
        events: shared.counts.read(),
    }
}

/// Services
#[utoipa::path(
    get,
    path = "/v1/services",
    responses((status = 200, description = "Each service", body = Vec<api::Service>), Failure)
)]
async fn services(State(shared): State<Arc<Shared>>) -> Answer<Vec<api::Service>> {
    reading(shared, read_services).await
}

fn read_services(shared: &Shared) -> Result<Vec<api::Service>, Failure> {
    let state = shared.state();
    let config = shared.config();
    let desired = state.desired(&config);
    let mut services = Vec::new();
    for service in &config.services {
        let mut refused = 0;
        for vip in vips(service) {
            if let Some((index, _)) = state.actual.frontend(&vip) {
                refused |= shared.dataplane.frontends().get(index)?.flags;
            }
        }
        let options = [
            (FRONTEND_REFUSED_SACK, "sack"),
            (FRONTEND_REFUSED_TS, "timestamps"),
            (FRONTEND_REFUSED_WSCALE, "wscale"),
        ];
        let up = |backend: &&config::Backend| reconcile::status(&desired, &state.actual, backend).0 == "up";
        services.push(api::Service {
            name: service.name.clone(),
            id: service.id,
            vips: service.vips.clone(),
            protocol: service.protocol,
            mode: service.mode,
            miss: service.miss,
            source: match service.source {
                config::Source::Client => "client",
                config::Source::Dispatcher { .. } => "dispatcher",
            }
            .to_owned(),
            proxy_protocol: if service.proxy_protocol { "v2" } else { "off" }.to_owned(),
            balance: service.balance,
            table_size: service.table_size,
            refused_options: options
                .iter()
                .filter(|(flag, _)| refused & flag != 0)
                .map(|(_, name)| (*name).to_owned())
                .collect(),
            backends: service.backends.len(),
            backends_up: service.backends.iter().filter(up).count(),
        });
    }
    Ok(services)
}

fn vips(service: &config::Service) -> Vec<Vip> {
    service.vips.iter().map(|vip| (*vip, service.protocol.number())).collect()
}

/// Backends with their state and counters
#[utoipa::path(
    get,
    path = "/v1/backends",
    responses((status = 200, description = "Each backend", body = Vec<api::Backend>), Failure)
)]
async fn backends(State(shared): State<Arc<Shared>>) -> Answer<Vec<api::Backend>> {
    reading(shared, |shared| read_backends(shared, None)).await
}

/// Backends, or the one with an id.
fn read_backends(shared: &Shared, id: Option<u32>) -> Result<Vec<api::Backend>, Failure> {
    let mut found = Vec::new();
    let config = shared.config();
    let now = reload::unix_seconds();
    // Backends to which there is no tunnel although there should be some.
    let failing = shared.terminator.tunnels.backends().into_iter().filter(|one| one.established == 0);
    let failing: HashMap<u32, String> = failing
        .filter_map(|one| one.error.map(|(error, _)| (one.backend, format!("no tunnel: {error}"))))
        .collect();
    {
        let state = shared.state();
        let desired = state.desired(&config);
        for service in &config.services {
            let vips = vips(service);
            for backend in service.backends.iter().filter(|one| id.is_none_or(|id| one.id == id)) {
                let Some(index) = state.actual.backend_index(backend.id) else { continue };
                let (condition, reason) = reconcile::status(&desired, &state.actual, backend);
                let reason = reason.or_else(|| failing.get(&backend.id).cloned());
                let deadline = state.deadlines.get(&backend.id).map(|at| at.saturating_sub(now));
                let share = (!service.mode.is_local()).then(|| state.actual.share(&vips, index));
                found.push((service, backend, index, condition, reason, share, deadline));
            }
        }
    }
    found
        .into_iter()
        .map(|(service, backend, index, condition, reason, share, deadline_seconds)| {
            let BackendStats { connections, hits, misses, fresh, nonsecure, established, refused, learned } =
                shared.dataplane.backend_stats(index)?;
            let BackendTimes { connect, response } = shared.dataplane.backend_times(index)?;
            Ok(api::Backend {
                name: backend.name.clone(),
                service: service.name.clone(),
                id: backend.id,
                index,
                addresses: backend.addresses().collect(),
                state: condition.to_owned(),
                deadline_seconds,
                reason,
                weight: backend.weight,
                share,
                open: None,
                connections,
                hits,
                misses,
                fresh,
                nonsecure,
                established,
                refused,
                learned,
                connect_ms: average_ms(&connect),
                response_ms: average_ms(&response),
            })
        })
        .collect()
}

/// The average of a histogram, milliseconds.
fn average_ms(histogram: &Histogram) -> Option<f64> {
    let count = histogram.count();
    (count != 0).then(|| histogram.sum as f64 / count as f64 / 1e6)
}

/// A backend, with the number of its open connections
#[utoipa::path(
    get,
    path = "/v1/backends/{service}/{name}",
    params(("service" = String, Path, description = "Service"), ("name" = String, Path, description = "Backend")),
    responses((status = 200, description = "The backend", body = Vec<api::Backend>), Failure)
)]
async fn backend(
    State(shared): State<Arc<Shared>>,
    Segment((service, name)): Segment<(String, String)>,
) -> Answer<Vec<api::Backend>> {
    reading(shared, move |shared| read_backend(shared, &service, &name)).await
}

fn read_backend(shared: &Shared, service: &str, name: &str) -> Result<Vec<api::Backend>, Failure> {
    let config = shared.config();
    let (_, backend) = find_backend(&config, service, name)?;
    let mut found = read_backends(shared, Some(backend.id))?;
    for one in &mut found {
        one.open = Some(shared.open(one.index) + shared.terminator.in_use(one.id));
    }
    Ok(found)
}

/// Changes a backend, until the file is read again
#[utoipa::path(
    patch,
    path = "/v1/backends/{service}/{name}",
    params(("service" = String, Path, description = "Service"), ("name" = String, Path, description = "Backend")),
    request_body = api::BackendChange,
    responses((status = 200, description = "The backend", body = Vec<api::Backend>), Failure)
)]
async fn change_backend(
    State(shared): State<Arc<Shared>>,
    Segment((service, name)): Segment<(String, String)>,
    Body(change): Body<api::BackendChange>,
) -> Answer<Vec<api::Backend>> {
    if change.deadline_seconds.is_some() && change.state != Some(AdminState::Drain) {
        return Err(conflict("deadline_seconds goes with the state drain only; leave it out"));
    }
    find_backend(&shared.config(), &service, &name)?;
    reload::amend(&shared, |said, _| {
        said.change(&service, &name, &change, reload::unix_seconds());
        true
    })
    .await?;
    let mut told = Vec::new();
    told.extend(change.state.map(|state| state.to_string()));
    told.extend(change.deadline_seconds.map(|seconds| format!("for {seconds} s")));
    told.extend(change.weight.map(|weight| format!("weight {weight}")));
    log::info!("{service}/{name}: set to {} by the operator", told.join(", "));
    reading(shared, move |shared| read_backend(shared, &service, &name)).await
}

/// Adds a backend to a service, until the file is read again
#[utoipa::path(
    put,
    path = "/v1/backends/{service}/{name}",
    params(("service" = String, Path, description = "Service"), ("name" = String, Path, description = "Backend")),
    request_body = api::NewBackend,
    responses((status = 200, description = "The backend", body = Vec<api::Backend>), Failure)
)]
async fn add_backend(
    State(shared): State<Arc<Shared>>,
    Segment((service, name)): Segment<(String, String)>,
    Body(new): Body<api::NewBackend>,
) -> Answer<Vec<api::Backend>> {
    find_service(&shared.config(), &service)?;
    let mut there = false;
    reload::amend(&shared, |said, _| {
        // Nobody else changes the configuration meanwhile.
        there = find_backend(&shared.config(), &service, &name).is_ok();
        if !there {
            said.add(&service, &name, new);
        }
        !there
    })
    .await?;
    if there {
        return Err(conflict(format!(
            "service {service} has a backend {name} already; change its weight or state, or remove it first"
        )));
    }
    log::info!("{service}/{name}: added by the operator");
    reading(shared, move |shared| read_backend(shared, &service, &name)).await
}

/// Removes a backend and ends its connections, until the file is read again
#[utoipa::path(
    delete,
    path = "/v1/backends/{service}/{name}",
    params(("service" = String, Path, description = "Service"), ("name" = String, Path, description = "Backend")),
    responses((status = 200, description = "What was removed", body = Vec<api::Backend>), Failure)
)]
async fn remove_backend(
    State(shared): State<Arc<Shared>>,
    Segment((service, name)): Segment<(String, String)>,
) -> Answer<Vec<api::Backend>> {
    let what = (service.clone(), name.clone());
    let found = blocking(Arc::clone(&shared), move |shared| read_backend(shared, &what.0, &what.1)).await?;
    reload::amend(&shared, |said, base| {
        said.remove(&service, &name, &base.file);
        true
    })
    .await?;
    log::info!("{service}/{name}: removed by the operator");
    Ok(Json(found))
}

fn find_service<'c>(config: &'c Config, name: &str) -> Result<&'c config::Service, Failure> {
    config.services.iter().find(|service| service.name == name).ok_or_else(|| {
        not_found(format!("no service {name}; `dispatcherctl services` lists those there are"))
    })
}

fn find_backend<'c>(
    config: &'c Config,
    service: &str,
    name: &str,
) -> Result<(&'c config::Service, &'c config::Backend), Failure> {
    let service = find_service(config, service)?;
    let backend = service.backends.iter().find(|backend| backend.name == name).ok_or_else(|| {
        let service = &service.name;
        not_found(format!("service {service} has no backend {name}; `dispatcherctl backends` lists them"))
    })?;
    Ok((service, backend))
}

/// What is known of the backends' session tickets
#[utoipa::path(
    get,
    path = "/v1/identities",
    responses((status = 200, description = "One for each backend and server name", body = Vec<api::Identity>), Failure)
)]
async fn identities(State(shared): State<Arc<Shared>>) -> Answer<Vec<api::Identity>> {
    reading(shared, |shared| Ok(shared.discovery.shown(&shared.config()))).await
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct SessionQuery {
    /// Only sessions of this service.
    service: Option<String>,
    /// Only sessions of backends with this name.
    backend: Option<String>,
    /// Stop after so many.
    #[param(format = "uint32", maximum = 4294967295_u32)]
    limit: Option<u32>,
}

/// The mapping table
#[utoipa::path(
    get,
    path = "/v1/sessions",
    params(SessionQuery),
    responses((status = 200, description = "Sessions that have not expired", body = Vec<api::Session>), Failure)
)]
async fn sessions(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<SessionQuery>,
) -> Result<Response, Failure> {
    let config = shared.config();
    if let Some(service) = &query.service {
        find_service(&config, service)?;
    }
    let mut backends = config.services.iter().flat_map(|service| &service.backends);
    if let Some(name) = &query.backend
        && !backends.any(|one| one.name == *name)
    {
        return Err(not_found(format!(
            "no service has a backend {name}; `dispatcherctl backends` lists them"
        )));
    }
    Ok(streamed(move |send| {
        let names = Names::new(&shared);
        let now = monotonic_seconds();
        let fits = |session: &api::Session| {
            query.service.as_ref().is_none_or(|service| session.service == *service)
                && query.backend.as_ref().is_none_or(|backend| session.backend == *backend)
        };
        let table = shared.dataplane.sessions();
        let living = table.iter().filter(|(_, session)| !session.expired(now));
        let found = living.map(|(key, session)| shown(&names, &key, &session, now)).filter(fits);
        send_list(found.take(query.limit.map_or(usize::MAX, |limit| limit as usize)), send);
    }))
}

/// Bytes of a list that are sent at a time.
const CHUNK: usize = 1 << 16;

/// An answer that is sent while `write` makes it, where that blocks nobody.
fn streamed(write: impl FnOnce(&mpsc::Sender<Bytes>) + Send + 'static) -> Response {
    let (send, receive) = mpsc::channel(4);
    tokio::task::spawn_blocking(move || write(&send));
    let chunks = stream::unfold(receive, |mut receive| async {
        let chunk = receive.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(chunk), receive))
    });
    ([(CONTENT_TYPE, "application/json")], Answered::from_stream(chunks)).into_response()
}

/// Sends an array in JSON, until whoever asked is gone: of a million elements there is never a copy.
fn send_list(list: impl Iterator<Item = impl Serialize>, send: &mpsc::Sender<Bytes>) {
    let mut text = vec![b'['];
    for (number, one) in list.enumerate() {
        if number > 0 {
            text.push(b',');
        }
        if let Err(error) = serde_json::to_writer(&mut text, &one) {
            log::warn!("control: {error}");
            return;
        }
        if text.len() >= CHUNK && send.blocking_send(std::mem::take(&mut text).into()).is_err() {
            return;
        }
    }
    text.push(b']');
    // Nobody may be there any more.
    drop(send.blocking_send(text.into()));
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OneQuery {
    /// Of this service only.
    service: Option<String>,
}

/// Kinds of identifiers, as the API calls them.
pub(crate) const KINDS: [(u8, &str); 7] = [
    (KIND_TLS_SESSION_ID, "tls-session-id"),
    (KIND_TICKET_NAME, "tls-ticket-key"),
    (KIND_TICKET, "tls-ticket"),
    (KIND_COOKIE, "http-cookie"),
    (KIND_CLIENT, "client-address"),
    (KIND_QUIC_CID, "quic-cid"),
    (KIND_QUIC_SERVER, "quic-server-id"),
];

/// Every kind.
fn all_kinds() -> Vec<u8> {
    KINDS.iter().map(|(kind, _)| *kind).collect()
}

/// The kind of a name.
fn kind(name: &str) -> Result<u8, Failure> {
    KINDS.iter().find(|(_, one)| *one == name).map(|(kind, _)| *kind).ok_or_else(|| {
        let names: Vec<&str> = KINDS.iter().map(|(_, name)| *name).collect();
        bad(format!("{name} is no kind of identifier; use {}", names.join(", ")))
    })
}

/// The name of a kind.
fn kind_name(kind: u8) -> String {
    let name = KINDS.iter().find(|(one, _)| *one == kind);
    name.map_or_else(|| format!("kind-{kind}"), |(_, name)| (*name).to_owned())
}

/// The keys that an identifier may have: one a service and kind.
fn keys(shared: &Shared, id: &str, service: Option<&str>, kinds: &[u8]) -> Result<Vec<SessionKey>, Failure> {
    let bytes = api::from_hex(id)
        .ok_or_else(|| bad(format!("{id} is not hexadecimal: two digits 0-9 or a-f for each byte")))?;
    let config = shared.config();
    let services = match service {
        Some(name) => vec![find_service(&config, name)?],
        None => config.services.iter().collect(),
    };
    let key = |service: &config::Service, kind| {
        SessionKey::new(service.id, kind, &bytes).ok_or_else(|| {
            bad(format!("{id} has {}; identifiers have 1 to 32", counted(bytes.len(), "byte")))
        })
    };
    services.iter().flat_map(|service| kinds.iter().map(|kind| key(service, *kind))).collect()
}

/// The sessions of an identifier
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The identifier, hexadecimal", pattern = "^([0-9a-fA-F]{2}){1,32}$"), OneQuery),
    responses((status = 200, description = "One for each service and kind that knows it", body = Vec<api::Session>), Failure)
)]
async fn session(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<String>,
    Query(query): Query<OneQuery>,
) -> Answer<Vec<api::Session>> {
    reading(shared, move |shared| {
        let names = Names::new(shared);
        let now = monotonic_seconds();
        let mut found = Vec::new();
        for key in keys(shared, &id, query.service.as_deref(), &all_kinds())? {
            let living = shared.dataplane.sessions().all(&key)?.filter(|one| !one.expired(now));
            found.extend(living.map(|session| shown(&names, &key, &session, now)));
        }
        if found.is_empty() { Err(not_found(format!("no session {id}"))) } else { Ok(found) }
    })
    .await
}

/// Says why a service would never look for a key, if so.
fn looked_for(service: &config::Service, key: &SessionKey) -> Result<(), Failure> {
    let called = |kind| KINDS.iter().find(|(one, _)| *one == kind).map_or("?", |(_, name)| name);
    let kinds: Vec<u8> = service.affinity.iter().flat_map(|one| one.kinds().iter().copied()).collect();
    let name = called(key.kind);
    if !kinds.contains(&key.kind) {
        let kinds: Vec<&str> = kinds.iter().map(|kind| called(*kind)).collect();
        return Err(conflict(format!(
            "service {} does not look for a {name}, so a pin would do nothing; by its affinity it looks for: {}",
            service.name,
            if kinds.is_empty() { "nothing".to_owned() } else { kinds.join(", ") }
        )));
    }
    let lengths: &[u8] = match key.kind {
        KIND_COOKIE => &[COOKIE_LEN],
        KIND_CLIENT => &[16],
        KIND_TICKET => &[TICKET_HEAD as u8],
        KIND_TICKET_NAME => &[16, 4],
        _ => return Ok(()),
    };
    if !lengths.contains(&key.len) {
        let lengths: Vec<String> = lengths.iter().map(u8::to_string).collect();
        return Err(conflict(format!(
            "{} has {} bytes, a {name} has {}; `dispatcherctl sessions list` shows some",
            api::to_hex(key.id()),
            key.len,
            lengths.join(" or ")
        )));
    }
    Ok(())
}

/// Maps an identifier to a backend
#[utoipa::path(
    put,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The identifier, hexadecimal", pattern = "^([0-9a-fA-F]{2}){1,32}$")),
    request_body = api::Pin,
    responses((status = 200, description = "The session", body = Vec<api::Session>), Failure)
)]
async fn pin(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<String>,
    Body(pin): Body<api::Pin>,
) -> Answer<Vec<api::Session>> {
    reading(shared, move |shared| {
        let config = shared.config();
        let (service, backend) = find_backend(&config, &pin.service, &pin.backend)?;
        let now = monotonic_seconds();
        let mut found = Vec::new();
        let kind = pin.kind.as_deref().map_or(Ok(KIND_TLS_SESSION_ID), kind)?;
        for key in keys(shared, &id, Some(&pin.service), &[kind])? {
            looked_for(service, &key)?;
            let old = shared
                .dataplane
                .sessions()
                .get(&key)?
                .unwrap_or(Session { created: now, ..Session::default() });
            let backends = Session::of(backend.id).backends;
            let session = Session { backends, state: STATE_PINNED, used: now, expires: 0, ..old };
            shared.dataplane.sessions().insert(key, session)?;
            found.push(shown(&Names::new(shared), &key, &session, now));
        }
        Ok(found)
    })
    .await
}

/// Forgets an identifier
#[utoipa::path(
    delete,
    path = "/v1/sessions/{id}",
    params(("id" = String, Path, description = "The identifier, hexadecimal", pattern = "^([0-9a-fA-F]{2}){1,32}$"), OneQuery),
    responses((status = 200, description = "What was removed", body = Vec<api::Session>), Failure)
)]
async fn remove(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<String>,
    Query(query): Query<OneQuery>,
) -> Answer<Vec<api::Session>> {
    reading(shared, move |shared| {
        let names = Names::new(shared);
        let now = monotonic_seconds();
        let mut removed = Vec::new();
        for key in keys(shared, &id, query.service.as_deref(), &all_kinds())? {
            let session = shared.dataplane.sessions().get(&key)?;
            if session.is_some_and(|session| session.state == STATE_CONFIGURED) {
                return Err(bad(format!(
                    "{id} is a server ID that the configuration gives; take it out of quic_server_id there, and reload"
                )));
            }
            if let Some(session) = session
                && shared.dataplane.sessions().remove(&key)?
            {
                removed.push(shown(&names, &key, &session, now));
            }
        }
        if removed.is_empty() { Err(not_found(format!("no session {id}"))) } else { Ok(removed) }
    })
    .await
}

/// Names of ids and indexes.
struct Names {
    config: Arc<Config>,
    /// Where a service and a backend of it stand in the configuration, by backend id.
    backends: HashMap<u32, (usize, usize)>,
    /// Backend id by index.
    ids: HashMap<u32, u32>,
    /// Backend ids of the tunnels that there are.
    tunnels: HashMap<u32, u32>,
    /// Ids of classes by their numbers in flows.
    classes: Vec<u16>,
}

impl Names {
    fn new(shared: &Shared) -> Self {
        let state = shared.state();
        let config = shared.config();
        let numbered = config.services.iter().enumerate().flat_map(|(at, service)| {
            service.backends.iter().enumerate().map(move |(n, backend)| (backend.id, (at, n)))
        });
        let backends = numbered.collect();
        let ids = state.actual.backend_indexes().map(|(id, index)| (index, id)).collect();
        let tunnels = shared.terminator.tunnels.list().iter().map(|one| (one.id, one.backend)).collect();
        let classes = shared.dataplane.class_ids();
        let classes = classes.map_err(|error| log::warn!("{error}")).unwrap_or_default().to_vec();
        Self { config, backends, ids, tunnels, classes }
    }

    fn service(&self, id: u32) -> String {
        let service = self.config.services.iter().find(|service| service.id == id);
        service.map_or_else(|| format!("{id:08x}"), |service| service.name.clone())
    }

    fn backend(&self, id: u32) -> String {
        let found = self
            .backends
            .get(&id)
            .and_then(|(service, backend)| self.config.services.get(*service)?.backends.get(*backend));
        found.map_or_else(|| format!("{id:08x}"), |backend| backend.name.clone())
    }

    /// The class of an id, 0 for none. One that the configuration has no more is shown by its id, as `#1a2b`.
    fn class(&self, id: u16) -> Option<String> {
        let found = self.config.classes.iter().find(|class| named_class(&class.name) == id);
        (id != 0).then(|| found.map_or_else(|| format!("#{id:04x}"), |class| class.name.clone()))
    }

    fn backend_at(&self, index: u32) -> String {
        self.ids.get(&index).map_or_else(|| format!("#{index}"), |id| self.backend(*id))
    }

    fn service_of(&self, vip: SocketAddr, protocol: Protocol) -> String {
        let mut services = self.config.services.iter();
        let service = services.find(|one| one.protocol == protocol && one.vips.contains(&vip));
        service.map(|service| service.name.clone()).unwrap_or_default()
    }
}

/// States of sessions, as the API calls them.
pub(crate) const STATES: [(u8, &str); 5] = [
    (STATE_PROVISIONAL, "provisional"),
    (STATE_CONFIRMED, "confirmed"),
    (STATE_PINNED, "pinned"),
    (STATE_DISCOVERED, "discovered"),
    (STATE_CONFIGURED, "configured"),
];

fn shown(names: &Names, key: &SessionKey, session: &Session, now: u32) -> api::Session {
    api::Session {
        id: api::to_hex(key.id()),
        kind: kind_name(key.kind),
        service: names.service(key.service),
        backend: session.ids().map(|id| names.backend(id)).collect::<Vec<_>>().join(","),
        // One that is named may be of a daemon before this one.
        tunnel: if names.tunnels.get(&session.tunnel).is_some_and(|backend| session.has(*backend)) {
            session.tunnel
        } else {
            0
        },
        class: names.class(session.class),
        state: STATES
            .iter()
            .find(|(state, _)| *state == session.state)
            .map_or_else(|| format!("state-{}", session.state), |(_, name)| (*name).to_owned()),
        hits: session.hits,
        age_seconds: now.saturating_sub(session.created),
        idle_seconds: now.saturating_sub(session.used),
        expires_in_seconds: (session.expires != 0).then(|| session.expires.saturating_sub(now)),
    }
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Limit {
    /// Stop after so many.
    #[param(format = "uint32", maximum = 4294967295_u32)]
    limit: Option<u32>,
}

/// Connections
#[utoipa::path(
    get,
    path = "/v1/flows",
    params(Limit),
    responses((status = 200, description = "Each connection", body = Vec<api::Flow>), Failure)
)]
async fn flows(State(shared): State<Arc<Shared>>, Query(query): Query<Limit>) -> Answer<Vec<api::Flow>> {
    reading(shared, move |shared| {
        let names = Names::new(shared);
        let now = monotonic_seconds();
        let flows = shared.dataplane.flows();
        Ok(flows
            .iter()
            .filter(|(_, flow)| flow.flags & FLAG_TO_BACKEND != 0)
            .map(|(key, flow)| shown_flow(&names, &key, &flow, now))
            .take(query.limit.map_or(usize::MAX, |limit| limit as usize))
            .collect())
    })
    .await
}

fn shown_flow(names: &Names, key: &FlowKey, flow: &Flow, now: u32) -> api::Flow {
    let (client, server) = ports_of(key.ports);
    let vip = SocketAddr::new(IpAddr::from(key.dst), server);
    let protocol = if key.proto == 17 { Protocol::Udp } else { Protocol::Tcp };
    api::Flow {
        client: SocketAddr::new(IpAddr::from(key.src), client),
        vip,
        protocol,
        service: names.service_of(vip, protocol),
        backend: names.backend_at(flow.backend),
        state: flow_state(flow.flags).to_owned(),
        age_seconds: now.saturating_sub(flow.created),
        secure: flow.marks & MARK_SECURE != 0,
        hit: flow.marks & MARK_HIT != 0,
        class: names
            .classes
            .get(flow.class() as usize)
            .and_then(|id| names.class(*id))
            .unwrap_or_else(|| config::DEFAULT_CLASS.to_owned()),
    }
}

fn flow_state(flags: u16) -> &'static str {
    if is_closed(flags) {
        "closed"
    } else if flags & FLAG_SYN_SENT != 0 {
        "syn-sent"
    } else if flags & (FLAG_FIN | FLAG_FIN_PEER) != 0 {
        "closing"
    } else {
        "established"
    }
}

/// Packets by reason
#[utoipa::path(
    get,
    path = "/v1/counters",
    responses((status = 200, description = "One for each reason", body = api::Counters), Failure)
)]
async fn counters(State(shared): State<Arc<Shared>>) -> Answer<api::Counters> {
    reading(shared, read_counters).await
}

fn read_counters(shared: &Shared) -> Result<api::Counters, Failure> {
    Ok(api::Counters { reasons: shared.dataplane.reasons()?.into_iter().map(shown_counter).collect() })
}

fn shown_counter((reason, packets): (Reason, u64)) -> api::Counter {
    api::Counter {
        number: reason as u32,
        name: reason.name().to_owned(),
        kind: match reason.kind() {
            Kind::Forward => "forward",
            Kind::Pass => "pass",
            Kind::Consume => "consume",
            Kind::Drop => "drop",
        }
        .to_owned(),
        packets,
        description: reason.description().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dispatcher_common::flow::FLAG_RST;

    /// All `$ref`s in a document.
    fn references(value: &Value, found: &mut Vec<String>) {
        if let Some(map) = value.as_object() {
            found.extend(map.get("$ref").and_then(|to| to.as_str()).map(str::to_owned));
            map.values().for_each(|value| references(value, found));
        }
        value.as_array().into_iter().flatten().for_each(|value| references(value, found));
    }

    #[test]
    fn the_description_is_whole() {
        let document = serde_json::to_value(openapi()).expect("json");
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            let pointer = reference.strip_prefix('#').expect("a local reference");
            assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
        }
        let paths = document["paths"].as_object().expect("paths");
        assert!(paths.contains_key("/v1/backends/{service}/{name}"), "{paths:?}");
        for (path, methods) in paths {
            for (method, operation) in methods.as_object().expect("methods") {
                let what = format!("{method} {path}");
                assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{what}");
                assert!(operation["responses"]["200"]["content"].is_object(), "{what}");
                let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
                let in_path = parameters.iter().filter(|one| one["in"] == "path").count();
                assert_eq!(in_path, path.matches('{').count(), "{what}");
                let body = ["put", "patch"].contains(&method.as_str());
                assert_eq!(body, operation["requestBody"].is_object(), "{what}");
            }
        }
    }

    #[test]
    fn the_kinds_of_a_pin_are_described() {
        let document = serde_json::to_value(openapi()).expect("json");
        let pattern = document.pointer("/components/schemas/Pin/properties/kind/pattern").expect("a pattern");
        let names = KINDS.map(|(_, name)| name).join("|");
        let sorted = |text: &str| {
            let mut names: Vec<String> =
                text.trim_matches(['^', '(', ')', '$']).split('|').map(str::to_owned).collect();
            names.sort();
            names
        };
        assert_eq!(sorted(pattern.as_str().expect("a text")), sorted(&names));
    }

    #[test]
    fn states_of_flows() {
        for (flags, state) in [
            (FLAG_TO_BACKEND, "established"),
            (FLAG_TO_BACKEND | FLAG_SYN_SENT, "syn-sent"),
            (FLAG_FIN, "closing"),
            (FLAG_FIN | FLAG_FIN_PEER, "closed"),
            (FLAG_RST, "closed"),
        ] {
            assert_eq!(flow_state(flags), state);
        }
    }

    #[test]
    fn a_socket_is_private_and_goes_with_its_owner() {
        let folder = std::env::temp_dir().join(format!("dispatcher-control-{}", std::process::id()));
        let path = folder.join("control.sock");
        let far = folder.join("no/such/control.sock");
        assert!(matches!(Socket::bind(&far, None), Err(Error::NoFolder(_))));
        let socket = Socket::bind(&path, None).expect("binds");
        let mode = fs::metadata(&path).expect("is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        assert!(matches!(Socket::bind(&path, None), Err(Error::InUse(_))));
        drop(socket);
        assert!(!path.exists());
        // What a crashed daemon left is in nobody's way.
        drop(StdListener::bind(&path).expect("binds"));
        drop(Socket::bind(&path, None).expect("takes over"));
        // What is no socket is.
        fs::write(&path, "precious").expect("writes");
        assert!(matches!(Socket::bind(&path, None), Err(Error::NoSocket(_))));
        assert_eq!(fs::read_to_string(&path).expect("reads"), "precious");
        fs::remove_dir_all(folder).expect("removes");
    }

    #[test]
    fn a_group_must_exist() {
        assert_eq!(group_id("root").expect("is there"), 0);
        assert!(matches!(group_id("no-such-group"), Err(Error::NoGroup(_))));
    }
}
