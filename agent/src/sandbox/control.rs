//! The control connection to one VMM: requests answered in their order, and events.

use std::{collections::VecDeque, io, path::Path, time::Duration};

use holdfast_wire::{
    WIRE_VERSION,
    frame::FrameError,
    vmm::{Event, Phase, Reply, ToAgent, ToVmm},
};
use tokio::{
    io::AsyncRead,
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::frames::{Frames, send};

/// How long a VMM may take to answer. It never waits for the guest, but on a node that is short of
/// CPUs one that has just been started was seen to wait for them for more than 10 s.
const REPLY_PATIENCE: Duration = Duration::from_secs(30);

/// Requests waiting to be sent or answered. The agent asks one thing at a time and statistics now
/// and then: more means the VMM is stuck.
const PENDING_MAX: usize = 16;

/// Events not looked at yet. The VMM waits when there are more: it sends a handful in its life.
const EVENTS_MAX: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("cannot connect to the VMM")]
    Connect(#[source] io::Error),
    #[error("the VMM speaks version {found} of the protocol, not {WIRE_VERSION}")]
    Version { found: u16 },
    #[error("the VMM did not answer within {} s", waited.as_secs())]
    Silent { waited: Duration },
    #[error("the VMM closed the connection")]
    Closed,
    #[error("the VMM answered {got} where {wanted} was due")]
    Unexpected { got: String, wanted: &'static str },
}

struct Ask {
    message: ToVmm,
    answer: oneshot::Sender<Reply>,
}

/// The asking side. Clones share the connection; it ends with the last of them.
#[derive(Debug, Clone)]
pub(super) struct Control {
    asks: mpsc::Sender<Ask>,
}

/// Connects and says hello. The receiver ends when the VMM closes the connection. The phase is that
/// of a VMM that may have been started long ago.
pub(super) async fn connect(
    socket: &Path,
) -> Result<(Control, mpsc::Receiver<Event>, Phase), ControlError> {
    let stream = UnixStream::connect(socket).await.map_err(ControlError::Connect)?;
    let (asks, inbox) = mpsc::channel(PENDING_MAX);
    let (events, received) = mpsc::channel(EVENTS_MAX);
    let (reader, writer) = stream.into_split();
    tokio::spawn(async move {
        if let Err(error) = relay(Frames::new(reader), writer, inbox, events).await {
            log::warn!(error:%; "control connection to a VMM failed");
        }
    });
    let control = Control { asks };
    match control.ask(ToVmm::Hello { version: WIRE_VERSION }).await? {
        Reply::Hello { version: WIRE_VERSION, phase } => Ok((control, received, phase)),
        Reply::Hello { version, .. } => Err(ControlError::Version { found: version }),
        other => Err(ControlError::Unexpected { got: format!("{other:?}"), wanted: "Hello" }),
    }
}

impl Control {
    /// Asks for what is answered by Done or a refusal.
    pub(super) async fn demand(&self, message: ToVmm) -> Result<Result<(), String>, ControlError> {
        match self.ask(message).await? {
            Reply::Done => Ok(Ok(())),
            Reply::Refused { reason } => Ok(Err(reason)),
            other => Err(ControlError::Unexpected { got: format!("{other:?}"), wanted: "Done" }),
        }
    }

    pub(super) async fn ask(&self, message: ToVmm) -> Result<Reply, ControlError> {
        let (answer, reply) = oneshot::channel();
        let asked = async {
            self.asks.send(Ask { message, answer }).await.map_err(|_| ControlError::Closed)?;
            reply.await.map_err(|_| ControlError::Closed)
        };
        match timeout(REPLY_PATIENCE, asked).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ControlError::Silent { waited: REPLY_PATIENCE }),
        }
    }
}

async fn relay(
    mut frames: Frames<impl AsyncRead + Unpin, ToAgent>,
    mut writer: OwnedWriteHalf,
    mut inbox: mpsc::Receiver<Ask>,
    events: mpsc::Sender<Event>,
) -> Result<(), FrameError> {
    let mut pending: VecDeque<oneshot::Sender<Reply>> = VecDeque::new();
    let mut asking = true;
    loop {
        tokio::select! {
            message = frames.next() => match message? {
                // A reply nobody asked for is dropped, as is one whose asker gave up.
                Some(ToAgent::Reply(reply)) => {
                    if let Some(answer) = pending.pop_front() {
                        let _ = answer.send(reply);
                    }
                }
                // Nobody listens any more: the machine is being taken apart.
                Some(ToAgent::Event(event)) => if events.send(event).await.is_err() {
                    return Ok(());
                },
                None => return Ok(()),
            },
            ask = inbox.recv(), if asking && pending.len() < PENDING_MAX => match ask {
                Some(Ask { message, answer }) => {
                    pending.push_back(answer);
                    send(&mut writer, &message).await?;
                }
                None => asking = false,
            },
            // Every asker and the listener are gone.
            () = events.closed(), if !asking => return Ok(()),
        }
    }
}
