//! Landlock: no path, no listening on TCP, and no process outside.

use rustix::io::Errno;

use crate::sys;

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
/// Binding TCP sockets. Connecting them is what this process is for.
const NET_BIND_TCP: u64 = 0b1;
/// Abstract Unix sockets of, and signals to, processes outside.
const SCOPE_ALL: u64 = 0b11;

/// What a restriction denies, all of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Denied {
    fs: u64,
    net: u64,
    scope: u64,
}

impl Denied {
    /// All that the kernel's version can deny of what we never need.
    fn all(abi: i32) -> Self {
        let from = |first: i32, bits: u64| if abi >= first { bits } else { 0 };
        let fs = FS_FIRST
            | from(ABI_REFER, FS_REFER)
            | from(ABI_TRUNCATE, FS_TRUNCATE)
            | from(ABI_IOCTL_DEV, FS_IOCTL_DEV);
        Self { fs, net: from(ABI_NET, NET_BIND_TCP), scope: from(ABI_SCOPE, SCOPE_ALL) }
    }
}

/// Puts this thread and those it starts under it. Harmless where the kernel has no Landlock: the
/// filter of system calls opens no file either. Needs no_new_privs.
pub(crate) fn restrict() -> Result<(), Errno> {
    let abi = match sys::landlock_abi() {
        Ok(abi) => abi,
        Err(Errno::NOSYS | Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    sys::landlock_restrict(&Denied::all(abi))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_denies_what_it_knows_and_not_more() {
        assert_eq!(Denied::all(1), Denied { fs: 0x1fff, net: 0, scope: 0 });
        assert_eq!(Denied::all(4), Denied { fs: 0x7fff, net: 1, scope: 0 });
        assert_eq!(Denied::all(9), Denied { fs: 0xffff, net: 1, scope: 3 });
    }
}
