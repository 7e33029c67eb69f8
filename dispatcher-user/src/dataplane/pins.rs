//! What outlives the daemon: names in a BPF file system, which keep maps, programs and links alive.
//!
//! ```text
//! PIN/maps/FLOWS ..                   shared by all generations of programs
//! PIN/programs-3/dispatcher ..        one generation: the programs, and STAGES, through which they call
//!                                     one another; the kernel empties it when its last user is gone
//! PIN/links/NAMESPACE-IFINDEX-MODE    a program's place on an interface
//! ```
//!
//! Who uses the folder holds a lock on it.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File, TryLockError},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{DirBuilderExt as _, MetadataExt as _},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::{MapData, MapInfo};
use dispatcher_common::{abi, globals::Globals};

use super::{
    AttachMode, Capacities, Error,
    capacity::Definition,
    interface_name, map_error,
    syscall::{self, Link},
};

/// Where the maps are, in the folder.
const MAPS: &str = "maps";
/// Where the links are.
const LINKS: &str = "links";
/// What the folders of generations begin with.
const PROGRAMS: &str = "programs-";
/// Where everybody expects the BPF file system.
const MOUNT_POINT: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of Linux's magic.h.
const MAGIC: libc::__fsword_t = 0xcafe_4a11;

/// A folder of pins, locked until this is dropped.
#[derive(Debug)]
pub(super) struct Pins {
    folder: PathBuf,
    lock: File,
    /// Network namespace of this process.
    namespace: u64,
    /// The folder of this process's programs.
    programs: PathBuf,
}

/// The name of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct LinkName {
    namespace: u64,
    ifindex: u32,
    mode: AttachMode,
}

impl LinkName {
    fn parse(name: &str) -> Option<Self> {
        let (namespace, rest) = name.split_once('-')?;
        let (ifindex, mode) = rest.split_once('-')?;
        let mode =
            [AttachMode::Native, AttachMode::Generic].into_iter().find(|one| one.to_string() == mode)?;
        Some(Self { namespace: namespace.parse().ok()?, ifindex: ifindex.parse().ok()?, mode })
    }
}

impl std::fmt::Display for LinkName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}-{}", self.namespace, self.ifindex, self.mode)
    }
}

