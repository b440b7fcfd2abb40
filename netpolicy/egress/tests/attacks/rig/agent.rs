//! The agent's end of the program's socket.

use std::{
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use holdfast_wire::egress::{
    self, Decision, Ended, MESSAGE_BYTES_MAX, Request, SEND_BUFFER_BYTES, ToAgent, ToEgress,
};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketAddrUnix, SocketFlags, SocketType, recv, sendmsg, socketpair, sockopt,
    },
};

use super::PATIENCE;

/// What the program has said so far.
#[derive(Default, Clone)]
pub(crate) struct Told {
    answers: Vec<(u64, ToAgent)>,
    pub(crate) decisions: Vec<Decision>,
    pub(crate) ended: Vec<Ended>,
    pub(crate) dropped: u64,
    closed: bool,
}

pub(crate) struct Agent {
    socket: OwnedFd,
    listener: PathBuf,
    told: Arc<(Mutex<Told>, Condvar)>,
    next: AtomicU64,
    _folder: Arc<tempfile::TempDir>,
}

impl Agent {
    /// An agent, and the two sockets it hands to the program.
    pub(crate) fn new() -> (Self, OwnedFd, OwnedFd) {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let (own, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let path = folder.path().join("egress");
        let listener = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        for fd in [&theirs, &listener] {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        (Self::on(own, path, folder), theirs, listener)
    }

    fn on(socket: OwnedFd, listener: PathBuf, folder: Arc<tempfile::TempDir>) -> Self {
        sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES).unwrap();
        let told = Arc::<(Mutex<Told>, Condvar)>::default();
        let (reader, shared) = (socket.try_clone().unwrap(), told.clone());
        thread::spawn(move || read(&reader, &shared));
        Self { socket, listener, told, next: AtomicU64::new(1), _folder: folder }
    }

    /// An agent that has started anew, and connects to the program that runs.
    pub(crate) fn again(&self) -> Self {
        let kind = SocketType::SEQPACKET;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
        let socket = socket.unwrap();
        let address = SocketAddrUnix::new(&self.listener).unwrap();
        rustix::net::connect(&socket, &address).unwrap();
        Self::on(socket, self.listener.clone(), self._folder.clone())
    }

    /// Ends the connection, as an agent that is killed does.
    pub(crate) fn hang_up(&self) {
        rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both).unwrap();
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn ask(&self, request: Request, fds: &[OwnedFd]) -> ToAgent {
        let id = self.send(request, fds);
        let answer = self.wait_for(|told| {
            told.answers.iter().find(|(of, _)| *of == id).map(|(_, answer)| answer.clone())
        });
        answer.expect("the program answers")
    }

    pub(crate) fn send(&self, request: Request, fds: &[OwnedFd]) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let packet = egress::encode(&ToEgress { id, request }).unwrap();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let pieces = [IoSlice::new(&packet)];
        sendmsg(&self.socket, &pieces, &mut control, SendFlags::NOSIGNAL).unwrap();
        id
    }

    /// Sends a request that must be carried out.
    pub(crate) fn done(&self, request: Request, fds: &[OwnedFd]) {
        let answer = self.ask(request, fds);
        assert!(matches!(answer, ToAgent::Done { .. }), "{answer:?}");
    }

    /// Sends a request that must be refused, and gives the reason.
    pub(crate) fn refused(&self, request: Request, fds: &[OwnedFd]) -> String {
        match self.ask(request, fds) {
            ToAgent::Refused { reason, .. } => reason,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn told(&self) -> Told {
        self.told.0.lock().unwrap().clone()
    }

    /// Waits until `find` finds something in what was told. `None`: not in time.
    pub(crate) fn wait_for<T>(&self, find: impl Fn(&Told) -> Option<T>) -> Option<T> {
        let start = Instant::now();
        let mut told = self.told.0.lock().unwrap();
        loop {
            if let Some(found) = find(&told) {
                return Some(found);
            }
            let left = PATIENCE.checked_sub(start.elapsed())?;
            if told.closed {
                return None;
            }
            told = self.told.1.wait_timeout(told, left).unwrap().0;
        }
    }
}

fn read(socket: &OwnedFd, shared: &(Mutex<Told>, Condvar)) {
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let received = recv(socket, &mut buffer, RecvFlags::empty());
        let mut told = shared.0.lock().unwrap();
        match received {
            Ok((count, _)) if count > 0 => {
                match egress::decode::<ToAgent>(&buffer[..count]).unwrap() {
                    ToAgent::Decisions(decisions) => {
                        told.decisions.extend(decisions.entries);
                        told.ended.extend(decisions.ended);
                        told.dropped = decisions.dropped;
                    }
                    answer => {
                        let of = match &answer {
                            ToAgent::Hello { request, .. }
                            | ToAgent::Done { request }
                            | ToAgent::Refused { request, .. }
                            | ToAgent::Stats { request, .. } => *request,
                            ToAgent::Decisions(_) => 0,
                        };
                        told.answers.push((of, answer));
                    }
                }
            }
            _ => {
                told.closed = true;
                shared.1.notify_all();
                return;
            }
        }
        drop(told);
        shared.1.notify_all();
    }
}
