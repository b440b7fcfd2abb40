//! Messages of this program with the agent, and the descriptors that come with them.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};

use super::orders::{ANSWER_FDS, Answer, MESSAGE_BYTES_MAX, answer_to_bytes};

/// One whole message with at most `FDS` descriptors. Nothing at all: the other end is closed.
pub(super) fn receive<const FDS: usize>(
    socket: &OwnedFd,
) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    let mut text = vec![0; MESSAGE_BYTES_MAX];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Errno::BADMSG);
    }
    text.truncate(got.bytes);
    Ok((text, fds))
}

pub(super) fn answer(
    socket: &OwnedFd,
    answer: &Answer,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let bytes = answer_to_bytes(answer);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ANSWER_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}
