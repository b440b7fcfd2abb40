//! Guest memory whose pages are watched as they come (userfaultfd(2)): another process brings them,
//! or they come from a file one by one.

#[allow(unsafe_code)]
mod sys;

pub(crate) use sys::{one_by_one, watch};
