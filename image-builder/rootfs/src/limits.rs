//! What one image may cost us, whatever its bytes say.

/// Longest path of an entry or link target, in bytes: Linux' PATH_MAX without its NUL.
pub(crate) const PATH_BYTES_MAX: usize = 4095;

/// Longest name in a directory, in bytes: Linux' NAME_MAX, and EROFS' own.
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// Largest PAX header, in bytes. One entry's records; what the Go tar reader takes, and with it
/// every other OCI tool.
pub(crate) const PAX_BYTES_MAX: u64 = 1 << 20;

/// Longest value of an extended attribute, in bytes: what the on-disk length field can hold.
pub(crate) const XATTR_VALUE_BYTES_MAX: usize = 65_535;

/// All extended attributes of one inode, in bytes on disk: half of what the inode's 16-bit count
/// of 4-byte units can say.
pub(crate) const XATTRS_BYTES_MAX: usize = 128 << 10;

/// Extents of one sparse file. Each costs 16 bytes of memory while the file is read.
pub(crate) const SPARSE_EXTENTS_MAX: usize = 128 << 10;

/// Block-map entries of one sparse file: at most 256 KiB of metadata. Larger files get larger
/// chunks.
pub(crate) const CHUNKS_MAX: u64 = 64 << 10;

/// Largest tree file read back, in bytes. Far above what [`Limits::default`] lets be written.
pub(crate) const TREE_FILE_BYTES_MAX: u64 = 1 << 30;

/// Largest image record read back, in bytes: settings come from a config of at most some MiB.
pub(crate) const RECORD_BYTES_MAX: u64 = 16 << 20;

/// What one layer may cost. The defaults fit any image met in practice with a wide margin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Entries of one layer, parents that the archive leaves out included.
    pub entries: u32,
    /// Uncompressed bytes of one layer, and bytes of its data blob: what stops a decompression
    /// bomb or a sparse file before it fills the disk.
    pub bytes: u64,
    /// Bytes that names, link targets, attributes and block maps of one layer may take in memory.
    pub tree_bytes: u64,
    /// Folders in folders.
    pub depth: usize,
    /// Base-2 logarithm of the largest zstd window, which is that many bytes of memory. 27 is what
    /// the zstd program itself takes without being asked.
    pub zstd_window_log: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 1 << 20,
            bytes: 64 << 30,
            tree_bytes: 128 << 20,
            depth: 512,
            zstd_window_log: 27,
        }
    }
}
