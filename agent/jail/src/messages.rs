//! Messages between agent, nursery and shims over a socket of whole messages, and the descriptors
//! that come with them.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
        sendmsg, socketpair,
    },
};

/// Descriptors of a message; the kernel takes no more.
pub(crate) const FDS_MAX: usize = 253;

pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let kind = SocketType::SEQPACKET;
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

/// One message, with at most [`FDS_MAX`] descriptors.
pub(crate) fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE);
    }
    let pieces = [IoSlice::new(bytes)];
    retry_on_intr(|| sendmsg(socket, &pieces, &mut ancillary, SendFlags::NOSIGNAL)).map(drop)
}

/// One message of at most `bytes_max` bytes and `fds_max` descriptors; `BADMSG` if it has more.
/// Nothing at all: the other end is closed.
pub(crate) fn receive(
    socket: &OwnedFd,
    bytes_max: usize,
    fds_max: usize,
) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    let mut bytes = vec![0; bytes_max];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds_max))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let got = retry_on_intr(|| recvmsg(socket.as_fd(), &mut pieces, &mut ancillary, flags))?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    // The space for descriptors is rounded up, so that the kernel may give some more.
    let cut = got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    if cut || fds.len() > fds_max {
        return Err(Errno::BADMSG);
    }
    bytes.truncate(got.bytes);
    Ok((bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_with_its_descriptors_and_an_end_with_nothing() {
        let (one, two) = pair().unwrap();
        send(&one, b"text", &[one.as_fd(), one.as_fd()]).unwrap();
        drop(one);
        let (bytes, fds) = receive(&two, 4, 2).unwrap();
        assert_eq!((bytes.as_slice(), fds.len()), (&b"text"[..], 2));
        // Those it came with were the last of the other end.
        drop(fds);
        let (bytes, fds) = receive(&two, 4, 2).unwrap();
        assert!(bytes.is_empty() && fds.is_empty());
    }

    #[test]
    fn a_message_that_is_longer_or_brings_more_than_it_may_is_refused() {
        let (one, two) = pair().unwrap();
        send(&one, b"texts", &[]).unwrap();
        assert_eq!(receive(&two, 4, 1).unwrap_err(), Errno::BADMSG);
        for count in [2, 3, 100] {
            send(&one, b"text", &vec![one.as_fd(); count]).unwrap();
            assert_eq!(receive(&two, 4, 1).unwrap_err(), Errno::BADMSG, "{count} descriptors");
        }
    }
}
