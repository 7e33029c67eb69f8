//! Everything that runs the dispatcher on packets: network namespaces, TLS peers, a packet builder,
//! the program-run harness and the demo.
//!
//! Namespaces, processes and files that are made here are removed when their owner is dropped, also
//! on panic. Nothing touches the interfaces of the host.

pub mod bench;
pub mod capture;
pub mod daemon;
pub mod demo;
pub mod flood;
pub mod harness;
pub mod hello;
pub mod http;
pub mod netns;
pub mod packet;
pub mod servers;
pub mod sockets;
pub mod stage;
pub mod system;
pub mod tagger;
pub mod tls;
pub mod topology;
pub mod town;