impl Pins {
    /// Makes the folder, where it is missing, and locks it.
    pub(super) fn open(folder: &Path) -> Result<Self, Error> {
        find_file_system(folder)?;
        let make = |folder: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .map_err(failed(folder, "making the folder"))
        };
        make(folder)?;
        let lock = loop {
            let lock = lock(folder)?;
            // `dispatcherctl detach` may have removed it in between.
            let (held, there) = (lock.metadata(), fs::metadata(folder));
            if let (Ok(held), Ok(there)) = (held, there)
                && (held.dev(), held.ino()) == (there.dev(), there.ino())
            {
                break lock;
            }
            make(folder)?;
        };
        make(&folder.join(MAPS))?;
        make(&folder.join(LINKS))?;
        let namespace = namespace()?;
        let last = generations(folder)?.into_keys().next_back().unwrap_or(0);
        let programs = folder.join(format!("{PROGRAMS}{}", last.wrapping_add(1)));
        let pins = Self { folder: folder.to_owned(), lock, namespace, programs };
        for (name, path) in pins.links()? {
            if name.namespace != namespace
                && Link::open(&path).and_then(|link| link.ifindex()).is_ok_and(|ifindex| ifindex.is_some())
            {
                return Err(Error::OtherNamespace(folder.to_owned()));
            }
        }
        Ok(pins)
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a map is pinned, or will be.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.folder.join(MAPS).join(name)
    }

    /// What the pinned maps hold, if there are some: they keep their sizes. Says so when they cannot be used.
    pub(super) fn check(&self, wanted: &Capacities) -> Result<Option<Capacities>, Error> {
        let mut found: BTreeMap<&str, MapInfo> = BTreeMap::new();
        for Definition { name, .. } in wanted.maps() {
            let path = self.map(name);
            if path.exists() {
                found.insert(name, MapInfo::from_pin(&path).map_err(map_error(name, "opening its pin"))?);
            }
        }
        let theirs = found.get(abi::MAP_GLOBALS).map(|globals| self.abi(globals.value_size())).transpose()?;
        match theirs.unwrap_or(0) {
            // Whoever made them did not come to an end, or somebody removed the map that tells.
            0 => {
                if !found.is_empty() {
                    log::warn!(
                        "the maps in {} are not whole: {} is missing, or was never filled; all of them are made anew: connections end, and sessions but those in the state file",
                        self.folder.display(),
                        abi::MAP_GLOBALS
                    );
                }
                self.clear()?;
                return Ok(None);
            }
            abi::ABI_VERSION => {}
            theirs => return Err(Error::Abi { folder: self.folder.clone(), theirs }),
        }
        let mut capacities = *wanted;
        capacities.take_over(|name| found.get(name).map(MapInfo::max_entries));
        for wanted in capacities.maps() {
            let Some(info) = found.get(wanted.name) else {
                log::warn!("{} is missing in {}; it begins empty", wanted.name, self.folder.display());
                continue;
            };
            let kind = info.map_type().map_err(map_error(wanted.name, "asking for its type"))?;
            let there = Definition {
                name: wanted.name,
                kind,
                key: info.key_size(),
                value: info.value_size(),
                entries: info.max_entries(),
            };
            if there != wanted {
                return Err(Error::PinnedMap {
                    map: wanted.name,
                    folder: self.folder.clone(),
                    theirs: there.to_string(),
                    ours: wanted.to_string(),
                });
            }
        }
        Ok(Some(capacities))
    }

    /// `Globals::abi` of the pinned maps. Its place is the same in all versions.
    fn abi(&self, size: u32) -> Result<u32, Error> {
        let map = MapData::from_pin(self.map(abi::MAP_GLOBALS))
            .map_err(map_error(abi::MAP_GLOBALS, "opening its pin"))?;
        let value = syscall::first_value(map.fd().as_fd(), size)
            .map_err(|error| map_error(abi::MAP_GLOBALS, "reading")(error.into()))?;
        let at = std::mem::offset_of!(Globals, abi);
        let bytes = value.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        Ok(bytes.map_or(0, u32::from_ne_bytes))
    }

    /// Removes maps that nobody finished, and all that can hang on them.
    fn clear(&self) -> Result<(), Error> {
        for (_, path) in self.links()? {
            remove_link(&path)?;
        }
        for folder in generations(&self.folder)?.into_values() {
            remove_files(&folder)?;
        }
        remove_entries(&self.folder.join(MAPS))
    }

    /// Gives a program or map of this generation a name.
    pub(super) fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        if !self.programs.exists() {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&self.programs)
                .map_err(failed(&self.programs, "making the folder"))?;
        }
        let path = self.programs.join(name);
        syscall::pin(fd, &path).map_err(failed(&path, "pinning"))
    }

    /// Puts the program in place of the one that a daemon before us attached; `None` when there is none, or in
    /// another mode.
    pub(super) fn take_over(
        &self,
        program: BorrowedFd<'_>,
        ifindex: u32,
        wanted: AttachMode,
    ) -> Result<Option<(Link, AttachMode, PathBuf)>, Error> {
        let mut taken = None;
        for mode in [AttachMode::Native, AttachMode::Generic] {
            let path = self.link(ifindex, mode);
            if !path.exists() {
                continue;
            }
            let link = Link::open(&path).map_err(failed(&path, "opening the pin"))?;
            let alive = link.ifindex().map_err(failed(&path, "asking for its interface"))? == Some(ifindex);
            if alive && (wanted == mode || wanted == AttachMode::Auto) && taken.is_none() {
                link.replace(program).map_err(failed(&path, "replacing the program"))?;
                taken = Some((link, mode, path));
            } else {
                remove_link(&path)?;
            }
        }
        Ok(taken)
    }

    /// Gives a new link its name.
    pub(super) fn keep_link(&self, link: &Link, ifindex: u32, mode: AttachMode) -> Result<PathBuf, Error> {
        let path = self.link(ifindex, mode);
        link.pin(&path).map_err(failed(&path, "pinning"))?;
        Ok(path)
    }

    fn link(&self, ifindex: u32, mode: AttachMode) -> PathBuf {
        self.folder.join(LINKS).join(LinkName { namespace: self.namespace, ifindex, mode }.to_string())
    }

    fn links(&self) -> Result<Vec<(LinkName, PathBuf)>, Error> {
        links(&self.folder)
    }

    /// Removes links that are none of these, and every other generation of programs once none of them runs
    /// any more; returns the interfaces that were let go.
    pub(super) fn settle(&self, used: &[PathBuf]) -> Result<Vec<String>, Error> {
        let mut gone = Vec::new();
        for (name, path) in self.links()? {
            if used.contains(&path) {
                continue;
            }
            if remove_link(&path)? {
                gone.push(interface_name(name.ifindex));
            }
        }
        let others: Vec<PathBuf> =
            generations(&self.folder)?.into_values().filter(|one| *one != self.programs).collect();
        if !others.is_empty() {
            if let Err(error) = syscall::wait_for_programs() {
                // Kernels with CPUs that nothing may disturb (nohz_full).
                log::debug!("membarrier: {error}; waiting instead");
                std::thread::sleep(Duration::from_millis(500));
            }
            others.iter().try_for_each(|folder| remove_files(folder))?;
        }
        Ok(gone)
    }

    /// Removes this generation, of which nothing is attached; with `maps`, everything.
    pub(super) fn give_up(self, maps: bool) {
        let Self { folder, lock, programs, .. } = self;
        let removed = if maps {
            drop(lock);
            remove(&folder).map(drop)
        } else if programs.exists() {
            remove_files(&programs)
        } else {
            Ok(())
        };
        if let Err(error) = removed {
            log::warn!("{error}");
        }
    }
}

