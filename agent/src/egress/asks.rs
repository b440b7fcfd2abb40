//! What is asked of a group's egress, what is kept of it, and how it is put to the process.

use holdfast_jail::SlotSockets;
use holdfast_model::SandboxId;
use holdfast_wire::egress::{self as wire, Put, Request};
use tokio::sync::oneshot;

use super::{EgressError, Rules, Values, Way};

pub(super) type Reply = oneshot::Sender<Result<(), EgressError>>;

/// What is asked of a group's egress.
pub(super) enum Ask {
    Put {
        sandbox: SandboxId,
        way: Way,
        rules: Rules,
        reply: Reply,
    },
    Change {
        sandbox: SandboxId,
        rules: Rules,
        reply: Reply,
    },
    Remove {
        sandbox: SandboxId,
        reply: Reply,
    },
    /// Values that policies refer to are others.
    Revalue {
        reply: Reply,
    },
    /// The node's addresses are others.
    Configure,
    /// The group is gone.
    Forget,
    /// What the process holds and nobody has put goes.
    Settled,
}

/// A sandbox that is to be served.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) way: Way,
    pub(super) rules: Rules,
    /// Milliseconds since 1970, when values of its policy are to be brought again. `None`: never by
    /// themselves.
    pub(super) renew_at_ms: Option<u64>,
}

impl Wanted {
    /// Its sockets, to be handed over; they stay here too, for the next process. Blocks.
    pub(super) fn sockets(&mut self) -> Result<SlotSockets, EgressError> {
        if let Way::Tap(tap) = &self.way {
            self.way = Way::Sockets(SlotSockets::reopen(tap)?);
        }
        match &self.way {
            Way::Sockets(sockets) => Ok(sockets.try_clone()?),
            Way::Tap(_) => Err(EgressError::Unexpected),
        }
    }
}

/// What came of requests that were sent.
pub(super) enum Told {
    /// One for a sandbox.
    Sandbox {
        sandbox: SandboxId,
        outcome: Result<(), EgressError>,
        /// The rules to go back to when these were refused, and the generation of these.
        before: Option<(Rules, u64)>,
        reply: Reply,
    },
    /// Those that brought other values.
    Values { outcome: Result<(), EgressError>, reply: Option<Reply> },
}

impl Told {
    /// Whether the process is not to be trusted with more: it is silent, or may have values that it
    /// was told to give up.
    pub(super) fn shows_useless(&self) -> bool {
        match self {
            Self::Sandbox { outcome, .. } => matches!(outcome, Err(EgressError::Silent { .. })),
            Self::Values { outcome, .. } => outcome.is_err(),
        }
    }
}

pub(super) fn put(sandbox: &SandboxId, rules: &Rules, values: Values) -> Request {
    Request::Put(Put {
        sandbox: sandbox.to_string(),
        generation: rules.generation,
        policy: rules.policy.clone(),
        secrets: values.credentials,
    })
}

pub(super) fn revalue(sandbox: &SandboxId, values: Values) -> Request {
    Request::Values(wire::Values { sandbox: sandbox.to_string(), secrets: values.credentials })
}

/// Whether a policy may refer to values: it names none otherwise.
pub(super) fn refers(rules: &Rules) -> bool {
    const NAME: &[u8] = b"\"valueRef\"";
    rules.policy.windows(NAME.len()).any(|part| part == NAME)
}
