//! The real server on a loopback port, with real TLS, and everything of the API that needs no
//! microVM. Needs root: the image store belongs to a user of its own.

mod bad_input;
mod bundle;
mod egress;
mod front;
mod groups;
mod identity;
mod images;
mod lists;
mod metrics;
mod remote;
mod sandboxes;
mod server;
