//! The one connection that carries an exec's streams now, and what is on its way over it.

use std::os::fd::{AsFd, BorrowedFd};

use holdfast_wire::{
    frame::{self, FrameError},
    guest::{Exited, Failure, FailureKind, Input, Output},
};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use crate::{
    connection::Connection,
    failure::{failure, invalid},
    rpc::Slot,
};

/// Most bytes read from the host at once.
const READ_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub(crate) struct Link {
    connection: Connection,
    /// Its place among the connections served at once.
    _slot: Slot,
    /// Count of the output byte that is sent next.
    pub at: u64,
    /// Bytes of stdin that the host was told of.
    pub taken_told: u64,
    /// The last word was queued.
    pub told_end: bool,
    /// The host has gone: there is nobody to tell.
    pub lost: bool,
    /// Frames on their way to the host: at most one piece of output and a few small answers.
    out: Vec<u8>,
    out_sent: usize,
    /// Bytes from the host that are not a whole frame yet.
    inbox: Vec<u8>,
}

impl Link {
    /// Sends from output byte `at` on.
    pub(crate) fn new(connection: Connection, slot: Slot, at: u64) -> Self {
        Self {
            connection,
            _slot: slot,
            at,
            taken_told: 0,
            told_end: false,
            lost: false,
            out: Vec::new(),
            out_sent: 0,
            inbox: Vec::new(),
        }
    }

    pub(crate) fn set_nonblocking(&self) -> Result<(), Errno> {
        rustix::io::ioctl_fionbio(self.connection.as_fd(), true)
    }

    /// The host has taken all that was queued.
    pub(crate) fn is_idle(&self) -> bool {
        self.out.is_empty()
    }

    pub(crate) fn queue(&mut self, output: &Output) -> Result<(), Failure> {
        let framed = frame::encode(output)
            .map_err(|error| failure(FailureKind::Internal, error.to_string()))?;
        self.out.extend_from_slice(&framed);
        self.write_out();
        Ok(())
    }

    pub(crate) fn write_out(&mut self) {
        while self.out_sent < self.out.len() {
            let unsent = &self.out[self.out_sent..];
            match rustix::net::send(self.connection.as_fd(), unsent, SendFlags::NOSIGNAL) {
                Ok(count) => self.out_sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.lost = true;
                    break;
                }
            }
        }
        self.out.clear();
        self.out_sent = 0;
    }

    pub(crate) fn read(&mut self) {
        let mut bytes = [0; READ_BYTES];
        match rustix::net::recv(self.connection.as_fd(), &mut bytes, RecvFlags::empty()) {
            Ok((_, 0)) => self.lost = true,
            Ok((_, count)) => self.inbox.extend_from_slice(&bytes[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.lost = true,
        }
    }

    /// The next whole message that has arrived.
    pub(crate) fn take_input(&mut self) -> Result<Option<Input>, Failure> {
        let Some(split) = frame::split_frame(&self.inbox).map_err(|error| bad(&error))? else {
            return Ok(None);
        };
        let input = frame::decode(split.frame).map_err(|error| bad(&error))?;
        let taken = self.inbox.len() - split.rest.len();
        self.inbox.drain(..taken);
        Ok(Some(input))
    }

    /// Says how a command ended that never ran.
    pub(crate) fn end(mut self, exited: Exited) {
        // The host may have gone; then nobody is left to tell.
        let _ = self.connection.set_blocking();
        let started = Output::Started { pid: 0, kept: false, stdin_taken: 0 };
        for output in [started, Output::Exited(exited)] {
            let _ = self.connection.send(&output);
        }
    }

    /// Says why it ends here, as the last thing on the connection.
    pub(crate) fn refuse(mut self, refused: Failure) {
        // The host may have gone; then nobody is left to tell.
        let _ = self.connection.set_blocking();
        let _ = self.connection.send(&Output::Failed(refused));
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

fn bad(error: &FrameError) -> Failure {
    invalid(format!("what followed the request is not input: {error}"))
}
