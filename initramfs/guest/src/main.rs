//! PID 1 of the microVM: mounts the root, reaps, serves exec and files over vsock.

fn main() {}
