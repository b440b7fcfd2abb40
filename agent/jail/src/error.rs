//! What the host could not lend.

use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("{} is not in a cgroup v2 file system", path.display())]
    NotCgroup { path: PathBuf },
    #[error("cgroup {} is not offered the controller {controller}", path.display())]
    NoController { path: PathBuf, controller: &'static str },
    #[error("cannot {action} cgroup {}", path.display())]
    Cgroup {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("processes in cgroup {} do not end", path.display())]
    Undead { path: PathBuf },
    #[error("cannot {action} {}", path.display())]
    RunFolder {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make {mib} MiB of guest memory")]
    Memory {
        mib: u32,
        #[source]
        source: io::Error,
    },
    #[error("a sandbox's network cannot {what}")]
    Slot {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot hand a file descriptor over")]
    Handover(#[source] io::Error),
    #[error("{fds} descriptors are too many to hand over")]
    TooManyFds { fds: usize },
    #[error("the shim of a VMM cannot {step}")]
    Shim {
        step: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot tell whether process {pid} is a VMM's")]
    Identify {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("cannot keep process {pid} apart from others on the threads of a core")]
    Cores {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("cannot start {}", program.display())]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl JailError {
    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotCgroup { .. } => {
                "boot with systemd.unified_cgroup_hierarchy=1, or set paths.cgroups"
            }
            Self::NoController { .. } => {
                "give holdfastd's unit Delegate=cpu memory pids, or see cgroup.controllers of the parent"
            }
            Self::Cgroup { .. } => "holdfastd runs as root; see paths.cgroups",
            Self::Undead { .. } => "a process hangs in the kernel; the kernel's log says where",
            Self::RunFolder { .. } => "see paths.run: a writable tmpfs is expected",
            Self::Memory { .. } | Self::Handover(_) => "the node is out of memory or descriptors",
            Self::Slot { .. } => {
                "holdfastd needs CAP_NET_ADMIN, /dev/net/tun, nft, and a kernel with nftables"
            }
            Self::TooManyFds { .. } => "use an image of fewer layers",
            Self::Shim { .. } => {
                "holdfastd needs its capabilities (see its unit), and agent and shim must be of one build"
            }
            Self::Identify { .. } => "holdfastd needs /proc, without hidepid",
            Self::Cores { .. } => {
                "the kernel needs CONFIG_SCHED_CORE; or set host.smt to \"off\" or \"ignore\""
            }
            Self::Spawn { .. } => {
                "see paths.vmm, paths.shim and paths.convert: are they there and executable?"
            }
        }
    }
}
