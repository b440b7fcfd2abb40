//! PID 1 of the host until its root is mounted.

fn main() {}
