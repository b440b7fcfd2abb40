//! What a process gives up for good.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{Mode, OFlags, openat},
    io::{Errno, write},
    process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, set_dumpable_behavior, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, UnshareFlags, clear_ambient_capability_set,
        set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};

use crate::{Identity, ProcessLimits, sys::unshare};

/// No capability, nor a way to one. The bounding set must be empty already: that takes one.
pub(super) fn drop_capabilities() -> Result<(), Errno> {
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    set_no_new_privs(true)
}

pub(super) fn become_user(identity: Identity) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    // These set the calling thread's: there is one.
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// Enters a user namespace that knows this user alone. `proc` is `/proc`, opened.
///
/// Made last: all other namespaces belong to the host's user namespace, so that even with every
/// capability that this one knows a process in it could change none of them. And what checks for a
/// capability of the host (modules, raw devices, BPF, mounts) refuses whoever is in here.
pub(super) fn enter_user_namespace(proc: &OwnedFd, identity: Identity) -> Result<(), Errno> {
    unshare(UnshareFlags::NEWUSER)?;
    // After a change of user the files below belong to root, until this.
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    let Identity { uid, gid } = identity;
    let maps = [
        // Without this a group cannot be mapped by who has no right to set groups outside.
        ("self/setgroups", "deny".to_owned()),
        ("self/uid_map", format!("{uid} {uid} 1")),
        ("self/gid_map", format!("{gid} {gid} 1")),
    ];
    for (path, text) in maps {
        let file = openat(proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        write(&file, text.as_bytes())?;
    }
    Ok(())
}

/// Should the node run out of memory, no more protected than any process: the agent is.
pub(super) fn be_ordinary_to_the_oom_killer(proc: &OwnedFd) -> Result<(), Errno> {
    let path = "self/oom_score_adj";
    let file = openat(proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    match write(&file, b"0") {
        // Less protected already, and without the right to change that.
        Ok(_) | Err(Errno::ACCESS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Limits of a VMM's process. After this no descriptor can be placed at a high number.
pub(super) fn limit(limits: ProcessLimits) -> Result<(), Errno> {
    let ProcessLimits { descriptors, threads, file_bytes } = limits;
    let limits = [
        (Resource::Nofile, u64::from(descriptors)),
        (Resource::Nproc, u64::from(threads)),
        (Resource::Fsize, file_bytes),
        // It would hold the guest's memory.
        (Resource::Core, 0),
        // Guest memory is bounded by its cgroup and is not swapped; nothing locks any.
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Rtprio, 0),
        (Resource::Nice, 0),
    ];
    for (resource, max) in limits {
        setrlimit(resource, Rlimit { current: Some(max), maximum: Some(max) })?;
    }
    Ok(())
}
