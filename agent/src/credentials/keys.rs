//! Keys: the node's own, and one of each group, wrapped with it in the store. Where snapshots of a
//! group leave the node, its key comes from the site's, and so every node of the site has the same.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use fs_err as fs;
use holdfast_model::GroupKey;
use holdfast_snapshot::{Key, SnapshotError};
use holdfast_store::{Store, StoreError};
use log::info;
use p256::ecdsa::SigningKey;

use crate::{
    config,
    durable::{self, FileError, Readers},
    tls::TlsError,
};

const KEY_BYTES: usize = 32;

/// Of a derived number that is no private key there is one in 2^32.
const ATTEMPTS_MAX: u8 = 8;

/// Why a key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(transparent)]
    Crypto(#[from] SnapshotError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} holds no key of {KEY_BYTES} bytes", path.display())]
    NodeKey { path: PathBuf },
    #[error("the key of group {group} was wrapped by another node's key")]
    GroupKey { group: GroupKey },
    #[error("there is no key for group {group}, so nothing of it was ever saved")]
    NoGroupKey { group: GroupKey },
    #[error("no private key came of a derived one")]
    NoPrivateKey,
    #[error("no CA came of a group's key")]
    Authority(#[source] Box<TlsError>),
}

impl KeyError {
    /// What the operator can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Crypto(_) | Self::NoPrivateKey => "see the node's log",
            Self::Store(error) => error.hint(),
            Self::Authority(error) => error.hint(),
            Self::File(_) => "see that the state folder is writable and has space",
            Self::NodeKey { .. } | Self::GroupKey { .. } => {
                "restore the file snapshot-key of the state folder: keys of groups were wrapped by it"
            }
            Self::NoGroupKey { .. } => "there is nothing to go on from",
        }
    }
}

/// What the nodes of a site share.
pub(crate) struct Site {
    key: Key,
    /// Names of groups; `*` is all.
    groups: Vec<String>,
}

impl Site {
    pub(crate) fn new(key: Key, groups: Vec<String>) -> Self {
        Self { key, groups }
    }

    /// `None`: nothing leaves the node.
    pub(crate) fn of(remote: &config::Remote) -> Option<Arc<Self>> {
        let key = remote.site_key_bytes().filter(|_| !remote.url.is_empty())?;
        Some(Arc::new(Self::new(Key::new(key), remote.groups.clone())))
    }

    pub(crate) fn has(&self, group: &GroupKey) -> bool {
        self.groups.iter().any(|name| name == "*" || name == group.name())
    }

    pub(crate) fn group_key(&self, group: &GroupKey) -> Result<Key, KeyError> {
        Ok(self.key.of_group(&group.to_string())?)
    }
}

/// All of them. Calls block.
pub(crate) struct Keys {
    node: Key,
    site: Option<Arc<Site>>,
    store: Arc<Store>,
}

impl Keys {
    /// With the node's key of the state folder, made at the first start.
    pub(crate) fn open(
        state: &Path,
        store: Arc<Store>,
        site: Option<Arc<Site>>,
    ) -> Result<Arc<Self>, KeyError> {
        let keys = Self { node: node_key(&state.join("snapshot-key"))?, site, store };
        if let Some(site) = &keys.site {
            keys.give_site(site)?;
        }
        Ok(Arc::new(keys))
    }

    /// Groups of the site whose key is this node's own still, and that nothing depends on, have the
    /// site's from now on.
    fn give_site(&self, site: &Site) -> Result<(), KeyError> {
        for group in self.store.groups()?.into_iter().map(|record| record.key) {
            let Some(wrapped) = self.store.known_group_secret(&group)? else { continue };
            let wanted = site.group_key(&group)?;
            if !site.has(&group) || self.unwrapped(&group, &wrapped)?.is(&wanted) {
                continue;
            }
            if self.store.replace_unused_group_secret(&group, self.node.wrap(&wanted)?)? {
                info!(group:%; "an unused group has the site's key now");
            }
        }
        Ok(())
    }

    /// The node's own: for what never leaves the node.
    pub(crate) fn node(&self) -> &Key {
        &self.node
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The group's, made if it has none yet.
    pub(crate) fn of_group(&self, group: &GroupKey) -> Result<Key, KeyError> {
        if let Some(wrapped) = self.store.known_group_secret(group)? {
            return self.unwrapped(group, &wrapped);
        }
        let fresh = match self.site.as_ref().filter(|site| site.has(group)) {
            Some(site) => site.group_key(group)?,
            None => Key::random()?,
        };
        let fresh = self.node.wrap(&fresh)?;
        // Somebody else may have been faster: theirs is it then.
        let wrapped = self.store.group_secret(group, fresh)?;
        self.unwrapped(group, &wrapped)
    }

    /// The group's, if it has one.
    pub(crate) fn known_of_group(&self, group: &GroupKey) -> Result<Key, KeyError> {
        let wrapped = self.store.known_group_secret(group)?;
        let wrapped = wrapped.ok_or_else(|| KeyError::NoGroupKey { group: group.clone() })?;
        self.unwrapped(group, &wrapped)
    }

    fn unwrapped(&self, group: &GroupKey, wrapped: &[u8]) -> Result<Key, KeyError> {
        let key = self.node.unwrap(wrapped)?;
        key.ok_or_else(|| KeyError::GroupKey { group: group.clone() })
    }
}

/// The private key (NIST P-256) that comes from a key for one purpose: the same wherever that is
/// known.
pub(super) fn signing_key(key: &Key, purpose: &str) -> Result<SigningKey, KeyError> {
    for attempt in 0..ATTEMPTS_MAX {
        let derived = key.derived(purpose, attempt)?;
        if let Ok(signing) = SigningKey::from_slice(derived.reveal()) {
            return Ok(signing);
        }
    }
    Err(KeyError::NoPrivateKey)
}

fn node_key(path: &Path) -> Result<Key, KeyError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let fresh = Key::random()?;
            durable::replace(path, fresh.reveal(), Readers::Owner)
                .map_err(FileError::of("write", path))?;
            return Ok(fresh);
        }
        Err(error) => return Err(FileError::of("read", path)(error).into()),
    };
    let bytes = bytes.try_into().map_err(|_| KeyError::NodeKey { path: path.to_owned() })?;
    Ok(Key::new(bytes))
}
