//! TLS of guests: its first message, and what is needed to answer in a server's place.

pub(crate) mod hello;
pub(crate) mod mint;
