//! Guest memory that is filled while its guest goes on: one pager process after another until all
//! of it is there. A pager or an agent that is killed loses nothing: pages that are missing stay
//! missing, whoever needs one waits, and the next pager brings it.

use std::{
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_jail::{Confinement, Handover, Identity, confine};
use holdfast_snapshot::{Key, Kind};
use holdfast_wire::{
    WIRE_VERSION, frame,
    pager::{Filled, Piece, PieceKind, Region, Report, Request},
};
use log::{info, warn};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{
        Pid, PidfdFlags, PidfdGetfdFlags, Signal, geteuid, pidfd_getfd, pidfd_open,
        pidfd_send_signal,
    },
};
use tokio::sync::watch;

use super::{launch::ms_since, memory, node::Node, snapshots::Cold};
use crate::error_chain::error_chain;

/// Pagers of one guest. One that is killed is followed by another; what fails three times fails.
const ATTEMPTS: u32 = 3;

/// How long one may take. It unpacks half a gigabyte a second, on hardware.
const PATIENCE: Timespec = Timespec { tv_sec: 600, tv_nsec: 0 };

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(200);

#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error("the VMM has no userfaultfd")]
    NoFaults,
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Jail(#[from] holdfast_jail::JailError),
    #[error("the request to the pager is too long")]
    Request(#[source] frame::FrameError),
    #[error("the pager ended without a report: {how}")]
    Silent { how: String },
    #[error("the pager did not end within {} s", PATIENCE.tv_sec)]
    Hung,
    #[error("the pager failed: {message}")]
    Failed { damaged: bool, message: String },
    #[error(transparent)]
    Saved(#[from] super::SaveError),
}

fn cannot(what: &'static str) -> impl FnOnce(io::Error) -> FillError {
    move |source| FillError::Io { what, source }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Filling,
    Filled(Arrived),
    /// The VMM was ended: its guest would have waited for ever.
    Failed(String),
}

/// What it took until all of it was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrived {
    /// Times the guest or the VMM waited for a page.
    pub(super) faults: u64,
    /// Put into guest memory.
    pub(super) bytes: u64,
}

/// Follows a guest's memory until all of it is there.
#[derive(Debug, Clone)]
pub(super) struct Filling {
    stage: watch::Receiver<Stage>,
}

impl Filling {
    /// Begins to fill the memory of the VMM with this process id, whose user is `identity`.
    pub(super) fn start(
        node: &Arc<Node>,
        pid: u32,
        identity: Identity,
        cold: Cold,
    ) -> io::Result<Self> {
        let (stage, follow) = watch::channel(Stage::Filling);
        let node = Arc::clone(node);
        thread::Builder::new().name("filling".to_owned()).spawn(move || {
            let outcome = fill(&node, pid, identity, &cold);
            stage.send_replace(match outcome {
                Ok(arrived) => Stage::Filled(arrived),
                Err(error) => {
                    let reason = error_chain(&error);
                    warn!(snapshot:% = cold.id, pid, reason:%; "guest memory cannot be filled");
                    kill(pid);
                    Stage::Failed(reason)
                }
            });
        })?;
        Ok(Self { stage: follow })
    }

    /// Waits until all of it is there.
    pub(super) async fn done(&self) -> Result<(), String> {
        let mut stage = self.stage.clone();
        match stage.wait_for(|stage| *stage != Stage::Filling).await.as_deref() {
            Ok(Stage::Filled(_)) => Ok(()),
            Ok(Stage::Failed(reason)) => Err(reason.clone()),
            // Its thread is gone.
            Ok(Stage::Filling) | Err(_) => Err("nobody fills the guest's memory".to_owned()),
        }
    }

    /// What it took, once all of it is there.
    pub(super) fn arrived(&self) -> Option<Arrived> {
        match &*self.stage.borrow() {
            Stage::Filled(arrived) => Some(*arrived),
            Stage::Filling | Stage::Failed(_) => None,
        }
    }

    /// Why the VMM was ended, if it was for this.
    pub(super) fn failure(&self) -> Option<String> {
        match &*self.stage.borrow() {
            Stage::Failed(reason) => Some(reason.clone()),
            _ => None,
        }
    }
}

fn fill(node: &Node, pid: u32, identity: Identity, cold: &Cold) -> Result<Arrived, FillError> {
    let mut attempt = 1;
    loop {
        let began = Instant::now();
        let draft = node.snapshots.memory_draft(&cold.id)?;
        let pager = Pager { program: &node.pager, pid, identity, cold };
        match pager.run(draft.file.file().as_fd()) {
            Ok(filled) => {
                info!(
                    snapshot:% = cold.id, pid, faults = filled.faults, mib = filled.bytes >> 20,
                    known = cold.first.len(), ms = ms_since(began); "guest memory filled"
                );
                // The guest has its memory, whatever becomes of the file.
                if let Err(error) = node.snapshots.warmed(&cold.id, draft, &filled.missed) {
                    warn!(error:% = error_chain(&error); "no memory file is kept");
                }
                return Ok(Arrived { faults: filled.faults, bytes: filled.bytes });
            }
            // The guest may have ended, and been waited for by nobody else.
            Err(error) if attempt >= ATTEMPTS || error.is_final() || !is_there(pid) => {
                return Err(error);
            }
            Err(error) => {
                warn!(pid, attempt, reason:% = error_chain(&error); "another pager is started");
            }
        }
        attempt += 1;
        thread::sleep(PAUSE);
    }
}

impl FillError {
    fn is_final(&self) -> bool {
        matches!(self, Self::Failed { damaged: true, .. } | Self::NoFaults)
    }
}

struct Pager<'a> {
    program: &'a std::path::Path,
    pid: u32,
    identity: Identity,
    cold: &'a Cold,
}

