//! The guest's side of the sockets: speaks in packets.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use holdfast_wire::vmm::GUEST_CID;

use crate::devices::{
    testing::*,
    vsock::packet::{HEADER_BYTES, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op},
};

pub(super) const VSOCK: usize = 1;
pub(super) const RECEIVE: u64 = BUFFERS;
pub(super) const SEND: u64 = BUFFERS + (1 << 20);
pub(super) const BUFFER_BYTES: u32 = 4096;
pub(super) const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
pub(super) const PORT: u32 = 1024;

/// The guest's side.
pub(super) struct Guest {
    pub(super) rig: Rig,
    pub(super) receive: DriverQueue,
    pub(super) send: DriverQueue,
    pub(super) offered: u64,
}

impl Guest {
    pub(super) fn new() -> Self {
        let rig = Rig::new(Vec::new());
        let mut guest = Self::start(rig);
        guest.offer(8);
        guest
    }

    /// Starts the device, without a buffer to receive in.
    pub(super) fn start(rig: Rig) -> Self {
        let mut queues = rig.start(VSOCK, VERSION_1 | 1 << 29);
        queues.truncate(2);
        let [receive, send] = queues.try_into().ok().unwrap();
        Self { rig, receive, send, offered: 0 }
    }

    pub(super) fn offer(&mut self, buffers: usize) {
        for _ in 0..buffers {
            let slot = self.offered % u64::from(QUEUE_SIZE);
            let address = RECEIVE + slot * u64::from(BUFFER_BYTES);
            self.receive.offer(&[(address, BUFFER_BYTES, WRITE)]);
            self.offered += 1;
        }
        self.receive.kick();
    }

    /// The next packet, whose buffer is offered again.
    pub(super) fn hear(&mut self) -> (Header, Vec<u8>) {
        let packet = self.hear_once();
        self.offer(1);
        packet
    }

    pub(super) fn hear_once(&mut self) -> (Header, Vec<u8>) {
        let (head, written) = self.receive.take();
        let address = RECEIVE + u64::from(head) * u64::from(BUFFER_BYTES);
        let mut bytes = self.rig.bytes(address, usize::try_from(written).unwrap());
        let data = bytes.split_off(HEADER_BYTES);
        let header = Header::from_bytes(&bytes.try_into().unwrap());
        assert_eq!(usize::try_from(header.len).unwrap(), data.len());
        (header, data)
    }

    pub(super) fn say(&mut self, header: Header, data: &[u8]) {
        self.rig.store(SEND, &header.to_bytes());
        self.rig.store(SEND + HEADER_BYTES as u64, data);
        let len = u32::try_from(HEADER_BYTES + data.len()).unwrap();
        self.send.ask(&[(SEND, len, 0)]);
    }

    pub(super) fn say_and_forget(&mut self, header: Header) {
        self.rig.store(SEND, &header.to_bytes());
        self.send.offer(&[(SEND, 44, 0)]);
        self.send.kick();
    }

    /// A host client, connected to guest port [`PORT`]; and the header of packets of the guest.
    pub(super) fn connected(&mut self, room: u32) -> (UnixStream, Header) {
        let mut client = self.rig.connect();
        client.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        let (request, _) = self.hear();
        assert_eq!((request.op, request.target_port), (op::REQUEST, PORT));
        let ours = packet(request.source_port, room);
        self.say(Header { op: op::RESPONSE, ..ours }, b"");
        let expected = format!("OK {}\n", request.source_port);
        assert_eq!(read(&mut client, expected.len()), expected.as_bytes());
        (client, ours)
    }
}

/// A packet from [`PORT`] to `host_port`.
pub(super) fn packet(host_port: u32, room: u32) -> Header {
    Header {
        source_cid: GUEST_CID,
        target_cid: 2,
        source_port: PORT,
        target_port: host_port,
        kind: TYPE_STREAM,
        buf_alloc: room,
        ..Header::default()
    }
}

pub(super) fn data(ours: Header, bytes: &[u8]) -> Header {
    Header { op: op::DATA, len: u32::try_from(bytes.len()).unwrap(), ..ours }
}

pub(super) fn read(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

pub(super) fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}
