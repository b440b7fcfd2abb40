//! The certificate that is served now, and when it is made anew.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use jiff::{SignedDuration, Timestamp};
use rcgen::KeyPair;
use rustls::{
    ServerConfig,
    crypto::ring::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize};

use super::{Authority, TlsError, authority::read};
use crate::durable::{self, Readers};

/// How long a certificate is valid. Clients refuse more than 398 days.
const VALID_FOR: SignedDuration = SignedDuration::from_hours(24 * 390);

/// How long before its end it is made anew.
const RENEW_BEFORE: SignedDuration = SignedDuration::from_hours(24 * 60);

/// What is kept beside the certificate, to see without parsing it whether it still serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Leaf {
    key_pem: String,
    /// The certificate, in DER.
    certificate: Vec<u8>,
    names: BTreeSet<String>,
    until: Timestamp,
    /// SHA-256 of the CA that signed it.
    signed_by: String,
}

/// The certificate now served. Shared with the TLS library, which asks for it at every handshake.
pub struct Serving {
    authority: Authority,
    path: PathBuf,
    leaf: RwLock<Leaf>,
    certified: RwLock<Arc<CertifiedKey>>,
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serving({})", self.authority.fingerprint())
    }
}

impl Serving {
    /// The certificate of `folder`, or a new one if it is missing or no longer serves `names`.
    pub fn load(
        authority: Authority,
        folder: &Path,
        names: &BTreeSet<String>,
        now: Timestamp,
    ) -> Result<Self, TlsError> {
        let path = folder.join("leaf.json");
        // One that cannot be read is made anew: nobody keeps anything of it.
        let kept = read(&path)?.and_then(|text| serde_json::from_str::<Leaf>(&text).ok());
        let leaf = match kept {
            Some(leaf) if serves(&leaf, &authority, names, now) => leaf,
            _ => make(&authority, names, now, &path)?,
        };
        let certified = RwLock::new(certified(&leaf)?);
        Ok(Self { authority, path, leaf: RwLock::new(leaf), certified })
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Makes the certificate anew if it nears its end or lacks a name. Says whether it did. Blocks.
    pub fn renew(&self, names: &BTreeSet<String>, now: Timestamp) -> Result<bool, TlsError> {
        let mut leaf = self.leaf.write().unwrap_or_else(PoisonError::into_inner);
        if serves(&leaf, &self.authority, names, now) {
            return Ok(false);
        }
        *leaf = make(&self.authority, names, now, &self.path)?;
        let fresh = certified(&leaf)?;
        *self.certified.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(true)
    }

    /// HTTP/1.1 over TLS 1.2 or 1.3 with this certificate, whichever is served at the time.
    pub fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.certified.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Names that went away may stay: an address that comes and goes must not cost a certificate each.
fn serves(leaf: &Leaf, authority: &Authority, names: &BTreeSet<String>, now: Timestamp) -> bool {
    let left = leaf.until.duration_since(now);
    // More left than was given: the clock was ahead when it was made.
    let in_time = left > RENEW_BEFORE && left <= VALID_FOR;
    in_time && leaf.signed_by == authority.fingerprint() && names.is_subset(&leaf.names)
}

fn make(
    authority: &Authority,
    names: &BTreeSet<String>,
    now: Timestamp,
    path: &Path,
) -> Result<Leaf, TlsError> {
    let failed = |source| TlsError::Make { names: "the API".to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let until = now.saturating_add(VALID_FOR).unwrap_or(now);
    let leaf = Leaf {
        key_pem: key.serialize_pem(),
        certificate: authority.sign(&key, names, until)?,
        names: names.clone(),
        until,
        signed_by: authority.fingerprint().to_owned(),
    };
    let text = serde_json::to_vec(&leaf).map_err(std::io::Error::from)?;
    durable::replace(path, &text, Readers::Owner)?;
    Ok(leaf)
}

fn certified(leaf: &Leaf) -> Result<Arc<CertifiedKey>, TlsError> {
    let key = PrivateKeyDer::from_pem_slice(leaf.key_pem.as_bytes())
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let key = any_ecdsa_type(&key)?;
    let certificate = CertificateDer::from(leaf.certificate.clone());
    Ok(Arc::new(CertifiedKey::new(vec![certificate], key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn load(folder: &Path, list: &[&str], now: Timestamp) -> Serving {
        let authority = Authority::load(folder).unwrap();
        Serving::load(authority, folder, &names(list), now).unwrap()
    }

    fn served(serving: &Serving) -> Vec<u8> {
        serving.certified.read().unwrap().cert[0].to_vec()
    }

    #[test]
    fn authority_and_certificate_stay_over_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let now = Timestamp::UNIX_EPOCH;
        let first = load(folder.path(), &["localhost"], now);
        let second = load(folder.path(), &["localhost"], now);
        assert_eq!(first.authority().pem(), second.authority().pem());
        assert_eq!(served(&first), served(&second));
    }

    #[test]
    fn a_new_name_or_a_near_end_makes_a_new_certificate_of_the_same_authority() {
        let folder = tempfile::tempdir().unwrap();
        let now = Timestamp::UNIX_EPOCH;
        let serving = load(folder.path(), &["localhost", "a"], now);
        let before = served(&serving);
        assert!(!serving.renew(&names(&["localhost"]), now).unwrap(), "a name went away");
        assert!(serving.renew(&names(&["localhost", "10.0.0.1"]), now).unwrap());
        assert_ne!(served(&serving), before);
        let late = now + SignedDuration::from_hours(24 * 331);
        assert!(serving.renew(&names(&["localhost"]), late).unwrap());
        // The clock went back by more than a certificate lasts.
        assert!(serving.renew(&names(&["localhost"]), now).unwrap());
    }

    #[test]
    fn a_client_that_trusts_the_authority_accepts_a_certificate_signed_after_a_restart() {
        use rustls::{
            RootCertStore,
            client::WebPkiServerVerifier,
            client::danger::ServerCertVerifier,
            pki_types::{ServerName, UnixTime},
        };
        let folder = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let pem = load(folder.path(), &["localhost"], now).authority().pem().to_owned();
        let serving = load(folder.path(), &["localhost", "192.0.2.7"], now);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        let leaf = CertificateDer::from(served(&serving));
        let accepts = |name: &str| {
            let name = ServerName::try_from(name.to_owned()).unwrap();
            verifier.verify_server_cert(&leaf, &[], &name, &[], UnixTime::now()).is_ok()
        };
        assert!(accepts("localhost") && accepts("192.0.2.7"));
        assert!(!accepts("example.org"));
    }

    #[test]
    fn a_damaged_certificate_file_is_replaced_and_a_damaged_key_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let now = Timestamp::UNIX_EPOCH;
        load(folder.path(), &["localhost"], now);
        fs_err::write(folder.path().join("leaf.json"), "{").unwrap();
        load(folder.path(), &["localhost"], now);
        fs_err::write(folder.path().join("ca.key"), "x").unwrap();
        assert!(matches!(Authority::load(folder.path()), Err(TlsError::Form { .. })));
    }
}
