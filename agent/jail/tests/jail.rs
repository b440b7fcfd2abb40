//! What a jailed process has left, as the host sees it. Needs root.

mod stand_in;

use std::{io::Read, path::PathBuf};

use fs_err as fs;
use holdfast_jail::{Handover, VmmProcess};
use stand_in::{IDENTITY, LIMITS, Place, ended};

const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

fn proc(pid: u32, file: &str) -> PathBuf {
    format!("/proc/{pid}/{file}").into()
}

fn text(pid: u32, file: &str) -> String {
    fs::read_to_string(proc(pid, file)).unwrap()
}

/// A line of `status`, its words parted by single spaces.
fn status(pid: u32, key: &str) -> String {
    let status = text(pid, "status");
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn namespace(pid: u32, name: &str) -> PathBuf {
    fs::read_link(proc(pid, &format!("ns/{name}"))).unwrap()
}

/// What a script of builtins says before it waits.
fn said(place: &Place, script: &str) -> (String, VmmProcess) {
    let (mut out, tell) = std::io::pipe().unwrap();
    let mut handover = Handover::default();
    let tell = handover.give(tell).unwrap();
    let vmm = place.spawn("said", &script.replace("OUT", &format!("&{tell}")), handover);
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    (text, vmm)
}

#[test]
fn a_vmm_and_its_shim_have_no_capability_and_no_way_to_one() {
    let place = Place::new();
    let vmm = place.spawn_waiting("one");
    let shim = place.shim_pid("one").unsigned_abs();
    let (uid, gid) = (IDENTITY.uid.to_string(), IDENTITY.gid.to_string());
    for pid in [vmm.pid(), shim] {
        place.await_settled(pid);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(pid, set), "0000000000000000", "{set} of {pid}");
        }
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        assert_eq!(status(pid, "Uid"), [&*uid; 4].join(" "));
        assert_eq!(status(pid, "Gid"), [&*gid; 4].join(" "));
        assert_eq!(status(pid, "Groups"), "");
        assert_eq!(status(pid, "Threads"), "1");
    }
}

#[test]
fn a_vmm_shares_no_namespace_with_the_host_or_another_vmm() {
    let place = Place::new();
    let (one, two) = (place.spawn_waiting("one"), place.spawn_waiting("two"));
    for name in NAMESPACES {
        let own = namespace(one.pid(), name);
        assert_ne!(own, namespace(std::process::id(), name), "{name} is the host's");
        assert_ne!(own, namespace(two.pid(), name), "{name} is another's");
    }
    // The first process of its namespace, which the host knows by another number.
    assert_eq!(status(one.pid(), "NSpid"), format!("{} 1", one.pid()));
    assert_eq!(status(one.pid(), "NSsid"), format!("{} 1", one.pid()));
    let words = |file| text(one.pid(), file).split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words("uid_map"), format!("{0} {0} 1", IDENTITY.uid));
    assert_eq!(words("gid_map"), format!("{0} {0} 1", IDENTITY.gid));
    assert_eq!(words("setgroups"), "deny");
    // Two lines of heading, and a loopback that nobody has brought up.
    let devices = text(one.pid(), "net/dev");
    assert_eq!(devices.lines().count(), 3, "{devices}");
}

#[test]
fn a_vmm_sees_one_mount_an_empty_folder_it_cannot_write_to() {
    let place = Place::new();
    let script = "cd /proc 2>OUT; echo x 2>OUT >/x; for f in /* /.*; do \
                  echo \"$f\" >OUT; done; exit 0";
    let (text_said, mut vmm) = said(&place, script);
    assert_eq!(ended(&mut vmm).code(), Some(0));
    let said: Vec<&str> = text_said.lines().collect();
    assert!(said[0].contains("can't cd to /proc"), "{said:?}");
    assert!(said[1].contains("can't create /x"), "{said:?}");
    assert!(said[2..].iter().all(|name| ["/*", "/.*", "/.", "/.."].contains(name)), "{said:?}");

    let waiting = place.spawn_waiting("one");
    let mounts = text(waiting.pid(), "mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / ro,nosuid,nodev,noexec"), "{mounts}");
}

#[test]
fn a_vmm_is_limited_in_every_resource_it_was_told() {
    let place = Place::new();
    let vmm = place.spawn_waiting("one");
    let limits = text(vmm.pid(), "limits");
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let words: Vec<&str> = line[name.len()..].split_whitespace().take(2).collect();
        assert_eq!(words[0], words[1], "{name}");
        words[0].parse::<u64>().unwrap()
    };
    assert_eq!(limit("Max open files"), u64::from(LIMITS.descriptors));
    assert_eq!(limit("Max processes"), u64::from(LIMITS.threads));
    assert_eq!(limit("Max file size"), LIMITS.file_bytes);
    for none in ["core file size", "locked memory", "msgqueue size", "realtime priority"] {
        assert_eq!(limit(&format!("Max {none}")), 0, "{none}");
    }
}

#[test]
fn a_shim_keeps_its_streams_and_the_file_it_records_the_end_in() {
    let place = Place::new();
    let _vmm = place.spawn_waiting("one");
    let shim = place.shim_pid("one").unsigned_abs();
    place.await_settled(shim);
    let mut open: Vec<String> = fs::read_dir(proc(shim, "fd"))
        .unwrap()
        .map(|entry| fs::read_link(entry.unwrap().path()).unwrap().display().to_string())
        .map(|target| target.rsplit('/').next().unwrap().to_owned())
        .collect();
    open.sort();
    assert_eq!(open, ["exit", "null", "null", "vmm.log"]);
    assert_eq!(text(shim, "environ"), "");
}
