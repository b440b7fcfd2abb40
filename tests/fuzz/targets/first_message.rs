//! The first message of a TLS client.
#![no_main]

use holdfast_egress::fuzzing::first_message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| first_message(input));
