//! Moves packets between the queues and the connections.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::Instant,
};

use holdfast_wire::vmm::{GUEST_CID, READY_PORT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    counters::VsockCounters,
    packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op},
    state::State,
    table::Table,
};
use crate::{
    devices::{
        chain::{Buffer, Chain},
        queue::{Broken, Progress, Ring},
        rate::Throttle,
        runner::Worker,
        saved::{Differs, WorkerState},
    },
    event::{Event, EventSender},
    limits::vsock::{BATCH, REFUSALS_MAX},
    random,
    seccomp::ThreadKind,
    vm::Memory,
};

/// Token of the listener; a connection's is its port, which is larger.
const LISTENER: u64 = 0;

/// Of all connections, in a restore.
enum Loss {
    None,
    /// The driver is to be told.
    Due,
    /// The driver was told when it had offered this many buffers for events, and drops every
    /// connection it has until it offers another: one made before that would be dropped too.
    Told {
        offered: u16,
    },
}

pub(super) struct VsockWorker {
    listener: UnixListener,
    epoll: Option<Arc<Epoll>>,
    table: Table,
    /// Where connections are counted from after a restore. Drawn before: the thread may not.
    after_restore: u32,
    refusals: VecDeque<Header>,
    /// The driver has started the device.
    running: bool,
    loss: Loss,
    state: State,
    counters: Arc<VsockCounters>,
    events: EventSender,
}

impl VsockWorker {
    pub(super) fn new(
        listener: UnixListener,
        state: State,
        counters: Arc<VsockCounters>,
        events: EventSender,
    ) -> Self {
        let mut number = [0; 4];
        if let Err(error) = random::fill(&mut number) {
            log::warn!(error:%; "connections may be refused for a moment after a restore");
        }
        let after_restore = u32::from_ne_bytes(number);
        Self {
            listener,
            epoll: None,
            table: Table::new(),
            after_restore,
            refusals: VecDeque::new(),
            running: false,
            loss: Loss::None,
            state,
            counters,
            events,
        }
    }

