//! Sockets of the guest's vsock family, for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer; the fd it returns is new, so nobody else owns it.
    unsafe {
        match libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a struct of integers, for which zeros are a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn length() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap()
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Listens on `port`.
pub(super) fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` is a sockaddr_vm of the length given and lives through the call.
    checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length()) })?;
    // SAFETY: takes no pointer.
    checked(unsafe { libc::listen(socket.as_raw_fd(), 64) })?;
    Ok(socket)
}

/// Waits for the next connection.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: null pointers say that the peer's address is not wanted; the fd returned is new.
    unsafe {
        match libc::accept(listener.as_raw_fd(), none, none.cast()) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Connects to `port` of the host.
pub(super) fn connect(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: as for `bind` above.
    checked(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length()) })?;
    Ok(socket)
}
