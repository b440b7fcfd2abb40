//! One connection: a Unix stream on the host side, a stream of packets on the guest's.

use std::{
    collections::VecDeque,
    io::{self, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use holdfast_wire::vmm::GUEST_CID;
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};
use vmm_sys_util::epoll::EventSet;

use super::{
    credit::Credit,
    greeting::{Greeting, read_greeting},
    packet::{HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op},
};
use crate::devices::chain::Buffer;

/// Bytes copied at a time from the guest into the backlog.
const COPY_BYTES: usize = 1024;
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The client has not said which port it wants.
    Greeting,
    /// The guest was asked, or will be.
    Requested,
    Open,
    /// Nothing is sent to the guest any more; the host side still takes the backlog.
    Draining,
    Over,
}

/// Packets owed to the guest, beside data.
#[derive(Debug, Default)]
struct Owed {
    reset: bool,
    request: bool,
    shutdown: u32,
    credit_request: bool,
}

/// What is known of the Unix stream.
#[derive(Debug, Default)]
struct Host {
    /// May have data, or its end; cleared when a read would block.
    readable: bool,
    /// Both directions are closed.
    hung_up: bool,
    /// All it sent has been read.
    sent_all: bool,
    /// It takes no more.
    deaf: bool,
}

pub(super) struct Connection {
    stream: UnixStream,
    host_port: u32,
    guest_port: u32,
    phase: Phase,
    credit: Credit,
    owed: Owed,
    host: Host,
    /// Data of the guest that the host side did not take yet; at most the room given by `credit`.
    backlog: VecDeque<u8>,
    /// What the guest said it will do no more.
    guest_shutdown: u32,
    /// What we said the host side will do no more.
    told_shutdown: u32,
    /// The guest was asked for credit and has not spoken since.
    asked_for_credit: bool,
}

