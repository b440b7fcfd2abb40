//! What PID 1 does before the machine is stopped and copied: what is in memory only goes to the
//! disk, and nothing is copied that is cheap to have back.
//!
//! A disk that is held still is let go again by itself: the host may be gone by then that asked for
//! it, and everything that writes would wait for ever. The time counts while the machine runs.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use holdfast_wire::guest::{Failure, Quiesce};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};

use crate::{
    failure::{from_errno, from_io, invalid},
    rpc::THREAD_STACK_BYTES,
    sys,
};

/// Clean pages of files, not the names and inodes that lead to them.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
const CLEAN_PAGES: &str = "1";

/// Longest a disk is held still, in milliseconds.
const HOLD_MS_MAX: u32 = 5 * 60 * 1000;

/// A disk that is held still, if it is.
#[derive(Debug, Default)]
pub(crate) struct Frost(Mutex<Option<Arc<OwnedFd>>>);

impl Frost {
    /// `disk`: where the sandbox's disk is mounted, if it has one of its own.
    pub(crate) fn quiesce(
        self: &Arc<Self>,
        disk: Option<&Path>,
        wanted: Quiesce,
    ) -> Result<(), Failure> {
        rustix::fs::sync();
        if wanted.drop_caches {
            fs_err::write(DROP_CACHES, CLEAN_PAGES)
                .map_err(|error| from_io("cannot drop caches", &error))?;
        }
        match wanted.hold_ms {
            Some(ms) => self.hold(disk, Duration::from_millis(ms.min(HOLD_MS_MAX).into())),
            None => Ok(()),
        }
    }

    fn hold(self: &Arc<Self>, disk: Option<&Path>, time: Duration) -> Result<(), Failure> {
        let disk = disk.ok_or_else(|| invalid("there is no disk to hold still"))?;
        let failed = |error: Errno| from_errno("cannot hold the disk still", error);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = Arc::new(openat(CWD, disk, flags, Mode::empty()).map_err(failed)?);
        let mut held = self.held();
        if held.is_some() {
            return Err(invalid("the disk is held still already"));
        }
        // Before it is held: a thread that could not be made then would be one too late.
        let (frost, timed) = (Arc::clone(self), Arc::downgrade(&folder));
        let timer = thread::Builder::new().name("thaw".to_owned()).stack_size(THREAD_STACK_BYTES);
        let timer = timer.spawn(move || {
            thread::sleep(time);
            let mut held = frost.held();
            // What is held by now may be held for another.
            if let Some(timed) = timed.upgrade()
                && held.as_ref().is_some_and(|folder| Arc::ptr_eq(folder, &timed))
            {
                *held = None;
                // Nobody is left to be told.
                let _ = sys::thaw(timed.as_fd());
            }
        });
        timer.map_err(|error| from_io("cannot hold the disk still", &error))?;
        sys::freeze(folder.as_fd()).map_err(failed)?;
        *held = Some(folder);
        Ok(())
    }

    /// Lets the disk go. Harmless when nothing is held.
    pub(crate) fn thaw(&self) -> Result<(), Failure> {
        match self.held().take() {
            Some(folder) => sys::thaw(folder.as_fd())
                .map_err(|error| from_errno("cannot let the disk go", error)),
            None => Ok(()),
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Instant};

    use holdfast_wire::guest::FailureKind;

    use super::*;

    fn quiet(hold_ms: Option<u32>) -> Quiesce {
        Quiesce { drop_caches: false, hold_ms }
    }

    #[test]
    fn a_machine_without_a_disk_of_its_own_holds_nothing_and_says_so() {
        let frost = Arc::new(Frost::default());
        let refused = frost.quiesce(None, quiet(Some(1))).unwrap_err();
        assert_eq!(refused.kind, FailureKind::Invalid, "{refused:?}");
        frost.quiesce(None, quiet(None)).unwrap();
        frost.thaw().unwrap();
    }

    /// An ext4 of its own on a loop device.
    struct Disk(tempfile::TempDir);

    impl Disk {
        fn make() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (file, mount) = (folder.path().join("file"), folder.path().join("mount"));
            fs_err::File::create(&file).unwrap().set_len(8 << 20).unwrap();
            fs_err::create_dir(&mount).unwrap();
            let run = |program: &str, options: &[&str], paths: &[&Path]| {
                let done = Command::new(program).args(options).args(paths).status().unwrap();
                assert!(done.success(), "{program}");
            };
            run("mke2fs", &["-q", "-F", "-t", "ext4"], &[&file]);
            run("mount", &["-o", "loop"], &[&file, &mount]);
            Self(folder)
        }

        fn mount(&self) -> std::path::PathBuf {
            self.0.path().join("mount")
        }

        /// Writes, which waits while it is held. Gives how long that took.
        fn write(&self, name: &str) -> Duration {
            let began = Instant::now();
            fs_err::write(self.mount().join(name), "text").unwrap();
            began.elapsed()
        }
    }

    impl Drop for Disk {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.mount()).status();
        }
    }

    #[test]
    fn a_disk_that_is_held_takes_nothing_until_it_is_let_go_or_its_time_is_over() {
        const TIME: Duration = Duration::from_millis(400);
        let disk = Disk::make();
        let frost = Arc::new(Frost::default());
        let hold = |ms| frost.quiesce(Some(&disk.mount()), quiet(Some(ms)));
        let ms = u32::try_from(TIME.as_millis()).unwrap();
        assert!(disk.write("before") < TIME);
        hold(ms).unwrap();
        // Whoever holds it twice would let it go too early.
        assert!(hold(ms).is_err());
        assert!(disk.write("meanwhile") > TIME / 2);
        assert!(frost.held().is_none());

        hold(60_000).unwrap();
        let waited = thread::scope(|scope| {
            let writer = scope.spawn(|| disk.write("waits"));
            thread::sleep(TIME);
            assert!(!writer.is_finished());
            frost.thaw().unwrap();
            writer.join().unwrap()
        });
        // It may have begun to write a little later.
        assert!(waited > TIME / 2, "{waited:?}");
        frost.thaw().unwrap();
        assert!(disk.write("after") < TIME);
    }

    #[test]
    fn a_file_system_that_cannot_be_held_is_not_taken_for_held() {
        let frost = Arc::new(Frost::default());
        let hold = quiet(Some(60_000));
        // proc has no freeze.
        assert!(frost.quiesce(Some(Path::new("/proc")), hold).is_err());
        assert!(frost.held().is_none());
        assert!(frost.quiesce(Some(Path::new("/no/such/folder")), hold).is_err());
        frost.thaw().unwrap();
    }
}
