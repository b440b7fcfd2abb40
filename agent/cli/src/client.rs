//! One node's API: requests out, typed answers or errors back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use holdfast_api::{
    API_VERSION, REQUEST_ID_HEADER, error::ErrorBody, error::ErrorDetail, model::GroupKey,
};
use reqwest::{Method, RequestBuilder, Response};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::sleep;

use crate::{args::Target, connection, error::CliError};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer may take to begin. A create waits for the microVM; a slow host needs its time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a node that has answered before is waited for: its agent is being restarted.
const COME_BACK_MAX: Duration = Duration::from_secs(120);
/// Pause between the tries.
const COME_BACK_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    /// The node has answered: it is there, and trusted.
    answered: Arc<AtomicBool>,
    pub(crate) target: Target,
    pub(crate) group: GroupKey,
}

/// A name for one call, so that a retry is not carried out twice.
pub(crate) fn request_id() -> Result<String, CliError> {
    let mut random = [0; 16];
    getrandom::fill(&mut random)
        .map_err(|error| CliError::Host(format!("no random numbers: {error}")))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Client {
    pub(crate) fn new(target: &Target) -> Result<Self, CliError> {
        // A second client of the same process finds it installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        connection::host_and_port(&target.endpoint)?;
        let mut builder = reqwest::Client::builder()
            .https_only(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(ANSWER_TIMEOUT);
        if let Some(certificates) = connection::ca(target)? {
            let read = |certificate: &_| {
                reqwest::Certificate::from_der(certificate)
                    .map_err(|error| CliError::Wrong(format!("a CA certificate: {error}")))
            };
            let certificates: Vec<_> =
                certificates.iter().map(|it| read(it.as_ref())).collect::<Result<_, _>>()?;
            builder = builder.tls_certs_only(certificates);
        }
        let http = builder
            .build()
            .map_err(|error| CliError::Host(format!("cannot set up TLS: {error}")))?;
        let answered = Arc::default();
        Ok(Self {
            http,
            answered,
            target: target.clone(),
            group: connection::group(&target.group)?,
        })
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        read(self.send(self.request(Method::GET, path)?).await?).await
    }

    /// A GET with a query.
    pub(crate) async fn get_with<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<T, CliError> {
        read(self.send(self.request(Method::GET, path)?.query(query)).await?).await
    }

    /// A GET whose status is all there is to know.
    pub(crate) async fn check(&self, path: &str) -> Result<(), CliError> {
        self.send(self.request(Method::GET, path)?).await.map(|_| ())
    }

    /// A list, all its pages.
    pub(crate) async fn get_all<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<Vec<T>, CliError> {
        let mut things = Vec::new();
        let mut next = path.to_owned();
        loop {
            let page: holdfast_api::page::Page<T> = self.get(&next).await?;
            things.extend(page.value);
            let Some(link) = page.next_link else { return Ok(things) };
            // Only the path is followed: a link cannot lead the token elsewhere.
            let Some(path) =
                link.strip_prefix("https://").and_then(|rest| rest.find('/').map(|at| &rest[at..]))
            else {
                return Err(CliError::Answer(format!("nextLink {link:?}")));
            };
            next = path.to_owned();
        }
    }

    pub(crate) async fn put<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, CliError> {
        read(self.send(self.request(Method::PUT, path)?.json(body)).await?).await
    }

    pub(crate) async fn put_stream<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
        body: reqwest::Body,
    ) -> Result<T, CliError> {
        let request = self.request(Method::PUT, path)?.query(query).body(body);
        read(self.send(request).await?).await
    }

    pub(crate) async fn post_body<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, CliError> {
        read(self.send(self.request(Method::POST, path)?.json(body)).await?).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        read(self.send(self.request(Method::POST, path)?).await?).await
    }

    /// A POST that is answered without a body.
    pub(crate) async fn order(&self, path: &str) -> Result<(), CliError> {
        self.send(self.request(Method::POST, path)?).await.map(|_| ())
    }

    /// The same with a body.
    pub(crate) async fn order_body<B: Serialize>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<(), CliError> {
        self.send(self.request(Method::POST, path)?.json(body)).await.map(|_| ())
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<(), CliError> {
        let (outcome, tries) = self.send_counted(self.request(Method::DELETE, path)?).await;
        match outcome {
            // An earlier try did it, and its answer was lost.
            Err(CliError::Api { status: 404, .. }) if tries > 1 => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    fn request(&self, method: Method, path: &str) -> Result<RequestBuilder, CliError> {
        let endpoint = self.target.endpoint.trim_end_matches('/');
        let mut request = self
            .http
            .request(method, format!("{endpoint}{path}"))
            .header(REQUEST_ID_HEADER, request_id()?);
        if !path.contains("api-version=") {
            request = request.query(&[("api-version", API_VERSION)]);
        }
        if let Some(token) = &self.target.token {
            request = request.bearer_auth(token);
        }
        Ok(request)
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, CliError> {
        self.send_counted(request).await.0
    }

    /// Sends a call, again if the node is gone that was there a moment ago: every call has a name,
    /// so that it is not carried out twice. Says how often it was sent.
    async fn send_counted(&self, request: RequestBuilder) -> (Result<Response, CliError>, u32) {
        let give_up = Instant::now() + COME_BACK_MAX;
        let (mut request, mut tries) = (request, 1);
        loop {
            // A body that is streamed cannot be sent again.
            let again = request.try_clone().filter(|_| self.answered.load(Ordering::Relaxed));
            let error = match request.send().await {
                Ok(response) => return (self.judged(response).await, tries),
                Err(error) => error,
            };
            match again {
                Some(again) if Instant::now() < give_up => {
                    sleep(COME_BACK_PAUSE).await;
                    (request, tries) = (again, tries + 1);
                }
                _ => {
                    let endpoint = self.target.endpoint.clone();
                    let source = error.without_url();
                    return (Err(CliError::Unreachable { endpoint, source }), tries);
                }
            }
        }
    }

    async fn judged(&self, response: Response) -> Result<Response, CliError> {
        self.answered.store(true, Ordering::Relaxed);
        let status = response.status().as_u16();
        if status < 400 {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        Err(api_error(status, &text))
    }
}

/// The typed error of an answer's body, or one that shows what came instead.
pub(crate) fn api_error(status: u16, body: &str) -> CliError {
    let detail = match serde_json::from_str::<ErrorBody>(body) {
        Ok(body) => body.error,
        Err(_) => ErrorDetail {
            code: format!("HTTP {status}"),
            message: body.chars().take(200).collect(),
            hint: None,
        },
    };
    CliError::Api { status, detail }
}

async fn read<T: DeserializeOwned>(response: Response) -> Result<T, CliError> {
    let bytes = response.bytes().await.map_err(|error| CliError::Answer(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| CliError::Answer(error.to_string()))
}
