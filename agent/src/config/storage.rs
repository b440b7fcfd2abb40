//! Where images come from, and where snapshots are kept.

use holdfast_blob::{BadLocation, Location, Secrets};
use holdfast_model::Secret;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registries {
    /// `host[:port]` spoken to over plain http; loopback ones always may be.
    pub plain_http: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Images {
    /// Percent of the state file system in use above which unreferenced images are removed. 0 turns
    /// this off.
    pub gc_above_percent: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Snapshots {
    /// MiB of memory files, from which sandboxes go on at once. 0 is a quarter of the file system.
    pub hot_mib: u32,
    /// Booted guests kept for later sandboxes of the same image and size. 0: every one boots.
    pub templates_max: u32,
    /// Whether guests drop clean pages of files before they are saved: less is stored, and the first
    /// commands after a resume read their programs from the disk again.
    pub drop_caches: bool,
}

/// The object store that snapshots are kept in besides the node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Remote {
    /// `s3://BUCKET/PREFIX` or `azure://ACCOUNT/CONTAINER/PREFIX`. Empty: there is none.
    pub url: String,
    /// Who serves it. Empty: the vendor.
    pub endpoint: String,
    pub region: String,
    pub key_id: String,
    #[serde(skip_serializing)]
    pub key: Option<Secret>,
    /// 64 hex digits, the same on each node of a site: keys of groups come from it.
    #[serde(skip_serializing)]
    pub site_key: Option<Secret>,
    /// Names of the groups whose snapshots go there; `*` is all.
    pub groups: Vec<String>,
    /// MiB a second of uploads. 0 is no limit.
    pub upload_mib_per_second: u32,
}

impl Default for Images {
    fn default() -> Self {
        Self { gc_above_percent: 85 }
    }
}

impl Default for Snapshots {
    fn default() -> Self {
        // Some tens of MiB of disk each, and as much page cache while it is used.
        Self { hot_mib: 0, templates_max: 16, drop_caches: false }
    }
}

impl Remote {
    pub fn location(&self) -> Result<Location, BadLocation> {
        Location::parse(&self.url, &self.endpoint, &self.region)
    }

    pub fn secrets(&self) -> Secrets {
        let key = self.key.as_ref().map(|key| key.reveal().to_owned()).unwrap_or_default();
        Secrets { key_id: self.key_id.clone(), key }
    }

    /// `None`: it is none.
    pub fn site_key_bytes(&self) -> Option<[u8; 32]> {
        let text = self.site_key.as_ref()?.reveal();
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if text.len() != 64 || !digits {
            return None;
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
        }
        Some(bytes)
    }
}
