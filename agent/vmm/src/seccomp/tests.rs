//! What no guest of the tests provokes is forced here, each in a process of its own: this test
//! program, run again with the name of the deed.

use std::{
    env,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::*;
use crate::sys;

const DEED: &str = "HOLDFAST_TEST_DEED";

/// How a process ends that does `deed` on a thread of `kind`.
fn end_of(deed: &str, kind: ThreadKind) -> ExitStatus {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "seccomp::tests::does_a_deed_if_told", "--test-threads=1", "--nocapture"])
        .env(DEED, format!("{deed} {kind:?}"))
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
}

/// In any other run there is nothing to do.
#[test]
fn does_a_deed_if_told() {
    let Ok(told) = env::var(DEED) else { return };
    let (deed, kind) = told.split_once(' ').unwrap();
    let kind = ThreadKind::ALL.into_iter().find(|it| format!("{it:?}") == kind).unwrap();
    let deed = deed.to_owned();
    compile().unwrap();
    let (sender, receiver) = mpsc::channel::<()>();
    if deed == "panic" {
        crate::end_on_panic();
    }
    let doer = thread::spawn(move || {
        install(kind).unwrap();
        match deed.as_str() {
            "nothing" => {}
            "panic" => panic!("as told"),
            "abort" => process::abort(),
            "wait-through-a-stop" => drop(receiver.recv_timeout(Duration::from_millis(300))),
            "allocate" => allocate(),
            deed => sys::testing::ask(deed),
        }
    });
    if told.starts_with("wait") {
        stop_and_continue();
    }
    doer.join().unwrap();
    drop(sender);
}

/// Every way of the allocator: small, large, grown in place or elsewhere, given back.
fn allocate() {
    let mut kept: Vec<Vec<u8>> = (0..2000).map(|_| vec![1; 3000]).collect();
    let mut large: Vec<u8> = Vec::with_capacity(1 << 20);
    for power in 21..26 {
        large.resize(1 << power, 2);
        kept.truncate(kept.len() / 2);
    }
    large.shrink_to(1 << 10);
}

/// Another process stops this one for a moment.
fn stop_and_continue() {
    let script = format!("kill -STOP {0}; sleep 0.1; kill -CONT {0}", process::id());
    Command::new("/bin/sh").args(["-c", &script]).status().unwrap();
}

#[test]
fn a_thread_of_every_kind_may_do_nothing_allocate_and_wait_through_a_stop() {
    for kind in ThreadKind::ALL {
        for deed in ["nothing", "allocate", "wait-through-a-stop", "yield", "clock", "futex-wait"] {
            assert_eq!(end_of(deed, kind).code(), Some(0), "{deed} on {kind:?}");
        }
    }
}

#[test]
fn a_panic_ends_the_process_by_its_code_and_an_abort_by_its_signal() {
    for kind in ThreadKind::ALL {
        assert_eq!(end_of("panic", kind).code(), Some(crate::PANIC_CODE), "{kind:?}");
        assert_eq!(end_of("abort", kind).signal(), Some(libc::SIGABRT), "{kind:?}");
    }
}

#[test]
fn what_is_not_on_the_list_kills_the_process_by_the_signal_for_it() {
    let forbidden = [
        "socket",
        "open",
        "execve",
        "fork",
        "thread",
        "executable-mmap",
        "executable-mprotect",
        "ioctl",
        "kill-parent",
        "ptrace",
        "seccomp",
        "prctl",
        "io_uring",
    ];
    for kind in ThreadKind::ALL {
        for deed in forbidden {
            assert_eq!(end_of(deed, kind).signal(), Some(libc::SIGSYS), "{deed} on {kind:?}");
        }
    }
}

#[test]
fn one_kind_may_not_do_what_is_anothers() {
    use ThreadKind::{Disk, Main, Rng, Vcpu, Vsock};
    let cases = [
        ("kvm-run", [Main, Disk, Rng, Vsock]),
        ("preadv2", [Main, Vcpu, Rng, Vsock]),
        ("kick", [Vcpu, Disk, Rng, Vsock]),
    ];
    for (deed, kinds) in cases {
        for kind in kinds {
            assert_eq!(end_of(deed, kind).signal(), Some(libc::SIGSYS), "{deed} on {kind:?}");
        }
    }
}

#[test]
fn every_rule_says_why_and_none_is_there_twice() {
    for kind in ThreadKind::ALL {
        let rules: Vec<_> = kind.rules().collect();
        for (number, rule) in rules.iter().enumerate() {
            assert!(!rule.why.is_empty(), "{}", rule.name);
            let same = |other: &&&Rule| other.call == rule.call && other.when == rule.when;
            assert!(rules[..number].iter().find(same).is_none(), "{} of {kind:?}", rule.name);
            // A rule without conditions would make those with them void.
            let also = |other: &&Rule| other.call == rule.call && other.when.is_empty();
            assert!(
                rule.when.is_empty() || !rules.iter().copied().any(|it| also(&it)),
                "{}",
                rule.name
            );
        }
    }
}
