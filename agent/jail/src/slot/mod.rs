//! Slots: the network namespaces in which sandboxes' taps lie.
//!
//! A slot has the tap, the host's end of the guest's link, and two sockets that take what the rules
//! steer to them, wherever the guest sent it. No route leads out of it and no process is in it: what
//! comes out of the guest and is not for the sockets has nowhere to go even before the rules drop
//! it. Only while a policy lets flows pass the proxy by has it a second link, and a route over that. Nothing names a slot. The tap's descriptor, which the VMM holds, keeps it alive, so it goes
//! with its VMM whoever else was killed, and there is nothing to sweep.

mod byway;
mod counters;
mod links;
mod stock;

use std::{
    io::{self, Write},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    thread,
};

use fs_err as fs;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
    process::{PidfdGetfdFlags, pidfd_getfd},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

pub use self::{
    byway::{BywayPlan, HostPlan, SlotNetwork, prepare_host},
    counters::SlotCounter,
    stock::Slots,
};
use crate::{JailError, sys};

/// What a tap's descriptor was opened as.
const TUN: &str = "/dev/net/tun";

/// The guest's link, by which rulesets name it.
const TAP: &str = "tap0";

/// Where rulesets steer TCP to.
const LISTENER_PORT: u16 = 15001;

/// Where name servers listen. The answers' port is that of the socket.
const DNS_PORT: u16 = 53;

/// Connections that wait for the proxy: what comes while a new one is started. More are dropped, and
/// tried again by the guest.
const BACKLOG: i32 = 1024;

/// Bytes of complaint kept of nft, which says the same in one line for each rule it dislikes.
const COMPLAINT_BYTES_MAX: usize = 1024;

/// Of a new namespace's links to come. The kernel takes many of these over from the host's own.
const SETTINGS: &[(&str, &str)] = &[
    // The kernel must not talk to the guest of its own accord.
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
    ("ipv4/ip_forward", "0"),
    // There is no way back to the addresses of the outside, and answers go out all the same.
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/route_localnet", "0"),
    ("ipv4/conf/default/route_localnet", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/default/accept_source_route", "0"),
];

/// The network of one sandbox. Used once.
#[derive(Debug)]
pub struct Slot {
    /// For the VMM.
    pub tap: OwnedFd,
    /// For whoever carries on what the guest begins.
    pub sockets: SlotSockets,
}

/// What of a slot takes the guest's connections and questions. While nobody holds them, nothing
/// leaves the guest.
#[derive(Debug)]
pub struct SlotSockets {
    /// Listens for connections to whatever address and port: that of a connection is its local one.
    pub tcp: OwnedFd,
    /// Receives datagrams to port 53 of whatever address, each with that address
    /// (`IP_ORIGDSTADDR`). It may answer from any.
    pub dns: OwnedFd,
}

impl Slot {
    /// Makes a slot in which `ruleset` (nft(8)) holds. The rules are there before the first packet
    /// can be. Blocks for some ten milliseconds.
    pub fn make(ruleset: &str) -> Result<Self, JailError> {
        apart(|| {
            sys::unshare(UnshareFlags::NEWNET)
                .map_err(|errno| failed("have a network namespace")(errno.into()))?;
            for &(name, value) in SETTINGS {
                match fs::write(format!("/proc/sys/net/{name}"), value) {
                    // A host without IPv6.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    outcome => outcome.map_err(failed("be set up"))?,
                }
            }
            let tap = sys::open_tap(TAP).map_err(failed("have a tap"))?;
            load(ruleset).map_err(failed("have its rules"))?;
            links::set_up(TAP).map_err(failed("have its link"))?;
            Ok(Self { tap, sockets: SlotSockets::open()? })
        })
    }
}

impl SlotSockets {
    /// Makes the sockets of a slot again, when nobody holds them any more: an agent and the process
    /// it had handed them to were both killed, and the VMM goes on.
    pub fn reopen(tap: &OwnedFd) -> Result<Self, JailError> {
        SlotNetwork::of_tap(tap)?.inside(Self::open)
    }

    /// Another handle of each.
    pub fn try_clone(&self) -> Result<Self, JailError> {
        let clone = |fd: &OwnedFd| fd.try_clone().map_err(failed("be handed over"));
        Ok(Self { tcp: clone(&self.tcp)?, dns: clone(&self.dns)? })
    }

    /// In the network namespace of this thread.
    fn open() -> Result<Self, JailError> {
        let tcp = transparent(SocketType::STREAM, LISTENER_PORT)
            .and_then(|tcp| listen(&tcp, BACKLOG).map(|()| tcp))
            .map_err(|errno| failed("listen for connections")(errno.into()))?;
        let dns = transparent(SocketType::DGRAM, DNS_PORT)
            .and_then(|dns| sys::tell_original_destination(&dns).map(|()| dns))
            .map_err(|errno| failed("listen for questions to name servers")(errno.into()))?;
        Ok(Self { tcp, dns })
    }

    /// The slot that they are of.
    pub fn network(&self) -> Result<SlotNetwork, JailError> {
        SlotNetwork::of_sockets(self)
    }

    /// What the rules have counted so far, by their names for it. Runs nft, and blocks meanwhile.
    pub fn counters(&self) -> Result<Vec<SlotCounter>, JailError> {
        self.network()?.counters()
    }
}

/// The tap that a process holds, as a descriptor of our own: by its handle, and its number now.
pub fn tap_of(process: impl AsFd, pid: u32) -> Result<OwnedFd, JailError> {
    find_tap(process.as_fd(), pid).map_err(failed("be found by its VMM"))
}

fn find_tap(process: BorrowedFd<'_>, pid: u32) -> io::Result<OwnedFd> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // One that was closed meanwhile is not it.
        let is_tap = fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(TUN));
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok()).filter(|_| is_tap);
        let Some(number) = number else { continue };
        // By the handle: whatever has that pid by now, this is of the process that is meant.
        let tap = pidfd_getfd(process, number, PidfdGetfdFlags::empty())?;
        // What it holds is believed only so far: of what is no tap this fails.
        if sys::network_of_tap(&tap).is_ok() {
            return Ok(tap);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "it has no tap"))
}

