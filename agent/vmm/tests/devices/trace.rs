//! What a VMM asks of the kernel, by strace, held against the lists of its filters.

use std::{
    collections::HashSet,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use holdfast_vmm::seccomp::{Rule, ThreadKind};

/// A program that runs `vmm` and leaves every system call of its threads in `trace`.
pub(crate) fn traced(vmm: &Path, trace: &Path) -> PathBuf {
    let script = trace.with_extension("sh");
    let text = format!(
        "#!/bin/busybox sh\nexec /usr/bin/strace -f -Y -e raw=all -e signal=none -o {} {}\n",
        trace.display(),
        vmm.display()
    );
    fs_err::write(&script, text).unwrap();
    fs_err::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    script
}

/// One line: `PID<thread> call(0x1, 0x2`, and more.
struct Call<'a> {
    thread_id: u64,
    thread: &'a str,
    name: &'a str,
    arguments: Vec<u64>,
}

impl<'a> Call<'a> {
    /// `None`: what is told of no call's beginning.
    fn parse(line: &'a str) -> Option<Self> {
        let (who, what) = line.split_once("> ")?;
        let (thread_id, thread) = who.split_once('<')?;
        let (name, rest) = what.trim_start().split_once('(')?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if !name.bytes().all(plain) {
            return None;
        }
        let end = rest.find([')', '<']).unwrap_or(rest.len());
        let number = |text: &str| match text.trim().strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.trim().parse().ok(),
        };
        let arguments = rest[..end].split(',').map_while(number).collect();
        Some(Self { thread_id: thread_id.trim().parse().ok()?, thread, name, arguments })
    }

    fn kind(&self) -> ThreadKind {
        match self.thread {
            "rng" => ThreadKind::Rng,
            "vsock" => ThreadKind::Vsock,
            name if name.starts_with("vcpu") => ThreadKind::Vcpu,
            name if name.starts_with("disk-") => ThreadKind::Disk,
            _ => ThreadKind::Main,
        }
    }
}

/// Adds the rules that a traced VMM needed, and what it did that no rule allows.
pub(crate) fn judge(trace: &Path, needed: &mut Vec<&'static Rule>, missing: &mut Vec<String>) {
    let text = fs_err::read_to_string(trace).unwrap();
    let mut filtered = HashSet::new();
    let mut own_pid = None;
    for line in text.lines() {
        let Some(call) = Call::parse(line) else { continue };
        let own_pid = *own_pid.get_or_insert(call.thread_id);
        if call.name == "seccomp" && call.arguments.first() == Some(&1) {
            filtered.insert(call.thread_id);
            continue;
        }
        if !filtered.contains(&call.thread_id) {
            continue;
        }
        let allows = |rule: &&Rule| {
            let passes = rule.when.iter().all(|check| check.passes(&call.arguments, own_pid));
            rule.name == call.name && passes
        };
        match call.kind().rules().find(allows) {
            Some(rule) => needed.push(rule),
            None => missing.push(format!("{:?}: {line}", call.kind())),
        }
    }
    assert!(filtered.len() >= 4, "threads under a filter: {}", filtered.len());
}

/// Rules of these kinds of thread that were not needed and do not say why.
pub(crate) fn unneeded(kinds: &[ThreadKind], needed: &[&'static Rule]) -> Vec<&'static Rule> {
    let met: HashSet<*const Rule> = needed.iter().map(|rule| std::ptr::from_ref(*rule)).collect();
    kinds
        .iter()
        .flat_map(|kind| kind.rules())
        .filter(|rule| rule.exempt.is_none() && !met.contains(&std::ptr::from_ref(*rule)))
        .collect()
}
