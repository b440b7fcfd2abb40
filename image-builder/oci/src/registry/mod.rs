//! Client of one registry: manifests by tag or digest, documents, and layers into drafts of the
//! store. Blocking: one pull is one process with a thread that fetches.

mod address;
mod blob;
mod challenge;
mod patience;
mod resolve;
mod transport;

use std::io::Read;

use holdfast_model::{Digest, Secret};
use reqwest::{
    Method, StatusCode,
    blocking::Response,
    header::{ACCEPT, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH},
};

use self::transport::{Ask, Transport};
pub use self::{
    patience::Patience,
    resolve::{Resolved, STALE_MAX, Stale},
};
use crate::{
    Error, Reference,
    image::digest_of,
    manifest::{DOCUMENT_BYTES_MAX, MANIFEST_TYPES},
};

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    /// Password or token.
    pub secret: Secret,
}

#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    pub credentials: Option<Credentials>,
    /// Registries (`host[:port]`) that may be spoken to over plain http besides loopback ones.
    pub plain_http: Vec<String>,
    /// Certificates (PEM) trusted besides those of the system.
    pub extra_ca_pem: Option<Vec<u8>>,
    pub patience: Patience,
}

/// One repository of one registry, asked with one set of credentials.
#[derive(Debug)]
pub struct Registry {
    transport: Transport,
    reference: Reference,
    credentials: Option<Credentials>,
}

/// What a registry says about a tag.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    /// The registry need not say it.
    digest: Option<Digest>,
    etag: Option<String>,
    /// The content still has the etag it was asked about.
    unchanged: bool,
}

impl Registry {
    /// Prepares to ask; nothing is asked yet.
    pub fn new(reference: &Reference, options: RegistryOptions) -> Result<Self, Error> {
        Ok(Self {
            credentials: options.credentials.clone(),
            transport: Transport::new(reference, options)?,
            reference: reference.clone(),
        })
    }

    /// Asks about a tag or digest without fetching it.
    fn head(&self, selector: &str, etag: Option<&str>) -> Result<Head, Error> {
        let mut ask = self.ask(Method::HEAD, format!("manifests/{selector}"), "manifest", selector);
        ask.headers.insert(ACCEPT, manifest_types());
        let known = etag.and_then(|etag| HeaderValue::from_str(etag).ok());
        if let Some(known) = known {
            ask.headers.insert(IF_NONE_MATCH, known);
        }
        let response = self.transport.send(&ask)?;
        Ok(Head {
            digest: content_digest(response.headers()),
            etag: etag_of(response.headers()),
            unchanged: response.status() == StatusCode::NOT_MODIFIED,
        })
    }

    /// Fetches what a tag or digest names. The caller checks the bytes against a digest it knows;
    /// here they are checked against the one the registry states, if it does.
    fn manifest(&self, selector: &str) -> Result<(Vec<u8>, Option<String>), Error> {
        let mut ask = self.ask(Method::GET, format!("manifests/{selector}"), "manifest", selector);
        ask.headers.insert(ACCEPT, manifest_types());
        let response = self.transport.send(&ask)?;
        let (stated, etag) = (content_digest(response.headers()), etag_of(response.headers()));
        let bytes = body(response, DOCUMENT_BYTES_MAX, self.transport.host(), &ask.what)?;
        let found = digest_of(&bytes);
        match stated.filter(|stated| *stated != found) {
            Some(expected) => Err(Error::Digest { what: ask.what, expected, found }),
            None => Ok((bytes, etag)),
        }
    }

    /// Fetches a config.
    fn config(&self, digest: Digest) -> Result<Vec<u8>, Error> {
        let text = digest.to_string();
        let ask = self.ask(Method::GET, format!("blobs/{text}"), "config", &text);
        let response = self.transport.send(&ask)?;
        body(response, DOCUMENT_BYTES_MAX, self.transport.host(), &ask.what)
    }

    fn ask(&self, method: Method, path: String, kind: &str, selector: &str) -> Ask {
        let (registry, repository) = (self.reference.registry(), self.reference.repository());
        let separator = if selector.starts_with("sha256:") { '@' } else { ':' };
        let what = format!("{kind} {registry}/{repository}{separator}{selector}");
        Ask { method, path, headers: HeaderMap::new(), what }
    }
}

fn manifest_types() -> HeaderValue {
    HeaderValue::from_str(&MANIFEST_TYPES.join(", ")).unwrap_or(HeaderValue::from_static("*/*"))
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

fn etag_of(headers: &HeaderMap) -> Option<String> {
    headers.get(ETAG)?.to_str().ok().map(str::to_owned)
}

/// Reads a small body whole. The limit holds whatever length was announced.
fn body(response: Response, limit: u64, host: &str, what: &str) -> Result<Vec<u8>, Error> {
    let size = response.content_length().unwrap_or(0);
    let mut bytes = Vec::new();
    let cut = |got: usize| Error::Cut {
        host: host.to_owned(),
        what: what.to_owned(),
        got: u64::try_from(got).unwrap_or(u64::MAX),
        size,
    };
    let outcome = response.take(limit + 1).read_to_end(&mut bytes);
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(Error::TooLarge { what: what.to_owned(), limit });
    }
    outcome.map_err(|_| cut(bytes.len()))?;
    Ok(bytes)
}
