//! A daemon on folders of its own, and a client that trusts it.

use std::{path::PathBuf, sync::Once};

use holdfast_api::{error::ErrorDetail, model::GroupKey, path};
use holdfastd::{
    config::{Config, Smt},
    daemon::Daemon,
    logging,
};
use log::LevelFilter;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;

pub(crate) const TOKEN: &str = "hf_a-token-of-the-tests";

pub(crate) struct Server {
    daemon: Daemon,
    client: Client,
    folder: tempfile::TempDir,
}

/// An answer, read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) async fn of(response: Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        Self { status, headers, text: response.text().await.unwrap() }
    }

    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.headers["content-type"], "application/json", "{self:?}");
        serde_json::from_str(&self.text).unwrap()
    }

    /// The error, which has a code, a message and a hint.
    pub(crate) fn error(&self) -> ErrorDetail {
        let error: ErrorDetail = serde_json::from_value(self.json()["error"].clone()).unwrap();
        assert!(!error.message.is_empty() && error.hint.is_some(), "{error:?}");
        error
    }

    pub(crate) fn refused(&self, status: u16, code: &str) -> String {
        assert_eq!((self.status.as_u16(), &*self.error().code), (status, code), "{}", self.text);
        self.error().message
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::prepared(|_| {}).await
    }

    /// Starts after `prepare` had its way with configuration and folders.
    pub(crate) async fn prepared(prepare: impl FnOnce(&mut Config)) -> Self {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let logger =
                env_logger::builder().is_test(true).filter_level(LevelFilter::Info).build();
            logging::install_over(Box::new(logger), LevelFilter::Info).unwrap();
        });
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        // The machine that runs the tests keeps its hardware threads.
        config.host.smt = Smt::Ignore;
        config.api.listen = ([127, 0, 0, 1], 0).into();
        config.api.admin_token = Some(holdfast_model::Secret::new(TOKEN));
        config.paths.state = folder.path().join("state");
        config.paths.run = folder.path().join("run");
        config.paths.baked_images = folder.path().join("baked");
        config.paths.cgroups = folder.path().join("no-cgroups");
        for path in [&config.paths.state, &config.paths.baked_images] {
            fs_err::create_dir_all(path).unwrap();
        }
        prepare(&mut config);
        let daemon = Daemon::start(config).await.unwrap();
        let ca = reqwest::Certificate::from_pem(daemon.ca_pem().as_bytes()).unwrap();
        let client = Client::builder().tls_certs_only([ca]).build();
        Self { daemon, client: client.unwrap(), folder }
    }

    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub(crate) fn host(&self) -> String {
        format!("localhost:{}", self.daemon.address().port())
    }

    pub(crate) fn ca_pem(&self) -> &str {
        self.daemon.ca_pem()
    }

    pub(crate) fn greeting(&self) -> String {
        self.daemon.greeting()
    }

    /// A request without a token.
    pub(crate) fn open(&self, method: Method, path: &str) -> RequestBuilder {
        let path = path
            .strip_prefix("https://")
            .map(str::to_owned)
            .unwrap_or_else(|| format!("{}{path}", self.host()));
        self.client.request(method, format!("https://{path}"))
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.open(method, path).bearer_auth(TOKEN)
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        Answer::of(self.request(Method::GET, path).send().await.unwrap()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        Answer::of(self.request(Method::DELETE, path).send().await.unwrap()).await
    }

    pub(crate) async fn put(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        Answer::of(self.request(Method::PUT, path).body(body).send().await.unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        Answer::of(self.request(Method::POST, path).body(body).send().await.unwrap()).await
    }

    /// Lines of the audit log.
    pub(crate) fn audit(&self) -> Vec<Value> {
        let text = fs_err::read_to_string(self.state().join("audit/admin.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.daemon.stop(holdfastd::sandbox::Ending::Detach).await;
        self.folder
    }
}

pub(crate) fn group() -> GroupKey {
    GroupKey::local_default()
}

pub(crate) fn sandboxes() -> String {
    path::sandboxes(&group())
}
