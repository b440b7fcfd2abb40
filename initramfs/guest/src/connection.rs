//! One stream to the host: vsock in the microVM, any stream socket elsewhere.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use holdfast_wire::{
    frame::{self, FrameError},
    guest::Output,
};
use rustix::net::{RecvFlags, SendFlags, Shutdown, sockopt};

#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub(crate) fn send(&mut self, output: &Output) -> Result<(), FrameError> {
        frame::write_frame(self, output)
    }

    /// Longest time one read may wait. `None`: for ever.
    pub(crate) fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.socket, sockopt::Timeout::Recv, limit)?)
    }

    /// Undoes what an exec needs while it runs.
    pub(crate) fn set_blocking(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.socket, false)?)
    }

    /// Says that nothing more comes, and waits until the host has closed its end, so that what was
    /// sent is not lost with the machine.
    pub(crate) fn finish(&mut self, patience: Duration) {
        let told = rustix::net::shutdown(&self.socket, Shutdown::Write).is_ok();
        if told && self.limit_reads(Some(patience)).is_ok() {
            let mut rest = [0; 512];
            while matches!(self.read(&mut rest), Ok(1..)) {}
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(&self.socket, buffer, RecvFlags::empty())?.0)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