    fn accept(&mut self) {
        if !matches!(self.loss, Loss::None) {
            // They wait in the socket's backlog.
            return;
        }
        loop {
            match self.listener.accept() {
                // Without a driver nobody can answer: the client sees its connection end.
                Ok(_) if !self.running => {}
                Ok((stream, _)) => {
                    if let Err(error) = self.take_in(stream) {
                        log::warn!(error:%; "vsock client not taken in");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // The next client to come makes us try again.
                    log::warn!(error:%; "vsock client not accepted");
                    return;
                }
            }
        }
    }

    fn take_in(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let fd = stream.as_raw_fd();
        let Ok(port) = self.table.add(stream) else {
            log::warn!(open = self.table.len(); "vsock client refused: too many connections");
            return Ok(());
        };
        // Edge-triggered: a stream that cannot move for want of buffers or credit stays silent
        // instead of waking us over and over.
        let wanted =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(wanted, u64::from(port));
        let watched = match &self.epoll {
            Some(epoll) => epoll.ctl(ControlOperation::Add, fd, event),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        watched.inspect_err(|_| self.table.remove(port))
    }

    /// A packet of the guest.
    fn hear(&mut self, chain: Chain<'_>) -> Result<(), Broken> {
        chain.only_readable()?;
        let mut data = chain.readable;
        let bytes = data.len();
        let header = data.read().ok_or(Broken::TooShort { what: "a packet's header", bytes })?;
        let header = Header::from_bytes(&header);
        let announced = usize::try_from(header.len).unwrap_or(usize::MAX);
        if announced > data.len() {
            return Err(Broken::TooShort { what: "the data its packet announces", bytes });
        }
        // Packets from or to anybody else lead nowhere; there is nobody to answer to.
        if header.source_cid == GUEST_CID && header.target_cid == HOST_CID {
            self.dispatch(&header, data.take(announced));
        }
        Ok(())
    }

    fn dispatch(&mut self, header: &Header, data: Buffer<'_>) {
        let known = self
            .table
            .get(header.target_port)
            .filter(|it| header.kind == TYPE_STREAM && it.is_with(header.source_port));
        if let Some(connection) = known {
            let bytes = connection.hear(header, data);
            self.counters.add_from_guest(bytes);
            self.table.wake(header.target_port);
            return;
        }
        let knock = header.op == op::REQUEST
            && header.kind == TYPE_STREAM
            && header.target_port == READY_PORT;
        if knock && !self.state.ready_reported {
            self.state.ready_reported = true;
            self.events.send(Event::GuestReady);
        }
        // A reset is never answered by a reset.
        if header.op != op::RESET {
            self.refusals.push_back(header.refusal());
        }
    }

    /// Tells the driver of the loss and waits until it has dealt with it; then clients are let in.
    fn work_on_loss(&mut self, events: &mut Ring, memory: &Memory) -> Result<(), Broken> {
        if matches!(self.loss, Loss::Due)
            && let Some(offered) = tell_of_reset(events, memory)?
        {
            self.loss = Loss::Told { offered };
        }
        if let Loss::Told { offered } = self.loss
            && events.ask_for_kick_after(memory, offered)?
        {
            self.loss = Loss::None;
            self.accept();
        }
        Ok(())
    }

    fn send_refusals(&mut self, receiver: &mut Receiver<'_>) -> Result<(), Broken> {
        while !self.refusals.is_empty()
            && let Some(mut packet) = receiver.next()?
        {
            // Checked above; only this thread takes any.
            if let Some(header) = self.refusals.pop_front() {
                packet.header.write(&header.to_bytes());
                receiver.send(packet.head, HEADER_BYTES)?;
            }
        }
        Ok(())
    }

    /// Lets every connection in line do what it can, one packet at a time and in turn.
    fn serve_connections(&mut self, receiver: &mut Receiver<'_>) -> Result<(), Broken> {
        let mut starved = Vec::new();
        let mut sent = 0;
        while sent < BATCH
            && let Some(port) = self.table.next_waiting()
        {
            let Some(connection) = self.table.get(port) else { continue };
            connection.advance();
            if connection.is_over() {
                self.table.remove(port);
                continue;
            }
            if !connection.has_packet() {
                continue;
            }
            let Some(mut packet) = receiver.next()? else {
                starved.push(port);
                continue;
            };
            if let Some(header) = connection.next_packet(packet.data) {
                packet.header.write(&header.to_bytes());
                let bytes = usize::try_from(header.len).unwrap_or(0);
                receiver.send(packet.head, HEADER_BYTES + bytes)?;
                self.counters.add_to_guest(u64::from(header.len));
                sent += 1;
            } else {
                receiver.put_back();
            }
            // It may have more to say, or be over.
            self.table.wake(port);
        }
        starved.into_iter().for_each(|port| self.table.wake(port));
        Ok(())
    }
}

impl Worker for VsockWorker {
    fn thread_kind(&self) -> ThreadKind {
        ThreadKind::Vsock
    }

    fn watch(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
        epoll.ctl(ControlOperation::Add, self.listener.as_raw_fd(), event)?;
        self.epoll = Some(Arc::clone(epoll));
        Ok(())
    }

    fn start(&mut self, _features: u64) -> Result<(), Broken> {
        self.running = true;
        Ok(())
    }

    fn ready(&mut self, token: u64, events: EventSet) {
        if token == LISTENER {
            return self.accept();
        }
        // A connection that ended in this turn may still have an event.
        let Ok(port) = u32::try_from(token) else { return };
        if let Some(connection) = self.table.get(port) {
            connection.note(events);
            self.table.wake(port);
        }
    }

    fn work(
        &mut self,
        rings: &mut [Ring],
        memory: &Memory,
        now: Instant,
    ) -> Result<Progress, Broken> {
        let [receive, transmit, events] = rings else { return Ok(Progress::Idle) };
        self.work_on_loss(events, memory)?;
        let mut receiver = Receiver { ring: receive, memory, starved: false };
        self.send_refusals(&mut receiver)?;
        // A packet causes one refusal at most.
        let batch = BATCH.min(REFUSALS_MAX - self.refusals.len());
        // Bounded by credit, and by who connects: no rate is set for it.
        let heard = transmit.serve(memory, batch, &mut Throttle::default(), now, |chain| {
            self.hear(chain).map(|()| 0)
        })?;
        self.serve_connections(&mut receiver)?;
        self.send_refusals(&mut receiver)?;

        let stuck = receiver.starved && self.refusals.len() >= REFUSALS_MAX;
        let to_hear = heard == Progress::More && !stuck;
        let to_say = self.table.any_waiting() && !receiver.starved;
        Ok(if to_hear || to_say { Progress::More } else { Progress::Idle })
    }

    fn reset(&mut self) {
        self.running = false;
        self.table.clear();
        self.refusals.clear();
        // What was reported stays so: a driver that resets the device and knocks again and again
        // would flood the agent.
        if !matches!(self.loss, Loss::None) {
            self.loss = Loss::None;
            self.accept();
        }
    }

    fn save(&self) -> WorkerState {
        WorkerState::Vsock(self.state)
    }

    fn restore(&mut self, state: WorkerState) -> Result<(), Differs> {
        let WorkerState::Vsock(state) = state else {
            return Err(Differs::new(&state, &self.save()));
        };
        self.state = state;
        self.loss = Loss::Due;
        self.table.count_from(self.after_restore);
        Ok(())
    }
}

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, section 5.10.6.7): every connection is gone,
/// and the guest's address is to be read anew.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How many buffers for events the driver had offered when it was told. `None`: it has offered no
/// buffer for this one, and was asked to kick when it does.
fn tell_of_reset(events: &mut Ring, memory: &Memory) -> Result<Option<u16>, Broken> {
    loop {
        // Before the driver can answer: what it offers from here on counts.
        let offered = events.offered(memory)?;
        if let Some(mut chain) = events.next(memory)? {
            chain.only_writable()?;
            let written = chain.writable.write(&TRANSPORT_RESET);
            events.give_back(memory, chain.head, written)?;
            return Ok(Some(offered));
        }
        if !events.ask_for_kick(memory)? {
            return Ok(None);
        }
    }
}

/// The queue with the buffers in which the guest receives.
struct Receiver<'a> {
    ring: &'a mut Ring,
    memory: &'a Memory,
    /// No buffer is left; the driver was asked to kick when it offers one.
    starved: bool,
}

/// A buffer for one packet.
struct Packet<'m> {
    head: u16,
    header: Buffer<'m>,
    /// Never empty.
    data: Buffer<'m>,
}

impl<'a> Receiver<'a> {
    fn next(&mut self) -> Result<Option<Packet<'a>>, Broken> {
        loop {
            if let Some(chain) = self.ring.next(self.memory)? {
                chain.only_writable()?;
                let mut data = chain.writable;
                let bytes = data.len();
                let header = data.take(HEADER_BYTES);
                if data.is_empty() {
                    return Err(Broken::TooShort { what: "any packet with data", bytes });
                }
                return Ok(Some(Packet { head: chain.head, header, data }));
            }
            if !self.ring.ask_for_kick(self.memory)? {
                self.starved = true;
                return Ok(None);
            }
        }
    }

    fn put_back(&mut self) {
        self.ring.put_back();
    }

    fn send(&mut self, head: u16, written: usize) -> Result<(), Broken> {
        self.ring.give_back(self.memory, head, written)
    }
}
