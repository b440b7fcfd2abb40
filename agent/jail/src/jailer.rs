//! What starts the nursery, has it fork shims ahead of use, and gives each its orders.

use std::{
    io,
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
};

use crate::{
    JailError,
    messages::{pair, receive, send},
    shim::{ANSWER_FDS, MESSAGE_BYTES_MAX, Orders, REQUEST, answer_from_bytes},
    stock::{Plan, Stock},
};

/// How long a shim may take until the VMM's program runs. Only a hung kernel takes so long.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a shim's answer: the words of what failed.
const ANSWER_BYTES_MAX: usize = 1024;

/// Shims that wait for orders. Each is a process of some pages of its own, and the kernel's memory of
/// five empty namespaces; as many launches as an emulated node has at once find one.
const READY: usize = 4;

const PLAN: Plan = Plan { name: "shims", ready: READY, delay: Duration::from_millis(50) };

/// What starts VMMs on this node.
#[derive(Debug, Clone)]
pub struct Jailer {
    maker: Arc<Maker>,
    waiting: Arc<Stock<Shim>>,
}

impl Jailer {
    /// `shim`: the program `holdfast-shim`. Begins to make shims ahead, on a thread of its own.
    pub fn new(shim: impl Into<PathBuf>) -> Self {
        let maker = Arc::new(Maker { program: shim.into(), nursery: Mutex::default() });
        let theirs = Arc::clone(&maker);
        Self { maker, waiting: Arc::new(Stock::start(PLAN, move || theirs.shim())) }
    }

    /// Starts a VMM by these orders, and returns once its program runs. Gives handles of its shim
    /// and of it.
    pub(crate) fn start(
        &self,
        orders: &Orders,
        fds: &[BorrowedFd<'_>],
    ) -> Result<[OwnedFd; ANSWER_FDS], JailError> {
        let orders = orders.to_text();
        if orders.len() > MESSAGE_BYTES_MAX {
            return Err(cut(Errno::MSGSIZE));
        }
        while let Some(shim) = self.waiting.take() {
            match shim.follow(orders.as_bytes(), fds) {
                // It was killed while it waited or followed. Nothing is left of what it began: a
                // shim that cannot answer takes its VMM with it.
                Err(JailError::Shim { source, .. }) if hung_up(&source) => {
                    warn!(reason:% = source; "a shim that waited for orders is gone");
                }
                outcome => return outcome,
            }
        }
        self.maker.shim()?.follow(orders.as_bytes(), fds)
    }
}

/// What has shims forked.
#[derive(Debug)]
struct Maker {
    program: PathBuf,
    /// `None`: not needed yet, or gone.
    nursery: Mutex<Option<Arc<Nursery>>>,
}

impl Maker {
    /// A new shim, which waits for orders.
    fn shim(&self) -> Result<Shim, JailError> {
        let nursery = self.nursery_now()?;
        match nursery.fork() {
            // The nursery was killed, at the latest with the request unread.
            Err(JailError::Shim { source, .. }) if hung_up(&source) => {
                warn!(reason:% = source; "nursery of the shims is gone; there will be a new one");
                // Another thread may have replaced it already.
                self.nursery().take_if(|there| Arc::ptr_eq(there, &nursery));
                self.nursery_now()?.fork()
            }
            outcome => outcome,
        }
    }

    /// The one there is, or a new one.
    fn nursery_now(&self) -> Result<Arc<Nursery>, JailError> {
        let mut nursery = self.nursery();
        let there = match &mut *nursery {
            Some(there) => there,
            none => none.insert(Arc::new(Nursery::spawn(&self.program)?)),
        };
        Ok(Arc::clone(there))
    }

    fn nursery(&self) -> MutexGuard<'_, Option<Arc<Nursery>>> {
        // A thread that panicked left either a whole nursery or none.
        self.nursery.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A shim that waits for orders, by the socket it hears them from. Ends when that is dropped.
#[derive(Debug)]
struct Shim(OwnedFd);

impl Shim {
    fn follow(
        self,
        orders: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<[OwnedFd; ANSWER_FDS], JailError> {
        send(&self.0, orders, fds).map_err(cut)?;
        answer(&self.0)
    }
}

/// The process that forks shims. Killed and reaped when nobody uses it any more; its shims go on.
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

    /// Has a shim forked, and waits until it waits.
    fn fork(&self) -> Result<Shim, JailError> {
        let (shim, theirs) = pair().map_err(cut)?;
        send(&self.socket, REQUEST, &[theirs.as_fd()]).map_err(cut)?;
        // Only the nursery and the shim have it from here on, and their ends are heard of.
        drop(theirs);
        let [] = answer(&shim)?;
        Ok(Shim(shim))
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

/// Waits for an answer that comes with so many descriptors.
fn answer<const FDS: usize>(socket: &OwnedFd) -> Result<[OwnedFd; FDS], JailError> {
    if !is_readable_within(socket, START_PATIENCE) {
        return Err(cut(Errno::TIMEDOUT));
    }
    let (bytes, fds) = receive(socket, ANSWER_BYTES_MAX, ANSWER_FDS).map_err(cut)?;
    match answer_from_bytes(&bytes) {
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
