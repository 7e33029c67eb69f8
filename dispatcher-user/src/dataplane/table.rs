//! Typed maps that several threads can use at once.
//!
//! The kernel lets anyone read and write a map at any time; aya asks for `&mut` to write. So each map
//! has two descriptors: one that everybody reads through, and one behind a lock that is written through.

use std::{
    fmt,
    os::fd::{AsFd as _, OwnedFd},
    sync::Mutex,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};

use super::{
    Error, layout, lock, map_error,
    syscall::{Cursor, lookup_batch, update_batch},
    take_map,
};

/// Fails when the key exists: `BPF_NOEXIST` of Linux's bpf.h.
const NOEXIST: u64 = 1;

/// Entries that one system call reads or writes, where there are many.
const BATCH: usize = 1024;

/// A hash map.
#[derive(Debug)]
pub struct Table<K, V> {
    name: &'static str,
    fd: OwnedFd,
    entries: u32,
    read: HashMap<MapData, K, V>,
    write: Mutex<HashMap<MapData, K, V>>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        let second = second(ebpf, name)?;
        let entries = entries(&second, name)?;
        let fd = duplicate(&second, name)?;
        let write = HashMap::try_from(Map::HashMap(second)).map_err(layout(name))?;
        Ok(Self { name, fd, entries, read: take_map(ebpf, name)?, write: Mutex::new(write) })
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>, Error> {
        match self.read.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(map_error(self.name, "reading")(source)),
        }
    }

    /// Inserts or replaces.
    pub fn insert(&self, key: K, value: V) -> Result<(), Error> {
        lock(&self.write).insert(key, value, 0).map_err(map_error(self.name, "inserting"))
    }

    /// Inserts unless the key exists; false when it did.
    pub fn insert_new(&self, key: K, value: V) -> Result<bool, Error> {
        match lock(&self.write).insert(key, value, NOEXIST) {
            Ok(()) => Ok(true),
            Err(error) if code(&error) == Some(libc::EEXIST) => Ok(false),
            Err(source) => Err(map_error(self.name, "inserting")(source)),
        }
    }

    /// Removes a key; false when it was not there.
    pub fn remove(&self, key: &K) -> Result<bool, Error> {
        match lock(&self.write).remove(key) {
            Ok(()) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) if code(&error) == Some(libc::ENOENT) => Ok(false),
            Err(source) => Err(map_error(self.name, "removing")(source)),
        }
    }

    /// All entries. Others may write meanwhile: what is there all the time is seen once, what comes or goes may
    /// be seen. The walk ends where the map cannot be read.
    pub fn iter(&self) -> impl Iterator<Item = (K, V)> + '_ {
        let (mut cursor, mut more) = (Cursor::default(), true);
        let (mut keys, mut values) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
        std::iter::from_fn(move || {
            if !more {
                return None;
            }
            more = match lookup_batch(self.fd.as_fd(), &mut cursor, &mut keys, &mut values) {
                Ok(more) => more,
                Err(error) => {
                    log::warn!("map {}: reading its entries: {error}", self.name);
                    false
                }
            };
            Some(keys.drain(..).zip(values.drain(..)).collect::<Vec<_>>())
        })
        .flatten()
    }

    /// All keys, with the same caveats.
    pub fn keys(&self) -> impl Iterator<Item = K> + '_ {
        self.iter().map(|(key, _)| key)
    }

    /// Capacity.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.entries
    }
}

/// An array.
pub struct Cells<V: Pod> {
    name: &'static str,
    fd: OwnedFd,
    read: Array<MapData, V>,
    write: Mutex<Array<MapData, V>>,
}

impl<V: Pod> fmt::Debug for Cells<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cells").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<V: Pod> Cells<V> {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        let second = second(ebpf, name)?;
        let fd = duplicate(&second, name)?;
        let write = Array::try_from(Map::Array(second)).map_err(layout(name))?;
        Ok(Self { name, fd, read: take_map(ebpf, name)?, write: Mutex::new(write) })
    }

    /// The value at an index.
    pub fn get(&self, index: u32) -> Result<V, Error> {
        self.read.get(&index, 0).map_err(map_error(self.name, "reading"))
    }

    /// Writes the value at an index.
    pub fn set(&self, index: u32, value: V) -> Result<(), Error> {
        lock(&self.write).set(index, value, 0).map_err(map_error(self.name, "writing"))
    }

    /// Writes values from an index on.
    pub fn set_all(&self, first: u32, values: &[V]) -> Result<(), Error> {
        let mut at = first;
        for values in values.chunks(BATCH) {
            let keys: Vec<u32> = (at..).take(values.len()).collect();
            update_batch(self.fd.as_fd(), &keys, values)
                .map_err(|error| map_error(self.name, "writing")(error.into()))?;
            at += values.len() as u32;
        }
        Ok(())
    }

    /// Number of entries.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.read.len()
    }
}

/// A second descriptor of a map.
fn second(ebpf: &Ebpf, name: &str) -> Result<MapData, Error> {
    let wrong = |reason: &str| Error::Layout { name: name.to_owned(), reason: reason.to_owned() };
    let map = ebpf.map(name).ok_or_else(|| wrong("no such map"))?;
    let (Map::Array(data) | Map::HashMap(data) | Map::LruHashMap(data)) = map else {
        return Err(wrong("neither array nor hash"));
    };
    MapData::from_fd(duplicate(data, name)?).map_err(layout(name))
}

fn duplicate(data: &MapData, name: &str) -> Result<OwnedFd, Error> {
    let fd = data.fd().as_fd().try_clone_to_owned();
    fd.map_err(|error| map_error(name, "duplicating its descriptor")(error.into()))
}

fn entries(data: &MapData, name: &str) -> Result<u32, Error> {
    Ok(data.info().map_err(layout(name))?.max_entries())
}

fn code(error: &MapError) -> Option<i32> {
    if let MapError::SyscallError(error) = error { error.io_error.raw_os_error() } else { None }
}
