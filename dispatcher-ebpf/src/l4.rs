//! Services in `l4` mode: the first packet binds, by weighted consistent hash of addresses and
//! ports, so that the same backend is found again even when the flow table was lost.

use dispatcher_common::{
    flow::{CLASS_BIT, FLAG_L4},
    reason::Reason,
    service::Frontend,
    tcp::{RST, SYN},
};

use crate::{
    bind::{self, Opening},
    control, counters, flows,
    globals::scratch,
    packet::{Frame, Tcp},
    parse::Parsed,
    qos, services, stash,
    verdict::Verdict,
};

/// Binds the flow of a packet and sends the packet on.
#[inline(never)]
pub fn bind(frame: &Frame, p: &Parsed, index: u32, frontend: &Frontend) -> Verdict {
    if p.is_tcp() {
        let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        let flags = unsafe { (*tcp).flags };
        if flags & (SYN | RST) == RST {
            return Verdict(Reason::ResetIgnored);
        }
    }
    let hash = stash::mix(&p.key) as u32;
    let backend = services::pick(frontend, hash, p.is_v4(), u32::MAX)?;
    scratch()?.class = 0;
    let class = qos::class(index);
    if !qos::connects(backend, class, false) {
        return Verdict(Reason::OverConnections);
    }
    let marks = (class << CLASS_BIT) as u8;
    let opening =
        Opening { frontend: index, backend, flags: FLAG_L4, marks, slot: 0, isn: 0, cookie: 0, client: 0 };
    let client = stash::client_link(frame, p);
    bind::open(&p.key, &client, &opening)?;
    bind::install(&p.key, frontend)?;
    counters::backend(backend, |stats| {
        stats.connections += 1;
        stats.nonsecure += 1;
    });
    let flow = flows::get(&p.key).ok_or(Reason::FlowTable)?;
    control::forward(frame, p, flow, Reason::BoundL4)
}
