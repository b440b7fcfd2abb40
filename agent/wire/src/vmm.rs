//! Control of one VMM process: its configuration, read once from an inherited fd, and the messages
//! on its control socket.
//!
//! Every resource is an fd the VMM inherited; the configuration names them by number. The control
//! socket is an inherited *listening* Unix stream socket: an agent that restarts connects anew. A
//! new connection replaces the one before it.

use serde::{Deserialize, Serialize};

/// Number of the fd from which a VMM reads its one [`Config`] frame at start.
pub const CONFIG_FD: i32 = 3;

/// vsock port to which PID 1 of the guest connects, on host CID 2, once it serves
/// [`crate::guest::RPC_PORT`]. The VMM answers with a reset and sends [`Event::GuestReady`]: the
/// connection attempt is the whole message, so nothing of the guest's is parsed.
pub const READY_PORT: u32 = 1025;

/// The guest's vsock address. 2 is the host.
pub const GUEST_CID: u64 = 3;

/// What one microVM is made of. Sent as the one frame on [`CONFIG_FD`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub version: u16,
    /// vCPU threads, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 64; the memfd must have this size.
    pub memory_mib: u32,
    pub memory_fd: i32,
    /// True: the guest's writes stay with this process and never reach the memory file, which may
    /// be shared with others and open for reading only. False: the file is this guest's own memory.
    pub memory_private: bool,
    /// `/dev/userfaultfd`. With a memory file of the guest's own: the file is empty, and another
    /// process fills it while the guest goes on. It takes the userfaultfd that this process makes
    /// out of this process; as long as this one lives the fd is open here, so that no page that is
    /// missing becomes one of zeros.
    ///
    /// With [`Self::memory_private`]: only pages that are touched become part of this process, not
    /// their neighbours too, where this host's kernel can do that.
    pub userfault_fd: Option<i32>,
    /// With [`Self::memory_private`]: pages that the guest is known to write as soon as it goes on,
    /// at most [`WRITTEN_MAX`] runs. Only a hint.
    pub written: Vec<PageRun>,
    pub kvm_fd: i32,
    /// Uncompressed ELF kernel with a PVH note.
    pub kernel_fd: i32,
    pub initramfs_fd: i32,
    /// Kernel command line, at most 2047 bytes, without NUL.
    pub command_line: String,
    /// Listening Unix stream socket for [`ToVmm`] and [`ToAgent`] frames.
    pub control_fd: i32,
    /// Listening Unix stream socket through which the host reaches guest ports: the client sends
    /// `CONNECT <port>\n`, the VMM answers `OK <host port>\n` and then relays bytes, or closes.
    pub vsock_fd: i32,
    pub serial: Serial,
    /// virtio-blk devices in the order the guest sees them (`vda`, `vdb`, …).
    pub disks: Vec<Disk>,
    /// virtio-net devices in the order the guest sees them (`eth0`, …).
    pub networks: Vec<Network>,
    /// A balloon with free-page reporting: what the guest does not use goes back to the host.
    pub balloon: bool,
    pub cpu: CpuTemplate,
    /// A regular file with what [`Reply::Saved`] told, for [`ToVmm::Restore`].
    pub state_fd: Option<i32>,
}

/// Runs in [`Config::written`].
pub const WRITTEN_MAX: usize = 2048;

/// Pages of 4 KiB in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// The first, counted in the memory file.
    pub page: u64,
    pub count: u32,
}

/// What the guest's CPUs can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// All that this host's CPU and KVM can: quickest, but a snapshot only fits the same CPUs.
    #[default]
    Host,
    /// x86-64-v3 with AES and carry-less multiplication, and nothing beyond it that differs between
    /// CPUs: a snapshot fits every host of the same vendor that has it. On a host that lacks a part
    /// the VMM refuses to start.
    V3,
}

/// How much a device may do. `None`: as much as the host can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimits {
    /// Bytes of requests or frames, their headers included.
    pub bytes: Option<Rate>,
    /// Requests or frames.
    pub operations: Option<Rate>,
}

/// A token bucket: `per_second` in the long run, `burst` at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// At least 1.
    pub per_second: u64,
    /// At least 1, and at least what comes in [`BURST_MS_MIN`]: waits are that coarse.
    pub burst: u64,
}

/// A burst must last this many milliseconds at the rate it belongs to.
pub const BURST_MS_MIN: u64 = 10;

/// One virtio-net device on a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Attached to its interface, with IFF_NO_PI and IFF_VNET_HDR, one queue.
    pub tap_fd: i32,
    /// A unicast address.
    pub mac: [u8; 6],
    /// 1280 to 65535.
    pub mtu: u16,
    pub to_guest: IoLimits,
    pub from_guest: IoLimits,
}

/// The serial port's log: output only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serial {
    /// Opened for appending.
    pub log_fd: i32,
    /// Bytes after which output is dropped (a last line says so).
    pub bytes_max: u64,
}

