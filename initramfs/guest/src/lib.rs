//! Parts of the microVM's PID 1. A library so that tests can drive all but the boot itself without
//! a microVM: the same calls over a Unix socket, a workload in real namespaces.

pub mod boot;
pub mod cgroup;
pub mod children;
mod clock;
mod command;
mod connection;
mod connections;
mod entrypoint;
mod environment;
mod exchange;
mod exec;
mod failure;
mod files;
pub mod guest;
mod info;
mod kept;
pub mod limits;
mod link;
mod modules;
pub mod mounts;
pub mod power;
mod process;
mod processes;
mod program;
mod quiesce;
mod replay;
mod resumed;
mod root;
pub mod rpc;
mod signals;
mod sys;
mod user;
mod volumes;
pub mod vsock;
pub mod workload;
