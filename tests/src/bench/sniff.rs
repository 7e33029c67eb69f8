//! When frames passed a device, by the kernel's clock.

use std::{
    ffi::CString,
    io,
    mem::zeroed,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

/// `SIOCGSTAMPNS` of Linux's sockios.h on 64-bit machines.
const STAMP: libc::c_ulong = 0x8907;
const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// A packet socket on a device of the namespace that the thread is in. It sees frames both ways.
#[derive(Debug)]
pub struct Sniffer(OwnedFd);

/// A TCP segment over IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// CLOCK_REALTIME at which the kernel had it.
    pub at: Duration,
    /// Source port.
    pub source: u16,
    /// TCP flags.
    pub flags: u8,
    /// Bytes of payload.
    pub payload: usize,
}

impl Sniffer {
    /// Opens one.
    pub fn new(device: &str) -> io::Result<Self> {
        let name = CString::new(device)?;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: plain system calls; the name is terminated, and the new descriptor is owned by
        // nobody else.
        let (fd, index) = unsafe {
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(ALL));
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            (OwnedFd::from_raw_fd(fd), libc::if_nametoindex(name.as_ptr()))
        };
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ALL;
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the pointer and the length are those of `address`.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let sniffer = Self(fd);
        // The first question makes the kernel stamp frames; there is no answer yet.
        let _ = sniffer.stamp();
        Ok(sniffer)
    }

    /// Forgets what has come so far.
    pub fn drain(&self) {
        while self.receive(&mut [0; 2048]).is_some() {}
    }

    /// The next segment, if there is one; other frames are left out.
    #[must_use]
    pub fn next(&self) -> Option<Seen> {
        let mut frame = [0; 2048];
        loop {
            let length = self.receive(&mut frame)?;
            let at = self.stamp().ok()?;
            if let Some(seen) = frame.get(..length).and_then(|frame| segment(frame, at)) {
                return Some(seen);
            }
        }
    }

    /// The next frame as it is, if there is one: as long as segmentation offload makes them.
    #[must_use]
    pub fn frame(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        let length = self.receive(&mut frame)?;
        frame.truncate(length);
        Some(frame)
    }

    fn receive(&self, frame: &mut [u8]) -> Option<usize> {
        // SAFETY: the pointer and the length are those of `frame`.
        let length = unsafe { libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        usize::try_from(length).ok()
    }

    /// When the frame that was received last was there.
    fn stamp(&self) -> io::Result<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes one timespec.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), STAMP, &raw mut time) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32))
    }
}

/// Reads an Ethernet frame with a TCP segment over IPv4.
fn segment(frame: &[u8], at: Duration) -> Option<Seen> {
    let ip = frame.strip_prefix(frame.get(..12)?)?.strip_prefix(&[8, 0])?;
    let header = usize::from(ip.first()? & 15) * 4;
    if ip.get(9)? != &6 {
        return None;
    }
    let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    let tcp = ip.get(header..total)?;
    let payload = tcp.len().checked_sub(usize::from(tcp.get(12)? >> 4) * 4)?;
    let source = u16::from_be_bytes([*tcp.first()?, *tcp.get(1)?]);
    Some(Seen { at, source, flags: *tcp.get(13)?, payload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Body, Packet, Tcp, flags};

    #[test]
    fn segments_are_read() {
        let tcp = Tcp { src: 1000, dst: 443, flags: flags::SYN, payload: vec![7; 3], ..Tcp::default() };
        let packet = Packet::new([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), Body::Tcp(tcp));
        let seen = segment(&packet.frame(), Duration::ZERO).expect("TCP");
        assert_eq!((seen.source, seen.flags, seen.payload), (1000, flags::SYN, 3));
        let frame = packet.frame();
        for length in 0..frame.len() {
            assert_eq!(segment(&frame[..length], Duration::ZERO), None, "{length}");
        }
    }
}
