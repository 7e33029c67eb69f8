//! A configuration as a file again, with everything filled in.

use std::net::SocketAddr;

use super::{
    ATTACH, Affinity, Backend, Class, Clear, Config, DEFAULT_CLASS, Health, HttpCheck, Interface, KEY_NAMES,
    KeyPair, Limits, MISSES, MODES, Mode, PROTOCOLS, PROXY, Queueing, Rule, SOURCES, STATES, Secure, Service,
    Source, Terminate, Tickets, Tunnels,
    health::CHECKS,
    qos::{OVER, bandwidth_text},
    raw::{self, OneOrMany, Spanned},
    terminate::{HTTP, VERSIONS},
};
use crate::{api, balancer::Balance, dataplane::Capacities};

/// The file that says what a configuration is, defaults included. Reading it gives the same configuration.
pub(crate) fn written(config: &Config) -> raw::File {
    // Named one by one, here and below, so that a new field is not forgotten.
    let Config { control, control_group, pin, state, metrics, interfaces, capacities, classes, services } =
        config;
    raw::File {
        control: text(control.to_string_lossy()),
        control_group: control_group.as_ref().and_then(text),
        pin: text(pin.as_ref().map_or("none".into(), |folder| folder.to_string_lossy())),
        state: text(state.as_ref().map_or("none".into(), |file| file.to_string_lossy())),
        metrics: metrics.and_then(text),
        metrics_public: metrics.filter(|at| !at.ip().is_loopback()).map(|_| true),
        interfaces: Vec::new(),
        attach: None,
        interface: interfaces.iter().map(interface).collect(),
        capacity: Some(capacity(*capacities)),
        class: classes.iter().map(class).collect(),
        service: services.iter().map(service).collect(),
    }
}

fn class(class: &Class) -> raw::Class {
    let Class { name, id: _, weight, priority, lend, borrow_limit, ceil, dscp } = class;
    raw::Class {
        name: name.clone().into(),
        weight: number(*weight),
        priority: number(*priority),
        lend: Some(*lend),
        borrow_limit: number(*borrow_limit),
        ceil: number(*ceil),
        dscp: dscp.and_then(number),
    }
}

fn rule(Rule { class, clients, server_name, cookie, header, path }: &Rule) -> raw::Classify {
    raw::Classify {
        class: class.clone().into(),
        clients: (!clients.is_empty()).then(|| list(clients)),
        server_name: server_name.as_ref().and_then(text),
        cookie: cookie.as_ref().and_then(|(name, value)| text(format!("{name}={value}"))),
        header: header.as_ref().and_then(|(name, value)| text(format!("{name}: {value}"))),
        path: path.as_ref().and_then(text),
    }
}

/// What there is a limit of.
fn limit(value: u32) -> raw::Number {
    (value > 0).then(|| number(value)).flatten()
}

fn own_limits(limits: &Limits) -> Option<raw::OwnLimits> {
    let Limits { bandwidth, connections_per_second, max_inflight, max_connections } = limits;
    (*limits != Limits::default()).then(|| raw::OwnLimits {
        bandwidth: (*bandwidth > 0).then(|| text(bandwidth_text(*bandwidth))).flatten(),
        connections_per_second: limit(*connections_per_second),
        max_inflight: limit(*max_inflight),
        max_connections: limit(*max_connections),
    })
}

/// With what waits, where something can.
fn limits(service: &Service) -> Option<raw::Limits> {
    let own = own_limits(&service.limits).unwrap_or_default();
    let Queueing { over, queue, queue_timeout, adaptive } = service.queueing;
    let said = service.limits != Limits::default() || service.queueing != Queueing::default();
    said.then(|| raw::Limits {
        bandwidth: own.bandwidth,
        connections_per_second: own.connections_per_second,
        max_inflight: own.max_inflight,
        max_connections: own.max_connections,
        over: service.limits_connections().then(|| chosen(&OVER, &over)).flatten(),
        queue: service.queues().then(|| number(queue)).flatten(),
        queue_timeout: service.limits_requests().then(|| duration(queue_timeout)).flatten(),
        adaptive: service.limits_requests().then(|| adaptive.into()),
    })
}

fn text(value: impl ToString) -> raw::Text {
    Some(value.to_string().into())
}

