//! One function a check: reads what the kernel shows, says whether it is well.

use fs_err as fs;
use holdfast_api::node::HostCheck;

use super::{Host, SMT_CONTROL, failed, ok, warning};
use crate::config::Smt;

const VULNERABILITIES: &str = "sys/devices/system/cpu/vulnerabilities";

/// Programs that take a core dump and keep nothing of it.
const DUMP_SINKS: [&str; 3] = ["/bin/false", "/usr/bin/false", "/bin/true"];

/// Words of the kernel's command line that switch a mitigation off. `nosmt` and the like only add.
const MITIGATIONS_OFF: [&str; 15] = [
    "mitigations=off",
    "nopti",
    "pti=off",
    "nospectre_v1",
    "nospectre_v2",
    "spectre_v2=off",
    "spectre_v2_user=off",
    "spec_store_bypass_disable=off",
    "l1tf=off",
    "mds=off",
    "tsx_async_abort=off",
    "mmio_stale_data=off",
    "retbleed=off",
    "spec_rstack_overflow=off",
    "kvm-intel.vmentry_l1d_flush=never",
];

/// The jail does without where there is none: its root is empty all the same. One wall less.
pub(super) fn landlock(version: Option<u32>) -> HostCheck {
    const NAME: &str = "landlock";
    // The first that denies TCP, abstract sockets and signals to processes outside.
    const WHOLE: u32 = 6;
    let remedy = "boot a kernel of 6.12 or newer with landlock among the words of lsm=";
    match version {
        None => warning(NAME, "off: jails are without it", remedy),
        Some(version) if version < WHOLE => {
            warning(NAME, format!("version {version} denies less than {WHOLE} would"), remedy)
        }
        Some(version) => ok(NAME, format!("version {version}")),
    }
}

impl Host {
    pub(super) fn kvm(&self) -> HostCheck {
        if self.path("dev/kvm").exists() {
            return ok("kvm", "/dev/kvm is there");
        }
        let remedy = "switch VT-x or AMD-V on in the firmware, and load kvm_intel or kvm_amd";
        failed("kvm", "/dev/kvm is missing: no sandbox can run", remedy)
    }

    /// A core dump of a VMM holds its guest's memory. Limits keep our processes from writing a
    /// file, but a program behind a pipe is handed the dump whatever the limit.
    pub(super) fn core_dumps(&self) -> HostCheck {
        let pattern = self.read("proc/sys/kernel/core_pattern").unwrap_or_default();
        let Some(program) = pattern.strip_prefix('|') else {
            return ok("core dumps", "no process of a sandbox or of the agent may leave one");
        };
        let program = program.split_whitespace().next().unwrap_or_default();
        if DUMP_SINKS.contains(&program) {
            return ok("core dumps", format!("go to {program}, which keeps nothing"));
        }
        let remedy = "sysctl kernel.core_pattern='|/usr/bin/false'";
        warning("core dumps", format!("are handed to {program}, with guests' memory"), remedy)
    }

    /// KSM lets one guest find out by timing what another has in memory.
    pub(super) fn same_page_merging(&self) -> HostCheck {
        match self.read("sys/kernel/mm/ksm/run").as_deref() {
            Some("1") => {
                let remedy = "echo 2 > /sys/kernel/mm/ksm/run";
                warning("ksm", "equal pages of different guests are merged", remedy)
            }
            Some(_) => ok("ksm", "off"),
            None => ok("ksm", "this kernel has none"),
        }
    }

    pub(super) fn mitigations(&self) -> HostCheck {
        const NAME: &str = "mitigations";
        let line = self.read("proc/cmdline").unwrap_or_default();
        let off: Vec<&str> =
            line.split_whitespace().filter(|word| MITIGATIONS_OFF.contains(word)).collect();
        if !off.is_empty() {
            let detail = format!("switched off by the kernel's command line: {}", off.join(" "));
            return warning(NAME, detail, "boot without it");
        }
        let open = self.vulnerabilities(|state| state.starts_with("Vulnerable"));
        if open.is_empty() {
            return ok(NAME, "on for everything this CPU is known to have");
        }
        let detail = format!("none against {}", open.join(", "));
        warning(NAME, detail, "update the CPU's microcode and the host image")
    }

    /// `apart`: whether the kernel has core scheduling.
    pub(super) fn hardware_threads(&self, smt: Smt, apart: bool) -> HostCheck {
        const NAME: &str = "smt";
        if self.read("sys/devices/system/cpu/smt/active").as_deref() != Some("1") {
            return ok(NAME, "no core runs several threads");
        }
        let leaks = self.vulnerabilities(|state| state.contains("SMT vulnerable"));
        match smt {
            Smt::Off => {
                let control = self.read(SMT_CONTROL).unwrap_or_default();
                let detail = format!("threads could not be switched off (control: {control})");
                warning(NAME, detail, "boot with nosmt")
            }
            Smt::Ignore => warning(
                NAME,
                "different sandboxes may share a core at the same time (host.smt = \"ignore\")",
                "set host.smt to \"core-scheduling\"",
            ),
            Smt::CoreScheduling if !apart => failed(
                NAME,
                "the kernel has no core scheduling: no sandbox can run",
                "boot a kernel with CONFIG_SCHED_CORE, or set host.smt to \"off\"",
            ),
            Smt::CoreScheduling if !leaks.is_empty() => warning(
                NAME,
                format!(
                    "sandboxes share no core, but on this CPU a guest may watch the host's kernel \
                     at work on another thread: {}",
                    leaks.join(", ")
                ),
                "set host.smt to \"off\" if sandboxes are hostile to the host's secrets",
            ),
            Smt::CoreScheduling => ok(NAME, "on; no two sandboxes share a core at the same time"),
        }
    }

