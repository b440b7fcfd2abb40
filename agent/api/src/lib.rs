//! The public HTTP contract: bodies, error body, state names, conversion to model. What the daemon
//! and its clients must agree on is here, and nothing that sends or receives.
//!
//! Bodies of the ACA wire form are camel case JSON; what is ours besides lies under `/v1`. Answers
//! leave a field out rather than send `null`: the published SDK iterates over what it finds.
#![forbid(unsafe_code)]

pub mod decode;
pub mod disk_image;
pub mod egress;
pub mod error;
pub mod exec;
pub mod exec_id;
pub mod group;
pub mod labels;
pub mod lifecycle;
pub mod node;
pub mod page;
pub mod path;
pub mod sandbox;
pub mod secret;
pub mod snapshot;
pub mod stream;

/// Ids, units and keys that the bodies are made of, for clients that may use this crate alone.
pub use holdfast_model as model;

/// The one value of the query parameter `api-version`. It may be left out; another one is refused,
/// because its bodies may mean something else.
pub const API_VERSION: &str = "2026-02-01-preview";

/// The header that names a call. A client sends the same one when it retries, and a call is not
/// carried out twice.
pub const REQUEST_ID_HEADER: &str = "x-ms-client-request-id";

/// Longest request id that is looked at, in bytes. Longer ones are refused.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// Largest JSON body of a request, in bytes: many times what any call needs.
pub const JSON_BYTES_MAX: usize = 1024 * 1024;