/// Takes a pinned link off its interface and removes its name; false when the interface was gone.
pub(super) fn remove_link(path: &Path) -> Result<bool, Error> {
    let link = Link::open(path).map_err(failed(path, "opening the pin"))?;
    let alive = link.ifindex().map_err(failed(path, "asking for its interface"))?.is_some();
    if alive {
        link.detach().map_err(failed(path, "detaching"))?;
    }
    fs::remove_file(path).map_err(failed(path, "removing"))?;
    Ok(alive)
}

/// Removes everything that a daemon left in a folder, interfaces first; says what, a line each.
pub fn remove(folder: &Path) -> Result<Vec<String>, Error> {
    let mut done = Vec::new();
    if !folder.exists() {
        let there = folder.ancestors().find(|one| one.exists()).unwrap_or(Path::new("/"));
        if !is_bpf(there) && in_a_passing_mount_namespace() {
            let reason = "this process has a mount namespace of its own (`ip netns exec` makes one), in which what is pinned is not seen; use `nsenter --net=/run/netns/NAME`, or none".to_owned();
            return Err(Error::NoFileSystem { folder: folder.to_owned(), reason });
        }
        return Ok(done);
    }
    if is_mount_point(folder) {
        let reason =
            "that is where the whole file system is, which others use too; give the folder in it".to_owned();
        return Err(Error::NoFileSystem { folder: folder.to_owned(), reason });
    }
    if !is_bpf(folder) {
        let reason = "that is no BPF file system, so nothing is removed from it".to_owned();
        return Err(Error::NoFileSystem { folder: folder.to_owned(), reason });
    }
    let _lock = lock(folder)?;
    let own = namespace()?;
    for (name, path) in links(folder)? {
        let interface = match name.namespace {
            namespace if namespace == own => interface_name(name.ifindex),
            _ => format!("interface {} of another network namespace", name.ifindex),
        };
        done.push(if remove_link(&path)? {
            format!("detached from {interface}")
        } else {
            format!("removed the link of interface {}, which is gone", name.ifindex)
        });
    }
    for folder in generations(folder)?.into_values() {
        remove_files(&folder)?;
        done.push(format!("removed {}", folder.display()));
    }
    for name in [MAPS, LINKS] {
        let folder = folder.join(name);
        if folder.exists() {
            remove_files(&folder)?;
            done.push(format!("removed {}", folder.display()));
        }
    }
    let others = entries(folder)?;
    if others.is_empty() {
        fs::remove_dir(folder).map_err(failed(folder, "removing"))?;
    } else {
        let names: Vec<String> = others.iter().map(|path| path.display().to_string()).collect();
        let (names, folder) = (names.join(", "), folder.display());
        done.push(format!(
            "left {folder}, as dispatcherd did not make {names}: nothing runs because of that; if nobody needs it, remove it with `rm -r`"
        ));
    }
    Ok(done)
}

/// True of the place where everybody expects the BPF file system: it is nobody's own.
pub(crate) fn is_mount_point(folder: &Path) -> bool {
    folder.components().eq(Path::new(MOUNT_POINT).components())
}

