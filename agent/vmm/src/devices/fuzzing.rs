//! One device without its thread, driven step by step, for fuzz targets: the same worker, the same
//! queues and the same memory, and nothing that depends on time or on another thread.
//!
//! A target's input is a script: steps, each as postcard, until one does not decode.

use std::{
    io::Write,
    net::UdpSocket,
    os::{
        fd::{IntoRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    process::Command,
    sync::{Arc, OnceLock},
    time::Instant,
};

use fs_err::File;
use holdfast_wire::vmm::{Disk, IoLimits, Network, Segment};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, ftruncate, memfd_create};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::{
    epoll::{Epoll, EpollEvent},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    Device, balloon, blk,
    interrupt::Interrupt,
    net,
    queue::{Progress, Ring, RingSetup},
    rng, runner, testing, vsock,
};
use crate::{event, inherited::InheritedFds, vm::Memory};

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Disk,
    ReadOnlyDisk,
    Rng,
    Vsock,
    Network,
    Balloon,
}

/// What the guest or its surroundings do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Step {
    /// The driver sets its queues up as it should and starts the device.
    Start {
        features: u64,
    },
    /// The driver sets a queue up as it likes; used at the next start.
    Queue {
        queue: u8,
        size: u32,
        descriptors: u64,
        available: u64,
        used: u64,
    },
    Reset,
    /// A chain as it should be: bytes to read in pieces of this length, room to write behind them.
    Request {
        queue: u8,
        bytes: Vec<u8>,
        piece: u16,
        room: u32,
    },
    Descriptor {
        queue: u8,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    Offer {
        queue: u8,
        head: u16,
    },
    /// The available ring's index.
    Index {
        queue: u8,
        index: u16,
    },
    /// The driver's event index.
    Event {
        queue: u8,
        event: u16,
    },
    Store {
        at: u32,
        bytes: Vec<u8>,
    },
    Configuration {
        at: u8,
        bytes: Vec<u8>,
    },
    /// The device has its turn.
    Work,
    /// A host client connects.
    Connect,
    /// The client with this number says something.
    Say {
        client: u8,
        bytes: Vec<u8>,
    },
    Hear {
        client: u8,
    },
    HangUp {
        client: u8,
    },
    /// The host's network has something to say.
    Datagram {
        bytes: Vec<u8>,
    },
    /// What is saved is restored.
    Restore,
}

/// Steps of one script, and clients of one run.
const STEPS_MAX: usize = 256;
const CLIENTS_MAX: usize = 8;
/// Turns that one `Work` takes at most: a device that says More is not done.
const TURNS: usize = 4;
const QUEUES: usize = 4;
const QUEUE_SIZE: u16 = 16;
const QUEUE_STRIDE: u64 = 0x4000;
/// Where requests are put, behind all queues; a page after the other.
const REQUESTS: u64 = 0x4_0000;
const REQUEST_BYTES: u64 = 0x4000;
const DISK_BYTES: u64 = 256 * 1024;
/// What lies above is only reached by scripts that name it: not zeroed between runs.
const ZEROED_BYTES: usize = 0x8_0000;

/// The steps of an input.
pub fn steps(mut input: &[u8]) -> Vec<Step> {
    let mut steps = Vec::new();
    while steps.len() < STEPS_MAX
        && let Ok((step, rest)) = postcard::take_from_bytes(input)
    {
        steps.push(step);
        input = rest;
    }
    steps
}

/// An input of these steps.
pub fn input(steps: &[Step]) -> Vec<u8> {
    // A step is a few numbers and bytes: it always encodes.
    steps.iter().flat_map(|step| postcard::to_allocvec(step).unwrap_or_default()).collect()
}

/// Runs a script on a fresh device.
pub fn run(kind: Kind, steps: Vec<Step>) {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    let memory = MEMORY.get_or_init(testing::memory);
    memory.write_slice(&vec![0; ZEROED_BYTES], GuestAddress(0)).unwrap();
    let mut bench = Bench::new(kind, memory.clone());
    for step in steps {
        bench.take(step);
    }
}

struct Bench {
    kind: Kind,
    device: Device,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    epoll: Arc<Epoll>,
    set_up: Vec<RingSetup>,
    rings: Vec<Ring>,
    running: bool,
    /// Of each queue: next descriptor, requests offered.
    driver: [(u16, u16); QUEUES],
    requests: u64,
    address: Option<SocketAddr>,
    clients: Vec<UnixStream>,
    _events: event::EventReceiver,
}

