//! How backends are reached: routes, neighbours and devices of the kernel, followed as they change.
//!
//! `resolve` is pure: from what the kernel says about devices, neighbours and one address to a
//! [`Reach`]. The rest asks the kernel, and keeps neighbours alive: packets that the data path sends do
//! not tell the kernel that it should.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    time::Duration,
};

use dispatcher_common::flow::Link;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_multicast_connection,
    packet_route::{
        link::{InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, VlanProtocol},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia},
    },
};
use tokio::{sync::watch, task::JoinHandle, time::Instant};

use crate::reconcile::{Path, Reach};

/// Changes that come closer together than this are looked at once.
const SETTLE: Duration = Duration::from_millis(50);
/// A neighbour that does not answer is asked for this often.
const ASK: Duration = Duration::from_secs(1);
/// Everything is looked at, and neighbours in use are touched, this often.
const REFRESH: Duration = Duration::from_secs(5);

/// An entry that the kernel has thrown away, but not found dead, is used so long while it is asked for again.
const GRACE: Duration = Duration::from_secs(4);

/// The reason that goes away by itself when a neighbour answers.
pub const NO_NEIGHBOUR: &str = "no neighbour";

/// What can go wrong with rtnetlink.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket cannot be opened.
    #[error("opening a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// A dump failed.
    #[error("reading the kernel's {what}: {source}")]
    Dump {
        /// Of what.
        what: &'static str,
        /// The answer.
        source: rtnetlink::Error,
    },
}

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Device {
    name: String,
    mac: Option<[u8; 6]>,
    mtu: u32,
    up: bool,
    /// Of a VLAN device: TPID and VLAN number.
    tag: Option<(u16, u16)>,
    /// Of a VLAN device: the device below.
    lower: Option<u32>,
}

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Neighbour {
    mac: Option<[u8; 6]>,
    state: NeighbourState,
}

impl Neighbour {
    /// The MAC address, while it is good to use.
    fn mac(&self) -> Option<[u8; 6]> {
        let good = matches!(
            self.state,
            NeighbourState::Reachable
                | NeighbourState::Stale
                | NeighbourState::Delay
                | NeighbourState::Probe
                | NeighbourState::Noarp
                | NeighbourState::Permanent
        );
        self.mac.filter(|_| good)
    }

    /// The kernel forgets it unless it is used.
    fn ages(&self) -> bool {
        !matches!(self.state, NeighbourState::Noarp | NeighbourState::Permanent)
    }
}

/// Where the kernel would send packets for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Route {
    device: u32,
    hop: IpAddr,
    mtu: Option<u32>,
    local: bool,
}

/// What the kernel knows.
#[derive(Clone, Debug, Default)]
struct Snapshot {
    devices: BTreeMap<u32, Device>,
    neighbours: BTreeMap<(u32, IpAddr), Neighbour>,
}

/// How frames reach the address behind a route. `attached` are the interfaces with our program: what a
/// backend answers must come in there.
fn resolve(route: Option<Route>, snapshot: &Snapshot, attached: &BTreeSet<u32>) -> Reach {
    match path(route, snapshot, attached) {
        Ok(path) => Reach::Up(path),
        Err(reason) => Reach::Down(reason),
    }
}

