//! The real program on single packets: a private instance, attached to nothing.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use aya::maps::{MapData, RingBuf};
use dispatcher_common::{
    abi,
    event::{EVENT_LEARNED, EVENT_REJECTED, Event},
    flow::{Flow, FlowKey, Link, ports_of, ports_word},
    http::{REQUEST, Reader},
    reason::{Kind, Reason},
    service::{Frontend, VipKey},
    session::{Session, SessionKey},
    stash::Slot,
};

use super::{Error, live::Known};
use crate::{
    config::{Backend, Config, Service},
    dataplane::{Capacities, Dataplane, find_interface, object},
    events::read_event,
    reconcile::{self, Actual, Desired, Path, Reach},
};

/// Longest frame that a test run takes: a page less the kernel's head- and tailroom.
const FRAME_MAX: usize = 3400;
/// Shortest.
const FRAME_MIN: usize = 14;
/// Flow entries, at least and at most; a connection has two, and full tables forget.
const FLOWS: (u32, u32) = (4096, 1 << 20);
/// Connections that wait for their backends at the same time; a slot has 8 KiB.
const STASH_SLOTS: u32 = 2048;
/// Any VLAN-less link to a backend.
const MACS: [u32; 3] = [
    u32::from_ne_bytes([2, 0, 0, 0]),
    u32::from_ne_bytes([0, 0xb0, 2, 0]),
    u32::from_ne_bytes([0, 0, 0, 0xd1]),
];

/// A loaded program with the services of a configuration.
pub(super) struct Machine {
    dataplane: Dataplane,
    config: Config,
    actual: Actual,
    events: RingBuf<MapData>,
    /// What was counted so far; the reasons that came last stand first.
    counts: Vec<(Reason, u64)>,
}

/// What became of a packet.
pub(super) enum Outcome {
    /// The reason that was counted, and the frame afterwards.
    Ran(Reason, Vec<u8>),
    /// No test run takes a frame of this length.
    BadLength,
}

/// Where packets of a flow go.
#[derive(Clone, Copy)]
pub(super) struct Bound {
    /// The entry toward the backend.
    pub(super) entry: Flow,
    /// Source of packets to the backend.
    pub(super) src: SocketAddr,
    /// The backend.
    pub(super) dst: SocketAddr,
}

impl Machine {
    /// Loads the programs and fills the maps. Every backend that is not disabled is up, through the
    /// loopback interface, which no frame ever reaches: test runs redirect nothing.
    pub(super) fn new(config: Config, known: Known, connections: usize) -> Result<Self, Error> {
        let services = &config.services;
        let count = |number: usize| u32::try_from(number.max(1)).unwrap_or(u32::MAX);
        let table: u64 =
            services.iter().map(|one| one.published().count() as u64 * u64::from(one.table_size) * 2).sum();
        let wanted = u32::try_from(connections.saturating_mul(8)).unwrap_or(u32::MAX);
        let entries = wanted.next_multiple_of(1024).clamp(FLOWS.0, FLOWS.1);
        let capacities = Capacities {
            flows: entries,
            sessions: entries.max(count(known.sessions.len() * 2)),
            provisional: entries.max(count(known.sessions.len() * 2)),
            frontends: count(services.iter().map(|one| one.published().count()).sum()),
            backends: count(services.iter().map(|one| one.backends.len()).sum()),
            lb_table: u32::try_from(table.max(1)).unwrap_or(u32::MAX),
            sources: config.capacities.sources,
            cookies: config.capacities.cookies,
            stash_slots: STASH_SLOTS,
        };
        let dataplane = Dataplane::load(object(), &capacities)?;
        let ifindex = find_interface("lo")?;
        let path = Path { link: Link { ifindex, macs: MACS, vlans: [0; 2] }, mtu: 1500 };
        let addresses = services.iter().flat_map(|one| &one.backends).flat_map(Backend::addresses);
        let reach: BTreeMap<IpAddr, Reach> =
            addresses.map(|address| (address.ip(), Reach::Up(path.clone()))).collect();
        let (loads, health, percent, responses) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let desired = Desired {
            config: &config,
            reach: &reach,
            loads: &loads,
            responses: &responses,
            tickets: &known.tickets,
            health: &health,
            percent: &percent,
        };
        let mut actual = Actual::default();
        for change in reconcile::diff(&desired, &actual) {
            actual.apply(&change, &dataplane)?;
        }
        for (key, session) in known.sessions {
            dataplane.sessions().insert(key, session)?;
        }
        // Nobody answers held hellos: the table decides, as when the daemon is gone.
        dataplane.update_globals(|globals| globals.heartbeat = 1)?;
        let events = dataplane.take_events().ok_or(Error::Events)?;
        let counts = dataplane.reasons()?;
        Ok(Self { dataplane, config, actual, events, counts })
    }

