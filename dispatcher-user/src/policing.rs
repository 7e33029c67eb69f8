//! What the data path is told of classes and limits.

use std::collections::BTreeMap;

use crate::{
    config::{Config, named_class},
    dataplane::{ClassSetting, Dataplane, Error, Limits, NameClass, NetworkClass},
    reconcile::Actual,
};

/// Classes, limits by the place of the backend, and classes of client networks and server names.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Policing {
    classes: Vec<ClassSetting>,
    limits: BTreeMap<u32, Limits>,
    networks: Vec<NetworkClass>,
    names: Vec<NameClass>,
}

impl Policing {
    /// What a configuration says.
    pub(crate) fn of(config: &Config, actual: &Actual) -> Self {
        let classes = config.classes.iter().map(|class| ClassSetting {
            id: class.id,
            weight: class.weight,
            lend: class.lend,
            borrow_limit: class.borrow_limit,
            ceil: class.ceil,
            dscp: class.dscp,
        });
        // What the daemon serves itself, it does not police here.
        let ours = || config.services.iter().filter(|service| !service.mode.is_local());
        let limits: BTreeMap<u32, Limits> = ours()
            .flat_map(|service| {
                service.backends.iter().map(move |backend| (backend.id, service.limits_of(backend)))
            })
            .map(|(id, limits)| {
                let (bandwidth, connections_per_second) = (limits.bandwidth, limits.connections_per_second);
                (id, Limits { bandwidth, connections_per_second })
            })
            .collect();
        let place = |(id, index)| Some((index, limits.get(&id).copied().unwrap_or_default()));
        let networks = ours().flat_map(|service| {
            service.rules.iter().flat_map(move |rule| {
                rule.clients.iter().map(move |network| NetworkClass {
                    service: service.id,
                    address: network.address,
                    prefix: network.prefix,
                    class: named_class(&rule.class),
                })
            })
        });
        let names = ours().flat_map(|service| {
            service.rules.iter().filter_map(|rule| {
                let name = rule.server_name.clone()?;
                Some(NameClass { service: service.id, name, class: named_class(&rule.class) })
            })
        });
        Self {
            classes: classes.collect(),
            limits: actual.backend_indexes().filter_map(place).collect(),
            networks: networks.collect(),
            names: names.collect(),
        }
    }

    /// Writes it.
    pub(crate) fn apply(&self, dataplane: &Dataplane) -> Result<(), Error> {
        dataplane.set_classes(&self.classes)?;
        for (index, limits) in &self.limits {
            dataplane.set_limits(*index, *limits)?;
        }
        dataplane.set_networks(&self.networks)?;
        dataplane.set_names(&self.names)
    }
}
