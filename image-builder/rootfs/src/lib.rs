//! OCI layers to a read-only root: one data blob per layer, shared by every image that has the
//! layer, and one small EROFS of metadata per image whose inodes point into the blobs. The VMM
//! shows `metadata ++ blob0 ++ blob1 …` as one disk.
//!
//! [`hold`] the store, [`convert_layer`] each layer, then [`assemble()`] the image. Nothing here
//! fetches anything: bytes come in through `Read`, and every one of them is distrusted.
#![forbid(unsafe_code)]

mod assemble;
mod erofs;
mod error;
mod layer;
mod limits;
mod record;
#[cfg(test)]
mod rules;
mod store;
mod tree;

pub use assemble::assemble;
pub use error::{AssembleError, EntryName, Fault, LayerError, StoreError};
pub use layer::{Compression, LayerDescriptor, LayerInfo, convert_layer, layer_info};
pub use limits::Limits;
pub use record::{ImageRecord, Segment, Settings, list_records, load_record, remove_record};
pub use store::{Collected, Hold, collect, hold, sweep_drafts};
