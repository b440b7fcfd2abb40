//! Certificates in the names of servers, signed by the group's CA. One key serves all of them, in
//! memory only: making keys is what a flood of names would cost us.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use holdfast_netpolicy::HostName;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{
    ServerConfig,
    crypto::ring::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::{CertifiedKey, SigningKey},
};
use zeroize::Zeroizing;

/// Certificates kept: about 1.5 KiB each.
const KEPT_MAX: usize = 1024;
/// How long a certificate is served; it is valid for longer on both sides, since guests that were
/// suspended believe it is another day.
const SERVED_FOR: Duration = Duration::from_secs(24 * 3600);
const VALID_BEFORE: time::Duration = time::Duration::days(2);
const VALID_AFTER: time::Duration = time::Duration::days(30);

#[derive(Debug, thiserror::Error)]
pub(crate) enum BadCa {
    #[error("its certificate or key cannot be read")]
    Read(#[source] rcgen::Error),
    #[error("no key for certificates can be made")]
    Key(#[source] rcgen::Error),
    #[error("the key made for certificates cannot be used")]
    Use(#[source] rustls::Error),
}

#[derive(Debug, thiserror::Error)]
#[error("no certificate can be made for {name}")]
pub(crate) struct MintError {
    name: HostName,
    #[source]
    source: rcgen::Error,
}

pub(crate) struct Minter {
    issuer: Issuer<'static, KeyPair>,
    ca: CertificateDer<'static>,
    leaf_key: KeyPair,
    signer: Arc<dyn SigningKey>,
    kept: Arc<Kept>,
    pub(crate) server: Arc<ServerConfig>,
}

/// Certificates by name, the one used longest ago first out.
#[derive(Default)]
struct Kept(Mutex<Lru>);

#[derive(Default)]
struct Lru {
    by_name: HashMap<Box<str>, (Arc<CertifiedKey>, Instant, u64)>,
    /// Names with the number of their use; all but the last of a name is out of date.
    uses: VecDeque<(Box<str>, u64)>,
    next: u64,
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept(..)")
    }
}

impl Kept {
    fn get(&self, name: &str, now: Instant) -> Option<Arc<CertifiedKey>> {
        let mut lru = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = lru.next;
        let (certified, made, last) = lru.by_name.get_mut(name)?;
        if now.saturating_duration_since(*made) >= SERVED_FOR {
            return None;
        }
        *last = number;
        let certified = certified.clone();
        lru.used(name);
        Some(certified)
    }

    fn put(&self, name: &str, certified: Arc<CertifiedKey>, now: Instant) {
        let mut lru = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = lru.next;
        lru.by_name.insert(name.into(), (certified, now, number));
        lru.used(name);
        while lru.by_name.len() > KEPT_MAX {
            let Some((name, number)) = lru.uses.pop_front() else { break };
            if lru.by_name.get(&name).is_some_and(|(_, _, last)| *last == number) {
                lru.by_name.remove(&name);
            }
        }
    }
}

impl Lru {
    fn used(&mut self, name: &str) {
        self.uses.push_back((name.into(), self.next));
        self.next += 1;
        // Uses that are out of date are dropped before they outnumber the names by much.
        if self.uses.len() > 4 * KEPT_MAX {
            let by_name = &self.by_name;
            self.uses.retain(|(name, number)| {
                by_name.get(name).is_some_and(|(_, _, last)| last == number)
            });
        }
    }
}

impl ResolvesServerCert for Kept {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // Made before the handshake began, for the name that was judged.
        let name = HostName::of_wire(hello.server_name()?).ok()?;
        self.get(name.as_str(), Instant::now())
    }
}

impl Minter {
    pub(crate) fn new(ca_pem: &str, key_pem: &str) -> Result<Self, BadCa> {
        let ca_key = KeyPair::from_pem(key_pem).map_err(BadCa::Read)?;
        let ca = rustls::pki_types::pem::PemObject::from_pem_slice(ca_pem.as_bytes())
            .map_err(|_| BadCa::Read(rcgen::Error::CouldNotParseCertificate))?;
        let issuer = Issuer::from_ca_cert_der(&ca, ca_key).map_err(BadCa::Read)?;
        let leaf_key = KeyPair::generate().map_err(BadCa::Key)?;
        let der = Zeroizing::new(leaf_key.serialize_der());
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der.as_slice()));
        let signer = any_ecdsa_type(&der).map_err(BadCa::Use)?;
        let kept = Arc::new(Kept::default());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(BadCa::Use)?
            .with_no_client_auth()
            .with_cert_resolver(kept.clone());
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // A session that is resumed was opened under a policy of another moment, and costs memory.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { issuer, ca, leaf_key, signer, kept, server: Arc::new(server) })
    }

    /// Whether a certificate for `name` is there.
    pub(crate) fn has(&self, name: &HostName) -> bool {
        self.kept.get(name.as_str(), Instant::now()).is_some()
    }

    /// Makes one, for handshakes with [`Minter::server`].
    pub(crate) fn mint(&self, name: &HostName) -> Result<(), MintError> {
        let failed = |source| MintError { name: name.clone(), source };
        let mut params = CertificateParams::new(vec![name.as_str().to_owned()]).map_err(failed)?;
        params.distinguished_name = DistinguishedName::new();
        // A common name has 64 characters at most; who verifies looks at the names above.
        let common: String = name.as_str().chars().take(64).collect();
        params.distinguished_name.push(DnType::CommonName, common);
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - VALID_BEFORE;
        params.not_after = now + VALID_AFTER;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&self.leaf_key, &self.issuer).map_err(failed)?;
        let chain = vec![leaf.der().clone(), self.ca.clone()];
        let certified = Arc::new(CertifiedKey::new(chain, self.signer.clone()));
        self.kept.put(name.as_str(), certified, Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, IsCa};

    use super::*;

    fn minter() -> Minter {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let ca = params.self_signed(&key).unwrap();
        Minter::new(&ca.pem(), &key.serialize_pem()).unwrap()
    }

    fn name(text: &str) -> HostName {
        HostName::of_wire(text).unwrap()
    }

    #[test]
    fn c20_no_more_certificates_are_kept_than_the_limit_and_those_in_use_stay() {
        let minter = minter();
        minter.mint(&name("used.test")).unwrap();
        for number in 0..KEPT_MAX + 10 {
            minter.mint(&name(&format!("n{number}.test"))).unwrap();
            assert!(minter.has(&name("used.test")), "after {number}");
        }
        let lru = minter.kept.0.lock().unwrap();
        assert_eq!(lru.by_name.len(), KEPT_MAX);
        assert!(lru.uses.len() <= 4 * KEPT_MAX);
        assert!(!lru.by_name.contains_key("n0.test"));
    }

    #[test]
    fn a_certificate_is_not_served_for_longer_than_a_day() {
        let minter = minter();
        minter.mint(&name("a.test")).unwrap();
        assert!(minter.kept.get("a.test", Instant::now() + SERVED_FOR).is_none());
    }

    #[test]
    fn what_is_no_ca_is_refused() {
        assert!(Minter::new("", "").is_err());
    }
}
