//! The writable disk of a sandbox: a sparse ext4 file, cloned from a template of its size.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
};

use fs_err::{self as fs, os::unix::fs::OpenOptionsExt};
use holdfast_model::{Mib, SandboxId};
use log::{info, warn};
use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};

/// Templates are kept for whole GiB only, so that odd sizes do not fill the folder.
const TEMPLATE_STEP: Mib = Mib(1024);

/// A journal bounds how long a mount after a crash takes; this size is the smallest that keeps
/// ordinary writes from waiting for it.
const JOURNAL_MIB: u32 = 16;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("mke2fs failed: {stderr}")]
    Format { stderr: String },
}

/// Where disks and their templates lie.
#[derive(Debug)]
pub(super) struct Disks {
    /// A folder per sandbox.
    sandboxes: PathBuf,
    templates: PathBuf,
    /// One template is made at a time.
    making: Mutex<()>,
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { action, path: path.clone(), source }
}

impl Disks {
    pub(super) fn new(state: &Path) -> Self {
        Self {
            sandboxes: state.join("sandboxes"),
            templates: state.join("templates"),
            making: Mutex::new(()),
        }
    }

    /// Makes the sandbox's disk and opens it. Blocks.
    pub(super) fn create(&self, id: &SandboxId, size: Mib) -> Result<fs::File, DiskError> {
        let folder = self.folder(id);
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        let path = self.path(id);
        let disk = new(&path)?;
        if size.0.is_multiple_of(TEMPLATE_STEP.0) {
            let template = self.template(size)?;
            clone(&template, &disk).map_err(failed("fill", &path))?;
        } else {
            format(&path, size)?;
        }
        Ok(disk)
    }

    /// Makes the sandbox's disk a copy of this one, in place of any it has, and opens it. Blocks.
    pub(super) fn create_from(&self, id: &SandboxId, saved: &Path) -> Result<fs::File, DiskError> {
        let folder = self.folder(id);
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("replace", &path)(error));
            }
            _ => {}
        }
        let source = fs::File::open(saved).map_err(failed("open", saved))?;
        let disk = new(&path)?;
        clone(&source, &disk).map_err(failed("fill", &path))?;
        Ok(disk)
    }

    /// Removes the sandbox's disk. Harmless when there is none. Blocks.
    pub(super) fn remove(&self, id: &SandboxId) -> Result<(), DiskError> {
        let folder = self.folder(id);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &folder)(error))
            }
            _ => Ok(()),
        }
    }

    /// Removes disks whose sandbox nobody knows. Blocks.
    pub(super) fn sweep(&self, known: impl Fn(&str) -> bool) -> io::Result<()> {
        fs::create_dir_all(&self.sandboxes)?;
        for entry in fs::read_dir(&self.sandboxes)? {
            let entry = entry?;
            let name = entry.file_name();
            if !name.to_str().is_some_and(&known) {
                fs::remove_dir_all(entry.path())?;
                info!(name:? = name; "disk of an unknown sandbox removed");
            }
        }
        Ok(())
    }

    pub(super) fn folder_of_all(&self) -> &Path {
        &self.sandboxes
    }

    fn folder(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes.join(id.as_str())
    }

    pub(super) fn path(&self, id: &SandboxId) -> PathBuf {
        self.folder(id).join("disk.ext4")
    }

    fn template(&self, size: Mib) -> Result<fs::File, DiskError> {
        let path = self.templates.join(format!("disk-{}.ext4", size.0));
        // The lock guards no data: a panic under it leaves a draft, which is made anew.
        let _making = self.making.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !path.exists() {
            fs::create_dir_all(&self.templates).map_err(failed("make", &self.templates))?;
            let draft = path.with_extension("draft");
            match fs::remove_file(&draft) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("replace", &draft)(error));
                }
                _ => {}
            }
            format(&draft, size)?;
            fs::File::open(&draft)
                .and_then(|file| file.sync_all())
                .and_then(|()| fs::rename(&draft, &path))
                .map_err(failed("make", &path))?;
            info!(mib = size.0; "disk template made");
        }
        fs::File::open(&path).map_err(failed("open", &path))
    }
}

