//! Memory, disk and device state of one instant, as pieces and a manifest (docs/formats/snapshot.md).
//!
//! An image (memory, a disk) is cut into pages of 4 KiB. Those that are not zero, or that changed
//! since the parent, are packed 16 to a frame; a frame is compressed, encrypted and hashed; frames
//! lie in segments of some MiB, named by their content. A layer says which page lies where. The
//! manifest names the layers and goes last: it is the commit.
//!
//! Everything that is read may have been changed by whoever holds the store: it is bounded, hashed
//! and authenticated before it is decompressed or believed. Calls block.
#![forbid(unsafe_code)]

mod error;
mod fill;
mod folder;
mod frame;
mod gc;
mod image;
mod key;
mod layer;
mod manifest;
mod pages;
mod piece;
mod segment;
mod snapshot;
mod source;
mod writer;

pub use error::{Part, SnapshotError};
pub use fill::{Fill, Frame, FrameReader, Unpacked};
pub use folder::Folder;
pub use gc::{Collected, collect};
pub use image::Image;
pub use key::Key;
pub use manifest::{FORMAT, Manifest};
pub use pages::{PAGE_BYTES, Pages};
pub use piece::{Kind, Name, PieceStore, Put, check_id};
pub use snapshot::{Draft, Snapshot, Verified};
pub use source::{FileSource, Source};
pub use writer::Written;
