//! The control daemon: loads the data path, keeps its maps in line with what the operator wants, and
//! answers the command line.
//!
//! Desired state ([`config`], reachability, operator commands) and actual state (the maps, behind
//! [`dataplane`]) meet in one place, [`reconcile`].

pub mod balancer;
pub mod config;
pub mod dataplane;
pub mod reconcile;
