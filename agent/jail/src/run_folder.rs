//! The folder of one sandbox under /run: its sockets and its logs.

use std::{
    io,
    os::unix::{fs::DirBuilderExt, net::UnixListener},
    path::{Path, PathBuf},
};

use fs_err as fs;
use log::warn;

use crate::JailError;

/// One sandbox's run folder, for root alone. Removed with what is in it on drop.
#[must_use = "dropping the guard removes the folder"]
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Makes `parent/name`, and `parent` if it is missing.
    pub fn create(parent: &Path, name: &str) -> Result<Self, JailError> {
        let path = parent.join(name);
        let failed = |source| JailError::RunFolder { action: "make", path: path.clone(), source };
        fs::create_dir_all(parent).map_err(failed)?;
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        Ok(Self { path })
    }

    /// The run folder that an earlier agent made. `None`: there is none.
    pub fn adopt(parent: &Path, name: &str) -> Result<Option<Self>, JailError> {
        let path = parent.join(name);
        match fs::symlink_metadata(&path) {
            Ok(facts) if facts.is_dir() => Ok(Some(Self { path })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(JailError::RunFolder { action: "look at", path, source }),
        }
    }

    /// Leaves it in place, for the next agent.
    pub fn detach(self) {
        std::mem::forget(self);
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new file in the folder that is written once, for those who come later.
    pub(crate) fn record(&self, name: &str) -> Result<fs::File, JailError> {
        let path = self.path.join(name);
        fs::OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| JailError::RunFolder { action: "make", path, source })
    }

    /// A record that an earlier agent had made. `None`: there is none.
    pub(crate) fn read_record(&self, name: &str) -> Result<Option<fs::File>, JailError> {
        let path = self.path.join(name);
        match fs::File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(JailError::RunFolder { action: "open", path, source }),
        }
    }

    /// A listening Unix stream socket in the folder.
    pub fn listen(&self, name: &str) -> Result<UnixListener, JailError> {
        let path = self.path.join(name);
        UnixListener::bind(&path).map_err(|source| JailError::RunFolder {
            action: "listen on",
            path,
            source,
        })
    }

    /// A new file in the folder, opened for appending.
    pub fn log(&self, name: &str) -> Result<fs::File, JailError> {
        let path = self.path.join(name);
        fs::OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .map_err(|source| JailError::RunFolder { action: "make", path, source })
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            // Left for the sweep at the next start.
            warn!(path:% = self.path.display(), error:%; "run folder not removed");
        }
    }
}

/// Removes every run folder under `parent`. Nothing may use them any more.
pub fn sweep_run_folders(parent: &Path) -> Result<(), JailError> {
    let failed = |source| JailError::RunFolder { action: "sweep", path: parent.into(), source };
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed(source)),
    };
    for entry in entries {
        fs::remove_dir_all(entry.map_err(failed)?.path()).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_run_folder_is_for_its_owner_alone_and_goes_with_its_guard() {
        let parent = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(parent.path(), "one").unwrap();
        let path = folder.path().to_owned();
        let _socket = folder.listen("control.sock").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn a_detached_run_folder_stays_and_is_adopted_by_its_name() {
        let parent = tempfile::tempdir().unwrap();
        RunFolder::create(parent.path(), "one").unwrap().detach();
        let adopted = RunFolder::adopt(parent.path(), "one").unwrap().unwrap();
        assert_eq!(adopted.path(), parent.path().join("one"));
        drop(adopted);
        assert!(RunFolder::adopt(parent.path(), "one").unwrap().is_none());
    }

    #[test]
    fn the_sweep_takes_what_a_killed_agent_left() {
        let parent = tempfile::tempdir().unwrap();
        let left = RunFolder::create(parent.path(), "left").unwrap();
        std::mem::forget(left.listen("vsock.sock").unwrap());
        std::mem::forget(left);
        sweep_run_folders(parent.path()).unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        sweep_run_folders(&parent.path().join("missing")).unwrap();
    }
}
