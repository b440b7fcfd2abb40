//! What a conversion can end with, and how the agent is told.

use std::io;

use holdfast_oci as oci;
use holdfast_rootfs::{AssembleError, Fault, LayerError, StoreError};
use holdfast_wire::convert::{Failure, FailureKind};

/// Longest message sent: an error may quote a name of the image.
const MESSAGE_CHARS_MAX: usize = 2000;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Get(#[from] oci::Error),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("request cannot be carried out: {0}")]
    Request(String),
    #[error("{what} cannot be opened")]
    Open {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("the process cannot give up its rights ({what})")]
    Confine {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the list of public images cannot be changed")]
    Public(#[source] io::Error),
    #[error("whoever asked for the conversion is gone")]
    Gone,
    #[error("the thread that fetches ended without a word")]
    Fetcher,
}

impl Error {
    fn kind(&self) -> FailureKind {
        use FailureKind as K;
        let of_fault = |fault| match fault {
            // A source is a local file here: one that ends early, or that cannot be read.
            Fault::Image | Fault::Source => K::BadImage,
            Fault::NoSpace => K::NoSpace,
            Fault::Store => K::Internal,
        };
        match self {
            Self::Get(error) => kind_of(error),
            Self::Layer(error) => of_fault(error.fault()),
            Self::Assemble(error) => of_fault(error.fault()),
            Self::Store(error) => of_fault(error.fault()),
            Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => K::NotFound,
            Self::Public(source) if source.kind() == io::ErrorKind::StorageFull => K::NoSpace,
            Self::Request(_)
            | Self::Open { .. }
            | Self::Confine { .. }
            | Self::Public(_)
            | Self::Gone
            | Self::Fetcher => K::Internal,
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::Get(error) => error.hint(),
            Self::Layer(error) => error.hint(),
            Self::Assemble(error) => error.hint(),
            Self::Store(error) => error.hint(),
            Self::Request(_) => "agent and holdfast-convert must be of one version",
            Self::Open { .. } => "check that the path is right and readable",
            Self::Confine { .. } => "the kernel must have seccomp filters (Linux 5.6 or newer)",
            Self::Public(_) => "check that public.json in the store is valid and writable",
            Self::Gone => "ask again",
            Self::Fetcher => "this is a bug: report it with the log of holdfast-convert",
        }
    }
}

fn kind_of(error: &oci::Error) -> FailureKind {
    use FailureKind as K;
    use oci::Error as E;
    match error {
        E::NotFound { .. } => K::NotFound,
        E::Unauthorized { .. } => K::Unauthorized,
        E::Unreachable { .. } | E::Answer { .. } | E::Cut { .. } | E::Insecure { .. } => {
            K::Unavailable
        }
        E::Reference(_)
        | E::Platform(_)
        | E::Digest { .. }
        | E::Size { .. }
        | E::TooLarge { .. }
        | E::Malformed { .. }
        | E::NoPlatform { .. }
        | E::Ambiguous { .. }
        | E::Read { .. } => K::BadImage,
        E::Store(_) if error.is_no_space() => K::NoSpace,
        E::Store(_) | E::Busy => K::Internal,
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let mut message = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            message.push_str(": ");
            message.push_str(&cause.to_string());
            source = cause.source();
        }
        let message = message.chars().take(MESSAGE_CHARS_MAX).collect();
        Self { kind: error.kind(), message, hint: error.hint().to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(error: impl Into<Error>) -> Failure {
        Failure::from(&error.into())
    }

    #[test]
    fn every_kind_of_trouble_has_its_kind_of_failure() {
        let text = || String::from("x");
        let answer = |status| oci::Error::Answer { host: text(), what: text(), status };
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let cases = [
            (failure(oci::Error::NotFound { what: text(), place: text() }), FailureKind::NotFound),
            (failure(answer(503)), FailureKind::Unavailable),
            (failure(oci::Error::Insecure { host: text() }), FailureKind::Unavailable),
            (failure(oci::Error::Store(full())), FailureKind::NoSpace),
            (failure(oci::Error::Busy), FailureKind::Internal),
            (failure(StoreError::Io { path: "x".into(), source: full() }), FailureKind::NoSpace),
            (
                failure("a/..".parse::<oci::Reference>().map_err(oci::Error::from).unwrap_err()),
                FailureKind::BadImage,
            ),
        ];
        for (failure, kind) in cases {
            assert_eq!(failure.kind, kind, "{failure:?}");
            assert!(!failure.hint.is_empty());
        }
    }

    #[test]
    fn the_message_has_the_whole_chain_of_reasons() {
        let source = io::Error::other("the disk is on fire");
        let failure = failure(oci::Error::Store(source));
        assert_eq!(failure.message, "the image store cannot be used: the disk is on fire");
    }
}
