//! OCI images from where they are (a registry, a layout folder, an archive) to the bytes of their
//! layers, verified. What becomes of the layers is not decided here.
#![forbid(unsafe_code)]

mod archive;
mod error;
mod image;
mod layout;
mod manifest;
mod platform;
mod reference;
mod registry;
mod store;

pub use archive::Archive;
pub use error::Error;
pub use image::{Image, Layer};
pub use layout::Layout;
pub use manifest::Compression;
pub use platform::{BadPlatform, Platform};
pub use reference::{BadReference, DEFAULT_FOLDER, DEFAULT_REGISTRY, DEFAULT_TAG, Reference};
pub use registry::{Credentials, Patience, Registry, RegistryOptions, Resolved, STALE_MAX, Stale};
pub use store::{Access, Collected, Collecting, ContentStore, Draft, Pulling, TagRecord};