fn number(value: impl Into<i64>) -> raw::Number {
    Some(value.into().into())
}

/// The name of a value.
pub(super) fn chosen<T: PartialEq>(choices: &[(&str, T)], value: &T) -> raw::Text {
    choices.iter().find(|(_, one)| one == value).and_then(|(name, _)| text(name))
}

fn list(values: impl IntoIterator<Item = impl ToString>) -> Spanned<OneOrMany> {
    let mut values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    match values.pop() {
        Some(one) if values.is_empty() => OneOrMany::One(one),
        last => OneOrMany::Many(values.into_iter().chain(last).collect()),
    }
    .into()
}

/// "1h30m" and the like.
fn duration(seconds: u32) -> raw::Text {
    let mut rest = seconds;
    let mut written = String::new();
    for (unit, length) in [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)] {
        if rest >= length {
            written += &format!("{}{unit}", rest / length);
            rest %= length;
        }
    }
    (seconds > 0).then(|| written.into())
}

fn interface(Interface { name, attach }: &Interface) -> raw::Interface {
    raw::Interface { name: name.clone().into(), attach: chosen(&ATTACH, attach) }
}

fn capacity(capacities: Capacities) -> raw::Capacity {
    let Capacities {
        flows,
        sessions,
        provisional,
        frontends,
        backends,
        lb_table,
        sources,
        cookies,
        stash_slots,
    } = capacities;
    raw::Capacity {
        flows: number(flows),
        sessions: number(sessions),
        provisional: number(provisional),
        frontends: number(frontends),
        backends: number(backends),
        lb_table: number(lb_table),
        sources: number(sources),
        cookies: number(cookies),
        stash_slots: number(stash_slots),
    }
}

fn service(service: &Service) -> raw::Service {
    let Service {
        name,
        id: _,
        vips,
        protocol,
        mode,
        miss,
        source,
        proxy_protocol,
        balance,
        table_size,
        session_ttl,
        provisional_ttl,
        wscale,
        mss,
        timestamps,
        sack,
        affinity,
        tickets,
        ticket,
        health,
        slow_start,
        terminate,
        tunnels: way,
        max_connections,
        quic_lb,
        class,
        rules,
        limits: _,
        queueing: _,
        backends,
    } = service;
    // What is for the data path only must not stand there for others.
    let ours = !mode.is_local();
    let pool = match source {
        Source::Client => None,
        Source::Dispatcher { addresses, ports } => Some((addresses, ports)),
    };
    let lengths = (0..).zip(quic_lb).filter(|(_, length)| **length > 0);
    raw::Service {
        name: name.clone().into(),
        vip: list(vips),
        protocol: chosen(&PROTOCOLS, protocol),
        mode: chosen(&MODES, mode),
        miss: chosen(&MISSES, miss),
        source: ours.then(|| chosen(&SOURCES, &pool.is_some())).flatten(),
        source_addresses: pool.map(|(addresses, _)| list(addresses)),
        source_ports: pool.and_then(|(_, ports)| text(format!("{}-{}", ports.start(), ports.end()))),
        proxy_protocol: terminate.is_none().then(|| chosen(&PROXY, proxy_protocol)).flatten(),
        balance: chosen(&Balance::NAMES, balance),
        table_size: ours.then(|| number(*table_size)).flatten(),
        session_ttl: duration(*session_ttl),
        provisional_ttl: duration(*provisional_ttl),
        wscale: ours.then(|| number(*wscale)).flatten(),
        mss: ours.then(|| number(*mss)).flatten(),
        timestamps: ours.then_some(*timestamps),
        sack: ours.then_some(*sack),
        // An l4 service without one must not have the key.
        affinity: (*mode != Mode::L4 || !affinity.is_empty()).then(|| list(affinity)),
        terminate: terminate.as_ref().map(ending),
        clear: terminate.as_ref().and_then(|terminate| terminate.clear.as_ref()).map(clear),
        tunnels: way.as_ref().map(tunnels),
        max_connections: (!ours).then(|| number(*max_connections)).flatten(),
        class: (class != DEFAULT_CLASS).then(|| text(class)).flatten(),
        classify: rules.iter().map(rule).collect(),
        limits: limits(service),
        slow_start: duration(*slow_start),
        tickets: affinity.contains(&Affinity::TlsTicket).then(|| raw::Tickets {
            discovery: Some(tickets.is_some()),
            key_name: chosen(&KEY_NAMES, ticket),
            server_names: tickets.as_ref().and_then(names),
            interval: tickets.as_ref().and_then(|tickets| duration(tickets.interval)),
        }),
        health: health.as_ref().map(check),
        quic_lb: lengths
            .map(|(config, length)| raw::QuicLb {
                config_id: config.into(),
                server_id_length: i64::from(*length).into(),
            })
            .collect(),
        backend: backends.iter().map(backend).collect(),
    }
}