/// A socket that takes what was sent to any address.
fn transparent(kind: SocketType, port: u16) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, kind, flags, None)?;
    // After the owner of the last one was killed, its connections linger for a while.
    sockopt::set_socket_reuseaddr(&socket, kind == SocketType::STREAM)?;
    sys::set_transparent(&socket)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    Ok(socket)
}

/// Does the work in another network namespace.
fn inside<T: Send>(
    network: impl AsFd + Send,
    work: impl FnOnce() -> Result<T, JailError> + Send,
) -> Result<T, JailError> {
    apart(move || {
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|errno| failed("be entered")(errno.into()))?;
        work()
    })
}

/// Does the work on a thread of its own: it leaves the host's network and must not come back to a
/// pool.
fn apart<T: Send>(work: impl FnOnce() -> Result<T, JailError> + Send) -> Result<T, JailError> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(outcome) => outcome,
        Err(_) => Err(failed("be made by a thread")(io::Error::other("the thread panicked"))),
    })
}

/// Loads the rules into this thread's network namespace.
fn load(ruleset: &str) -> io::Result<()> {
    nft(&["-f", "-"], ruleset).map(|_| ())
}

/// Runs nft(8) in this thread's network namespace: a child begins in its parent thread's.
fn nft(arguments: &[&str], input: &str) -> io::Result<Vec<u8>> {
    let mut nft = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let written = match nft.stdin.take() {
        // It says nothing before it has read everything.
        Some(mut pipe) => pipe.write_all(input.as_bytes()),
        None => Ok(()),
    };
    let output = nft.wait_with_output()?;
    if !output.status.success() {
        let complaint = &output.stderr[..output.stderr.len().min(COMPLAINT_BYTES_MAX)];
        return Err(io::Error::other(format!(
            "nft: {}",
            String::from_utf8_lossy(complaint).trim()
        )));
    }
    written.map(|()| output.stdout)
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Slot { what, source }
}
