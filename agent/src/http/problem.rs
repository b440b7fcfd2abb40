//! From every error of the parts to the one error answer.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use holdfast_api::{
    decode::BadBody,
    error::{Code, ErrorBody},
    labels::BadFilter,
};
use holdfast_snapshot::{Part, SnapshotError};
use holdfast_store::StoreError;
use holdfast_wire::guest::{Failure, FailureKind};
use log::error;

use crate::{
    egress::EgressError,
    error_chain::error_chain,
    images::{GcError, ImageError},
    sandbox::{
        CreateError, DeleteError, ExecError, FetchError, ForkError, PolicyError, ResumeError,
        SaveError, SecretError, SnapshotCallError, SuspendError,
    },
};

/// A refused or failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) code: Code,
    pub(super) message: String,
    pub(super) hint: String,
}

impl Problem {
    pub(super) fn new(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: hint.into() }
    }

    /// A value of the request that cannot be worked with.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, message, "correct the request and send it again")
    }

    /// Our own failure: told in full to the log.
    pub(super) fn internal(error: &dyn std::error::Error, hint: &str) -> Self {
        let message = error_chain(error);
        error!(error:% = message; "call failed");
        Self::new(Code::Internal, message, hint)
    }

    pub(super) fn body(&self) -> ErrorBody {
        ErrorBody::new(self.code, &*self.message, &*self.hint)
    }

    /// What the guest says no to, when it was asked to run something.
    pub(super) fn of_exec(error: &ExecError) -> Self {
        Self::of_guest(error, Code::CommandNotRun, Code::CommandNotRun)
    }

    /// The same, when it was asked for a command that was started before.
    pub(super) fn of_attach(error: &ExecError) -> Self {
        Self::of_guest(error, Code::ExecNotFound, Code::InvalidRequest)
    }

    /// The same, when it was asked to read or write a file.
    pub(super) fn of_file(error: &ExecError) -> Self {
        Self::of_guest(error, Code::FileNotFound, Code::FileRefused)
    }

    fn of_guest(error: &ExecError, not_found: Code, refused: Code) -> Self {
        let code = match error {
            ExecError::NotFound { .. } => Code::SandboxNotFound,
            ExecError::NotRunning { .. } => Code::SandboxNotRunning,
            ExecError::Refused(Failure { kind, .. }) => match kind {
                FailureKind::NotFound => not_found,
                FailureKind::Denied | FailureKind::Invalid | FailureKind::Exhausted => refused,
                FailureKind::Exists => Code::ExecIdReused,
                FailureKind::WrongState | FailureKind::Internal => Code::GuestNotAnswering,
            },
            ExecError::Guest(_) => Code::GuestNotAnswering,
            ExecError::Resume(error) => return error.as_ref().into(),
            ExecError::Body(source) => return Self::of_body(source),
            ExecError::Store(error) => return error.into(),
        };
        Self::new(code, error_chain(error), error.hint())
    }

    /// A body that could not be read: what its reader refused it with, if it was our reader.
    pub(super) fn of_body(error: &std::io::Error) -> Self {
        let own = error.get_ref().and_then(|source| source.downcast_ref::<Refusal>());
        match own {
            Some(Refusal(problem)) => problem.clone(),
            None => Self::new(Code::BodyTimedOut, error_chain(error), "send the body again"),
        }
    }

    /// As the error of a reader; [`Problem::of_body`] gets it back.
    pub(super) fn into_io(self) -> std::io::Error {
        std::io::Error::other(Refusal(self))
    }
}

/// Carries a problem through a reader's error.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
struct Refusal(Problem);

/// The code of an error answer, for the audit log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refused(pub(super) Code);

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = super::answer::json(self.code.status(), &self.body());
        response.extensions_mut().insert(Refused(self.code));
        if response.status() == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

impl From<BadBody> for Problem {
    fn from(error: BadBody) -> Self {
        Self::new(error.code(), error.to_string(), error.hint())
    }
}

impl From<holdfast_netpolicy::PolicyError> for Problem {
    fn from(error: holdfast_netpolicy::PolicyError) -> Self {
        use holdfast_netpolicy::Problem as What;
        let code = match &error.problem {
            What::Syntax(_) => Code::MalformedJson,
            _ => Code::InvalidRequest,
        };
        Self::new(code, error.to_string(), error.remedy())
    }
}

impl From<SecretError> for Problem {
    fn from(error: SecretError) -> Self {
        Self::internal(&error, error.hint())
    }
}

