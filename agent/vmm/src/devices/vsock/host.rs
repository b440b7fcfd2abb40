//! The host side of a connection: its Unix stream, and what the stream did not take yet.

use std::{
    collections::VecDeque,
    io::{self, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};
use vmm_sys_util::epoll::EventSet;

use super::greeting::{Greeting, read_greeting};
use crate::{devices::chain::Buffer, limits::vsock::COPY_BYTES};

pub(super) struct Host {
    stream: UnixStream,
    /// Data of the guest that waits for the stream. Its bound is the credit the guest was given.
    backlog: VecDeque<u8>,
    /// May have data, or its end; cleared when a read would block.
    readable: bool,
    /// Both directions are closed.
    hung_up: bool,
    /// All it sent has been read.
    sent_all: bool,
    /// It takes no more.
    deaf: bool,
}

impl Host {
    /// `stream` must not block.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            backlog: VecDeque::new(),
            readable: true,
            hung_up: false,
            sent_all: false,
            deaf: false,
        }
    }

    /// What the kernel says of the stream.
    pub(super) fn note(&mut self, events: EventSet) {
        let ended = EventSet::HANG_UP | EventSet::ERROR;
        self.hung_up |= events.intersects(ended);
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | ended);
    }

    pub(super) fn hung_up(&self) -> bool {
        self.hung_up
    }

    pub(super) fn sent_all(&self) -> bool {
        self.sent_all
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// Whether a read may bring data, or the end.
    pub(super) fn is_readable(&self) -> bool {
        self.readable && !self.sent_all
    }

    pub(super) fn greeting(&self) -> Greeting {
        read_greeting(&self.stream)
    }

    /// Says the first words to the client. A socket nobody wrote to has room for a line.
    pub(super) fn answer(&mut self, line: &str) -> io::Result<()> {
        self.stream.write_all(line.as_bytes())
    }

    /// The guest sends no more.
    pub(super) fn end_writing(&self) {
        // Fails only when the stream is closed as it is.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The guest takes no more: the kernel refuses what the client still writes.
    pub(super) fn end_reading(&self) {
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Reads straight into guest memory, at most `limit` bytes, which must not be 0. Returns the
    /// bytes read; after 0 look at [`Self::sent_all`].
    pub(super) fn read(&mut self, mut room: Buffer<'_>, limit: u32) -> u32 {
        let mut read = 0;
        for slice in room.take(usize::try_from(limit).unwrap_or(usize::MAX)).slices() {
            match self.stream.read_volatile(&mut slice.clone()).map_err(io_error) {
                Ok(0) => {
                    self.sent_all = true;
                    break;
                }
                Ok(count) => {
                    read += u32::try_from(count).unwrap_or(0);
                    if count < slice.len() {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    break;
                }
                Err(_) => {
                    self.hung_up = true;
                    self.sent_all = true;
                    break;
                }
            }
        }
        read
    }

    /// Takes data of the guest: straight from its memory as far as the stream has room, the rest
    /// into the backlog. Returns the bytes that are off our hands.
    pub(super) fn write(&mut self, mut data: Buffer<'_>) -> u32 {
        let len = data.len();
        if self.backlog.is_empty() {
            self.write_direct(&mut data);
        }
        if self.deaf {
            // Lost, as on any connection whose other end left.
            return count_of(len);
        }
        let written = len - data.len();
        let mut bytes = [0; COPY_BYTES];
        while !data.is_empty() {
            let count = data.copy(&mut bytes);
            self.backlog.extend(&bytes[..count]);
        }
        count_of(written)
    }

    fn write_direct(&mut self, data: &mut Buffer<'_>) {
        while !self.deaf
            && let Some(slice) = data.front()
        {
            match self.stream.write_volatile(&slice).map_err(io_error) {
                Ok(0) => return,
                Ok(count) => _ = data.take(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.deaf = true,
            }
        }
    }

    /// Writes the backlog as far as the stream has room. Returns the bytes that are off our hands.
    pub(super) fn flush(&mut self) -> u32 {
        let before = self.backlog.len();
        while !self.backlog.is_empty() {
            match self.stream.write(self.backlog.as_slices().0) {
                Ok(0) => break,
                Ok(count) => _ = self.backlog.drain(..count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.deaf = true;
                    self.backlog.clear();
                }
            }
        }
        let flushed = before - self.backlog.len();
        if self.backlog.is_empty() {
            // Given back: most connections never need it again.
            self.backlog = VecDeque::new();
        }
        count_of(flushed)
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.backlog.is_empty()
    }
}

/// Bytes of a packet or of the backlog, both within 32 bits.
fn count_of(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
