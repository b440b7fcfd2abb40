//! The node's own certificate authority, and the certificate its API serves. Both are made at
//! first boot; the certificate is made anew when it nears its end or the node's addresses change.

mod authority;
mod names;
mod serving;

pub use authority::{Authority, TlsError};
pub use names::{addresses, host_name, served_names};
pub use serving::Serving;
