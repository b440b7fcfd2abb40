//! Ends the machine's TCP connections to others after it stood still: these have given them up, or,
//! of a clone, hold them for the machine it was made from. Without it programs wait for answers that
//! cannot come. Connections from the machine to itself go on.
//!
//! By sock_diag(7): the kernel is asked for the list, then told to end each by its address and cookie.

use std::os::fd::OwnedFd;

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with, sockopt,
    },
};

/// Of each family. More are left to their own time-outs.
const CONNECTIONS_MAX: usize = 16 * 1024;

/// What the kernel puts into one answer at most.
const ANSWER_BYTES: usize = 32 * 1024;

/// The kernel answers at once; this is for one that does not.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

const HEADER_BYTES: usize = 16;
/// Ports, addresses, interface and cookie: what names a socket.
const NAME_BYTES: usize = 48;
/// Where the name begins in a description of a socket.
const NAME_AT: usize = 4;

const FAMILIES: [u8; 2] = [2, 10];
const TCP: u8 = 6;

/// Established, and everything between a first and a last word; neither listening nor over.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

type Name = [u8; NAME_BYTES];

/// Ends them. Gives how many; a kernel that cannot do it ends none.
pub(crate) fn reset() -> u32 {
    let ended = FAMILIES.map(|family| reset_those(family, to_others).unwrap_or(0));
    ended.into_iter().fold(0, u32::saturating_add)
}

fn reset_those(family: u8, wanted: impl Fn(u8, &Name) -> bool) -> Result<u32, Errno> {
    let socket = connect()?;
    let mut ended = 0;
    for name in list(&socket, family)? {
        // One that ended meanwhile is as good.
        if wanted(family, &name) && destroy(&socket, family, &name).is_ok() {
            ended += 1;
        }
    }
    Ok(ended)
}

fn connect() -> Result<OwnedFd, Errno> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    Ok(socket)
}

