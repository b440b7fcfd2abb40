//! The queues of a network on a real tap. Needs root.
#![no_main]

use holdfast_vmm::fuzzing::{Kind, run, steps};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| run(Kind::Network, steps(input)));
