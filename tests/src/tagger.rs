//! A switch in userspace that puts VLAN tags on frames of one port and takes them off again.
//!
//! Not every kernel has VLAN devices; packet sockets are everywhere.

use std::{
    ffi::CString,
    io,
    mem::{size_of, zeroed},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};

use crate::netns::Netns;

/// Tags as on the wire (TPID, TCI), outermost first.
pub const TAGS: [[u8; 4]; 2] = [[0x88, 0xa8, 0, 200], [0x81, 0, 0, 100]];

/// The tags that a link with so many tags carries.
#[must_use]
pub fn tags(count: u8) -> &'static [[u8; 4]] {
    TAGS.get(TAGS.len() - usize::from(count.min(2))..).unwrap_or(&TAGS)
}

/// The switch. Frames without exactly the expected tags do not pass toward the plain port.
#[derive(Debug)]
pub struct Tagger {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Tagger {
    /// Connects the ports `plain` and `trunk` of a namespace.
    pub fn new(netns: &Netns, plain: &str, trunk: &str, count: u8) -> Result<Self> {
        // With NAPI frames are merged beyond what can be sent on, unless they may not grow.
        for port in [plain, trunk] {
            netns.ip(&format!("link set {port} gro_max_size 1000"))?;
        }
        // Packet sockets allow for one tag beyond the MTU, and only for 802.1Q.
        netns.ip(&format!("link set {trunk} mtu 1600"))?;
        let (plain, trunk) = netns.run(|| {
            let open =
                |port: &str| Port::open(port).with_context(|| format!("opening a packet socket on {port}"));
            Ok::<_, anyhow::Error>((Arc::new(open(plain)?), Arc::new(open(trunk)?)))
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let run = |from: &Arc<Port>, to: &Arc<Port>, change: Change| {
            let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Some(frame) = from.receive() else { continue };
                    if let Some(frame) = change(&frame, tags(count)) {
                        to.send(&frame);
                    }
                }
            })
        };
        threads.push(run(&plain, &trunk, add));
        threads.push(run(&trunk, &plain, take));
        Ok(Self { stop, threads })
    }
}

impl Drop for Tagger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Makes the frame that goes out of the one that came in, or drops it.
type Change = fn(&[u8], &[[u8; 4]]) -> Option<Vec<u8>>;

fn add(frame: &[u8], tags: &[[u8; 4]]) -> Option<Vec<u8>> {
    let (macs, rest) = frame.split_at_checked(12)?;
    Some([macs, tags.as_flattened(), rest].concat())
}

fn take(frame: &[u8], tags: &[[u8; 4]]) -> Option<Vec<u8>> {
    let (macs, rest) = frame.split_at_checked(12)?;
    let rest = rest.strip_prefix(tags.as_flattened())?;
    let more = rest.starts_with(&[0x81, 0]) || rest.starts_with(&[0x88, 0xa8]);
    (!more).then(|| [macs, rest].concat())
}

/// A packet socket bound to a device.
#[derive(Debug)]
pub struct Port(OwnedFd);

const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

impl Port {
    /// Opens one in the namespace of this thread.
    pub fn open(device: &str) -> io::Result<Self> {
        let name = CString::new(device)?;
        // SAFETY: plain system calls; the name is terminated, and the new descriptor is owned by
        // nobody else.
        let (fd, index) = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(ALL));
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            (OwnedFd::from_raw_fd(fd), libc::if_nametoindex(name.as_ptr()))
        };
        let port = Self(fd);
        port.option(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1_i32)?;
        port.option(libc::SOL_PACKET, libc::PACKET_AUXDATA, &1_i32)?;
        port.option(libc::SOL_SOCKET, libc::SO_RCVBUF, &(4_i32 << 20))?;
        port.option(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &libc::timeval { tv_sec: 0, tv_usec: 100_000 })?;
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ALL;
        address.sll_ifindex = index as i32;
        // SAFETY: the pointer and the length are those of `address`.
        let bound = unsafe {
            libc::bind(port.0.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
        };
        if bound == 0 { Ok(port) } else { Err(io::Error::last_os_error()) }
    }

    fn option<T>(&self, level: i32, name: i32, value: &T) -> io::Result<()> {
        // SAFETY: the pointer and the length are those of `value`.
        let done = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                name,
                std::ptr::from_ref(value).cast(),
                size_of::<T>() as u32,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The next frame as it was on the wire; `None` after a while without one. The kernel takes the
    /// outermost tag off and tells it in a control message.
    fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0_u8; 65_536];
        let mut control = [0_u64; 16];
        let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the message points at buffers that live here, with their lengths.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
        frame.truncate(usize::try_from(length).ok()?);
        // SAFETY: the kernel has filled the control buffer, and CMSG_NXTHDR stays inside it; an
        // auxdata message holds a tpacket_auxdata, maybe unaligned.
        unsafe {
            let mut header = libc::CMSG_FIRSTHDR(&raw const message);
            while let Some(control) = header.as_ref() {
                if control.cmsg_level == libc::SOL_PACKET && control.cmsg_type == libc::PACKET_AUXDATA {
                    let data: libc::tpacket_auxdata =
                        libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned();
                    if data.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                        let ([a, b], [c, d]) =
                            (data.tp_vlan_tpid.to_be_bytes(), data.tp_vlan_tci.to_be_bytes());
                        return add(&frame, &[[a, b, c, d]]);
                    }
                }
                header = libc::CMSG_NXTHDR(&raw const message, header);
            }
        }
        Some(frame)
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) {
        // SAFETY: the pointer and the length are those of `frame`. A frame that the device does not
        // take is lost, as on any wire.
        unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_put_on_and_taken_off() {
        let frame: Vec<u8> = (0..30).collect();
        for count in 0..=2 {
            let tagged = add(&frame, tags(count)).expect("long enough");
            assert_eq!(tagged.len(), 30 + 4 * usize::from(count));
            assert_eq!(take(&tagged, tags(count)).as_deref(), Some(frame.as_slice()));
        }
        assert_eq!(take(&frame, tags(1)), None);
        assert_eq!(take(&add(&frame, tags(1)).expect("long enough"), tags(0)), None);
        assert_eq!(take(&frame[..11], tags(0)), None);
    }
}
