//! What can go wrong with a change of nftables.

use std::io;

/// Why a change did not come to be. Then everything is as it was.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("the kernel's nftables cannot be talked to")]
    Talk(#[source] io::Error),
    #[error("the host's nftables refuse {what}")]
    Refused {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the kernel answered something that is no answer")]
    Answer,
    #[error("{0} is no number of a way past a proxy")]
    Number(u16),
}

impl NftError {
    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Refused { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "load the host's ruleset again: `systemctl restart nftables`"
            }
            Self::Talk(_) | Self::Refused { .. } => "see the kernel's log; it is tried again",
            Self::Answer | Self::Number(_) => "this is a bug",
        }
    }
}