fn names(Tickets { server_names, interval: _ }: &Tickets) -> Option<Spanned<OneOrMany>> {
    (!server_names.is_empty()).then(|| list(server_names))
}

fn check(health: &Health) -> raw::Health {
    let Health { interval, timeout, rise, fall, tls, server_name, http } = health;
    let check = CHECKS.iter().find(|(_, kind)| *kind == (*tls, http.is_some()));
    let codes = |HttpCheck { path: _, host: _, expect }: &HttpCheck| {
        list(expect.iter().map(|codes| format!("{}-{}", codes.start(), codes.end())))
    };
    raw::Health {
        check: check.map_or("", |(name, _)| name).to_owned().into(),
        interval: duration(*interval),
        timeout: duration(*timeout),
        rise: number(*rise),
        fall: number(*fall),
        server_name: server_name.as_ref().and_then(text),
        path: http.as_ref().and_then(|http| text(&http.path)),
        host: http.as_ref().and_then(|http| http.host.as_ref().and_then(text)),
        expect: http.as_ref().map(codes),
    }
}

fn ending(terminate: &Terminate) -> raw::Terminate {
    let Terminate {
        certificates,
        assign_cookie,
        handshake_timeout,
        response_timeout,
        idle_timeout,
        access_log,
        clear: _,
    } = terminate;
    let pair = |KeyPair { certificate, key }: &KeyPair| raw::KeyPair {
        certificate: certificate.to_string_lossy().into_owned().into(),
        key: text(key.to_string_lossy()),
    };
    raw::Terminate {
        certificates: certificates.iter().map(pair).collect(),
        assign_cookie: Some(*assign_cookie),
        handshake_timeout: duration(*handshake_timeout),
        response_timeout: duration(*response_timeout),
        idle_timeout: duration(*idle_timeout),
        access_log: access_log.as_ref().and_then(|file| text(file.to_string_lossy())),
    }
}

fn clear(Clear { vips, port, secure }: &Clear) -> raw::Clear {
    let rule = |Secure { methods, paths, session }: &Secure| raw::Secure {
        methods: (!methods.is_empty()).then(|| list(methods)),
        paths: (!paths.is_empty()).then(|| list(paths)),
        session: Some(*session),
    };
    raw::Clear {
        vip: list(vips),
        port: Some(i64::from(*port).into()),
        secure: secure.iter().map(rule).collect(),
    }
}

fn tunnels(tunnels: &Tunnels) -> raw::Tunnels {
    let Tunnels { server_name, roots, client, only_http1, only_tls13, established, most, max_age, timeout } =
        tunnels;
    raw::Tunnels {
        server_name: server_name.as_ref().and_then(text),
        roots: roots.as_ref().and_then(|file| text(file.to_string_lossy())),
        certificate: client.as_ref().and_then(|pair| text(pair.certificate.to_string_lossy())),
        key: client.as_ref().and_then(|pair| text(pair.key.to_string_lossy())),
        http: chosen(&HTTP, only_http1),
        min_version: chosen(&VERSIONS, only_tls13),
        established: number(*established),
        most: number(*most),
        max_age: duration(*max_age),
        timeout: duration(*timeout),
    }
}

fn backend(backend: &Backend) -> raw::Backend {
    let Backend { name, id: _, v4: _, v6: _, weight, state, quic_server_ids, limits } = backend;
    let addresses: Vec<SocketAddr> = backend.addresses().collect();
    raw::Backend {
        name: name.clone().into(),
        address: list(addresses),
        weight: number(*weight),
        state: chosen(&STATES, state),
        quic_server_id: (!quic_server_ids.is_empty())
            .then(|| list(quic_server_ids.iter().map(|id| api::to_hex(id)))),
        limits: own_limits(limits),
    }
}
