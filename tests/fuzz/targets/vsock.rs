//! The queues of the sockets, their packets, and what host clients say.
#![no_main]

use holdfast_vmm::fuzzing::{Kind, run, steps};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| run(Kind::Vsock, steps(input)));
