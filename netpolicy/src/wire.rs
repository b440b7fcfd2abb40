//! A policy as it comes: every field that is known, nothing checked but its type.

use serde::Deserialize;

use crate::{Action, Inspection, TlsHandling, policy::CidrProtocol};

macro_rules! words {
    ($type:ident: $($name:ident = $text:literal),*) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                match <std::borrow::Cow<'de, str>>::deserialize(from)?.as_ref() {
                    $($text => Ok(Self::$name),)*
                    other => Err(serde::de::Error::unknown_variant(other, &[$($text),*])),
                }
            }
        }
    };
}

words!(Action: Allow = "Allow", Deny = "Deny");
words!(Inspection: Legacy = "Legacy", Full = "Full", Partial = "Partial", None = "None");
words!(TlsHandling: Open = "Open", Passthrough = "Passthrough");
words!(CidrProtocol: Tcp = "tcp", Udp = "udp", Any = "any");

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum ActionType {
    Allow,
    Deny,
    Transform,
    Rewrite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum Operation {
    Set,
    Insert,
    Remove,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum IdentityType {
    SystemAssigned,
    UserAssigned,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Policy {
    pub(crate) default_action: Option<Action>,
    pub(crate) traffic_inspection: Option<Inspection>,
    pub(crate) rules: Option<Vec<Rule>>,
    pub(crate) host_rules: Option<Vec<HostRule>>,
    pub(crate) cidr_rules: Option<Vec<CidrRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HostRule {
    pub(crate) pattern: Option<String>,
    pub(crate) action: Option<Action>,
    pub(crate) ports: Option<Vec<u16>>,
    pub(crate) tls: Option<TlsHandling>,
    pub(crate) dns_types: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Rule {
    pub(crate) name: Option<String>,
    pub(crate) r#match: Option<Match>,
    pub(crate) action: Option<RuleAction>,
    pub(crate) tls: Option<TlsHandling>,
    pub(crate) dns_types: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Match {
    pub(crate) host: Option<String>,
    pub(crate) path: Option<String>,
    pub(crate) methods: Option<Vec<String>>,
    pub(crate) ports: Option<Vec<u16>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RuleAction {
    pub(crate) r#type: Option<ActionType>,
    pub(crate) scheme: Option<String>,
    pub(crate) host: Option<String>,
    pub(crate) port: Option<u16>,
    pub(crate) path: Option<String>,
    pub(crate) headers: Option<Vec<HeaderChange>>,
    pub(crate) allow_plain_http: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HeaderChange {
    pub(crate) operation: Option<Operation>,
    pub(crate) name: Option<String>,
    pub(crate) value: Option<String>,
    pub(crate) value_ref: Option<ValueRef>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ValueRef {
    pub(crate) secret_ref: Option<SecretRef>,
    pub(crate) managed_identity_ref: Option<ManagedIdentityRef>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct SecretRef {
    pub(crate) secret_id: Option<String>,
    pub(crate) secret_key: Option<String>,
    pub(crate) format: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ManagedIdentityRef {
    pub(crate) r#type: Option<IdentityType>,
    pub(crate) resource: Option<String>,
    pub(crate) identity_resource_id: Option<String>,
    pub(crate) format: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CidrRule {
    pub(crate) name: Option<String>,
    pub(crate) cidr: Option<String>,
    pub(crate) protocol: Option<CidrProtocol>,
    pub(crate) ports: Option<Vec<u16>>,
    pub(crate) action: Option<Action>,
}
