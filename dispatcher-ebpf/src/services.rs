//! Services, backends and the load-balancing table, as the daemon published them.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap},
};
use dispatcher_common::{
    abi,
    addr::Addr,
    flow::{FlowKey, ports_of},
    globals::Globals,
    reason::Reason,
    service::{BACKEND_UP, Backend, Frontend, VipKey, endpoint_index},
};

#[map]
static VIPS: HashMap<VipKey, u32> = HashMap::with_max_entries(abi::DEFAULT_FRONTENDS, 0);
#[map]
static FRONTENDS: Array<Frontend> = Array::with_max_entries(abi::DEFAULT_FRONTENDS, 0);
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(abi::DEFAULT_BACKENDS * 2, 0);
#[map]
static BACKEND_INDEX: HashMap<u32, u32> = HashMap::with_max_entries(abi::DEFAULT_BACKENDS, 0);
#[map]
static LB_TABLE: Array<u32> = Array::with_max_entries(abi::DEFAULT_LB_TABLE, 0);
#[map]
static SOURCES: Array<Addr> = Array::with_max_entries(abi::DEFAULT_SOURCES, 0);

/// The frontend that a packet is addressed to, and its index.
#[inline(always)]
pub fn frontend_of(globals: &Globals, key: &FlowKey) -> Option<(u32, &'static mut Frontend)> {
    let vip = VipKey { addr: key.dst, port: ports_of(key.ports).1.to_be(), proto: key.proto as u16 };
    if let Some(hint) = globals.vips.get(vip.hint())
        && let Ok(frontend) = frontend((*hint as u32).wrapping_sub(1))
        && frontend.addr == vip.addr
        && frontend.port == vip.port
        && frontend.proto as u16 == vip.proto
    {
        return Some((*hint as u32 - 1, frontend));
    }
    // SAFETY: the value is copied; a concurrent change shows the old or the new word.
    let index = unsafe { VIPS.get(vip).copied() }?;
    Some((index, frontend(index).ok()?))
}

/// A frontend. The data path writes only its learned flags.
#[inline(always)]
pub fn frontend(index: u32) -> Result<&'static mut Frontend, Reason> {
    let frontend = FRONTENDS.get_ptr_mut(index).ok_or(Reason::Internal)?;
    // SAFETY: array entries live as long as the map; words are written whole.
    Ok(unsafe { &mut *frontend })
}

/// A backend's endpoint of a family, whatever its state.
#[inline(always)]
pub fn endpoint(backend: u32, v4: bool) -> Option<&'static Backend> {
    BACKENDS.get(endpoint_index(backend, v4))
}

/// A backend's endpoint of a family, if packets can be sent there.
#[inline(always)]
pub fn endpoint_up(backend: u32, v4: bool) -> Option<&'static Backend> {
    endpoint(backend, v4).filter(|e| e.flags & BACKEND_UP != 0)
}

/// True when packets of some family can be sent to the backend of a stable id.
#[inline(always)]
pub fn any_up(id: u32) -> bool {
    backend_of_id(id)
        .is_some_and(|backend| endpoint_up(backend, true).is_some() || endpoint_up(backend, false).is_some())
}

/// Backend index of a stable id.
#[inline(always)]
pub fn backend_of_id(id: u32) -> Option<u32> {
    // SAFETY: the value is copied.
    unsafe { BACKEND_INDEX.get(id).copied() }
}

/// The load-balancing table's backend for a hash, if its endpoint is up; a few places further
/// else, so that a table that is a moment old does no harm. `not` is a backend to avoid.
#[inline(always)]
pub fn pick(frontend: &Frontend, hash: u32, v4: bool, not: u32) -> Result<u32, Reason> {
    if frontend.table_len == 0 {
        return Err(Reason::NoBackend);
    }
    let mut fallback = None;
    let mut hash = hash;
    for _ in 0..8 {
        let at = frontend.table_base.wrapping_add(hash % frontend.table_len);
        let Some(backend) = LB_TABLE.get(at).copied() else { return Err(Reason::NoBackend) };
        if endpoint_up(backend, v4).is_some() {
            if backend != not {
                return Ok(backend);
            }
            fallback = Some(backend);
        }
        hash = hash.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15);
    }
    fallback.ok_or(Reason::NoBackend)
}

/// A source address of a frontend's pool.
#[inline(always)]
pub fn source(frontend: &Frontend, hash: u32) -> Option<&'static Addr> {
    if frontend.source_len == 0 {
        return None;
    }
    SOURCES.get(frontend.source_base.wrapping_add(hash % frontend.source_len))
}
