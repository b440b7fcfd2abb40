//! Requests to one registry for one repository: which hosts may be asked, who gets the
//! credentials, what is asked again.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use reqwest::{
    Method, StatusCode, Url,
    blocking::{Client, RequestBuilder, Response},
    header::{self, HeaderMap},
};
use serde::Deserialize;

use super::{
    Credentials, RegistryOptions,
    address::{host_and_port, host_of, is_inward, is_loopback},
    challenge::{self, Challenge},
    patience::{Patience, retry_after},
};
use crate::{Error, Reference, reference::DEFAULT_REGISTRY};

/// Docker Hub answers under another name than the one in its images' names.
const DEFAULT_REGISTRY_API: &str = "registry-1.docker.io";

/// Redirects of one request. Registries use one, to where the content lies.
const REDIRECTS_MAX: usize = 5;

/// Longest wait for a registry on this machine to show that it speaks TLS.
const PROBE: Duration = Duration::from_secs(3);

/// Most bytes of a token server's answer. Tokens that list many rights have some KiB.
const TOKEN_ANSWER_BYTES_MAX: u64 = 256 * 1024;

/// One thing to ask for.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) method: Method,
    /// After `/v2/<repository>/`.
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    /// Names it in errors.
    pub(super) what: String,
}

#[derive(Debug)]
pub(super) struct Transport {
    client: Client,
    /// `host[:port]` as in the image's name.
    host: String,
    repository: String,
    base: OnceLock<Url>,
    credentials: Option<Credentials>,
    plain_http: Vec<String>,
    pub(super) patience: Patience,
    authorization: Mutex<Authorization>,
}

/// What the registry wanted to see so far.
#[derive(Debug, Clone, Default)]
enum Authorization {
    #[default]
    None,
    Basic(Credentials),
    Bearer(holdfast_model::Secret),
}

impl Authorization {
    fn apply(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::None => request,
            Self::Basic(own) => request.basic_auth(&own.username, Some(own.secret.reveal())),
            Self::Bearer(token) => request.bearer_auth(token.reveal()),
        }
    }
}

impl Transport {
    pub(super) fn new(reference: &Reference, options: RegistryOptions) -> Result<Self, Error> {
        // Fails when a provider was installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let host = reference.registry().to_owned();
        let unusable = |source: reqwest::Error| Error::Unreachable {
            host: host.clone(),
            what: "its TLS settings".to_owned(),
            source,
        };
        let mut builder = Client::builder()
            .user_agent(concat!("holdfast/", env!("CARGO_PKG_VERSION")))
            // Redirects are followed here, by the rules of `permitted`.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(options.patience.connect)
            // In the blocking client this bounds every single wait, not the sum of them.
            .timeout(options.patience.silence);
        if let Some(pem) = &options.extra_ca_pem {
            for certificate in reqwest::Certificate::from_pem_bundle(pem).map_err(unusable)? {
                builder = builder.add_root_certificate(certificate);
            }
        }
        if is_loopback(host_of(&host)) {
            builder = builder.no_proxy();
        }
        Ok(Self {
            client: builder.build().map_err(unusable)?,
            repository: reference.repository().to_owned(),
            base: OnceLock::new(),
            credentials: options.credentials,
            plain_http: options.plain_http,
            patience: options.patience,
            authorization: Mutex::default(),
            host,
        })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Asks until there is an answer that says something about the thing itself: it is there, it
    /// is not, it has not changed. Everything else is an error.
    pub(super) fn send(&self, ask: &Ask) -> Result<Response, Error> {
        let mut failures = 0;
        loop {
            let (error, asked) = match self.authorized(ask) {
                Ok(response) => match response.status() {
                    StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                        return Err(self.unauthorized(&ask.what));
                    }
                    StatusCode::NOT_FOUND => {
                        let place = format!("registry {}", self.host);
                        return Err(Error::NotFound { what: ask.what.clone(), place });
                    }
                    status if status.is_success() => return Ok(response),
                    StatusCode::NOT_MODIFIED | StatusCode::RANGE_NOT_SATISFIABLE => {
                        return Ok(response);
                    }
                    status => {
                        let header = response.headers().get(header::RETRY_AFTER);
                        let asked = header.and_then(|h| h.to_str().ok()).and_then(retry_after);
                        let host = self.host.clone();
                        let what = ask.what.clone();
                        (Error::Answer { host, what, status: status.as_u16() }, asked)
                    }
                },
                Err(error) => (error, None),
            };
            if !error.is_outage() {
                return Err(error);
            }
            failures += 1;
            let Some(wait) = self.patience.wait(failures, asked) else { return Err(error) };
            log::warn!(error:%, wait:? = wait; "registry is asked again");
            thread::sleep(wait);
        }
    }

