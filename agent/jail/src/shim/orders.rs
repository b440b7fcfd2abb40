//! What the agent asks of the nursery and of a shim, and what they answer: one message each way, with
//! descriptors.

use std::{fmt::Write, io, os::fd::RawFd};

use rustix::io::Errno;

use crate::{Identity, ProcessLimits, messages::FDS_MAX};

/// Bytes of a message. Orders have a line of some bytes for each descriptor.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// Descriptors that are the shim's own: see [`OWN_FDS`].
pub(crate) const HANDED_MAX: usize = FDS_MAX - OWN_FDS;
/// In their order: the VMM's program, its cgroup's door, the files for pids and exit, its
/// configuration, and what it has as stderr.
pub(crate) const OWN_FDS: usize = 6;
/// Descriptors of a request for a shim: the socket to talk to it by.
pub(crate) const REQUEST_FDS: usize = 1;
/// Descriptors of the answer that a VMM runs: handles of the shim and of the VMM.
pub(crate) const ANSWER_FDS: usize = 2;

/// First byte of an answer.
const STARTED: u8 = 1;
const FAILED: u8 = 0;

/// The text of a request for a shim.
pub(crate) const REQUEST: &[u8] = b"shim";

/// How to start one VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Orders {
    pub(crate) identity: Identity,
    pub(crate) limits: ProcessLimits,
    /// Numbers at which the VMM finds what it is handed, in the order of the message.
    pub(crate) numbers: Vec<RawFd>,
    /// Of the program, its name first. None holds a line's end or a NUL.
    pub(crate) arguments: Vec<String>,
}

impl Orders {
    pub(crate) fn to_text(&self) -> String {
        let Self { identity, limits, numbers, arguments } = self;
        let mut text = format!(
            "uid {}\ngid {}\ndescriptors {}\nthreads {}\nfile_bytes {}\n",
            identity.uid, identity.gid, limits.descriptors, limits.threads, limits.file_bytes
        );
        for number in numbers {
            // Writing to a String does not fail.
            let _ = writeln!(text, "fd {number}");
        }
        for argument in arguments {
            let _ = writeln!(text, "argument {argument}");
        }
        text
    }

    /// `None`: not of this build.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut number = |key: &str| lines.next()?.strip_prefix(key)?.parse::<u64>().ok();
        let mut small = |key: &str| number(key).and_then(|value| u32::try_from(value).ok());
        let identity = Identity { uid: small("uid ")?, gid: small("gid ")? };
        let (descriptors, threads) = (small("descriptors ")?, small("threads ")?);
        let file_bytes = number("file_bytes ")?;
        let (mut numbers, mut arguments) = (Vec::new(), Vec::new());
        for line in lines {
            match line.split_once(' ')? {
                ("fd", value) => numbers.push(value.parse().ok().filter(|number| *number > 2)?),
                ("argument", value) => arguments.push(value.to_owned()),
                _ => return None,
            }
        }
        let limits = ProcessLimits { descriptors, threads, file_bytes };
        Some(Self { identity, limits, numbers, arguments })
    }
}

/// A step that failed, in the words for "cannot …".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) step: String,
    pub(crate) errno: i32,
}

/// Names the step in an error.
pub(crate) fn failed(step: &'static str) -> impl FnOnce(Errno) -> Failure {
    move |errno| Failure { step: step.to_owned(), errno: errno.raw_os_error() }
}

/// The same for errors of the standard library.
pub(crate) fn failed_io(step: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure {
        step: step.to_owned(),
        errno: error.raw_os_error().unwrap_or(Errno::INVAL.raw_os_error()),
    }
}

impl Failure {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        [&self.errno.to_le_bytes(), self.step.as_bytes()].concat()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (errno, step) = bytes.split_first_chunk()?;
        let step = String::from_utf8_lossy(step).into_owned();
        Some(Self { step, errno: i32::from_le_bytes(*errno) })
    }
}

/// What a shim answers once it waits for its orders, and once the VMM's program runs and the run
/// folder knows their pids; and the nursery once it takes requests.
pub(crate) type Answer = Result<(), Failure>;

pub(crate) fn answer_to_bytes(answer: &Answer) -> Vec<u8> {
    match answer {
        Ok(()) => vec![STARTED],
        Err(failure) => [&[FAILED], failure.to_bytes().as_slice()].concat(),
    }
}

/// `None`: not an answer.
pub(crate) fn answer_from_bytes(bytes: &[u8]) -> Option<Answer> {
    match bytes.split_first()? {
        (&STARTED, []) => Some(Ok(())),
        (&FAILED, failure) => Failure::from_bytes(failure).map(Err),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders() -> Orders {
        Orders {
            identity: Identity { uid: 200_001, gid: 200_002 },
            limits: ProcessLimits { descriptors: 100, threads: 20, file_bytes: 1 << 40 },
            numbers: vec![10, 12],
            arguments: vec!["vmm".to_owned(), "with spaces".to_owned()],
        }
    }

    #[test]
    fn orders_are_read_back() {
        assert_eq!(Orders::from_text(&orders().to_text()), Some(orders()));
    }

    #[test]
    fn what_are_no_orders_is_refused() {
        let good = orders().to_text();
        for text in
            ["", "uid 1\ngid 1\n", &good[1..], &format!("{good}fd 2\n"), &format!("{good}x y\n")]
        {
            assert_eq!(Orders::from_text(text), None, "{text:?}");
        }
    }

    #[test]
    fn answers_are_read_back_and_nonsense_is_none() {
        let failure = Failure { step: "do it".to_owned(), errno: 13 };
        for answer in [Ok(()), Err(failure)] {
            assert_eq!(answer_from_bytes(&answer_to_bytes(&answer)), Some(answer));
        }
        for bytes in [&b""[..], b"\x01\x02", b"\x00\x01", b"\x07"] {
            assert_eq!(answer_from_bytes(bytes), None, "{bytes:?}");
        }
    }
}