    /// A service by its place in the configuration.
    pub(super) fn service(&self, index: usize) -> Option<&Service> {
        self.config.services.get(index)
    }

    /// Runs the program on a frame.
    pub(super) fn run(&mut self, frame: &[u8]) -> Result<Outcome, Error> {
        if !(FRAME_MIN..=FRAME_MAX).contains(&frame.len()) {
            return Ok(Outcome::BadLength);
        }
        let run = self.dataplane.run(abi::PROGRAM, frame, None, 1, 0)?;
        for at in 0..self.counts.len() {
            let (reason, before) = self.counts[at];
            // Of an XDP action only some reasons can be the cause.
            let fits = match reason.kind() {
                Kind::Pass => run.retval == 2,
                Kind::Forward => run.retval == 4,
                Kind::Consume | Kind::Drop => run.retval == 1,
            };
            if !fits {
                continue;
            }
            let now = self.dataplane.reason(reason)?;
            if now != before {
                self.counts[..=at].rotate_right(1);
                self.counts[0] = (reason, now);
                return Ok(Outcome::Ran(reason, run.data_out));
            }
        }
        Err(Error::Uncounted(run.retval))
    }

    /// The flow of a client's packets, once it is bound.
    pub(super) fn bound(
        &self,
        client: SocketAddr,
        vip: SocketAddr,
        proto: u8,
    ) -> Result<Option<Bound>, Error> {
        let Some(entry) = self.dataplane.flows().get(&key(client, vip, proto))? else { return Ok(None) };
        let [src, dst] = [entry.src(), entry.dst()].map(IpAddr::from);
        let (src_port, dst_port) = ports_of(entry.ports);
        Ok(Some(Bound { entry, src: SocketAddr::new(src, src_port), dst: SocketAddr::new(dst, dst_port) }))
    }

    /// Forgets a flow, both directions.
    pub(super) fn forget(&self, client: SocketAddr, vip: SocketAddr, proto: u8) -> Result<(), Error> {
        if let Some(bound) = self.bound(client, vip, proto)? {
            self.dataplane.flows().remove(&key(client, vip, proto))?;
            self.dataplane.flows().remove(&key(bound.dst, bound.src, proto))?;
        }
        Ok(())
    }

    /// The stash slot of a flow.
    pub(super) fn slot(&self, bound: &Bound) -> Result<Slot, Error> {
        Ok(self.dataplane.stash().get(bound.entry.slot)?)
    }

    /// The name of a flow's backend.
    pub(super) fn backend(&self, bound: &Bound) -> Option<String> {
        let id = self.actual.backend_id(bound.entry.backend)?;
        let all = self.config.services.iter().flat_map(|one| &one.backends);
        all.filter(|one| one.id == id).map(|one| one.name.clone()).next()
    }

    /// A VIP's settings, as the program has them.
    pub(super) fn frontend(&self, vip: SocketAddr, proto: u8) -> Result<Option<Frontend>, Error> {
        let index = self.dataplane.vips().get(&VipKey::new(vip.ip(), vip.port(), proto))?;
        Ok(index.map(|index| self.dataplane.frontends().get(index)).transpose()?)
    }

    /// Looks for the service's cookie in the start of a client's stream; `None` where it has none.
    pub(super) fn cookie(&self, frontend: &Frontend, stream: &[u8]) -> Result<Option<Reader>, Error> {
        let Some(index) = frontend.cookie.checked_sub(1) else { return Ok(None) };
        let table = self.dataplane.cookies().get(index)?;
        let mut reader = Reader::new(REQUEST);
        stream.iter().for_each(|byte| reader.step(&table, *byte));
        Ok(Some(reader))
    }

    /// What the mapping table says of an identifier.
    pub(super) fn session(&self, key: &SessionKey) -> Result<Option<Session>, Error> {
        Ok(self.dataplane.sessions().get(key)?)
    }

    /// The names of a session's backends.
    pub(super) fn names(&self, session: &Session) -> Vec<String> {
        let all = self.config.services.iter().flat_map(|one| &one.backends);
        all.filter(|one| session.has(one.id)).map(|one| one.name.clone()).collect()
    }

    /// What was learned, or turned out to be wrong, since the last call.
    pub(super) fn events(&mut self) -> Vec<Event> {
        let mut found = Vec::new();
        while let Some(item) = self.events.next() {
            found.extend(read_event(&item).filter(|one| matches!(one.kind, EVENT_LEARNED | EVENT_REJECTED)));
        }
        found
    }
}

fn key(client: SocketAddr, vip: SocketAddr, proto: u8) -> FlowKey {
    FlowKey {
        src: client.ip().into(),
        dst: vip.ip().into(),
        ports: ports_word(client.port(), vip.port()),
        proto: proto.into(),
    }
}