/// One virtio-blk device: segments laid end to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// At most 20 bytes of ASCII, given to the guest as the device's serial number.
    pub name: String,
    pub read_only: bool,
    /// At least one; a writable disk has exactly one.
    pub segments: Vec<Segment>,
    pub limits: IoLimits,
}

/// A regular file shown as part of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    pub fd: i32,
    /// Length shown to the guest, a multiple of 4096 and not over the file's length.
    pub bytes: u64,
}

/// Agent to VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToVmm {
    /// First message of a connection. Answered by [`Reply::Hello`].
    Hello {
        version: u16,
    },
    /// Load the kernel and start the vCPUs. Asked twice it is answered [`Reply::Refused`].
    Boot,
    /// Stop the vCPUs and drain the devices.
    Pause,
    Resume,
    Stats,
    /// Let the guest give up memory until `target_mib` of its own are gone, or take them back down
    /// to that. Answered at once; [`Stats`] tell how far the guest has come.
    Balloon {
        target_mib: u32,
    },
    /// Give the guest a new generation id and tell it, as after a restore: its random number
    /// generator is seeded anew.
    RenewGeneration,
    /// End this process at once, without asking the guest. Answered, then [`Event::Exited`].
    Kill,
    /// Tell the state of everything but memory and disks. While paused; answered by
    /// [`Reply::Saved`]. The microVM can go on afterwards.
    Save,
    /// In place of [`ToVmm::Boot`]: take up the state in [`Config::state_fd`], with memory and disks
    /// as they were when it was told. Paused afterwards: renew the generation id, then resume.
    Restore,
}

/// VMM to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// Answers come in the order of the requests.
    Reply(Reply),
    Event(Event),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// What an agent that connects late must know.
    Hello {
        version: u16,
        phase: Phase,
    },
    Done,
    Stats(Stats),
    /// The request does not fit the phase, or failed; the VMM goes on as it was. After a restore
    /// that failed it can only be ended.
    Refused {
        reason: String,
    },
    /// The state of CPUs and devices, to be kept with the memory as it is now.
    Saved {
        #[serde(with = "serde_bytes")]
        state: Vec<u8>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Configured, not booted.
    Waiting,
    /// Booted; PID 1 has not reported.
    Booting,
    /// PID 1 serves.
    Ready,
    Paused,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    GuestReady,
    /// A device was stopped because the guest broke its protocol. The microVM goes on.
    DeviceStopped {
        device: String,
        reason: String,
    },
    /// Last message of the VMM; its exit code is [`Exit::code`].
    Exited(Exit),
}

/// Why a microVM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    PowerOff,
    Reset,
    GuestPanic,
    /// The guest did what cannot be carried on from (triple fault, failed entry).
    GuestFault(String),
    /// The agent asked.
    Killed,
    /// Our side failed.
    VmmError(String),
}

impl Exit {
    /// Exit code of the VMM process, for whoever only sees its wait status.
    pub const fn code(&self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::VmmError(_) => 1,
            Self::Reset => 10,
            Self::GuestPanic => 11,
            Self::GuestFault(_) => 12,
            Self::Killed => 13,
        }
    }

    /// What a wait status says when the VMM's last message was not received. `None`: not one of
    /// ours.
    pub fn from_code(code: i32) -> Option<Self> {
        Some(match code {
            0 => Self::PowerOff,
            1 => Self::VmmError("see the VMM's log".to_owned()),
            10 => Self::Reset,
            11 => Self::GuestPanic,
            12 => Self::GuestFault("see the VMM's log".to_owned()),
            13 => Self::Killed,
            _ => return None,
        })
    }
}

/// Counters since the VMM started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// VM exits to user space, all vCPUs.
    pub exits: Exits,
    pub disks: Vec<DiskStats>,
    pub networks: Vec<NetworkStats>,
    /// `None`: there is no balloon.
    pub balloon: Option<BalloonStats>,
    pub vsock_rx_bytes: u64,
    pub vsock_tx_bytes: u64,
    /// Bytes of serial output, dropped ones included.
    pub serial_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    pub mmio: u64,
    pub port_io: u64,
    pub other: u64,
}

impl Exits {
    pub const fn total(&self) -> u64 {
        self.mmio + self.port_io + self.other
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub requests: u64,
    pub errors: u64,
}

/// As the guest sees it: received is what went to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStats {
    pub received_bytes: u64,
    pub received_frames: u64,
    pub sent_bytes: u64,
    pub sent_frames: u64,
    /// Frames either way that the guest's driver or the tap could not take.
    pub dropped_frames: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStats {
    pub target_mib: u32,
    /// What the guest has given up so far, as its driver says.
    pub actual_mib: u32,
    /// Bytes given back to the host, by the balloon and by reports of free pages. A page that is
    /// used and freed again counts again.
    pub given_back_bytes: u64,
}
