//! Egress policy as data, and the rules that hold where no policy speaks. In this release there is
//! one policy: nothing leaves a sandbox.
#![forbid(unsafe_code)]

/// What nftables of the host enforces from boot on, in the language of nft(8).
pub const HOST_RULESET: &str = include_str!("../host.nft");

/// What nftables enforces in the network namespace of every sandbox, whose one link is the tap
/// `tap0`: what may come to the sandbox's two sockets, and nothing else. In the language of nft(8).
pub const SANDBOX_RULESET: &str = include_str!("../sandbox.nft");
