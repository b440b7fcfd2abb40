//! Headers on their way: those of a connection end with it, and a rule's changes are made last.

use holdfast_netpolicy::{Header, HeaderChange, Transform, ValueRef};
use hyper::{
    HeaderMap,
    header::{
        ALT_SVC, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, HeaderValue, TE, TRAILER,
        TRANSFER_ENCODING, UPGRADE,
    },
};

use crate::{group::reference, sandbox::Rules};

/// A header change with its value at hand. Values may be secrets: they are not shown.
pub(super) enum Change {
    Set(HeaderName, HeaderValue),
    Insert(HeaderName, HeaderValue),
    Remove(HeaderName),
}

/// Why a header that a rule puts in cannot be had. The request is not sent without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unusable {
    /// The value that it refers to cannot be sent as a header.
    Bad,
    /// The group has no such secret, or not any more.
    NoSecret,
    /// The identity was given no token.
    NoToken,
    /// The token's time is over, and nobody brought another.
    Expired,
}

impl Unusable {
    /// For the record.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Bad => "bad_value",
            Self::NoSecret => "secret_missing",
            Self::NoToken => "token_missing",
            Self::Expired => "token_expired",
        }
    }
}

/// What a rule does to headers, with the values of this moment.
pub(super) fn changes(
    rules: &Rules,
    transform: &Transform,
    now_ms: u64,
) -> Result<Vec<Change>, Unusable> {
    transform.headers.iter().map(|change| self::change(rules, change, now_ms)).collect()
}

fn change(rules: &Rules, change: &HeaderChange, now_ms: u64) -> Result<Change, Unusable> {
    let bad = Unusable::Bad;
    let name = HeaderName::from_bytes(change.name().as_str().as_bytes()).map_err(|_| bad)?;
    let value = |header: &Header| -> Result<HeaderValue, Unusable> {
        let text = match header {
            Header::Value(value) => value.clone(),
            Header::ValueRef(value) => {
                let missing = match value {
                    ValueRef::SecretRef(_) => Unusable::NoSecret,
                    ValueRef::ManagedIdentityRef(_) => Unusable::NoToken,
                };
                let secret = rules.secrets.get(&reference(value)).ok_or(missing)?;
                if secret.expires_at_ms.is_some_and(|end| now_ms >= end) {
                    return Err(Unusable::Expired);
                }
                value.written(change.name(), &secret.text).map_err(|_| bad)?
            }
        };
        let mut value = HeaderValue::from_str(text.as_str()).map_err(|_| bad)?;
        // Kept out of the tables of header compression, and out of `Debug`.
        value.set_sensitive(true);
        Ok(value)
    };
    Ok(match change {
        HeaderChange::Set(_, header) => Change::Set(name, value(header)?),
        HeaderChange::Insert(_, header) => Change::Insert(name, value(header)?),
        HeaderChange::Remove(_) => Change::Remove(name),
    })
}

/// Makes a rule's changes.
pub(super) fn apply(headers: &mut HeaderMap, changes: Vec<Change>) {
    for change in changes {
        match change {
            Change::Set(name, value) => {
                remove(headers, &name);
                headers.insert(name, value);
            }
            Change::Insert(name, value) => {
                if !headers.keys().any(|other| same(other, &name)) {
                    headers.insert(name, value);
                }
            }
            Change::Remove(name) => remove(headers, &name),
        }
    }
}

/// Many servers hand headers on with `-` and `_` made the same: then so are the names.
fn same(one: &HeaderName, other: &HeaderName) -> bool {
    let plain = |name: &HeaderName| name.as_str().replace('_', "-");
    one == other || plain(one) == plain(other)
}

fn remove(headers: &mut HeaderMap, name: &HeaderName) {
    let variants: Vec<_> = headers.keys().filter(|other| same(other, name)).cloned().collect();
    for variant in variants {
        headers.remove(variant);
    }
}

/// Takes out what was meant for us or for this connection.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
        .collect();
    let keep_trailers = headers.get(TE).is_some_and(|value| value.as_bytes() == b"trailers");
    let fixed = [CONNECTION, TRANSFER_ENCODING, UPGRADE, TRAILER, TE];
    for name in named.into_iter().chain(fixed) {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection", "http2-settings"] {
        headers.remove(name);
    }
    let proxy: Vec<_> =
        headers.keys().filter(|name| name.as_str().starts_with("proxy-")).cloned().collect();
    for name in proxy {
        headers.remove(name);
    }
    if keep_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Headers of a request, without those that we write ourselves.
pub(super) fn of_request(mut headers: HeaderMap, body_is_chunked: bool) -> HeaderMap {
    strip(&mut headers);
    headers.remove(HOST);
    // Answered by us: the body is asked for when the server takes it.
    headers.remove(EXPECT);
    if body_is_chunked {
        headers.remove(CONTENT_LENGTH);
    }
    headers
}

/// Headers of a response. What would send the guest round us is taken out.
pub(super) fn of_response(headers: &mut HeaderMap) {
    strip(headers);
    headers.remove(ALT_SVC);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            headers.append(name, value.parse().unwrap());
        }
        headers
    }

    fn set(name: &str, value: &str) -> Change {
        Change::Set(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap())
    }

    #[test]
    fn a_header_that_is_set_is_the_only_one_of_its_name_in_any_spelling() {
        let mut headers = map(&[
            ("X-Api-Key", "guest"),
            ("x-api-key", "again"),
            ("X_Api_Key", "underscores"),
            ("x-api_key", "both"),
            ("X-Other", "stays"),
        ]);
        apply(&mut headers, vec![set("X-API-Key", "ours")]);
        assert_eq!(headers, map(&[("x-other", "stays"), ("x-api-key", "ours")]));
    }

    #[test]
    fn what_a_guest_names_in_connection_cannot_take_out_what_a_rule_sets() {
        let guest = map(&[("connection", "close, Authorization"), ("authorization", "guest")]);
        let mut headers = of_request(guest, false);
        apply(&mut headers, vec![set("authorization", "ours")]);
        assert_eq!(headers, map(&[("authorization", "ours")]));
    }

    #[test]
    fn d9_d18_what_is_for_the_connection_or_for_a_proxy_goes_no_further() {
        let guest = map(&[
            ("connection", "Upgrade, HTTP2-Settings"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABk"),
            ("proxy-authorization", "Basic x"),
            ("keep-alive", "300"),
            ("te", "trailers, deflate"),
            ("transfer-encoding", "chunked"),
            ("expect", "100-continue"),
            ("accept", "*/*"),
        ]);
        assert_eq!(of_request(guest, true), map(&[("accept", "*/*")]));
    }

    #[test]
    fn d16_a_response_names_no_other_way_to_its_server() {
        let mut headers = map(&[("alt-svc", "h3=\":443\""), ("etag", "x")]);
        of_response(&mut headers);
        assert_eq!(headers, map(&[("etag", "x")]));
    }
}
