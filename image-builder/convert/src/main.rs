//! One unprivileged process a pull, around oci and rootfs.

fn main() {}
