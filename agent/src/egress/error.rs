//! What can go wrong with the processes through which sandboxes talk to the outside.

use std::{io, path::PathBuf, time::Duration};

use holdfast_jail::JailError;
use holdfast_model::{GroupKey, SandboxId};
use holdfast_nft::{BYWAYS_MAX, NftError};
use holdfast_wire::frame::FrameError;

use crate::{credentials::KeyError, durable::FileError};

/// Why what was asked for a sandbox's egress did not come to be. Until it does nothing leaves the
/// sandbox, or only what its earlier policy allows.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    #[error("the CA of group {group} cannot be had")]
    Authority {
        group: Box<GroupKey>,
        #[source]
        source: Box<KeyError>,
    },
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("cannot start {}", program.display())]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Nft(#[from] NftError),
    #[error("the host's rules cannot be loaded")]
    Rules {
        #[source]
        source: io::Error,
    },
    #[error("there are {BYWAYS_MAX} ways past proxies: no more fit")]
    Byways,
    #[error("the egress process cannot be talked to")]
    Link(#[source] io::Error),
    #[error("the egress process sent what is no message")]
    Message(#[source] FrameError),
    #[error("the egress process speaks version {found} of the protocol")]
    Version { found: u16 },
    #[error("the egress process has ended")]
    Ended,
    #[error("the egress process did not answer within {} s", waited.as_secs())]
    Silent { waited: Duration },
    #[error("the egress process refused: {reason}")]
    Refused { reason: String },
    #[error("sandbox {id} has no network now")]
    NotHeld { id: SandboxId },
    #[error("the egress process answered something else")]
    Unexpected,
}

impl EgressError {
    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Authority { source, .. } => source.hint(),
            Self::File(_) => "see paths.state and paths.run, and the files of section egress",
            Self::Jail(error) => error.hint(),
            Self::Nft(error) => error.hint(),
            Self::Rules { .. } => "is nft installed? See the node's log for what it says",
            Self::Byways => "delete sandboxes whose policies let flows pass the proxy by",
            Self::Start { .. } => "see paths.egress: is it there and executable?",
            Self::Version { .. } => "agent and egress process must be of one build",
            Self::Refused { .. } => "change what it names",
            Self::NotHeld { .. } => "ask again when the sandbox runs",
            Self::Link(_)
            | Self::Message(_)
            | Self::Ended
            | Self::Silent { .. }
            | Self::Unexpected => "it is started again by itself; the node's log says why it ended",
        }
    }
}
