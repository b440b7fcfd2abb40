//! What changes in the host's nftables while sandboxes run: the chain of each sandbox whose policy
//! lets flows pass its proxy by, and where the processes that talk for sandboxes may go.
//!
//! The tables themselves are text (`netpolicy/host.nft`), loaded by nft(8). That program reads the
//! whole ruleset at each call, which takes the longer the more sandboxes there are: here the kernel
//! is told only what changes, over nfnetlink, each time in one transaction. A packet meets what was
//! before it or what is after it, and nothing between.

mod byways;
mod connections;
mod error;
mod expression;
mod guard;
mod heard;
mod kernel;
mod sys;
mod traffic;

pub use self::{
    byways::{BYWAY_MARK, BYWAY_RANGE, BYWAYS_MAX, BywayNumber},
    error::NftError,
    heard::{Heard, Listener, Said},
    kernel::Nft,
    traffic::Traffic,
};

/// The table that all of this is in, but for the chains of sandboxes.
const TABLE: &str = "host";

/// What the names of the tables begin with that chains of sandboxes are in, and how many there are.
/// At each change of a chain the kernel goes over all of its table.
const BYWAY_TABLES: &str = "byways";
const BYWAY_TABLES_COUNT: u16 = 8;
