//! The archive writer.

use std::{collections::BTreeSet, io};

use rustix::fs::FileType;

/// Longest name in the archive, in bytes, its NUL included: the kernel's PATH_MAX.
const NAME_BYTES_MAX: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    #[error("{0:?} is not a relative path without '..'")]
    Name(String),
    #[error("{name} is {bytes} bytes long: an entry holds at most 4 GiB")]
    TooLong { name: String, bytes: usize },
    #[error("cannot write the archive")]
    Io(#[from] io::Error),
}

/// An archive being made in memory: an initramfs is a few megabytes.
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
    dirs: BTreeSet<String>,
}

impl Cpio {
    pub fn new() -> Self {
        Self::default()
    }

    /// What every initramfs begins with: PID 1, and the folders it mounts on, `dev` among them.
    pub fn bootable(mount_points: &[&str], init: &[u8]) -> Result<Self, CpioError> {
        let mut archive = Self::new();
        for folder in mount_points {
            archive.dir(folder)?;
        }
        // The kernel opens it for PID 1 before devtmpfs is there.
        archive.char_device("dev/console", 5, 1)?;
        archive.file("init", 0o755, init)?;
        Ok(archive)
    }

    /// A folder, mode 0755. Added once, however often it is asked for.
    pub fn dir(&mut self, name: &str) -> Result<(), CpioError> {
        self.parents(name)?;
        if self.dirs.insert(name.to_owned()) {
            self.entry(name, FileType::Directory, 0o755, (0, 0), &[])?;
        }
        Ok(())
    }

    /// A regular file. Its folders are added before it.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), CpioError> {
        self.parents(name)?;
        self.entry(name, FileType::RegularFile, mode, (0, 0), content)
    }

    pub fn symlink(&mut self, name: &str, target: &str) -> Result<(), CpioError> {
        self.parents(name)?;
        self.entry(name, FileType::Symlink, 0o777, (0, 0), target.as_bytes())
    }

    /// A character device, mode 0600.
    pub fn char_device(&mut self, name: &str, major: u32, minor: u32) -> Result<(), CpioError> {
        self.parents(name)?;
        self.entry(name, FileType::CharacterDevice, 0o600, (major, minor), &[])
    }

    /// The whole archive.
    pub fn finish(mut self) -> Result<Vec<u8>, CpioError> {
        self.inode = 0;
        self.raw("TRAILER!!!", 0, (0, 0), &[])?;
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }

    fn parents(&mut self, name: &str) -> Result<(), CpioError> {
        match name.rsplit_once('/') {
            Some((parent, _)) => self.dir(parent),
            None => Ok(()),
        }
    }

    fn entry(
        &mut self,
        name: &str,
        kind: FileType,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> Result<(), CpioError> {
        let sound = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        if name.len() >= NAME_BYTES_MAX || !name.split('/').all(sound) {
            return Err(CpioError::Name(name.to_owned()));
        }
        self.inode += 1;
        self.raw(name, kind.as_raw_mode() | (mode & 0o7777), device, content)
    }

    fn raw(
        &mut self,
        name: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Result<(), CpioError> {
        let length = u32::try_from(content.len())
            .map_err(|_| CpioError::TooLong { name: name.to_owned(), bytes: content.len() })?;
        let name_length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        self.bytes.extend_from_slice(b"070701");
        let fields = [self.inode, mode, 0, 0, links, 0, length, 0, 0, major, minor, name_length, 0];
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::{fs::metadata, io::Write, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn the_archive_is_unpacked_by_cpio_as_it_was_described() {
        let folder = tempfile::tempdir().unwrap();
        let mut archive = Cpio::new();
        archive.file("usr/bin/tool", 0o755, b"hello").unwrap();
        archive.symlink("bin", "usr/bin").unwrap();
        archive.dir("proc").unwrap();
        archive.dir("usr").unwrap();
        let bytes = archive.finish().unwrap();

        let mut cpio = Command::new("cpio")
            .args(["--extract", "--quiet", "--make-directories"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(cpio.wait().unwrap().success());

        let tool = folder.path().join("bin/tool");
        assert_eq!(fs_err::read(&tool).unwrap(), b"hello");
        assert_eq!(metadata(&tool).unwrap().mode() & 0o7777, 0o755);
        assert!(metadata(folder.path().join("proc")).unwrap().is_dir());
    }

    #[test]
    fn the_same_contents_give_the_same_bytes() {
        let make = || {
            let mut archive = Cpio::new();
            archive.char_device("dev/console", 5, 1).unwrap();
            archive.finish().unwrap()
        };
        assert_eq!(make(), make());
    }

    #[test]
    fn a_name_that_climbs_out_or_is_absolute_is_refused() {
        for name in ["../x", "/x", "a//b", "a/../b", "", "."] {
            let outcome = Cpio::new().file(name, 0o644, b"");
            assert!(matches!(outcome, Err(CpioError::Name(_))), "{name}");
        }
    }
}
