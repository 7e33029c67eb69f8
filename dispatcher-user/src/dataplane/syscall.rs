//! `bpf(2)`, where aya does not reach: links of which one must know the interface, and pins of any kind.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::Pod;

use super::AttachMode;

// `enum bpf_cmd` of Linux's bpf.h.
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const MAP_UPDATE_BATCH: libc::c_int = 26;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;

/// `BPF_XDP` of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;
/// `XDP_FLAGS_SKB_MODE` of if_link.h.
const FLAG_GENERIC: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE`.
const FLAG_NATIVE: u32 = 1 << 2;

/// A part of `union bpf_attr`: `repr(C)`, integers only, without padding.
///
/// # Safety
///
/// The layout is that of the kernel for the command that it is passed with.
pub(super) unsafe trait Attributes {}

/// One call.
///
/// # Safety
///
/// `attributes` are those of the command. Addresses in them are valid for what the command reads and writes
/// there.
pub(super) unsafe fn bpf<A: Attributes>(
    command: libc::c_int,
    attributes: &mut A,
) -> io::Result<libc::c_long> {
    let attributes: *mut A = attributes;
    // SAFETY: the caller vouches for the contents, the type for the layout and the size.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As [`bpf`], for commands that return a descriptor.
///
/// # Safety
///
/// As [`bpf`], and the command returns a new descriptor.
unsafe fn descriptor<A: Attributes>(command: libc::c_int, attributes: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: the caller's.
    let fd = unsafe { bpf(command, attributes) }?;
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}
// SAFETY: `BPF_OBJ_*` in `union bpf_attr`.
unsafe impl Attributes for Object {}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Gives a map, program or link a name in a BPF file system.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut object = Object { path: path.as_ptr().expose_provenance() as u64, fd: number(fd), flags: 0 };
    // SAFETY: the path ends with a zero byte and outlives the call.
    unsafe { bpf(OBJ_PIN, &mut object) }.map(drop)
}

/// Opens what is pinned there.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut object = Object { path: path.as_ptr().expose_provenance() as u64, fd: 0, flags: 0 };
    // SAFETY: the path ends with a zero byte and outlives the call, which returns a descriptor.
    unsafe { descriptor(OBJ_GET, &mut object) }
}

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}
// SAFETY: `BPF_MAP_*_ELEM` in `union bpf_attr`.
unsafe impl Attributes for Element {}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}
// SAFETY: `batch` in `union bpf_attr`.
unsafe impl Attributes for Batch {}

impl Batch {
    fn of<K: Pod, V: Pod>(map: BorrowedFd<'_>, keys: *const K, values: *const V, count: u32) -> Self {
        Self {
            in_batch: 0,
            out_batch: 0,
            keys: keys.expose_provenance() as u64,
            values: values.expose_provenance() as u64,
            count,
            map: number(map),
            element_flags: 0,
            flags: 0,
        }
    }
}

/// Writes many values at once. Keys and values are those of the map: it checks their sizes nowhere.
pub(super) fn update_batch<K: Pod, V: Pod>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> io::Result<()> {
    let count = u32::try_from(keys.len().min(values.len())).map_err(io::Error::other)?;
    let mut batch = Batch::of(map, keys.as_ptr(), values.as_ptr(), count);
    // SAFETY: `count` keys and values are read, which are there and outlive the call; their sizes are the
    // map's, as the caller says.
    unsafe { bpf(MAP_UPDATE_BATCH, &mut batch) }.map(drop)
}

/// Where a walk through a hash map has come to.
#[derive(Default)]
pub(super) struct Cursor(Option<[u32; 4]>);

/// Reads the next entries of a hash map, at most as many as the vectors have room for; false at the end. The
/// vectors get what was read. It is no error when others write meanwhile.
pub(super) fn lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
) -> io::Result<bool> {
    keys.clear();
    values.clear();
    let room = keys.capacity().min(values.capacity());
    let mut batch =
        Batch::of(map, keys.as_ptr(), values.as_ptr(), u32::try_from(room).map_err(io::Error::other)?);
    let mut next = [0_u32; 4];
    if let Some(from) = &cursor.0 {
        batch.in_batch = from.as_ptr().expose_provenance() as u64;
    }
    batch.out_batch = next.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: at most `room` keys and values are written, for which the vectors have the capacity; their sizes
    // are the map's, as the caller says. A hash map's cursor has four bytes. All of it outlives the call.
    let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut batch) };
    let more = match result {
        Ok(_) => true,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
        Err(error) => return Err(error),
    };
    let count = room.min(batch.count as usize);
    // SAFETY: the kernel has written so many, and any bytes are a key or a value: they are `Pod`.
    unsafe {
        keys.set_len(count);
        values.set_len(count);
    }
    cursor.0 = Some(next);
    Ok(more)
}

/// The first value of an array, whose values have this many bytes.
pub(super) fn first_value(map: BorrowedFd<'_>, size: u32) -> io::Result<Vec<u8>> {
    let key = 0_u32;
    // Array values are copied in units of eight bytes.
    let mut value = vec![0; size.next_multiple_of(8) as usize];
    let mut element = Element {
        map: number(map),
        pad: 0,
        key: std::ptr::from_ref(&key).expose_provenance() as u64,
        value: value.as_mut_ptr().expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: the key has the four bytes of an array's, the value at least those that the caller says its
    // map's values have, and both outlive the call.
    unsafe { bpf(MAP_LOOKUP_ELEM, &mut element) }?;
    value.truncate(size as usize);
    Ok(value)
}

#[repr(C)]
struct Create {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
}
// SAFETY: the first fields of `link_create` in `union bpf_attr`; the kernel takes the others as zero.
unsafe impl Attributes for Create {}

#[repr(C)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}
// SAFETY: `link_update` in `union bpf_attr`.
unsafe impl Attributes for Update {}

#[repr(C)]
struct Detach {
    link: u32,
}
// SAFETY: `link_detach` in `union bpf_attr`.
unsafe impl Attributes for Detach {}

#[repr(C)]
struct GetInfo {
    fd: u32,
    size: u32,
    info: u64,
}
// SAFETY: `info` in `union bpf_attr`.
unsafe impl Attributes for GetInfo {}

/// `struct bpf_link_info` of an XDP link.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    ifindex: u32,
    rest: [u32; 11],
}

/// A program's place on an interface, which it keeps until the last descriptor and pin of it are gone.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Attaches a program.
    pub(super) fn attach(program: BorrowedFd<'_>, ifindex: u32, mode: AttachMode) -> io::Result<Self> {
        let flags = match mode {
            AttachMode::Native | AttachMode::Auto => FLAG_NATIVE,
            AttachMode::Generic => FLAG_GENERIC,
        };
        let mut create = Create { program: number(program), ifindex, attach_type: ATTACH_XDP, flags };
        // SAFETY: no addresses; the command returns a descriptor.
        unsafe { descriptor(LINK_CREATE, &mut create) }.map(Self)
    }

    /// Opens a pinned one.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        open(path).map(Self)
    }

    /// Puts another program in place of the one that is there: every packet meets one of them.
    pub(super) fn replace(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut update = Update { link: self.number(), program: number(program), flags: 0, old_program: 0 };
        // SAFETY: no addresses.
        unsafe { bpf(LINK_UPDATE, &mut update) }.map(drop)
    }

    /// Takes the program off the interface, whoever else holds the link.
    pub(super) fn detach(&self) -> io::Result<()> {
        // SAFETY: no addresses.
        unsafe { bpf(LINK_DETACH, &mut Detach { link: self.number() }) }.map(drop)
    }

    /// The interface that it is on; `None` when that is gone.
    pub(super) fn ifindex(&self) -> io::Result<Option<u32>> {
        let mut info = LinkInfo::default();
        let mut request = GetInfo {
            fd: self.number(),
            size: size_of::<LinkInfo>() as u32,
            info: (&raw mut info).expose_provenance() as u64,
        };
        // SAFETY: `info` has the size that is told, and outlives the call. Any bytes are a `LinkInfo`.
        unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut request) }?;
        Ok(Some(info.ifindex).filter(|ifindex| *ifindex != 0))
    }

    /// Gives it a name, under which it lives on.
    pub(super) fn pin(&self, path: &Path) -> io::Result<()> {
        use std::os::fd::AsFd as _;
        pin(self.0.as_fd(), path)
    }

    fn number(&self) -> u32 {
        self.0.as_raw_fd().unsigned_abs()
    }
}

/// Takes this thread into a network namespace of its own.
pub(super) fn new_namespace() -> io::Result<()> {
    // SAFETY: an integer only; the thread has no sockets that could mind.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns when every program run that was under way has ended: an RCU grace period.
pub(super) fn wait_for_programs() -> io::Result<()> {
    /// `MEMBARRIER_CMD_GLOBAL` of Linux's membarrier.h: `synchronize_rcu` where there are several CPUs.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: integers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
