//! Sizes of every queue, log and buffer of the VMM, and the reason for each: one list, so that what
//! one microVM can make this process hold is seen at a glance. Places are in `layout`.
//!
//! Whatever is full refuses, drops or waits as said here; nothing grows with what a guest does.

/// The configuration, read once.
pub(crate) mod config {
    /// vCPUs of one microVM. The largest tier has 4; APIC ids and one thread each set no tighter
    /// limit.
    pub(crate) const VCPUS_MAX: u8 = 32;
    /// Below this a kernel with its initramfs does not fit.
    pub(crate) const MEMORY_MIB_MIN: u32 = 64;
    /// Guest memory ends where a 40-bit physical address does, which every host has.
    pub(crate) const MEMORY_MIB_MAX: u32 = 1 << 19;
    /// Least that IPv6 asks of a link.
    pub(crate) const MTU_MIN: u16 = 1280;
    /// Largest configuration frame: some dozens of disk segments and one command line.
    pub(crate) const CONFIG_BYTES_MAX: usize = 64 * 1024;
}

/// The control socket.
pub(crate) mod control {
    /// Bytes of requests that may wait for their end. Requests have some bytes each.
    pub(crate) const REQUEST_BYTES_MAX: usize = 4096;
    /// Bytes of answers an agent may leave unread. Stats of many disks take one or two KiB, a saved
    /// state up to [`super::state::STATE_BYTES_MAX`].
    pub(crate) const UNSENT_BYTES_MAX: usize = 320 * 1024;
    /// Events kept while no agent is connected. More are dropped, the oldest first.
    pub(crate) const EVENTS_KEPT_MAX: usize = 32;
    /// Events waiting for the control thread. Devices report once in their life and PID 1 once per
    /// boot, so more than this is a guest that makes noise and what is over is dropped.
    pub(crate) const EVENTS_WAITING_MAX: usize = 128;
}

/// What a snapshot keeps of CPUs and devices.
pub(crate) mod state {
    /// Bytes of it, read from a file or told to the agent: a frame less its head. A test holds
    /// a machine of one vCPU to 16 KiB.
    pub(crate) const STATE_BYTES_MAX: usize = 255 * 1024;
    /// Model-specific registers of one vCPU, of which KVM lists some hundred.
    pub(crate) const MSRS_MAX: usize = 512;
}

/// Threads: one a vCPU, one a device, and the first, which serves the control socket.
pub(crate) mod threads {
    /// Stack of a vCPU's thread. Its deepest call is a device register access; a guard page
    /// follows.
    pub(crate) const VCPU_STACK_BYTES: usize = 64 * 1024;
    /// Stack of a device's thread. Workers keep no large values on it.
    pub(crate) const DEVICE_STACK_BYTES: usize = 128 * 1024;
    /// fds looked at in one turn of a device.
    pub(crate) const EVENTS_PER_TURN: usize = 16;
    /// Stops of one device that are reported. A driver that resets and breaks it again and again
    /// only repeats itself.
    pub(crate) const STOPS_REPORTED_MAX: u32 = 4;
}

/// The serial port. How long its log may be is configured.
pub(crate) mod serial {
    /// Bytes kept until a line ends: a write to the log per byte would cost more than the exit.
    pub(crate) const LINE_BYTES_MAX: usize = 256;
    /// Errors of the host that go to the VMM's own log; a disk that is full gives one for every line
    /// of a guest that writes nothing but ends of lines.
    pub(crate) const ERRORS_LOGGED_MAX: u32 = 16;
}

