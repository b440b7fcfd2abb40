//! Memory of this process that is watched for missing pages, as a VMM's is.

#[allow(unsafe_code)]
mod sys;

pub(crate) use sys::Watched;
