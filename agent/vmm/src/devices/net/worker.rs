//! Moves frames between the queues and the tap.

use std::{io, os::fd::AsRawFd, sync::Arc, time::Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    counters::NetworkCounters,
    header::{self, ETHERNET_BYTES, HEADER_BYTES},
    state::State,
    tap::Tap,
};
use crate::{
    devices::{
        chain::Chain,
        queue::{Broken, Progress, Ring},
        rate::Throttle,
        runner::Worker,
        saved::{Differs, WorkerState},
    },
    limits::net::{BATCH, ERRORS_LOGGED_MAX, FRAME_BYTES_MAX},
    seccomp::ThreadKind,
    vm::Memory,
};

/// The tap's token; the only one of this device.
const TAP: u64 = 0;

pub(super) struct NetworkWorker {
    inbound: Inbound,
    outbound: Outbound,
    from_guest: Throttle,
    log: ErrorLog,
    state: State,
}

/// What a worker is made of.
pub(super) struct Parts {
    pub(super) tap: Tap,
    pub(super) state: State,
    pub(super) counters: Arc<NetworkCounters>,
    pub(super) to_guest: Throttle,
    pub(super) from_guest: Throttle,
}

impl NetworkWorker {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { tap, state, counters, to_guest, from_guest } = parts;
        let inbound = Inbound {
            throttle: to_guest,
            readable: false,
            mergeable: false,
            bytes: vec![0; HEADER_BYTES + FRAME_BYTES_MAX],
            waiting: 0,
        };
        let outbound = Outbound { tap, counters, agreed: 0 };
        Self { inbound, outbound, from_guest, log: ErrorLog::default(), state }
    }
}

impl Worker for NetworkWorker {
    fn thread_kind(&self) -> ThreadKind {
        ThreadKind::Net
    }

    fn watch(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        // Edge-triggered: frames that wait for the guest's buffers or for their rate do not wake
        // us over and over.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TAP);
        epoll.ctl(ControlOperation::Add, self.outbound.tap.as_raw_fd(), event)
    }

    fn start(&mut self, features: u64) -> Result<(), Broken> {
        self.outbound
            .tap
            .agree(features)
            .map_err(|source| Broken::Host { what: "set the tap's offload", source })?;
        self.inbound.mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        self.outbound.agreed = features;
        Ok(())
    }

    fn ready(&mut self, _token: u64, _events: EventSet) {
        self.inbound.readable = true;
    }

    fn work(
        &mut self,
        rings: &mut [Ring],
        memory: &Memory,
        now: Instant,
    ) -> Result<Progress, Broken> {
        let [receive, transmit] = rings else { return Ok(Progress::Idle) };
        let Self { inbound, outbound, from_guest, log, .. } = self;
        let received = inbound.serve(receive, memory, now, outbound, log)?;
        let sent = transmit
            .serve(memory, BATCH, from_guest, now, |chain| outbound.send(chain, log).map(|()| 0))?;
        Ok(received.or(sent))
    }

    fn reset(&mut self) {
        // What a new driver agrees on may be less: a frame made for the old one is lost.
        self.inbound.waiting = 0;
    }

    fn save(&self) -> WorkerState {
        WorkerState::Network(self.state.clone())
    }

    /// What this host's tap can may be another: the features that the driver agreed on are there,
    /// or the transport had refused them.
    fn restore(&mut self, state: WorkerState) -> Result<(), Differs> {
        let same = matches!(
            &state,
            WorkerState::Network(State { mac, mtu, .. })
                if (*mac, *mtu) == (self.state.mac, self.state.mtu)
        );
        if same { Ok(()) } else { Err(Differs::new(&state, &self.save())) }
    }
}

/// Frames to the guest.
struct Inbound {
    throttle: Throttle,
    /// The tap may have frames.
    readable: bool,
    /// The driver takes one frame in several buffers.
    mergeable: bool,
    /// One header and frame. Read here first, since how many buffers a frame takes is known only
    /// then, and a guest without any left must not lose it.
    bytes: Vec<u8>,
    /// Bytes of the header and frame that wait for buffers; 0: none does.
    waiting: usize,
}

/// What came of an attempt to hand over a frame.
enum Handover {
    Done,
    /// The driver was asked to kick when it offers buffers.
    NoBuffers,
    /// The one buffer it may lie in is too small.
    TooSmall,
}

