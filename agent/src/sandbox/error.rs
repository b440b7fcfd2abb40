//! What can go wrong with a sandbox, and what to do about it.

use std::{io, path::PathBuf, time::Duration};

use holdfast_jail::JailError;
use holdfast_model::{Digest, DiskImageId, SandboxId, SnapshotId, State};
use holdfast_scheduler::Full;
use holdfast_store::StoreError;
use holdfast_wire::{frame::FrameError, guest::Failure};

/// Why the sandboxes' side of the agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the keys of this node cannot be had")]
    Keys(#[from] crate::credentials::KeyError),
    #[error("the snapshots of this node cannot be read")]
    Snapshots(#[from] super::snapshots::SaveError),
    #[error("the remote store of section remote cannot be used")]
    Remote(#[from] holdfast_blob::BadLocation),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Egress(#[from] crate::egress::EgressError),
    #[error("cannot {action} {}", path.display())]
    Folder {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl StartError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Store(error) => error.hint(),
            Self::Jail(error) => error.hint(),
            Self::Egress(error) => error.hint(),
            Self::Keys(error) => error.hint(),
            Self::Remote(_) => "docs/config.md has the form of every key",
            Self::Snapshots(_) => {
                "the snapshot-key in the state folder must be the one they were made with"
            }
            Self::Folder { .. } => "holdfastd runs as root; see paths.state and paths.run",
        }
    }
}

/// Why no sandbox was made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("there is no disk image {id} in this group")]
    NoDiskImage { id: DiskImageId },
    #[error("disk image {id} is not ready: {reason}")]
    DiskImageNotReady { id: DiskImageId, reason: String },
    #[error("there is no snapshot {id} in this group")]
    NoSnapshot { id: SnapshotId },
    #[error("there is no public disk image {name:?}")]
    NoPublicImage { name: String },
    #[error("the policy does not fit the sandbox that the snapshot is of")]
    Policy(#[source] holdfast_api::decode::BadBody),
    #[error("the files of image {digest} are not on this node")]
    NoImage { digest: Digest },
    #[error("sandbox {id}, made by the same request, was deleted meanwhile")]
    Gone { id: SandboxId },
    #[error(transparent)]
    Full(#[from] Full),
    #[error("the agent is stopping")]
    Stopping,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot measure the free space of the state folder")]
    Disk(#[source] io::Error),
    #[error("the system gives no random bytes")]
    Random(#[source] io::Error),
    #[error("the image store cannot be read")]
    ImageStore(#[source] holdfast_rootfs::StoreError),
}

impl CreateError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoDiskImage { .. } | Self::NoPublicImage { .. } => {
                "list what there is with `holdfast image list`"
            }
            Self::NoSnapshot { .. } => "list what there is with `holdfast snapshot list`",
            Self::DiskImageNotReady { .. } => {
                "wait until it is Ready; one that Failed is deleted and made again"
            }
            Self::NoImage { .. } => "make the disk image again",
            Self::Policy(_) => "change what it names",
            Self::Gone { .. } => "create a new one with a new request id",
            Self::Full(full) => full.hint(),
            Self::Stopping => "try again when the node is back",
            Self::Store(error) => error.hint(),
            Self::Disk(_) | Self::Random(_) | Self::ImageStore(_) => {
                "see the node's log and its data partition"
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error("there is no sandbox {id}")]
    NotFound { id: SandboxId },
    #[error("sandbox {id} is not gone after {} s; it goes on being deleted", waited.as_secs())]
    Slow { id: SandboxId, waited: Duration },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl DeleteError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "list what there is with `holdfast sandbox list`",
            Self::Slow { .. } => "ask again; the node's log says what it waits for",
            Self::Store(error) => error.hint(),
        }
    }
}

/// Why a call into a sandbox was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error("there is no sandbox {id}")]
    NotFound { id: SandboxId },
    #[error("sandbox {id} is {state:?}, not Running")]
    NotRunning { id: SandboxId, state: State },
    /// The guest's own words: what does not exist, what is refused.
    #[error("{}", .0.message)]
    Refused(Failure),
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// It was suspended, and could not be woken.
    #[error(transparent)]
    Resume(#[from] Box<ResumeError>),
    /// What the caller was sending could not be read.
    #[error("the body could not be read")]
    Body(#[source] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ExecError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "list what there is with `holdfast sandbox list`",
            Self::NotRunning { .. } => "get the sandbox: a Failed one says why",
            Self::Refused(_) => "the command, path and user are those of the sandbox's image",
            Self::Guest(error) => error.hint(),
            Self::Resume(error) => error.hint(),
            Self::Body(_) => "send it again",
            Self::Store(error) => error.hint(),
        }
    }
}

/// Why a sandbox was not suspended. It runs on.
#[derive(Debug, thiserror::Error)]
pub enum SuspendError {
    #[error("there is no sandbox {id}")]
    NotFound { id: SandboxId },
    #[error("sandbox {id} is {state:?}, not Running")]
    NotRunning { id: SandboxId, state: State },
    #[error("the VMM refused: {reason}")]
    Refused { reason: String },
    #[error(
        "the guest does not hold its disk still, and would lose what it has not written: {reason}"
    )]
    NotHeld { reason: String },
    #[error(transparent)]
    Control(#[from] super::control::ControlError),
    #[error("guest memory cannot be read")]
    Memory(#[source] io::Error),
    #[error(transparent)]
    Template(super::disk::DiskError),
    #[error(transparent)]
    Save(#[from] super::snapshots::SaveError),
    #[error("a part of the microVM could not be made")]
    Launch(#[from] LaunchError),
    #[error("the system gives no random bytes")]
    Random(#[source] io::Error),
    /// What its driver says.
    #[error("sandbox {id}: {reason}")]
    Failed { id: SandboxId, reason: String },
    #[error("sandbox {id} is not saved after {} s", waited.as_secs())]
    Slow { id: SandboxId, waited: Duration },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl SuspendError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "list what there is with `holdfast sandbox list`",
            Self::NotRunning { .. } => "get the sandbox: a Failed one says why",
            Self::Store(error) => error.hint(),
            _ => "it runs on; see the node's log and the space of its data partition",
        }
    }
}

/// Why a sandbox has the policy it had.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("there is no sandbox {id}")]
    NotFound { id: SandboxId },
    #[error("sandbox {id} did not settle within {} s", waited.as_secs())]
    Slow { id: SandboxId, waited: Duration },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Egress(#[from] crate::egress::EgressError),
}

impl PolicyError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "list what there is with `holdfast sandbox list`",
            Self::Slow { .. } => "ask again; the node's log says what it waits for",
            Self::Store(error) => error.hint(),
            Self::Egress(error) => error.hint(),
        }
    }
}

