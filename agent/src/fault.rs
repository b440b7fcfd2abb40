//! Points at which a test has the agent die, as if it were killed there. Outside of tests, without the
//! cargo feature `fault-points`, they are nothing.
//!
//! `HOLDFAST_FAULT_POINT=name` kills the process the first time it comes to the point of that name;
//! `name:3` the third time. With `HOLDFAST_FAULT_POWER` the whole machine is reset there, as when its
//! power goes: what is not on its disks by then never will be.

macro_rules! points {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A step of an operation that a restart must repeat or undo.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Point {
            $($(#[$doc])* $variant,)*
        }

        impl Point {
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

points! {
    /// The record of a new sandbox is durable; nothing else is there.
    CreateAccepted = "create.accepted",
    /// Its disk lies there.
    CreateDisk = "create.disk",
    /// Its cgroup is made.
    CreateCgroup = "create.cgroup",
    /// Its run folder is made.
    CreateRunFolder = "create.run-folder",
    /// The VMM's process runs.
    CreateSpawned = "create.spawned",
    /// PID 1 serves.
    CreateBooted = "create.booted",
    /// PID 1 has set the sandbox up; the record does not say Running yet.
    CreateStarted = "create.started",
    /// The record says Running; nobody was told.
    CreateRunning = "create.running",
    /// The record says Stopping; the guest runs.
    SuspendAccepted = "suspend.accepted",
    /// The guest has written what it had not written; in mode Disk it holds its disk still.
    SuspendQuiet = "suspend.quiet",
    /// The guest stands still.
    SuspendPaused = "suspend.paused",
    /// Memory and disk are copied; nothing of it is durable.
    SuspendCopied = "suspend.copied",
    /// The copy of the disk is durable; no piece is.
    SaveDisk = "save.disk",
    /// All pieces are durable; there is no manifest.
    SavePieces = "save.pieces",
    /// The snapshot is durable; the record does not name it.
    SuspendDurable = "suspend.durable",
    /// The record says Suspended; the VMM is there.
    SuspendCommitted = "suspend.committed",
    /// The record says Resuming; nothing is there.
    ResumeAccepted = "resume.accepted",
    /// The VMM's process runs.
    ResumeSpawned = "resume.spawned",
    /// The guest runs; the record does not say so.
    ResumeRestored = "resume.restored",
    /// The record says Running; nobody was told.
    ResumeRunning = "resume.running",
    /// Memory that is no longer hot is written anew; it has no name yet.
    WarmWritten = "warm.written",
    /// A sandbox that is to be saved runs on; nothing of its copy is durable.
    SnapshotCopied = "snapshot.copied",
    /// The snapshot is durable; no record names it.
    SnapshotDurable = "snapshot.durable",
    /// There is a record of it; nobody was told.
    SnapshotRecorded = "snapshot.recorded",
    /// The sandbox is saved for its forks; no record names that.
    ForkKept = "fork.kept",
    /// The records of all forks are durable; nothing else of them is there.
    ForkAccepted = "fork.accepted",
    /// It is noted that something of a snapshot may be in the remote store; nothing is.
    UploadMarked = "upload.marked",
    /// Its memory and state are there.
    UploadPieces = "upload.pieces",
    /// All of it is there but the manifest.
    UploadDisk = "upload.disk",
    /// All of it is there; it is not noted.
    UploadCommitted = "upload.committed",
    /// It is noted that a snapshot is another node's; nothing of it is here.
    FetchMarked = "fetch.marked",
    /// Its pieces are here.
    FetchPieces = "fetch.pieces",
    /// Its disk is here too; there is no manifest.
    FetchDisk = "fetch.disk",
    /// All of it is here; no record names it.
    FetchCommitted = "fetch.committed",
    /// The manifest of a snapshot that nobody needs is gone; all else is here.
    GcManifest = "gc.manifest",
    /// Its disk and memory are gone; its pieces are here.
    GcFolder = "gc.folder",
    /// Its manifest is gone from the remote store; it is noted as there.
    GcRemote = "gc.remote",
    /// A command's call is marked begun; the guest does not know of it.
    ExecBegun = "exec.begun",
    /// The guest runs the command.
    ExecStarted = "exec.started",
    /// The command has ended; its answer is not durable.
    ExecEnded = "exec.ended",
    /// The answer is durable; the guest still keeps the command.
    ExecAnswered = "exec.answered",
    /// The record says Deleting; everything is there.
    DeleteAccepted = "delete.accepted",
    /// The VMM has ended.
    DeleteKilled = "delete.killed",
    /// The disk is gone, the record is not.
    DeleteDisk = "delete.disk",
    /// Nothing is left.
    DeleteGone = "delete.gone",
}

/// The environment variable that names the point.
pub const FAULT_POINT: &str = "HOLDFAST_FAULT_POINT";

/// The environment variable by which the machine goes down with the process.
pub const FAULT_POWER: &str = "HOLDFAST_FAULT_POWER";

/// Passes the point, unless this process is to die at it.
#[cfg(not(any(test, feature = "fault-points")))]
pub(crate) fn at(_: Point) {}

/// Passes the point, unless this process is to die at it.
#[cfg(any(test, feature = "fault-points"))]
pub(crate) fn at(point: Point) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    };

    /// The point, and how often it may still be come to, this time included.
    static CHOSEN: LazyLock<Option<(String, AtomicU32)>> = LazyLock::new(|| {
        let text = std::env::var(FAULT_POINT).ok()?;
        let (name, times) = text.split_once(':').unwrap_or((&text, "1"));
        Some((name.to_owned(), AtomicU32::new(times.parse().ok()?)))
    });
    if let Some((name, left)) = &*CHOSEN
        && name == point.name()
        && left.fetch_sub(1, Ordering::AcqRel) == 1
    {
        if std::env::var_os(FAULT_POWER).is_some() {
            let _ = fs_err::write("/proc/sysrq-trigger", "b");
        }
        // As by `kill -9`: nothing is dropped, flushed or told.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own_that_begins_with_its_operation() {
        let names: std::collections::BTreeSet<_> = Point::ALL.iter().map(|p| p.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        for name in names {
            let operation = name.split('.').next();
            let operations = [
                "create", "suspend", "save", "resume", "warm", "snapshot", "fork", "upload",
                "fetch", "gc", "exec", "delete",
            ];
            assert!(operations.map(Some).contains(&operation), "{name}");
        }
    }
}
