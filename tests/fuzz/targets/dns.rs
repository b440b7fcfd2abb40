//! A guest's question, or what a resolver answers.
#![no_main]

use holdfast_egress::fuzzing::dns;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| dns(input));
