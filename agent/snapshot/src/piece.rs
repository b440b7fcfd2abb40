//! Pieces: what a store keeps, each under the hash of its bytes. A store is told nothing else.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::SnapshotError;

/// What a piece is for; each kind lies in a folder of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Frames of pages.
    Segment,
    /// Which page lies where.
    Layer,
    /// State of CPUs and devices.
    State,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Segment, Self::Layer, Self::State];

    /// The folder, or prefix, of its pieces.
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Segment => "segments",
            Self::Layer => "layers",
            Self::State => "states",
        }
    }

    /// What no piece of this kind is larger than, in bytes.
    pub const fn bytes_max(self) -> u64 {
        match self {
            Self::Segment => 16 << 20,
            // 64 GiB of pages, each alone: 16 bytes a run and 56 a frame.
            Self::Layer => 512 << 20,
            Self::State => 1 << 20,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Segment => "segment",
            Self::Layer => "layer",
            Self::State => "device state",
        })
    }
}

/// BLAKE3 of a piece's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name([u8; 32]);

impl Name {
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hash(&blake3::hash(bytes))
    }

    /// A name that another process had of us.
    pub const fn from_bytes(hash: [u8; 32]) -> Self {
        Self(hash)
    }

    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn from_hash(hash: &blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower = text.len() == 64
            && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match blake3::Hash::from_hex(text) {
            Ok(hash) if lower => Ok(Self(*hash.as_bytes())),
            _ => Err(format!("{text:?} is not 64 hex digits")),
        }
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(D::Error::custom)
        } else {
            Ok(Self(<[u8; 32]>::deserialize(deserializer)?))
        }
    }
}

/// What came of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    Created,
    /// Somebody put it before; it stays as it is.
    AlreadyThere,
}

/// Where pieces and manifests are kept. A put is durable when it returns, is seen whole or not at
/// all, and never replaces anything.
pub trait PieceStore: Sync {
    fn put_piece(&self, kind: Kind, name: &Name, bytes: &[u8]) -> Result<Put, SnapshotError>;

    /// `length` bytes from `offset` on.
    fn read_piece(
        &self,
        kind: Kind,
        name: &Name,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, SnapshotError>;

    fn piece_bytes(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError>;

    /// The commit of a snapshot.
    fn put_manifest(&self, id: &str, bytes: &[u8]) -> Result<Put, SnapshotError>;

    /// Whole, or refused if it has over `max` bytes.
    fn read_manifest(&self, id: &str, max: u64) -> Result<Vec<u8>, SnapshotError>;

    fn manifests(&self) -> Result<Vec<String>, SnapshotError>;

    /// False: there was none.
    fn delete_manifest(&self, id: &str) -> Result<bool, SnapshotError>;

    /// Those that have been there for at least `age_s` seconds.
    fn pieces(&self, kind: Kind, age_s: u64) -> Result<Vec<Name>, SnapshotError>;

    /// Returns the bytes it had; 0 if it was not there.
    fn delete_piece(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError>;

    /// A whole piece whose bytes are what its name says.
    fn whole_piece(&self, kind: Kind, name: &Name) -> Result<Vec<u8>, SnapshotError> {
        let part = || crate::Part::Piece(kind, *name);
        let found = self.piece_bytes(kind, name)?;
        let length = usize::try_from(found).ok().filter(|_| found <= kind.bytes_max());
        let Some(length) = length else {
            return Err(SnapshotError::TooLarge { part: part(), found, max: kind.bytes_max() });
        };
        let bytes = self.read_piece(kind, name, 0, length)?;
        if Name::of(&bytes) == *name {
            Ok(bytes)
        } else {
            Err(SnapshotError::Changed { part: part() })
        }
    }
}

/// The id of a snapshot is part of a file's or object's name, and must not lead elsewhere.
pub fn check_id(id: &str) -> Result<(), SnapshotError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=64).contains(&id.len()) && id.bytes().all(plain) {
        Ok(())
    } else {
        Err(SnapshotError::Id { id: id.chars().take(80).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_back_and_only_from_64_small_digits() {
        let name = Name::of(b"abc");
        assert_eq!(name.to_string().parse(), Ok(name));
        for text in ["", "ab", &name.to_string().to_uppercase(), &format!("{name}0")] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn ids_that_would_lead_elsewhere_are_refused() {
        assert!(check_id("a-1").is_ok());
        for id in ["", "..", "a/b", "A", "a.b", &"a".repeat(65)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
