//! How much of the machine the workload may use: all but what PID 1 and the kernel need to go on
//! serving while the workload is at its limit.

use holdfast_wire::guest::Failure;

use crate::{cgroup::Limits, failure::from_io};

/// Kept back for PID 1 and for what the kernel does not charge to the workload.
const RESERVE_BYTES_MIN: u64 = 16 << 20;
const RESERVE_BYTES_MAX: u64 = 64 << 20;
/// The reserve as a share of memory, between the two.
const RESERVE_SHARE: u64 = 16;

/// Below it nothing useful runs; a machine this small gets it all the same, and may run out.
const MEMORY_BYTES_MIN: u64 = 16 << 20;

/// Most processes and threads of a workload: 2768 below the kernel's largest pid, for its own.
const PROCESSES_MAX: u64 = 30_000;

/// Bytes as `/proc/meminfo` counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub total: u64,
    pub available: u64,
}

impl Memory {
    pub fn parse(meminfo: &str) -> Self {
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        let read = |name| field(name).unwrap_or_default();
        Self { total: read("MemTotal:"), available: read("MemAvailable:") }
    }

    /// What the machine says now; zeroes where it does not.
    pub fn read() -> Self {
        fs_err::read_to_string("/proc/meminfo").map(|text| Self::parse(&text)).unwrap_or_default()
    }
}

/// What a machine of this memory keeps back.
pub(crate) fn reserve_bytes(memory: Memory) -> u64 {
    (memory.total / RESERVE_SHARE).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX)
}

/// Limits for a machine with this memory and this many threads at most.
pub fn limits(memory: Memory, threads_max: u64) -> Limits {
    let reserve = reserve_bytes(memory);
    let memory_bytes = memory.available.saturating_sub(reserve).max(MEMORY_BYTES_MIN);
    // A quarter stays for the kernel and PID 1.
    let processes = (threads_max / 4 * 3).clamp(1, PROCESSES_MAX);
    Limits { memory_bytes, processes }
}

/// Limits for this machine.
pub fn of_this_machine() -> Result<Limits, Failure> {
    let path = "/proc/sys/kernel/threads-max";
    let text =
        fs_err::read_to_string(path).map_err(|error| from_io("cannot read a limit", &error))?;
    Ok(limits(Memory::read(), text.trim().parse().unwrap_or(PROCESSES_MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn meminfo_is_read_in_bytes_and_what_is_missing_is_zero() {
        let text = "MemTotal:         500000 kB\nMemFree:  1 kB\nMemAvailable:     450000 kB\n";
        assert_eq!(Memory::parse(text), Memory { total: 512_000_000, available: 460_800_000 });
        assert_eq!(Memory::parse("MemTotal: x kB"), Memory::default());
    }

    #[test]
    fn the_reserve_grows_with_the_machine_between_its_bounds() {
        for (total, reserve) in [(128, 16), (512, 32), (8192, 64)] {
            let memory = Memory { total: total * MIB, available: total * MIB };
            let expected = (total - reserve) * MIB;
            assert_eq!(limits(memory, 1000).memory_bytes, expected, "{total} MiB");
        }
    }

    #[test]
    fn no_limit_is_ever_zero() {
        let least = limits(Memory::default(), 0);
        assert_eq!(least, Limits { memory_bytes: MEMORY_BYTES_MIN, processes: 1 });
        assert_eq!(limits(Memory::default(), u64::MAX).processes, PROCESSES_MAX);
    }
}
