//! The measurements of `cargo xtask bench`, one file each, and their common report.

pub mod affinity;
pub mod connections;
pub mod control;
pub mod fastpath;
pub mod report;
pub mod sniff;
