//! Actual state out of the maps: what a daemon before us wrote, wherever it was when it ended.
//!
//! Nothing else is kept anywhere, so nothing can disagree with the maps. Of what was half made only that is
//! taken which packets can meet: a table to which no frontend points, an endpoint without an index are
//! written anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use dispatcher_common::{
    abi::REPLAY_MAPS,
    addr::Addr,
    globals::Globals,
    http,
    service::{
        BACKEND_DEAD, BACKEND_UNHEALTHY, BACKEND_UP, Backend as Endpoint, FRONTEND_REFUSED, endpoint_index,
    },
    session::{KIND_QUIC_SERVER, STATE_CONFIGURED, TICKET_UNKNOWN},
};

use super::{Actual, BackendSlot, FrontendSlot, Table, Unhealthy, vip_key};
use crate::dataplane::{Dataplane, Error};

impl Actual {
    /// What the maps say. The replay maps belong to the programs of this process and are empty: they are
    /// pointed at the interfaces that the endpoints ask for.
    pub fn take_over(dataplane: &Dataplane) -> Result<Self, Error> {
        let mut actual = Self::default();
        actual.read_backends(dataplane)?;
        actual.read_frontends(dataplane)?;
        actual.read_sources(dataplane)?;
        actual.read_cookies(dataplane)?;
        actual.read_server_ids(dataplane)?;
        actual.read_filter(dataplane);
        actual.write_replays(dataplane);
        Ok(actual)
    }

    /// What is known of tickets (`session::TICKET_*`), by backend id.
    pub(crate) fn tickets(&self) -> BTreeMap<u32, u32> {
        let known = |slot: &BackendSlot| slot.endpoints.iter().map(|one| one.ticket).max();
        let all = self.backends.iter().filter_map(|(id, slot)| Some((*id, known(slot)?)));
        all.filter(|(_, ticket)| *ticket != TICKET_UNKNOWN).collect()
    }

    /// What health checks took out, by backend id and family: it stays out until they find it good again.
    pub(crate) fn health(&self) -> BTreeMap<(u32, bool), Unhealthy> {
        let out = |(id, slot): (&u32, &BackendSlot)| {
            let id = *id;
            let known = slot.endpoints.map(|endpoint| {
                let dead = endpoint.flags & BACKEND_DEAD != 0;
                let reason = "health: it was down before dispatcherd was started".to_owned();
                (endpoint.flags & BACKEND_UNHEALTHY != 0).then_some(Unhealthy { reason, dead })
            });
            let both = [true, false].into_iter().zip(known);
            both.filter_map(move |(v4, known)| Some(((id, v4), known?)))
        };
        self.backends.iter().flat_map(out).collect()
    }

    fn read_backends(&mut self, dataplane: &Dataplane) -> Result<(), Error> {
        for (id, index) in dataplane.backend_index().iter() {
            self.backends.insert(id, BackendSlot { index, indexed: true, ..BackendSlot::default() });
        }
        for index in 0..dataplane.backend_index().capacity() {
            let read = |v4| dataplane.backends().get(endpoint_index(index, v4));
            let endpoints = [read(true)?, read(false)?];
            let Some(id) = endpoints.iter().map(|endpoint| endpoint.id).find(|id| *id != 0) else { continue };
            let slot = self.backends.entry(id).or_insert(BackendSlot { index, ..BackendSlot::default() });
            if slot.index == index {
                slot.endpoints = endpoints;
            }
        }
        self.room = dataplane.backend_index().capacity();
        // Nothing tells which of them was given last: most likely it is the highest.
        let highest = self.backends.values().map(|slot| slot.index).max();
        self.next_backend = highest.map_or(0, |index| index.saturating_add(1));
        Ok(())
    }

