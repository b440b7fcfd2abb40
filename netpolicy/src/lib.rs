//! Egress policy as data, and the host's own rules. In this release there is one policy: nothing
//! leaves a sandbox, because it has no network device.
#![forbid(unsafe_code)]

/// What nftables of the host enforces from boot on, in the language of nft(8).
pub const HOST_RULESET: &str = include_str!("../host.nft");
