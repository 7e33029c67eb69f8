//! What the operator says of backends while the daemon runs. It comes on top of the file until the file is
//! read again, and is checked as if the file said it.

use std::{collections::BTreeMap, mem};

use serde::{Deserialize, Serialize};

use super::{
    AdminState, Config, Error, Meeting, STATES, Text, clash,
    qos::CLASS_WEIGHT,
    raw::{self, OneOrMany},
    written,
    written::chosen,
};
use crate::api;

/// What the operator said of backends, by `service/backend`, and of the weights of classes, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Amendments(BTreeMap<String, Amendment>);

/// What was said of one backend. What is left out is as the file says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Amendment {
    /// It is there, in place of the file's backend of this name, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    added: Option<api::NewBackend>,
    /// It is not there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    removed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<AdminState>,
    /// When a drain ends and the backend goes offline, in seconds of Unix time.
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline: Option<u64>,
}

fn full(service: &str, backend: &str) -> String {
    format!("{service}/{backend}")
}

impl Amendments {
    /// Changes a backend. `now` is Unix time in seconds.
    pub fn change(&mut self, service: &str, backend: &str, change: &api::BackendChange, now: u64) {
        let said = self.0.entry(full(service, backend)).or_default();
        if let Some(weight) = change.weight {
            said.weight = Some(weight);
        }
        if let Some(state) = change.state {
            said.state = Some(state);
            said.deadline = change.deadline_seconds.map(|seconds| now.saturating_add(seconds.into()));
        }
        self.0.retain(|_, said| *said != Amendment::default());
    }

    /// Changes the weight of a class.
    pub fn weigh(&mut self, class: &str, weight: u32) {
        self.0.entry(class.to_owned()).or_default().weight = Some(weight);
    }

    /// Adds a backend.
    pub fn add(&mut self, service: &str, backend: &str, added: api::NewBackend) {
        let said = Amendment { added: Some(added), ..Amendment::default() };
        self.0.insert(full(service, backend), said);
    }

    /// Removes a backend.
    pub fn remove(&mut self, service: &str, backend: &str, file: &Config) {
        let name = full(service, backend);
        let mut there = file.services.iter().filter(|one| one.name == service).flat_map(|one| &one.backends);
        if there.any(|one| one.name == backend) {
            self.0.insert(name, Amendment { removed: true, ..Amendment::default() });
        } else {
            self.0.remove(&name);
        }
    }

    /// Backends whose drain ends, and when, in Unix time in seconds.
    pub fn deadlines(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().filter_map(|(name, said)| Some((name.as_str(), said.deadline?)))
    }

    /// Takes backends offline whose drain is over; returns which.
    pub fn expire(&mut self, now: u64) -> Vec<String> {
        let mut over = Vec::new();
        for (name, said) in &mut self.0 {
            if said.deadline.is_some_and(|deadline| deadline <= now) {
                (said.state, said.deadline) = (Some(AdminState::Offline), None);
                over.push(name.clone());
            }
        }
        over
    }
}

impl Config {
    /// This configuration with what the operator said.
    pub fn amended(&self, amendments: &Amendments) -> Result<Self, Error> {
        if amendments.0.is_empty() {
            return Ok(self.clone());
        }
        let mut by_service: BTreeMap<&str, Vec<(&str, &Amendment)>> = BTreeMap::new();
        let mut config = self.clone();
        for (name, said) in &amendments.0 {
            match name.split_once('/') {
                Some((service, backend)) => by_service.entry(service).or_default().push((backend, said)),
                None => weigh(&mut config, name, said)?,
            }
        }
        for (service, said) in by_service {
            amend(&mut config, service, &said)?;
        }
        let mut names = BTreeMap::new();
        for service in &config.services {
            for backend in &service.backends {
                let name = full(&service.name, &backend.name);
                if let Some(other) = names.insert(backend.id, name.clone()) {
                    return Err(amended("service.backend.name", clash(&name, &other)));
                }
            }
        }
        match config.meeting() {
            Some(Meeting { place, problem, .. }) => Err(amended(place.key(), problem)),
            None => Ok(config),
        }
    }

