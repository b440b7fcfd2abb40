//! Keys: one for a group, from which those of its pieces are derived (HKDF-SHA256), and what is
//! done with them (AES-256-GCM, BLAKE3 keyed).

use std::fmt;

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, KeyType, Salt},
};

use crate::SnapshotError;

pub(crate) const KEY_BYTES: usize = 32;
/// Of AES-GCM, behind each sealed text.
pub(crate) const TAG_BYTES: usize = 16;

/// The secret of one group: 32 random bytes.
#[derive(Clone)]
pub struct Key([u8; KEY_BYTES]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(not told)")
    }
}

/// Length of a derived key, as the crate wants it.
struct Length;

impl KeyType for Length {
    fn len(&self) -> usize {
        KEY_BYTES
    }
}

/// 16 random bytes that no other piece has: its key comes from them.
pub(crate) type Salt16 = [u8; 16];

impl Key {
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// A new one.
    pub fn random() -> Result<Self, SnapshotError> {
        Ok(Self(random()?))
    }

    /// For a process that is handed it.
    pub fn reveal(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The key of a group, the same wherever this one is known.
    pub fn of_group(&self, group: &str) -> Result<Self, SnapshotError> {
        self.derive(group.as_bytes(), b"holdfast group key 1").map(Self)
    }

    /// A key for one purpose, the same wherever this one is known. Nothing leads from it back to this
    /// one, or to that of another purpose or number.
    pub fn derived(&self, purpose: &str, number: u8) -> Result<Self, SnapshotError> {
        let salt = [purpose.as_bytes(), &[number]].concat();
        self.derive(&salt, b"holdfast derived key 1").map(Self)
    }

    /// Whether they are the same, in constant time.
    pub fn is(&self, other: &Self) -> bool {
        // The comparison of hashes is.
        blake3::hash(&self.0) == blake3::hash(&other.0)
    }

    /// `inner`, sealed with this key, to be kept where others may read it.
    pub fn wrap(&self, inner: &Self) -> Result<Vec<u8>, SnapshotError> {
        let salt: Salt16 = random()?;
        let mut sealed = inner.0.to_vec();
        self.sealer(&salt)?.seal(0, &mut sealed)?;
        Ok([&salt[..], &sealed].concat())
    }

    /// What [`Self::wrap`] made. `None`: it was not made with this key, or was changed.
    pub fn unwrap(&self, wrapped: &[u8]) -> Result<Option<Self>, SnapshotError> {
        let Some((salt, sealed)) = wrapped.split_first_chunk() else { return Ok(None) };
        let mut sealed = sealed.to_vec();
        let opened = self.sealer(salt)?.open(0, &mut sealed);
        Ok(opened.and_then(|()| sealed.try_into().ok()).map(Self))
    }

    /// `text`, sealed with this key for one purpose, to be kept where others may read it.
    pub fn seal(&self, purpose: &str, text: &[u8]) -> Result<Vec<u8>, SnapshotError> {
        let salt: Salt16 = random()?;
        let mut sealed = text.to_vec();
        self.sealer_of(&salt, purpose)?.seal(0, &mut sealed)?;
        Ok([&salt[..], &sealed].concat())
    }

    /// What [`Self::seal`] made. `None`: it was not made with this key for this purpose, or was
    /// changed.
    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Result<Option<Vec<u8>>, SnapshotError> {
        let Some((salt, sealed)) = sealed.split_first_chunk() else { return Ok(None) };
        let mut text = sealed.to_vec();
        let opened = self.sealer_of(salt, purpose)?.open(0, &mut text);
        Ok(opened.map(|()| text))
    }

    /// What seals one text. Its salt is random, so that its key has no other use.
    fn sealer_of(&self, salt: &Salt16, purpose: &str) -> Result<Sealer, SnapshotError> {
        let salt = [&salt[..], purpose.as_bytes()].concat();
        let bytes = self.derive(&salt, b"holdfast sealed text 1")?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes);
        let key = key.map_err(|_| SnapshotError::Internal { what: "a text's key" })?;
        Ok(Sealer(LessSafeKey::new(key)))
    }

    fn derive(&self, salt: &[u8], purpose: &[u8]) -> Result<[u8; KEY_BYTES], SnapshotError> {
        let internal = |_| SnapshotError::Internal { what: "a derived key" };
        let purpose = [purpose];
        let extracted = Salt::new(HKDF_SHA256, salt).extract(&self.0);
        let expanded = extracted.expand(&purpose, Length).map_err(internal)?;
        let mut derived = [0; KEY_BYTES];
        expanded.fill(&mut derived).map_err(internal)?;
        Ok(derived)
    }

