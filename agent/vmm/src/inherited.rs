//! The fds this process was started with. They are claimed all at once before any fd of our own is
//! made, so a number in the configuration can only ever mean what the agent put there.

use std::{
    collections::BTreeMap,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use holdfast_wire::vmm::Config;

use crate::sys;

/// Numbers up to this one are the standard streams, which stay theirs.
const STANDARD_FD_LAST: i32 = 2;

/// Up to `most` bytes from the start of an inherited file, by position: its own is shared.
pub(crate) fn read_start(file: &fs_err::File, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; most];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.file().read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FdError {
    #[error("fd {fd} for {what} is one of the standard streams")]
    Standard { what: &'static str, fd: i32 },
    #[error("fd {fd} for {what} is named twice")]
    NamedTwice { what: &'static str, fd: i32 },
    #[error("fd {fd} for {what} is not open")]
    NotOpen {
        what: &'static str,
        fd: i32,
        #[source]
        source: std::io::Error,
    },
    #[error("fd {fd} is not one of the configuration's, or was taken before")]
    NotThere { fd: i32 },
}

/// What the configuration names, each until its user takes it.
#[derive(Debug, Default)]
pub(crate) struct InheritedFds {
    open: BTreeMap<i32, OwnedFd>,
}

impl InheritedFds {
    /// Claims every fd of `config`. Called once, before this process opens anything.
    pub(crate) fn claim(config: &Config) -> Result<Self, FdError> {
        let named = [
            ("guest memory", config.memory_fd),
            ("KVM", config.kvm_fd),
            ("the kernel", config.kernel_fd),
            ("the initramfs", config.initramfs_fd),
            ("the control socket", config.control_fd),
            ("the vsock socket", config.vsock_fd),
            ("the serial log", config.serial.log_fd),
        ];
        let segments = config.disks.iter().flat_map(|disk| &disk.segments);
        let mut fds = Self::default();
        let segments = segments.map(|part| ("a disk", part.fd));
        let taps = config.networks.iter().map(|network| ("a network", network.tap_fd));
        let state = config.state_fd.map(|fd| ("the saved state", fd));
        let faults = config.userfault_fd.map(|fd| ("userfaultfd", fd));
        let rest = taps.chain(state).chain(faults);
        for (what, fd) in named.into_iter().chain(segments).chain(rest) {
            fds.claim_one(what, fd)?;
        }
        Ok(fds)
    }

    fn claim_one(&mut self, what: &'static str, fd: i32) -> Result<(), FdError> {
        if fd <= STANDARD_FD_LAST {
            return Err(FdError::Standard { what, fd });
        }
        if self.open.contains_key(&fd) {
            return Err(FdError::NamedTwice { what, fd });
        }
        let owned = sys::claim_fd(fd).map_err(|source| FdError::NotOpen { what, fd, source })?;
        self.open.insert(fd, owned);
        Ok(())
    }

    /// Hands out the fd that the configuration calls `fd`, once.
    pub(crate) fn take(&mut self, fd: i32) -> Result<OwnedFd, FdError> {
        self.open.remove(&fd).ok_or(FdError::NotThere { fd })
    }
}
