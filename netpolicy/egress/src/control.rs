//! The agent's requests, on the connection it started us with or on a newer one.

use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use holdfast_wire::{
    WIRE_VERSION,
    egress::{
        self, MESSAGE_BYTES_MAX, Request, SEND_BUFFER_BYTES, SOCKETS_OF_SANDBOX, ToAgent, ToEgress,
    },
};
use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendFlags, SocketFlags,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
    time::Instant,
};
use zeroize::Zeroizing;

use crate::{
    group::{Group, Refused, Sockets},
    sys,
};

/// Answers that wait for an agent that reads slowly. Requests are read only while there is room.
const ANSWERS_MAX: usize = 1024;

/// Between two batches of decisions: with many connections each of them would be a message of its
/// own, and a tenth of what they cost. One that comes after a rest is told at once.
const TELL_PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("the agent's socket cannot be used")]
    Io(#[from] io::Error),
    #[error("the agent sent what is no message")]
    Message(#[from] holdfast_wire::frame::FrameError),
    #[error("the agent's first request must be Hello")]
    NoHello,
}

/// Serves the agent for as long as the process lives.
pub(crate) async fn serve(
    group: Arc<Group>,
    first: Option<OwnedFd>,
    listener: Option<OwnedFd>,
) -> io::Result<()> {
    let mut current = None;
    if let Some(first) = first {
        current = Some(tokio::spawn(connection(group.clone(), first)));
    }
    let Some(listener) = listener else {
        // Only in tests: without a listener the first connection is the only one.
        if let Some(current) = current {
            let _ = current.await;
        }
        return Ok(());
    };
    rustix::io::ioctl_fionbio(&listener, true)?;
    let listener = sys::watch(listener)?;
    loop {
        let accept = |fd: &OwnedFd| {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            Ok(rustix::net::accept_with(fd, flags)?)
        };
        let accepted = listener.async_io(Interest::READABLE, accept).await;
        let Ok(accepted) = accepted else {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            continue;
        };
        // The newest is the agent's.
        if let Some(before) = current.replace(tokio::spawn(connection(group.clone(), accepted))) {
            before.abort();
        }
    }
}

async fn connection(group: Arc<Group>, socket: OwnedFd) {
    match talk(&group, socket).await {
        Ok(()) => log::info!("the agent has gone; what it told last holds"),
        Err(error) => log::warn!(error:%; "the agent's connection is dropped"),
    }
}

async fn talk(group: &Arc<Group>, socket: OwnedFd) -> Result<(), ControlError> {
    rustix::io::ioctl_fionbio(&socket, true).map_err(io::Error::from)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES)
        .map_err(io::Error::from)?;
    let socket = Arc::new(sys::watch(socket)?);
    let Some((hello, _)) = receive(&socket).await? else { return Ok(()) };
    let Request::Hello { version } = hello.request else { return Err(ControlError::NoHello) };
    let request = hello.id;
    if version != WIRE_VERSION {
        let reason = format!("this process speaks version {WIRE_VERSION}, not {version}");
        return Ok(send(&socket, &ToAgent::Refused { request, reason }).await?);
    }
    let (configured, sandboxes) = (group.is_configured(), group.held());
    let hello = ToAgent::Hello { request, version: WIRE_VERSION, configured, sandboxes };
    send(&socket, &hello).await?;
    let (answers, waiting) = mpsc::channel(ANSWERS_MAX);
    tokio::select! {
        ended = requests(group, &socket, answers) => ended,
        ended = tell(group, &socket, waiting) => Ok(ended?),
    }
}

/// Sends answers as they come, and decisions in between.
async fn tell(
    group: &Group,
    socket: &AsyncFd<OwnedFd>,
    mut answers: mpsc::Receiver<ToAgent>,
) -> io::Result<()> {
    let mut earliest = Instant::now();
    loop {
        tokio::select! {
            biased;
            answer = answers.recv() => match answer {
                Some(answer) => send(socket, &answer).await?,
                None => return Ok(()),
            },
            batch = group.audit.batch(earliest) => {
                earliest = Instant::now() + TELL_PAUSE;
                let message = ToAgent::Decisions(batch);
                if let Err(error) = send(socket, &message).await {
                    if let ToAgent::Decisions(batch) = &message {
                        group.audit.lost(batch);
                    }
                    return Err(error);
                }
            }
        }
    }
}

