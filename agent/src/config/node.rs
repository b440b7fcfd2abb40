//! Of the node itself: where it listens, what it is made of, what it has and gives away.

use std::{net::SocketAddr, path::PathBuf};

use holdfast_model::Secret;
use serde::{Deserialize, Serialize};

/// The public listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    pub listen: SocketAddr,
    /// Names and addresses added to the node's certificate besides the ones found on the node.
    pub server_names: Vec<String>,
    /// `None`: one is made at first boot and left in `admin-token` in the state folder.
    #[serde(skip_serializing)]
    pub admin_token: Option<Secret>,
}

/// Folders and programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    pub state: PathBuf,
    pub run: PathBuf,
    /// Cgroup that holds a sub-cgroup per sandbox; made if it is missing.
    pub cgroups: PathBuf,
    /// Read-only image store that came with the host image; may be missing.
    pub baked_images: PathBuf,
    pub vmm: PathBuf,
    /// The tiny parent of each VMM.
    pub shim: PathBuf,
    pub convert: PathBuf,
    /// Fills guest memory of cold resumes.
    pub pager: PathBuf,
    /// What carries sandboxes' connections on, one a group.
    pub egress: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// What the scheduler may give away, as factors of what the node has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capacity {
    pub memory_factor: f64,
    pub cpu_factor: f64,
    /// MiB of memory kept for the host itself.
    pub host_memory_mib: u32,
}

/// How the host keeps sandboxes from each other's traces in its hardware.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    pub smt: Smt,
}

/// What runs on the other hardware threads of a core while a guest runs on one of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Smt {
    /// The same sandbox, or nothing. Closes the way between sandboxes at the price of idle threads.
    /// No sandbox starts on a kernel that cannot do it, and Debian's cannot.
    CoreScheduling,
    /// Nothing ever: the agent switches the threads off at its start. The default: it works on
    /// every kernel, and closes the way to the host's kernel too.
    #[default]
    Off,
    /// Whatever the kernel puts there.
    Ignore,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections to the API. More wait in the kernel's queue.
    pub connections_max: u32,
    /// Sandboxes on this node, in whatever state.
    pub sandboxes_max: u32,
    /// Snapshots that clients asked for and that are there.
    pub snapshots_max: u32,
    /// MiB of one file written through the API.
    pub file_mib_max: u32,
    /// MiB of one imported image archive.
    pub archive_mib_max: u32,
    /// MiB a second that a sandbox of one CPU may read from the disk below the state folder, and as
    /// many write; others in proportion to their CPU. 0 is no limit.
    pub io_mib_per_second: u32,
    /// Reads a second, and as many writes, in the same way. 0 is no limit.
    pub io_operations_per_second: u32,
    /// MiB a second that a sandbox of one CPU may send, and as many receive; others in proportion
    /// to their CPU. 0 is no limit.
    pub network_mib_per_second: u32,
    /// Frames a second each way, in the same way. 0 is no limit.
    pub network_frames_per_second: u32,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8443)),
            server_names: Vec::new(),
            admin_token: None,
        }
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            state: "/var/lib/holdfast".into(),
            run: "/run/holdfast".into(),
            cgroups: "/sys/fs/cgroup/holdfast.slice/holdfast-sandboxes.service".into(),
            baked_images: "/usr/share/holdfast/images".into(),
            vmm: "/usr/lib/holdfast/holdfast-vmm".into(),
            shim: "/usr/lib/holdfast/holdfast-shim".into(),
            convert: "/usr/lib/holdfast/holdfast-convert".into(),
            pager: "/usr/lib/holdfast/holdfast-pager".into(),
            egress: "/usr/lib/holdfast/holdfast-egress".into(),
            kernel: "/usr/lib/holdfast/guest/vmlinux".into(),
            initramfs: "/usr/lib/holdfast/guest/initramfs.cpio".into(),
        }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        // Memory that is not there kills a neighbour, CPU that is not there slows one down.
        Self { memory_factor: 1.0, cpu_factor: 4.0, host_memory_mib: 512 }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            sandboxes_max: 1000,
            snapshots_max: 1000,
            file_mib_max: 1024,
            archive_mib_max: 16 * 1024,
            // A quarter of a slow NVMe drive's bandwidth: four busy sandboxes of one CPU fill it,
            // and one alone leaves most of it to others.
            io_mib_per_second: 400,
            io_operations_per_second: 10_000,
            // A gigabit a second, in frames of a usual size.
            network_mib_per_second: 125,
            network_frames_per_second: 100_000,
        }
    }
}

impl Paths {
    /// The writable image store.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Disks of sandboxes, a folder each.
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }
}
