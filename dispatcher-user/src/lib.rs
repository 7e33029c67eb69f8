//! Control daemon library.
