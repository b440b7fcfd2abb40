//! Images of this node: disk images of the groups, public ones, the conversions that make them,
//! and the collection of what nobody needs.
//!
//! The writable store belongs to the user of the conversion process, which faces the network.
//! What the agent does in it, it does as that user (`store::as_owner`).

mod convert;
mod error;
mod flight;
mod gc;
mod public;
mod registry;
mod store;

pub use error::{GcError, ImageError};
pub use gc::GcReport;
pub use public::PublicImage;
pub use registry::{Credentials, Images, NewImage};
pub use store::Located;

/// Names of the cgroups of conversions begin with this; sandboxes' ids cannot.
const CONVERT_CGROUP_PREFIX: &str = "convert-";
