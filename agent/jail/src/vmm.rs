//! One VMM process as the agent holds it: by its shim, which tells of its end.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use fs_err as fs;
use log::warn;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketFlags, SocketType, recv, sendmsg, socketpair,
    },
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::{
    Cgroup, Handover, Identity, JailError, RunFolder,
    memory::sealed_bytes,
    record::{self, Pids},
    shim::{FDS_MAX, HANDED_MAX, MESSAGE_BYTES_MAX, OWN_FDS, Orders, answer_from_bytes},
};

/// How long a shim may take until the VMM's program runs. Only a hung kernel takes so long.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long a killed VMM may take to go. Freeing gigabytes of guest memory takes most of it.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// What starts VMMs on this node.
#[derive(Debug, Clone)]
pub struct Jailer {
    /// The program `holdfast-shim`.
    shim: PathBuf,
}

impl Jailer {
    pub fn new(shim: impl Into<PathBuf>) -> Self {
        Self { shim: shim.into() }
    }
}

/// How to start one VMM.
pub struct VmmPlan<'a> {
    pub jailer: &'a Jailer,
    pub program: &'a Path,
    /// What `ps` shows behind the program's name. A VMM itself looks at none.
    pub arguments: &'a [&'a str],
    pub run: &'a RunFolder,
    pub cgroup: &'a Cgroup,
    pub identity: Identity,
    pub handover: Handover,
    /// The configuration's frame.
    pub config: &'a [u8],
    /// Its stderr. On tmpfs its pages are charged to the VMM's cgroup: what a VMM that has been
    /// taken over writes there is bounded by its own memory.
    pub log: fs::File,
}

/// One VMM process. Killed on drop.
#[must_use = "dropping the guard kills the VMM"]
#[derive(Debug)]
pub struct VmmProcess {
    /// The shim as our child, which is to be reaped. `None`: an earlier agent started it.
    child: Option<Child>,
    shim: OwnedFd,
    /// `None`: it had ended before we could take hold of it.
    vmm: Option<OwnedFd>,
    vmm_pid: u32,
    /// Where the shim records its end.
    exit: fs::File,
    status: Option<ExitStatus>,
    /// Goes on without us.
    detached: bool,
}

/// What became of a VMM that an earlier agent started.
#[derive(Debug)]
pub enum Adopted {
    Running(VmmProcess),
    /// With its wait status if that was recorded. All of it is gone.
    Ended(Option<ExitStatus>),
}

impl VmmProcess {
    /// Starts it, and returns once its program runs. Blocks for some milliseconds.
    pub fn spawn(plan: VmmPlan<'_>) -> Result<Self, JailError> {
        let handed = plan.handover.given.len();
        if handed > HANDED_MAX {
            return Err(JailError::TooManyFds { fds: handed });
        }
        let name = plan.program.file_name().unwrap_or_default().to_string_lossy();
        let arguments = [&*name].into_iter().chain(plan.arguments.iter().copied());
        let orders = Orders {
            identity: plan.identity,
            numbers: plan.handover.numbers(),
            arguments: arguments.map(str::to_owned).collect(),
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let program = rustix::fs::open(plan.program, flags, Mode::empty())
            .map_err(|errno| spawn_error(plan.program)(errno.into()))?;
        let door = plan.cgroup.door()?;
        let pids = plan.run.record(record::PIDS)?;
        let exit = plan.run.record(record::EXIT)?;
        let config = sealed_bytes(plan.config).map_err(JailError::Handover)?;
        let own: [BorrowedFd<'_>; OWN_FDS] =
            [program.as_fd(), door.as_fd(), pids.as_fd(), exit.as_fd(), config.as_fd()];
        let fds: Vec<_> =
            own.into_iter().chain(plan.handover.given.iter().map(AsFd::as_fd)).collect();

        let (agent, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|errno| JailError::Handover(errno.into()))?;
        let shim = Shim::spawn(&plan.jailer.shim, theirs, plan.log)?;
        shim.order(&agent, &orders.to_text(), &fds)?;
        shim.into_process(&pids, exit)
    }

    /// Takes over the VMM that an earlier agent started, by what its shim left in the run folder.
    /// What did not get that far, or cannot be told any more, is killed.
    pub fn adopt(run: &RunFolder, cgroup: &Cgroup) -> Result<Adopted, JailError> {
        let Some(exit) = run.read_record(record::EXIT)? else {
            return end_all(cgroup, None);
        };
        let pids = match run.read_record(record::PIDS)? {
            Some(file) => Pids::read(&file).map_err(|source| JailError::RunFolder {
                action: "read",
                path: run.path().join(record::PIDS),
                source,
            })?,
            None => None,
        };
        let Some(pids) = pids else { return end_all(cgroup, Some(&exit)) };
        let handle = |instance: record::Instance| {
            let identify = |source| JailError::Identify { pid: instance.pid, source };
            instance.handle().map_err(identify)
        };
        let (shim, vmm) = (handle(pids.shim)?, handle(pids.vmm)?);
        match shim {
            Some(shim) if !is_readable_within(&shim, Duration::ZERO) => {
                Ok(Adopted::Running(Self {
                    child: None,
                    shim,
                    vmm,
                    vmm_pid: pids.vmm.pid.unsigned_abs(),
                    exit,
                    status: None,
                    detached: false,
                }))
            }
            _ => end_all(cgroup, Some(&exit)),
        }
    }

    /// The VMM's, as this node sees it.
    pub fn pid(&self) -> u32 {
        self.vmm_pid
    }

    /// Becomes readable when the shim has ended, which it does once the VMM has.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.shim.as_fd()
    }

    /// How it ended. `None`: it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() && is_readable_within(&self.shim, Duration::ZERO) {
            self.status = Some(self.status_at_end());
        }
        self.status
    }

    /// Ends it at once. Harmless when it has ended.
    pub fn kill(&self) {
        if self.status.is_none()
            && let Some(vmm) = &self.vmm
        {
            kill(vmm, self.vmm_pid);
        }
    }

    /// Lets it go on without this guard, for the next agent to adopt.
    pub fn detach(mut self) {
        self.detached = true;
    }

    /// The shim has ended.
    fn status_at_end(&mut self) -> ExitStatus {
        if let Some(child) = &mut self.child
            && let Err(error) = child.wait()
        {
            warn!(vmm_pid = self.vmm_pid, error:%; "shim not reaped");
        }
        let recorded = record::read_exit(&self.exit).unwrap_or_else(|error| {
            warn!(vmm_pid = self.vmm_pid, error:%; "end of a VMM cannot be read");
            None
        });
        recorded.unwrap_or_else(|| {
            // The shim was killed, and the kernel kills the VMM with it: by this signal.
            self.kill();
            if let Some(vmm) = &self.vmm
                && !is_readable_within(vmm, END_PATIENCE)
            {
                warn!(vmm_pid = self.vmm_pid; "VMM does not end");
            }
            ExitStatus::from_raw(Signal::KILL.as_raw())
        })
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        if self.detached || self.status.is_some() {
            return;
        }
        self.kill();
        if !is_readable_within(&self.shim, END_PATIENCE) {
            warn!(vmm_pid = self.vmm_pid; "shim does not end by itself");
            kill(&self.shim, self.vmm_pid);
        }
        self.status_at_end();
    }
}

