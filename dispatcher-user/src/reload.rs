//! A new configuration for a running daemon, from its file or by the operator's word: checked as a whole,
//! then put in force. What it does not change is not touched: flows and sessions stay.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    api,
    config::{self, AdminState, Amendments, Backend, Config, Interface, Shortage, changes},
    dataplane,
    reconcile::Reach,
    state::{Base, Shared},
    store, terminate,
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
    #[error("{0}; nothing was changed")]
    Store(store::Error),
    #[error(
        "{0}; the configuration is in force, but the maps are behind it: this is tried again with the next change"
    )]
    Maps(dataplane::Error),
    #[error("{0}; nothing was changed")]
    Terminate(terminate::Error),
    #[error("a task of dispatcherd panicked; its log says why")]
    Panic,
}

/// Puts the file in force, or only says what that would change.
pub(crate) async fn reload(shared: &Arc<Shared>, dry_run: bool) -> Result<api::Reload, Error> {
    let mut base = shared.base.lock().await;
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
    let known = |name: &str| old.interfaces.iter().any(|one| one.name == name);
    let coming: Vec<&Interface> = new.interfaces.iter().filter(|one| !known(&one.name)).collect();
    for interface in &coming {
        dataplane::find_interface(&interface.name).map_err(Error::Interface)?;
    }
    let ending = shared.terminator.prepare(&new).map_err(Error::Terminate)?;
    lines.extend(ending.renewed.iter().cloned());
    if dry_run {
        return Ok(api::Reload { applied: false, changes: lines });
    }
    for interface in coming {
        shared.dataplane.attach(&interface.name, interface.attach).map_err(Error::Interface)?;
        log::info!("attached to {}", interface.name);
    }
    keep(shared, &Amendments::default()).await?;
    *base = Base { file: new.clone(), amendments: Amendments::default() };
    install(shared, &old, new, &base.amendments).await?;
    shared.terminator.install(shared, ending);
    log::info!("reloaded {}: {} changes", source.path.display(), lines.len());
    Ok(api::Reload { applied: true, changes: lines })
}

/// Puts something in force that the operator says, on top of the file; it is kept until the file is read
/// again. False where there was nothing to do.
pub(crate) async fn amend(
    shared: &Arc<Shared>,
    edit: impl FnOnce(&mut Amendments, &Base) -> bool,
) -> Result<bool, Error> {
    let mut base = shared.base.lock().await;
    let mut amendments = base.amendments.clone();
    if !edit(&mut amendments, &base) {
        return Ok(false);
    }
    let old = shared.config();
    let new = base.file.amended(&amendments)?;
    if let Some(shortage) = new.shortage(shared.dataplane.capacities()) {
        return Err(Error::Shortage(shortage));
    }
    keep(shared, &amendments).await?;
    base.amendments = amendments;
    install(shared, &old, new, &base.amendments).await?;
    Ok(true)
}

/// Takes backends offline whose drain is over.
pub(crate) async fn deadlines(shared: Arc<Shared>) -> (&'static str, String) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        let now = unix_seconds();
        if shared.state().deadlines.values().all(|deadline| *deadline > now) {
            continue;
        }
        let mut over = Vec::new();
        let done = amend(&shared, |amendments, _| {
            over = amendments.expire(now);
            !over.is_empty()
        });
        match done.await {
            Ok(_) => over.iter().for_each(|name| log::info!("{name}: the drain is over, it is offline")),
            Err(error) => log::error!("{}: the drain is over: {error}", over.join(", ")),
        }
    }
}

/// Unix time.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What the operator said, under this name in the state file.
pub(crate) const AMENDMENTS: &str = "amendments";

/// Writes down what the operator said.
async fn keep(shared: &Arc<Shared>, amendments: &Amendments) -> Result<(), Error> {
    let (shared, amendments) = (Arc::clone(shared), amendments.clone());
    let kept = tokio::task::spawn_blocking(move || match &shared.store {
        Some(store) => store.keep(AMENDMENTS, &amendments),
        None => Ok(()),
    });
    kept.await.map_err(|_| Error::Panic)?.map_err(Error::Store)
}

/// Puts a checked configuration in force.
async fn install(
    shared: &Arc<Shared>,
    old: &Config,
    new: Config,
    amendments: &Amendments,
) -> Result<(), Error> {
    let known = |name: &str, config: &Config| config.interfaces.iter().any(|one| one.name == name);
    let gone: Vec<Interface> = old.interfaces.iter().filter(|one| !known(&one.name, &new)).cloned().collect();
    reach(shared, old, &new).await;
    let (own, wanted, amendments) = (Arc::clone(shared), addresses(&new), amendments.clone());
    let written = tokio::task::spawn_blocking(move || own.replace(new, &amendments)).await;
    shared.addresses.send_replace(wanted);
    for interface in gone {
        match shared.dataplane.detach(&interface.name) {
            Ok(_) => log::info!("detached from {}", interface.name),
            Err(error) => log::warn!("{error}"),
        }
    }
    match written {
        Ok(None) => {}
        Ok(Some(error)) => return Err(Error::Maps(error)),
        Err(_) => return Err(Error::Panic),
    }
    for service in &shared.config().services {
        let takes = |backend: &Backend| backend.state == AdminState::Enabled && backend.weight > 0;
        let before = old.services.iter().find(|one| one.id == service.id);
        let changed = before.is_none_or(|before| before.backends != service.backends);
        if changed && !service.backends.iter().any(takes) {
            log::warn!(
                "no backend of service {} takes new sessions: clients without one get a RST",
                service.name
            );
        }
    }
    Ok(())
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