/// Carries requests out: those of one sandbox one after the other, in the order they came.
async fn requests(
    group: &Arc<Group>,
    socket: &AsyncFd<OwnedFd>,
    answers: mpsc::Sender<ToAgent>,
) -> Result<(), ControlError> {
    let mut queues: HashMap<String, mpsc::Sender<Job>> = HashMap::new();
    while let Some((message, fds)) = receive(socket).await? {
        let request = message.id;
        let sandbox = match message.request {
            Request::Hello { .. } => None,
            Request::Configure(configure) => {
                let answer = answer(request, group.configure(&configure));
                wipe(*configure);
                let _ = answers.send(answer).await;
                continue;
            }
            Request::Stats { sandbox } => {
                let answer = match group.stats(&sandbox) {
                    Ok(stats) => ToAgent::Stats { request, stats },
                    Err(refused) => self::answer(request, Err(refused)),
                };
                let _ = answers.send(answer).await;
                continue;
            }
            Request::Put(ref put) => Some(put.sandbox.clone()),
            Request::Values(ref values) => Some(values.sandbox.clone()),
            Request::Remove { ref sandbox } => Some(sandbox.clone()),
        };
        let Some(sandbox) = sandbox else {
            let reason = "Hello was said already".to_owned();
            let _ = answers.send(ToAgent::Refused { request, reason }).await;
            continue;
        };
        // A queue nobody serves any more is one whose work is done.
        queues.retain(|_, queue| !queue.is_closed());
        let job = Job { request, wanted: message.request, fds };
        let job = match queues.get(&sandbox) {
            Some(queue) => match queue.try_send(job) {
                Ok(()) => continue,
                Err(
                    mpsc::error::TrySendError::Full(job) | mpsc::error::TrySendError::Closed(job),
                ) => job,
            },
            None => job,
        };
        if queues.get(&sandbox).is_some_and(|queue| !queue.is_closed()) {
            let reason = "too many requests for this sandbox are waiting".to_owned();
            let _ = answers.send(ToAgent::Refused { request, reason }).await;
            continue;
        }
        let (queue, jobs) = mpsc::channel(JOBS_MAX);
        let _ = queue.try_send(job);
        queues.insert(sandbox, queue);
        tokio::spawn(work(group.clone(), jobs, answers.clone()));
    }
    Ok(())
}

/// Requests for one sandbox that wait.
const JOBS_MAX: usize = 16;

struct Job {
    request: u64,
    wanted: Request,
    fds: Vec<OwnedFd>,
}

/// Does what is in a queue, and ends when it is empty.
async fn work(group: Arc<Group>, mut jobs: mpsc::Receiver<Job>, answers: mpsc::Sender<ToAgent>) {
    loop {
        let job = match jobs.try_recv() {
            Ok(job) => job,
            Err(_) => {
                // Closed first, so that nothing can be put in behind our back.
                jobs.close();
                match jobs.try_recv() {
                    Ok(job) => job,
                    Err(_) => return,
                }
            }
        };
        let done = match job.wanted {
            Request::Put(put) => match sockets(job.fds) {
                Ok(sockets) => group.put(put, sockets).await,
                Err(refused) => Err(refused),
            },
            Request::Values(values) => {
                group.revalue(values).await;
                Ok(())
            }
            Request::Remove { sandbox } => {
                group.remove(&sandbox).await;
                Ok(())
            }
            _ => Ok(()),
        };
        let _ = answers.send(answer(job.request, done)).await;
    }
}

fn sockets(fds: Vec<OwnedFd>) -> Result<Option<Sockets>, Refused> {
    let count = fds.len();
    let mut fds = fds.into_iter();
    match (count, fds.next(), fds.next()) {
        (0, ..) => Ok(None),
        (SOCKETS_OF_SANDBOX, Some(tcp), Some(udp)) => Ok(Some(Sockets { tcp, udp })),
        _ => Err(Refused::Socket(io::Error::other("a Put brings two sockets or none"))),
    }
}

fn answer(request: u64, done: Result<(), Refused>) -> ToAgent {
    match done {
        Ok(()) => ToAgent::Done { request },
        Err(refused) => {
            let mut reason = refused.to_string();
            let mut source = std::error::Error::source(&refused);
            while let Some(error) = source {
                reason.push_str(&format!(": {error}"));
                source = error.source();
            }
            ToAgent::Refused { request, reason }
        }
    }
}

/// Lets go of a key without leaving it in memory.
fn wipe(configure: egress::Configure) {
    drop(Zeroizing::new(configure.ca_key_pem));
}

/// Receives one message and what came with it. `None`: the agent has closed.
async fn receive(
    socket: &AsyncFd<OwnedFd>,
) -> Result<Option<(ToEgress, Vec<OwnedFd>)>, ControlError> {
    // It may hold secrets.
    let mut buffer = Zeroizing::new(vec![0; MESSAGE_BYTES_MAX]);
    let (count, fds) = socket
        .async_io(Interest::READABLE, |fd| {
            let mut space = [std::mem::MaybeUninit::uninit();
                rustix::cmsg_space!(ScmRights(SOCKETS_OF_SANDBOX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut piece = [IoSliceMut::new(&mut buffer)];
            let received =
                rustix::net::recvmsg(fd, &mut piece, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let mut fds = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            Ok((received.bytes, fds))
        })
        .await?;
    if count == 0 {
        return Ok(None);
    }
    Ok(Some((egress::decode(&buffer[..count])?, fds)))
}

async fn send(socket: &AsyncFd<OwnedFd>, message: &ToAgent) -> io::Result<()> {
    let packet = egress::encode(message).map_err(io::Error::other)?;
    let send = |fd: &OwnedFd| {
        let piece = [IoSlice::new(&packet)];
        let mut control = SendAncillaryBuffer::default();
        match rustix::net::sendmsg(fd.as_fd(), &piece, &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::PIPE | Errno::CONNRESET) => Err(io::ErrorKind::BrokenPipe.into()),
            sent => Ok(sent.map(drop)?),
        }
    };
    socket.async_io(Interest::WRITABLE, send).await
}
