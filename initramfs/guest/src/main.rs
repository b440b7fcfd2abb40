//! PID 1 of the microVM: mounts the root, reaps, serves exec and files over vsock.
//!
//! What goes into the guest's initramfs: this program, static, as `/init`, and the character device
//! `/dev/console` (5, 1), without which the standard library finds no stdio to start with. All
//! folders and mounts are made here. For a kernel with modules: `/modules.list`, one absolute path
//! a line in loading order, and the modules themselves, uncompressed.
//!
//! It never ends by itself: when it does, the kernel panics and the VMM reports that.
#![forbid(unsafe_code)]

use std::{io::Write, process::ExitCode};

fn main() -> ExitCode {
    let error = holdfast_guest::boot::run();
    // If the console is gone as well there is no other place to say it.
    let _ = writeln!(std::io::stderr().lock(), "holdfast: cannot go on: {error}");
    ExitCode::FAILURE
}
