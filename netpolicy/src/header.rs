//! What a rule does to the headers of a request.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::limits::{
    HEADER_NAME_BYTES_MAX, HEADER_VALUE_BYTES_MAX, SECRET_ID_BYTES_MAX, SECRET_KEY_BYTES_MAX,
};

/// Where a secret's value goes in a [`ValueFormat`].
const PLACEHOLDER: &str = "{value}";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    #[error("{0:?} is not a header's name: 1 to {HEADER_NAME_BYTES_MAX} letters, digits and -_.")]
    Name(String),
    #[error("{0} is the connection's affair and cannot be changed by a rule")]
    Framing(String),
    #[error(
        "a value has no line breaks, no NUL, nothing but printable ASCII, and no space at its ends"
    )]
    Value,
    #[error("is longer than {HEADER_VALUE_BYTES_MAX} bytes")]
    Long,
    #[error("a format has {PLACEHOLDER} in it, once")]
    Format,
}

/// A header's name as the client wrote it. Names are the same whatever their case.
#[derive(Debug, Clone, Eq, Serialize)]
#[serde(transparent)]
pub struct HeaderName(Box<str>);

impl HeaderName {
    pub fn parse(text: &str) -> Result<Self, BadHeader> {
        // The grammar allows more; no header that anybody injects has it.
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if !(1..=HEADER_NAME_BYTES_MAX).contains(&text.len()) || !text.bytes().all(allowed) {
            return Err(BadHeader::Name(text.chars().take(64).collect()));
        }
        let lower = text.to_ascii_lowercase();
        let framing = [
            "connection",
            "content-length",
            "expect",
            "host",
            "http2-settings",
            "keep-alive",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
        ];
        if framing.contains(&lower.as_str()) || lower.starts_with("proxy-") {
            return Err(BadHeader::Framing(lower));
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl PartialEq for HeaderName {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

fn check_value(text: &str) -> Result<(), BadHeader> {
    if text.len() > HEADER_VALUE_BYTES_MAX {
        return Err(BadHeader::Long);
    }
    let allowed = |b: u8| matches!(b, b' '..=b'~' | b'\t');
    if text.bytes().all(allowed) && text.trim_matches([' ', '\t']) == text {
        Ok(())
    } else {
        Err(BadHeader::Value)
    }
}

/// A value that can be sent. It may be a secret: it is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct HeaderValue(Box<str>);

impl HeaderValue {
    /// Also for what a secret or a token turned out to be: it is as foreign as what a client sends.
    pub fn parse(text: &str) -> Result<Self, BadHeader> {
        check_value(text).map(|()| Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HeaderValue(..)")
    }
}

/// What is around a secret in a header's value, as in `Bearer {value}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ValueFormat(Box<str>);

impl ValueFormat {
    pub fn parse(text: &str) -> Result<Self, BadHeader> {
        check_value(text)?;
        if text.matches(PLACEHOLDER).count() == 1 {
            Ok(Self(text.into()))
        } else {
            Err(BadHeader::Format)
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The header's value for this secret.
    pub fn apply(&self, secret: &str) -> Result<HeaderValue, BadHeader> {
        HeaderValue::parse(&self.0.replacen(PLACEHOLDER, secret, 1))
    }
}

/// A value of one of the group's secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    pub secret_id: String,
    /// `None`: the only one it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_key: Option<String>,
    /// `None`: the value as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<ValueFormat>,
}

/// Whose token it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    SystemAssigned,
    UserAssigned { resource_id: String },
}

/// A token of one of the group's identities, made for a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagedIdentityRef {
    pub identity: Identity,
    pub resource: String,
    /// `None`: after `Bearer ` in Authorization, and as it is in another header.
    pub format: Option<ValueFormat>,
}

impl Serialize for ManagedIdentityRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            r#type: &'static str,
            resource: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            identity_resource_id: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            format: Option<&'a ValueFormat>,
        }
        let (r#type, identity_resource_id) = match &self.identity {
            Identity::SystemAssigned => ("SystemAssigned", None),
            Identity::UserAssigned { resource_id } => ("UserAssigned", Some(resource_id.as_str())),
        };
        Wire {
            r#type,
            resource: &self.resource,
            identity_resource_id,
            format: self.format.as_ref(),
        }
        .serialize(serializer)
    }
}

/// Where a value comes from at the time of the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ValueRef {
    SecretRef(SecretRef),
    ManagedIdentityRef(ManagedIdentityRef),
}

