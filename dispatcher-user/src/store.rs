//! What outlives a reboot: one file, which only root reads and one daemon at a time has open.
//!
//! Every write is one transaction: when it returns, it is on the disk, and when it fails, what was there before
//! still is.

use std::{
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{
            DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
        },
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageBackend,
    StorageError, TableDefinition, TableError,
};
use serde::{Serialize, de::DeserializeOwned};

mod sessions;

pub(crate) use self::sessions::Clocks;

/// Documents in JSON, by name.
const DOCUMENTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("documents");
/// How a file begins (section "Super-header" of redb's docs/design.md).
const MAGIC: [u8; 9] = *b"redb\x1a\x0a\xa9\x0d\x0a";
/// Memory for pages of the file.
const CACHE: usize = 4 << 20;

/// What can go wrong with the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody has it open.
    #[error("another dispatcherd uses the state file {0}; stop it, or set another `state`")]
    InUse(PathBuf),
    /// There is no folder for it.
    #[error("the folder of the state file, {0}, does not exist; make it, or set another `state`")]
    NoFolder(PathBuf),
    /// Something else has the path.
    #[error("{0} is there and is no state file; it is left alone: move it away, or set another `state`")]
    NoState(PathBuf),
    /// A file operation failed.
    #[error("state file {path}: {action}: {source}; {}", remedy(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It does not hold what was written into it.
    #[error("state file {path}: {reason}; if this does not end with a restart, move it away")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The sessions were written by another version.
    #[error("state file {path}: its sessions have layout {found}, and this dispatcherd reads {known}")]
    Layout {
        /// The file.
        path: PathBuf,
        /// Theirs.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// A document is not what is looked for.
    #[error("state file {path}: {name}: {source}; was it written by another version?")]
    Document {
        /// The file.
        path: PathBuf,
        /// The document.
        name: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "make room there, or set another `state`",
        Some(libc::EACCES | libc::EPERM) => {
            "the file and its folder must belong to the user that dispatcherd runs as, who is root as a rule"
        }
        _ => "set another `state`, or \"none\", if this file cannot be used",
    }
}

/// The file.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// Empty after a failure: it is opened again when it is needed next.
    database: Mutex<Option<(Database, Identity)>>,
}

impl Store {
    /// Opens the file, or makes it. A damaged one is moved aside.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let database = Mutex::new(Some(identified(path)?));
        Ok(Self { path: path.to_owned(), database })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A document, if there is one. Like all that follows it waits until others are done with the file.
    pub fn document<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Error> {
        let bytes = self.with(|database| {
            let transaction = database.begin_read()?;
            match transaction.open_table(DOCUMENTS) {
                Ok(documents) => Ok(documents.get(name)?.map(|bytes| bytes.value().to_vec())),
                Err(TableError::TableDoesNotExist(_)) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(self.unlike(name))).transpose()
    }

    /// Keeps a document in place of what had its name.
    pub fn keep<T: Serialize>(&self, name: &str, value: &T) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value).map_err(self.unlike(name))?;
        self.with(|database| {
            let transaction = database.begin_write()?;
            transaction.open_table(DOCUMENTS)?.insert(name, bytes.as_slice())?;
            Ok(transaction.commit()?)
        })
    }

    fn unlike(&self, name: &str) -> impl FnOnce(serde_json::Error) -> Error {
        let (path, name) = (self.path.clone(), name.to_owned());
        move |source| Error::Document { path, name, source }
    }

    /// Works with the open file. After a failure it must be closed, because the crate refuses to go on.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, Error> {
        let mut open_one = lock(&self.database);
        // One that was moved away, or removed, would be written where nobody looks for it.
        if let Some((moved, _)) = open_one.as_ref().filter(|(_, known)| *known != identity(&self.path)) {
            log::warn!(
                "state file {}: it was moved or removed; what the operator said is written to the one there now",
                self.path.display()
            );
            let another = identified(&self.path)?;
            carry(moved, &another.0).map_err(self.broken())?;
            *open_one = Some(another);
        }
        let (database, identity) = match open_one.take() {
            Some(open) => open,
            None => identified(&self.path)?,
        };
        let done = work(&database).map_err(self.broken())?;
        *open_one = Some((database, identity));
        Ok(done)
    }

    fn broken(&self) -> impl FnOnce(redb::Error) -> Error {
        |error| {
            if let redb::Error::Io(source) = error {
                return failed(&self.path, "using it")(source);
            }
            Error::Damaged { path: self.path.clone(), reason: error.to_string() }
        }
    }
}

