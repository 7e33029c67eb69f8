//! A new configuration for a running daemon: read, checked and compared as a whole, then put in force.
//! What it does not change is not touched: flows and sessions stay.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    api,
    config::{self, Backend, Config, Interface, Shortage, changes},
    dataplane,
    reconcile::Reach,
    state::Shared,
};

/// How long new backends may take to be reached before the configuration is put in force without them.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where the configuration comes from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Interfaces of the command line, on top of those in the file.
    pub interfaces: Vec<Interface>,
    /// The control socket of the command line, instead of the file's.
    pub control: Option<PathBuf>,
}

impl Source {
    /// Reads and checks the file.
    pub fn load(&self) -> Result<Config, config::Error> {
        let mut config = Config::load(&self.path, &self.interfaces)?;
        if let Some(control) = &self.control {
            config.control.clone_from(control);
        }
        Ok(config)
    }
}

/// Why nothing was reloaded, or not all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("dispatcherd runs without --config, so there is nothing to reload; restart it with one")]
    NoFile,
    #[error("{0}; nothing was changed")]
    Config(#[from] config::Error),
    #[error("these need a restart, so nothing was changed: {}", .0.join("; "))]
    Restart(Vec<String>),
    #[error(
        "the maps have a capacity {name} of {have}, the services need {need}; nothing was changed. Maps that were taken over keep their sizes: `dispatcherctl detach` and a start give them new ones, and end connections and sessions",
        name = .0.name, have = .0.have, need = .0.need
    )]
    Shortage(Shortage),
    #[error("{0}; nothing was changed")]
    Interface(dataplane::Error),
    #[error(
        "{0}; the configuration is in force, but the maps are behind it: this is tried again with the next change"
    )]
    Maps(dataplane::Error),
}

/// Puts the file in force, or only says what that would change.
pub(crate) async fn reload(shared: &Arc<Shared>, dry_run: bool) -> Result<api::Reload, Error> {
    let _turn = shared.reloading.lock().await;
    let source = shared.source.clone().ok_or(Error::NoFile)?;
    let old = shared.config();
    let new = source.load()?;
    let found = changes(&old, &new);
    if !found.restart.is_empty() {
        return Err(Error::Restart(found.restart));
    }
    if let Some(shortage) = new.shortage(shared.dataplane.capacities()) {
        return Err(Error::Shortage(shortage));
    }
    let mut lines = found.lines;
    lines.extend(overridden(shared, &new));
    if dry_run {
        return Ok(api::Reload { applied: false, changes: lines });
    }
    let known = |name: &str, config: &Config| config.interfaces.iter().any(|one| one.name == name);
    for interface in new.interfaces.iter().filter(|one| !known(&one.name, &old)) {
        shared.dataplane.attach(&interface.name, interface.attach).map_err(Error::Interface)?;
        log::info!("attached to {}", interface.name);
    }
    reach(shared, &old, &new).await;
    let gone: Vec<Interface> = old.interfaces.iter().filter(|one| !known(&one.name, &new)).cloned().collect();
    let (own, wanted) = (Arc::clone(shared), addresses(&new));
    let written = tokio::task::spawn_blocking(move || own.replace(new)).await;
    shared.addresses.send_replace(wanted);
    for interface in gone {
        match shared.dataplane.detach(&interface.name) {
            Ok(_) => log::info!("detached from {}", interface.name),
            Err(error) => log::warn!("{error}"),
        }
    }
    log::info!("reloaded {}: {} changes", source.path.display(), lines.len());
    match written {
        Ok(None) => Ok(api::Reload { applied: true, changes: lines }),
        Ok(Some(error)) => Err(Error::Maps(error)),
        // The task panicked: the panic is in the log.
        Err(_) => Ok(api::Reload { applied: false, changes: lines }),
    }
}

/// What the operator has set since the start, which the file now decides.
fn overridden(shared: &Shared, new: &Config) -> Vec<String> {
    let state = shared.state();
    let mut lines = Vec::new();
    for service in &new.services {
        for backend in &service.backends {
            if let Some(set) = state.admin.get(&backend.id).filter(|set| **set != backend.state) {
                lines.push(format!(
                    "~ backend {}/{}: state: {set} (set by dispatcherctl) -> {}",
                    service.name, backend.name, backend.state
                ));
            }
        }
    }
    lines
}

/// Addresses of all backends.
pub(crate) fn addresses(config: &Config) -> BTreeSet<IpAddr> {
    let backends = config.services.iter().flat_map(|service| &service.backends);
    backends.flat_map(Backend::addresses).map(|address| address.ip()).collect()
}

/// Lets the addresses of new backends be looked up before connections may go there.
async fn reach(shared: &Shared, old: &Config, new: &Config) {
    let (before, after) = (addresses(old), addresses(new));
    let coming: Vec<IpAddr> = after.difference(&before).copied().collect();
    if coming.is_empty() {
        return;
    }
    shared.addresses.send_replace(before.union(&after).copied().collect());
    let deadline = Instant::now() + PATIENCE;
    let up = || {
        let state = shared.state();
        coming.iter().all(|address| matches!(state.reach.get(address), Some(Reach::Up(_))))
    };
    while !up() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
