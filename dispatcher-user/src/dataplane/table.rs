//! Typed maps that several threads can use at once.
//!
//! The kernel lets anyone read and write a map at any time; aya asks for `&mut` to write. So each map
//! has two descriptors: one that everybody reads through, and one behind a lock that is written through.

use std::{fmt, os::fd::AsFd as _, sync::Mutex};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};

use super::{Error, layout, lock, map_error, take_map};

/// Fails when the key exists: `BPF_NOEXIST` of Linux's bpf.h.
const NOEXIST: u64 = 1;

/// A hash map.
#[derive(Debug)]
pub struct Table<K, V> {
    name: &'static str,
    entries: u32,
    read: HashMap<MapData, K, V>,
    write: Mutex<HashMap<MapData, K, V>>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, Error> {
        let second = second(ebpf, name)?;
        let entries = entries(&second, name)?;
        let write = HashMap::try_from(Map::HashMap(second)).map_err(layout(name))?;
        Ok(Self { name, entries, read: take_map(ebpf, name)?, write: Mutex::new(write) })
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

    /// All entries. Others may write meanwhile: an entry can then be missed or seen twice, and the walk
    /// ends after twice the map's capacity.
    pub fn iter(&self) -> impl Iterator<Item = (K, V)> + '_ {
        self.read.iter().take(self.entries as usize * 2).filter_map(Result::ok)
    }

    /// All keys, with the same caveats.
    pub fn keys(&self) -> impl Iterator<Item = K> + '_ {
        self.read.keys().take(self.entries as usize * 2).filter_map(Result::ok)
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
        let write = Array::try_from(Map::Array(second(ebpf, name)?)).map_err(layout(name))?;
        Ok(Self { name, read: take_map(ebpf, name)?, write: Mutex::new(write) })
    }

    /// The value at an index.
    pub fn get(&self, index: u32) -> Result<V, Error> {
        self.read.get(&index, 0).map_err(map_error(self.name, "reading"))
    }

    /// Writes the value at an index.
    pub fn set(&self, index: u32, value: V) -> Result<(), Error> {
        lock(&self.write).set(index, value, 0).map_err(map_error(self.name, "writing"))
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
    let fd = data.fd().as_fd().try_clone_to_owned();
    MapData::from_fd(fd.map_err(|error| map_error(name, "duplicating its descriptor")(error.into()))?)
        .map_err(layout(name))
}

fn entries(data: &MapData, name: &str) -> Result<u32, Error> {
    Ok(data.info().map_err(layout(name))?.max_entries())
}

fn code(error: &MapError) -> Option<i32> {
    if let MapError::SyscallError(error) = error { error.io_error.raw_os_error() } else { None }
}