fn path(route: Option<Route>, snapshot: &Snapshot, attached: &BTreeSet<u32>) -> Result<Path, String> {
    let route = route.ok_or("no route")?;
    if route.local {
        return Err("is an address of this host".to_owned());
    }
    let device = snapshot.devices.get(&route.device).ok_or("no route")?;
    if !device.up {
        return Err(format!("interface {} is down", device.name));
    }
    let mut tags = Vec::new();
    let (mut ifindex, mut lowest) = (route.device, device);
    while let (Some(tag), Some(lower)) = (lowest.tag, lowest.lower) {
        tags.push(tag);
        let missing = format!("the device below {} is not in this network namespace", lowest.name);
        (ifindex, lowest) = (lower, snapshot.devices.get(&lower).ok_or(missing)?);
    }
    if tags.len() > 2 {
        return Err(format!("interface {} has more than two VLAN tags", device.name));
    }
    if !attached.contains(&ifindex) {
        return Err(format!("interface {} not attached", lowest.name));
    }
    let source = device.mac.ok_or_else(|| format!("interface {} has no Ethernet address", device.name))?;
    let neighbour = snapshot.neighbours.get(&(route.device, route.hop));
    let Some(target) = neighbour.and_then(Neighbour::mac) else {
        return Err(NO_NEIGHBOUR.to_owned());
    };
    // The innermost device was found first, its tag is the innermost.
    let mut vlans = [0; 2];
    for (place, (tpid, id)) in vlans.iter_mut().zip(tags.iter().rev()) {
        let (tpid, id) = (tpid.to_be_bytes(), id.to_be_bytes());
        *place = u32::from_ne_bytes([tpid[0], tpid[1], id[0], id[1]]);
    }
    let mtu = route.mtu.unwrap_or(device.mtu).min(device.mtu);
    let link = Link { ifindex, macs: macs(target, source), vlans };
    Ok(Path { link, mtu: u16::try_from(mtu).unwrap_or(u16::MAX) })
}

/// Destination and source as at the start of a frame.
fn macs(d: [u8; 6], s: [u8; 6]) -> [u32; 3] {
    [
        u32::from_ne_bytes([d[0], d[1], d[2], d[3]]),
        u32::from_ne_bytes([d[4], d[5], s[0], s[1]]),
        u32::from_ne_bytes([s[2], s[3], s[4], s[5]]),
    ]
}

/// What was found out about each address.
pub type Reachability = BTreeMap<IpAddr, Reach>;

/// Says which interfaces have our program, by index.
pub type AttachedNow = Box<dyn Fn() -> BTreeSet<u32> + Send + Sync>;

/// Follows how `addresses`, which may change, are reached. The first value comes after one look at everything.
pub async fn follow(
    mut addresses: watch::Receiver<BTreeSet<IpAddr>>,
    attached: AttachedNow,
) -> Result<(watch::Receiver<Reachability>, JoinHandle<()>), Error> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ];
    let (connection, handle, mut changes) = new_multicast_connection(&groups)?;
    let connection = tokio::spawn(connection);
    let mut follower = Follower {
        handle,
        addresses: addresses.borrow_and_update().clone(),
        attached,
        asked: BTreeMap::new(),
        touched: None,
        last: BTreeMap::new(),
    };
    let (sender, receiver) = watch::channel(follower.look().await?);
    let task = tokio::spawn(async move {
        let mut tick = tokio::time::interval(ASK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            let pending = sender.borrow().values().any(|reach| matches!(reach, Reach::Down(_)));
            tokio::select! {
                change = changes.next() => {
                    if change.is_none() {
                        log::error!("the netlink socket was closed; neighbours are not followed any more");
                        break;
                    }
                    tokio::time::sleep(SETTLE).await;
                    while changes.try_recv().is_ok() {}
                }
                _ = tick.tick() => {
                    if !pending && last.elapsed() < REFRESH {
                        continue;
                    }
                }
                changed = addresses.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    follower.addresses.clone_from(&addresses.borrow_and_update());
                }
                () = sender.closed() => break,
            }
            last = Instant::now();
            match follower.look().await {
                Ok(found) => {
                    sender.send_if_modified(|old| {
                        let modified = *old != found;
                        *old = found;
                        modified
                    });
                }
                Err(error) => log::warn!("{error}"),
            }
        }
        connection.abort();
    });
    Ok((receiver, task))
}

/// True when the kernel has asked for the neighbour and got no answer.
fn dead(route: Option<Route>, snapshot: &Snapshot) -> bool {
    let neighbour = route.and_then(|route| snapshot.neighbours.get(&(route.device, route.hop)));
    neighbour.is_some_and(|neighbour| neighbour.state == NeighbourState::Failed)
}