impl Inbound {
    fn serve(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        now: Instant,
        Outbound { tap, counters, .. }: &Outbound,
        log: &mut ErrorLog,
    ) -> Result<Progress, Broken> {
        ring.refuse_kicks(memory)?;
        for _ in 0..BATCH {
            if self.waiting == 0 {
                if !self.readable {
                    return Ok(Progress::Idle);
                }
                if let Some(until) = self.throttle.held_until(now) {
                    return Ok(Progress::At(until));
                }
                if !self.read(tap, log) {
                    return Ok(Progress::Idle);
                }
                self.throttle.spend(self.waiting);
            }
            match self.hand_over(ring, memory)? {
                Handover::Done => counters.received(self.waiting - HEADER_BYTES),
                Handover::TooSmall => counters.dropped(),
                Handover::NoBuffers => return Ok(Progress::Idle),
            }
            self.waiting = 0;
        }
        Ok(Progress::More)
    }

    /// Takes the next frame from the tap. False: there is none.
    fn read(&mut self, tap: &Tap, log: &mut ErrorLog) -> bool {
        loop {
            match tap.read(&mut self.bytes) {
                Ok(count) if count > HEADER_BYTES => {
                    self.waiting = count;
                    return true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    // The interface is gone or down; an event says when it is back.
                    log.add("frame not read", &error);
                    break;
                }
                Ok(_) | Err(_) => break,
            }
        }
        self.readable = false;
        false
    }

    /// Puts the frame that waits into buffers of the guest: as many as it takes, or none.
    fn hand_over(&mut self, ring: &mut Ring, memory: &Memory) -> Result<Handover, Broken> {
        let frame = &mut self.bytes[..self.waiting];
        let mut chains: Vec<Chain<'_>> = Vec::new();
        let mut room = 0;
        while room < frame.len() {
            if !self.mergeable && !chains.is_empty() {
                // Given back empty: the frame is lost, the buffer is not.
                give_back_empty(&chains, ring, memory)?;
                return Ok(Handover::TooSmall);
            }
            let Some(chain) = ring.next(memory)? else {
                // Asked before they are put back: for a kick when there are more than these.
                if ring.ask_for_kick(memory)? {
                    continue;
                }
                chains.iter().for_each(|_| ring.put_back());
                return Ok(Handover::NoBuffers);
            };
            chain.only_writable()?;
            let bytes = chain.writable.len();
            if bytes < HEADER_BYTES {
                return Err(Broken::TooShort { what: "a frame's header", bytes });
            }
            room += bytes;
            chains.push(chain);
        }
        // A queue has far fewer entries.
        let buffers = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        header::set_buffers(frame, buffers);
        let mut rest = &frame[..];
        let mut used = Vec::with_capacity(chains.len());
        for mut chain in chains {
            let written = chain.writable.write(rest);
            rest = &rest[written..];
            used.push((chain.head, written));
        }
        ring.give_back_all(memory, &used)?;
        Ok(Handover::Done)
    }
}

fn give_back_empty(chains: &[Chain<'_>], ring: &mut Ring, memory: &Memory) -> Result<(), Broken> {
    chains.iter().try_for_each(|chain| ring.give_back(memory, chain.head, 0))
}

/// Frames from the guest.
struct Outbound {
    tap: Tap,
    counters: Arc<NetworkCounters>,
    /// Features the driver agreed on.
    agreed: u64,
}

impl Outbound {
    fn send(&self, chain: Chain<'_>, log: &mut ErrorLog) -> Result<(), Broken> {
        chain.only_readable()?;
        let mut frame = chain.readable;
        let bytes = frame.len();
        let header = frame.read().ok_or(Broken::TooShort { what: "a frame's header", bytes })?;
        let bytes = frame.len();
        if bytes < ETHERNET_BYTES {
            return Err(Broken::TooShort { what: "a frame", bytes });
        }
        if bytes > FRAME_BYTES_MAX {
            return Err(Broken::TooLong { what: "a frame", bytes });
        }
        let sent = header::from_guest(header, bytes, self.agreed)
            .map_err(|nonsense| io::Error::new(io::ErrorKind::InvalidInput, nonsense))
            .and_then(|header| self.tap.send(&header, &frame));
        match sent {
            Ok(()) => self.counters.sent(bytes),
            Err(error) => {
                // As on a wire: whoever needs the frame sends it again.
                self.counters.dropped();
                log.add("frame not sent", &error);
            }
        }
        Ok(())
    }
}

/// What went wrong, within bounds.
#[derive(Default)]
struct ErrorLog {
    lines: u32,
}

impl ErrorLog {
    fn add(&mut self, what: &str, error: &io::Error) {
        if self.lines < ERRORS_LOGGED_MAX {
            self.lines += 1;
            log::warn!(error:%; "{what}");
        }
    }
}
