//! The control socket: who is connected, what it asks, what it is told. One connection at a time;
//! a new one replaces the old, for it is the agent started anew.

pub(crate) mod connection;

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use holdfast_wire::vmm::{Event, Reply, ToAgent, ToVmm};
use log::{info, warn};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use connection::Connection;

use crate::limits::control::EVENTS_KEPT_MAX;

/// What an epoll event is about.
const LISTENER: u64 = 0;
const CONNECTION: u64 = 1;
const BELL: u64 = 2;

/// What there is to do after a wait.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    /// Requests in the order they came.
    pub(crate) requests: Vec<ToVmm>,
    /// The machine's own events wait.
    pub(crate) events: bool,
}

pub(crate) struct Control {
    epoll: Epoll,
    listener: UnixListener,
    connection: Option<Connection>,
    kept: VecDeque<Event>,
}

impl Control {
    /// Serves on the inherited listening socket; `bell` wakes [`Control::wait`] too.
    pub(crate) fn new(listener: OwnedFd, bell: &EventFd) -> io::Result<Self> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        watch(&epoll, ControlOperation::Add, &listener, EventSet::IN, LISTENER)?;
        watch(&epoll, ControlOperation::Add, bell, EventSet::IN, BELL)?;
        Ok(Self { epoll, listener, connection: None, kept: VecDeque::new() })
    }

    /// Sleeps until there is something to do.
    pub(crate) fn wait(&mut self) -> io::Result<Wake> {
        let mut ready = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(-1, &mut ready) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        let mut wake = Wake::default();
        for event in &ready[..count] {
            match event.data() {
                LISTENER => self.accept(),
                CONNECTION => self.serve(event.event_set(), &mut wake.requests),
                _ => wake.events = true,
            }
        }
        Ok(wake)
    }

    fn accept(&mut self) {
        let accepted = self.listener.accept().and_then(|(stream, _)| Connection::new(stream));
        let connection = match accepted {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return warn!(error:%; "connection not accepted"),
        };
        let added =
            watch(&self.epoll, ControlOperation::Add, &connection, EventSet::IN, CONNECTION);
        match added {
            // Dropping the old connection closes it, which takes it out of the epoll set.
            Ok(()) if self.connection.replace(connection).is_some() => {
                info!("control connection replaced by a new one");
            }
            Ok(()) => {}
            Err(error) => warn!(error:%; "connection cannot be watched"),
        }
    }

    fn serve(&mut self, ready: EventSet, requests: &mut Vec<ToVmm>) {
        let Some(connection) = &mut self.connection else { return };
        let served = if ready.contains(EventSet::OUT) { connection.send() } else { Ok(()) };
        match served.and_then(|()| connection.receive(requests)) {
            Ok(()) => self.watch_connection(),
            Err(reason) => self.hang_up(&reason),
        }
    }

    pub(crate) fn reply(&mut self, reply: Reply) {
        self.post(&ToAgent::Reply(reply));
    }

    /// Tells an event now, or keeps it for the agent that connects next.
    pub(crate) fn event(&mut self, event: Event) {
        if self.connection.as_ref().is_some_and(|connection| connection.greeted) {
            return self.post(&ToAgent::Event(event));
        }
        if self.kept.len() == EVENTS_KEPT_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back(event);
    }

    /// Has the agent said Hello on this connection?
    pub(crate) fn greeted(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.greeted)
    }

    /// Answers Hello, then tells what was kept.
    pub(crate) fn greet(&mut self, reply: Reply) {
        self.reply(reply);
        if let Some(connection) = &mut self.connection {
            connection.greeted = true;
        }
        for event in std::mem::take(&mut self.kept) {
            self.post(&ToAgent::Event(event));
        }
    }

    /// Ends a connection that speaks another version, once it was told.
    pub(crate) fn refuse(&mut self, reason: String) {
        self.reply(Reply::Refused { reason });
        self.hang_up(&"refused");
    }

    /// Tells the last event and waits, within a limit, until it is gone.
    pub(crate) fn farewell(mut self, event: Event) {
        if !self.greeted() {
            return;
        }
        if let Some(connection) = self.connection.take()
            && let Err(reason) = connection.finish(&ToAgent::Event(event))
        {
            warn!(reason:%; "last event not told");
        }
    }

    fn post(&mut self, message: &ToAgent) {
        let Some(connection) = &mut self.connection else { return };
        match connection.queue(message).and_then(|()| connection.send()) {
            Ok(()) => self.watch_connection(),
            Err(reason) => self.hang_up(&reason),
        }
    }

    /// Asks for writability only while something waits to be written.
    fn watch_connection(&mut self) {
        let Some(connection) = &self.connection else { return };
        let mut events = EventSet::IN;
        events.set(EventSet::OUT, connection.has_unsent());
        let operation = ControlOperation::Modify;
        if let Err(error) = watch(&self.epoll, operation, connection, events, CONNECTION) {
            self.hang_up(&error);
        }
    }

    fn hang_up(&mut self, reason: &dyn std::fmt::Display) {
        if self.connection.take().is_some() {
            info!(reason:%; "control connection ended");
        }
    }
}

fn watch(
    epoll: &Epoll,
    operation: ControlOperation,
    fd: &impl AsRawFd,
    events: EventSet,
    data: u64,
) -> io::Result<()> {
    epoll.ctl(operation, fd.as_raw_fd(), EpollEvent::new(events, data))
}
