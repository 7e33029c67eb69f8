//! Desired state meets actual state: [`diff`] is a pure function from both to the changes of the maps, in
//! an order in which no packet meets a half-made service.
//!
//! Backends come before the tables that name them, tables before the frontends that point to them, and
//! frontends before the VIPs through which packets find them; what goes, goes in the opposite order. A
//! table is written beside the one in use, then the frontend is pointed at it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use dispatcher_common::{
    abi::REPLAY_MAPS,
    addr::Addr,
    flow::Link,
    http,
    service::{
        BACKEND_DEAD, BACKEND_DISABLED, BACKEND_DRAIN, BACKEND_UNHEALTHY, BACKEND_UP, Backend as Endpoint,
        FRONTEND_MISS_DAEMON, FRONTEND_NAMES, FRONTEND_NO_SACK, FRONTEND_NO_TS, FRONTEND_OVER_HOLD,
        FRONTEND_OVER_RESET, FRONTEND_PROXY_V2, FRONTEND_REFUSED, FRONTEND_SOURCE_DISPATCHER, Frontend,
        MODE_L4, MODE_LOCAL, MODE_PASSTHROUGH, VipKey, endpoint_index,
    },
    session::{
        KIND_QUIC_SERVER, STATE_CONFIGURED, STATE_PINNED, Session, SessionKey, TICKET_NAMED, TICKET_UNKNOWN,
    },
};

use crate::{
    balancer::{Balance, Candidate},
    config::{AdminState, Backend, Config, Miss, Mode, Over, Service, Source, class_id},
    dataplane::{Dataplane, Error, monotonic_seconds},
    terminate::Reached,
};

mod tables;
mod takeover;

pub use tables::Table;

/// How frames reach an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Path {
    /// Interface, MAC addresses, VLAN tags.
    pub link: Link,
    /// MTU of the route.
    pub mtu: u16,
}

/// Whether an address can be reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Route and neighbour are known.
    Up(Path),
    /// The reason why not.
    Down(String),
}

/// What health checks found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Unhealthy {
    /// In words.
    pub reason: String,
    /// No connection could be made: those that there were are over.
    pub dead: bool,
}

/// A VIP with its protocol number.
pub type Vip = (SocketAddr, u8);

/// What the maps should say.
#[derive(Clone, Copy, Debug)]
pub struct Desired<'d> {
    /// The configuration.
    pub config: &'d Config,
    /// Which addresses can be reached.
    pub reach: &'d BTreeMap<IpAddr, Reach>,
    /// Connections by backend id.
    pub loads: &'d BTreeMap<u32, u64>,
    /// Nanoseconds that backends take to answer, by id.
    pub responses: &'d BTreeMap<u32, u64>,
    /// What is known of tickets (`session::TICKET_*`), by backend id.
    pub tickets: &'d BTreeMap<u32, u32>,
    /// Why health checks took an address out, by backend id and family (true: IPv4).
    pub health: &'d BTreeMap<(u32, bool), Unhealthy>,
    /// Percent of its weight that a backend in slow start has, by backend id.
    pub percent: &'d BTreeMap<u32, u32>,
}

impl Desired<'_> {
    /// Formats of key names in tickets of a service's backends, a bit each; the most usual one always.
    fn ticket_formats(&self, service: &Service) -> u8 {
        let bit = |ticket: u32| ticket.checked_sub(TICKET_NAMED).map_or(0, |format| 1 << format);
        match service.ticket {
            Some(ticket) => bit(ticket),
            None => service.backends.iter().fold(1, |bits, one| bits | bit(self.ticket(service, one))),
        }
    }

    /// What is known of a backend's tickets: the configuration says it, or it was found out.
    fn ticket(&self, service: &Service, backend: &Backend) -> u32 {
        service.ticket.or_else(|| self.tickets.get(&backend.id).copied()).unwrap_or(TICKET_UNKNOWN)
    }

    fn path(&self, address: SocketAddr) -> Option<&Path> {
        match self.reach.get(&address.ip())? {
            Reach::Up(path) => Some(path),
            Reach::Down(_) => None,
        }
    }

    /// True when the operator and the health checks let an address take new connections.
    fn takes(&self, backend: &Backend, v4: bool) -> bool {
        backend.state == AdminState::Enabled
            && backend.weight > 0
            && !self.health.contains_key(&(backend.id, v4))
    }

    /// True when some address of a backend takes new connections.
    #[must_use]
    pub fn takes_new(&self, backend: &Backend) -> bool {
        backend
            .addresses()
            .any(|address| self.path(address).is_some() && self.takes(backend, address.is_ipv4()))
    }

    /// Weight of a backend beside those of its service. It is counted in hundredths while one of them is in
    /// slow start.
    fn weight(&self, service: &Service, backend: &Backend) -> u32 {
        if !service.backends.iter().any(|one| self.percent.contains_key(&one.id)) {
            return backend.weight;
        }
        (backend.weight * self.percent.get(&backend.id).copied().unwrap_or(100)).max(1)
    }

    /// Why an address cannot be reached.
    fn down(&self, address: SocketAddr) -> Option<String> {
        match self.reach.get(&address.ip()) {
            Some(Reach::Up(_)) => None,
            Some(Reach::Down(reason)) => Some(reason.clone()),
            None => Some("not looked up yet".to_owned()),
        }
    }
}

