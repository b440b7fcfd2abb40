//! The agent's part of egress.

mod decisions;

pub use decisions::{Decided, Decisions, Report};
