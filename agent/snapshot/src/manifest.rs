//! The manifest: what a snapshot is made of. JSON on one line, then a line with its BLAKE3 under the
//! group's key.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    Kind, Name, PAGE_BYTES, Part, SnapshotError,
    key::{Key, Salt16},
};

/// Of everything this crate writes. Older ones are read; newer ones are refused by name.
pub const FORMAT: u32 = 1;
pub(crate) const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// Layers of one image that stand on each other: each is looked through for every page.
pub(crate) const LAYERS_MAX: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub format: u32,
    pub id: String,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// The snapshot this one was made from. It need not be there any more.
    pub parent: Option<String>,
    /// By what they are: `memory`, `disk`.
    pub images: BTreeMap<String, ImageManifest>,
    pub state: Option<StateManifest>,
    /// What the agent keeps with it: digests, tier, policy, ports.
    pub about: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageManifest {
    pub bytes: u64,
    /// The topmost first.
    pub layers: Vec<LayerManifest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerManifest {
    pub name: Name,
    /// Those it needs, so that a collection need not open it.
    pub segments: Vec<Name>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StateManifest {
    pub name: Name,
    pub salt: Salt16,
}

impl Manifest {
    pub(crate) fn encode(&self, key: &Key) -> Result<Vec<u8>, SnapshotError> {
        let part = || Part::Manifest(self.id.clone());
        let mut bytes = serde_json::to_vec(self)
            .map_err(|error| SnapshotError::malformed(part(), error.to_string()))?;
        let mac = key.authenticate(&bytes)?;
        bytes.push(b'\n');
        bytes.extend_from_slice(mac.to_hex().as_bytes());
        bytes.push(b'\n');
        let found = bytes.len() as u64;
        if found > MANIFEST_BYTES_MAX {
            return Err(SnapshotError::TooLarge { part: part(), found, max: MANIFEST_BYTES_MAX });
        }
        Ok(bytes)
    }

    /// All pieces it needs, each once.
    pub fn pieces(&self) -> BTreeSet<(Kind, Name)> {
        let mut pieces: BTreeSet<_> =
            self.state.iter().map(|state| (Kind::State, state.name)).collect();
        for layer in self.images.values().flat_map(|image| &image.layers) {
            pieces.insert((Kind::Layer, layer.name));
            pieces.extend(layer.segments.iter().map(|name| (Kind::Segment, *name)));
        }
        pieces
    }

    /// What it says, believed only as far as a collection needs: nobody's word is taken for it.
    pub(crate) fn decode_unauthenticated(id: &str, bytes: &[u8]) -> Result<Self, SnapshotError> {
        let (line, _) = split(id, bytes)?;
        decode(id, line)
    }

    pub(crate) fn decode(id: &str, bytes: &[u8], key: &Key) -> Result<Self, SnapshotError> {
        let part = || Part::Manifest(id.to_owned());
        let (line, mac) = split(id, bytes)?;
        // Said first: a newer release may authenticate in another way.
        let manifest = decode(id, line)?;
        // Compared in constant time by the crate.
        if blake3::Hash::from_hex(mac).ok() != Some(key.authenticate(line)?) {
            return Err(SnapshotError::WrongKey { part: part() });
        }
        if manifest.id != id {
            return Err(SnapshotError::malformed(part(), format!("it is that of {}", manifest.id)));
        }
        for (name, image) in &manifest.images {
            let paged = image.bytes.is_multiple_of(PAGE_BYTES as u64);
            if !paged || !(1..=LAYERS_MAX).contains(&image.layers.len()) {
                let reason = format!("image {name} cannot be");
                return Err(SnapshotError::malformed(part(), reason));
            }
        }
        Ok(manifest)
    }
}

fn split<'b>(id: &str, bytes: &'b [u8]) -> Result<(&'b [u8], &'b [u8]), SnapshotError> {
    let cut = || SnapshotError::Changed { part: Part::Manifest(id.to_owned()) };
    let text = bytes.strip_suffix(b"\n").ok_or_else(cut)?;
    let at = text.iter().rposition(|byte| *byte == b'\n').ok_or_else(cut)?;
    Ok((&text[..at], &text[at + 1..]))
}

fn decode(id: &str, line: &[u8]) -> Result<Manifest, SnapshotError> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let malformed = |error: serde_json::Error| {
        SnapshotError::malformed(Part::Manifest(id.to_owned()), error.to_string())
    };
    let Format { format: found } = serde_json::from_slice(line).map_err(malformed)?;
    if found > FORMAT {
        return Err(SnapshotError::TooNew { id: id.to_owned(), found });
    }
    serde_json::from_slice(line).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            id: "a".to_owned(),
            created_ms: 1,
            parent: None,
            images: BTreeMap::new(),
            state: None,
            about: BTreeMap::from([("tier".to_owned(), "XS".to_owned())]),
        }
    }

    #[test]
    fn only_what_was_written_with_the_key_under_this_id_is_believed() {
        let key = Key::new([1; 32]);
        let bytes = manifest().encode(&key).unwrap();
        assert_eq!(Manifest::decode("a", &bytes, &key).unwrap(), manifest());
        let changed = String::from_utf8(bytes.clone()).unwrap().replace("XS", "XL").into_bytes();
        let other = Key::new([2; 32]);
        for (id, bytes, key) in [("a", &bytes, &other), ("a", &changed, &key)] {
            let error = Manifest::decode(id, bytes, key).unwrap_err();
            assert!(matches!(error, SnapshotError::WrongKey { .. }), "{error}");
        }
        assert!(Manifest::decode("b", &bytes, &key).is_err());
        for cut in 0..bytes.len() {
            assert!(Manifest::decode("a", &bytes[..cut], &key).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_newer_format_is_refused_as_such_whoever_wrote_it() {
        let newer = Manifest { format: 2, ..manifest() };
        let bytes = newer.encode(&Key::new([3; 32])).unwrap();
        let error = Manifest::decode("a", &bytes, &Key::new([1; 32])).unwrap_err();
        assert!(matches!(error, SnapshotError::TooNew { found: 2, .. }), "{error}");
    }
}
