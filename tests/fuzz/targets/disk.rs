//! The queue of a writable disk, and its requests.
#![no_main]

use holdfast_vmm::fuzzing::{Kind, run, steps};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| run(Kind::Disk, steps(input)));