/// Bridges the time in which a neighbour is not known because the kernel has just forgotten it.
fn bridged(last: &mut BTreeMap<IpAddr, (Path, Instant)>, address: IpAddr, reach: Reach, dead: bool) -> Reach {
    match (&reach, last.get(&address)) {
        (Reach::Up(path), _) => {
            last.insert(address, (path.clone(), Instant::now()));
        }
        (Reach::Down(reason), Some((path, at)))
            if reason == NO_NEIGHBOUR && !dead && at.elapsed() < GRACE =>
        {
            return Reach::Up(path.clone());
        }
        (Reach::Down(_), _) => {
            last.remove(&address);
        }
    }
    reach
}

struct Follower {
    handle: Handle,
    addresses: BTreeSet<IpAddr>,
    attached: AttachedNow,
    /// When a neighbour was last asked for.
    asked: BTreeMap<(u32, IpAddr), Instant>,
    /// When neighbours in use were last touched.
    touched: Option<Instant>,
    /// How an address was last reached, and when.
    last: BTreeMap<IpAddr, (Path, Instant)>,
}

impl Follower {
    async fn look(&mut self) -> Result<Reachability, Error> {
        let snapshot = self.snapshot().await?;
        let touch = self.touched.is_none_or(|at| at.elapsed() >= REFRESH);
        if touch {
            self.touched = Some(Instant::now());
            self.asked.retain(|_, at| at.elapsed() < REFRESH);
        }
        let attached = (self.attached)();
        let mut found = BTreeMap::new();
        let mut hops = BTreeSet::new();
        for address in &self.addresses {
            let route = route(&self.handle, *address).await;
            let reach = resolve(route, &snapshot, &attached);
            found.insert(*address, bridged(&mut self.last, *address, reach, dead(route, &snapshot)));
            if let Some(route) = route.filter(|route| !route.local) {
                hops.insert((route.device, route.hop));
            }
        }
        for hop in hops {
            let neighbour = snapshot.neighbours.get(&hop);
            let known = neighbour.and_then(Neighbour::mac).is_some();
            let wanted = if known {
                touch && neighbour.is_some_and(Neighbour::ages)
            } else {
                self.asked.get(&hop).is_none_or(|at| at.elapsed() >= ASK / 2)
            };
            if wanted {
                self.asked.insert(hop, Instant::now());
                self.ask(hop).await;
            }
        }
        Ok(found)
    }

    /// Tells the kernel that a neighbour is used: it resolves it, or checks that it is still there.
    async fn ask(&self, (device, hop): (u32, IpAddr)) {
        let request = self.handle.neighbours().add(device, hop);
        let request = request.flags(NeighbourFlags::Use).state(NeighbourState::None).replace();
        if let Err(error) = request.execute().await {
            log::debug!("asking for neighbour {hop}: {error}");
        }
    }

    async fn snapshot(&self) -> Result<Snapshot, Error> {
        let dump = |what| move |source| Error::Dump { what, source };
        let mut links = self.handle.link().get().execute();
        let mut devices = BTreeMap::new();
        while let Some(link) = links.try_next().await.map_err(dump("devices"))? {
            devices.insert(link.header.index, device(&link));
        }
        let mut entries = self.handle.neighbours().get().execute();
        let mut neighbours = BTreeMap::new();
        while let Some(entry) = entries.try_next().await.map_err(dump("neighbours"))? {
            neighbours.extend(neighbour(&entry));
        }
        Ok(Snapshot { devices, neighbours })
    }
}