impl ValueRef {
    /// What a header of this name has as its value when this is what is referred to.
    pub fn written(&self, name: &HeaderName, value: &str) -> Result<HeaderValue, BadHeader> {
        match self {
            Self::SecretRef(SecretRef { format: Some(format), .. })
            | Self::ManagedIdentityRef(ManagedIdentityRef { format: Some(format), .. }) => {
                format.apply(value)
            }
            // A token alone is no credential there (RFC 6750, section 2.1).
            Self::ManagedIdentityRef(_) if name.0.eq_ignore_ascii_case("authorization") => {
                HeaderValue::parse(&format!("Bearer {value}"))
            }
            _ => HeaderValue::parse(value),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Header {
    Value(HeaderValue),
    ValueRef(ValueRef),
}

/// One change to the headers of a request. A header is named in whatever case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderChange {
    /// Every header of this name is taken out, and this one put in.
    Set(HeaderName, Header),
    /// The header is put in if the request has none of this name.
    Insert(HeaderName, Header),
    /// Every header of this name is taken out.
    Remove(HeaderName),
}

impl HeaderChange {
    pub fn name(&self) -> &HeaderName {
        match self {
            Self::Set(name, _) | Self::Insert(name, _) | Self::Remove(name) => name,
        }
    }

    pub fn header(&self) -> Option<&Header> {
        match self {
            Self::Set(_, header) | Self::Insert(_, header) => Some(header),
            Self::Remove(_) => None,
        }
    }

    /// Bytes that it takes of a policy's budget.
    pub(crate) fn bytes(&self) -> usize {
        let value = match self.header() {
            Some(Header::Value(value)) => value.0.len(),
            Some(Header::ValueRef(ValueRef::SecretRef(SecretRef { format, .. })))
            | Some(Header::ValueRef(ValueRef::ManagedIdentityRef(ManagedIdentityRef {
                format,
                ..
            }))) => format.as_ref().map_or(0, |format| format.0.len()),
            None => 0,
        };
        self.name().0.len() + value
    }
}

impl Serialize for HeaderChange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Wire<'a> {
            operation: &'static str,
            name: &'a HeaderName,
            #[serde(flatten)]
            header: Option<&'a Header>,
        }
        let operation = match self {
            Self::Set(..) => "Set",
            Self::Insert(..) => "Insert",
            Self::Remove(_) => "Remove",
        };
        Wire { operation, name: self.name(), header: self.header() }.serialize(serializer)
    }
}

/// Whether `text` can be the id of a secret.
pub fn check_secret_id(text: &str) -> Result<(), String> {
    check_word(text, SECRET_ID_BYTES_MAX)
}

/// Whether `text` can be the name of a value in a secret.
pub fn check_secret_key(text: &str) -> Result<(), String> {
    check_word(text, SECRET_KEY_BYTES_MAX)
}

fn check_word(text: &str, bytes_max: usize) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let fits = (1..=bytes_max).contains(&text.len())
        && text.bytes().all(allowed)
        && !text.starts_with('.');
    if fits {
        return Ok(());
    }
    let shown: String = text.chars().take(64).collect();
    Err(format!(
        "{shown:?} must be 1 to {bytes_max} letters, digits and -_. and not begin with '.'"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e7_no_value_or_format_can_end_a_header_and_begin_another() {
        for text in ["a\r\nb", "a\nb", "a\rb", "a\0b", "ä", " a", "a ", "\x7f"] {
            assert_eq!(HeaderValue::parse(text), Err(BadHeader::Value), "{text:?}");
            let format = format!("Bearer {{value}}{text}");
            assert_eq!(ValueFormat::parse(&format).is_ok(), text == " a", "{text:?}");
        }
        for text in ["", "Bearer", "Bearer {Value}", "{value}{value}"] {
            assert_eq!(ValueFormat::parse(text), Err(BadHeader::Format), "{text}");
        }
        let format = ValueFormat::parse("Bearer {value}").unwrap();
        assert_eq!(format.apply("abc").unwrap().as_str(), "Bearer abc");
        assert_eq!(format.apply("a\r\nb"), Err(BadHeader::Value));
    }

    #[test]
    fn a_rule_changes_no_header_that_frames_the_message() {
        for name in
            ["Host", "content-length", "Transfer-Encoding", "Proxy-Authorization", "TE", "Upgrade"]
        {
            assert!(matches!(HeaderName::parse(name), Err(BadHeader::Framing(_))), "{name}");
        }
        for name in ["", ":authority", "a b", "a:", "ä", "a\n", &"a".repeat(129)] {
            assert!(matches!(HeaderName::parse(name), Err(BadHeader::Name(_))), "{name}");
        }
        assert_eq!(HeaderName::parse("X-Api-Key"), HeaderName::parse("x-api-key"));
    }

    #[test]
    fn a_token_is_a_bearer_token_in_authorization_unless_a_format_says_otherwise() {
        let written = |name: &str, format: Option<&str>| {
            let reference = ValueRef::ManagedIdentityRef(ManagedIdentityRef {
                identity: Identity::SystemAssigned,
                resource: "https://vault.test".to_owned(),
                format: format.map(|format| ValueFormat::parse(format).unwrap()),
            });
            let value = reference.written(&HeaderName::parse(name).unwrap(), "t0ken").unwrap();
            value.as_str().to_owned()
        };
        assert_eq!(written("authorization", None), "Bearer t0ken");
        assert_eq!(written("Authorization", Some("Token {value}")), "Token t0ken");
        assert_eq!(written("X-Token", None), "t0ken");
    }

    #[test]
    fn a_value_is_not_shown() {
        assert_eq!(format!("{:?}", HeaderValue::parse("hunter2").unwrap()), "HeaderValue(..)");
    }
}
