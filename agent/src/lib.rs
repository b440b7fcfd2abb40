//! The parts of the daemon, as a library so that tests can start the real server. Holds no rules
//! of its own: those are in the crates it puts together.
#![forbid(unsafe_code)]

pub mod audit;
pub mod auth;
mod blocking;
mod bundle;
pub mod config;
mod confined;
pub mod credentials;
pub mod daemon;
pub mod durable;
pub mod egress;
mod error_chain;
pub mod fault;
mod frames;
mod host;
mod http;
pub mod images;
pub mod logging;
pub mod metrics;
pub mod notify;
mod random;
pub mod sandbox;
pub mod tls;
