//! The queues of the balloon: pages taken, given back and reported.
#![no_main]

use holdfast_vmm::fuzzing::{Kind, run, steps};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| run(Kind::Balloon, steps(input)));
