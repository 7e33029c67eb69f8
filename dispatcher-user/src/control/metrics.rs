//! Metrics, in the text format of OpenMetrics. Names are stable; docs/operations.md has a table of them.

use std::{fmt, io, net::TcpListener as StdListener, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use dispatcher_common::service::{BackendTimes, Histogram};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};

use super::{Failure, blocking, qos::read_shares, read_backends, read_counters, status_of};
use crate::{
    api,
    state::Shared,
    terminate::counts::{Counted, Refusal},
    tunnels::Status,
};

/// What is sent.
const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Connections at a time over TCP; more wait.
const SCRAPERS: usize = 8;
/// A connection over TCP ends after this time, in use or not.
const PATIENCE: Duration = Duration::from_secs(10);

/// Conditions of a backend, each a series.
const STATES: [&str; 5] = ["up", "down", "drain", "disabled", "offline"];

/// What health checks say of an address.
#[derive(Debug)]
struct Checked {
    service: String,
    backend: String,
    address: String,
    healthy: bool,
}

/// All values, read at one time.
#[derive(Debug)]
struct Snapshot {
    status: api::Status,
    counters: api::Counters,
    backends: Vec<api::Backend>,
    /// Of the backends, in their order.
    times: Vec<BackendTimes>,
    health: Vec<Checked>,
    /// At the last sweep.
    sessions: [u64; 2],
    /// Of services that the daemon serves itself.
    served: Vec<(String, Counted)>,
    /// Service, file and end of each certificate.
    certificates: Vec<(String, PathBuf, i64)>,
    tunnels: Vec<Status>,
    /// Of classes, with the times that they waited.
    shares: Vec<(api::QosShare, Histogram)>,
}

impl Snapshot {
    fn read(shared: &Shared) -> Result<Self, Failure> {
        let backends = read_backends(shared, None)?;
        Ok(Self {
            status: status_of(shared, &backends),
            counters: read_counters(shared)?,
            times: backends
                .iter()
                .map(|one| shared.dataplane.backend_times(one.index))
                .collect::<Result<_, _>>()?,
            backends,
            health: checked(shared),
            sessions: shared.counts.sessions(),
            served: shared.terminator.counted(),
            certificates: shared.terminator.certificates(),
            tunnels: shared.terminator.tunnels.backends(),
            shares: read_shares(shared)?,
        })
    }

