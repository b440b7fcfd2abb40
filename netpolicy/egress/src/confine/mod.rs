//! What this process gives up before it looks at a guest's bytes.

pub(crate) mod landlock;
mod seccomp;

use std::io;

use rustix::{
    process::{DumpableBehavior, Resource, Rlimit, setrlimit},
    thread::{Gid, Uid},
};

/// Descriptors: two for each connection of a full house, and what splice takes.
const FILES_MAX: u64 = 1 << 18;

/// Part of the process that could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("this process cannot give up {what}")]
pub struct ConfineError {
    what: &'static str,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ConfineError {
    move |source| ConfineError { what, source: source.into() }
}

/// Becomes the user and group given, of nobody else. Called while there is one thread.
pub(crate) fn become_user(uid: u32, gid: u32) -> Result<(), ConfineError> {
    rustix::thread::set_thread_groups(&[]).map_err(failed("the groups it is in"))?;
    let gid = Gid::from_raw(gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("its group"))?;
    let uid = Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("its user"))
}

/// New rights, files and more resources than it needs. Called while there is one thread: those it
/// starts have the same.
pub(crate) fn confine() -> Result<(), ConfineError> {
    // As many as the hard limit of the service lets it have.
    let allowed = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(FILES_MAX);
    let files = allowed.min(FILES_MAX);
    for (resource, max) in [(Resource::Nofile, files), (Resource::Core, 0)] {
        setrlimit(resource, Rlimit { current: Some(max), maximum: Some(max) })
            .map_err(failed("unlimited resources"))?;
    }
    // Nobody of the same user reads secrets out of it.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("being looked into"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("new rights"))?;
    landlock::restrict().map_err(failed("files"))
}

/// All system calls but those of its work, for all its threads. Called when they are there.
pub(crate) fn confine_calls() -> Result<(), ConfineError> {
    let filter = seccomp::filter().map_err(|e| failed("system calls")(io::Error::other(e)))?;
    seccompiler::apply_filter_all_threads(&filter)
        .map_err(|e| failed("system calls")(io::Error::other(e)))
}
