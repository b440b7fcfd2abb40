//! The queue of a disk of several files that is only read.
#![no_main]

use holdfast_vmm::fuzzing::{Kind, run, steps};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| run(Kind::ReadOnlyDisk, steps(input)));
