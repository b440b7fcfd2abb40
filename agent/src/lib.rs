//! The parts of the daemon, as a library so that tests can start the real server. Holds no rules
//! of its own: those are in the crates it puts together.
#![forbid(unsafe_code)]

pub mod config;
