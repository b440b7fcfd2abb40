//! Between the agent and one `holdfast-convert`: one [`Request`] on its stdin, [`Report`]s on its
//! stdout, the last of them Done or Failed. Its stderr is its log.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub version: u16,
    pub source: Source,
    /// Folder of the image store, writable by the process.
    pub store: String,
    /// `os/architecture`, e.g. `linux/amd64`.
    pub platform: String,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    Registry {
        /// `host[:port]/name[:tag][@digest]`, already made complete.
        reference: String,
        credentials: Option<Credentials>,
        /// Registries (`host[:port]`) that may be spoken to over plain http besides loopback ones.
        plain_http: Vec<String>,
    },
    /// Folder in OCI layout form, with an optional `name` to choose by.
    Layout { path: String, name: Option<String> },
    /// OCI or docker archive (tar), open on this inherited fd.
    Archive { fd: i32, name: Option<String> },
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    pub username: String,
    pub secret: String,
}

// A password must not reach a log through `{:?}`.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({}, ..)", self.username)
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Registry { reference, .. } => write!(f, "Registry({reference})"),
            Self::Layout { path, name } => write!(f, "Layout({path}, {name:?})"),
            Self::Archive { fd, name } => write!(f, "Archive({fd}, {name:?})"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// At most a few a second.
    Progress(Progress),
    /// The image with this manifest digest (`sha256:…`) is in the store, durable.
    Done {
        digest: String,
    },
    Failed(Failure),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub layers: u32,
    pub layers_done: u32,
    /// Compressed bytes of all layers; 0 while unknown.
    pub bytes: u64,
    pub bytes_done: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// Names the thing and the reason.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    NotFound,
    Unauthorized,
    /// The registry did not answer, or answered with an error of its own.
    Unavailable,
    /// Digest, size or form of what was received is wrong, or it breaks a limit.
    BadImage,
    NoSpace,
    Internal,
}