fn list(socket: &OwnedFd, family: u8) -> Result<Vec<Name>, Errno> {
    ask(socket, BY_FAMILY, REQUEST | DUMP, family, &[0; NAME_BYTES])?;
    let mut names = Vec::new();
    let mut answer = vec![0; ANSWER_BYTES];
    loop {
        let (length, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
        for (kind, body) in messages(&answer[..length]) {
            match kind {
                DONE => return Ok(names),
                ERROR => return Err(error_of(body).unwrap_or(Errno::PROTO)),
                _ => {
                    let name = body.get(NAME_AT..).and_then(|rest| rest.first_chunk());
                    // All of the list is read: the next answer is to another question.
                    names.extend(name.filter(|_| names.len() < CONNECTIONS_MAX));
                }
            }
        }
    }
}

fn destroy(socket: &OwnedFd, family: u8, name: &Name) -> Result<(), Errno> {
    ask(socket, DESTROY, REQUEST | ACKNOWLEDGE, family, name)?;
    let mut answer = [0; 512];
    let (length, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
    match messages(&answer[..length]).next() {
        Some((ERROR, body)) => error_of(body).map_or(Ok(()), Err),
        _ => Err(Errno::PROTO),
    }
}

fn ask(socket: &OwnedFd, kind: u16, flags: u16, family: u8, name: &Name) -> Result<(), Errno> {
    const BYTES: usize = HEADER_BYTES + 8 + NAME_BYTES;
    let mut text = Vec::with_capacity(BYTES);
    let length = u32::try_from(BYTES).map_err(|_| Errno::MSGSIZE)?;
    text.extend(length.to_ne_bytes());
    text.extend(kind.to_ne_bytes());
    text.extend(flags.to_ne_bytes());
    // Sequence and port: one question at a time, by one asker.
    text.extend([0; 8]);
    text.extend([family, TCP, 0, 0]);
    text.extend(STATES.to_ne_bytes());
    text.extend(name);
    send(socket, &text, SendFlags::empty()).map(drop)
}

/// Kind and body of each message of an answer. What is cut short is left out.
fn messages(mut text: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*text.first_chunk()?);
        let kind = u16::from_ne_bytes(*text.get(4..)?.first_chunk()?);
        let length = usize::try_from(length).ok()?;
        let body = text.get(HEADER_BYTES..length)?;
        text = text.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// The number is negative. `None`: it is 0, an acknowledgement.
fn error_of(body: &[u8]) -> Option<Errno> {
    let number = i32::from_ne_bytes(*body.first_chunk()?).saturating_neg();
    (number > 0).then(|| Errno::from_raw_os_error(number))
}

/// Whether the other end is not the machine itself.
fn to_others(family: u8, name: &Name) -> bool {
    let (own, other) = (&name[4..20], &name[20..36]);
    let loopback = match family {
        2 => other[0] == 127,
        // ::1, and 127.0.0.0/8 spoken of in the longer form.
        _ => {
            let (head, tail) = other.split_at(12);
            head == [0; 12] && tail == [0, 0, 0, 1]
                || head == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff] && tail[0] == 127
        }
    };
    !loopback && own != other
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read, Write},
        net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
        thread,
    };

    use rustix::thread::UnshareFlags;

    use super::*;

    fn pair(listener: &TcpListener, to: SocketAddr) -> [TcpStream; 2] {
        let one = TcpStream::connect(to).unwrap();
        [one, listener.accept().unwrap().0]
    }

    #[test]
    fn what_is_ended_is_told_so_and_what_is_not_wanted_goes_on() {
        let done = thread::spawn(|| {
            crate::sys::unshare(UnshareFlags::NEWNET).unwrap();
            crate::sys::interface_up("lo").unwrap();
            for (family, address) in [(2, "127.0.0.1:0"), (10, "[::1]:0")] {
                let listener = TcpListener::bind(address).unwrap();
                let to = listener.local_addr().unwrap();
                let mut ended = pair(&listener, to);
                let mut kept = pair(&listener, to);
                let port = ended[0].local_addr().unwrap().port().to_be_bytes();
                // Both ends of each: the machine's own.
                assert_eq!(reset_those(family, to_others), Ok(0), "{address}");
                assert_eq!(reset_those(family, |_, name| name[..2] == port), Ok(1), "{address}");
                let error = ended[0].read(&mut [0]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{address}");
                kept[0].write_all(b"on").unwrap();
                let mut text = [0; 2];
                kept[1].read_exact(&mut text).unwrap();
                assert_eq!(&text, b"on");
                // It listens still.
                pair(&listener, to);
            }
        });
        done.join().unwrap();
    }

    #[test]
    fn the_machine_itself_is_not_another() {
        let name = |own: [u8; 16], other: [u8; 16]| {
            let mut name = [0; NAME_BYTES];
            name[4..20].copy_from_slice(&own);
            name[20..36].copy_from_slice(&other);
            name
        };
        let short = |address: [u8; 4]| {
            let mut long = [0; 16];
            long[..4].copy_from_slice(&address);
            long
        };
        let long = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        let own = short([192, 168, 127, 2]);
        assert!(to_others(2, &name(own, short([1, 1, 1, 1]))));
        assert!(!to_others(2, &name(own, own)));
        assert!(!to_others(2, &name(short([127, 0, 0, 1]), short([127, 0, 0, 53]))));
        let own = long("fd00::2");
        assert!(to_others(10, &name(own, long("fd00::1"))));
        assert!(to_others(10, &name(own, long("::ffff:1.1.1.1"))));
        assert!(!to_others(10, &name(own, long("::1"))));
        assert!(!to_others(10, &name(own, long("::ffff:127.0.0.1"))));
    }

    #[test]
    fn an_answer_that_is_cut_anywhere_gives_whole_messages_only() {
        let mut text = Vec::new();
        for (kind, body) in [(20_u16, &[1_u8; 72][..]), (3, &[0; 4])] {
            let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
            text.extend(length.to_ne_bytes());
            text.extend(kind.to_ne_bytes());
            text.extend([0; 10]);
            text.extend(body);
        }
        let read =
            |text: &[u8]| messages(text).map(|(kind, body)| (kind, body.len())).collect::<Vec<_>>();
        assert_eq!(read(&text), [(20, 72), (3, 4)]);
        for cut in 0..text.len() {
            assert!(read(&text[..cut]).len() < 2, "cut at {cut}");
        }
        // A length that leads nowhere ends it.
        assert_eq!(read(&[0; 64]), []);
    }
}
