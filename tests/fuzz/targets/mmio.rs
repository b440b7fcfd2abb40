//! The registers of all devices, each with its thread.
#![no_main]

use holdfast_vmm::fuzzing::mmio;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| mmio(input));
