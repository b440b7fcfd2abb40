//! The way to the host: PID 1 listens on one vsock port, and rings once when it does.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use holdfast_wire::{guest::RPC_PORT, vmm::READY_PORT};

use crate::{rpc::Listener, sys};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

#[derive(Debug)]
pub struct Vsock {
    socket: OwnedFd,
}

impl Vsock {
    pub fn listen() -> io::Result<Self> {
        Ok(Self { socket: sys::vsock_listen(RPC_PORT, BACKLOG)? })
    }
}

/// Tells the host that PID 1 serves. The attempt is the message: the host refuses the connection.
pub fn ring() {
    // Refused is the rule; without a host that listens there is nobody to serve either.
    let _ = sys::vsock_connect_host(READY_PORT);
}

impl Listener for Vsock {
    fn readable(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        sys::vsock_accept_host(&self.socket)
    }
}
