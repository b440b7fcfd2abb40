//! What the handlers take from a request's head: its group, sandbox or disk image, its query and
//! its id, each checked here and trusted after.

use std::{str::FromStr, sync::Arc};

use axum::{
    extract::{FromRequestParts, RawPathParams},
    http::{HeaderMap, header, request::Parts},
};
use holdfast_api::{
    REQUEST_ID_BYTES_MAX, REQUEST_ID_HEADER,
    error::Code,
    model::{DiskImageId, GroupKey, SandboxId, SnapshotId},
    path,
};
use holdfast_store::{DiskImageRecord, SandboxRecord, SnapshotRecord};

use super::{App, problem::Problem};

/// The parameters of the path, percent-decoded.
struct Params(RawPathParams);

impl Params {
    async fn of(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let raw = RawPathParams::from_request_parts(parts, app).await;
        raw.map(Self).map_err(|_| Problem::invalid("the path is not UTF-8"))
    }

    fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value)
    }

    fn group(&self) -> Result<GroupKey, Problem> {
        GroupKey::new(self.get("sub"), self.get("rg"), self.get("group"))
            .map_err(|error| Problem::invalid(error.to_string()))
    }
}

/// The key of the path's group, whether or not it exists.
pub(super) struct GroupName(pub(super) GroupKey);

impl FromRequestParts<Arc<App>> for GroupName {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        Params::of(parts, app).await?.group().map(Self)
    }
}

/// The path's group, which exists.
pub(super) struct InGroup(pub(super) GroupKey);

impl FromRequestParts<Arc<App>> for InGroup {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let key = Params::of(parts, app).await?.group()?;
        match app.store.group(&key)? {
            Some(_) => Ok(Self(key)),
            None => Err(no_group(&key)),
        }
    }
}

pub(super) fn no_group(key: &GroupKey) -> Problem {
    let hint = format!("make it with PUT {}", path::arm_group(key));
    Problem::new(Code::SandboxGroupNotFound, format!("there is no sandbox group {key}"), hint)
}

/// Subscription and resource group of an ARM list.
pub(super) struct ArmScope {
    pub(super) subscription: String,
    pub(super) resource_group: String,
}

impl FromRequestParts<Arc<App>> for ArmScope {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let params = Params::of(parts, app).await?;
        let (subscription, resource_group) = (params.get("sub"), params.get("rg"));
        // Any name will do for the third part: this checks the other two.
        GroupKey::new(subscription, resource_group, "x")
            .map_err(|error| Problem::invalid(error.to_string()))?;
        Ok(Self { subscription: subscription.into(), resource_group: resource_group.into() })
    }
}

/// The path's sandbox, which exists in the path's group.
pub(super) struct OfSandbox(pub(super) SandboxRecord);

impl FromRequestParts<Arc<App>> for OfSandbox {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let kind = ("sandbox", Code::SandboxNotFound);
        let get = |id: &SandboxId| Ok(app.registry.get(id)?.map(|it| (it.group.clone(), it)));
        of_group(parts, app, kind, get).await.map(Self)
    }
}

/// The path's disk image, which exists in the path's group.
pub(super) struct OfDiskImage(pub(super) DiskImageRecord);

impl FromRequestParts<Arc<App>> for OfDiskImage {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let kind = ("disk image", Code::DiskImageNotFound);
        let get = |id: &DiskImageId| Ok(app.images.get(id)?.map(|it| (it.group.clone(), it)));
        of_group(parts, app, kind, get).await.map(Self)
    }
}

/// The path's snapshot, which exists in the path's group.
pub(super) struct OfSnapshot(pub(super) SnapshotRecord);

impl FromRequestParts<Arc<App>> for OfSnapshot {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let kind = ("snapshot", Code::SnapshotNotFound);
        let get =
            |id: &SnapshotId| Ok(app.registry.get_snapshot(id)?.map(|it| (it.group.clone(), it)));
        of_group(parts, app, kind, get).await.map(Self)
    }
}

/// What the path's `{id}` names, if it is of the path's group. What cannot be an id names nothing:
/// clients wait for 404 after a delete.
async fn of_group<I: FromStr, T>(
    parts: &mut Parts,
    app: &Arc<App>,
    (kind, code): (&str, Code),
    get: impl FnOnce(&I) -> Result<Option<(GroupKey, T)>, Problem>,
) -> Result<T, Problem> {
    let InGroup(group) = InGroup::from_request_parts(parts, app).await?;
    let params = Params::of(parts, app).await?;
    let name = params.get("id");
    let found = name.parse().map_or(Ok(None), |id| get(&id))?;
    found.filter(|(owner, _)| *owner == group).map(|(_, it)| it).ok_or_else(|| {
        let message = format!("there is no {kind} {} in group {group}", shortened(name));
        Problem::new(code, message, format!("list each {kind} of the group: it may be in another"))
    })
}

