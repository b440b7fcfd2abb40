//! PID 1's calls against a real workload on this machine: namespaces, overlay and cgroups are the
//! kernel's, only the microVM is missing. Needs root and busybox-static.
#![forbid(unsafe_code)]

#[path = "../client/mod.rs"]
mod client;
mod entrypoints;
mod execs;
mod file_calls;
mod kept;
mod networks;
mod sandbox;
mod streams;
