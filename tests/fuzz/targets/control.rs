//! What is said on the control socket.
#![no_main]

use holdfast_vmm::fuzzing::control;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| control(input));
