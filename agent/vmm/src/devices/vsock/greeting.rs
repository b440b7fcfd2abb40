//! The first line of a host client: `CONNECT <port>\n`.

use std::os::unix::net::UnixStream;

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};

/// Longest line with its end: ten digits are the largest port.
const LINE_BYTES_MAX: usize = "CONNECT 4294967295\n".len();

/// How far a client is with its line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// Not all of it has arrived.
    More,
    Port(u32),
    /// The client is gone, or said something else.
    Bad,
}

/// Reads the line and nothing behind it: what follows is the guest's.
pub(super) fn read_greeting(stream: &UnixStream) -> Greeting {
    let mut bytes = [0; LINE_BYTES_MAX];
    let seen = match recv(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, 0)) => return Greeting::Bad,
        Ok((_, seen)) => &bytes[..seen.min(LINE_BYTES_MAX)],
        Err(Errno::AGAIN | Errno::INTR) => return Greeting::More,
        Err(_) => return Greeting::Bad,
    };
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if seen.len() < LINE_BYTES_MAX { Greeting::More } else { Greeting::Bad };
    };
    let greeting = port(&seen[..end]).map_or(Greeting::Bad, Greeting::Port);
    let mut line = vec![0; end + 1];
    match recv(stream, &mut line, RecvFlags::DONTWAIT) {
        Ok(_) => greeting,
        Err(_) => Greeting::Bad,
    }
}

fn port(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line.strip_prefix(b"CONNECT ")?).ok()?;
    // The standard parser would take a sign.
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn after(text: &[u8]) -> (Greeting, UnixStream, UnixStream) {
        let (mut client, ours) = UnixStream::pair().unwrap();
        client.write_all(text).unwrap();
        (read_greeting(&ours), client, ours)
    }

    #[test]
    fn a_line_in_pieces_is_waited_for_and_what_follows_stays() {
        let (first, mut client, mut ours) = after(b"CONN");
        assert_eq!(first, Greeting::More);
        client.write_all(b"ECT 1024\ndata").unwrap();
        assert_eq!(read_greeting(&ours), Greeting::Port(1024));
        let mut rest = [0; 4];
        ours.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"data");
    }

    #[test]
    fn the_largest_port_fits() {
        assert_eq!(after(b"CONNECT 4294967295\n").0, Greeting::Port(u32::MAX));
    }

    #[test]
    fn other_lines_are_refused() {
        let bad: [&[u8]; 7] = [
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT \n",
            b"connect 1\n",
            b"\n",
            b"CONNECT 00000000000000000000001\n",
        ];
        for line in bad {
            assert_eq!(after(line).0, Greeting::Bad, "{line:?}");
        }
    }

    #[test]
    fn a_client_that_goes_away_is_refused() {
        let (_, client, ours) = after(b"");
        drop(client);
        assert_eq!(read_greeting(&ours), Greeting::Bad);
    }
}
