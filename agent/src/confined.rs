//! Programs of ours that run confined beside the daemon: egress, conversions.

use std::{path::Path, process::Command};

use holdfast_jail::{
    Cgroup, CgroupTree, Confinement, Handover, Identity, JailError, Limits, confine,
};
use holdfast_model::{Mib, MilliCpu};
use log::warn;
use rustix::process::geteuid;

/// What the environment may tell one: where the system's TLS roots are.
const ENVIRONMENT: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// What one may use of the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// Against that of others, while there is not enough for all. A sandbox of one CPU has 100.
    pub(crate) cpu_weight: u32,
    pub(crate) memory: Mib,
    pub(crate) pids: u32,
}

/// A cgroup for one. `None` where there are no cgroups: then no sandbox runs here either, and this
/// was said at the start.
pub(crate) fn cgroup(tree: &CgroupTree, name: &str, share: Share) -> Option<Cgroup> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let limits = Limits {
        cpu: MilliCpu(u32::try_from(cpus * 1000).unwrap_or(u32::MAX)),
        cpu_weight: share.cpu_weight,
        memory: share.memory,
        pids: share.pids,
        io: None,
    };
    let made = tree.prepare().and_then(|()| tree.create(name, limits));
    made.inspect_err(|error| warn!(cgroup = name, error:%; "a program runs without a cgroup")).ok()
}

/// The command that starts one as the user and group of this number, with these descriptors and no
/// others. Its streams are the caller's to say.
pub(crate) fn command(
    program: &Path,
    handover: Handover,
    id: u32,
    cgroup: Option<&Cgroup>,
) -> Result<Command, JailError> {
    // An agent that is not root is all there is.
    let identity = geteuid().is_root().then_some(Identity { uid: id, gid: id });
    let mut confinement = Confinement::new(handover, identity);
    if let Some(cgroup) = cgroup {
        confinement = confinement.in_cgroup(cgroup)?;
    }
    let mut command = Command::new(program);
    confine(&mut command, confinement);
    for name in ENVIRONMENT {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    Ok(command)
}