pub use crate::credentials::SecretError;

/// Why no snapshot was made for a client. The sandbox goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotCallError {
    #[error("the node has {max} snapshots, as many as it keeps")]
    TooMany { max: u32 },
    #[error(transparent)]
    Suspend(#[from] SuspendError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl SnapshotCallError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::TooMany { .. } => "delete a snapshot, or raise limits.snapshots_max",
            Self::Suspend(error) => error.hint(),
            Self::Store(error) => error.hint(),
        }
    }
}

/// Why a sandbox was not forked. Nothing of the forks is left.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    #[error(transparent)]
    Suspend(#[from] SuspendError),
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a sandbox was not resumed. Its snapshot is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    #[error("there is no sandbox {id}")]
    NotFound { id: SandboxId },
    #[error("sandbox {id} is {state:?}, not Suspended")]
    NotSuspended { id: SandboxId, state: State },
    #[error("the files of image {digest} are not on this node")]
    NoImage { digest: Digest },
    #[error(transparent)]
    Full(#[from] Full),
    #[error("the agent is stopping")]
    Stopping,
    /// What its driver says.
    #[error("sandbox {id}: {reason}")]
    Failed { id: SandboxId, reason: String },
    #[error("sandbox {id} is still {state:?} after {} s", waited.as_secs())]
    Slow { id: SandboxId, state: State, waited: Duration },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot measure the free space of the state folder")]
    Disk(#[source] io::Error),
    #[error("the image store cannot be read")]
    ImageStore(#[source] holdfast_rootfs::StoreError),
}

impl ResumeError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "list what there is with `holdfast sandbox list`",
            Self::NotSuspended { .. } => "get the sandbox: a Failed one says why",
            Self::NoImage { .. } => "make the disk image again",
            Self::Full(full) => full.hint(),
            Self::Stopping => "try again when the node is back",
            Self::Slow { .. } => "ask again; the node's log says what it waits for",
            Self::Store(error) => error.hint(),
            Self::Failed { .. } | Self::Disk(_) | Self::ImageStore(_) => {
                "its snapshot is as it was; see the node's log and its data partition"
            }
        }
    }
}