/// What the maps say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Actual {
    backends: BTreeMap<u32, BackendSlot>,
    /// Room for backends; 0 where there are no maps.
    room: u32,
    /// From here on an index is looked for: behind the one that was given last.
    next_backend: u32,
    frontends: BTreeMap<Vip, FrontendSlot>,
    /// What stands in `LB_TABLE`, by first entry.
    tables: BTreeMap<u32, Table>,
    replay: Vec<u32>,
    /// Names by index into `COOKIES`.
    cookies: Vec<String>,
    sources: Vec<IpAddr>,
    filter: BTreeSet<IpAddr>,
    server_ids: BTreeMap<ServerId, u32>,
    /// Lengths of QUIC connection IDs that were restored, by service id, as in [`Frontend::cid_lengths`]: what the
    /// data path has found out is kept in the maps only.
    pub(crate) cid_lengths: BTreeMap<u32, u32>,
}

/// Service id; configuration ID and server ID as in a QUIC connection ID.
pub type ServerId = (u32, Vec<u8>);

#[derive(Clone, Debug, Default, PartialEq)]
struct BackendSlot {
    index: u32,
    indexed: bool,
    /// IPv4, IPv6.
    endpoints: [Endpoint; 2],
}

#[derive(Clone, Debug, PartialEq)]
struct FrontendSlot {
    index: u32,
    frontend: Frontend,
    published: bool,
}

/// One write to the maps.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A source address.
    Source {
        /// Index into `SOURCES`.
        index: u32,
        /// The address.
        address: IpAddr,
    },
    /// A replay map gets its interface.
    Replay {
        /// Number of the map.
        number: u32,
        /// The interface.
        ifindex: u32,
    },
    /// An automaton that finds a cookie.
    Cookie {
        /// Index into `COOKIES`.
        index: u32,
        /// The cookie's name.
        name: String,
    },
    /// An endpoint of a backend.
    Endpoint {
        /// Backend id.
        id: u32,
        /// Backend index.
        index: u32,
        /// Family.
        v4: bool,
        /// What is written.
        endpoint: Endpoint,
    },
    /// A backend becomes known by its id.
    Index {
        /// Backend id.
        id: u32,
        /// Backend index.
        index: u32,
    },
    /// QUIC connection IDs that name a server lead to its backend.
    ServerId {
        /// Whose.
        id: ServerId,
        /// Backend id.
        backend: u32,
    },
    /// A server ID goes.
    RemoveServerId {
        /// Which.
        id: ServerId,
    },
    /// Links have changed: flows must read them again.
    Generation,
    /// The addresses that are ours.
    Filter {
        /// All of them.
        addresses: BTreeSet<IpAddr>,
    },
    /// A load-balancing table, into the half that is not in use.
    Table {
        /// Whose.
        vip: Vip,
        /// First entry.
        base: u32,
        /// What is written.
        table: Table,
    },
    /// A frontend.
    Frontend {
        /// Its VIP.
        vip: Vip,
        /// Index into `FRONTENDS`.
        index: u32,
        /// What is written, without the bits that the data path sets.
        frontend: Frontend,
    },
    /// Packets to a VIP begin to find its frontend.
    Publish {
        /// The VIP.
        vip: Vip,
        /// Index into `FRONTENDS`.
        index: u32,
    },
    /// A VIP goes.
    RemoveVip {
        /// The VIP.
        vip: Vip,
    },
    /// A backend goes.
    RemoveBackend {
        /// Backend id.
        id: u32,
        /// Backend index.
        index: u32,
    },
}

/// The changes that take the maps from what they say to what they should say.
#[must_use]
pub fn diff(desired: &Desired<'_>, actual: &Actual) -> Vec<Change> {
    let mut plan = Plan { desired, next: actual.clone(), changes: Vec::new(), moved: false };
    let sources = plan.sources();
    plan.replays();
    let lowered = plan.backends();
    plan.filter();
    plan.cookies();
    let gone = plan.server_ids();
    plan.frontends(&sources);
    plan.remove_vips();
    for change in gone {
        plan.push(change);
    }
    for change in lowered {
        plan.push(change);
    }
    plan.remove_backends();
    if plan.moved {
        plan.push(Change::Generation);
    }
    plan.changes
}

