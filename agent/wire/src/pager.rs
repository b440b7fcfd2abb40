//! Between the agent and one `holdfast-pager`: one [`Request`] on its stdin, one [`Report`] on its
//! stdout. Its stderr is its log.

use serde::{Deserialize, Serialize};

/// Pieces of one image: each is an inherited fd. With 6 MiB of stored frames in a segment, an image
/// has this many only from some 20 GiB on.
pub const PIECES_MAX: usize = 1024;
/// Pages a guest touched first that are told, and given to the next pager: 8 MiB of them.
pub const FIRST_MAX: usize = 2048;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub version: u16,
    /// The userfaultfd of the VMM, whose guest memory is registered with it for missing pages.
    pub faults_fd: i32,
    /// Where guest memory is in the VMM.
    pub regions: Vec<Region>,
    /// Length of the image, that of all regions together.
    pub bytes: u64,
    /// BLAKE3 of the image's layers, the topmost first.
    pub layers: Vec<[u8; 32]>,
    pub pieces: Vec<Piece>,
    /// Of the sandbox group whose snapshot it is.
    pub key: [u8; 32],
    /// An empty file that will hold the image when the report has come.
    pub copy_fd: i32,
    /// Bytes of the image that an earlier guest touched, in the order in which they are brought.
    pub first: Vec<u64>,
}

// A key must not reach a log through `{:?}`.
impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Request({} bytes, {} pieces, ..)", self.bytes, self.pieces.len())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// In the VMM's address space.
    pub address: u64,
    pub bytes: u64,
    /// Where in the image it begins.
    pub offset: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    pub kind: PieceKind,
    /// BLAKE3 of its bytes.
    pub name: [u8; 32],
    pub fd: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PieceKind {
    Segment,
    Layer,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// All of it is there, and nothing waits for this process any more.
    Filled(Filled),
    Failed {
        /// The snapshot's bytes are to blame, so that trying again is of no use.
        damaged: bool,
        message: String,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    /// Times the guest or the VMM waited for a page.
    pub faults: u64,
    /// Bytes put into guest memory.
    pub bytes: u64,
    /// Pages that were touched before they were there, by their first bytes, in that order.
    pub missed: Vec<u64>,
}
