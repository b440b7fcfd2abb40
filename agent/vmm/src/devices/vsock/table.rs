//! All connections, each under the port number it has on the host side.

use std::{
    collections::{BTreeMap, VecDeque},
    os::unix::net::UnixStream,
};

use super::connection::Connection;
use crate::limits::vsock::CONNECTIONS_MAX;

/// Host ports count up from here; they only tell connections apart.
const PORT_FIRST: u32 = 1 << 30;

pub(super) struct Table {
    connections: BTreeMap<u32, Connection>,
    /// Ports of connections that may have something to do, each once.
    waiting: VecDeque<u32>,
    next_port: u32,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { connections: BTreeMap::new(), waiting: VecDeque::new(), next_port: PORT_FIRST }
    }

    /// Counts on from elsewhere. A guest that goes on has the connections of its former life in its
    /// table until its programs close them: a new one under the same number would be taken for the
    /// old one and be refused.
    pub(super) fn count_from(&mut self, random: u32) {
        self.next_port = PORT_FIRST + random % PORT_FIRST;
    }

    /// Takes a client in under a port of its own. Gives it back when there are too many.
    pub(super) fn add(&mut self, stream: UnixStream) -> Result<u32, UnixStream> {
        if self.connections.len() >= CONNECTIONS_MAX {
            let settled = self.connections.iter().find(|(_, it)| it.waits_for_guest_only());
            match settled.map(|(port, _)| *port) {
                // The guest does not answer; should it ever, it gets a reset.
                Some(port) => self.remove(port),
                None => return Err(stream),
            }
        }
        let port = self.free_port();
        self.connections.insert(port, Connection::new(stream, port));
        self.wake(port);
        Ok(port)
    }

    fn free_port(&mut self) -> u32 {
        // Ends: there are far more numbers than connections.
        while self.connections.contains_key(&self.next_port) {
            self.step();
        }
        let port = self.next_port;
        self.step();
        port
    }

    fn step(&mut self) {
        self.next_port = self.next_port.checked_add(1).unwrap_or(PORT_FIRST);
    }

    pub(super) fn get(&mut self, port: u32) -> Option<&mut Connection> {
        self.connections.get_mut(&port)
    }

    /// Puts a connection in line to be looked at.
    pub(super) fn wake(&mut self, port: u32) {
        if !self.waiting.contains(&port) {
            self.waiting.push_back(port);
        }
    }

    /// The next connection in line.
    pub(super) fn next_waiting(&mut self) -> Option<u32> {
        self.waiting.pop_front()
    }

    pub(super) fn any_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn remove(&mut self, port: u32) {
        self.connections.remove(&port);
        self.waiting.retain(|other| *other != port);
    }

    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.waiting.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> UnixStream {
        UnixStream::pair().unwrap().0
    }

    #[test]
    fn one_that_leaves_makes_room_for_one() {
        let mut table = Table::new();
        let ports: Vec<_> = (0..CONNECTIONS_MAX).map(|_| table.add(stream()).unwrap()).collect();
        assert!(table.add(stream()).is_err());
        table.remove(ports[7]);
        assert!(table.add(stream()).is_ok());
        assert!(table.add(stream()).is_err());
    }

    #[test]
    fn whatever_it_counts_from_a_port_is_none_of_the_guests_own() {
        for random in [0, 1, PORT_FIRST - 1, PORT_FIRST, u32::MAX] {
            let mut table = Table::new();
            table.count_from(random);
            assert!(table.add(stream()).unwrap() >= PORT_FIRST, "{random}");
        }
        // And it is where it was told to begin.
        let mut table = Table::new();
        table.count_from(7);
        assert_eq!(table.add(stream()).unwrap(), PORT_FIRST + 7);
    }

    #[test]
    fn ports_in_use_are_not_given_again_when_the_count_wraps() {
        let mut table = Table::new();
        let first = table.add(stream()).unwrap();
        table.next_port = u32::MAX;
        assert_eq!(table.add(stream()).unwrap(), u32::MAX);
        assert_eq!(table.add(stream()).unwrap(), first + 1);
    }

    #[test]
    fn a_connection_waits_in_line_once() {
        let mut table = Table::new();
        let port = table.add(stream()).unwrap();
        table.wake(port);
        assert_eq!(table.next_waiting(), Some(port));
        assert_eq!(table.next_waiting(), None);
    }
}