impl From<BadFilter> for Problem {
    fn from(error: BadFilter) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<&StoreError> for Problem {
    fn from(error: &StoreError) -> Self {
        Self::internal(error, error.hint())
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        (&error).into()
    }
}

impl From<CreateError> for Problem {
    fn from(error: CreateError) -> Self {
        let code = match &error {
            CreateError::NoDiskImage { .. } | CreateError::NoPublicImage { .. } => {
                Code::DiskImageNotFound
            }
            CreateError::NoSnapshot { .. } => Code::SnapshotNotFound,
            CreateError::Policy(_) => Code::InvalidRequest,
            CreateError::DiskImageNotReady { .. } | CreateError::NoImage { .. } => {
                Code::DiskImageNotReady
            }
            CreateError::Gone { .. } => Code::OutcomeUnknown,
            CreateError::Full(_) => Code::NoCapacity,
            CreateError::Stopping => Code::ShuttingDown,
            CreateError::Store(_)
            | CreateError::Disk(_)
            | CreateError::ImageStore(_)
            | CreateError::Random(_) => return Self::internal(&error, error.hint()),
        };
        Self::new(code, error_chain(&error), error.hint())
    }
}

impl From<DeleteError> for Problem {
    fn from(error: DeleteError) -> Self {
        match &error {
            DeleteError::NotFound { .. } => {
                Self::new(Code::SandboxNotFound, error.to_string(), error.hint())
            }
            DeleteError::Slow { .. } | DeleteError::Store(_) => {
                Self::internal(&error, error.hint())
            }
        }
    }
}

impl From<SuspendError> for Problem {
    fn from(error: SuspendError) -> Self {
        let code = match &error {
            SuspendError::NotFound { .. } => Code::SandboxNotFound,
            SuspendError::NotRunning { .. } => Code::SandboxNotRunning,
            _ => return Self::internal(&error, error.hint()),
        };
        Self::new(code, error_chain(&error), error.hint())
    }
}

impl From<PolicyError> for Problem {
    fn from(error: PolicyError) -> Self {
        match &error {
            PolicyError::NotFound { .. } => {
                Self::new(Code::SandboxNotFound, error.to_string(), error.hint())
            }
            // What the policy refers to is not there, or not of the right form.
            PolicyError::Egress(EgressError::Refused { .. }) => {
                Self::new(Code::InvalidRequest, error.to_string(), error.hint())
            }
            PolicyError::Slow { .. } | PolicyError::Store(_) | PolicyError::Egress(_) => {
                Self::internal(&error, error.hint())
            }
        }
    }
}

impl From<SnapshotCallError> for Problem {
    fn from(error: SnapshotCallError) -> Self {
        match error {
            SnapshotCallError::TooMany { .. } => {
                Self::new(Code::NoCapacity, error.to_string(), error.hint())
            }
            SnapshotCallError::Suspend(error) => error.into(),
            SnapshotCallError::Store(error) => error.into(),
        }
    }
}

impl From<ForkError> for Problem {
    fn from(error: ForkError) -> Self {
        match error {
            ForkError::Suspend(error) => error.into(),
            ForkError::Create(error) => error.into(),
            ForkError::Store(error) => error.into(),
        }
    }
}

impl From<SaveError> for Problem {
    fn from(error: SaveError) -> Self {
        match &error {
            SaveError::Snapshot(_) => {
                let hint = "its pieces in the state folder were changed or are gone: delete it";
                Self::new(Code::SnapshotDamaged, error_chain(&error), hint)
            }
            _ => Self::internal(&error, "see the node's log and its data partition"),
        }
    }
}

/// Of what the remote store has.
pub(super) fn remote_problem(error: SaveError) -> Problem {
    let (text, hint) = (error_chain(&error), "see section remote of the node's configuration");
    match &error {
        SaveError::NoRemote { .. } => Problem::new(Code::RemoteNotConfigured, text, hint),
        SaveError::Snapshot(SnapshotError::Missing { part: Part::Manifest(_) }) => {
            Problem::new(Code::SnapshotNotFound, text, "GET …/remotesnapshots lists them")
        }
        SaveError::Snapshot(SnapshotError::Store { .. }) => {
            Problem::new(Code::RemoteUnavailable, text, "try again; see the node's log")
        }
        SaveError::OwnKey { .. } => Problem::new(
            Code::RemoteNotConfigured,
            text,
            "delete the group's sandboxes and snapshots and restart the node, or use another group",
        ),
        SaveError::Snapshot(_) | SaveError::RemoteRecord { .. } => Problem::new(
            Code::SnapshotDamaged,
            text,
            "it was changed where it is kept, or made by a newer release",
        ),
        _ => Problem::internal(&error, "see the node's log and its data partition"),
    }
}

impl From<FetchError> for Problem {
    fn from(error: FetchError) -> Self {
        let code = match error {
            FetchError::TooMany { .. } => Code::NoCapacity,
            FetchError::NoImage { .. } => Code::DiskImageNotReady,
            FetchError::Save(error) => return remote_problem(error),
            FetchError::Store(error) => return error.into(),
            FetchError::ImageStore(_) | FetchError::Random(_) => {
                return Self::internal(&error, error.hint());
            }
        };
        Self::new(code, error.to_string(), error.hint())
    }
}

impl From<&ResumeError> for Problem {
    fn from(error: &ResumeError) -> Self {
        let code = match error {
            ResumeError::NotFound { .. } => Code::SandboxNotFound,
            ResumeError::NotSuspended { .. } => Code::SandboxNotSuspended,
            ResumeError::NoImage { .. } => Code::DiskImageNotReady,
            ResumeError::Full(_) => Code::NoCapacity,
            ResumeError::Stopping => Code::ShuttingDown,
            ResumeError::Failed { .. }
            | ResumeError::Slow { .. }
            | ResumeError::Store(_)
            | ResumeError::Disk(_)
            | ResumeError::ImageStore(_) => return Self::internal(error, error.hint()),
        };
        Self::new(code, error_chain(error), error.hint())
    }
}

impl From<ImageError> for Problem {
    fn from(error: ImageError) -> Self {
        let code = match &error {
            ImageError::Reference(_) => Code::InvalidRequest,
            ImageError::NotFound { .. } => Code::DiskImageNotFound,
            ImageError::InUse { .. } => Code::DiskImageInUse,
            ImageError::Busy { .. } => Code::TooManyCalls,
            ImageError::Stopping => Code::ShuttingDown,
            ImageError::Store(_)
            | ImageError::Folder(_)
            | ImageError::Public(_)
            | ImageError::Random(_) => return Self::internal(&error, error.hint()),
        };
        Self::new(code, error_chain(&error), error.hint())
    }
}

impl From<GcError> for Problem {
    fn from(error: GcError) -> Self {
        match &error {
            GcError::Busy => Self::new(Code::TooManyCalls, error.to_string(), error.hint()),
            _ => Self::internal(&error, error.hint()),
        }
    }
}