fn device(message: &LinkMessage) -> Device {
    let mut device = Device { up: message.header.flags.contains(LinkFlags::Up), ..Device::default() };
    for attribute in &message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            device.name.clone_from(name);
        } else if let LinkAttribute::Address(mac) = attribute {
            device.mac = mac.as_slice().try_into().ok();
        } else if let LinkAttribute::Mtu(mtu) = attribute {
            device.mtu = *mtu;
        } else if let LinkAttribute::Link(lower) = attribute {
            device.lower = Some(*lower);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            device.tag = infos.iter().find_map(vlan_tag);
        }
    }
    device
}

fn vlan_tag(info: &LinkInfo) -> Option<(u16, u16)> {
    let LinkInfo::Data(InfoData::Vlan(infos)) = info else { return None };
    let mut tag = (u16::from(VlanProtocol::Ieee8021Q), None);
    for info in infos {
        if let InfoVlan::Id(id) = info {
            tag.1 = Some(*id);
        } else if let InfoVlan::Protocol(protocol) = info {
            tag.0 = u16::from(*protocol);
        }
    }
    Some((tag.0, tag.1?))
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), Neighbour)> {
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) = attribute {
            address = Some(IpAddr::V4(*v4));
        } else if let NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) = attribute {
            address = Some(IpAddr::V6(*v6));
        } else if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
            mac = bytes.as_slice().try_into().ok();
        }
    }
    Some(((message.header.ifindex, address?), Neighbour { mac, state: message.header.state }))
}

/// Asks the kernel how it would route to an address; `None` when it would not.
async fn route(handle: &Handle, address: IpAddr) -> Option<Route> {
    let request = match address {
        IpAddr::V4(v4) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(v4, 32).build(),
        IpAddr::V6(v6) => {
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(v6, 128).build()
        }
    };
    let mut answers = Box::pin(handle.route().get(request).execute());
    match answers.try_next().await {
        Ok(message) => read_route(&message?, address),
        Err(error) => {
            log::debug!("route to {address}: {error}");
            None
        }
    }
}

fn read_route(message: &RouteMessage, address: IpAddr) -> Option<Route> {
    let local = message.header.kind == RouteType::Local;
    if !local && message.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut device, mut hop, mut mtu) = (None, address, None);
    for attribute in &message.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            device = Some(*index);
        } else if let RouteAttribute::Gateway(RouteAddress::Inet(v4)) = attribute {
            hop = IpAddr::V4(*v4);
        } else if let RouteAttribute::Gateway(RouteAddress::Inet6(v6)) = attribute {
            hop = IpAddr::V6(*v6);
        } else if let RouteAttribute::Via(RouteVia::Inet6(v6)) = attribute {
            hop = IpAddr::V6(*v6);
        } else if let RouteAttribute::Metrics(metrics) = attribute {
            mtu = metrics.iter().find_map(route_mtu);
        }
    }
    Some(Route { device: device?, hop, mtu, local })
}