    /// What seals the piece with this salt.
    pub(crate) fn sealer(&self, salt: &Salt16) -> Result<Sealer, SnapshotError> {
        let bytes = self.derive(salt, b"holdfast snapshot piece 1")?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes);
        let key = key.map_err(|_| SnapshotError::Internal { what: "a piece's key" })?;
        Ok(Sealer(LessSafeKey::new(key)))
    }

    /// Authenticates a manifest.
    pub(crate) fn authenticate(&self, bytes: &[u8]) -> Result<blake3::Hash, SnapshotError> {
        let key = self.derive(&[], b"holdfast snapshot manifest 1")?;
        Ok(blake3::keyed_hash(&key, bytes))
    }
}

/// The key of one piece. Every number is sealed under at most once: a piece is written once, from
/// its first number on, and its salt is random.
pub(crate) struct Sealer(LessSafeKey);

fn nonce(number: u32) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Sealer {
    /// Encrypts in place; the tag is appended.
    pub(crate) fn seal(&self, number: u32, text: &mut Vec<u8>) -> Result<(), SnapshotError> {
        self.0
            .seal_in_place_append_tag(nonce(number), Aad::empty(), text)
            .map_err(|_| SnapshotError::Internal { what: "a sealed frame" })
    }

    /// Decrypts in place. `None`: it was not sealed with this key under this number.
    pub(crate) fn open(&self, number: u32, text: &mut Vec<u8>) -> Option<()> {
        let length = self.0.open_in_place(nonce(number), Aad::empty(), text).ok()?.len();
        text.truncate(length);
        Some(())
    }
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], SnapshotError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| SnapshotError::Internal { what: "random bytes" })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_salt_and_number_only() {
        let (key, salt) = (Key::new([1; 32]), [2; 16]);
        let mut text = b"text".to_vec();
        key.sealer(&salt).unwrap().seal(7, &mut text).unwrap();
        assert_eq!(text.len(), 4 + TAG_BYTES);
        let opened = |key: &Key, salt, number, text: &[u8]| {
            let mut text = text.to_vec();
            key.sealer(&salt).unwrap().open(number, &mut text).map(|()| text)
        };
        assert_eq!(opened(&key, salt, 7, &text).unwrap(), b"text");
        assert_eq!(opened(&key, salt, 8, &text), None);
        assert_eq!(opened(&key, [3; 16], 7, &text), None);
        assert_eq!(opened(&Key::new([2; 32]), salt, 7, &text), None);
        text[0] ^= 1;
        assert_eq!(opened(&key, salt, 7, &text), None);
        assert_eq!(opened(&key, salt, 7, b"short"), None);
    }

    #[test]
    fn a_wrapped_key_is_had_again_with_the_key_it_was_wrapped_with_only() {
        let (outer, inner) = (Key::new([1; 32]), Key::new([2; 32]));
        let mut wrapped = outer.wrap(&inner).unwrap();
        assert_ne!(wrapped, outer.wrap(&inner).unwrap());
        assert_eq!(outer.unwrap(&wrapped).unwrap().unwrap().0, inner.0);
        assert!(inner.unwrap(&wrapped).unwrap().is_none());
        assert!(outer.unwrap(&wrapped[1..]).unwrap().is_none());
        assert!(outer.unwrap(b"short").unwrap().is_none());
        wrapped[20] ^= 1;
        assert!(outer.unwrap(&wrapped).unwrap().is_none());
    }

    #[test]
    fn a_sealed_text_opens_with_its_key_and_for_its_purpose_only() {
        let (key, other) = (Key::new([1; 32]), Key::new([2; 32]));
        let mut sealed = key.seal("secret a", b"text").unwrap();
        assert_ne!(sealed, key.seal("secret a", b"text").unwrap());
        assert_eq!(key.open("secret a", &sealed).unwrap().unwrap(), b"text");
        assert_eq!(key.open("secret b", &sealed).unwrap(), None);
        assert_eq!(other.open("secret a", &sealed).unwrap(), None);
        assert_eq!(key.open("secret a", &sealed[..20]).unwrap(), None);
        assert_eq!(key.open("secret a", b"short").unwrap(), None);
        sealed[20] ^= 1;
        assert_eq!(key.open("secret a", &sealed).unwrap(), None);
    }

    #[test]
    fn a_derived_key_is_that_of_its_key_purpose_and_number_alone() {
        let of = |byte, purpose, number| Key::new([byte; 32]).derived(purpose, number).unwrap().0;
        assert_eq!(of(1, "a", 0), of(1, "a", 0));
        let others = [of(1, "b", 0), of(1, "a", 1), of(2, "a", 0), [1; 32]];
        assert!(!others.contains(&of(1, "a", 0)));
    }

    #[test]
    fn a_key_does_not_show_itself() {
        assert_eq!(format!("{:?}", Key::new([9; 32])), "Key(not told)");
    }
}
