//! From a name to one image, asking the registry no more than needed: a tag is revalidated, a
//! digest that was got before is not asked for, and what is cached stands in during an outage.

use std::time::{Duration, SystemTime};

use holdfast_model::Digest;

use super::Registry;
use crate::{
    Access, ContentStore, Error, Image, Platform, TagRecord,
    image::{Documents, Kind},
};

/// How old the last good answer about a tag may be to stand in while its registry is in trouble.
/// A week bridges an outage; after it nobody should still believe that nothing has changed.
pub const STALE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a name means.
#[derive(Debug)]
pub struct Resolved {
    pub image: Image,
    /// Why the answer is an old one, and how old; `None` for a fresh one.
    pub stale: Option<Stale>,
}

/// The registry could not be asked; its last answer was used.
#[derive(Debug)]
pub struct Stale {
    pub age: Duration,
    pub reason: Error,
}

impl Registry {
    /// Finds the image for a platform. Manifests and config are kept in the store.
    pub fn resolve(
        &self,
        store: &ContentStore,
        platform: &Platform,
        now: SystemTime,
    ) -> Result<Resolved, Error> {
        let access = store.access(self.credentials.as_ref())?;
        let known = store.tag(&self.reference, &access)?;
        let (top, stale) = match (self.reference.digest(), known) {
            // This name was allowed with these credentials before, and cannot mean anything else.
            (Some(digest), Some(_)) => (digest, None),
            (Some(digest), None) => (self.first(store, &access, Some(digest), now)?, None),
            (None, None) => (self.first(store, &access, None, now)?, None),
            (None, Some(known)) => match self.again(store, &access, &known, now) {
                Ok(digest) => (digest, None),
                Err(reason) if reason.is_outage() && known.age(now) <= STALE_MAX => {
                    (known.digest, Some(Stale { age: known.age(now), reason }))
                }
                Err(error) => return Err(error),
            },
        };
        let mut documents = Cached { store, registry: self };
        Ok(Resolved { image: Image::find(&mut documents, top, platform)?, stale })
    }

    /// Asks for a name that was never got with this access. The registry is asked even if the
    /// content is here: that somebody else may pull it says nothing about who asks now.
    fn first(
        &self,
        store: &ContentStore,
        access: &Access,
        digest: Option<Digest>,
        now: SystemTime,
    ) -> Result<Digest, Error> {
        let selector = match (digest, self.reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or(crate::reference::DEFAULT_TAG).to_owned(),
        };
        let (bytes, etag) = self.manifest(&selector)?;
        let found = crate::image::digest_of(&bytes);
        if let Some(expected) = digest.filter(|digest| *digest != found) {
            return Err(Error::Digest { what: self.reference.to_string(), expected, found });
        }
        store.keep_document(&bytes)?;
        store.keep_tag(&TagRecord::new(&self.reference, access, found, etag, now))?;
        Ok(found)
    }

    /// Asks whether a tag still means what it meant.
    fn again(
        &self,
        store: &ContentStore,
        access: &Access,
        known: &TagRecord,
        now: SystemTime,
    ) -> Result<Digest, Error> {
        let tag = self.reference.tag().unwrap_or(crate::reference::DEFAULT_TAG);
        let head = self.head(tag, known.etag.as_deref())?;
        if !head.unchanged && head.digest != Some(known.digest) {
            return self.first(store, access, None, now);
        }
        let etag = head.etag.or_else(|| known.etag.clone());
        store.keep_tag(&TagRecord::new(&self.reference, access, known.digest, etag, now))?;
        Ok(known.digest)
    }
}

/// Documents of the store, and of the registry where the store has them not.
struct Cached<'a> {
    store: &'a ContentStore,
    registry: &'a Registry,
}

impl Documents for Cached<'_> {
    fn document(&mut self, kind: Kind, digest: Digest) -> Result<Vec<u8>, Error> {
        if let Some(bytes) = self.store.document(digest)? {
            return Ok(bytes);
        }
        let bytes = match kind {
            Kind::Manifest => self.registry.manifest(&digest.to_string())?.0,
            Kind::Config => self.registry.config(digest)?,
        };
        // Kept under the digest they have: wrong bytes are refused by their reader, and collected.
        self.store.keep_document(&bytes)?;
        Ok(bytes)
    }

    fn place(&self) -> String {
        format!("registry {}", self.registry.reference.registry())
    }
}