fn route_mtu(metric: &RouteMetric) -> Option<u32> {
    if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOP: &str = "10.0.0.254";

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn route() -> Route {
        Route { device: 5, hop: ip(HOP), mtu: None, local: false }
    }

    /// vlan 20 (5) in service vlan 10 (4) on eth0 (3).
    fn snapshot() -> Snapshot {
        let device = |name: &str, last, tag, lower| Device {
            name: name.to_owned(),
            mac: Some([2, 0, 0, 0, 0, last]),
            mtu: 1500,
            up: true,
            tag,
            lower,
        };
        Snapshot {
            devices: BTreeMap::from([
                (3, device("eth0", 3, None, None)),
                (4, device("eth0.10", 4, Some((0x88a8, 10)), Some(3))),
                (5, device("eth0.10.20", 5, Some((0x8100, 0x123)), Some(4))),
            ]),
            neighbours: BTreeMap::from([(
                (5, ip(HOP)),
                Neighbour { mac: Some([0xaa, 1, 2, 3, 4, 5]), state: NeighbourState::Stale },
            )]),
        }
    }

    fn reason(route: Option<Route>, snapshot: &Snapshot, attached: &[u32]) -> String {
        match resolve(route, snapshot, &attached.iter().copied().collect()) {
            Reach::Down(reason) => reason,
            Reach::Up(path) => panic!("reached by {path:?}"),
        }
    }

    #[test]
    fn a_path_through_two_vlans_has_the_bytes_of_the_wire() {
        let Reach::Up(path) = resolve(Some(route()), &snapshot(), &BTreeSet::from([3])) else {
            panic!("not reached");
        };
        let bytes: Vec<u8> = path.link.macs.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, [0xaa, 1, 2, 3, 4, 5, 2, 0, 0, 0, 0, 5]);
        assert_eq!(path.link.vlans.map(u32::to_ne_bytes), [[0x88, 0xa8, 0, 10], [0x81, 0, 1, 0x23]]);
        assert_eq!((path.link.ifindex, path.mtu), (3, 1500));
    }

    #[test]
    fn the_smaller_mtu_counts() {
        for (mtu, expected) in [(Some(1400), 1400), (Some(9000), 1500), (None, 1500)] {
            let reach = resolve(Some(Route { mtu, ..route() }), &snapshot(), &BTreeSet::from([3]));
            assert!(matches!(reach, Reach::Up(path) if path.mtu == expected));
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let good = snapshot();
        assert_eq!(reason(None, &good, &[3]), "no route");
        assert_eq!(reason(Some(Route { device: 9, ..route() }), &good, &[3]), "no route");
        assert_eq!(reason(Some(Route { local: true, ..route() }), &good, &[3]), "is an address of this host");
        assert_eq!(reason(Some(route()), &good, &[5]), "interface eth0 not attached");
        assert_eq!(reason(Some(Route { hop: ip("10.0.0.1"), ..route() }), &good, &[3]), "no neighbour");
        let mut bad = snapshot();
        bad.neighbours.values_mut().for_each(|one| one.state = NeighbourState::Failed);
        assert_eq!(reason(Some(route()), &bad, &[3]), "no neighbour");
        let mut bad = snapshot();
        bad.devices.values_mut().for_each(|one| one.up = false);
        assert_eq!(reason(Some(route()), &bad, &[3]), "interface eth0.10.20 is down");
        let mut bad = snapshot();
        bad.devices.values_mut().for_each(|one| one.mac = None);
        assert!(reason(Some(route()), &bad, &[3]).contains("no Ethernet address"));
        let mut bad = snapshot();
        bad.devices.remove(&3);
        assert!(reason(Some(route()), &bad, &[3]).contains("below eth0.10"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_forgotten_neighbour_is_bridged_and_a_dead_one_is_not() {
        let address = ip(HOP);
        let up = resolve(Some(route()), &snapshot(), &BTreeSet::from([3]));
        let gone = Reach::Down(NO_NEIGHBOUR.to_owned());
        let mut last = BTreeMap::new();
        assert_eq!(bridged(&mut last, address, gone.clone(), false), gone, "never known");
        assert_eq!(bridged(&mut last, address, up.clone(), false), up);
        tokio::time::advance(GRACE / 2).await;
        assert_eq!(bridged(&mut last, address, gone.clone(), false), up);
        tokio::time::advance(GRACE).await;
        assert_eq!(bridged(&mut last, address, gone.clone(), false), gone);
        assert_eq!(bridged(&mut last, address, up.clone(), false), up);
        assert_eq!(bridged(&mut last, address, gone.clone(), true), gone);
    }

    #[tokio::test]
    async fn the_kernel_answers() {
        let loopback = ip("127.0.0.1");
        let wanted = watch::Sender::new(BTreeSet::from([loopback]));
        let (found, task) = follow(wanted.subscribe(), Box::new(BTreeSet::new)).await.expect("netlink");
        let reach = found.borrow().get(&loopback).cloned();
        assert_eq!(reach, Some(Reach::Down("is an address of this host".to_owned())));
        drop(found);
        task.await.expect("ends when nobody listens");
    }
}
