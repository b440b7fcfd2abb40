//! What a sandbox is asked to be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{DiskImageId, Mib, MilliCpu, SnapshotId};

/// CPU, memory and disk of one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpu: MilliCpu,
    pub memory: Mib,
    pub disk: Mib,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadResources {
    #[error("cpu {0} is outside 250m to 4000m")]
    Cpu(MilliCpu),
    #[error("memory {memory} is outside 128Mi to {max} (2Gi a core)")]
    Memory { memory: Mib, max: Mib },
    #[error("disk {disk} is outside 1Gi to {max}")]
    Disk { disk: Mib, max: Mib },
}

impl Resources {
    /// Tier M: 1 CPU, 2 GiB of memory, 20 GiB of disk.
    pub const DEFAULT: Self = Self { cpu: MilliCpu(1000), memory: Mib(2048), disk: Mib(20 * 1024) };

    /// Checks the amounts against the tiers: memory at most 2 GiB a core, disk at most 20 GiB a
    /// core and never less allowed than 20 GiB.
    pub fn new(cpu: MilliCpu, memory: Mib, disk: Option<Mib>) -> Result<Self, BadResources> {
        if !(250..=4000).contains(&cpu.0) {
            return Err(BadResources::Cpu(cpu));
        }
        let memory_max = Mib(cpu.0 * 2048 / 1000);
        if memory < Mib(128) || memory > memory_max {
            return Err(BadResources::Memory { memory, max: memory_max });
        }
        let disk_max = Mib((cpu.0 * 20 * 1024 / 1000).max(20 * 1024));
        let disk = disk.unwrap_or(disk_max);
        if disk < Mib(1024) || disk > disk_max {
            return Err(BadResources::Disk { disk, max: disk_max });
        }
        Ok(Self { cpu, memory, disk })
    }

    /// vCPUs the guest sees: the CPU amount rounded up. Its cgroup holds it to the amount itself.
    pub fn vcpus(&self) -> u8 {
        u8::try_from(self.cpu.0.div_ceil(1000)).unwrap_or(u8::MAX)
    }
}

/// Which disk image a sandbox is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageSource {
    /// One of the group's own.
    Disk(DiskImageId),
    /// One that every group of the node has, by name.
    Public(String),
}

/// What a sandbox is asked to be; everything in it was checked at the door.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    pub image: ImageSource,
    pub resources: Resources,
    pub labels: BTreeMap<String, String>,
    pub environment: BTreeMap<String, String>,
    /// `None`: the image's. Empty: nothing is started.
    pub entrypoint: Option<Vec<String>>,
    /// `None`: the image's.
    pub cmd: Option<Vec<String>>,
    /// As the client sent it, returned as it came.
    pub lifecycle_json: Option<String>,
    /// Its egress policy. `None`: nobody gave one, and nothing leaves.
    #[serde(default)]
    pub egress_json: Option<String>,
    /// Its flows pass its group's proxy by, where its policy lets them: by address alone.
    #[serde(default)]
    pub skip_egress_proxy: bool,
}

impl SandboxSpec {
    /// What is asked for by naming an image and nothing else.
    pub fn of_image(image: ImageSource) -> Self {
        Self {
            image,
            resources: Resources::DEFAULT,
            labels: BTreeMap::new(),
            environment: BTreeMap::new(),
            entrypoint: None,
            cmd: None,
            lifecycle_json: None,
            egress_json: None,
            skip_egress_proxy: false,
        }
    }
}

/// What a sandbox is to be that is made from a snapshot. The rest is as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneSpec {
    pub snapshot: SnapshotId,
    /// Those of the sandbox that was saved are that one's own.
    pub labels: BTreeMap<String, String>,
    /// `None`: as it was.
    pub lifecycle_json: Option<String>,
    /// `None`: as it was.
    pub egress_json: Option<String>,
}

/// What a new sandbox is asked to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewSandbox {
    OfImage(SandboxSpec),
    OfSnapshot(CloneSpec),
}

impl From<SandboxSpec> for NewSandbox {
    fn from(spec: SandboxSpec) -> Self {
        Self::OfImage(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tier_fits_and_has_its_vcpus() {
        let tiers =
            [(250, 512, 1), (500, 1024, 1), (1000, 2048, 1), (2000, 4096, 2), (4000, 8192, 4)];
        for (cpu, memory, vcpus) in tiers {
            let resources = Resources::new(MilliCpu(cpu), Mib(memory), None).unwrap();
            assert_eq!(resources.vcpus(), vcpus, "cpu {cpu}");
        }
    }

    #[test]
    fn amounts_outside_the_tiers_are_refused_by_name() {
        let cases = [
            (Resources::new(MilliCpu(0), Mib(512), None), "cpu"),
            (Resources::new(MilliCpu(250), Mib(513), None), "memory"),
            (Resources::new(MilliCpu(250), Mib(64), None), "memory"),
            (Resources::new(MilliCpu(1000), Mib(512), Some(Mib(20_481))), "disk"),
        ];
        for (outcome, name) in cases {
            assert!(outcome.unwrap_err().to_string().starts_with(name));
        }
    }
}
