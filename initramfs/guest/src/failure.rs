//! Why a call did nothing: the kernel's error numbers turned into the kinds the host knows.

use std::{fmt::Display, io};

use holdfast_wire::guest::{Failure, FailureKind};
use rustix::io::Errno;

pub(crate) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into() }
}

pub(crate) fn invalid(message: impl Into<String>) -> Failure {
    failure(FailureKind::Invalid, message)
}

pub(crate) fn not_found(message: impl Into<String>) -> Failure {
    failure(FailureKind::NotFound, message)
}

/// `what` names the thing and the attempt: `cannot read /etc/x`.
pub(crate) fn from_io(what: impl Display, error: &io::Error) -> Failure {
    failure(kind_of(error), format!("{what}: {error}"))
}

pub(crate) fn from_errno(what: impl Display, error: Errno) -> Failure {
    from_io(what, &error.into())
}

fn kind_of(error: &io::Error) -> FailureKind {
    let Some(number) = error.raw_os_error() else { return kind_by_name(error.kind()) };
    match Errno::from_raw_os_error(number) {
        Errno::NOENT => FailureKind::NotFound,
        Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY | Errno::BUSY => {
            FailureKind::Denied
        }
        Errno::NOTDIR
        | Errno::ISDIR
        | Errno::LOOP
        | Errno::NAMETOOLONG
        | Errno::NOEXEC
        | Errno::TOOBIG
        | Errno::INVAL => FailureKind::Invalid,
        Errno::NOMEM
        | Errno::AGAIN
        | Errno::NOSPC
        | Errno::DQUOT
        | Errno::MFILE
        | Errno::NFILE
        | Errno::FBIG => FailureKind::Exhausted,
        _ => FailureKind::Internal,
    }
}

fn kind_by_name(kind: io::ErrorKind) -> FailureKind {
    match kind {
        io::ErrorKind::NotFound => FailureKind::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => FailureKind::Denied,
        io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidData
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory => FailureKind::Invalid,
        io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => FailureKind::Exhausted,
        _ => FailureKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_missing_file_are_told_apart() {
        let full = from_errno("cannot write /a", Errno::NOSPC);
        let missing = from_errno("cannot read /a", Errno::NOENT);
        assert_eq!(full.kind, FailureKind::Exhausted);
        assert_eq!(missing.kind, FailureKind::NotFound);
        assert!(missing.message.starts_with("cannot read /a: No such file"), "{missing:?}");
    }
}
