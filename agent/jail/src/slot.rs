//! Slots: the network namespaces in which sandboxes' taps lie.
//!
//! A slot has one link, the tap, and no address, no route and no process: what comes out of the
//! guest has nowhere to go even before the rules drop it. Nothing names a slot. The tap's
//! descriptor, which the VMM holds, keeps it alive, so it goes with its VMM whoever else was
//! killed, and there is nothing to sweep.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
    process::{Command, Stdio},
    thread,
};

use fs_err as fs;
use rustix::thread::UnshareFlags;

use crate::{JailError, sys};

/// The only link of a slot; rulesets name it.
const TAP: &str = "tap0";

/// Bytes of complaint kept of nft, which says the same in one line for each rule it dislikes.
const COMPLAINT_BYTES_MAX: usize = 1024;

/// Makes a slot in which `ruleset` (nft(8)) holds, and gives its tap. The rules are there before
/// the first packet can be. Blocks.
pub fn tap_in_a_slot(ruleset: &str) -> Result<OwnedFd, JailError> {
    // A thread of its own: it leaves the host's network and must not come back to a pool.
    thread::scope(|scope| match scope.spawn(|| make(ruleset)).join() {
        Ok(outcome) => outcome,
        Err(_) => Err(failed("be made by a thread")(io::Error::other("the thread panicked"))),
    })
}

fn make(ruleset: &str) -> Result<OwnedFd, JailError> {
    sys::unshare(UnshareFlags::NEWNET)
        .map_err(|errno| failed("have a network namespace")(errno.into()))?;
    // Of the links to come: the kernel must not talk to the guest of its own accord.
    match fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1") {
        // A host without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        outcome => outcome.map_err(failed("be without IPv6"))?,
    }
    let tap = sys::open_tap(TAP).map_err(failed("have a tap"))?;
    load(ruleset).map_err(failed("have its rules"))?;
    sys::set_link_up(TAP).map_err(failed("have its tap up"))?;
    Ok(tap)
}

/// Loads the rules into this thread's network namespace: a child begins in its parent thread's.
fn load(ruleset: &str) -> io::Result<()> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let written = match nft.stdin.take() {
        Some(mut input) => input.write_all(ruleset.as_bytes()),
        None => Ok(()),
    };
    let output = nft.wait_with_output()?;
    if !output.status.success() {
        let complaint = &output.stderr[..output.stderr.len().min(COMPLAINT_BYTES_MAX)];
        return Err(io::Error::other(format!(
            "nft: {}",
            String::from_utf8_lossy(complaint).trim()
        )));
    }
    written
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Slot { what, source }
}