struct Plan<'d, 'c> {
    desired: &'d Desired<'c>,
    next: Actual,
    changes: Vec<Change>,
    /// Flows must look at their backends again.
    moved: bool,
}

impl<'c> Plan<'_, 'c> {
    fn push(&mut self, change: Change) {
        self.next.record(&change);
        self.changes.push(change);
    }

    fn config(&self) -> &'c Config {
        self.desired.config
    }

    /// Writes the source pools, one after the other; returns where the pool of a service and family is.
    fn sources(&mut self) -> BTreeMap<(u32, bool), (u32, u32)> {
        let mut pools = BTreeMap::new();
        let mut all = Vec::new();
        for service in &self.config().services {
            let Source::Dispatcher { addresses, .. } = &service.source else { continue };
            for v4 in [true, false] {
                let base = all.len() as u32;
                all.extend(addresses.iter().filter(|address| address.is_ipv4() == v4));
                pools.insert((service.id, v4), (base, all.len() as u32 - base));
            }
        }
        for (index, address) in all.into_iter().enumerate() {
            if self.next.sources.get(index) != Some(&address) {
                self.push(Change::Source { index: index as u32, address });
            }
        }
        pools
    }

    /// Gives each interface through which backends are reached a replay map, as long as there are some.
    fn replays(&mut self) {
        let endpoints = self.config().services.iter().flat_map(|service| &service.backends);
        let used: BTreeSet<u32> = endpoints
            .flat_map(Backend::addresses)
            .filter_map(|address| self.desired.path(address))
            .map(|path| path.link.ifindex)
            .collect();
        for ifindex in &used {
            if self.next.replay.contains(ifindex) {
                continue;
            }
            let free = self.next.replay.iter().position(|one| !used.contains(one));
            let number = free.unwrap_or(self.next.replay.len()) as u32;
            if number < REPLAY_MAPS {
                self.push(Change::Replay { number, ifindex: *ifindex });
            }
        }
    }

    /// Writes endpoints that come up or change; returns those that go down, to be written when no table
    /// names them any more.
    fn backends(&mut self) -> Vec<Change> {
        let mut lowered = Vec::new();
        let mut free = self.next.free_backends();
        for service in &self.config().services {
            for backend in &service.backends {
                let index = self.next.backend_slot(backend.id, &mut free);
                for v4 in [true, false] {
                    let old = self.next.endpoint(backend.id, v4);
                    let endpoint = self.endpoint(service, backend, v4, old);
                    if endpoint == old {
                        continue;
                    }
                    let differs = (endpoint.addr, endpoint.port, endpoint.link)
                        != (old.addr, old.port, old.link)
                        || endpoint.flags & !old.flags & BACKEND_DEAD != 0;
                    // Where there was no link, there are no flows.
                    self.moved |= old.link != Link::default() && differs;
                    let change = Change::Endpoint { id: backend.id, index, v4, endpoint };
                    if old.flags & BACKEND_UP != 0 && endpoint.flags & BACKEND_UP == 0 {
                        lowered.push(change);
                    } else {
                        self.push(change);
                    }
                }
                if !self.next.backends.get(&backend.id).is_some_and(|slot| slot.indexed) {
                    self.push(Change::Index { id: backend.id, index });
                }
            }
        }
        lowered
    }

    fn endpoint(&self, service: &Service, backend: &Backend, v4: bool, old: Endpoint) -> Endpoint {
        let Some(address) = backend.address(v4) else { return Endpoint::default() };
        let mut endpoint = Endpoint {
            addr: address.ip().into(),
            port: address.port().to_be(),
            id: backend.id,
            // A path that was lost stays written: connections of a moment ago may still get through.
            link: old.link,
            mtu: old.mtu,
            replay: old.replay,
            ..Endpoint::default()
        };
        endpoint.ticket = self.desired.ticket(service, backend);
        if let Some(path) = self.desired.path(address)
            && let Some(replay) = self.next.replay.iter().position(|one| *one == path.link.ifindex)
        {
            endpoint.link = path.link;
            endpoint.mtu = path.mtu;
            endpoint.replay = replay as u16;
            if backend.state.takes() && !self.desired.health.contains_key(&(backend.id, v4)) {
                endpoint.flags |= BACKEND_UP;
            }
        }
        endpoint.flags |= match backend.state {
            AdminState::Enabled => 0,
            AdminState::Drain => BACKEND_DRAIN,
            AdminState::Disabled => BACKEND_DISABLED,
            AdminState::Offline => BACKEND_DISABLED | BACKEND_DEAD,
        };
        if let Some(found) = self.desired.health.get(&(backend.id, v4)) {
            endpoint.flags |= if found.dead { BACKEND_UNHEALTHY | BACKEND_DEAD } else { BACKEND_UNHEALTHY };
        }
        endpoint
    }

    fn filter(&mut self) {
        let mut addresses = BTreeSet::new();
        for service in &self.config().services {
            addresses.extend(service.published().map(|vip| vip.ip()));
            addresses
                .extend(service.backends.iter().flat_map(Backend::addresses).map(|address| address.ip()));
        }
        if addresses != self.next.filter {
            self.push(Change::Filter { addresses });
        }
    }

    /// Makes an automaton for each name of a cookie, in a place that no frontend points to.
    fn cookies(&mut self) {
        let ours = self.config().services.iter().filter(|service| !service.mode.is_local());
        let wanted: BTreeSet<&str> = ours.filter_map(Service::cookie).collect();
        let mut used: BTreeSet<u32> =
            self.next.frontends.values().filter_map(|slot| slot.frontend.cookie.checked_sub(1)).collect();
        for (index, name) in (0..).zip(&self.next.cookies) {
            if wanted.contains(name.as_str()) {
                used.insert(index);
            }
        }
        for name in wanted {
            if self.next.cookie(name).is_none() {
                let index = lowest_free(&used);
                used.insert(index);
                self.push(Change::Cookie { index, name: name.to_owned() });
            }
        }
    }

    /// Writes the server IDs; returns those that go, for when no frontend reads them any more.
    fn server_ids(&mut self) -> Vec<Change> {
        let mut wanted: BTreeMap<ServerId, u32> = BTreeMap::new();
        for service in &self.config().services {
            for (config, length) in (0_u8..).zip(service.quic_lb) {
                let ids = service.backends.iter().flat_map(|backend| {
                    let ids = backend.quic_server_ids.iter();
                    ids.filter(|id| id.len() == usize::from(length)).map(|id| (id, backend.id))
                });
                wanted.extend(ids.map(|(id, backend)| {
                    ((service.id, std::iter::once(config).chain(id.iter().copied()).collect()), backend)
                }));
            }
        }
        let gone = self.next.server_ids.keys().filter(|id| !wanted.contains_key(*id));
        let gone = gone.map(|id| Change::RemoveServerId { id: id.clone() }).collect();
        for (id, backend) in wanted {
            if self.next.server_ids.get(&id) != Some(&backend) {
                self.push(Change::ServerId { id, backend });
            }
        }
        gone
    }

    fn frontends(&mut self, sources: &BTreeMap<(u32, bool), (u32, u32)>) {
        for service in &self.config().services {
            let mut tables: BTreeMap<bool, Table> = BTreeMap::new();
            for address in service.published() {
                let vip = (address, service.protocol.number());
                if service.mode.is_local() {
                    self.frontend(service, vip, Table::found(Vec::new()), (0, 0));
                    continue;
                }
                let v4 = address.is_ipv4();
                let table = tables
                    .entry(v4)
                    .or_insert_with(|| {
                        let candidates = candidates(self.desired, &self.next, service, v4);
                        let old = self.next.frontends.get(&vip).map(|slot| slot.frontend.table_base);
                        let old = old.and_then(|base| self.next.tables.get(&base));
                        Table::make(service.balance, service.table_size, candidates, old)
                    })
                    .clone();
                let pool = sources.get(&(service.id, v4)).copied().unwrap_or_default();
                self.frontend(service, vip, table, pool);
            }
        }
    }

    fn frontend(&mut self, service: &Service, vip: Vip, table: Table, pool: (u32, u32)) {
        let size = service.table_size;
        let old = self.next.frontends.get(&vip).filter(|slot| slot.frontend.table_size == size).cloned();
        let (index, region) = match (&old, self.next.frontends.get(&vip)) {
            (Some(slot), _) => (slot.index, slot.frontend.table_region),
            (None, Some(resized)) => (resized.index, self.next.free_region(size)),
            (None, None) => (self.next.free_frontend(), self.next.free_region(size)),
        };
        let mut frontend = rendered(service, vip, pool);
        frontend.ticket_formats = self.desired.ticket_formats(service);
        frontend.cookie =
            service.cookie().and_then(|name| self.next.cookie(name)).map_or(0, |index| index + 1);
        (frontend.table_region, frontend.table_size) = (region, size);
        frontend.table_base = region;
        if let Some(old) = &old {
            frontend.table_base = old.frontend.table_base;
            frontend.table_len = old.frontend.table_len;
        }
        let len = table.entries().len() as u32;
        if table.entries() != self.next.table(&frontend) {
            if len > 0 {
                // Beside the one in use, if one is.
                let second = old.is_some() && frontend.table_len > 0 && frontend.table_base == region;
                frontend.table_base = if second { region + size } else { region };
            }
            frontend.table_len = len;
            if len > 0 {
                self.push(Change::Table { vip, base: frontend.table_base, table });
            }
        }
        if old.as_ref().is_none_or(|old| old.frontend != frontend) {
            self.push(Change::Frontend { vip, index, frontend });
        }
        if !self.next.frontends.get(&vip).is_some_and(|slot| slot.published) {
            self.push(Change::Publish { vip, index });
        }
    }

    fn remove_vips(&mut self) {
        let services = &self.config().services;
        let wanted: BTreeSet<Vip> = services
            .iter()
            .flat_map(|service| service.published().map(|vip| (vip, service.protocol.number())))
            .collect();
        let gone: Vec<Vip> =
            self.next.frontends.keys().filter(|vip| !wanted.contains(vip)).copied().collect();
        for vip in gone {
            self.push(Change::RemoveVip { vip });
        }
    }

    fn remove_backends(&mut self) {
        let services = &self.config().services;
        let wanted: BTreeSet<u32> =
            services.iter().flat_map(|service| &service.backends).map(|backend| backend.id).collect();
        let gone: Vec<(u32, u32)> = self
            .next
            .backends
            .iter()
            .filter(|(id, _)| !wanted.contains(id))
            .map(|(id, slot)| (*id, slot.index))
            .collect();
        self.moved |= !gone.is_empty();
        for (id, index) in gone {
            self.push(Change::RemoveBackend { id, index });
        }
    }
}

