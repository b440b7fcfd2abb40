//! What PID 1 mends when the machine goes on after it stood still: the time of day, and in a clone
//! the random numbers. The monotonic clock did not run meanwhile, and must not jump.

use std::os::fd::AsFd;

use holdfast_wire::guest::Failure;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    time::{ClockId, Timespec, clock_gettime, clock_settime},
};

use crate::failure::{from_io, invalid};

/// Nanoseconds by which the clock may be off: what a call takes.
const SKEW_NS_MAX: u64 = 1_000_000;

const SECOND_NS: i64 = 1_000_000_000;

/// Sets the time of day to `unix_ns` nanoseconds since 1970, unless it is that already. Gives how
/// far it was behind, in nanoseconds; negative if it was ahead.
pub(crate) fn set_clock(unix_ns: u64) -> Result<i64, Failure> {
    let wanted = i64::try_from(unix_ns)
        .map_err(|_| invalid(format!("{unix_ns} ns since 1970 is no time of day")))?;
    let now = clock_gettime(ClockId::Realtime);
    let now = now.tv_sec.saturating_mul(SECOND_NS).saturating_add(now.tv_nsec);
    let skew = wanted.saturating_sub(now);
    if skew.unsigned_abs() > SKEW_NS_MAX {
        let time = Timespec { tv_sec: wanted / SECOND_NS, tv_nsec: wanted % SECOND_NS };
        clock_settime(ClockId::Realtime, time)
            .map_err(|error| from_io("cannot set the clock", &error.into()))?;
    }
    Ok(skew)
}

/// Mixes `seed` into the kernel's random numbers, and has every number from here on come of it. The
/// kernel does so by itself when it is told that it is another machine (vmgenid); this is certain to
/// have happened when it returns.
pub(crate) fn reseed(seed: &[u8]) -> Result<(), Failure> {
    let failed = |error: Errno| from_io("cannot reseed the random numbers", &error.into());
    let random = rustix::fs::open("/dev/urandom", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let random = random.map_err(failed)?;
    rustix::io::write(&random, seed).map_err(failed)?;
    crate::sys::reseed(random.as_fd()).map_err(failed)
}
