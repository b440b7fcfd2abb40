//! Ends connections to the outside of a machine that goes on from what was saved: nobody is left
//! there who knows them, and who waits for an answer would wait for long. By sock_diag(7).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
        netlink::{SOCK_DIAG, SocketAddrNetlink},
        recv, sendto, socket_with,
    },
};

/// Message types and flags of `linux/netlink.h` and `linux/sock_diag.h`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;

const HEADER_BYTES: usize = 16;
/// `struct inet_diag_sockid`: ports, addresses, interface and cookie.
const ID_BYTES: usize = 48;

const TCP: u8 = 6;
/// All states of a connection. Not a listener, and not what waits for late segments alone.
const STATES: u32 = 0xfff & !(1 << LISTEN) & !(1 << TIME_WAIT) & !(1 << CLOSED);
const TIME_WAIT: u32 = 6;
const CLOSED: u32 = 7;
const LISTEN: u32 = 10;

/// The kernel fills at most so much at once.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// One connection, as the kernel names it.
type Id = [u8; ID_BYTES];

/// Resets every TCP connection of this network namespace that leads out of the machine.
pub(crate) fn end_all() -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(SOCK_DIAG))?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).map_err(io::Error::other)?;
        for id in connections(&socket, family)? {
            if leads_out(family, &id) {
                destroy(&socket, family, &id)?;
            }
        }
    }
    Ok(())
}

fn connections(socket: &OwnedFd, family: u8) -> io::Result<Vec<Id>> {
    ask(socket, BY_FAMILY, DUMP, family, &[0; ID_BYTES])?;
    let mut ids = Vec::new();
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    loop {
        let (count, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
        for (kind, body) in messages(&answer[..count]) {
            match kind {
                DONE => return Ok(ids),
                ERROR => return outcome(body).map(|()| ids),
                // Family, state, timer and retries come first.
                _ => ids.extend(body.get(4..).and_then(|rest| rest.first_chunk::<ID_BYTES>())),
            }
        }
    }
}

fn destroy(socket: &OwnedFd, family: u8, id: &Id) -> io::Result<()> {
    ask(socket, DESTROY, ACK, family, id)?;
    let mut answer = [0; 1024];
    let (count, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
    let done = messages(&answer[..count]).find(|(kind, _)| *kind == ERROR);
    match done.map_or_else(|| Err(io::ErrorKind::InvalidData.into()), |(_, body)| outcome(body)) {
        // It has ended meanwhile.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(()),
        outcome => outcome,
    }
}

/// Sends one `struct inet_diag_req_v2`.
fn ask(socket: &OwnedFd, kind: u16, flags: u16, family: u8, id: &Id) -> io::Result<()> {
    let length = u32::try_from(HEADER_BYTES + 8 + ID_BYTES).map_err(io::Error::other)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST | flags).to_ne_bytes());
    // Sequence and port: there is one question at a time.
    message.extend([0; 8]);
    message.extend([family, TCP, 0, 0]);
    message.extend(STATES.to_ne_bytes());
    message.extend(id);
    sendto(socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    Ok(())
}

/// Types and bodies of the messages in one datagram, which is the kernel's.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?);
        let length = usize::try_from(length).ok().filter(|length| *length >= HEADER_BYTES)?;
        let (message, _) = bytes.split_at_checked(length)?;
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, &message[HEADER_BYTES..]))
    })
}

/// A message of type ERROR: a negative error number, or zero for done.
fn outcome(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(0) => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(number.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Not to this machine itself: both ends of those are here.
fn leads_out(family: u8, id: &Id) -> bool {
    let (from, to) = (address(family, &id[4..]), address(family, &id[20..]));
    from != to && !to.is_loopback()
}

fn address(family: u8, bytes: &[u8]) -> IpAddr {
    let mut all = [0; 16];
    all.copy_from_slice(&bytes[..16]);
    if i32::from(family) == libc::AF_INET {
        IpAddr::V4(Ipv4Addr::new(all[0], all[1], all[2], all[3]))
    } else {
        IpAddr::V6(Ipv6Addr::from_octets(all)).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        process::Command,
        thread,
        time::Duration,
    };

    use rustix::thread::UnshareFlags;

    use super::*;

    #[test]
    fn connections_that_lead_out_are_reset_and_those_within_go_on() {
        let run = || {
            crate::sys::unshare(UnshareFlags::NEWNET).unwrap();
            // The far end, an address of a namespace beside this one.
            let line = "ip link set lo up; ip link add near type veth peer name far; \
                        ip link set near up; ip address add 10.9.0.1/24 dev near; \
                        ip netns add hf-flows-$$; ip link set far netns hf-flows-$$; \
                        ip -n hf-flows-$$ address add 10.9.0.2/24 dev far; \
                        ip -n hf-flows-$$ link set far up; echo hf-flows-$$";
            let output = Command::new("sh").args(["-ec", line]).output().unwrap();
            let far = String::from_utf8(output.stdout).unwrap().trim().to_owned();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let mut server = Command::new("ip")
                .args(["netns", "exec", &far, "socat", "TCP-LISTEN:700,fork", "SYSTEM:sleep 60"])
                .spawn()
                .unwrap();
            let outward = loop {
                match TcpStream::connect("10.9.0.2:700") {
                    Ok(stream) => break stream,
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            };
            let within: Vec<_> = ["127.0.0.1:0", "10.9.0.1:0", "[::1]:0"]
                .into_iter()
                .map(|address| {
                    let listener = TcpListener::bind(address).unwrap();
                    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                    (listener.accept().unwrap().0, one)
                })
                .collect();
            let listener = TcpListener::bind("0.0.0.0:800").unwrap();

            end_all().unwrap();

            let error = (&outward).read(&mut [0]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
            for (mut one, mut other) in within {
                one.write_all(b"x").unwrap();
                assert_eq!(other.read(&mut [0]).unwrap(), 1);
            }
            TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
            let _ = server.kill();
            let _ = server.wait();
            Command::new("ip").args(["netns", "delete", &far]).status().unwrap();
        };
        thread::scope(|scope| scope.spawn(run).join().unwrap());
    }
}
