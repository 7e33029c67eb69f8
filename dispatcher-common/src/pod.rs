//! Permission for aya to copy these types from and to maps.

use aya::Pod;

macro_rules! pod {
    ($($ty:path),* $(,)?) => {$(
        // SAFETY: repr(C), Copy, 'static, only integers and arrays of them, and without padding
        // (asserted by size beside each definition), so every bit pattern is a value.
        unsafe impl Pod for $ty {}
    )*};
}

pod!(
    crate::addr::Addr,
    crate::event::Event,
    crate::event::Release,
    crate::flow::Flow,
    crate::flow::FlowKey,
    crate::globals::Globals,
    crate::qos::Buckets,
    crate::qos::ClassEntry,
    crate::qos::ClassStats,
    crate::qos::Credits,
    crate::qos::TakenBack,
    crate::qos::Name,
    crate::qos::Network,
    crate::qos::Rates,
    crate::service::Backend,
    crate::service::BackendStats,
    crate::service::BackendTimes,
    crate::service::Frontend,
    crate::service::VipKey,
    crate::session::Session,
    crate::session::SessionKey,
    crate::stash::Slot,
);
