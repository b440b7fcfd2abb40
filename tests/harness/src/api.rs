//! Raw requests to a node's API, for what no well-behaved client would send.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::{Certificate, Method, blocking::Client};
use serde_json::Value;

use crate::Node;

/// What the API answered. What is not JSON is a string.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Answer {
    /// The code of a typed error; its message and hint must be there too.
    pub fn error_code(&self) -> Result<String> {
        let error = &self.body["error"];
        ensure!(error["message"].is_string(), "no message in {self:?}");
        let code = error["code"].as_str().with_context(|| format!("no error code in {self:?}"))?;
        Ok(code.to_owned())
    }
}

#[derive(Debug)]
pub struct Api {
    client: Client,
    endpoint: String,
    token: String,
    patience: Duration,
}

impl Api {
    pub(crate) fn new(node: &Node) -> Result<Self> {
        // Another test of this process may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let ca = Certificate::from_pem(&fs_err::read(&node.ca)?)?;
        let client = Client::builder().tls_certs_only([ca]).build()?;
        Ok(Self {
            client,
            endpoint: node.endpoint.clone(),
            token: node.token.clone(),
            patience: crate::PATIENCE,
        })
    }

    /// The same node, asked for something that takes so much longer than others may.
    pub fn with_more_patience(mut self, more: Duration) -> Self {
        self.patience += more;
        self
    }

    /// The same node with another token; `None`: without one.
    pub fn with_token(mut self, token: Option<&str>) -> Self {
        self.token = token.unwrap_or_default().to_owned();
        self
    }

    pub fn send(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Answer> {
        let method = Method::from_bytes(method.as_bytes())?;
        let mut request =
            self.client.request(method, format!("{}{path}", self.endpoint)).timeout(self.patience);
        if !self.token.is_empty() {
            request = request.bearer_auth(&self.token);
        }
        let response = request.header("content-type", "application/json").body(body).send()?;
        let status = response.status().as_u16();
        let kind = response.headers().get("content-type").and_then(|kind| kind.to_str().ok());
        let is_json = kind.is_some_and(|kind| kind.starts_with("application/json"));
        let bytes = response.bytes()?;
        let text = || String::from_utf8_lossy(&bytes).into_owned();
        let body = match (bytes.is_empty(), is_json) {
            (true, _) => Value::Null,
            // Such as the health checks' one word.
            (_, false) => Value::String(text()),
            (_, true) => {
                serde_json::from_slice(&bytes).with_context(|| format!("not JSON: {}", text()))?
            }
        };
        Ok(Answer { status, body })
    }

    pub fn get(&self, path: &str) -> Result<Answer> {
        self.send("GET", path, Vec::new())
    }

    /// The body of a GET that must succeed.
    pub fn read(&self, path: &str) -> Result<Value> {
        let answer = self.get(path)?;
        ensure!(answer.status == 200, "{path}: {answer:?}");
        Ok(answer.body)
    }
}
