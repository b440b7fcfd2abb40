//! The one enum for a sandbox's state, and the one function for its moves.

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    Creating,
    Running,
    /// It is being suspended: its microVM stands still, and is there until the snapshot is durable.
    Stopping,
    /// There is a snapshot and no microVM.
    Suspended,
    Resuming,
    Deleting,
    Failed,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// PID 1 answered, and the root is joined or the snapshot taken up.
    GuestReady,
    /// A step of the launch failed, or the microVM ended.
    Lost,
    /// A client asked for it, or its launch was given up.
    Delete,
    /// A client asked for it, or nobody used it for long enough.
    Suspend,
    /// The snapshot is durable.
    Saved,
    /// There is none; the microVM goes on.
    NotSaved,
    Resume,
    /// The snapshot was not taken up, and is as it was.
    NotResumed,
    /// The node was restarted under it. It goes back to its snapshot, which it has.
    FellBack,
}

/// Why a sandbox was suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StopReason {
    /// A client asked.
    Asked,
    /// Nobody had used it for as long as its policy says.
    Idle,
    /// The node was shut down. It goes on when the node is back.
    NodeStopped,
}

/// What of a sandbox a suspend keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SuspendMode {
    /// Memory, devices and disk: it goes on where it stood.
    #[default]
    Memory,
    /// The disk alone: it boots anew from it.
    Disk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox in state {state:?} does not take {event:?}")]
pub struct Refused {
    pub state: State,
    pub event: Event,
}

impl State {
    pub const ALL: [Self; 7] = [
        Self::Creating,
        Self::Running,
        Self::Stopping,
        Self::Suspended,
        Self::Resuming,
        Self::Deleting,
        Self::Failed,
    ];

    /// The state that follows, or why none does.
    pub fn after(self, event: Event) -> Result<Self, Refused> {
        use {Event as E, State as S};
        Ok(match (self, event) {
            // Asking twice is not an error: clients retry.
            (_, E::Delete) => S::Deleting,
            (S::Creating | S::Resuming, E::GuestReady) | (S::Stopping, E::NotSaved) => S::Running,
            (S::Creating | S::Running | S::Stopping, E::Lost) => S::Failed,
            // It has no microVM, or is going or gone wrong already: news of its end changes nothing.
            (S::Suspended | S::Deleting | S::Failed, E::Lost) => self,
            (S::Running, E::Suspend) => S::Stopping,
            (S::Stopping, E::Saved)
            | (S::Resuming, E::NotResumed | E::Lost)
            | (S::Running | S::Stopping | S::Resuming, E::FellBack) => S::Suspended,
            (S::Suspended, E::Resume) => S::Resuming,
            (state, event) => return Err(Refused { state, event }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_state_and_event_does_what_the_table_says() {
        use {Event as E, State as S};
        let events = [
            E::GuestReady,
            E::Lost,
            E::Suspend,
            E::Saved,
            E::NotSaved,
            E::Resume,
            E::NotResumed,
            E::FellBack,
        ];
        let (run, off, fail) = (Some(S::Running), Some(S::Suspended), Some(S::Failed));
        let table = [
            (S::Creating, [run, fail, None, None, None, None, None, None]),
            (S::Running, [None, fail, Some(S::Stopping), None, None, None, None, off]),
            (S::Stopping, [None, fail, None, off, run, None, None, off]),
            (S::Suspended, [None, off, None, None, None, Some(S::Resuming), None, None]),
            (S::Resuming, [run, off, None, None, None, None, off, off]),
            (S::Deleting, [None, Some(S::Deleting), None, None, None, None, None, None]),
            (S::Failed, [None, fail, None, None, None, None, None, None]),
        ];
        assert_eq!(table.map(|(state, _)| state), S::ALL);
        for (state, row) in table {
            assert_eq!(state.after(E::Delete), Ok(S::Deleting), "{state:?}");
            for (event, expected) in events.into_iter().zip(row) {
                assert_eq!(state.after(event).ok(), expected, "{state:?} on {event:?}");
            }
        }
    }
}
