//! Calls for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io, mem,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// The network namespace in which a tap lies.
pub(super) fn network_of(tap: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: SIOCGSKNS takes no argument, and `tap` is borrowed, so open.
    let fd = unsafe { libc::ioctl(tap.as_raw_fd(), libc::SIOCGSKNS as _) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// One datagram, and the address it was sent to in the first place.
pub(super) fn receive(socket: &OwnedFd) -> io::Result<(Vec<u8>, SocketAddr)> {
    let mut bytes = vec![0_u8; 2048];
    let mut control = [0_u64; 32];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: a structure of integers and pointers, for which zeros are a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the pointers in `message` are to buffers of the lengths given, alive over the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let Ok(count) = usize::try_from(count) else { return Err(io::Error::last_os_error()) };
    bytes.truncate(count);
    // SAFETY: `message` is as the kernel left it, with `control` alive, so that the macros stay
    // within it; an IP_ORIGDSTADDR message holds one sockaddr_in, read at whatever alignment.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_IP && (*header).cmsg_type == libc::IP_ORIGDSTADDR {
                let address = libc::CMSG_DATA(header).cast::<libc::sockaddr_in>().read_unaligned();
                let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
                return Ok((bytes, (ip, u16::from_be(address.sin_port)).into()));
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Err(io::Error::other("it came without the address it was sent to"))
}

/// Sends a datagram from an address that is not this machine's.
pub(super) fn send_from(
    socket: &OwnedFd,
    from: Ipv4Addr,
    to: (Ipv4Addr, u16),
    bytes: &[u8],
) -> io::Result<()> {
    let info = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(from).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let mut peer = libc::sockaddr_in {
        sin_family: libc::AF_INET.try_into().unwrap(),
        sin_port: to.1.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(to.0).to_be() },
        sin_zero: [0; 8],
    };
    let info_bytes = size_of_val(&info).try_into().unwrap();
    let mut control = [0_u64; 8];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: zeros are a value of it; the control message is written within `control`, which is
    // larger than it and aligned for it; all buffers live over the call, which reads them only.
    let sent = unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_name = (&raw mut peer).cast();
        message.msg_namelen = size_of_val(&peer).try_into().unwrap();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(info_bytes) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_IP;
        (*header).cmsg_type = libc::IP_PKTINFO;
        (*header).cmsg_len = libc::CMSG_LEN(info_bytes) as _;
        libc::CMSG_DATA(header).cast::<libc::in_pktinfo>().write_unaligned(info);
        libc::sendmsg(socket.as_raw_fd(), &raw const message, 0)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
