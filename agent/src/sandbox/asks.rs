//! What a sandbox's driver is asked, and what it begins and parts with.

use std::time::Instant;

use holdfast_scheduler::Reservation;
use holdfast_store::{Intent, StoreError};
use tokio::sync::{mpsc, oneshot};

use super::{
    BootPhases, PolicyError, SuspendError,
    launch::Machine,
    report::ResumeReport,
    suspend::{Kept, Suspend},
};
use crate::images::Located;

/// Asks waiting for one sandbox. It takes few kinds, and one waiting of each would do: more means
/// it is stuck, and whoever asks again need not be queued.
pub(super) const INBOX_MAX: usize = 8;

pub(super) enum Ask {
    Delete,
    /// The agent stops.
    Stop(Ending),
    /// Heard while it is Running.
    Suspend(Suspend),
    /// Heard while it is Suspended.
    Resume(Box<Wake>),
    /// Heard while it is Running or Suspended; else the reply is dropped.
    Keep(oneshot::Sender<Result<Kept, SuspendError>>),
    /// The policy to have from now on, as its record keeps it. Heard where no move is under way;
    /// else the reply is dropped.
    Lifecycle(String, oneshot::Sender<Result<(), StoreError>>),
    /// The same for the egress policy; answered with how often it was given.
    Egress(String, oneshot::Sender<Result<u64, PolicyError>>),
}

/// What a machine was parted from for.
pub(super) enum Parted {
    /// It ended, or is needed no more.
    Ended,
    /// An ask to end it, Delete or Stop.
    Asked(Ask),
}

/// The next ask that ends whatever is under way. Others are of no use then.
pub(super) async fn ending(inbox: &mut mpsc::Receiver<Ask>) -> Ask {
    loop {
        match inbox.recv().await {
            Some(ask @ (Ask::Delete | Ask::Stop(_))) => return ask,
            Some(
                Ask::Suspend(_)
                | Ask::Resume(_)
                | Ask::Keep(_)
                | Ask::Lifecycle(..)
                | Ask::Egress(..),
            ) => {}
            None => return Ask::Stop(Ending::Detach),
        }
    }
}

/// What a stop of the agent does to microVMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// They go on, for the next agent. One that is being made is made anew by it.
    Detach,
    /// The node is shut down: they are suspended, and go on when it is back. One for which there is
    /// no time is powered off.
    Suspend,
    /// They are powered off in good order.
    PowerOff,
}

/// How a driver begins.
pub(super) enum Beginning {
    Launch(Box<Launch>),
    /// Its machine runs already.
    TakeOver(Box<Machine>),
    /// The sandbox only waits to be deleted.
    Wait,
}

/// What a launch needs besides the record.
pub(super) struct Launch {
    pub(super) image: Located,
    pub(super) reservation: Reservation,
    /// What the journal says of it.
    pub(super) intent: Intent,
}

/// What a resume needs besides the record.
pub(super) struct Wake {
    pub(super) image: Located,
    pub(super) reservation: Reservation,
    /// When somebody asked for it.
    pub(super) asked: Instant,
    /// How long it took from there to the reservation.
    pub(super) admission_us: u64,
}

/// How a sandbox came to run. Of one that was taken over nothing is known.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Arrival {
    pub(super) phases: BootPhases,
    /// Of one that goes on from something that was kept: when it was asked for, and what it took.
    pub(super) report: Option<(Instant, ResumeReport)>,
}