    fn text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("dispatcher");
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }

    fn encode_packets(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Packets by the one reason that each ends in";
        let mut family = encoder.encode_descriptor("packets", help, None, MetricType::Counter)?;
        for one in &self.counters.reasons {
            let labels = [("reason", one.name.as_str()), ("kind", one.kind.as_str())];
            ConstCounter::new(one.packets).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn encode_backends(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Read<T> = fn(&api::Backend) -> T;
        let counters: [(&str, &str, Read<u64>); 8] = [
            ("connections", "Connections bound", |one| one.connections),
            ("hits", "Connections bound by a session known before", |one| one.hits),
            ("misses", "Connections with an identifier that was not known", |one| one.misses),
            ("fresh", "Secure connections without an identifier", |one| one.fresh),
            ("nonsecure", "Connections that are not secure", |one| one.nonsecure),
            ("established", "Connections that the backend accepted", |one| one.established),
            ("refused", "Connections that the backend refused or did not answer", |one| one.refused),
            ("learned", "Sessions learned from the backend", |one| one.learned),
        ];
        for (name, help, read) in counters {
            let name = format!("backend_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for one in &self.backends {
                ConstCounter::new(read(one)).encode(family.encode_family(&labels(one))?)?;
            }
        }
        let gauges: [(&str, &str, Read<Option<f64>>); 2] = [
            ("weight", "Configured weight", |one| Some(f64::from(one.weight))),
            ("share", "Share of the load-balancing tables, 0 to 1", |one| one.share),
        ];
        for (name, help, read) in gauges {
            let name = format!("backend_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
            for one in &self.backends {
                let Some(value) = read(one) else { continue };
                ConstGauge::new(value).encode(family.encode_family(&labels(one))?)?;
            }
        }
        type Part = fn(&BackendTimes) -> &Histogram;
        let histograms: [(&str, &str, Part); 2] = [
            ("connect", "Time that the backend took to accept a connection", |times| &times.connect),
            ("response", "Time that the backend took to answer a hello or request", |times| &times.response),
        ];
        for (name, help, part) in histograms {
            let name = format!("backend_{name}_seconds");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Histogram)?;
            for (one, times) in self.backends.iter().zip(&self.times) {
                encode_times(&mut family, &labels(one), part(times))?;
            }
        }
        let help = "1 for the state that the backend is in, 0 for the others";
        let mut family = encoder.encode_descriptor("backend_state", help, None, MetricType::Gauge)?;
        for one in &self.backends {
            let other = Some(one.state.as_str()).filter(|state| !STATES.contains(state));
            for state in STATES.into_iter().chain(other) {
                let [service, backend] = labels(one);
                let labels = [service, backend, ("state", state)];
                ConstGauge::new(u32::from(one.state == state)).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "1 for an address that passes its health checks, 0 for one that does not";
        let mut family = encoder.encode_descriptor("backend_healthy", help, None, MetricType::Gauge)?;
        for Checked { service, backend, address, healthy } in &self.health {
            let labels = [("service", service), ("backend", backend), ("address", address)];
            ConstGauge::new(u32::from(*healthy)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn encode_served(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Read = fn(&Counted) -> u64;
        let counters: [(&str, &str, Read); 2] = [
            ("clients", "Connections of clients that the daemon accepted", |one| one.accepted),
            ("requests_retried", "Requests offered to another tunnel", |one| one.retried),
        ];
        for (name, help, read) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (service, counted) in &self.served {
                let labels = [("service", service.as_str())];
                ConstCounter::new(read(counted)).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Connections of clients that are open";
        let mut family = encoder.encode_descriptor("clients_open", help, None, MetricType::Gauge)?;
        for (service, counted) in &self.served {
            let labels = [("service", service.as_str())];
            ConstGauge::new(counted.open as f64).encode(family.encode_family(&labels)?)?;
        }
        let help = "When a certificate that clients are shown ends, seconds since 1970";
        let name = "certificate_not_after_timestamp_seconds";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (service, file, end) in &self.certificates {
            let file = file.to_string_lossy();
            let labels = [("service", service.as_str()), ("file", &*file)];
            ConstGauge::new(*end as f64).encode(family.encode_family(&labels)?)?;
        }
        let help = "Connections of clients that the daemon ended, by the reason";
        let mut family = encoder.encode_descriptor("clients_refused", help, None, MetricType::Counter)?;
        for (service, counted) in &self.served {
            for ((_, reason), count) in Refusal::ALL.into_iter().zip(counted.refused) {
                let labels = [("service", service.as_str()), ("reason", reason)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Requests that were answered, by their way to the backend and the class of the answer";
        let mut family = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
        for (service, counted) in &self.served {
            for (way, classes) in ["clear", "tunnel"].into_iter().zip(counted.requests) {
                for (class, count) in ["1xx", "2xx", "3xx", "4xx", "5xx"].into_iter().zip(classes) {
                    let labels = [("service", service.as_str()), ("way", way), ("code", class)];
                    ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        let help = "Time from a request to the head of its answer";
        let mut family = encoder.encode_descriptor("request_seconds", help, None, MetricType::Histogram)?;
        for (service, counted) in &self.served {
            encode_times(&mut family, &[("service", service.as_str())], &counted.times)?;
        }
        Ok(())
    }

    fn encode_tunnels(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let of = |one: &Status| {
            let (service, backend) = one.name.split_once('/').unwrap_or_default();
            [("service", service.to_owned()), ("backend", backend.to_owned())]
        };
        type Read = fn(&Status) -> u64;
        let counters: [(&str, &str, Read); 2] = [
            ("tunnel_handshakes", "TLS handshakes with backends", |one| one.handshakes),
            ("tunnel_failures", "Attempts that gave no tunnel", |one| one.failed),
        ];
        for (name, help, read) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for one in &self.tunnels {
                ConstCounter::new(read(one)).encode(family.encode_family(&of(one))?)?;
            }
        }
        let gauges: [(&str, &str, Read); 2] = [
            ("tunnels", "Established tunnels that take requests", |one| one.established as u64),
            ("tunnels_failing", "1 while attempts fail", |one| u64::from(one.error.is_some())),
        ];
        for (name, help, read) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for one in &self.tunnels {
                ConstGauge::new(read(one) as f64).encode(family.encode_family(&of(one))?)?;
            }
        }
        Ok(())
    }

    fn encode_classes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let of = |one: &api::QosShare| {
            let (service, backend, class) = (one.service.clone(), one.backend.clone(), one.class.clone());
            [("service", service), ("backend", backend), ("class", class)]
        };
        type Read<T> = fn(&api::QosShare) -> T;
        let counters: [(&str, &str, Read<u64>); 10] = [
            ("admitted", "Requests and held hellos that were let through", |one| one.admitted),
            ("borrowed", "Of these, beyond the share of their class", |one| one.borrowed),
            ("shed", "Requests and hellos refused because too many waited", |one| one.shed),
            ("late", "Requests and hellos refused because they waited too long", |one| one.late),
            ("cancelled", "Requests whose client went away while they waited", |one| one.cancelled),
            ("passed_bytes", "Bytes of frames within the backend's bandwidth", |one| one.bytes),
            ("borrowed_bytes", "Of these, beyond the share of their class", |one| one.borrowed_bytes),
            ("dropped_bytes", "Bytes of frames beyond the backend's bandwidth", |one| one.dropped_bytes),
            ("connections", "Connections within the backend's rate", |one| one.connections),
            ("connections_over", "Connections beyond the backend's rate", |one| one.connections_over),
        ];
        for (name, help, read) in counters {
            let name = format!("class_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for (one, _) in &self.shares {
                ConstCounter::new(read(one)).encode(family.encode_family(&of(one))?)?;
            }
        }
        let gauges: [(&str, &str, Read<f64>); 4] = [
            ("weight_share", "Weight by the sum of all weights", |one| one.weight_percent / 100.0),
            ("share", "Part of what the backend was given last", |one| {
                one.share_percent.unwrap_or(0.0) / 100.0
            }),
            ("queued", "Requests and hellos that wait", |one| one.queued as f64),
            ("in_flight", "Requests under way, or connections where there is max_connections", |one| {
                one.in_flight as f64
            }),
        ];
        for (name, help, read) in gauges {
            let name = format!("class_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
            for (one, _) in &self.shares {
                ConstGauge::new(read(one)).encode(family.encode_family(&of(one))?)?;
            }
        }
        let help = "Time that requests and hellos waited";
        let mut family =
            encoder.encode_descriptor("class_wait_seconds", help, None, MetricType::Histogram)?;
        for (one, times) in &self.shares {
            encode_times(&mut family, &of(one), times)?;
        }
        Ok(())
    }

    fn encode_daemon(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let api::Events { miss, held, released, refused, learned, rejected, swept } = self.status.events;
        let help = "Events of the data path that the daemon has handled";
        let mut family = encoder.encode_descriptor("events", help, None, MetricType::Counter)?;
        for (event, count) in [
            ("miss", miss),
            ("held", held),
            ("released", released),
            ("refused", refused),
            ("learned", learned),
            ("rejected", rejected),
            ("swept", swept),
        ] {
            ConstCounter::new(count).encode(family.encode_family(&[("event", event)])?)?;
        }
        let heartbeat = self.status.heartbeat_age_ms as f64 / 1000.0;
        let [known, provisional] = self.sessions;
        for (name, help, value) in [
            ("heartbeat_age_seconds", "Age of the daemon's sign of life", heartbeat),
            ("uptime_seconds", "Time since the daemon's start", self.status.uptime_seconds as f64),
            ("maps_bytes", "Estimate of the memory of the maps", self.status.memory_bytes as f64),
            ("sessions", "Entries of the mapping table when it was last swept", known as f64),
            (
                "provisional_sessions",
                "Entries that only clients stand for when the table was last swept",
                provisional as f64,
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let mut family =
            encoder.encode_descriptor("interface", "Where it is attached", None, MetricType::Info)?;
        for one in &self.status.interfaces {
            let mode = one.mode.to_string();
            family.encode_info(&[("interface", one.name.as_str()), ("mode", mode.as_str())])?;
        }
        let mut family =
            encoder.encode_descriptor("build", "Version of daemon and maps", None, MetricType::Info)?;
        let abi = self.status.abi.to_string();
        family.encode_info(&[("version", self.status.version.as_str()), ("abi", abi.as_str())])
    }
}

/// Addresses that are checked, those of backends that take nothing aside.
fn checked(shared: &Shared) -> Vec<Checked> {
    let (state, config) = (shared.state(), shared.config());
    let mut found = Vec::new();
    for service in config.services.iter().filter(|service| service.health.is_some()) {
        for backend in &service.backends {
            if !backend.state.takes() {
                continue;
            }
            found.extend(backend.addresses().map(|address| Checked {
                service: service.name.clone(),
                backend: backend.name.clone(),
                address: address.to_string(),
                healthy: !state.health.contains_key(&(backend.id, address.is_ipv4())),
            }));
        }
    }
    found
}

fn encode_times(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    times: &Histogram,
) -> fmt::Result {
    let end = |n| Histogram::end(n).map_or(f64::INFINITY, |ns| ns as f64 / 1e9);
    let buckets: Vec<(f64, u64)> =
        times.buckets.iter().enumerate().map(|(n, count)| (end(n), *count)).collect();
    let (sum, count) = (times.sum as f64 / 1e9, times.count());
    family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

fn labels(backend: &api::Backend) -> [(&str, &str); 2] {
    [("service", backend.service.as_str()), ("backend", backend.name.as_str())]
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_packets(&mut encoder)?;
        self.encode_backends(&mut encoder)?;
        self.encode_served(&mut encoder)?;
        self.encode_tunnels(&mut encoder)?;
        self.encode_classes(&mut encoder)?;
        self.encode_daemon(&mut encoder)
    }
}

/// Metrics in the text format of OpenMetrics
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, description = "All metrics", body = String, content_type = TYPE), Failure)
)]
pub(super) async fn metrics(State(shared): State<Arc<Shared>>) -> Result<impl IntoResponse, Failure> {
    let snapshot = blocking(shared, Snapshot::read).await?;
    let text = snapshot
        .text()
        .map_err(|error| Failure(StatusCode::INTERNAL_SERVER_ERROR, format!("writing metrics: {error}")))?;
    Ok(([(CONTENT_TYPE, TYPE)], text))
}

/// Serves metrics over TCP, and nothing else, until the task is dropped.
pub(crate) async fn serve(shared: Arc<Shared>, listener: StdListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let router = Router::new()
        .route("/metrics", get(metrics))
        .fallback(|| async { Failure(StatusCode::NOT_FOUND, "only /metrics is here".to_owned()) })
        .with_state(shared);
    let permits = Arc::new(Semaphore::new(SCRAPERS));
    loop {
        let permit = Arc::clone(&permits).acquire_owned().await.map_err(io::Error::other)?;
        match listener.accept().await {
            Ok((stream, _)) => {
                let service = TowerToHyperService::new(router.clone());
                tokio::spawn(async move {
                    let _permit = permit;
                    let answers = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                    if let Ok(Err(error)) = timeout(PATIENCE, answers).await {
                        log::debug!("metrics: {error}");
                    }
                });
            }
            Err(error) => {
                log::warn!("metrics: accepting: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