    /// This configuration with what still goes with it; the rest is taken out and returned.
    pub fn amended_where_it_fits(&self, amendments: &mut Amendments) -> (Self, Vec<Error>) {
        if let Ok(config) = self.amended(amendments) {
            return (config, Vec::new());
        }
        let (mut config, mut errors) = (self.clone(), Vec::new());
        for (name, said) in mem::take(&mut amendments.0) {
            amendments.0.insert(name.clone(), said);
            match self.amended(amendments) {
                Ok(more) => config = more,
                Err(error) => {
                    amendments.0.remove(&name);
                    errors.push(error);
                }
            }
        }
        (config, errors)
    }
}

/// Changes the weight of a class.
fn weigh(config: &mut Config, class: &str, said: &Amendment) -> Result<(), Error> {
    let found = config.classes.iter_mut().find(|one| one.name == class);
    let found = found.ok_or_else(|| amended(class, "there is no such class"))?;
    let Some(weight) = said.weight else { return Ok(()) };
    if !CLASS_WEIGHT.contains(&weight.into()) {
        let (least, most) = (CLASS_WEIGHT.start(), CLASS_WEIGHT.end());
        return Err(amended(class, format!("a weight of {weight} is out of range; use {least} to {most}")));
    }
    found.weight = weight;
    Ok(())
}

fn amended(key: impl Into<String>, problem: impl Into<String>) -> Error {
    Error::Amended { key: key.into(), problem: problem.into() }
}

/// Changes a service: as a file that has no other, it is written, changed and read again.
fn amend(config: &mut Config, service: &str, said: &[(&str, &Amendment)]) -> Result<(), Error> {
    let (capacities, classes) = (config.capacities, config.classes.clone());
    let place = config.services.iter_mut().find(|one| one.name == service);
    let Some(place) = place else {
        let first = said.first().map_or("", |(backend, _)| backend);
        return Err(amended(full(service, first), "there is no such service"));
    };
    let mut file =
        written(&Config { services: vec![place.clone()], capacities, classes, ..Config::default() });
    // A file must name one.
    file.interfaces = vec!["lo".to_owned().into()];
    for one in &mut file.service {
        for (backend, said) in said {
            change(&mut one.backend, backend, said)
                .map_err(|problem| amended(full(service, backend), problem))?;
        }
    }
    let text = toml::to_string(&file).map_err(|error| amended("file", error.to_string()))?;
    let (_, read) = Text { text: &text }.config(&[]).map_err(|error| match error {
        // The text is ours: its lines are nobody's.
        Error::Invalid { key, problem, .. } => amended(key, problem),
        Error::Read { .. } | Error::Amended { .. } => error,
    })?;
    if let Some(read) = read.services.into_iter().next() {
        *place = read;
    }
    Ok(())
}