impl Bench {
    fn new(kind: Kind, memory: Memory) -> Self {
        let (sender, events) = event::channel().unwrap();
        let mut address = None;
        let mut device = match kind {
            Kind::Disk | Kind::ReadOnlyDisk => disk(kind == Kind::ReadOnlyDisk),
            Kind::Rng => rng::device(),
            Kind::Vsock => {
                let (listener, bound) = listener();
                address = Some(bound);
                vsock::device(listener, Arc::default(), sender)
            }
            Kind::Network => network(),
            Kind::Balloon => balloon::device(0).0,
        };
        let epoll = Arc::new(Epoll::new().unwrap());
        device.worker.watch(&epoll).unwrap();
        Self {
            kind,
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            epoll,
            set_up: (0..QUEUES as u64).map(set_up).collect(),
            rings: Vec::new(),
            running: false,
            driver: [(0, 0); QUEUES],
            requests: 0,
            address,
            clients: Vec::new(),
            _events: events,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Start { features } => self.start(features),
            Step::Queue { queue, size, descriptors, available, used } => {
                self.set_up[usize::from(queue) % QUEUES] =
                    RingSetup { size, ready: true, descriptors, available, used };
            }
            Step::Reset => {
                self.running = false;
                self.rings.clear();
                self.device.worker.reset();
                self.driver = [(0, 0); QUEUES];
            }
            Step::Request { queue, bytes, piece, room } => self.request(queue, &bytes, piece, room),
            Step::Descriptor { queue, index, address, len, flags, next } => {
                self.describe(queue, index, address, len, flags, next);
            }
            Step::Offer { queue, head } => self.offer(queue, head),
            Step::Index { queue, index } => self.store(base(queue) + 0x1002, &index.to_le_bytes()),
            Step::Event { queue, event } => {
                let at = base(queue) + 0x1004 + 2 * u64::from(QUEUE_SIZE);
                self.store(at, &event.to_le_bytes());
            }
            Step::Store { at, bytes } => self.store(at.into(), &bytes),
            Step::Configuration { at, bytes } => {
                self.device.identity.config.driver_writes(at.into(), &bytes);
            }
            Step::Work => self.work(),
            Step::Connect => self.connect(),
            Step::Say { client, bytes } => {
                let _ = self.client(client).map(|client| client.write(&bytes));
            }
            Step::Hear { client } => {
                let mut heard = [0; 4096];
                let _ = self.client(client).map(|it| std::io::Read::read(it, &mut heard));
            }
            Step::HangUp { client } => {
                let how = [std::net::Shutdown::Write, std::net::Shutdown::Both];
                let how = how[usize::from(client & 1)];
                let _ = self.client(client / 2).map(|client| client.shutdown(how));
            }
            Step::Datagram { bytes } if self.kind == Kind::Network => {
                let _ = host().1.send_to(&bytes, GUEST);
            }
            Step::Datagram { .. } => {}
            Step::Restore => {
                let state = self.device.worker.save();
                assert!(self.device.worker.restore(state).is_ok(), "its own state does not fit");
            }
        }
    }

    fn start(&mut self, features: u64) {
        let queues = self.device.identity.queue_sizes.iter().zip(&self.set_up).enumerate();
        let rings = queues.map(|(index, (max, set_up))| {
            let interrupt = Arc::clone(&self.interrupt);
            Ring::new(index, set_up, *max, features & 1 << 29 != 0, &self.memory, interrupt)
        });
        let agreed = features & self.device.identity.features;
        match rings.collect::<Result<Vec<_>, _>>() {
            Ok(rings) if self.device.worker.start(agreed).is_ok() => {
                self.rings = rings;
                self.running = true;
            }
            Ok(_) | Err(_) => self.running = false,
        }
    }

    fn work(&mut self) {
        let mut ready = [EpollEvent::default(); 16];
        for _ in 0..TURNS {
            let count = self.epoll.wait(0, &mut ready).unwrap_or(0);
            for event in &ready[..count] {
                self.device.worker.ready(event.data(), event.event_set());
            }
            if !self.running {
                return;
            }
            match self.device.worker.work(&mut self.rings, &self.memory, Instant::now()) {
                Ok(Progress::More) => {}
                Ok(Progress::Idle | Progress::At(_)) => return,
                Err(broken) => {
                    assert!(!runner::reason(&broken).is_empty());
                    return self.take(Step::Reset);
                }
            }
        }
    }

    fn store(&self, at: u64, bytes: &[u8]) {
        // Behind the end there is nothing to change.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn describe(&self, queue: u8, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.store(base(queue) + 16 * u64::from(index % QUEUE_SIZE), &bytes);
    }

    fn offer(&mut self, queue: u8, head: u16) {
        let offered = self.driver[usize::from(queue) % QUEUES].1;
        self.store(base(queue) + 0x1004 + 2 * u64::from(offered % QUEUE_SIZE), &head.to_le_bytes());
        let offered = offered.wrapping_add(1);
        self.driver[usize::from(queue) % QUEUES].1 = offered;
        self.store(base(queue) + 0x1002, &offered.to_le_bytes());
    }