/// The path's `{name}`.
pub(super) struct Name(pub(super) String);

impl FromRequestParts<Arc<App>> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        Ok(Self(Params::of(parts, app).await?.get("name").to_owned()))
    }
}

/// The client's name for the call, if it gave one.
pub(super) struct RequestId(pub(super) Option<String>);

impl FromRequestParts<Arc<App>> for RequestId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, Problem> {
        request_id(&parts.headers).map(Self)
    }
}

pub(super) fn request_id(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get(REQUEST_ID_HEADER) else { return Ok(None) };
    let fits = |text: &&str| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_graphic())
    };
    let text = value.to_str().ok().filter(fits).ok_or_else(|| {
        let rule = format!("{REQUEST_ID_HEADER} has 1 to {REQUEST_ID_BYTES_MAX} printable bytes");
        Problem::invalid(rule)
    })?;
    Ok(Some(text.to_owned()))
}

/// The query, percent-decoded. `+` is itself: the published SDK does not escape it.
pub(super) struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    pub(super) fn parse(query: &str) -> Result<Self, Problem> {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decoded(name)?, decoded(value)?))
        });
        Ok(Self { pairs: pairs.collect::<Result<_, Problem>>()? })
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A parameter that must be there.
    pub(super) fn need(&self, name: &'static str) -> Result<&str, Problem> {
        let missing = || Problem::invalid(format!("the query parameter {name} is missing"));
        self.get(name).ok_or_else(missing)
    }

    /// `true` or `false`.
    pub(super) fn flag(&self, name: &'static str) -> Result<Option<bool>, Problem> {
        match self.get(name) {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(_) => {
                Err(Problem::invalid(format!("the query parameter {name} must be true or false")))
            }
        }
    }
}

impl FromRequestParts<Arc<App>> for Query {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, Problem> {
        Self::parse(parts.uri.query().unwrap_or_default())
    }
}

fn decoded(text: &str) -> Result<String, Problem> {
    let hex = |digit: &u8| char::from(*digit).to_digit(16).and_then(|n| u8::try_from(n).ok());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let pair = tail.split_first_chunk::<2>().map(|([high, low], tail)| (high, low, tail));
        let value = pair.and_then(|(high, low, tail)| Some((hex(high)? << 4 | hex(low)?, tail)));
        let bad = || Problem::invalid("the query has a '%' without two hex digits after it");
        let (value, tail) = value.ok_or_else(bad)?;
        bytes.push(value);
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| Problem::invalid("the query is not UTF-8"))
}

/// Where the request was sent, for links to the next page.
pub(super) struct Here {
    host: String,
    path: String,
    query: String,
}

impl FromRequestParts<Arc<App>> for Here {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let named = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let own = || app.config.api.listen.to_string();
        Ok(Self {
            host: named.map_or_else(own, str::to_owned),
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
        })
    }
}

impl Here {
    /// The same request with one parameter replaced. The value must need no escaping.
    pub(super) fn with(&self, name: &str, value: &str) -> String {
        let kept = self.query.split('&').filter(|pair| {
            !pair.is_empty() && pair.split_once('=').map_or(*pair, |(known, _)| known) != name
        });
        let query: String = kept.map(|pair| format!("{pair}&")).collect();
        let Self { host, path, .. } = self;
        format!("https://{host}{path}?{query}{name}={value}")
    }
}

/// As much of a client's text as an error message should repeat.
pub(super) fn shortened(text: &str) -> String {
    format!("{:?}", text.chars().take(80).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_as_the_sdk_writes_it() {
        let query =
            Query::parse("path=/tmp/%C3%A4%20b+c.txt&labels=a=b,c=d&x&api-version=1").unwrap();
        assert_eq!(query.get("path"), Some("/tmp/ä b+c.txt"));
        assert_eq!(query.get("labels"), Some("a=b,c=d"));
        assert_eq!(query.get("x"), Some(""));
        assert_eq!(query.get("y"), None);
    }

    #[test]
    fn a_query_that_cannot_be_decoded_is_refused() {
        for text in ["a=%", "a=%4", "a=%zz", "a=%ff", "%C3=1"] {
            assert!(Query::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_next_link_keeps_the_query_and_replaces_its_own_parameter() {
        let here = Here {
            host: "node:8443".to_owned(),
            path: "/a".to_owned(),
            query: "labels=a=b&skipToken=x&api-version=1".to_owned(),
        };
        let link = here.with("skipToken", "y");
        assert_eq!(link, "https://node:8443/a?labels=a=b&api-version=1&skipToken=y");
    }
}
