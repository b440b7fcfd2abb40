//! The connection to one egress process: requests, answered in whatever order, and decisions.

use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use holdfast_jail::SlotSockets;
use holdfast_wire::{
    WIRE_VERSION,
    egress::{
        self, Decisions, Held, MESSAGE_BYTES_MAX, Request, SEND_BUFFER_BYTES, SOCKETS_OF_SANDBOX,
        ToAgent, ToEgress,
    },
};
use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg, sockopt::set_socket_send_buffer_size,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::EgressError;

/// How long the process may take to answer. It waits for nobody outside.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// Requests waiting to be sent. Every sandbox of a group may have one at a node's start.
const ASKS_MAX: usize = 64;

/// Batches of decisions not looked at yet. The process keeps its own queue when there are more, and
/// counts what does not fit there.
const BATCHES_MAX: usize = 16;

struct Ask {
    request: Request,
    sockets: Option<SlotSockets>,
    answer: oneshot::Sender<ToAgent>,
}

/// The asking side. The connection ends with it.
#[derive(Debug)]
pub(super) struct Link {
    asks: mpsc::Sender<Ask>,
}

/// An answer that is on its way.
#[derive(Debug)]
pub(super) struct Answer(oneshot::Receiver<ToAgent>);

/// What the process said to begin with.
#[derive(Debug)]
pub(super) struct Hello {
    pub(super) sandboxes: Vec<Held>,
}

/// Says hello over a connected socket. The receiver of decisions ends with the connection.
pub(super) async fn over(
    socket: OwnedFd,
) -> Result<(Link, mpsc::Receiver<Decisions>, Hello), EgressError> {
    set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES)
        .and_then(|()| rustix::io::ioctl_fionbio(&socket, true))
        .map_err(|errno| EgressError::Link(errno.into()))?;
    #[expect(deprecated, reason = "the replacement is unsafe, and an owned fd stays open")]
    let socket = AsyncFd::new(socket).map_err(EgressError::Link)?;
    let (asks, inbox) = mpsc::channel(ASKS_MAX);
    let (told, decisions) = mpsc::channel(BATCHES_MAX);
    tokio::spawn(async move {
        if let Err(error) = relay(socket, inbox, told).await {
            log::warn!(error:%; "connection to an egress process failed");
        }
    });
    let link = Link { asks };
    match link.ask(Request::Hello { version: WIRE_VERSION }, None).await?.message().await? {
        ToAgent::Hello { version: WIRE_VERSION, sandboxes, .. } => {
            Ok((link, decisions, Hello { sandboxes }))
        }
        ToAgent::Hello { version, .. } => Err(EgressError::Version { found: version }),
        ToAgent::Refused { reason, .. } => Err(EgressError::Refused { reason }),
        _ => Err(EgressError::Unexpected),
    }
}

impl Link {
    /// Sends a request. Requests arrive in the order of these calls.
    pub(super) async fn ask(
        &self,
        request: Request,
        sockets: Option<SlotSockets>,
    ) -> Result<Answer, EgressError> {
        let (answer, answered) = oneshot::channel();
        self.asks.send(Ask { request, sockets, answer }).await.map_err(|_| EgressError::Ended)?;
        Ok(Answer(answered))
    }

    /// Sends a request and waits until it was carried out.
    pub(super) async fn demand(
        &self,
        request: Request,
        sockets: Option<SlotSockets>,
    ) -> Result<(), EgressError> {
        self.ask(request, sockets).await?.done().await
    }
}

impl Answer {
    async fn message(self) -> Result<ToAgent, EgressError> {
        match timeout(ANSWER_PATIENCE, self.0).await {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(_)) => Err(EgressError::Ended),
            Err(_) => Err(EgressError::Silent { waited: ANSWER_PATIENCE }),
        }
    }

    /// Waits until the request was carried out.
    pub(super) async fn done(self) -> Result<(), EgressError> {
        match self.message().await? {
            ToAgent::Done { .. } => Ok(()),
            ToAgent::Refused { reason, .. } => Err(EgressError::Refused { reason }),
            _ => Err(EgressError::Unexpected),
        }
    }
}

async fn relay(
    socket: AsyncFd<OwnedFd>,
    mut inbox: mpsc::Receiver<Ask>,
    told: mpsc::Sender<Decisions>,
) -> Result<(), EgressError> {
    let mut pending: HashMap<u64, oneshot::Sender<ToAgent>> = HashMap::new();
    let mut next = 0;
    loop {
        tokio::select! {
            message = receive(&socket) => {
                let Some(message) = message? else { return Ok(()) };
                let request = match &message {
                    ToAgent::Hello { request, .. }
                    | ToAgent::Done { request }
                    | ToAgent::Refused { request, .. }
                    | ToAgent::Stats { request, .. } => *request,
                    ToAgent::Decisions(_) => {
                        if let ToAgent::Decisions(batch) = message
                            && told.send(batch).await.is_err()
                        {
                            // Nobody listens any more: the process is left, or ended.
                            return Ok(());
                        }
                        continue;
                    }
                };
                // Whoever asked may have given up.
                if let Some(answer) = pending.remove(&request) {
                    let _ = answer.send(message);
                }
            }
            ask = inbox.recv() => {
                let Some(Ask { request, sockets, answer }) = ask else { return Ok(()) };
                next += 1;
                pending.retain(|_, answer| !answer.is_closed());
                pending.insert(next, answer);
                send(&socket, &ToEgress { id: next, request }, sockets.as_ref()).await?;
            }
        }
    }
}

/// One message. `None`: the process has closed.
async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<Option<ToAgent>, EgressError> {
    let receive = |fd: &OwnedFd| {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut none = RecvAncillaryBuffer::default();
        let mut piece = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(fd, &mut piece, &mut none, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::CONNRESET) => return Ok(Vec::new()),
            received => received?,
        };
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(io::Error::other("a message is longer than any can be"));
        }
        bytes.truncate(received.bytes);
        Ok(bytes)
    };
    let bytes = socket.async_io(Interest::READABLE, receive).await.map_err(EgressError::Link)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    egress::decode(&bytes).map(Some).map_err(EgressError::Message)
}

async fn send(
    socket: &AsyncFd<OwnedFd>,
    message: &ToEgress,
    sockets: Option<&SlotSockets>,
) -> Result<(), EgressError> {
    let packet = egress::encode(message).map_err(EgressError::Message)?;
    let send = |fd: &OwnedFd| {
        let mut space =
            [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_OF_SANDBOX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = sockets.map(|sockets| [sockets.tcp.as_fd(), sockets.dns.as_fd()]);
        if let Some(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = sendmsg(fd, &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL);
        Ok(sent.map(drop)?)
    };
    socket.async_io(Interest::WRITABLE, send).await.map_err(EgressError::Link)
}
