//! A saved state, whole, and of devices.
#![no_main]

use holdfast_vmm::fuzzing::state;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| state(input));