    /// Guests' memory is never swapped (their cgroups say so); the agent's would be.
    pub(super) fn swap(&self) -> HostCheck {
        let table = self.read("proc/swaps").unwrap_or_default();
        let areas: Vec<&str> =
            table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
        if areas.is_empty() {
            return ok("swap", "none");
        }
        let detail = format!("the agent's memory, tokens in it, may go to {}", areas.join(", "));
        warning("swap", detail, "swapoff --all")
    }

    /// Names of the CPU's weaknesses whose state is wanted.
    fn vulnerabilities(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(VULNERABILITIES)) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut found: Vec<String> = names
            .filter(|name| {
                self.read(&format!("{VULNERABILITIES}/{name}")).is_some_and(|state| wanted(&state))
            })
            .collect();
        found.sort();
        found
    }
}

#[cfg(test)]
mod tests {
    use holdfast_api::node::Verdict;

    use super::*;

    /// A host that shows `files` and nothing else.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        let host = Host::from(root.path());
        (root, host)
    }

    const SMT_ON: (&str, &str) = ("sys/devices/system/cpu/smt/active", "1");
    const MDS: &str = "sys/devices/system/cpu/vulnerabilities/mds";

    #[test]
    fn a_host_as_the_image_sets_it_up_passes_every_check() {
        let (_root, host) = host(&[
            ("dev/kvm", ""),
            ("proc/sys/kernel/core_pattern", "|/usr/bin/false"),
            ("sys/kernel/mm/ksm/run", "0"),
            ("proc/cmdline", "ro quiet mitigations=auto"),
            (MDS, "Mitigation: Clear CPU buffers"),
            ("proc/swaps", "Filename Type Size Used Priority"),
        ]);
        // What the machine of the test has is no part of the image.
        let checks = host.examine(Smt::CoreScheduling).into_iter();
        for check in checks.filter(|check| check.name != "landlock") {
            assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
            assert_eq!(check.remedy, None, "{check:?}");
        }
    }

    #[test]
    fn core_dumps_that_reach_a_program_are_a_warning_whatever_the_limit() {
        let pattern = "|/usr/lib/systemd/systemd-coredump %P";
        let (_root, piped) = host(&[("proc/sys/kernel/core_pattern", pattern)]);
        let check = piped.core_dumps();
        assert_eq!(check.verdict, Verdict::Warning);
        assert!(check.detail.contains("systemd-coredump"), "{check:?}");
        let (_root, file) = host(&[("proc/sys/kernel/core_pattern", "core")]);
        assert_eq!(file.core_dumps().verdict, Verdict::Ok);
    }

    #[test]
    fn what_lets_guests_learn_of_each_other_or_writes_secrets_down_is_a_warning_with_a_remedy() {
        let (_root, host) = host(&[
            ("sys/kernel/mm/ksm/run", "1"),
            ("proc/swaps", "Filename Type\n/dev/vda2 partition"),
        ]);
        for check in [host.same_page_merging(), host.swap()] {
            assert_eq!(check.verdict, Verdict::Warning, "{check:?}");
            assert!(check.remedy.is_some(), "{check:?}");
        }
        assert!(host.swap().detail.ends_with("/dev/vda2"));
        assert_eq!(host.kvm().verdict, Verdict::Failed);
    }

    #[test]
    fn a_kernel_with_less_of_landlock_than_a_jail_uses_is_a_warning() {
        assert_eq!(landlock(Some(6)).verdict, Verdict::Ok);
        for version in [None, Some(3)] {
            let check = landlock(version);
            assert_eq!(check.verdict, Verdict::Warning);
            assert!(check.remedy.is_some());
        }
    }

    #[test]
    fn mitigations_that_are_off_or_missing_are_named() {
        let (_root, off) = host(&[("proc/cmdline", "ro mitigations=off nosmt")]);
        assert!(off.mitigations().detail.ends_with(": mitigations=off"), "{off:?}");
        let (_root, open) = host(&[(MDS, "Vulnerable: Clear CPU buffers attempted, no microcode")]);
        assert_eq!(open.mitigations().detail, "none against mds");
    }

    #[test]
    fn the_policy_for_hardware_threads_is_held_against_what_the_cpu_does() {
        let (_root, plain) = host(&[SMT_ON, (MDS, "Mitigation: Clear CPU buffers; SMT mitigated")]);
        let (_root, leaky) =
            host(&[SMT_ON, (MDS, "Mitigation: Clear CPU buffers; SMT vulnerable")]);
        let (_root, single) = host(&[]);
        let cases = [
            (&plain, Smt::CoreScheduling, true, Verdict::Ok),
            (&plain, Smt::CoreScheduling, false, Verdict::Failed),
            (&leaky, Smt::CoreScheduling, true, Verdict::Warning),
            (&plain, Smt::Ignore, true, Verdict::Warning),
            (&plain, Smt::Off, true, Verdict::Warning),
            (&single, Smt::CoreScheduling, false, Verdict::Ok),
            (&single, Smt::Off, true, Verdict::Ok),
        ];
        for (host, smt, apart, verdict) in cases {
            let check = host.hardware_threads(smt, apart);
            assert_eq!(check.verdict, verdict, "{smt:?} {apart} {check:?}");
        }
    }

    #[test]
    fn threads_are_switched_off_when_the_configuration_says_so_and_only_then() {
        for (smt, left) in [(Smt::Off, "off"), (Smt::CoreScheduling, "on"), (Smt::Ignore, "on")] {
            let (_root, host) = host(&[(SMT_CONTROL, "on")]);
            host.apply(smt);
            assert_eq!(host.read(SMT_CONTROL).as_deref(), Some(left), "{smt:?}");
        }
    }
}
