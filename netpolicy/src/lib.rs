//! Egress policy as data, the rules that hold where no policy speaks, and one pure function that
//! says what a policy makes of a flow. No I/O, no clock, no names looked up.
//!
//! What comes from a client is a [`Policy`] once [`Policy::parse`] took it; what comes from a guest
//! is a [`HostName`], a [`Method`] and a [`Target`] once it was read as such. [`decide()`] takes only
//! these, so that what is judged and what is sent on are the same bytes. Whatever it allows, no
//! address is dialled that the [`DenySet`] or [`refused_address`] refuses.
#![forbid(unsafe_code)]

mod byway;
mod cidr;
mod decide;
mod deny;
mod error;
mod explain;
mod flow;
mod header;
mod host;
mod index;
pub mod limits;
mod parse;
mod path;
mod policy;
mod verdict;
mod wire;

pub use byway::{Byway, BywayRule, Passing};
pub use cidr::{BadCidr, Cidr};
pub use decide::{decide, refused_address};
pub use deny::{DENY_RANGES, Denied, DenySet};
pub use error::{Place, PolicyError, Problem};
pub use explain::{BadQuestion, Step, explain};
pub use flow::{BadMethod, DnsType, Flow, Method, Protocol, Scheme};
pub use header::{
    BadHeader, Header, HeaderChange, HeaderName, HeaderValue, Identity, ManagedIdentityRef,
    SecretRef, ValueFormat, ValueRef, check_secret_id, check_secret_key,
};
pub use host::{BadHost, HostName, HostPattern};
pub use path::{BadPath, PathPattern, Target};
pub use policy::{
    Action, CidrProtocol, CidrRule, HostRule, Inspection, Match, Policy, Rewrite, RewriteHost,
    Rule, RuleAction, TlsHandling, Transform,
};
pub use verdict::{List, Opening, Outcome, Reason, RuleRef, Verdict};

/// What nftables of the host enforces from boot on, in the language of nft(8).
pub const HOST_RULESET: &str = include_str!("../host.nft");

/// What nftables enforces in the network namespace of every sandbox, whose one link is the tap
/// `tap0`: what may come to the sandbox's two sockets, and nothing else. In the language of nft(8).
pub const SANDBOX_RULESET: &str = include_str!("../sandbox.nft");

/// What is added in such a namespace while there is a way past the proxy: the source translation,
/// and the bounds of the connections it follows. In the language of nft(8).
pub const BYWAY_RULESET: &str = include_str!("../byway.nft");
