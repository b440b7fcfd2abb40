//! The driver's side, for device tests: finds a device by its registers, sets up queues in guest
//! memory, offers buffers and waits for the interrupt. No KVM: eventfds stand for its lines.
#![cfg_attr(not(test), allow(dead_code, reason = "fuzz targets need a part of it"))]

use std::{
    collections::BTreeMap,
    os::{
        fd::{AsRawFd, IntoRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::atomic::{Ordering, fence},
    time::Duration,
};

use fs_err::File;
use holdfast_wire::vmm::{Config, CpuTemplate, Disk, IoLimits, Network, Segment, Serial};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::DeviceSet;
use crate::{
    event::{self, Event, EventReceiver},
    inherited::InheritedFds,
    vm::{
        Memory,
        wiring::{Line, Wiring, WiringError},
    },
};

/// How long a device may take before a test fails; far more than it ever needs.
const PATIENCE_MS: i32 = 20_000;
pub(crate) const MEMORY_BYTES: u64 = 4 << 20;
/// Queues of device n start at n times this.
const DEVICE_STRIDE: u64 = 0x1_0000;
/// Buffers of tests lie behind all queues.
pub(crate) const BUFFERS: u64 = 1 << 20;
/// Entries of every queue of a test.
pub(crate) const QUEUE_SIZE: u16 = 16;

pub(crate) const WRITE: u16 = 2;
pub(crate) const NEXT: u16 = 1;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const STARTED: u32 = 1 | 2 | 4 | 8;

pub(crate) fn memory() -> Memory {
    let half = usize::try_from(MEMORY_BYTES / 2).unwrap();
    let file = memfd_create("memory of a test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, MEMORY_BYTES).unwrap();
    let low = FileOffset::new(file.into(), 0);
    let high = FileOffset::from_arc(low.arc().clone(), MEMORY_BYTES / 2);
    // Two regions side by side, as around the hole below 4 GiB: buffers may span both.
    let middle = GuestAddress(MEMORY_BYTES / 2);
    let regions = [(GuestAddress(0), half, Some(low)), (middle, half, Some(high))];
    Memory::from_ranges_with_files(regions).unwrap()
}

/// Waits until `fd` is readable.
pub(crate) fn wait_readable(fd: &impl AsRawFd, what: &str) {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event).unwrap();
    let ready = epoll.wait(PATIENCE_MS, &mut [EpollEvent::default()]).unwrap();
    assert_eq!(ready, 1, "nothing came within {PATIENCE_MS} ms: {what}");
}

/// A disk of a test: one file per segment.
pub(crate) fn disk(name: &str, read_only: bool, files: Vec<(File, u64)>) -> Disk {
    let segments = files.into_iter().map(|(file, bytes)| Segment { fd: file.into_raw_fd(), bytes });
    let limits = IoLimits::default();
    Disk { name: name.to_owned(), read_only, segments: segments.collect(), limits }
}

/// The configuration of a machine of which only the devices are looked at.
pub(crate) fn config(
    disks: Vec<Disk>,
    networks: Vec<Network>,
    vsock_fd: RawFd,
    balloon: bool,
) -> Config {
    let unused = || File::open("/dev/null").unwrap().into_raw_fd();
    Config {
        version: 1,
        vcpus: 1,
        memory_mib: 64,
        memory_fd: unused(),
        memory_private: false,
        userfault_fd: None,
        written: Vec::new(),
        kvm_fd: unused(),
        kernel_fd: unused(),
        initramfs_fd: unused(),
        command_line: String::new(),
        control_fd: unused(),
        vsock_fd,
        serial: Serial { log_fd: unused(), bytes_max: 0 },
        disks,
        networks,
        balloon,
        cpu: CpuTemplate::Host,
        state_fd: None,
    }
}

#[derive(Default)]
struct TestWiring {
    lines: Vec<EventFd>,
    doorbells: BTreeMap<(u64, u32), EventFd>,
}

impl Wiring for TestWiring {
    fn interrupt(&mut self) -> Result<Line, WiringError> {
        let irqfd = EventFd::new(EFD_NONBLOCK).map_err(WiringError::EventFd)?;
        self.lines.push(irqfd.try_clone().map_err(WiringError::EventFd)?);
        Ok(Line { gsi: u32::try_from(self.lines.len()).unwrap(), irqfd })
    }

    fn doorbell(&mut self, address: u64, value: u32) -> Result<EventFd, WiringError> {
        let bell = EventFd::new(EFD_NONBLOCK).map_err(WiringError::EventFd)?;
        let ours = bell.try_clone().map_err(WiringError::EventFd)?;
        self.doorbells.insert((address, value), ours);
        Ok(bell)
    }
}

/// A device set with nothing around it.
pub(crate) struct Rig {
    pub(crate) devices: DeviceSet,
    pub(crate) memory: Memory,
    wiring: TestWiring,
    events: EventReceiver,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// With disks, rng and vsock.
    pub(crate) fn new(disks: Vec<Disk>) -> Self {
        Self::with(disks, Vec::new(), false)
    }

    /// Networks and the balloon come behind rng and vsock.
    pub(crate) fn with(disks: Vec<Disk>, networks: Vec<Network>, balloon: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vsock.sock");
        let vsock_fd = UnixListener::bind(&socket).unwrap().into_raw_fd();
        let config = config(disks, networks, vsock_fd, balloon);
        let mut fds = InheritedFds::claim(&config).unwrap();
        let memory = memory();
        let mut wiring = TestWiring::default();
        let (sender, events) = event::channel().unwrap();
        let devices =
            DeviceSet::new(&config, &mut fds, memory.clone(), &mut wiring, sender).unwrap();
        Self { devices, memory, wiring, events, socket, _folder: folder }
    }

    pub(crate) fn read(&self, device: usize, register: u32) -> u32 {
        let mut word = [0; 4];
        self.devices.read(self.devices.windows()[device].base, register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn write(&self, device: usize, register: u32, value: u32) {
        let base = self.devices.windows()[device].base;
        self.devices.write(base, register.into(), &value.to_le_bytes());
    }

    /// Does what a driver does up to DRIVER_OK, and returns the device's queues.
    pub(crate) fn start(&self, device: usize, features: u64) -> Vec<DriverQueue> {
        self.write(device, VIRTIO_MMIO_STATUS, 0);
        self.write(device, VIRTIO_MMIO_STATUS, 1 | 2);
        for (page, half) in [(0, features), (1, features >> 32)] {
            self.write(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            let half = u32::try_from(half & 0xffff_ffff).unwrap();
            self.write(device, VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.write(device, VIRTIO_MMIO_STATUS, 1 | 2 | 8);
        let queues = (0..)
            .take_while(|queue| {
                self.write(device, VIRTIO_MMIO_QUEUE_SEL, *queue);
                self.read(device, VIRTIO_MMIO_QUEUE_NUM_MAX) != 0
            })
            .map(|queue| self.set_up_queue(device, queue))
            .collect();
        self.write(device, VIRTIO_MMIO_STATUS, STARTED);
        queues
    }

    fn set_up_queue(&self, device: usize, queue: u32) -> DriverQueue {
        let base = DEVICE_STRIDE * (device as u64 + 1) + 0x4000 * u64::from(queue);
        // Whatever an earlier start left there is gone.
        self.memory.write_slice(&[0; 0x3000], GuestAddress(base)).unwrap();
        let part = |at: u64| u32::try_from(base + at).unwrap();
        self.write(device, VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into());
        self.write(device, VIRTIO_MMIO_QUEUE_DESC_LOW, part(0));
        self.write(device, VIRTIO_MMIO_QUEUE_AVAIL_LOW, part(0x1000));
        self.write(device, VIRTIO_MMIO_QUEUE_USED_LOW, part(0x2000));
        self.write(device, VIRTIO_MMIO_QUEUE_READY, 1);
        let address = self.devices.windows()[device].base + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
        DriverQueue {
            base,
            memory: self.memory.clone(),
            bell: self.wiring.doorbells[&(address, queue)].try_clone().unwrap(),
            line: self.wiring.lines[device].try_clone().unwrap(),
            next_descriptor: 0,
            offered: 0,
            taken: 0,
        }
    }

    /// Takes over what another rig saved: its memory, and the driver's side of the device's queues.
    pub(crate) fn take_over(&self, other: &Self, device: usize, queues: &mut [DriverQueue]) {
        let bytes = other.bytes(0, usize::try_from(MEMORY_BYTES).unwrap());
        self.store(0, &bytes);
        let address = self.devices.windows()[device].base + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
        for (index, queue) in (0..).zip(queues) {
            queue.memory = self.memory.clone();
            queue.bell = self.wiring.doorbells[&(address, index)].try_clone().unwrap();
            queue.line = self.wiring.lines[device].try_clone().unwrap();
        }
    }

    /// What lies in guest memory.
    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Puts `bytes` into guest memory.
    pub(crate) fn store(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Waits for the interrupt of `device`.
    pub(crate) fn wait_interrupt(&self, device: usize) {
        let line = &self.wiring.lines[device];
        wait_readable(line, "an interrupt");
        let _ = line.read();
    }

    /// Waits for the next report.
    pub(crate) fn event(&self) -> Event {
        wait_readable(self.events.bell(), "an event");
        let mut events = self.events.drain();
        assert_eq!(events.len(), 1, "{events:?}");
        events.remove(0)
    }

    /// Waits for the report that `device` stopped, and returns the reason.
    pub(crate) fn stopped(&self, device: usize) -> String {
        let Event::DeviceStopped { reason, .. } = self.event() else { panic!("another event") };
        assert_eq!(self.read(device, VIRTIO_MMIO_STATUS) & 64, 64, "NEEDS_RESET");
        reason
    }

    /// Starts `device` without queues. Whether that was reported.
    pub(crate) fn break_queue(&self, device: usize) -> bool {
        self.write(device, VIRTIO_MMIO_STATUS, 0);
        self.write(device, VIRTIO_MMIO_STATUS, 1 | 2);
        self.write(device, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(device, VIRTIO_MMIO_DRIVER_FEATURES, 1);
        self.write(device, VIRTIO_MMIO_STATUS, 1 | 2 | 8);
        self.write(device, VIRTIO_MMIO_STATUS, STARTED);
        // Answered after the start was.
        self.devices.pause();
        self.devices.resume();
        assert_eq!(self.read(device, VIRTIO_MMIO_STATUS), STARTED | 64);
        !self.events.drain().is_empty()
    }

    /// A client on the host side of the sockets.
    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        let patience = Duration::from_millis(PATIENCE_MS.unsigned_abs().into());
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_write_timeout(Some(patience)).unwrap();
        stream
    }
}

/// One buffer of a chain: address, length, and WRITE or 0.
pub(crate) type Piece = (u64, u32, u16);

/// The driver's side of one queue.
pub(crate) struct DriverQueue {
    base: u64,
    memory: Memory,
    bell: EventFd,
    line: EventFd,
    next_descriptor: u16,
    offered: u16,
    taken: u16,
}

impl DriverQueue {
    /// Writes one descriptor as it stands.
    pub(crate) fn describe(&self, index: u16, (address, len, flags): Piece, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = self.base + 16 * u64::from(index);
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that starts at `head` available, without a kick.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = self.base + 0x1004 + 2 * u64::from(self.offered % QUEUE_SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.offered = self.offered.wrapping_add(1);
        self.announce(self.offered);
    }

    /// Sets the available ring's index.
    pub(crate) fn announce(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.base + 0x1002)).unwrap();
    }

    pub(crate) fn kick(&self) {
        self.bell.write(1).unwrap();
    }

    /// Kicks for the chain offered last if the device asked for that by its event index.
    pub(crate) fn kick_if_wanted(&self) {
        let event = self.base + 0x2004 + 8 * u64::from(QUEUE_SIZE);
        // The index was moved before this; the device does it the other way round.
        fence(Ordering::SeqCst);
        let event: u16 = self.memory.read_obj(GuestAddress(event)).unwrap();
        if event == self.offered.wrapping_sub(1) {
            self.kick();
        }
    }

    /// Offers a good chain of `pieces`, without a kick. Returns its head.
    pub(crate) fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (left, piece) in (0..pieces.len()).rev().zip(pieces) {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % QUEUE_SIZE;
            let more = if left > 0 { NEXT } else { 0 };
            self.describe(index, (piece.0, piece.1, piece.2 | more), self.next_descriptor);
        }
        self.publish(head);
        head
    }

    /// The next chain that came back: its head and the bytes written, if there is one.
    pub(crate) fn try_take(&mut self) -> Option<(u32, u32)> {
        let used: u16 = self.memory.read_obj(GuestAddress(self.base + 0x2002)).unwrap();
        (used != self.taken).then(|| {
            let slot = self.base + 0x2004 + 8 * u64::from(self.taken % QUEUE_SIZE);
            self.taken = self.taken.wrapping_add(1);
            let head = self.memory.read_obj(GuestAddress(slot)).unwrap();
            (head, self.memory.read_obj(GuestAddress(slot + 4)).unwrap())
        })
    }

    /// Waits for the next chain to come back.
    pub(crate) fn take(&mut self) -> (u32, u32) {
        loop {
            // Where event indices are agreed on, asks to be told of the next one. Sequentially
            // consistent, since the ring is looked at after it.
            let event = GuestAddress(self.base + 0x1004 + 2 * u64::from(QUEUE_SIZE));
            self.memory.store(self.taken, event, Ordering::SeqCst).unwrap();
            fence(Ordering::SeqCst);
            if let Some(used) = self.try_take() {
                return used;
            }
            wait_readable(&self.line, "a buffer to come back");
            // Read before the ring is looked at again: a later interrupt is then seen.
            let _ = self.line.read();
        }
    }

    /// Offers, kicks and waits: the bytes written.
    pub(crate) fn ask(&mut self, pieces: &[Piece]) -> u32 {
        let head = self.offer(pieces);
        self.kick();
        let (back, written) = self.take();
        assert_eq!(back, u32::from(head));
        written
    }
}
