//! The error body, and the list of every error code with its status.

use serde::{Deserialize, Serialize};

/// Body of every answer with status 400 or above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// The name of a [`Code`].
    pub code: String,
    /// What is wrong, naming the thing.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ErrorBody {
    pub fn new(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Self {
        let (message, hint) = (message.into(), hint.into());
        let hint = (!hint.is_empty()).then_some(hint);
        Self { error: ErrorDetail { code: code.as_str().to_owned(), message, hint } }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $status:literal,)*) => {
        /// Every error the API answers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            pub const fn status(self) -> u16 {
                match self {
                    $(Self::$name => $status,)*
                }
            }
        }
    };
}

// Client libraries replay 403, 408, 429 and most of 5xx for minutes: what is the client's affair is
// one of the other 4xx. 502 is the one status above them that is not replayed after a POST.
codes! {
    /// No token, or one that this node does not know.
    Unauthorized = 401,
    /// The body is not JSON.
    MalformedJson = 400,
    /// The body is JSON of another shape, or a value in it cannot be worked with.
    InvalidRequest = 400,
    /// The contract has the field, this node does not carry it out yet.
    UnsupportedField = 400,
    /// CPU, memory or disk outside the tiers.
    InvalidResourceTier = 400,
    UnsupportedApiVersion = 400,
    /// The body stopped coming.
    BodyTimedOut = 400,
    BodyTooLarge = 413,
    /// No such path.
    RouteNotFound = 404,
    /// The contract has the call, this node does not carry it out yet.
    UnsupportedOperation = 404,
    MethodNotAllowed = 405,
    SandboxGroupNotFound = 404,
    SandboxNotFound = 404,
    DiskImageNotFound = 404,
    SnapshotNotFound = 404,
    FileNotFound = 404,
    SecretNotFound = 404,
    /// The call does not fit the sandbox's state.
    SandboxNotRunning = 409,
    SandboxNotSuspended = 409,
    /// What it is kept as was changed or is gone.
    SnapshotDamaged = 409,
    /// The group has no remote store that could be used.
    RemoteNotConfigured = 409,
    /// The remote store does not do what it was asked.
    RemoteUnavailable = 502,
    SandboxGroupNotEmpty = 409,
    /// The group that every node has.
    SandboxGroupProtected = 409,
    DiskImageNotReady = 409,
    /// A sandbox is made from it.
    DiskImageInUse = 409,
    /// The node has no room left for what was asked.
    NoCapacity = 409,
    /// A request id came back with another call.
    RequestIdReused = 409,
    /// A retried call was begun and its outcome is not known, or no longer held.
    OutcomeUnknown = 409,
    /// No command of this id is kept: it never began, or its end was collected.
    ExecNotFound = 404,
    /// A command of this id was begun before.
    ExecIdReused = 409,
    /// Too many calls of this kind are at work.
    TooManyCalls = 409,
    /// The node is being shut down.
    ShuttingDown = 409,
    /// The guest could not start the command.
    CommandNotRun = 422,
    /// The guest refused to read or write the file.
    FileRefused = 422,
    /// The image could not be had from its registry or archive.
    ImageUnavailable = 422,
    /// The guest broke its protocol or stopped answering.
    GuestNotAnswering = 502,
    /// The node's own failure; the node's log has more. After a POST it is answered as 502.
    Internal = 500,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_the_form_the_sdk_reads() {
        let body = ErrorBody::new(Code::SandboxNotFound, "no sandbox x", "list them");
        let text = serde_json::to_string(&body).unwrap();
        let golden =
            r#"{"error":{"code":"SandboxNotFound","message":"no sandbox x","hint":"list them"}}"#;
        assert_eq!(text, golden);
    }

    #[test]
    fn no_code_has_a_status_that_clients_replay_for_a_mistake_of_their_own() {
        let replayed = [403, 408, 429, 501, 503, 504];
        for code in Code::ALL {
            assert!(!replayed.contains(&code.status()), "{}", code.as_str());
        }
    }
}
