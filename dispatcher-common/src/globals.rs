//! The one record that every packet may read.

/// Bits of the address filter.
pub const FILTER_BITS: u32 = 65_536;

/// Places for hints, see [`Globals::vips`].
pub const VIP_HINTS: usize = 4096;

/// Frames cannot be cloned (generic mode): the client's retransmission repairs what a replay would.
pub const GLOBAL_NO_CLONES: u32 = 1 << 0;
/// Log rare events through aya-log.
pub const GLOBAL_LOG: u32 = 1 << 1;
/// There are classes beside the default one: connections are told apart when they are bound.
pub const GLOBAL_CLASSES: u32 = 1 << 2;
/// Some backend has a limit.
pub const GLOBAL_LIMITS: u32 = 1 << 3;
/// Some class has a DSCP.
pub const GLOBAL_DSCP: u32 = 1 << 4;
/// Any of these is something to do for packets of established flows.
pub const GLOBAL_QOS: u32 = GLOBAL_LIMITS | GLOBAL_DSCP;

/// Value of `GLOBALS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Globals {
    /// SYN cookie keys; the one of `epoch & 1` makes cookies, both are accepted.
    pub cookie_keys: [[u64; 2]; 2],
    /// The daemon's last sign of life, nanoseconds of CLOCK_MONOTONIC; after
    /// [`HEARTBEAT_LIMIT_NS`] nothing is held for it.
    pub heartbeat: u64,
    /// Raised by one after the daemon changed a `Backend::link`.
    pub generation: u32,
    /// Which cookie key is current.
    pub epoch: u32,
    /// `GLOBAL_*`.
    pub flags: u32,
    /// Entries of `STASH` minus one.
    pub stash_mask: u32,
    /// [`ABI_VERSION`](crate::abi::ABI_VERSION) of whoever made the maps; 0 while they are being made. It
    /// stays at this offset in all versions.
    pub abi: u32,
    /// The daemon is told of one bound connection in so many; 0: of none.
    pub trace: u32,
    /// Bit [`Addr::filter_bit`](crate::addr::Addr::filter_bit) is set for each VIP (seen as a
    /// destination) and each backend (seen as a source): other packets are passed after two tests.
    pub filter: [u32; (FILTER_BITS / 32) as usize],
    /// What `VIPS` says, for one VIP of each [`VipKey::hint`](crate::service::VipKey::hint): the index
    /// of its frontend plus one, 0 for none. Saves a lookup that costs a tenth of a SYN.
    pub vips: [u16; VIP_HINTS],
}

const _: () = assert!(core::mem::offset_of!(Globals, abi) == 56);

/// Age of the heartbeat at which the daemon counts as away.
pub const HEARTBEAT_LIMIT_NS: u64 = 1_000_000_000;

impl Default for Globals {
    fn default() -> Self {
        Self {
            cookie_keys: [[0; 2]; 2],
            heartbeat: 0,
            generation: 0,
            epoch: 0,
            flags: 0,
            stash_mask: 0,
            abi: 0,
            trace: 0,
            filter: [0; (FILTER_BITS / 32) as usize],
            vips: [0; VIP_HINTS],
        }
    }
}

impl Globals {
    /// Lets packets to a VIP find its frontend without a look into `VIPS`.
    pub fn set_hint(&mut self, vip: &crate::service::VipKey, frontend: u32) {
        if let Some(hint) = self.vips.get_mut(vip.hint()) {
            *hint = u16::try_from(frontend + 1).unwrap_or(0);
        }
    }

    /// Marks an address as one of ours.
    pub fn filter_add(&mut self, addr: impl Into<crate::addr::Addr>) {
        let bit = addr.into().filter_bit();
        if let Some(word) = self.filter.get_mut((bit / 32) as usize) {
            *word |= 1 << (bit % 32);
        }
    }

    /// True when an address may be one of ours.
    #[inline(always)]
    #[must_use]
    pub fn filter_has(&self, addr: &crate::addr::Addr) -> bool {
        let bit = addr.filter_bit();
        match self.filter.get((bit / 32) as usize) {
            Some(word) => word >> (bit % 32) & 1 != 0,
            None => false,
        }
    }
}