/// A frontend without its table.
fn rendered(service: &Service, (address, proto): Vip, (source_base, source_len): (u32, u32)) -> Frontend {
    let mut flags = 0;
    let mut set = |condition: bool, flag| flags |= if condition { flag } else { 0 };
    set(service.proxy_protocol, FRONTEND_PROXY_V2);
    set(service.miss == Miss::Daemon, FRONTEND_MISS_DAEMON);
    set(service.queueing.over == Over::Reset && !service.holds_connections(), FRONTEND_OVER_RESET);
    set(service.holds_connections(), FRONTEND_OVER_HOLD);
    set(service.classifies_names(), FRONTEND_NAMES);
    set(!service.sack, FRONTEND_NO_SACK);
    set(!service.timestamps, FRONTEND_NO_TS);
    set(matches!(service.source, Source::Dispatcher { .. }), FRONTEND_SOURCE_DISPATCHER);
    let (port_min, port_max) = match &service.source {
        Source::Client => (0, 0),
        Source::Dispatcher { ports, .. } => (*ports.start(), *ports.end()),
    };
    let mut frontend = Frontend {
        addr: address.ip().into(),
        port: address.port().to_be(),
        proto,
        mode: match service.mode {
            Mode::L4 => MODE_L4,
            Mode::Passthrough => MODE_PASSTHROUGH,
            Mode::Terminate | Mode::Relay => MODE_LOCAL,
        },
        service: service.id,
        flags,
        source_base,
        source_len,
        port_min,
        port_max,
        wscale: service.wscale,
        mss: service.mss,
        session_ttl: service.session_ttl,
        provisional_ttl: service.provisional_ttl,
        quic_lb: service.quic_lb,
        affinity: std::array::from_fn(|i| service.affinity.get(i).map_or(0, |one| one.kind())),
        ..Frontend::default()
    };
    frontend.set_class(class_id(&service.class));
    frontend
}

