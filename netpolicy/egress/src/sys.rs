//! The calls for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use crate::confine::landlock::Denied;

/// Takes ownership of the inherited descriptor `fd`. Called before this process has opened one of
/// its own, and once for each number.
pub(crate) fn claim_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes no pointer; on a closed number it fails.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open (checked), and nobody else owns it: it came by inheritance, nothing has
    // been opened yet, and the caller claims each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes every descriptor from `first` on. Called before this process has opened one itself.
pub(crate) fn close_from(first: RawFd) -> io::Result<()> {
    let first = first.unsigned_abs();
    // SAFETY: the call takes three integers. What it closes was inherited and is owned by no Rust
    // object: the caller has opened nothing yet, and `first` lies above what it has claimed.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Space for control messages, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 128]);

fn address(name: &libc::sockaddr_in) -> SocketAddrV4 {
    let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
    SocketAddrV4::new(ip, u16::from_be(name.sin_port))
}

fn name(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET.unsigned_abs().try_into().unwrap_or(0),
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    }
}

/// A datagram that came in.
pub(crate) struct Received {
    pub(crate) bytes: usize,
    pub(crate) from: SocketAddrV4,
    /// Where it was sent to. `None`: the socket does not tell.
    pub(crate) to: Option<SocketAddrV4>,
}

/// Receives one datagram of IPv4 and where it was sent to (IP_RECVORIGDSTADDR). Does not wait.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut from = name(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    let mut control = Control([0; 128]);
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all of its fields may be zero: null pointers with lengths of zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = size_of::<libc::sockaddr_in>().try_into().unwrap_or(0);
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: every pointer in `message` is to a live local or to `buffer`, with its length, and
    // nothing else refers to them during the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(bytes) = usize::try_from(count) else { return Err(io::Error::last_os_error()) };
    let mut to = None;
    // SAFETY: `message` is as the kernel filled it: its control pointer and length are of `control`.
    let mut head = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !head.is_null() {
        // SAFETY: the macros give null or a header that lies whole within `control`, which is
        // aligned for it.
        let (level, kind, length) =
            unsafe { ((*head).cmsg_level, (*head).cmsg_type, (*head).cmsg_len) };
        if level == libc::SOL_IP && kind == libc::IP_ORIGDSTADDR && length >= CMSG_NAME {
            // SAFETY: the length says that a whole sockaddr_in follows the header; it is copied
            // without asking for its alignment.
            let original =
                unsafe { ptr::read_unaligned(libc::CMSG_DATA(head).cast::<libc::sockaddr_in>()) };
            to = Some(address(&original));
        }
        // SAFETY: as for the first one.
        head = unsafe { libc::CMSG_NXTHDR(&raw const message, head) };
    }
    Ok(Received { bytes, from: address(&from), to })
}

/// Bytes of a control message with a socket's name: a header and the name.
const CMSG_NAME: usize = size_of::<libc::cmsghdr>() + size_of::<libc::sockaddr_in>();

/// Sends one datagram of IPv4, from the address `from` where one is given (IP_PKTINFO; the socket
/// must be transparent where it is not one of this host). Does not wait.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    to: SocketAddrV4,
    from: Option<Ipv4Addr>,
) -> io::Result<()> {
    let mut to = name(to);
    let mut control = Control([0; 128]);
    let mut piece =
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all of its fields may be zero: null pointers with lengths of zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut to).cast();
    message.msg_namelen = size_of::<libc::sockaddr_in>().try_into().unwrap_or(0);
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    if let Some(from) = from {
        let source = libc::in_addr { s_addr: u32::from(from).to_be() };
        let any = libc::in_addr { s_addr: 0 };
        let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: any };
        let info_bytes = u32::try_from(size_of::<libc::in_pktinfo>()).unwrap_or(0);
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: computes a size.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(info_bytes) } as usize;
        // SAFETY: `control` is larger than one header with this payload and aligned for it, so the
        // first header lies within it and the payload behind it.
        unsafe {
            let head = libc::CMSG_FIRSTHDR(&raw const message);
            (*head).cmsg_level = libc::SOL_IP;
            (*head).cmsg_type = libc::IP_PKTINFO;
            (*head).cmsg_len = libc::CMSG_LEN(info_bytes) as usize;
            ptr::write_unaligned(libc::CMSG_DATA(head).cast(), info);
        }
    }
    // SAFETY: every pointer in `message` is to a live local or to `bytes`, which the kernel only
    // reads, with its length.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The version of Landlock that this kernel has.
pub(crate) fn landlock_abi() -> Result<i32, Errno> {
    const VERSION: u32 = 1;
    let none = ptr::null::<Denied>();
    // SAFETY: with a null attribute of size 0 and this flag the call looks at no memory.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    i32::try_from(abi).ok().filter(|abi| *abi > 0).ok_or_else(last_errno)
}

/// Puts this thread, and those it starts, under a set of rules that denies all of `denied`.
pub(crate) fn landlock_restrict(denied: &Denied) -> Result<(), Errno> {
    let size = size_of::<Denied>();
    // SAFETY: the attribute is three 64-bit numbers laid out as in C, alive during the call. A
    // kernel that knows fewer takes it as long as the rest is zero, and says so if not.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, ptr::from_ref(denied), size, 0_u32)
    };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(last_errno)?;
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the call takes an open descriptor and an integer.
    let outcome =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) };
    if outcome == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    let error = io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::INVAL)
}

/// Watches a descriptor for readiness, for as long as the result lives.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped, which the
    // result does after it has stopped watching.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
