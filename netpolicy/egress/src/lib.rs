//! What stands between the sandboxes of one group and the outside: their names are answered here,
//! their connections end here, and what their policies allow is dialled from here.
//!
//! A sandbox is known by the sockets it came in on, which the agent made in its namespace and
//! handed over; nothing a guest writes says who it is. See [`holdfast_wire::egress`] for what the
//! agent says, and [`holdfast_netpolicy`] for what policies mean.

mod accept;
mod audit;
mod confine;
mod control;
mod dial;
mod dns;
mod group;
mod http;
mod proxy;
mod relay;
mod sandbox;
mod setup;
mod socket;
mod sys;
mod tls;

#[cfg(feature = "fuzzing")]
pub mod fuzzing;

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use holdfast_wire::egress::{CONTROL_FD, LISTEN_FD};
use rustls::pki_types::CertificateDer;

pub use confine::ConfineError;

/// Why the process ends.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("descriptor {fd} was not handed over")]
    Inherited {
        fd: RawFd,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error("the process cannot serve")]
    Serve(#[from] io::Error),
}

/// How the process runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// User and group to become. `None`: it is already whom it should be.
    pub user: Option<(u32, u32)>,
    /// Threads that serve. 1 is enough for most groups, and costs the least for each connection.
    pub threads: usize,
}

/// Serves the agent on the inherited sockets until the process is killed.
pub fn run(options: Options) -> Result<(), RunError> {
    let claim = |fd| sys::claim_fd(fd).map_err(|source| RunError::Inherited { fd, source });
    let (agent, listener) = (claim(CONTROL_FD)?, claim(LISTEN_FD)?);
    sys::close_from(LISTEN_FD + 1)?;
    // The last files that are opened.
    let host_roots = rustls_native_certs::load_native_certs();
    for error in host_roots.errors {
        log::warn!(error:%; "a root certificate of the host is not used");
    }
    if let Some((uid, gid)) = options.user {
        confine::become_user(uid, gid)?;
    }
    serve(options.threads, host_roots.certs, Some(agent), Some(listener), true)?;
    Ok(())
}

/// Serves as [`run`] does, with sockets and roots given.
pub fn serve(
    threads: usize,
    host_roots: Vec<CertificateDer<'static>>,
    agent: Option<OwnedFd>,
    listener: Option<OwnedFd>,
    confined: bool,
) -> Result<(), RunError> {
    if confined {
        confine::confine()?;
    }
    let mut builder = if threads <= 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let begun = Arc::new((Mutex::new(0), Condvar::new()));
    let begin = begun.clone();
    builder.on_thread_start(move || {
        *begin.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        begin.1.notify_one();
    });
    let runtime = builder.worker_threads(threads.max(1)).enable_all().build()?;
    if confined {
        // A thread that begins needs more system calls than one that serves.
        let mut count = begun.0.lock().unwrap_or_else(PoisonError::into_inner);
        while threads > 1 && *count < threads {
            count = begun.1.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        drop(count);
        confine::confine_calls()?;
    }
    let group = group::Group::new(host_roots);
    runtime.block_on(control::serve(group, agent, listener))?;
    Ok(())
}
