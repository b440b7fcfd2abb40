//! The one enum for a sandbox's state, and the one function for its moves.

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life. Suspend and resume join with snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    Creating,
    Running,
    Deleting,
    Failed,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// PID 1 answered and the root is joined.
    GuestReady,
    /// A step of the launch failed, the microVM ended, or the agent was restarted under it.
    Lost,
    /// A client asked for it, or its launch was given up.
    Delete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox in state {state:?} does not take {event:?}")]
pub struct Refused {
    pub state: State,
    pub event: Event,
}

impl State {
    pub const ALL: [Self; 4] = [Self::Creating, Self::Running, Self::Deleting, Self::Failed];

    /// The state that follows, or why none does.
    pub fn after(self, event: Event) -> Result<Self, Refused> {
        use {Event as E, State as S};
        Ok(match (self, event) {
            (S::Creating, E::GuestReady) => S::Running,
            (S::Creating | S::Running, E::Lost) => S::Failed,
            // It is going, or gone wrong, already: news of its end changes nothing.
            (S::Deleting | S::Failed, E::Lost) => self,
            // Asking twice is not an error: clients retry.
            (_, E::Delete) => S::Deleting,
            (state, event @ E::GuestReady) => return Err(Refused { state, event }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_state_and_event_does_what_the_table_says() {
        use {Event as E, State as S};
        let table = [
            (S::Creating, [Some(S::Running), Some(S::Failed), Some(S::Deleting)]),
            (S::Running, [None, Some(S::Failed), Some(S::Deleting)]),
            (S::Deleting, [None, Some(S::Deleting), Some(S::Deleting)]),
            (S::Failed, [None, Some(S::Failed), Some(S::Deleting)]),
        ];
        assert_eq!(table.map(|(state, _)| state), S::ALL);
        for (state, row) in table {
            for (event, expected) in [E::GuestReady, E::Lost, E::Delete].into_iter().zip(row) {
                assert_eq!(state.after(event).ok(), expected, "{state:?} on {event:?}");
            }
        }
    }
}
