//! Where a store is, and with which keys it is opened.

use std::{sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, path::Path,
};
use url::Url;

/// To have a connection, and to have an answer begin.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// A call that failed for the moment is made again.
const RETRIES: usize = 5;
const RETRY_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum BadLocation {
    #[error("{text:?} is no store: s3://BUCKET/PREFIX and azure://ACCOUNT/CONTAINER/PREFIX are")]
    Form { text: String },
    #[error("{text:?} is no http or https address")]
    Endpoint { text: String },
    #[error("it is missing: {what}")]
    Missing { what: &'static str },
    #[error("no client for it can be made")]
    Client(#[source] Box<object_store::Error>),
}

/// A bucket or container, a prefix in it, and who serves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    kind: Service,
    prefix: String,
    /// `None`: the vendor's own.
    endpoint: Option<Url>,
    region: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Service {
    S3 { bucket: String },
    Azure { account: String, container: String },
}

/// What opens it: an access key's id and secret, or an account's key, which has no id.
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    pub key_id: String,
    pub key: String,
}

impl Location {
    /// `endpoint`, `region`: empty for the usual ones.
    pub fn parse(text: &str, endpoint: &str, region: &str) -> Result<Self, BadLocation> {
        let form = || BadLocation::Form { text: text.to_owned() };
        let url = Url::parse(text).map_err(|_| form())?;
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(form)?;
        let plain = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
        if !plain || url.port().is_some() {
            return Err(form());
        }
        let path = url.path().trim_matches('/');
        let (kind, prefix) = match url.scheme() {
            "s3" => (Service::S3 { bucket: host.to_owned() }, path),
            "azure" => {
                let (container, prefix) = path.split_once('/').unwrap_or((path, ""));
                if container.is_empty() {
                    return Err(form());
                }
                let (account, container) = (host.to_owned(), container.to_owned());
                (Service::Azure { account, container }, prefix)
            }
            _ => return Err(form()),
        };
        let bad = || BadLocation::Endpoint { text: endpoint.to_owned() };
        let endpoint = match endpoint {
            "" => None,
            given => Some(Url::parse(given).map_err(|_| bad())?),
        };
        if endpoint.as_ref().is_some_and(|url| !matches!(url.scheme(), "http" | "https")) {
            return Err(bad());
        }
        let region = if region.is_empty() { "us-east-1" } else { region }.to_owned();
        Ok(Self { kind, prefix: prefix.to_owned(), endpoint, region })
    }

    pub(crate) fn prefix(&self) -> Path {
        Path::from(self.prefix.as_str())
    }

    pub(crate) fn connect(&self, secrets: &Secrets) -> Result<Arc<dyn ObjectStore>, BadLocation> {
        if secrets.key.is_empty() {
            return Err(BadLocation::Missing { what: "a key" });
        }
        // Another client of this process may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain = self.endpoint.as_ref().is_some_and(|url| url.scheme() == "http");
        let options = ClientOptions::new()
            .with_connect_timeout(CONNECT_PATIENCE)
            .with_timeout(ANSWER_PATIENCE)
            .with_allow_http(plain);
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: RETRIES,
            retry_timeout: RETRY_PATIENCE,
        };
        let endpoint = self.endpoint.as_ref().map(|url| url.as_str().trim_end_matches('/'));
        let store: Result<Arc<dyn ObjectStore>, _> = match &self.kind {
            Service::S3 { bucket } => {
                if secrets.key_id.is_empty() {
                    return Err(BadLocation::Missing { what: "the id of the access key" });
                }
                let mut builder = AmazonS3Builder::new()
                    .with_bucket_name(bucket)
                    .with_region(&self.region)
                    .with_access_key_id(&secrets.key_id)
                    .with_secret_access_key(&secrets.key)
                    .with_client_options(options)
                    .with_retry(retry);
                if let Some(endpoint) = endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                builder.build().map(|store| Arc::new(store) as _)
            }
            Service::Azure { account, container } => {
                let mut builder = MicrosoftAzureBuilder::new()
                    .with_account(account)
                    .with_container_name(container)
                    .with_access_key(&secrets.key)
                    .with_client_options(options)
                    .with_retry(retry);
                if let Some(endpoint) = endpoint {
                    builder = builder.with_endpoint(endpoint.to_owned());
                }
                builder.build().map(|store| Arc::new(store) as _)
            }
        };
        store.map_err(|error| BadLocation::Client(Box::new(error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_bucket_or_an_account_and_container_with_a_prefix_or_none() {
        for text in ["s3://bucket", "s3://bucket/a/b/", "azure://account/box", "azure://a/box/in"] {
            assert!(Location::parse(text, "", "").is_ok(), "{text}");
        }
        let deep = Location::parse("s3://bucket/a/b/", "", "").unwrap();
        assert_eq!(deep.prefix().as_ref(), "a/b");
        let inside = Location::parse("azure://account/box/in", "", "").unwrap();
        assert_eq!(inside.prefix().as_ref(), "in");
    }

    #[test]
    fn what_is_none_is_refused_with_what_would_be_one() {
        for text in
            ["", "bucket", "file:///srv", "s3://", "azure://account", "s3://b:1/x", "s3://b?x"]
        {
            let error = Location::parse(text, "", "").unwrap_err();
            assert!(error.to_string().contains("s3://BUCKET/PREFIX"), "{text}: {error}");
        }
        let error = Location::parse("s3://b", "localhost:9000", "").unwrap_err();
        assert!(matches!(error, BadLocation::Endpoint { .. }), "{error}");
    }

    #[test]
    fn nothing_is_opened_without_a_key() {
        for text in ["s3://bucket", "azure://account/box"] {
            let location = Location::parse(text, "", "").unwrap();
            assert!(location.connect(&Secrets::default()).is_err(), "{text}");
        }
    }
}
