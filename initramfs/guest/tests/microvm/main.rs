//! PID 1 as it is meant: booted by our kernel on our VMM, called over vsock.
//!
//! Behind the feature `microvm`, because it needs KVM and programs named in the environment:
//! HOLDFAST_LAUNCH (the VMM's example of that name), HOLDFAST_VMM, HOLDFAST_VMLINUX and
//! HOLDFAST_INITRAMFS; and /sbin/mke2fs, /usr/bin/mkfs.erofs and /bin/busybox (static).
#![forbid(unsafe_code)]

#[path = "../client/mod.rs"]
mod client;
mod machine;
mod survival;
mod whole;