    fn read_frontends(&mut self, dataplane: &Dataplane) -> Result<(), Error> {
        for index in 0..dataplane.frontends().capacity() {
            let mut frontend = dataplane.frontends().get(index)?;
            if frontend.service == 0 {
                continue;
            }
            let address = SocketAddr::new(frontend.addr.into(), u16::from_be(frontend.port));
            let vip = (address, frontend.proto);
            let published = dataplane.vips().get(&vip_key(&vip))? == Some(index);
            if !published && self.frontends.contains_key(&vip) {
                continue;
            }
            frontend.flags &= !FRONTEND_REFUSED;
            frontend.cid_lengths = 0;
            let table = frontend.table_base..frontend.table_base.saturating_add(frontend.table_len);
            if !table.is_empty() {
                let entries: Result<Vec<u32>, Error> =
                    table.clone().map(|at| dataplane.lb_table().get(at)).collect();
                self.tables.insert(table.start, Table::found(entries?));
            }
            self.frontends.insert(vip, FrontendSlot { index, frontend, published });
        }
        Ok(())
    }

    fn read_sources(&mut self, dataplane: &Dataplane) -> Result<(), Error> {
        for index in 0..dataplane.sources().capacity() {
            self.sources.push(dataplane.sources().get(index)?.into());
        }
        let none = IpAddr::from(Addr::default());
        let used = self.sources.iter().rposition(|one| *one != none).map_or(0, |last| last + 1);
        self.sources.truncate(used);
        Ok(())
    }

    fn read_cookies(&mut self, dataplane: &Dataplane) -> Result<(), Error> {
        let mut again = Box::new([0; http::TABLE]);
        let mut room = [0; http::NAME_MAX];
        for index in 0..dataplane.cookies().capacity() {
            let table = dataplane.cookies().get(index)?;
            let name = http::name_of(&table, &mut again, &mut room);
            self.cookies.push(name.unwrap_or_default().to_owned());
        }
        let used = self.cookies.iter().rposition(|one| !one.is_empty()).map_or(0, |last| last + 1);
        self.cookies.truncate(used);
        Ok(())
    }

    fn read_server_ids(&mut self, dataplane: &Dataplane) -> Result<(), Error> {
        for key in dataplane.sessions().keys().filter(|key| key.kind == KIND_QUIC_SERVER) {
            if let Some(session) = dataplane.sessions().get(&key)?
                && session.state == STATE_CONFIGURED
            {
                self.server_ids.insert((key.service, key.id().to_vec()), session.backends[0]);
            }
        }
        Ok(())
    }

    /// The filter holds bits of hashes: it is known if they are those of the addresses that it should have.
    fn read_filter(&mut self, dataplane: &Dataplane) {
        let endpoints = self.backends.values().flat_map(|slot| &slot.endpoints).filter(|one| one.id != 0);
        let addresses = endpoints.map(|endpoint| endpoint.addr.into());
        let addresses: BTreeSet<IpAddr> =
            addresses.chain(self.frontends.keys().map(|(vip, _)| vip.ip())).collect();
        let mut globals = Globals::default();
        addresses.iter().for_each(|address| globals.filter_add(*address));
        if globals.filter == dataplane.globals().filter {
            self.filter = addresses;
        }
    }

    fn write_replays(&mut self, dataplane: &Dataplane) {
        let mut wanted = [0; REPLAY_MAPS as usize];
        let mut endpoints: Vec<&Endpoint> = self.backends.values().flat_map(|slot| &slot.endpoints).collect();
        endpoints.retain(|endpoint| endpoint.link.ifindex != 0);
        // Where two want different ones, the one that is up is right.
        endpoints.sort_by_key(|endpoint| endpoint.flags & BACKEND_UP);
        for endpoint in endpoints {
            if let Some(place) = wanted.get_mut(usize::from(endpoint.replay)) {
                *place = endpoint.link.ifindex;
            }
        }
        for (number, ifindex) in (0..).zip(wanted).filter(|(_, ifindex)| *ifindex != 0) {
            match dataplane.set_replay(number, ifindex) {
                Ok(()) => self.record(&super::Change::Replay { number, ifindex }),
                // The interface is gone; whoever is reached by another way gets another one.
                Err(error) => log::debug!("{error}"),
            }
        }
    }
}