/// A new file that only root reads: guest memory and disks hold secrets.
pub(super) fn new(path: &Path) -> Result<fs::File, DiskError> {
    let mut options = fs::OpenOptions::new();
    let options = options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).map_err(failed("make", path))
}

/// Makes an empty ext4 of `size` at `path`, sparse: tables and journal are left to be zeroed by
/// the guest's kernel.
fn format(path: &Path, size: Mib) -> Result<(), DiskError> {
    let output = Command::new("mke2fs")
        // Looked up here: not whatever else is called so in the agent's own path.
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", "^resize_inode"])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .args(["-J", &format!("size={JOURNAL_MIB}")])
        .arg(path)
        .arg(format!("{}M", size.0))
        .stdin(Stdio::null())
        .output()
        .map_err(failed("run mke2fs on", path))?;
    if output.status.success() {
        // A last group too small for its own tables is left out, and the file cut short by it.
        let file = fs::OpenOptions::new().write(true).open(path).map_err(failed("open", path))?;
        return file.set_len(size.bytes()).map_err(failed("size", path));
    }
    let stderr = String::from_utf8_lossy(&output.stderr).chars().take(500).collect::<String>();
    Err(DiskError::Format { stderr: stderr.trim().to_owned() })
}

/// Makes `target` (empty) a copy of `source`: sharing its blocks where the file system can, else
/// with the same holes.
pub(super) fn clone(source: &fs::File, target: &fs::File) -> io::Result<()> {
    match ioctl_ficlone(target, source) {
        Ok(()) => Ok(()),
        Err(errno) => {
            if errno != rustix::io::Errno::OPNOTSUPP && errno != rustix::io::Errno::XDEV {
                warn!(error:% = errno; "reflink failed; copying");
            }
            copy_sparse(source, target)
        }
    }
}

fn copy_sparse(source: &fs::File, target: &fs::File) -> io::Result<()> {
    let length = source.metadata()?.len();
    ftruncate(target, length)?;
    let mut at = 0;
    while at < length {
        let start = match seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole follows.
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(source, SeekFrom::Hole(start))?;
        let (mut from, mut to) = (start, start);
        while from < end {
            let rest = usize::try_from(end - from).unwrap_or(usize::MAX);
            if copy_file_range(source, Some(&mut from), target, Some(&mut to), rest)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn id(byte: u8) -> SandboxId {
        SandboxId::from_random([byte; 20])
    }

    fn is_ext4(disk: &fs::File) -> bool {
        let mut magic = [0; 2];
        rustix::io::pread(disk, &mut magic, 1024 + 56).unwrap();
        magic == [0x53, 0xef]
    }

    #[test]
    fn disks_of_whole_and_odd_sizes_are_sparse_ext4_of_their_size() {
        let state = tempfile::tempdir().unwrap();
        let disks = Disks::new(state.path());
        for (byte, mib) in [(1, 1024), (2, 1024), (3, 1025)] {
            let disk = disks.create(&id(byte), Mib(mib)).unwrap();
            let metadata = disk.metadata().unwrap();
            assert_eq!(metadata.len(), Mib(mib).bytes(), "{mib} MiB");
            assert!(metadata.blocks() * 512 < 8 << 20, "{} blocks", metadata.blocks());
            assert!(is_ext4(&disk), "{mib} MiB");
        }
        assert_eq!(fs::read_dir(state.path().join("templates")).unwrap().count(), 1);
    }

    #[test]
    fn the_sweep_takes_the_disks_of_unknown_sandboxes_only() {
        let state = tempfile::tempdir().unwrap();
        let disks = Disks::new(state.path());
        let (known, unknown) = (id(1), id(2));
        let _disks = [&known, &unknown].map(|id| disks.create(id, Mib(1024)).unwrap());
        disks.sweep(|name| name == known.as_str()).unwrap();
        assert!(disks.folder(&known).exists());
        assert!(!disks.folder(&unknown).exists());
        disks.remove(&known).unwrap();
        disks.remove(&known).unwrap();
        assert!(!disks.folder(&known).exists());
    }
}
