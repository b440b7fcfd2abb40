//! What starts shims, and asks them for one thing.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock},
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
    shim::{FDS_MAX, MESSAGE_BYTES_MAX, Task, answer_from_bytes},
};

/// How long a shim may take until the VMM's program runs. Only a hung kernel takes so long.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a shim's answer: the words of what failed.
const ANSWER_BYTES_MAX: usize = 1024;

/// What starts VMMs on this node.
#[derive(Debug, Clone)]
pub struct Jailer {
    /// The program `holdfast-shim`.
    pub(crate) shim: PathBuf,
    /// A mount namespace with nothing in it, once one was needed. All VMMs begin there.
    room: Arc<OnceLock<OwnedFd>>,
}

impl Jailer {
    pub fn new(shim: impl Into<PathBuf>) -> Self {
        Self { shim: shim.into(), room: Arc::default() }
    }

    pub(crate) fn room(&self) -> Result<BorrowedFd<'_>, JailError> {
        if let Some(room) = self.room.get() {
            return Ok(room.as_fd());
        }
        let shim = Shim::spawn(&self.shim, Stdio::inherit())?;
        let made = shim.order(&Task::Room, &[])?;
        let made = made.ok_or_else(|| cut(Errno::BADMSG))?;
        // Another may have made one meanwhile; then this one goes.
        Ok(self.room.get_or_init(|| made).as_fd())
    }
}

/// A shim on its way. Killed and reaped on drop.
pub(crate) struct Shim {
    child: Option<Child>,
    socket: OwnedFd,
}

impl Shim {
    pub(crate) fn spawn(program: &Path, log: Stdio) -> Result<Self, JailError> {
        let kind = SocketType::SEQPACKET;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .map_err(|errno| JailError::Handover(errno.into()))?;
        // Nothing here needs a step between fork and exec, so that the standard library starts it
        // without copying the agent's page tables, which grow with the number of sandboxes.
        let child = Command::new(program)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(spawn_error(program))?;
        Ok(Self { child: Some(child), socket })
    }

    /// Sends the task and waits until it is done. Gives the descriptor that came back, if one did.
    pub(crate) fn order(
        &self,
        task: &Task,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<OwnedFd>, JailError> {
        let orders = task.to_text();
        if orders.len() > MESSAGE_BYTES_MAX {
            return Err(cut(Errno::MSGSIZE));
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(JailError::TooManyFds { fds: fds.len() });
        }
        let text = [IoSlice::new(orders.as_bytes())];
        retry_on_intr(|| sendmsg(&self.socket, &text, &mut ancillary, SendFlags::NOSIGNAL))
            .map_err(cut)?;
        if !is_readable_within(&self.socket, START_PATIENCE) {
            return Err(cut(Errno::TIMEDOUT));
        }
        self.answer()
    }

    fn answer(&self) -> Result<Option<OwnedFd>, JailError> {
        let mut bytes = [0; ANSWER_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let mut pieces = [IoSliceMut::new(&mut bytes)];
        let got = retry_on_intr(|| recvmsg(&self.socket, &mut pieces, &mut ancillary, flags))
            .map_err(cut)?;
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match answer_from_bytes(&bytes[..got.bytes]) {
            Some(Ok(())) => Ok(fd),
            Some(Err(failure)) => Err(JailError::Shim {
                step: failure.step,
                source: io::Error::from_raw_os_error(failure.errno),
            }),
            // It ended without a word.
            None => Err(cut(Errno::PIPE)),
        }
    }

    /// Leaves it to the caller to reap.
    pub(crate) fn keep(mut self) -> Option<Child> {
        self.child.take()
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Fails when it has ended, which is what is wanted.
            let _ = child.kill();
            if let Err(error) = child.wait() {
                warn!(pid = child.id(), error:%; "shim not reaped");
            }
        }
    }
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
