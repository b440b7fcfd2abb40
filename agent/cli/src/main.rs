//! The command line: a client of the public API like any other.

fn main() {}
