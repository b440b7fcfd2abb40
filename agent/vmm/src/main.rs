//! One process, one microVM: KVM, virtio, threads; no tokio.

fn main() {}