impl Pager<'_> {
    fn run(&self, copy: BorrowedFd<'_>) -> Result<Filled, FillError> {
        let mut handover = Handover::default();
        let request = self.request(&mut handover, copy)?;
        let frame = frame::encode(&request).map_err(FillError::Request)?;
        drop(request);
        // An agent that is not root has no other user to be.
        let identity = geteuid().is_root().then_some(self.identity);
        let mut command = Command::new(self.program);
        confine(&mut command, Confinement::new(handover, identity));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(cannot("the pager cannot be started"))?;
        let report = converse(&mut child, &frame);
        if report.is_err() {
            // It may hang.
            let _ = child.kill();
        }
        let ended = child.wait().map_err(cannot("the pager cannot be waited for"))?;
        match report? {
            Some(Report::Filled(filled)) => Ok(filled),
            Some(Report::Failed { damaged, message }) => {
                Err(FillError::Failed { damaged, message })
            }
            None => Err(FillError::Silent { how: holdfast_jail::in_words(ended) }),
        }
    }

    fn request(&self, handover: &mut Handover, copy: BorrowedFd<'_>) -> Result<Request, FillError> {
        let regions = memory::regions(self.pid, self.cold.bytes)
            .map_err(cannot("guest memory is not found in the VMM"))?;
        let regions = regions.into_iter().map(|(addresses, offset)| Region {
            address: addresses.start,
            bytes: addresses.end - addresses.start,
            offset,
        });
        let mut pieces = Vec::with_capacity(self.cold.pieces.len());
        for (kind, name, file) in &self.cold.pieces {
            let kind = match kind {
                Kind::Segment => PieceKind::Segment,
                Kind::Layer => PieceKind::Layer,
                Kind::State => continue,
            };
            pieces.push(Piece { kind, name: *name.bytes(), fd: handover.give(file.file())? });
        }
        Ok(Request {
            version: WIRE_VERSION,
            faults_fd: handover.give(faults_of(self.pid)?)?,
            regions: regions.collect(),
            bytes: self.cold.bytes,
            layers: self.cold.layers.iter().map(|name| *name.bytes()).collect(),
            pieces,
            key: *Key::reveal(&self.cold.key),
            copy_fd: handover.give(copy)?,
            first: self.cold.first.clone(),
        })
    }
}

/// Sends the request and waits for the report. `None`: it ended without one.
fn converse(child: &mut Child, request: &[u8]) -> Result<Option<Report>, FillError> {
    let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Ok(None);
    };
    // One that ended at once says so by its status.
    let _ = stdin.write_all(request);
    drop(stdin);
    let mut watched = [PollFd::new(&stdout, PollFlags::IN)];
    match poll(&mut watched, Some(&PATIENCE)) {
        Ok(0) => return Err(FillError::Hung),
        Ok(_) => {}
        Err(error) => return Err(cannot("the pager cannot be waited for")(error.into())),
    }
    // A report that is cut is none.
    Ok(frame::read_frame(&mut stdout).unwrap_or(None))
}

/// The userfaultfd of a VMM, taken out of it: its number is found by what it is.
fn faults_of(pid: u32) -> Result<OwnedFd, FillError> {
    let folder = format!("/proc/{pid}/fd");
    let found = || -> io::Result<Option<i32>> {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            // Closed in between.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            if target.as_os_str() == "anon_inode:[userfaultfd]" {
                return Ok(entry.file_name().to_str().and_then(|name| name.parse().ok()));
            }
        }
        Ok(None)
    };
    let number = found().map_err(cannot("the VMM's descriptors cannot be listed"))?;
    let number = number.ok_or(FillError::NoFaults)?;
    let taken = pidfd(pid).and_then(|vmm| pidfd_getfd(vmm, number, PidfdGetfdFlags::empty()));
    taken.map_err(|error| cannot("the VMM's userfaultfd cannot be taken")(error.into()))
}

fn pidfd(pid: u32) -> Result<OwnedFd, rustix::io::Errno> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    pidfd_open(pid, PidfdFlags::empty())
}

fn is_there(pid: u32) -> bool {
    let Ok(vmm) = pidfd(pid) else { return false };
    let mut watched = [PollFd::new(&vmm, PollFlags::IN)];
    // Readable: it has ended.
    matches!(poll(&mut watched, Some(&Timespec::default())), Ok(0))
}

fn kill(pid: u32) {
    // Gone already.
    let _ = pidfd(pid).and_then(|vmm| pidfd_send_signal(vmm, Signal::KILL));
}

/// Whether pages of a VMM's guest memory are waited for that somebody must bring.
pub(super) fn is_wanting(pid: u32) -> io::Result<bool> {
    match faults_of(pid) {
        Ok(_there) => {}
        Err(FillError::NoFaults) => return Ok(false),
        Err(FillError::Io { source, .. }) => return Err(source),
        Err(other) => return Err(io::Error::other(other)),
    }
    // Of each mapping; `um`: what is missing is told.
    let told = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut flags = told.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    Ok(flags.any(|flags| flags.split_whitespace().any(|flag| flag == "um")))
}

/// What a resume was begun with, to be filled once its VMM is there.
#[derive(Debug)]
pub(super) struct ToFill {
    pub(super) cold: Cold,
    pub(super) identity: Identity,
}
