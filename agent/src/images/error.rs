//! What can go wrong with images, and what to do about it.

use std::io;

use holdfast_model::DiskImageId;
use holdfast_oci::BadReference;
use holdfast_store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Reference(#[from] BadReference),
    #[error("there is no disk image {id}")]
    NotFound { id: DiskImageId },
    #[error("disk image {id} is in use by {user}")]
    InUse { id: DiskImageId, user: String },
    #[error("{max} images are being made already")]
    Busy { max: usize },
    #[error("the agent is stopping")]
    Stopping,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot prepare the image store")]
    Folder(#[source] io::Error),
    #[error("cannot read the list of public images")]
    Public(#[source] io::Error),
    #[error("the system gives no random bytes")]
    Random(#[source] io::Error),
}

impl ImageError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Reference(error) => error.hint(),
            Self::NotFound { .. } => "list what there is with `holdfast image list`",
            Self::InUse { .. } => "delete that first",
            Self::Busy { .. } => "wait until one of them is Ready",
            Self::Stopping => "try again when the node is back",
            Self::Store(error) => error.hint(),
            Self::Folder(_) | Self::Public(_) | Self::Random(_) => {
                "see the node's log and its data partition"
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum GcError {
    #[error("an image is being made")]
    Busy,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the image store cannot be collected")]
    Layers(#[source] holdfast_rootfs::StoreError),
    #[error("the image store cannot be collected")]
    Blobs(#[source] holdfast_oci::Error),
    #[error("cannot act as the owner of the image store")]
    Owner(#[source] io::Error),
}

impl GcError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Busy => "try again when it is Ready",
            Self::Store(error) => error.hint(),
            Self::Layers(_) | Self::Blobs(_) | Self::Owner(_) => "see the node's log",
        }
    }
}
