//! Reads the GUID partition table (UEFI specification, chapter 5). It writes nothing.
//!
//! A disk may hold anything: sizes and checksums are checked before an entry is believed.

use std::io::{self, Read, Seek, SeekFrom};

use crate::cmdline::RootName;

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// Length of the header's fixed part, which its checksum covers at least.
const HEADER_BYTES: usize = 92;
/// Entries the table may announce. The specification's usual number is 128.
const ENTRIES_MAX: u32 = 1024;
/// Bytes one entry may have. The specification's usual number is 128.
const ENTRY_BYTES_MAX: u32 = 1024;
const ENTRY_BYTES_MIN: u32 = 128;

/// One used entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Partition {
    /// Its number as the kernel counts: 1 is the table's first entry.
    pub(crate) number: u32,
    /// Its own UUID, lower case with dashes.
    pub(crate) uuid: String,
    pub(crate) label: String,
}

impl Partition {
    pub(crate) fn is(&self, name: &RootName) -> bool {
        match name {
            RootName::Uuid(uuid) => self.uuid == *uuid,
            RootName::Label(label) => self.label == *label,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum GptError {
    #[error("the disk has no GUID partition table")]
    NoTable,
    #[error("the partition table's {0} is out of range")]
    Range(&'static str),
    #[error("the checksum of the partition table's {0} is wrong")]
    Checksum(&'static str),
    #[error("cannot read the partition table")]
    Io(#[from] io::Error),
}

/// The partitions of `disk`, by the first table, or by the second at the disk's end when the
/// first is damaged. `block_bytes` is the disk's logical block size.
pub(crate) fn read<D: Read + Seek>(
    disk: &mut D,
    block_bytes: u32,
) -> Result<Vec<Partition>, GptError> {
    let block = u64::from(block_bytes);
    read_at(disk, block, block_bytes).or_else(|first| {
        let end = disk.seek(SeekFrom::End(0))?;
        let last = end.checked_sub(block).ok_or(GptError::NoTable)?;
        // The first table's error is the one that tells.
        read_at(disk, last, block_bytes).map_err(|_| first)
    })
}

fn read_at<D: Read + Seek>(
    disk: &mut D,
    at: u64,
    block_bytes: u32,
) -> Result<Vec<Partition>, GptError> {
    let block = usize::try_from(block_bytes).map_err(|_| GptError::Range("block size"))?;
    if !(512..=65536).contains(&block) {
        return Err(GptError::Range("block size"));
    }
    let header = read_exactly(disk, at, block)?;
    if header.get(..8) != Some(SIGNATURE) {
        return Err(GptError::NoTable);
    }
    let header_bytes = usize::try_from(u32_at(&header, 12)).unwrap_or(usize::MAX);
    if !(HEADER_BYTES..=block).contains(&header_bytes) {
        return Err(GptError::Range("header size"));
    }
    let mut unsummed = header[..header_bytes].to_vec();
    unsummed[16..20].fill(0);
    if crc32(&unsummed) != u32_at(&header, 16) {
        return Err(GptError::Checksum("header"));
    }
    let (count, size) = (u32_at(&header, 80), u32_at(&header, 84));
    if count > ENTRIES_MAX {
        return Err(GptError::Range("number of entries"));
    }
    if !(ENTRY_BYTES_MIN..=ENTRY_BYTES_MAX).contains(&size) {
        return Err(GptError::Range("entry size"));
    }
    let start = u64_at(&header, 72)
        .checked_mul(u64::from(block_bytes))
        .ok_or(GptError::Range("first entry"))?;
    let total = usize::try_from(count * size).map_err(|_| GptError::Range("number of entries"))?;
    let entries = read_exactly(disk, start, total)?;
    if crc32(&entries) != u32_at(&header, 88) {
        return Err(GptError::Checksum("entries"));
    }
    let size = usize::try_from(size).map_err(|_| GptError::Range("entry size"))?;
    let used = |entry: &[u8]| entry[..16] != [0; 16];
    let numbered = (1..).zip(entries.chunks_exact(size));
    Ok(numbered.filter(|(_, entry)| used(entry)).map(|(n, entry)| partition(n, entry)).collect())
}

/// `entry` has at least `ENTRY_BYTES_MIN` bytes.
fn partition(number: u32, entry: &[u8]) -> Partition {
    let units = entry[56..128].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let label = char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|letter| letter.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect();
    Partition { number, uuid: uuid(&entry[16..32]), label }
}

/// The text form of a GUID, whose first three fields are little-endian on disk.
fn uuid(b: &[u8]) -> String {
    const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::with_capacity(36);
    for (position, &from) in ORDER.iter().enumerate() {
        if matches!(position, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", b[from]));
    }
    text
}

fn read_exactly<D: Read + Seek>(disk: &mut D, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes];
    disk.seek(SeekFrom::Start(at))?;
    disk.read_exact(&mut buffer)?;
    Ok(buffer)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// CRC-32 (IEEE 802.3), bit by bit: the input is at most 1 MiB and read once a boot.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    const BLOCK: usize = 512;

    /// A disk of 128 blocks with two partitions, its tables where the specification puts them.
    fn disk() -> Vec<u8> {
        let mut entries = vec![0_u8; 128 * 128];
        for (slot, label) in [(0, "esp"), (2, "holdfast-root-a")] {
            let entry = &mut entries[slot * 128..][..128];
            entry[..16].fill(7);
            let own: Vec<u8> = (0..16).map(|n| n + u8::try_from(slot).unwrap()).collect();
            entry[16..32].copy_from_slice(&own);
            for (at, unit) in label.encode_utf16().enumerate() {
                entry[56 + at * 2..][..2].copy_from_slice(&unit.to_le_bytes());
            }
        }
        let mut disk = vec![0_u8; 128 * BLOCK];
        for (at, entries_at) in [(1_usize, 2_usize), (127, 95)] {
            disk[entries_at * BLOCK..][..entries.len()].copy_from_slice(&entries);
            let header = &mut disk[at * BLOCK..][..HEADER_BYTES];
            header[..8].copy_from_slice(SIGNATURE);
            header[12..16].copy_from_slice(&92_u32.to_le_bytes());
            header[72..80].copy_from_slice(&u64::try_from(entries_at).unwrap().to_le_bytes());
            header[80..84].copy_from_slice(&128_u32.to_le_bytes());
            header[84..88].copy_from_slice(&128_u32.to_le_bytes());
            header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
            seal(header);
        }
        disk
    }

    fn seal(header: &mut [u8]) {
        header[16..20].fill(0);
        let sum = crc32(&header[..HEADER_BYTES]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
    }

    fn read_bytes(disk: Vec<u8>) -> Result<Vec<Partition>, GptError> {
        read(&mut Cursor::new(disk), 512)
    }

    #[test]
    fn partitions_have_the_kernels_numbers_uuids_and_labels() {
        let found = read_bytes(disk()).unwrap();
        let root = Partition {
            number: 3,
            uuid: "05040302-0706-0908-0a0b-0c0d0e0f1011".to_owned(),
            label: "holdfast-root-a".to_owned(),
        };
        assert_eq!(found.len(), 2);
        assert_eq!(found[1], root);
        assert!(root.is(&RootName::Label("holdfast-root-a".to_owned())));
        assert!(!root.is(&RootName::Uuid("05040302".to_owned())));
    }

    #[test]
    fn a_damaged_first_table_is_read_from_the_second() {
        for damaged in [BLOCK, BLOCK + 80, 2 * BLOCK + 60] {
            let mut disk = disk();
            disk[damaged] ^= 1;
            assert_eq!(read_bytes(disk).unwrap().len(), 2, "byte {damaged}");
        }
    }

    #[test]
    fn a_table_damaged_twice_is_refused() {
        let mut disk = disk();
        disk[2 * BLOCK + 60] ^= 1;
        disk[95 * BLOCK + 60] ^= 1;
        assert!(matches!(read_bytes(disk), Err(GptError::Checksum("entries"))));
    }

    #[test]
    fn announced_sizes_are_checked_before_anything_is_read() {
        for (field, at, value) in [
            ("number of entries", 80, 1025_u32),
            ("entry size", 84, 64),
            ("entry size", 84, 1 << 30),
        ] {
            let mut disk = disk();
            for table in [1, 127] {
                let header = &mut disk[table * BLOCK..][..HEADER_BYTES];
                header[at..at + 4].copy_from_slice(&value.to_le_bytes());
                seal(header);
            }
            let outcome = read_bytes(disk);
            assert!(
                matches!(outcome, Err(GptError::Range(f)) if f == field),
                "{field}: {outcome:?}"
            );
        }
    }

    #[test]
    fn a_disk_without_a_table_or_too_short_for_one_is_refused_without_a_panic() {
        assert!(matches!(read_bytes(vec![0; 8 * BLOCK]), Err(GptError::NoTable)));
        for length in [0, 1, 511, 512, 600, 1023] {
            assert!(read_bytes(vec![0; length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