/// What the link to PID 1 of a microVM can do wrong. The guest is hostile: each ends the one call.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("the sandbox cannot be reached")]
    Connect(#[source] io::Error),
    #[error("the sandbox did not answer within {} s", waited.as_secs())]
    Silent { waited: Duration },
    #[error("the sandbox answered what is no answer")]
    Frame(#[from] FrameError),
    #[error("the sandbox answered {got} where {wanted} was due")]
    Unexpected { got: &'static str, wanted: &'static str },
    #[error("the connection to the sandbox ended before the answer was complete")]
    Ended,
}

impl GuestError {
    pub fn hint(&self) -> &'static str {
        "get the sandbox: if it is Failed it says why; else its workload may have stopped PID 1"
    }
}

/// Which stage of a launch failed. The text of the whole chain becomes the record's `failure`.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("preparing the disk failed")]
    Disk(#[source] super::disk::DiskError),
    #[error("its snapshot cannot be read")]
    Snapshot(#[source] super::snapshots::SaveError),
    #[error("the system gives no random bytes")]
    Random(#[source] io::Error),
    #[error("its group's egress could not be had")]
    Egress(#[source] crate::egress::EgressError),
    #[error("opening {what} failed")]
    Open {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("preparing the jail failed")]
    Jail(#[from] JailError),
    #[error("the state of the snapshot could not be handed over")]
    State(#[source] io::Error),
    #[error("the VMM did not answer on its control socket")]
    Control(#[source] super::control::ControlError),
    #[error("the VMM refused to boot: {reason}")]
    Refused { reason: String },
    #[error("booting failed: {reason}")]
    Ended { reason: String },
    #[error("the guest was not ready {} s after the start", waited.as_secs())]
    NotReady { waited: Duration },
    #[error("the guest could not be set up")]
    Guest(#[source] GuestError),
    #[error("the guest could not start the image: {message}")]
    Start { message: String },
    #[error("the image cannot be run: {reason}")]
    Image { reason: String },
}

/// Why no snapshot was brought from the remote store.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{max} snapshots are the most this node keeps")]
    TooMany { max: u32 },
    #[error("it was made on image {digest}, which is not on this node")]
    NoImage { digest: Digest },
    #[error("the image store cannot be read")]
    ImageStore(#[source] holdfast_rootfs::StoreError),
    #[error("no random id")]
    Random(#[source] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Save(#[from] super::snapshots::SaveError),
}

impl FetchError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::TooMany { .. } => "delete some, or raise limits.snapshots_max",
            Self::NoImage { .. } => "pull or import that very image first, then fetch it again",
            Self::ImageStore(_) | Self::Random(_) => "see the node's log",
            Self::Store(error) => error.hint(),
            Self::Save(_) => "see section remote of the node's configuration, and its log",
        }
    }
}
