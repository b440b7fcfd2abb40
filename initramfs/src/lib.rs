//! Writes cpio archives, and lists what goes into each initramfs.
