//! Boots the host image and speaks the public API to it.
