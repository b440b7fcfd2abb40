//! What a support bundle tells of the machine: nothing that names a person or holds a secret.

use std::collections::BTreeMap;

use super::Host;

/// Parameters of the kernel's command line whose values are told. Others may hold credentials,
/// addresses of configurations and the like: only their names are.
const TOLD: [&str; 12] = [
    "ro",
    "rw",
    "quiet",
    "root",
    "console",
    "panic",
    "mitigations",
    "nosmt",
    "isolcpus",
    "systemd.gpt_auto",
    "systemd.unified_cgroup_hierarchy",
    "intel_iommu",
];

/// Files told as they are, each some kilobytes at most.
const FILES: [(&str, &str); 6] = [
    ("memory", "proc/meminfo"),
    ("pressure-cpu", "proc/pressure/cpu"),
    ("pressure-io", "proc/pressure/io"),
    ("pressure-memory", "proc/pressure/memory"),
    ("load", "proc/loadavg"),
    ("cpus-online", "sys/devices/system/cpu/online"),
];

impl Host {
    /// Name and text of each.
    pub(crate) fn facts(&self) -> BTreeMap<String, String> {
        let mut facts: BTreeMap<String, String> = FILES
            .into_iter()
            .filter_map(|(name, path)| Some((name.to_owned(), self.read(path)?)))
            .collect();
        let line = self.read("proc/cmdline").unwrap_or_default();
        facts.insert("kernel-command-line".to_owned(), masked(&line));
        if let Some(model) = self.read("proc/cpuinfo").as_deref().and_then(cpu_model) {
            facts.insert("cpu".to_owned(), model);
        }
        facts
    }
}

fn cpu_model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn masked(line: &str) -> String {
    let word = |word: &str| match word.split_once('=') {
        Some((name, _)) if !TOLD.contains(&name) => format!("{name}=(not told)"),
        _ => word.to_owned(),
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_kernels_command_line_only_harmless_values_are_told() {
        let line = "ro root=PARTUUID=1 config_url=https://u:p@h/ systemd.set_credential=a:b quiet";
        let told =
            "ro root=PARTUUID=1 config_url=(not told) systemd.set_credential=(not told) quiet";
        assert_eq!(masked(line), told);
    }

    #[test]
    fn the_cpu_is_told_by_its_model() {
        let text = "processor : 0\nmodel name\t: AMD EPYC\nprocessor : 1\n";
        assert_eq!(cpu_model(text).as_deref(), Some("AMD EPYC"));
    }
}
