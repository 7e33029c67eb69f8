//! What the BPF program and the daemon share: map layouts, reasons, parsers and the arithmetic of
//! checksums, sequence numbers and cookies.
//!
//! This crate performs no I/O, allocates nothing and never panics on input: every parser is tested
//! on the host on every prefix of messages and on random changes of them.
//!
//! Byte order: whatever is copied from or to a packet (addresses, ports, MAC addresses, VLAN tags)
//! keeps network byte order in memory; everything else (sequence numbers, counters, times) is in
//! host order.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod abi;
pub mod addr;
pub mod checksum;
pub mod cookie;
pub mod event;
pub mod flow;
pub mod globals;
pub mod http;
pub mod opaque;
pub mod proxy;
pub mod qos;
pub mod quic;
pub mod reason;
pub mod service;
pub mod session;
pub mod siphash;
pub mod stash;
pub mod tcp;
pub mod tls;

#[cfg(feature = "user")]
mod pod;