fn change(backends: &mut Vec<raw::Backend>, backend: &str, said: &Amendment) -> Result<(), &'static str> {
    let mut at = backends.iter().position(|one| one.name.get_ref() == backend);
    if let Some(added) = &said.added {
        let ids = &added.quic_server_ids;
        let new = raw::Backend {
            name: backend.to_owned().into(),
            address: OneOrMany::Many(added.addresses.clone()).into(),
            weight: added.weight.map(|weight| i64::from(weight).into()),
            state: added.state.and_then(|state| chosen(&STATES, &state)),
            quic_server_id: (!ids.is_empty()).then(|| OneOrMany::Many(ids.clone()).into()),
            limits: None,
        };
        match at.and_then(|at| backends.get_mut(at)) {
            Some(old) => *old = new,
            None => {
                at = Some(backends.len());
                backends.push(new);
            }
        }
    }
    let at = at.ok_or("there is no such backend")?;
    if said.removed {
        backends.remove(at);
        return Ok(());
    }
    let Some(found) = backends.get_mut(at) else { return Ok(()) };
    if let Some(weight) = said.weight {
        found.weight = Some(i64::from(weight).into());
    }
    if let Some(state) = said.state {
        found.state = chosen(&STATES, &state);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "interfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:443\"\n\
                        [[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1:443\"\nweight = 2\n\
                        [[service.backend]]\nname = \"b\"\naddress = \"10.0.0.2:443\"\n";

    fn file() -> Config {
        Config::parse(TEXT, &[]).expect("good")
    }

    fn with(amendments: &Amendments) -> Config {
        file().amended(amendments).unwrap_or_else(|error| panic!("{error}"))
    }

    fn problem(amendments: &Amendments) -> String {
        file().amended(amendments).expect_err("not good").to_string()
    }

    fn new(address: &str) -> api::NewBackend {
        api::NewBackend { addresses: vec![address.to_owned()], ..api::NewBackend::default() }
    }

    fn drain(seconds: Option<u32>) -> api::BackendChange {
        api::BackendChange {
            state: Some(AdminState::Drain),
            deadline_seconds: seconds,
            ..api::BackendChange::default()
        }
    }

    /// Name, weight, state.
    fn backends(config: &Config) -> Vec<(&str, u32, AdminState)> {
        let all = config.services.iter().flat_map(|service| &service.backends);
        all.map(|one| (one.name.as_str(), one.weight, one.state)).collect()
    }

    #[test]
    fn nothing_said_is_the_file() {
        assert_eq!(with(&Amendments::default()), file());
        let mut said = Amendments::default();
        said.change("web", "a", &api::BackendChange::default(), 0);
        assert_eq!(with(&said), file());
    }

    #[test]
    fn what_is_said_adds_up() {
        use AdminState::{Drain, Enabled, Offline};
        let mut said = Amendments::default();
        let weight = api::BackendChange { weight: Some(7), ..api::BackendChange::default() };
        said.change("web", "a", &weight, 0);
        said.change("web", "a", &drain(Some(30)), 1000);
        said.add("web", "c", new("[fd00::3]:443"));
        said.change("web", "c", &weight, 0);
        assert_eq!(backends(&with(&said)), [("a", 7, Drain), ("b", 1, Enabled), ("c", 7, Enabled)]);
        assert_eq!(said.deadlines().collect::<Vec<_>>(), [("web/a", 1030)]);
        assert_eq!(said.expire(1029), [""; 0]);
        assert_eq!(said.expire(1030), ["web/a"]);
        assert_eq!(backends(&with(&said))[0], ("a", 7, Offline));
        said.remove("web", "a", &file());
        said.remove("web", "c", &file());
        assert_eq!(backends(&with(&said)), [("b", 1, Enabled)]);
        // Another server under a name of the file.
        said.add("web", "a", new("10.0.0.9:443"));
        let config = with(&said);
        assert_eq!(backends(&config), [("a", 1, Enabled), ("b", 1, Enabled)]);
        assert_eq!(config.services[0].backends[0].v4, "10.0.0.9:443".parse().ok());
        // It is kept as JSON.
        let text = serde_json::to_string(&said).expect("json");
        assert_eq!(serde_json::from_str::<Amendments>(&text).expect("the same"), said);
    }

    #[test]
    fn a_new_state_ends_a_deadline() {
        let mut said = Amendments::default();
        said.change("web", "a", &drain(Some(30)), 0);
        said.change("web", "a", &drain(None), 0);
        assert_eq!(said.deadlines().count(), 0);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let said = |edit: &dyn Fn(&mut Amendments)| {
            let mut said = Amendments::default();
            edit(&mut said);
            problem(&said)
        };
        let weight = |weight| api::BackendChange { weight: Some(weight), ..api::BackendChange::default() };
        type Case<'c> = (&'c dyn Fn(&mut Amendments), &'c str);
        let cases: [Case<'_>; 8] = [
            (&|said| said.add("web", "c", new("192.0.2.1:80")), "is a VIP too"),
            (&|said| said.add("web", "c", new("10.0.0.2:443")), "is backend b already"),
            (&|said| said.add("web", "c", new("10.0.0.2")), "has no port"),
            (&|said| said.add("web", "c d", new("10.0.0.3:443")), "is no name"),
            (&|said| said.add("shop", "c", new("10.0.0.3:443")), "no such service"),
            (&|said| said.change("web", "c", &weight(1), 0), "no such backend"),
            (&|said| said.change("web", "a", &weight(70_000), 0), "out of range; use 0 to 65535"),
            (
                &|said| {
                    said.remove("web", "a", &file());
                    said.remove("web", "b", &file());
                },
                "service web has no backend",
            ),
        ];
        for (edit, expected) in cases {
            let found = said(edit);
            assert!(found.contains(expected) && !found.contains("line"), "{found}");
        }
    }

    #[test]
    fn after_a_restart_the_rest_is_kept() {
        let mut said = Amendments::default();
        said.change("web", "a", &drain(None), 0);
        said.change("web", "gone", &drain(None), 0);
        said.add("shop", "c", new("10.0.0.3:443"));
        let (config, errors) = file().amended_where_it_fits(&mut said);
        assert_eq!(backends(&config)[0].2, AdminState::Drain);
        assert_eq!(errors.len(), 2, "{errors:?}");
        assert_eq!(with(&said), config);
    }
}