impl Connection {
    /// `stream` must not block.
    pub(super) fn new(stream: UnixStream, host_port: u32) -> Self {
        Self {
            stream,
            host_port,
            guest_port: 0,
            phase: Phase::Greeting,
            credit: Credit::default(),
            owed: Owed::default(),
            host: Host { readable: true, ..Host::default() },
            backlog: VecDeque::new(),
            guest_shutdown: 0,
            told_shutdown: 0,
            asked_for_credit: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// The host side is gone and its data delivered: only the guest's word is missing.
    pub(super) fn waits_for_guest_only(&self) -> bool {
        self.host.hung_up && self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Whether a packet's ports are this connection's.
    pub(super) fn is_with(&self, guest_port: u32) -> bool {
        self.phase != Phase::Greeting && self.guest_port == guest_port
    }

    /// What the kernel says of the stream. Acted on in [`Self::advance`].
    pub(super) fn note(&mut self, events: EventSet) {
        let ended = EventSet::HANG_UP | EventSet::ERROR;
        self.host.hung_up |= events.intersects(ended);
        self.host.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | ended);
    }

    /// Does what needs no packet buffer: reads the greeting, hands the backlog on.
    pub(super) fn advance(&mut self) {
        match self.phase {
            Phase::Greeting => match read_greeting(&self.stream) {
                Greeting::More => {}
                Greeting::Bad => self.phase = Phase::Over,
                Greeting::Port(port) => {
                    self.guest_port = port;
                    self.phase = Phase::Requested;
                    self.owed.request = true;
                }
            },
            // Nobody waits for the answer any more.
            Phase::Requested if self.host.hung_up => self.refuse(),
            Phase::Requested | Phase::Over => {}
            Phase::Open | Phase::Draining => {
                self.hand_on();
                if self.host.hung_up && self.host.sent_all {
                    self.owe_shutdown(SHUTDOWN_BOTH);
                }
            }
        }
    }

    /// Whether [`Self::next_packet`] has something to say.
    pub(super) fn has_packet(&self) -> bool {
        let owed = &self.owed;
        let owes = owed.reset || owed.request || owed.shutdown != 0 || owed.credit_request;
        match self.phase {
            Phase::Greeting | Phase::Draining | Phase::Over => false,
            Phase::Requested => owes,
            Phase::Open => owes || self.credit.update_due() || self.may_read(),
        }
    }

    /// A packet of the guest. Returns the bytes of data it brought.
    pub(super) fn hear(&mut self, header: &Header, data: Buffer<'_>) -> u64 {
        self.credit.heard(header);
        self.asked_for_credit = false;
        match (self.phase, header.op) {
            (Phase::Draining | Phase::Over, _) => {}
            (_, op::RESET) => self.end_guest(),
            (Phase::Requested, op::RESPONSE) => self.open(),
            (Phase::Open, op::DATA) => return self.take_data(header.len, data),
            (Phase::Open, op::SHUTDOWN) => self.hear_shutdown(header.flags),
            (Phase::Open, op::CREDIT_UPDATE) => {}
            // Told with the next packet, whatever it is.
            (Phase::Open, op::CREDIT_REQUEST) => self.credit.owe_update(),
            _ => self.refuse(),
        }
        0
    }

    /// The next packet for the guest, its data written to `room`, which must not be empty.
    pub(super) fn next_packet(&mut self, room: Buffer<'_>) -> Option<Header> {
        if !self.has_packet() {
            return None;
        }
        let mut header = self.header();
        if self.owed.reset {
            header.op = op::RESET;
            self.phase = Phase::Over;
        } else if std::mem::take(&mut self.owed.request) {
            header.op = op::REQUEST;
        } else if self.may_read()
            && let Some(bytes) = self.read_data(room)
        {
            header.op = op::DATA;
            header.len = bytes;
        } else if self.owed.shutdown != 0 {
            header.op = op::SHUTDOWN;
            self.told_shutdown |= std::mem::take(&mut self.owed.shutdown);
            header.flags = self.told_shutdown;
        } else if std::mem::take(&mut self.owed.credit_request) {
            header.op = op::CREDIT_REQUEST;
        } else if self.credit.update_due() {
            header.op = op::CREDIT_UPDATE;
        } else {
            return None;
        }
        self.credit.tell(&mut header);
        Some(header)
    }

    fn header(&self) -> Header {
        Header {
            source_cid: HOST_CID,
            target_cid: GUEST_CID,
            source_port: self.host_port,
            target_port: self.guest_port,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }

    fn open(&mut self) {
        // A socket nobody wrote to has room for one line.
        match self.stream.write_all(format!("OK {}\n", self.host_port).as_bytes()) {
            Ok(()) => self.phase = Phase::Open,
            Err(_) => self.refuse(),
        }
    }

    /// Ends the connection with a reset to the guest, if it has heard of it.
    fn refuse(&mut self) {
        if self.owed.request {
            self.phase = Phase::Over;
        } else {
            self.owed.reset = true;
        }
    }

    /// The guest speaks no more; what it sent before still goes to the host side.
    fn end_guest(&mut self) {
        self.phase = Phase::Draining;
        self.hand_on();
    }

    fn hear_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // Whatever the host side still sends is refused by its own kernel.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.hand_on();
    }

    fn take_data(&mut self, len: u32, mut data: Buffer<'_>) -> u64 {
        let closed = self.guest_shutdown & SHUTDOWN_SEND != 0;
        if closed || self.credit.received(len).is_err() {
            self.refuse();
            return 0;
        }
        if self.backlog.is_empty() && !self.host.deaf {
            self.write_data(&mut data);
        }
        if self.host.deaf {
            self.credit.forwarded(u32::try_from(data.len()).unwrap_or(len));
        } else {
            let mut bytes = [0; COPY_BYTES];
            while !data.is_empty() {
                let count = data.copy(&mut bytes);
                self.backlog.extend(&bytes[..count]);
            }
        }
        u64::from(len)
    }

    /// Writes to the host side straight from guest memory, as far as it takes it.
    fn write_data(&mut self, data: &mut Buffer<'_>) {
        while let Some(slice) = data.front() {
            match self.stream.write_volatile(&slice).map_err(io_error) {
                Ok(0) => return,
                Ok(count) => {
                    data.take(count);
                    self.credit.forwarded(u32::try_from(count).unwrap_or(0));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.host_is_deaf(),
            }
        }
    }

    /// Writes the backlog to the host side, then passes on that the guest is done.
    fn hand_on(&mut self) {
        while !self.backlog.is_empty() && !self.host.deaf {
            match self.stream.write(self.backlog.as_slices().0) {
                Ok(0) => return,
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.credit.forwarded(u32::try_from(count).unwrap_or(0));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_is_deaf(),
            }
        }
        // Given back: most connections never need it again.
        self.backlog = VecDeque::new();
        if self.phase == Phase::Draining {
            self.phase = Phase::Over;
        } else if self.guest_shutdown == SHUTDOWN_BOTH {
            self.owed.reset = true;
        } else if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn host_is_deaf(&mut self) {
        self.host.deaf = true;
        self.credit.forwarded(u32::try_from(self.backlog.len()).unwrap_or(0));
        self.backlog = VecDeque::new();
        self.owe_shutdown(SHUTDOWN_RECEIVE);
    }

    fn owe_shutdown(&mut self, flags: u32) {
        self.owed.shutdown |= flags & !self.told_shutdown;
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open
            && self.host.readable
            && !self.host.sent_all
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && (self.credit.available() > 0 || !self.asked_for_credit)
    }

    /// Reads from the host side straight into guest memory. `None`: there was no data.
    fn read_data(&mut self, mut room: Buffer<'_>) -> Option<u32> {
        let credit = self.credit.available();
        if credit == 0 {
            self.asked_for_credit = true;
            self.owed.credit_request = true;
            return None;
        }
        let mut read = 0;
        for slice in room.take(usize::try_from(credit).unwrap_or(usize::MAX)).slices() {
            match self.stream.read_volatile(&mut slice.clone()).map_err(io_error) {
                Ok(0) => {
                    self.host_sent_all();
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
                    self.host.readable = false;
                    break;
                }
                Err(_) => {
                    self.host.hung_up = true;
                    self.host_sent_all();
                    break;
                }
            }
        }
        self.credit.sent(read);
        (read > 0).then_some(read)
    }

    fn host_sent_all(&mut self) {
        self.host.sent_all = true;
        self.owe_shutdown(if self.host.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND });
    }
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