fn lock(folder: &Path) -> Result<File, Error> {
    let file = File::open(folder).map_err(failed(folder, "opening"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::PinsInUse(folder.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(folder, "locking")(source)),
    }
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Pin { path: path.to_owned(), action, source }
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let listed = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries: Vec<PathBuf> =
        listed.map_err(failed(folder, "listing"))?.iter().map(fs::DirEntry::path).collect();
    entries.sort();
    Ok(entries)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn links(folder: &Path) -> Result<Vec<(LinkName, PathBuf)>, Error> {
    let folder = folder.join(LINKS);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let found = entries(&folder)?;
    Ok(found.into_iter().filter_map(|path| Some((LinkName::parse(file_name(&path))?, path))).collect())
}

/// The folders of programs, by number.
fn generations(folder: &Path) -> Result<BTreeMap<u32, PathBuf>, Error> {
    let number = |path: PathBuf| Some((file_name(&path).strip_prefix(PROGRAMS)?.parse().ok()?, path));
    Ok(entries(folder)?.into_iter().filter_map(number).collect())
}

fn remove_entries(folder: &Path) -> Result<(), Error> {
    entries(folder)?.iter().try_for_each(|path| fs::remove_file(path).map_err(failed(path, "removing")))
}

/// Removes a folder with the pins in it.
fn remove_files(folder: &Path) -> Result<(), Error> {
    remove_entries(folder)?;
    fs::remove_dir(folder).map_err(failed(folder, "removing"))
}

/// The network namespace that this process is in, by its inode.
fn namespace() -> Result<u64, Error> {
    let path = Path::new("/proc/self/ns/net");
    fs::metadata(path).map(|found| found.ino()).map_err(failed(path, "looking at"))
}

/// Whether the folder is in a BPF file system, or one can be mounted at the usual place; false in the latter case.
///
/// # Errors
/// Where neither is so: what is wrong and what to do.
pub fn has_file_system(folder: &Path) -> Result<bool, Error> {
    let there = folder.ancestors().find(|one| one.exists()).unwrap_or(Path::new("/"));
    if is_bpf(there) {
        return Ok(true);
    }
    let none = |reason: String| Err(Error::NoFileSystem { folder: folder.to_owned(), reason });
    if !folder.starts_with(MOUNT_POINT) {
        return none("no BPF file system is mounted there; mount one (`mount -t bpf bpf FOLDER`)".to_owned());
    }
    if in_a_passing_mount_namespace() {
        return none(format!(
            "no BPF file system is mounted there, and this process has a mount namespace of its own (`ip netns exec` makes one), with which a new mount would end; start it with `nsenter --net=/run/netns/NAME`, or mount one before at another place (`mount -t bpf bpf FOLDER`), not under {MOUNT_POINT}"
        ));
    }
    Ok(false)
}

/// Sees to it that the folder is in a BPF file system: where none is mounted at the usual place, it is.
fn find_file_system(folder: &Path) -> Result<(), Error> {
    if has_file_system(folder)? {
        return Ok(());
    }
    // One after the other, or the second mount would hide what the first one's owner has pinned.
    let place = File::open(MOUNT_POINT);
    let _turn = place
        .and_then(|place| place.lock().map(|()| place))
        .map_err(failed(Path::new(MOUNT_POINT), "locking"))?;
    if is_bpf(Path::new(MOUNT_POINT)) {
        return Ok(());
    }
    let (kind, place) = (c"bpf", c"/sys/fs/bpf");
    // SAFETY: strings that end with a zero byte and outlive the call, and no data.
    let result = unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result != 0 {
        let error = io::Error::last_os_error();
        let reason = format!(
            "no BPF file system is mounted there, and mounting one failed ({error}); as root: `mount -t bpf bpf {MOUNT_POINT}`"
        );
        return Err(Error::NoFileSystem { folder: folder.to_owned(), reason });
    }
    log::info!("mounted a BPF file system at {MOUNT_POINT}");
    Ok(())
}

/// True when whoever started us, or started that one, has another mount namespace, so that a mount of ours ends
/// with us. `ip netns exec` makes such a namespace.
fn in_a_passing_mount_namespace() -> bool {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/mnt")).ok();
    let Some(own) = namespace("self") else { return false };
    let mut process = "self".to_owned();
    while let Ok(status) = fs::read_to_string(format!("/proc/{process}/status")) {
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or_default().trim();
        // Of some processes we may not know it: they decide nothing.
        if namespace(parent).is_some_and(|namespace| namespace != own) {
            return true;
        }
        parent.clone_into(&mut process);
    }
    false
}

fn is_bpf(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: a struct of integers, for which zeros are values.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with a zero byte; `found` is a place for one `statfs`. Both outlive the call.
    let result = unsafe { libc::statfs(path.as_ptr(), &raw mut found) };
    result == 0 && found.f_type == MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_links() {
        let name = LinkName { namespace: 4_026_531_840, ifindex: 7, mode: AttachMode::Generic };
        assert_eq!(name.to_string(), "4026531840-7-generic");
        assert_eq!(LinkName::parse(&name.to_string()), Some(name));
        for other in ["", "1-2", "1-2-auto", "1-x-native", "x-1-native", "1-2-native-3"] {
            assert_eq!(LinkName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn other_file_systems_are_left_alone() {
        let folder = std::env::temp_dir();
        let refusal = |error: Error| {
            let said = error.to_string();
            assert!(said.contains("BPF file system") && said.contains(&*folder.to_string_lossy()), "{said}");
        };
        refusal(Pins::open(&folder.join("pins")).expect_err("no BPF file system"));
        refusal(remove(&folder).expect_err("no BPF file system"));
        assert!(remove(&folder.join("no-such-folder")).expect("nothing to do").is_empty());
        for all in ["/sys/fs/bpf", "/sys/fs/bpf/"] {
            let said = remove(Path::new(all)).expect_err("others are there").to_string();
            assert!(said.contains("which others use too; give the folder in it"), "{said}");
        }
    }
}
