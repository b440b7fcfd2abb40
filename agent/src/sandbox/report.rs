//! What a resume came to: how long each part of it took, what was read for it, what was mended. A
//! clone, which begins as a resume does, has one too.

use holdfast_snapshot::PAGE_BYTES;

use super::{
    filling::Filling,
    launch::{BootPhases, MadeIn},
};

/// Where the memory came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Warmth {
    /// A file of plain memory, mapped.
    Hot,
    /// The pieces of the snapshot, read and unpacked: before a clone goes on, while a resume does.
    #[default]
    Cold,
    /// Nowhere: it booted from its disk.
    Booted,
}

impl Warmth {
    pub const ALL: [Self; 3] = [Self::Hot, Self::Cold, Self::Booted];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Cold => "cold",
            Self::Booted => "booted",
        }
    }
}

/// What was read before the guest ran, or is while it does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    pub warmth: Warmth,
    /// Stored bytes, compressed.
    pub bytes: u64,
    pub frames: u64,
    /// Of memory that are not zero, 4 KiB each. 0 while they are being brought.
    pub pages: u64,
    /// Times the guest waited for one of them, once all are there.
    pub faults: Option<u64>,
}

/// How long each part of a resume took, in microseconds. Parts that overlap or wait for nobody are
/// in the total only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResumePhases {
    /// Finding the image, and room on the node.
    pub admission_us: u64,
    /// Opening the snapshot; of a cold clone, writing its memory too.
    pub memory_us: u64,
    /// The copy of the disk.
    pub disk_us: u64,
    /// Cgroup, run folder, network slot, descriptors.
    pub jail_us: u64,
    /// The VMM's process, until it answered.
    pub spawn_us: u64,
    /// Devices and CPUs, until they run; of one that boots, until PID 1 serves.
    pub restore_us: u64,
    /// Until the guest has its clock and, as a clone, its names; of one that boots, its entrypoint.
    pub tell_us: u64,
    /// From the call until the record says Running.
    pub total_us: u64,
}

impl ResumePhases {
    pub const NAMES: [&'static str; 8] =
        ["admission", "memory", "disk", "jail", "spawn", "restore", "tell", "total"];

    /// Names and microseconds, in their order.
    pub fn list(&self) -> [(&'static str, u64); 8] {
        let Self { admission_us, memory_us, disk_us, jail_us, spawn_us, .. } = *self;
        let Self { restore_us, tell_us, total_us, .. } = *self;
        let times =
            [admission_us, memory_us, disk_us, jail_us, spawn_us, restore_us, tell_us, total_us];
        std::array::from_fn(|place| (Self::NAMES[place], times[place]))
    }
}

/// What the guest mended when it went on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mended {
    /// How far its clock was behind, in nanoseconds; negative: ahead.
    pub skew_ns: i64,
    /// Its TCP connections to others, which these have forgotten. `None`: the guest is of a release
    /// that does not look.
    pub connections_reset: Option<u32>,
}

/// What a resume came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResumeReport {
    pub phases: ResumePhases,
    pub fetched: Fetched,
    /// `None` of one that booted.
    pub mended: Option<Mended>,
}

impl ResumeReport {
    /// With what is known by now of memory that was brought while the guest ran.
    pub(super) fn now(mut self, filling: Option<&Filling>) -> Self {
        if let Some(arrived) = filling.and_then(Filling::arrived) {
            self.fetched.pages = arrived.bytes / PAGE_BYTES as u64;
            self.fetched.faults = Some(arrived.faults);
        }
        self
    }

    /// With what is known of the machine's making and of its way to a guest that serves.
    pub(super) fn with(mut self, made: MadeIn, boot: &BootPhases) -> Self {
        self.phases.disk_us = made.disk_us;
        self.phases.jail_us = made.jail_us;
        self.phases.spawn_us = made.spawn_us + boot.spawn_us;
        self.phases.restore_us = boot.boot_us;
        self.phases.tell_us = boot.start_us;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_listed_under_its_own_name() {
        let phases = ResumePhases {
            admission_us: 1,
            memory_us: 2,
            disk_us: 3,
            jail_us: 4,
            spawn_us: 5,
            restore_us: 6,
            tell_us: 7,
            total_us: 8,
        };
        let text = phases.list().map(|(name, us)| format!("{name} {us}")).join(", ");
        let expected = "admission 1, memory 2, disk 3, jail 4, spawn 5, restore 6, tell 7, total 8";
        assert_eq!(text, expected);
    }
}