/// Kills what is left in the cgroup, and tells the end if it was recorded.
fn end_all(cgroup: &Cgroup, exit: Option<&fs::File>) -> Result<Adopted, JailError> {
    cgroup.kill()?;
    let status = match exit {
        Some(exit) => record::read_exit(exit).map_err(|source| JailError::RunFolder {
            action: "read",
            path: exit.path().to_owned(),
            source,
        })?,
        None => None,
    };
    Ok(Adopted::Ended(status))
}

/// A shim on its way. Killed and reaped on drop.
struct Shim {
    child: Option<Child>,
}

impl Shim {
    fn spawn(program: &Path, socket: OwnedFd, log: fs::File) -> Result<Self, JailError> {
        // Nothing here needs a step between fork and exec, so that the standard library starts it
        // without copying the agent's page tables, which grow with the number of sandboxes.
        let child = Command::new(program)
            .env_clear()
            .current_dir("/")
            .stdin(socket)
            .stdout(Stdio::null())
            .stderr(log.into_parts().0)
            .spawn()
            .map_err(spawn_error(program))?;
        Ok(Self { child: Some(child) })
    }

    /// Sends the orders and waits until they are carried out.
    fn order(
        &self,
        agent: &OwnedFd,
        orders: &str,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), JailError> {
        let cut = |source| JailError::Shim { step: "be talked to".to_owned(), source };
        if orders.len() > MESSAGE_BYTES_MAX {
            return Err(cut(Errno::MSGSIZE.into()));
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(JailError::TooManyFds { fds: fds.len() });
        }
        let text = [IoSlice::new(orders.as_bytes())];
        retry_on_intr(|| sendmsg(agent, &text, &mut ancillary, SendFlags::NOSIGNAL))
            .map_err(|errno| cut(errno.into()))?;
        if !is_readable_within(agent, START_PATIENCE) {
            return Err(cut(Errno::TIMEDOUT.into()));
        }
        let mut answer = [0; 1024];
        let (count, _) = retry_on_intr(|| recv(agent, &mut answer[..], RecvFlags::empty()))
            .map_err(|errno| cut(errno.into()))?;
        match answer_from_bytes(&answer[..count]) {
            Some(Ok(())) => Ok(()),
            Some(Err(failure)) => Err(JailError::Shim {
                step: failure.step,
                source: io::Error::from_raw_os_error(failure.errno),
            }),
            // It ended without a word.
            None => Err(cut(Errno::PIPE.into())),
        }
    }

    fn into_process(mut self, pids: &fs::File, exit: fs::File) -> Result<VmmProcess, JailError> {
        let unknown = |source: io::Error| JailError::Shim { step: "be held".to_owned(), source };
        let pids = Pids::read(pids).map_err(unknown)?;
        let pids = pids.ok_or_else(|| unknown(io::ErrorKind::InvalidData.into()))?;
        let shim = Pid::from_raw(pids.shim.pid).ok_or(Errno::SRCH);
        // Our child until we reap it, so its number is its own.
        let shim = shim.and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK));
        let shim = shim.map_err(|errno| unknown(errno.into()))?;
        let vmm = pids.vmm.handle().map_err(unknown)?;
        Ok(VmmProcess {
            child: self.child.take(),
            shim,
            vmm,
            vmm_pid: pids.vmm.pid.unsigned_abs(),
            exit,
            status: None,
            detached: false,
        })
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

fn spawn_error(program: &Path) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Spawn { program: program.to_owned(), source }
}

fn kill(process: &OwnedFd, vmm_pid: u32) {
    if let Err(errno) = pidfd_send_signal(process, Signal::KILL)
        && errno != Errno::SRCH
    {
        warn!(vmm_pid, error:% = errno; "VMM not killed");
    }
}

/// A process's handle is readable once it has ended.
fn is_readable_within(fd: impl AsFd, patience: Duration) -> bool {
    let patience = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    retry_on_intr(|| poll(&mut polled, Some(&patience))).is_ok_and(|count| count > 0)
}
