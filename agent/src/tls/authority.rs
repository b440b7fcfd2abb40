//! The CA: a key and a self-signed certificate, kept in the state folder.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use fs_err as fs;
use jiff::{Timestamp, tz::TimeZone};
use p256::{
    ecdsa::{Signature, SigningKey, signature::Signer as _},
    pkcs8::EncodePrivateKey as _,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm,
    date_time_ymd,
};
use sha2::{Digest as _, Sha256};

use crate::{
    auth::hex,
    durable::{self, Readers},
};

/// Certificates are valid from then on: a node whose clock is wrong at first boot must not make one
/// that is not valid yet.
const VALID_FROM: (i32, u8, u8) = (2024, 1, 1);

/// When the CA's certificate ends. Replacing it means telling every client, so that is far away.
const CA_VALID_UNTIL: (i32, u8, u8) = (2060, 1, 1);

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot keep the node's keys")]
    File(#[from] io::Error),
    #[error("{} is not what this node wrote there", path.display())]
    Form {
        path: PathBuf,
        #[source]
        source: rcgen::Error,
    },
    #[error("cannot make a certificate for {names}")]
    Make {
        names: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("the TLS library refused the node's certificate")]
    Library(#[from] rustls::Error),
}

impl TlsError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::File(_) => "see that the state folder is writable and has space",
            Self::Form { .. } => "restore the file, or remove the folder tls to make a new CA",
            Self::Make { .. } => "see api.server_names in the configuration",
            Self::Library(_) => "remove leaf files from the folder tls and restart",
        }
    }
}

/// The node's CA.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    fingerprint: String,
}

impl Authority {
    /// Reads the CA of `folder`, or makes it.
    pub fn load(folder: &Path) -> Result<Self, TlsError> {
        let called = "Holdfast node CA";
        let (key_path, pem_path) = (folder.join("ca.key"), folder.join("ca.pem"));
        let form = |path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::Form { path, source }
        };
        let make = |source| TlsError::Make { names: "the CA".to_owned(), source };
        fs::create_dir_all(folder)?;
        let key = match read(&key_path)? {
            Some(text) => KeyPair::from_pem(&text).map_err(form(&key_path))?,
            None => {
                let key = KeyPair::generate().map_err(make)?;
                durable::replace(&key_path, key.serialize_pem().as_bytes(), Readers::Owner)?;
                key
            }
        };
        let params = ca_params(&key, called);
        let pem = match read(&pem_path)? {
            Some(text) => text,
            None => {
                let pem = params.self_signed(&key).map_err(make)?.pem();
                durable::replace(&pem_path, pem.as_bytes(), Readers::Everyone)?;
                pem
            }
        };
        let der = der_of(&pem).map_err(|()| TlsError::Form {
            path: pem_path.clone(),
            source: rcgen::Error::CouldNotParseCertificate,
        })?;
        let fingerprint = hex(&Sha256::digest(&der));
        Ok(Self { issuer: Issuer::new(params, key), pem, fingerprint })
    }

    /// The CA that has this key: byte for byte the same wherever and whenever it is made.
    pub(crate) fn of_key(key: &SigningKey, called: &str) -> Result<Self, TlsError> {
        let make = |source| TlsError::Make { names: "the CA".to_owned(), source };
        let refused = |_| make(rcgen::Error::CouldNotParseKeyPair);
        let pkcs8 = key.to_pkcs8_der().map_err(refused)?;
        let own = KeyPair::try_from(pkcs8.as_bytes()).map_err(make)?;
        let params = ca_params(&own, called);
        let certificate = params.self_signed(&Repeatable::new(key)).map_err(make)?;
        let fingerprint = hex(&Sha256::digest(certificate.der()));
        Ok(Self { pem: certificate.pem(), issuer: Issuer::new(params, own), fingerprint })
    }

    /// The certificate, for clients to trust.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The key, for a process that signs by itself. PKCS #8.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// SHA-256 of the certificate, in hex.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Signs a certificate for `key` with these names.
    pub(super) fn sign(
        &self,
        key: &KeyPair,
        names: &BTreeSet<String>,
        until: Timestamp,
    ) -> Result<Vec<u8>, TlsError> {
        let make = |source| TlsError::Make {
            names: names.iter().map(String::as_str).collect::<Vec<_>>().join(", "),
            source,
        };
        let mut params =
            CertificateParams::new(names.iter().cloned().collect::<Vec<_>>()).map_err(make)?;
        params.distinguished_name = name("Holdfast node");
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (year, month, day) = VALID_FROM;
        params.not_before = date_time_ymd(year, month, day);
        let until = until.to_zoned(TimeZone::UTC);
        let part = |number: i8| number.unsigned_abs();
        params.not_after =
            date_time_ymd(i32::from(until.year()), part(until.month()), part(until.day()));
        let certificate = params.signed_by(key, &self.issuer).map_err(make)?;
        Ok(certificate.der().to_vec())
    }
}

/// Signs without chance (RFC 6979): what is signed twice is the same.
struct Repeatable<'k> {
    key: &'k SigningKey,
    public: Box<[u8]>,
}

impl<'k> Repeatable<'k> {
    fn new(key: &'k SigningKey) -> Self {
        Self { key, public: key.verifying_key().to_sec1_point(false).as_bytes().into() }
    }
}

impl PublicKeyData for Repeatable<'_> {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for Repeatable<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature: Signature =
            self.key.try_sign(message).map_err(|_| rcgen::Error::RemoteKeyError)?;
        Ok(signature.to_der().as_bytes().to_vec())
    }
}

/// Made from the key alone, so that the issuer of a certificate signed after a restart is the one
/// in the CA's certificate.
fn ca_params(key: &KeyPair, called: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let id = hex(&Sha256::digest(key.der_bytes())[..4]);
    params.distinguished_name = name(&format!("{called} {id}"));
    // It signs what serves, and no other CA.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let (year, month, day) = VALID_FROM;
    params.not_before = date_time_ymd(year, month, day);
    let (year, month, day) = CA_VALID_UNTIL;
    params.not_after = date_time_ymd(year, month, day);
    params
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn der_of(pem: &str) -> Result<Vec<u8>, ()> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    CertificateDer::from_pem_slice(pem.as_bytes()).map(|der| der.to_vec()).map_err(|_| ())
}

/// The text of a file, if there is one.
pub(super) fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
