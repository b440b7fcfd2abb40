//! What starts the nursery, has it fork shims, and gives each its orders.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use log::warn;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
};

use crate::{
    JailError,
    shim::{ANSWER_FDS, FDS_MAX, MESSAGE_BYTES_MAX, Orders, REQUEST, answer_from_bytes},
};

/// How long a shim may take until the VMM's program runs. Only a hung kernel takes so long.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a shim's answer: the words of what failed.
const ANSWER_BYTES_MAX: usize = 1024;

/// What starts VMMs on this node.
#[derive(Debug, Clone)]
pub struct Jailer {
    /// The program `holdfast-shim`.
    program: PathBuf,
    /// `None`: not needed yet, or gone.
    nursery: Arc<Mutex<Option<Nursery>>>,
}

impl Jailer {
    pub fn new(shim: impl Into<PathBuf>) -> Self {
        Self { program: shim.into(), nursery: Arc::default() }
    }

    /// Starts a shim by its orders, and waits until the VMM's program runs. Gives handles of both.
    /// `log`: what they have as stderr.
    pub(crate) fn start(
        &self,
        orders: &Orders,
        fds: &[BorrowedFd<'_>],
        log: BorrowedFd<'_>,
    ) -> Result<[OwnedFd; ANSWER_FDS], JailError> {
        let orders = orders.to_text();
        if orders.len() > MESSAGE_BYTES_MAX {
            return Err(cut(Errno::MSGSIZE));
        }
        match self.try_start(orders.as_bytes(), fds, log) {
            // The nursery was killed, at the latest with the request unread. Nothing has begun: a
            // shim that cannot answer takes its VMM with it.
            Err(JailError::Shim { source, .. }) if hung_up(&source) => {
                warn!(reason:% = source; "nursery of the shims is gone; there will be a new one");
                *self.nursery() = None;
                self.try_start(orders.as_bytes(), fds, log)
            }
            outcome => outcome,
        }
    }

    fn try_start(
        &self,
        orders: &[u8],
        fds: &[BorrowedFd<'_>],
        log: BorrowedFd<'_>,
    ) -> Result<[OwnedFd; ANSWER_FDS], JailError> {
        let shim = self.fork(log)?;
        send(&shim, orders, fds).map_err(cut)?;
        answer(&shim)
    }

    /// The socket of a shim that waits for its orders.
    fn fork(&self, log: BorrowedFd<'_>) -> Result<OwnedFd, JailError> {
        let mut nursery = self.nursery();
        let there = match &mut *nursery {
            Some(there) => there,
            none => none.insert(Nursery::spawn(&self.program)?),
        };
        there.fork(log).map_err(cut)
    }

    fn nursery(&self) -> MutexGuard<'_, Option<Nursery>> {
        // A thread that panicked left either a whole nursery or none.
        self.nursery.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The process that forks shims. Killed and reaped on drop; its shims go on.
#[derive(Debug)]
struct Nursery {
    child: Child,
    socket: OwnedFd,
}

impl Nursery {
    fn spawn(program: &Path) -> Result<Self, JailError> {
        let (socket, theirs) = pair().map_err(|errno| JailError::Handover(errno.into()))?;
        let child = Command::new(program)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()
            .map_err(spawn_error(program))?;
        let nursery = Self { child, socket };
        let [] = answer(&nursery.socket)?;
        Ok(nursery)
    }

    fn fork(&self, log: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let (socket, theirs) = pair()?;
        send(&self.socket, REQUEST, &[theirs.as_fd(), log])?;
        Ok(socket)
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        // Fails when it has ended, which is what is wanted.
        let _ = self.child.kill();
        if let Err(error) = self.child.wait() {
            warn!(pid = self.child.id(), error:%; "nursery of the shims not reaped");
        }
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let kind = SocketType::SEQPACKET;
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

/// One message. At most [`FDS_MAX`] descriptors.
fn send(socket: &OwnedFd, text: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE);
    }
    let text = [IoSlice::new(text)];
    retry_on_intr(|| sendmsg(socket, &text, &mut ancillary, SendFlags::NOSIGNAL)).map(drop)
}

/// Waits for an answer that comes with so many descriptors.
fn answer<const FDS: usize>(socket: &OwnedFd) -> Result<[OwnedFd; FDS], JailError> {
    if !is_readable_within(socket, START_PATIENCE) {
        return Err(cut(Errno::TIMEDOUT));
    }
    let mut bytes = [0; ANSWER_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ANSWER_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let got = retry_on_intr(|| recvmsg(socket, &mut pieces, &mut ancillary, flags)).map_err(cut)?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    match answer_from_bytes(&bytes[..got.bytes]) {
        Some(Ok(())) => fds.try_into().map_err(|_| cut(Errno::BADMSG)),
        Some(Err(failure)) => Err(JailError::Shim {
            step: failure.step,
            source: io::Error::from_raw_os_error(failure.errno),
        }),
        // It ended without a word.
        None => Err(cut(Errno::PIPE)),
    }
}

/// The other end is closed, and may have left something unread.
fn hung_up(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::PIPE | Errno::CONNRESET))
}

fn cut(errno: Errno) -> JailError {
    JailError::Shim { step: "be talked to".to_owned(), source: errno.into() }
}

pub(crate) fn spawn_error(program: &Path) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Spawn { program: program.to_owned(), source }
}

/// A process's handle is readable once it has ended.
pub(crate) fn is_readable_within(fd: impl AsFd, patience: Duration) -> bool {
    let patience = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    retry_on_intr(|| poll(&mut polled, Some(&patience))).is_ok_and(|count| count > 0)
}