/// Writes the documents of one file into another. Sessions are in the maps, and are saved again in time.
fn carry(from: &Database, to: &Database) -> Result<(), redb::Error> {
    let (from, to) = (from.begin_read()?, to.begin_write()?);
    match from.open_table(DOCUMENTS) {
        Ok(documents) => {
            let mut copies = to.open_table(DOCUMENTS)?;
            for document in documents.iter()? {
                let (name, bytes) = document?;
                copies.insert(name.value(), bytes.value())?;
            }
        }
        Err(TableError::TableDoesNotExist(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    Ok(to.commit()?)
}

/// Device and number of a file; nothing where there is none.
type Identity = Option<(u64, u64)>;

fn identity(path: &Path) -> Identity {
    fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

fn identified(path: &Path) -> Result<(Database, Identity), Error> {
    let database = open(path)?;
    Ok((database, identity(path)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(path: &Path) -> Result<Database, Error> {
    let damaged = match try_open(path) {
        Err(Error::Damaged { reason, .. }) => reason,
        opened => return opened,
    };
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    fs::rename(path, &aside).map_err(failed(path, "moving it aside"))?;
    log::error!(
        "state file {}: {damaged}; it is now {}, and what it held is lost unless you can mend it",
        path.display(),
        Path::new(&aside).display()
    );
    try_open(path)
}

fn try_open(path: &Path) -> Result<Database, Error> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.exists() {
        // One of our own, such as /var/lib/dispatcher, but no path that is a slip of the pen.
        if folder.parent().is_some_and(|above| !above.exists()) {
            return Err(Error::NoFolder(folder.to_owned()));
        }
        fs::DirBuilder::new().mode(0o750).create(folder).map_err(failed(path, "making its folder"))?;
    }
    let there = fs::metadata(path);
    if there.as_ref().is_ok_and(|found| !found.is_file()) {
        return Err(Error::NoState(path.to_owned()));
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(failed(path, "opening"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::InUse(path.to_owned())),
        Err(TryLockError::Error(source)) => return Err(failed(path, "locking")(source)),
    }
    if !begins_well(&file).map_err(failed(path, "reading"))? {
        return Err(Error::NoState(path.to_owned()));
    }
    file.set_permissions(Permissions::from_mode(0o600)).map_err(failed(path, "setting permissions"))?;
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
    let opened = builder.create_with_backend(Disk(file)).map_err(|error| refused(path, error));
    if there.is_err() {
        if opened.is_err() {
            // Half of a new one is nothing.
            drop(fs::remove_file(path));
        }
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed(path, "writing its folder"))?;
    }
    opened
}

/// True of an empty file and of one that may be ours. Zeros are what a crash may leave.
fn begins_well(file: &File) -> io::Result<bool> {
    let mut begin = [0; MAGIC.len()];
    let read = file.read_at(&mut begin, 0)?;
    let begin = &begin[..read];
    Ok(MAGIC.starts_with(begin) || begin.iter().all(|byte| *byte == 0))
}

/// The file for the crate. Room on the disk is taken before anything is written into it: a full disk is found
/// out while what was kept, and room for as much again, are untouched.
#[derive(Debug)]
struct Disk(File);

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let now = self.len()?;
        if len > now {
            let (from, more) = (now as libc::off_t, (len - now) as libc::off_t);
            // SAFETY: a call with integers only; the descriptor is open.
            if unsafe { libc::fallocate(self.0.as_raw_fd(), 0, from, more) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
                // Some file systems keep what they had found so far.
                self.0.set_len(now)?;
                return Err(error);
            }
        }
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { path: path.to_owned(), action, source }
}

fn refused(path: &Path, error: DatabaseError) -> Error {
    use io::ErrorKind::{InvalidData, UnexpectedEof};
    if let DatabaseError::Storage(StorageError::Io(source)) = error {
        if !matches!(source.kind(), InvalidData | UnexpectedEof) {
            return failed(path, "opening")(source);
        }
        return Error::Damaged { path: path.to_owned(), reason: source.to_string() };
    }
    Error::Damaged { path: path.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
pub(crate) use self::tests::Folder;

#[cfg(test)]
mod tests;