    /// Asks, and once more with what the answer demanded.
    fn authorized(&self, ask: &Ask) -> Result<Response, Error> {
        let response = self.followed(ask)?;
        // Only the registry itself may say whom to show the credentials to.
        if response.status() != StatusCode::UNAUTHORIZED || !self.is_own(response.url()) {
            return Ok(response);
        }
        let headers = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenge = challenge::parse(headers.iter().filter_map(|h| h.to_str().ok()));
        let authorization = match (challenge, &self.credentials) {
            (Some(Challenge::Bearer { realm, service }), _) => {
                Authorization::Bearer(self.token(&realm, service.as_deref(), &ask.what)?)
            }
            (Some(Challenge::Basic), Some(own)) => Authorization::Basic(own.clone()),
            (Some(Challenge::Basic), None) | (None, _) => return Ok(response),
        };
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = authorization;
        self.followed(ask)
    }

    /// Asks and follows redirects. What was shown to the registry is shown to no other host.
    fn followed(&self, ask: &Ask) -> Result<Response, Error> {
        let path = format!("/v2/{}/{}", self.repository, ask.path);
        let mut url = self.joined(self.base(), &path)?;
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self.client.request(ask.method.clone(), url.clone());
            if self.is_own(&url) {
                let guard = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
                request = guard.apply(request);
            }
            let response = request
                .headers(ask.headers.clone())
                .send()
                .map_err(|source| self.unreachable(&ask.what, source))?;
            let is_redirect = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            let location = response.headers().get(header::LOCATION);
            match location.and_then(|location| location.to_str().ok()) {
                Some(location) if is_redirect => url = self.joined(&url, location)?,
                _ => return Ok(response),
            }
        }
        Err(Error::malformed(&ask.what, "its registry redirects without end"))
    }

    /// A token for pulling from this repository. Other rights are never asked for, whatever the
    /// challenge names.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        what: &str,
    ) -> Result<holdfast_model::Secret, Error> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<holdfast_model::Secret>,
            access_token: Option<holdfast_model::Secret>,
        }
        let mut url = self.joined(self.base(), realm)?;
        url.query_pairs_mut()
            .extend_pairs(service.map(|service| ("service", service)))
            .append_pair("scope", &format!("repository:{}:pull", self.repository));
        let host = host_and_port(&url);
        let mut request = self.client.get(url);
        if let Some(own) = &self.credentials {
            request = request.basic_auth(&own.username, Some(own.secret.reveal()));
        }
        let response = request.send().map_err(|source| self.unreachable(what, source))?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(self.unauthorized(what));
            }
            status => {
                let what = format!("a token for {what}");
                return Err(Error::Answer { host, what, status: status.as_u16() });
            }
        }
        let what = format!("token of {host}");
        let bytes = super::body(response, TOKEN_ANSWER_BYTES_MAX, &host, &what)?;
        let answer: Answer =
            serde_json::from_slice(&bytes).map_err(|error| Error::malformed(&what, error))?;
        let token = answer.token.or(answer.access_token);
        token.ok_or_else(|| Error::malformed(what, "no token in the answer"))
    }

    /// Where the registry is asked. A registry on this machine is tried with TLS first.
    fn base(&self) -> &Url {
        self.base.get_or_init(|| {
            let host =
                if self.host == DEFAULT_REGISTRY { DEFAULT_REGISTRY_API } else { &self.host };
            let url = |scheme| Url::parse(&format!("{scheme}://{host}/"));
            let https = url("https").expect("a registry's name was checked to be a host");
            let plain = self.plain_http.iter().any(|listed| listed == &self.host)
                || is_loopback(host_of(host))
                    && self.client.get(https.clone()).timeout(PROBE).send().is_err();
            if plain { url("http").unwrap_or(https) } else { https }
        })
    }

    /// An address the registry named. It may not use its answers to make us talk in clear, or to
    /// services of this machine.
    fn joined(&self, from: &Url, to: &str) -> Result<Url, Error> {
        let what = format!("address given by registry {}", self.host);
        let url = from.join(to).map_err(|error| Error::malformed(&what, error))?;
        let host = host_and_port(&url);
        let inward = is_inward(url.host_str().unwrap_or_default());
        if inward && !is_inward(host_of(&self.host)) {
            return Err(Error::malformed(what, format!("{host} is not a place of the network")));
        }
        match url.scheme() {
            "https" => Ok(url),
            "http" if inward || self.plain_http.contains(&host) => Ok(url),
            "http" => Err(Error::Insecure { host }),
            other => Err(Error::malformed(what, format!("scheme {other:?} is not used"))),
        }
    }

    fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.base().origin()
    }

    fn unauthorized(&self, what: &str) -> Error {
        Error::Unauthorized {
            host: self.host.clone(),
            what: what.to_owned(),
            with_credentials: self.credentials.is_some(),
        }
    }

    pub(super) fn unreachable(&self, what: &str, source: reqwest::Error) -> Error {
        // The address may hold a signature that lets its reader in.
        let source = source.without_url();
        Error::Unreachable { host: self.host.clone(), what: what.to_owned(), source }
    }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