/// The backends of a service that may take new connections of a family.
#[must_use]
pub fn candidates(desired: &Desired<'_>, actual: &Actual, service: &Service, v4: bool) -> Vec<Candidate> {
    let candidate = |backend: &Backend| {
        let slot = actual.backends.get(&backend.id)?;
        let path = desired.path(backend.address(v4)?)?;
        let takes = desired.takes(backend, v4) && actual.replay.contains(&path.link.ifindex);
        let load = desired.loads.get(&backend.id).copied().unwrap_or(0);
        let weight = desired.weight(service, backend);
        let response = desired.responses.get(&backend.id).copied().unwrap_or(0);
        takes.then_some(Candidate { index: slot.index, id: backend.id, weight, load, response })
    };
    service.backends.iter().filter_map(candidate).collect()
}

/// Who may be picked for connections of a frontend.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Name of the service.
    pub service: String,
    /// Its algorithm.
    pub balance: Balance,
    /// Life of a provisional session, seconds.
    pub provisional_ttl: u32,
    /// The backends that take new connections.
    pub candidates: Vec<Candidate>,
    /// Indexes of those that take connections of known sessions, by id.
    pub known: BTreeMap<u32, u32>,
}

/// What a service that the daemon serves itself must know of its backends, whatever family they are reached by.
pub(crate) fn reached(desired: &Desired<'_>, actual: &Actual, service: &Service) -> Reached {
    let mut takers = candidates(desired, actual, service, false);
    for one in candidates(desired, actual, service, true) {
        if !takers.iter().any(|other| other.id == one.id) {
            takers.push(one);
        }
    }
    let (mut known, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    for backend in &service.backends {
        let Some(slot) = actual.backends.get(&backend.id) else { continue };
        let up = |address: &SocketAddr| {
            let flags = actual.endpoint(backend.id, address.is_ipv4()).flags;
            flags & BACKEND_UP != 0
        };
        if let Some(address) = backend.addresses().find(up) {
            known.insert(backend.id, slot.index);
            addresses.insert(backend.id, (format!("{}/{}", service.name, backend.name), address));
        }
    }
    let pool = Pool {
        service: service.name.clone(),
        balance: service.balance,
        provisional_ttl: service.provisional_ttl,
        candidates: takers,
        known,
    };
    let tickets = service.backends.iter().map(|backend| (backend.id, desired.ticket(service, backend)));
    Reached { pool, addresses, ticket_formats: desired.ticket_formats(service), tickets: tickets.collect() }
}

/// The pools, by frontend index.
#[must_use]
pub fn pools(desired: &Desired<'_>, actual: &Actual) -> BTreeMap<u32, Pool> {
    let mut pools = BTreeMap::new();
    for service in &desired.config.services {
        for vip in service.frontends() {
            let Some(slot) = actual.frontends.get(&(*vip, service.protocol.number())) else { continue };
            let v4 = vip.is_ipv4();
            let known = service.backends.iter().filter_map(|backend| {
                let slot = actual.backends.get(&backend.id)?;
                let up = actual.endpoint(backend.id, v4).flags & BACKEND_UP != 0;
                up.then_some((backend.id, slot.index))
            });
            let pool = Pool {
                service: service.name.clone(),
                balance: service.balance,
                provisional_ttl: service.provisional_ttl,
                candidates: candidates(desired, actual, service, v4),
                known: known.collect(),
            };
            pools.insert(slot.index, pool);
        }
    }
    pools
}

/// Whether a backend takes connections, in one word, and why not.
#[must_use]
pub fn status(desired: &Desired<'_>, actual: &Actual, backend: &Backend) -> (&'static str, Option<String>) {
    let mut up = 0;
    let mut reasons = Vec::new();
    for address in backend.addresses() {
        let reason = desired.down(address).or_else(|| {
            let ifindex = desired.path(address)?.link.ifindex;
            let missing = !actual.replay.contains(&ifindex);
            missing.then(|| format!("backends are reached through more than {REPLAY_MAPS} interfaces"))
        });
        let unhealthy =
            || desired.health.get(&(backend.id, address.is_ipv4())).map(|found| found.reason.clone());
        let reason = reason.or_else(unhealthy);
        match reason {
            None => up += 1,
            Some(reason) => reasons.push((address, reason)),
        }
    }
    let several = up + reasons.len() > 1;
    let reasons: Vec<String> = reasons
        .into_iter()
        .map(|(address, reason)| if several { format!("{}: {reason}", address.ip()) } else { reason })
        .collect();
    let state = match backend.state {
        AdminState::Disabled => "disabled",
        AdminState::Offline => "offline",
        AdminState::Enabled | AdminState::Drain if up == 0 => "down",
        AdminState::Drain => "drain",
        AdminState::Enabled => "up",
    };
    (state, (!reasons.is_empty()).then(|| reasons.join("; ")))
}

impl Actual {
    /// Index of a backend.
    #[must_use]
    pub fn backend_index(&self, id: u32) -> Option<u32> {
        self.backends.get(&id).map(|slot| slot.index)
    }

    /// Ids and indexes of all backends.
    pub fn backend_indexes(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.backends.iter().map(|(id, slot)| (*id, slot.index))
    }

    /// Number of backends.
    #[must_use]
    pub fn backends(&self) -> usize {
        self.backends.len()
    }

    /// The id of a backend index.
    #[must_use]
    pub fn backend_id(&self, index: u32) -> Option<u32> {
        self.backends.iter().find(|(_, slot)| slot.index == index).map(|(id, _)| *id)
    }

    /// True when a backend's endpoint of a family can be reached.
    #[must_use]
    pub fn is_up(&self, backend: u32, v4: bool) -> bool {
        self.endpoint(backend, v4).flags & BACKEND_UP != 0
    }

    /// The frontend of a VIP as it was written, and its index.
    #[must_use]
    pub fn frontend(&self, vip: &Vip) -> Option<(u32, &Frontend)> {
        self.frontends.get(vip).map(|slot| (slot.index, &slot.frontend))
    }

    /// Share of a backend in the tables of some VIPs, 0 to 1.
    #[must_use]
    pub fn share(&self, vips: &[Vip], backend: u32) -> f64 {
        let (mut mine, mut all) = (0_usize, 0_usize);
        for slot in vips.iter().filter_map(|vip| self.frontends.get(vip)) {
            let table = self.table(&slot.frontend);
            all += table.len();
            mine += table.iter().filter(|index| **index == backend).count();
        }
        if all == 0 { 0.0 } else { mine as f64 / all as f64 }
    }

    /// Writes a change and takes note of it.
    pub fn apply(&mut self, change: &Change, dataplane: &Dataplane) -> Result<(), Error> {
        self.write(change, dataplane)?;
        self.record(change);
        Ok(())
    }

    fn write(&self, change: &Change, dataplane: &Dataplane) -> Result<(), Error> {
        match change {
            Change::Source { index, address } => dataplane.sources().set(*index, (*address).into()),
            Change::Replay { number, ifindex } => dataplane.set_replay(*number, *ifindex),
            Change::Cookie { index, name } => {
                let mut table = [0; http::TABLE];
                http::automaton(name, &mut table);
                dataplane.cookies().set(*index, table)
            }
            Change::Endpoint { index, v4, endpoint, .. } => {
                dataplane.backends().set(endpoint_index(*index, *v4), *endpoint)
            }
            Change::Index { id, index } => dataplane.backend_index().insert(*id, *index),
            Change::Generation => {
                dataplane.update_globals(|globals| globals.generation = globals.generation.wrapping_add(1))
            }
            Change::Filter { addresses } => dataplane.update_globals(|globals| {
                globals.filter.fill(0);
                addresses.iter().for_each(|address| globals.filter_add(*address));
            }),
            Change::Table { base, table, .. } => dataplane.lb_table().set_all(*base, table.entries()),
            Change::Frontend { vip, index, frontend, .. } => {
                let mut frontend = *frontend;
                frontend.cid_lengths = self.cid_lengths.get(&frontend.service).copied().unwrap_or_default();
                if self.frontends.get(vip).is_some_and(|slot| slot.index == *index) {
                    let old = dataplane.frontends().get(*index)?;
                    frontend.flags |= old.flags & FRONTEND_REFUSED;
                    frontend.cid_lengths |= old.cid_lengths;
                }
                dataplane.frontends().set(*index, frontend)
            }
            Change::ServerId { id, backend } => {
                let Some((key, session)) = server_id_entry(id, *backend) else { return Ok(()) };
                if is_pinned(dataplane, &key)? { Ok(()) } else { dataplane.sessions().insert(key, session) }
            }
            Change::RemoveServerId { id } => {
                let Some((key, _)) = server_id_entry(id, 0) else { return Ok(()) };
                if is_pinned(dataplane, &key)? { Ok(()) } else { dataplane.sessions().remove(&key).map(drop) }
            }
            Change::Publish { vip, index } => dataplane.publish(vip_key(vip), *index),
            Change::RemoveVip { vip } => {
                dataplane.withdraw(&vip_key(vip))?;
                match self.frontends.get(vip) {
                    Some(slot) => dataplane.frontends().set(slot.index, Frontend::default()),
                    None => Ok(()),
                }
            }
            Change::RemoveBackend { id, index } => {
                dataplane.backend_index().remove(id)?;
                dataplane.forget_stats(*index)?;
                for v4 in [true, false] {
                    dataplane.backends().set(endpoint_index(*index, v4), Endpoint::default())?;
                }
                Ok(())
            }
        }
    }

    fn record(&mut self, change: &Change) {
        match change {
            Change::Source { index, address } => {
                let index = *index as usize;
                if self.sources.len() <= index {
                    self.sources.resize(index + 1, *address);
                }
                if let Some(place) = self.sources.get_mut(index) {
                    *place = *address;
                }
            }
            Change::Replay { number, ifindex } => {
                let number = *number as usize;
                if self.replay.len() <= number {
                    self.replay.resize(number + 1, 0);
                }
                if let Some(place) = self.replay.get_mut(number) {
                    *place = *ifindex;
                }
            }
            Change::Cookie { index, name } => {
                let index = *index as usize;
                if self.cookies.len() <= index {
                    self.cookies.resize(index + 1, String::new());
                }
                if let Some(place) = self.cookies.get_mut(index) {
                    place.clone_from(name);
                }
            }
            Change::Endpoint { id, index, v4, endpoint } => {
                self.slot(*id, *index).endpoints[usize::from(!*v4)] = *endpoint;
            }
            Change::Index { id, index } => {
                self.slot(*id, *index).indexed = true;
            }
            Change::ServerId { id, backend } => {
                self.server_ids.insert(id.clone(), *backend);
            }
            Change::RemoveServerId { id } => {
                self.server_ids.remove(id);
            }
            Change::Generation => {}
            Change::Filter { addresses } => self.filter.clone_from(addresses),
            Change::Table { base, table, .. } => {
                self.tables.insert(*base, table.clone());
            }
            Change::Frontend { vip, index, frontend } => {
                let published = self.frontends.get(vip).is_some_and(|slot| slot.published);
                self.frontends.insert(*vip, FrontendSlot { index: *index, frontend: *frontend, published });
            }
            Change::Publish { vip, .. } => {
                if let Some(slot) = self.frontends.get_mut(vip) {
                    slot.published = true;
                }
            }
            Change::RemoveVip { vip } => {
                self.frontends.remove(vip);
            }
            Change::RemoveBackend { id, .. } => {
                self.backends.remove(id);
            }
        }
    }

    /// Where the automaton of a cookie is.
    fn cookie(&self, name: &str) -> Option<u32> {
        self.cookies.iter().position(|one| one == name).map(|index| index as u32)
    }

    /// The table that a frontend points to.
    fn table(&self, frontend: &Frontend) -> &[u32] {
        let written = self.tables.get(&frontend.table_base).map(Table::entries).unwrap_or_default();
        written.get(..frontend.table_len as usize).unwrap_or_default()
    }

    fn endpoint(&self, id: u32, v4: bool) -> Endpoint {
        self.backends.get(&id).map(|slot| slot.endpoints[usize::from(!v4)]).unwrap_or_default()
    }

    /// Indexes that no backend has, round through all of them: one that was given up comes last, because
    /// connections of whoever had it may still name it.
    fn free_backends(&self) -> impl Iterator<Item = u32> + use<> {
        let taken: BTreeSet<u32> = self.backends.values().map(|slot| slot.index).collect();
        let (next, room) = (self.next_backend.min(self.room), self.room);
        // Beyond the room nothing can be written: the error says so.
        (next..room).chain(0..next).chain(room..).filter(move |index| !taken.contains(index))
    }

    /// What is known of a backend that has an index.
    fn slot(&mut self, id: u32, index: u32) -> &mut BackendSlot {
        if !self.backends.contains_key(&id) {
            self.next_backend = index.saturating_add(1);
        }
        let slot = self.backends.entry(id).or_default();
        slot.index = index;
        slot
    }

    /// The index of a backend, or the next free one, which it has from now on.
    fn backend_slot(&mut self, id: u32, free: &mut impl Iterator<Item = u32>) -> u32 {
        if let Some(slot) = self.backends.get(&id) {
            return slot.index;
        }
        let index = free.next().unwrap_or(u32::MAX);
        self.backends.insert(id, BackendSlot { index, ..BackendSlot::default() });
        index
    }

    fn free_frontend(&self) -> u32 {
        lowest_free(&self.frontends.values().map(|slot| slot.index).collect())
    }

    /// The first gap of `LB_TABLE` that holds two tables.
    fn free_region(&self, size: u32) -> u32 {
        let region = |one: &Frontend| (one.table_region, one.table_region + 2 * one.table_size);
        let mut taken: Vec<(u32, u32)> = self.frontends.values().map(|slot| region(&slot.frontend)).collect();
        taken.sort_unstable();
        let mut start = 0;
        for (from, to) in taken {
            if from >= start && from - start >= 2 * size {
                break;
            }
            start = start.max(to);
        }
        start
    }
}

/// What `SESSIONS` says of a server ID.
fn server_id_entry((service, id): &ServerId, backend: u32) -> Option<(SessionKey, Session)> {
    let now = monotonic_seconds();
    let session = Session { state: STATE_CONFIGURED, created: now, used: now, ..Session::of(backend) };
    Some((SessionKey::new(*service, KIND_QUIC_SERVER, id)?, session))
}

/// True when the operator has said where an identifier leads: his word stays.
fn is_pinned(dataplane: &Dataplane, key: &SessionKey) -> Result<bool, Error> {
    Ok(dataplane.sessions().get(key)?.is_some_and(|session| session.state == STATE_PINNED))
}

/// The key under which the data path finds a VIP.
#[must_use]
pub fn vip_key((address, proto): &Vip) -> VipKey {
    VipKey::new(Addr::from(address.ip()), address.port(), *proto)
}

fn lowest_free(taken: &BTreeSet<u32>) -> u32 {
    (0..).zip(taken).find(|(n, t)| n != *t).map_or(taken.len() as u32, |(n, _)| n)
}

#[cfg(test)]
mod tests;
