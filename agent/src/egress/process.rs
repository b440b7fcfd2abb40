//! One egress process: started with its two sockets, or found again by the one that has a name.

use std::{
    io,
    ops::Range,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
};

use fs_err as fs;
use holdfast_jail::{Cgroup, CgroupTree, Handover};
use holdfast_model::Mib;
use holdfast_wire::egress::{CONTROL_FD, LISTEN_FD};
use log::warn;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
        socketpair,
    },
    process::geteuid,
};
use tokio::process::{Child, Command};

use super::EgressError;
use crate::{
    blocking::off_thread,
    confined::{self, Share},
    durable::FileError,
};

/// User and group of egress processes. The host's rules know them by this.
pub const EGRESS_UID: u32 = 199_998;

/// Those of processes whose groups may go where others may not, one for each such group.
pub const EGRESS_OWN_UIDS: Range<u32> = 199_000..199_512;

/// Names of their cgroups begin so; no sandbox's does.
pub(super) const CGROUP_PREFIX: &str = "egress-";

/// Memory of one, buffers of its connections in the kernel included: what a full house of one
/// sandbox needs, and some.
const MEMORY: Mib = Mib(1024);

/// As much as a sandbox of one CPU has: guests that send much wait for their own proxy, not for
/// others.
const CPU_WEIGHT: u32 = 100;

/// Threads: one that serves, and a few that begin and end with it.
const PIDS_MAX: u32 = 64;

const SHARE: Share = Share { cpu_weight: CPU_WEIGHT, memory: MEMORY, pids: PIDS_MAX };

/// Agents that wait to be let in. There is one.
const BACKLOG: i32 = 4;

/// Where one is and what it is held by.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) program: PathBuf,
    /// Of the socket by which it is found.
    pub(super) socket: PathBuf,
    pub(super) cgroups: CgroupTree,
    /// Of its cgroup.
    pub(super) name: String,
    /// Whom it runs as, and as what group.
    pub(super) user: u32,
}

/// A process that runs.
#[derive(Debug)]
pub(super) struct Process {
    /// `None`: an earlier agent's.
    child: Option<Child>,
    /// `None` where there are no cgroups: then no sandbox runs here either.
    cgroup: Option<Cgroup>,
    socket: PathBuf,
}

impl Place {
    /// The one that an earlier agent left, and a connection to it. `None`: it is gone, and what was
    /// left of it too. Blocks.
    pub(super) fn find(&self) -> Result<Option<(Process, OwnedFd)>, EgressError> {
        let cgroup = self.cgroups.adopt(&self.name)?;
        // With a configuration that has changed a user may be another group's.
        if let Some(cgroup) = &cgroup
            && !self.runs_as_its_user(cgroup)
        {
            warn!(cgroup = self.name; "an egress process is another user than it should be: it is ended");
            return Ok(None);
        }
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|errno| EgressError::Link(errno.into()))?;
        match connect(&socket, &self.address()?) {
            Ok(()) => {
                let process = Process { child: None, cgroup, socket: self.socket.clone() };
                Ok(Some((process, socket)))
            }
            // Nobody listens. What is left in its cgroup goes with the guard.
            Err(_) => {
                drop(cgroup);
                Ok(None)
            }
        }
    }

    /// A new one, and the connection to it. Blocks for some milliseconds.
    pub(super) fn start(&self) -> Result<(Process, OwnedFd), EgressError> {
        let listener = self.listen()?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (own, theirs) = pair.map_err(|errno| EgressError::Link(errno.into()))?;
        let cgroup = confined::cgroup(&self.cgroups, &self.name, SHARE);
        let mut handover = Handover::default();
        handover.place(theirs, CONTROL_FD)?;
        handover.place(listener, LISTEN_FD)?;
        let command = confined::command(&self.program, handover, self.user, cgroup.as_ref())?;
        // Its log outlives this agent: it goes where ours does.
        let child = Command::from(command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|source| EgressError::Start { program: self.program.clone(), source })?;
        Ok((Process { child: Some(child), cgroup, socket: self.socket.clone() }, own))
    }

    /// Whether all that is in there is the user it should be.
    fn runs_as_its_user(&self, cgroup: &Cgroup) -> bool {
        if !geteuid().is_root() {
            // It cannot be another than we are.
            return true;
        }
        let pids = fs::read_to_string(cgroup.path().join("cgroup.procs")).unwrap_or_default();
        pids.lines().all(|pid| {
            // One that has ended meanwhile has no file, and does nothing.
            let status = fs::read_to_string(format!("/proc/{pid}/status"));
            status.map_or(true, |status| users_of(&status).all(|user| user == Some(self.user)))
        })
    }

    fn listen(&self) -> Result<OwnedFd, EgressError> {
        let failed = |action| FileError::of(action, &self.socket);
        let folder = self.socket.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
        match fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove")(error).into());
            }
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let address = self.address()?;
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .and_then(|socket| bind(&socket, &address).map(|()| socket))
            .and_then(|socket| listen(&socket, BACKLOG).map(|()| socket))
            .map_err(|errno: Errno| failed("listen on")(errno.into()).into())
    }

    fn address(&self) -> Result<SocketAddrUnix, EgressError> {
        let failed = FileError::of("use as a socket", &self.socket);
        Ok(SocketAddrUnix::new(&self.socket).map_err(|errno| failed(errno.into()))?)
    }
}

/// Real, effective, saved and file system's user of proc_pid_status(5).
fn users_of(status: &str) -> impl Iterator<Item = Option<u32>> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    line.split_whitespace().map(|user| user.parse().ok())
}

impl Process {
    /// Ends it, and waits for its end.
    pub(super) async fn end(self) {
        let Self { child, cgroup, socket } = self;
        if let Some(mut child) = child {
            // Fails when it has ended, which is what is wanted.
            let _ = child.start_kill();
            if let Ok(status) = child.wait().await
                && status.code().is_some()
            {
                warn!(how:% = holdfast_jail::in_words(status); "an egress process had ended");
            }
        }
        off_thread(move || {
            let _ = fs::remove_file(&socket);
            drop(cgroup);
        })
        .await;
    }

    /// Leaves it as it is, for the next agent.
    pub(super) fn detach(self) {
        if let Some(cgroup) = self.cgroup {
            cgroup.detach();
        }
    }
}
