//! Assembles the host image: root file system, boot image, partitions.

fn main() {}