    fn request(&mut self, queue: u8, bytes: &[u8], piece: u16, room: u32) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let at = REQUESTS + self.requests % 16 * REQUEST_BYTES;
        self.requests += 1;
        let bytes = &bytes[..bytes.len().min(0x2000)];
        self.store(at, bytes);
        let least = bytes.len().div_ceil(usize::from(QUEUE_SIZE) - 1).max(1);
        let piece = usize::from(piece).max(least);
        let mut pieces: Vec<(u64, u32, u16)> = (0..bytes.len())
            .step_by(piece)
            .map(|from| {
                let len = piece.min(bytes.len() - from);
                (at + from as u64, u32::try_from(len).unwrap_or(0), 0)
            })
            .collect();
        if room > 0 {
            pieces.push((at + 0x2000, room, WRITE));
        }
        let first = self.driver[usize::from(queue) % QUEUES].0;
        let count = pieces.len();
        for (number, (address, len, flags)) in (0..).zip(pieces) {
            let next = if usize::from(number) + 1 < count { NEXT } else { 0 };
            let index = first.wrapping_add(number);
            let following = index.wrapping_add(1) % QUEUE_SIZE;
            self.describe(queue, index, address, len, flags | next, following);
        }
        let after = first.wrapping_add(u16::try_from(count).unwrap_or(0)) % QUEUE_SIZE;
        self.driver[usize::from(queue) % QUEUES].0 = after;
        self.offer(queue, first % QUEUE_SIZE);
    }

    fn connect(&mut self) {
        let Some(address) = &self.address else { return };
        if self.clients.len() < CLIENTS_MAX
            && let Ok(client) = UnixStream::connect_addr(address)
            && client.set_nonblocking(true).is_ok()
        {
            self.clients.push(client);
        }
    }

    fn client(&mut self, number: u8) -> Option<&mut UnixStream> {
        let count = self.clients.len().max(1);
        self.clients.get_mut(usize::from(number) % count)
    }
}

fn base(queue: u8) -> u64 {
    QUEUE_STRIDE * (1 + u64::from(queue) % QUEUES as u64)
}

fn set_up(queue: u64) -> RingSetup {
    let base = QUEUE_STRIDE * (1 + queue);
    RingSetup {
        size: QUEUE_SIZE.into(),
        ready: true,
        descriptors: base,
        available: base + 0x1000,
        used: base + 0x2000,
    }
}

fn disk(read_only: bool) -> Device {
    // Only what is read may be of several files.
    let parts = if read_only { &[DISK_BYTES / 4, DISK_BYTES / 4 * 3][..] } else { &[DISK_BYTES] };
    let segments = parts.iter().map(|&bytes| {
        let file = memfd_create("disk of a fuzz target", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        Segment { fd: file.into_raw_fd(), bytes }
    });
    let (segments, limits) = (segments.collect(), IoLimits::default());
    let disk = Disk { name: "fuzzed".to_owned(), read_only, segments, limits };
    let config = testing::config(vec![disk.clone()], Vec::new(), unused(), false);
    let mut fds = InheritedFds::claim(&config).unwrap();
    blk::device(&disk, &mut fds, Arc::default()).unwrap()
}

fn unused() -> i32 {
    File::open("/dev/null").unwrap().into_raw_fd()
}

fn listener() -> (UnixListener, SocketAddr) {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("holdfast-fuzz-{}-{number}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    (UnixListener::bind_addr(&address).unwrap(), address)
}

const GUEST: &str = "10.0.0.2:7777";

/// The tap of this process, up in a network namespace of its own, and a socket behind it.
fn host() -> &'static (OwnedFd, UdpSocket) {
    static HOST: OnceLock<(OwnedFd, UdpSocket)> = OnceLock::new();
    HOST.get_or_init(|| {
        net::stand::leave_network().unwrap();
        let tap = net::stand::tap("tap0", net::stand::FLAGS).unwrap();
        fcntl_setfl(&tap, fcntl_getfl(&tap).unwrap() | OFlags::NONBLOCK).unwrap();
        let up = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
            busybox ifconfig tap0 10.0.0.1 netmask 255.255.255.0 mtu 9000 up
            busybox arp -s 10.0.0.2 02:00:00:00:00:02";
        let status = Command::new("/bin/busybox").args(["sh", "-c", up]).status().unwrap();
        assert!(status.success(), "the tap does not come up: this needs root");
        let socket = UdpSocket::bind("10.0.0.1:7777").unwrap();
        socket.set_nonblocking(true).unwrap();
        (tap, socket)
    })
}

fn network() -> Device {
    let (tap, socket) = host();
    // What an earlier run left on its way.
    while socket.recv(&mut [0; 16]).is_ok() {}
    let left = &mut [0; 16 * 1024];
    while rustix::io::read(tap, &mut left[..]).is_ok_and(|count| count > 0) {}
    let free = IoLimits::default();
    let tap_fd = tap.try_clone().unwrap().into_raw_fd();
    let network = Network { tap_fd, mac: [2; 6], mtu: 9000, to_guest: free, from_guest: free };
    let config = testing::config(Vec::new(), vec![network.clone()], unused(), false);
    let mut fds = InheritedFds::claim(&config).unwrap();
    net::device(0, &network, &mut fds, Arc::default()).unwrap()
}
