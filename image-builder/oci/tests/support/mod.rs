//! What the tests of several crates share: an HTTP server that can misbehave in ways no real
//! registry can be asked to, and an image to serve.
#![allow(dead_code, unreachable_pub, reason = "each test uses its own part of it")]

pub mod content;
pub mod server;

use std::time::Duration;

use holdfast_oci::Patience;

/// Waits short enough for tests.
pub fn hasty() -> Patience {
    Patience {
        tries_max: 3,
        wait_first: Duration::from_millis(5),
        wait_max: Duration::from_millis(20),
        asked_wait_max: Duration::from_secs(2),
        connect: Duration::from_secs(5),
        silence: Duration::from_secs(5),
    }
}
