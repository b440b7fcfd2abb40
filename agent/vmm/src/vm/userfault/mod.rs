//! Guest memory that another process fills while the guest goes on (userfaultfd(2)).

#[allow(unsafe_code)]
mod sys;

pub(crate) use sys::watch;
