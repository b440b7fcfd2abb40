//! Every way in which getting an image fails: what, why, and what to do about it.

use std::io;

use holdfast_model::Digest;

use crate::{platform::BadPlatform, reference::BadReference};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Reference(#[from] BadReference),
    #[error(transparent)]
    Platform(#[from] BadPlatform),
    /// `place` is a registry, a folder or an archive.
    #[error("{what} was not found in {place}")]
    NotFound { what: String, place: String },
    #[error("registry {host} refused access to {what}{}", if *.with_credentials {
        " with the given credentials"
    } else {
        " without credentials"
    })]
    Unauthorized { host: String, what: String, with_credentials: bool },
    #[error("registry {host} could not be reached for {what}")]
    Unreachable {
        host: String,
        what: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("registry {host} answered {status} for {what}")]
    Answer { host: String, what: String, status: u16 },
    #[error("registry {host} ended {what} after {got} of {size} bytes, again and again")]
    Cut { host: String, what: String, got: u64, size: u64 },
    #[error("plain http to {host} is refused")]
    Insecure { host: String },
    #[error("{what} has digest {found}, not {expected}")]
    Digest { what: String, expected: Digest, found: Digest },
    #[error("{what} has {found} bytes, not {expected}")]
    Size { what: String, expected: u64, found: u64 },
    #[error("{what} is over the limit of {limit}")]
    TooLarge { what: String, limit: u64 },
    #[error("{what} is malformed: {reason}")]
    Malformed { what: String, reason: String },
    #[error("{what} has no image for {wanted}, only for {offered}")]
    NoPlatform { what: String, wanted: String, offered: String },
    #[error("{what} holds several images: {names}")]
    Ambiguous { what: String, names: String },
    #[error("the image store is in use by a pull")]
    Busy,
    #[error("the image store cannot be used")]
    Store(#[source] io::Error),
    #[error("{what} cannot be read")]
    Read {
        what: String,
        #[source]
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed { what: what.into(), reason: reason.to_string() }
    }

    /// Is the other side in trouble, so that what is cached may stand in for its answer?
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Cut { .. } => true,
            Self::Answer { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }

    /// Is the disk of the store full?
    pub fn is_no_space(&self) -> bool {
        use io::ErrorKind as K;
        let full = |kind| matches!(kind, K::StorageFull | K::QuotaExceeded | K::FileTooLarge);
        matches!(self, Self::Store(source) if full(source.kind()))
    }

    /// What the operator or user can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Reference(error) => error.hint(),
            Self::Platform(_) => "write the platform as os/architecture, e.g. linux/amd64",
            Self::NotFound { .. } => "check the name and tag; a private image may need credentials",
            Self::Unauthorized { with_credentials: false, .. } => {
                "give a username and token for this registry, or check the image's name"
            }
            Self::Unauthorized { .. } => {
                "check username and token, and that they may pull this image"
            }
            Self::Unreachable { .. } => {
                "check the registry's name, the network and the host's CA certificates, then try again"
            }
            Self::Answer { status: 429, .. } => {
                "the registry limits how often it is asked: wait, or use credentials"
            }
            Self::Answer { .. } | Self::Cut { .. } => {
                "the registry is in trouble: try again later; what was received is kept"
            }
            Self::Insecure { .. } => {
                "serve the registry over https, or list it in plain_http of the node's config"
            }
            Self::Digest { .. } | Self::Size { .. } => {
                "the content was damaged or exchanged: push the image again, or pull from another place"
            }
            Self::TooLarge { .. } => "use a smaller image; the limits protect the node",
            Self::Malformed { .. } => {
                "make the image again with a current tool (OCI or docker schema 2 form)"
            }
            Self::NoPlatform { .. } => "use an image that was built for this platform",
            Self::Ambiguous { .. } => "say which one is meant by its name",
            Self::Busy => "wait until the running pulls have ended",
            Self::Store(_) if self.is_no_space() => {
                "free disk space: delete unused disk images, then collect garbage"
            }
            Self::Store(_) => "check that the store's folder exists and is writable for its user",
            Self::Read { .. } => {
                "check that the path is right and readable for the user of the conversion"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_other_trouble_of_the_store() {
        let full = Error::Store(io::ErrorKind::StorageFull.into());
        assert!(full.is_no_space());
        assert!(full.hint().starts_with("free disk space"));
        assert!(!Error::Store(io::ErrorKind::PermissionDenied.into()).is_no_space());
    }

    #[test]
    fn refused_access_says_whether_credentials_were_given() {
        let refused = |with_credentials| Error::Unauthorized {
            host: "r.io".to_owned(),
            what: "manifest r.io/a:b".to_owned(),
            with_credentials,
        };
        let text = "registry r.io refused access to manifest r.io/a:b";
        assert_eq!(refused(true).to_string(), format!("{text} with the given credentials"));
        assert_eq!(refused(false).to_string(), format!("{text} without credentials"));
        assert!(refused(false).hint().starts_with("give a username"));
    }

    #[test]
    fn only_trouble_of_the_other_side_lets_the_cache_stand_in() {
        let answer = |status| Error::Answer { host: String::new(), what: String::new(), status };
        for (status, outage) in [(500, true), (503, true), (429, true), (400, false)] {
            assert_eq!(answer(status).is_outage(), outage, "{status}");
        }
        let denied = Error::NotFound { what: String::new(), place: String::new() };
        assert!(!denied.is_outage());
    }
}
