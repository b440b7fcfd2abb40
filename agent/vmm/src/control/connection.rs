//! One connection of the agent: frames in, frames out, both bounded.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use holdfast_wire::{
    frame::{self, FrameError},
    vmm::{ToAgent, ToVmm},
};

use crate::limits::control::{REQUEST_BYTES_MAX, UNSENT_BYTES_MAX};

/// How long the end of this process waits for the agent to take the last event.
const FINISH_LIMIT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("the agent closed it")]
    Closed,
    #[error("the agent sent more than {REQUEST_BYTES_MAX} bytes without ending a request")]
    RequestTooLong,
    #[error("the agent left more than {UNSENT_BYTES_MAX} bytes unread")]
    NotRead,
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

pub(crate) struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    unsent: Vec<u8>,
    /// The agent has said Hello.
    pub(super) greeted: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: Vec::new(), unsent: Vec::new(), greeted: false })
    }

    /// Takes what has arrived, and adds the whole requests of it to `requests`.
    pub(crate) fn receive(&mut self, requests: &mut Vec<ToVmm>) -> Result<(), ConnectionError> {
        let mut piece = [0; 1024];
        let count = match self.stream.read(&mut piece) {
            Ok(0) => return Err(ConnectionError::Closed),
            Ok(count) => count,
            Err(error) if is_later(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.received.extend_from_slice(&piece[..count]);
        self.take_requests(requests)
    }

    fn take_requests(&mut self, requests: &mut Vec<ToVmm>) -> Result<(), ConnectionError> {
        let mut rest = self.received.as_slice();
        while let Some(split) = frame::split_frame(rest)? {
            requests.push(frame::decode(split.frame)?);
            rest = split.rest;
        }
        if rest.len() > REQUEST_BYTES_MAX {
            return Err(ConnectionError::RequestTooLong);
        }
        let done = self.received.len() - rest.len();
        self.received.drain(..done);
        Ok(())
    }

    pub(crate) fn queue(&mut self, message: &ToAgent) -> Result<(), ConnectionError> {
        let bytes = frame::encode(message)?;
        if self.unsent.len() + bytes.len() > UNSENT_BYTES_MAX {
            return Err(ConnectionError::NotRead);
        }
        self.unsent.extend_from_slice(&bytes);
        Ok(())
    }

    /// Sends what the socket takes now.
    pub(crate) fn send(&mut self) -> Result<(), ConnectionError> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if is_later(&error) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(crate) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends everything and one last message, waiting for the agent within a limit.
    pub(crate) fn finish(mut self, last: &ToAgent) -> Result<(), ConnectionError> {
        self.queue(last)?;
        self.stream.set_nonblocking(false)?;
        self.stream.set_write_timeout(Some(FINISH_LIMIT))?;
        Ok(self.stream.write_all(&self.unsent)?)
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// Nothing wrong, only not now.
fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use holdfast_wire::vmm::Reply;

    use super::*;

    fn pair() -> (UnixStream, Connection) {
        let (agent, ours) = UnixStream::pair().unwrap();
        (agent, Connection::new(ours).unwrap())
    }

    #[test]
    fn requests_that_come_in_pieces_are_taken_once_whole() {
        let (mut agent, mut connection) = pair();
        let bytes = [
            frame::encode(&ToVmm::Hello { version: 1 }).unwrap(),
            frame::encode(&ToVmm::Boot).unwrap(),
        ]
        .concat();
        let mut requests = Vec::new();
        for byte in bytes {
            agent.write_all(&[byte]).unwrap();
            connection.receive(&mut requests).unwrap();
        }
        assert_eq!(requests, [ToVmm::Hello { version: 1 }, ToVmm::Boot]);
    }

    #[test]
    fn a_request_that_never_ends_ends_the_connection() {
        let (mut agent, mut connection) = pair();
        let mut endless = 0xffff_u32.to_le_bytes().to_vec();
        endless.resize(REQUEST_BYTES_MAX + 1024, 0);
        agent.write_all(&endless).unwrap();
        let mut requests = Vec::new();
        let outcome = (0..8).find_map(|_| connection.receive(&mut requests).err());
        assert!(matches!(outcome, Some(ConnectionError::RequestTooLong)), "{outcome:?}");
    }

    #[test]
    fn bytes_that_are_no_request_end_the_connection() {
        let (mut agent, mut connection) = pair();
        agent.write_all(&[1, 0, 0, 0, 0xff]).unwrap();
        let outcome = connection.receive(&mut Vec::new());
        assert!(matches!(outcome, Err(ConnectionError::Frame(_))), "{outcome:?}");
    }

    #[test]
    fn an_agent_that_does_not_read_is_given_up_at_the_limit() {
        let (_agent, mut connection) = pair();
        let message = ToAgent::Reply(Reply::Refused { reason: "x".repeat(1000) });
        let outcome = (0..10_000)
            .find_map(|_| connection.queue(&message).and_then(|()| connection.send()).err());
        assert!(matches!(outcome, Some(ConnectionError::NotRead)), "{outcome:?}");
        assert!(connection.unsent.len() <= UNSENT_BYTES_MAX);
    }
}
