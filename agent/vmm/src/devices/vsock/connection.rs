//! One connection: a Unix stream on the host side, a stream of packets on the guest's. What it has
//! to say is asked of it one packet at a time, when the guest has a buffer for it.

use std::os::unix::net::UnixStream;

use holdfast_wire::vmm::GUEST_CID;
use vmm_sys_util::epoll::EventSet;

use super::{
    credit::Credit,
    greeting::Greeting,
    host::Host,
    packet::{HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op},
};
use crate::devices::chain::Buffer;

const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The client has not said which port it wants.
    Greeting,
    /// The guest was asked, or will be.
    Requested,
    Open,
    /// The guest is gone; the host side still takes the backlog.
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

pub(super) struct Connection {
    host: Host,
    host_port: u32,
    guest_port: u32,
    phase: Phase,
    credit: Credit,
    owed: Owed,
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
            host: Host::new(stream),
            host_port,
            guest_port: 0,
            phase: Phase::Greeting,
            credit: Credit::default(),
            owed: Owed::default(),
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
        self.host.hung_up() && self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Whether a packet from `guest_port` belongs here.
    pub(super) fn is_with(&self, guest_port: u32) -> bool {
        self.phase != Phase::Greeting && self.guest_port == guest_port
    }

    /// What the kernel says of the stream. Acted on in [`Self::advance`].
    pub(super) fn note(&mut self, events: EventSet) {
        self.host.note(events);
    }

    /// Does what needs no packet buffer: reads the greeting, hands the backlog on.
    pub(super) fn advance(&mut self) {
        match self.phase {
            Phase::Greeting => match self.host.greeting() {
                Greeting::More => {}
                Greeting::Bad => self.phase = Phase::Over,
                Greeting::Port(port) => {
                    self.guest_port = port;
                    self.phase = Phase::Requested;
                    self.owed.request = true;
                }
            },
            // Nobody waits for the answer any more.
            Phase::Requested if self.host.hung_up() => self.refuse(),
            Phase::Requested | Phase::Over => {}
            Phase::Open | Phase::Draining => self.hand_on(),
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
            (_, op::RESET) => {
                // What it sent before still goes to the host side.
                self.phase = Phase::Draining;
                self.hand_on();
            }
            (Phase::Requested, op::RESPONSE) => self.open(),
            (Phase::Open, op::DATA) => return self.take_data(header.len, data),
            (Phase::Open, op::SHUTDOWN) => self.hear_shutdown(header.flags),
            (Phase::Open, op::CREDIT_UPDATE) => {}
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
        match self.host.answer(&format!("OK {}\n", self.host_port)) {
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

    fn hear_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.host.end_reading();
        }
        self.hand_on();
    }

    fn take_data(&mut self, len: u32, data: Buffer<'_>) -> u64 {
        let closed = self.guest_shutdown & SHUTDOWN_SEND != 0;
        if closed || self.credit.received(len).is_err() {
            self.refuse();
            return 0;
        }
        self.credit.forwarded(self.host.write(data));
        self.look_at_host();
        u64::from(len)
    }

    /// Gives the host side what waits for it, and after the last byte what the guest said of the
    /// end.
    fn hand_on(&mut self) {
        self.credit.forwarded(self.host.flush());
        self.look_at_host();
        if !self.host.is_flushed() {
            return;
        }
        if self.phase == Phase::Draining {
            self.phase = Phase::Over;
        } else if self.guest_shutdown == SHUTDOWN_BOTH {
            self.owed.reset = true;
        } else if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.host.end_writing();
        }
    }

    /// Notes what the guest must be told of the host side's ends.
    fn look_at_host(&mut self) {
        let mut ended = 0;
        if self.host.is_deaf() {
            ended |= SHUTDOWN_RECEIVE;
        }
        if self.host.sent_all() {
            ended |= if self.host.hung_up() { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
        }
        self.owed.shutdown |= ended & !self.told_shutdown;
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open
            && self.host.is_readable()
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && (self.credit.available() > 0 || !self.asked_for_credit)
    }

    /// Reads from the host side into the guest's buffer. `None`: there was no data, or no credit.
    fn read_data(&mut self, room: Buffer<'_>) -> Option<u32> {
        let credit = self.credit.available();
        if credit == 0 {
            self.asked_for_credit = true;
            self.owed.credit_request = true;
            return None;
        }
        let bytes = self.host.read(room, credit);
        self.credit.sent(bytes);
        self.look_at_host();
        (bytes > 0).then_some(bytes)
    }
}
