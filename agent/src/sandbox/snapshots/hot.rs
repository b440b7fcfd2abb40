//! Memory files under a budget. Each can be made anew from the pieces of its snapshot, so that those
//! used longest ago go. A guest that runs from one keeps it until it ends.

use std::{os::unix::fs::MetadataExt, path::PathBuf, time::SystemTime};

use fs_err as fs;
use holdfast_model::SnapshotId;
use log::{info, warn};
use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, futimens};

use super::Snapshots;

/// Of the file system, where no budget is given.
const SHARE: u64 = 4;

pub(super) struct MemoryFile {
    used: SystemTime,
    /// On disk.
    pub(super) bytes: u64,
    path: PathBuf,
}

/// Notes that the file was needed now.
pub(super) fn used(memory: &fs::File) {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
    };
    // Without it the file goes a little early.
    let _ = futimens(memory, &times);
}

impl Snapshots {
    /// Removes memory files that are too many, but not this snapshot's.
    pub(super) fn keep_to_budget(&self, but: &SnapshotId) {
        if let Err(error) = self.try_to_keep_to_budget(but) {
            warn!(error:%; "memory files are not held to their budget");
        }
    }

    fn try_to_keep_to_budget(&self, but: &SnapshotId) -> std::io::Result<()> {
        let budget = match self.hot_bytes_max {
            0 => {
                let all = rustix::fs::statvfs(&self.folders)?;
                all.f_blocks.saturating_mul(all.f_frsize) / SHARE
            }
            given => given,
        };
        let kept = self.memory_path(but);
        let mut files = self.memory_files()?;
        files.sort_by_key(|file| file.used);
        let mut bytes: u64 = files.iter().map(|file| file.bytes).sum();
        for file in files {
            if bytes <= budget {
                break;
            }
            if file.path != kept {
                fs::remove_file(&file.path)?;
                bytes -= file.bytes;
                info!(path:% = file.path.display(), mib = file.bytes >> 20; "memory file removed");
            }
        }
        Ok(())
    }

    pub(super) fn memory_files(&self) -> std::io::Result<Vec<MemoryFile>> {
        let mut files = Vec::new();
        for folder in fs::read_dir(&self.folders)? {
            let path = folder?.path().join(format!("memory-{}", self.boot));
            // One that is just being removed is as good as gone.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            files.push(MemoryFile {
                used: metadata.modified()?,
                // Holes cost nothing; what a reflink shares is counted for each.
                bytes: metadata.blocks() * 512,
                path,
            });
        }
        Ok(files)
    }
}
