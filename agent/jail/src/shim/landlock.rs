//! Landlock: this process and those it starts reach no path, no port and no process outside.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::sys;

/// First version of the kernel's interface that knows each.
const ABI_REFER: i32 = 2;
const ABI_TRUNCATE: i32 = 3;
const ABI_NET: i32 = 4;
const ABI_IOCTL_DEV: i32 = 5;
const ABI_SCOPE: i32 = 6;

/// Kinds of access to files: 13 in the first version, one more in some later ones.
const FS_FIRST: u64 = (1 << 13) - 1;
const FS_REFER: u64 = 1 << 13;
const FS_TRUNCATE: u64 = 1 << 14;
const FS_IOCTL_DEV: u64 = 1 << 15;
const FS_EXECUTE: u64 = 1 << 0;
const FS_READ_FILE: u64 = 1 << 2;
/// Binding and connecting TCP sockets.
const NET_ALL: u64 = 0b11;
/// Abstract Unix sockets of, and signals to, processes outside.
const SCOPE_ALL: u64 = 0b11;

/// What a restriction denies, all of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Denied {
    pub(super) fs: u64,
    pub(super) net: u64,
    pub(super) scope: u64,
}

impl Denied {
    /// All that the kernel's version can deny.
    fn all(abi: i32) -> Self {
        let from = |first: i32, bits: u64| if abi >= first { bits } else { 0 };
        let fs = FS_FIRST
            | from(ABI_REFER, FS_REFER)
            | from(ABI_TRUNCATE, FS_TRUNCATE)
            | from(ABI_IOCTL_DEV, FS_IOCTL_DEV);
        Self { fs, net: from(ABI_NET, NET_ALL), scope: from(ABI_SCOPE, SCOPE_ALL) }
    }
}

/// For a VMM: nothing is left but executing `program`. Harmless where the kernel has no Landlock:
/// the empty root is there all the same. Needs no_new_privs.
pub(super) fn only_execute(program: BorrowedFd<'_>) -> Result<(), Errno> {
    restrict(Some(program), |denied| denied)
}

/// For a shim. It may still send signals: the kernel sends the one at its end, by which the VMM
/// dies with it, in its name.
pub(super) fn no_files() -> Result<(), Errno> {
    restrict(None, |denied| Denied { scope: 0, ..denied })
}

/// The version of Landlock that the kernel has and lets be used; `None`: a jail is without it.
pub fn landlock_version() -> Option<u32> {
    sys::landlock_abi().ok().and_then(|abi| abi.try_into().ok())
}

fn restrict(
    program: Option<BorrowedFd<'_>>,
    choose: impl FnOnce(Denied) -> Denied,
) -> Result<(), Errno> {
    let abi = match sys::landlock_abi() {
        Ok(abi) => abi,
        Err(Errno::NOSYS | Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    let ruleset = sys::landlock_ruleset(&choose(Denied::all(abi)))?;
    if let Some(program) = program {
        sys::landlock_allow(&ruleset, program, FS_EXECUTE | FS_READ_FILE)?;
    }
    sys::landlock_restrict(&ruleset)
}

#[cfg(test)]
mod tests {
    use std::{io::ErrorKind, net::TcpListener, thread};

    use super::*;

    #[test]
    fn who_has_no_files_opens_none_and_listens_nowhere() {
        if sys::landlock_abi().is_ok_and(|abi| abi >= ABI_NET) {
            // It holds for the thread that calls it.
            let outcome = thread::spawn(|| {
                rustix::thread::set_no_new_privs(true).unwrap();
                no_files().unwrap();
                let opened = fs_err::File::open("/etc/passwd").map(drop).unwrap_err();
                let bound = TcpListener::bind("127.0.0.1:0").map(drop).unwrap_err();
                (opened.kind(), bound.kind())
            });
            let refused = ErrorKind::PermissionDenied;
            assert_eq!(outcome.join().unwrap(), (refused, refused));
        }
    }

    #[test]
    fn each_version_denies_what_it_knows_and_not_more() {
        assert_eq!(Denied::all(1), Denied { fs: 0x1fff, net: 0, scope: 0 });
        assert_eq!(Denied::all(4), Denied { fs: 0x7fff, net: 3, scope: 0 });
        assert_eq!(Denied::all(9), Denied { fs: 0xffff, net: 3, scope: 3 });
    }
}