/// Disks.
pub(crate) mod blk {
    /// Requests in flight, as far as their descriptors reach.
    pub(crate) const QUEUE_SIZES: &[u16] = &[256];
    /// Buffers of one request beside its header and status.
    pub(crate) const SEGMENTS_MAX: u16 = QUEUE_SIZES[0] - 2;
    /// Requests answered in one go: few, since each may wait for the host's disk.
    pub(crate) const BATCH: usize = 8;
    /// Reads that wait for the host's disk side by side, and are then answered in one go: what an
    /// NVMe drive does at once with ease. Fewer where they are of [`TRANSFER_BYTES_MAX`] together.
    pub(crate) const READS_AT_ONCE_MAX: usize = 32;
    /// Bytes of one read or write. Linux asks for 1.25 MiB at most unless told otherwise; the limit
    /// keeps the wait for a pause short.
    pub(crate) const TRANSFER_BYTES_MAX: usize = 64 << 20;
    /// Sectors of one range of a discard: 1 GiB, so that one request is done in a moment.
    pub(crate) const RANGE_SECTORS_MAX: u32 = 1 << 21;
    /// Ranges of one discard.
    pub(crate) const RANGES_MAX: u32 = 16;
    /// Pieces of memory one read or write call takes (Linux's UIO_MAXIOV); we go on with the rest.
    pub(crate) const PIECES_MAX: usize = 1024;
    /// Errors of the host that go to the log; a disk that is full says so on every write.
    pub(crate) const ERRORS_LOGGED_MAX: u64 = 16;
}

/// Entropy.
pub(crate) mod rng {
    /// Linux keeps one request in flight.
    pub(crate) const QUEUE_SIZES: &[u16] = &[16];
    /// Requests handled in one go.
    pub(crate) const BATCH: usize = 16;
    /// Bytes given for one request; the rest of a longer buffer stays as it is. Linux asks for at
    /// most one cache line or page at a time, and a driver that wants more asks again.
    pub(crate) const REQUEST_BYTES_MAX: usize = 4096;
    /// Bytes fetched from the host at a time.
    pub(crate) const STEP_BYTES: usize = 256;
}

/// Sockets.
pub(crate) mod vsock {
    /// Receive, transmit, events. Linux keeps the receive queue full of 4 KiB buffers, so its size
    /// is guest memory.
    pub(crate) const QUEUE_SIZES: &[u16] = &[128, 128, 16];
    /// Packets handled in one go, each way.
    pub(crate) const BATCH: usize = 64;
    /// Resets waiting for the guest to offer buffers. While they are this many its packets are left
    /// in the queue: a guest that does not listen is not listened to.
    pub(crate) const REFUSALS_MAX: usize = 128;
    /// Connections at a time. Each may hold 64 KiB of the guest's data for a host client that does
    /// not read, so this bounds the memory a guest can make us use to 16 MiB.
    pub(crate) const CONNECTIONS_MAX: usize = 256;
    /// Room for the guest's data in one connection, beyond what the host's socket holds. Allocated
    /// only as far as the host side is slow.
    pub(crate) const ROOM_BYTES: u32 = 64 * 1024;
    /// Bytes copied at a time from the guest into the backlog.
    pub(crate) const COPY_BYTES: usize = 1024;
}

/// Networks.
pub(crate) mod net {
    /// Receive and transmit. Linux keeps the receive queue full of buffers of 1.5 KiB and more, so
    /// its size is guest memory; a large segment takes up to 44 of them.
    pub(crate) const QUEUE_SIZES: &[u16] = &[256, 256];
    /// Frames handled in one go, each way.
    pub(crate) const BATCH: usize = 64;
    /// The longest frame: an IP packet of 65535 bytes behind an Ethernet header with a VLAN tag.
    /// One frame to the guest is held by us, with its header; frames from the guest never are.
    pub(crate) const FRAME_BYTES_MAX: usize = 65_535 + 18;
    /// Errors of the host that go to the log; a tap whose interface is down gives one for every
    /// frame.
    pub(crate) const ERRORS_LOGGED_MAX: u32 = 16;
}

/// The balloon.
pub(crate) mod balloon {
    /// Inflate, deflate, reports. Linux keeps one request in flight on the first two, and puts up
    /// to 32 ranges into one report.
    pub(crate) const QUEUE_SIZES: &[u16] = &[16, 16, 32];
    /// Requests handled in one go, of each queue.
    pub(crate) const BATCH: usize = 16;
    /// Pages named in one request. Linux names up to 256.
    pub(crate) const NAMED_MAX: usize = 1024;
}
