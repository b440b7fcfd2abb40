//! Waiting for descriptors until an instant.

use std::time::Instant;

use rustix::{
    event::{PollFd, Timespec, poll},
    io::Errno,
};

/// Returns when a descriptor is ready, the instant has come, or a signal arrived: callers look at
/// what they wait for in a loop anyway. `None`: no instant.
pub(crate) fn poll_until(fds: &mut [PollFd<'_>], until: Option<Instant>) -> Result<(), Errno> {
    let timeout = until.map(|until| {
        let left = until.saturating_duration_since(Instant::now());
        // Far beyond any time-out that is kept; seconds that do not fit are as good as for ever.
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    });
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}
