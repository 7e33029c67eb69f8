//! The control daemon: loads the data path, keeps its maps in line with what the operator wants, and
//! answers the command line.
//!
//! Desired state ([`config`], reachability, operator commands) and actual state (the maps, behind
//! [`dataplane`]) meet in one place, [`reconcile`].

pub mod api;
pub mod balancer;
pub mod config;
pub mod control;
pub mod ctl;
pub mod daemon;
pub mod dataplane;
mod events;
pub mod netlink;
pub mod privileges;
pub mod reconcile;
mod state;
