//! What can go wrong, as the user is told, and with which exit code.

use holdfast_api::error::ErrorDetail;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The node refused or failed.
    #[error("{} ({})", detail.message, detail.code)]
    Api { status: u16, detail: ErrorDetail },
    #[error("{0}")]
    Wrong(String),
    #[error("cannot reach {endpoint}")]
    Unreachable {
        endpoint: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{0}")]
    Host(String),
    #[error("{0}")]
    File(#[from] std::io::Error),
    #[error("the node's answer is not understood: {0}")]
    Answer(String),
}

impl CliError {
    /// What the user can do next.
    pub(crate) fn hint(&self) -> Option<&str> {
        match self {
            Self::Api { status: 401, .. } => {
                Some("set HOLDFAST_TOKEN to the node's token (`scripts/node start` prints it)")
            }
            Self::Api { detail, .. } => detail.hint.as_deref(),
            Self::Unreachable { .. } => Some(
                "check HOLDFAST_ENDPOINT and HOLDFAST_CA, and that the node is up; \
                 `holdfast doctor` looks step by step",
            ),
            Self::Answer(_) => Some("use a command line of the node's own version"),
            Self::Wrong(_) | Self::Host(_) | Self::File(_) => None,
        }
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Api { detail, .. } if detail.code == "NoCapacity" => 3,
            Self::Api { detail, .. } if detail.code == "Internal" => 4,
            Self::Api { status: 500.., .. } => 3,
            Self::Api { .. } | Self::Wrong(_) => 1,
            Self::Unreachable { .. } | Self::Host(_) | Self::File(_) => 3,
            Self::Answer(_) => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(status: u16, code: &str) -> CliError {
        let detail = ErrorDetail { code: code.to_owned(), message: "m".to_owned(), hint: None };
        CliError::Api { status, detail }
    }

    #[test]
    fn exit_codes_tell_whose_fault_it_is() {
        assert_eq!(api(404, "SandboxNotFound").exit_code(), 1);
        assert_eq!(api(409, "NoCapacity").exit_code(), 3);
        assert_eq!(api(502, "GuestNotAnswering").exit_code(), 3);
        assert_eq!(api(500, "Internal").exit_code(), 4);
        assert_eq!(CliError::Wrong(String::new()).exit_code(), 1);
    }
}
