//! A policy as it comes: every field that is known, nothing checked but its type.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{Action, Inspection, TlsHandling, policy::CidrProtocol};

/// A JSON object, and not the array of its values that serde would also take for one.
#[derive(Debug)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OfMap<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfMap<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        from.deserialize_map(OfMap(PhantomData))
    }
}

macro_rules! words {
    ($type:ident: $($name:ident = $text:literal),*) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
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
    pub(crate) rules: Option<Vec<Object<Rule>>>,
    pub(crate) host_rules: Option<Vec<Object<HostRule>>>,
    pub(crate) cidr_rules: Option<Vec<Object<CidrRule>>>,
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
    pub(crate) r#match: Option<Object<Match>>,
    pub(crate) action: Option<Object<RuleAction>>,
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
    pub(crate) headers: Option<Vec<Object<HeaderChange>>>,
    pub(crate) allow_plain_http: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HeaderChange {
    pub(crate) operation: Option<Operation>,
    pub(crate) name: Option<String>,
    pub(crate) value: Option<String>,
    pub(crate) value_ref: Option<Object<ValueRef>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ValueRef {
    pub(crate) secret_ref: Option<Object<SecretRef>>,
    pub(crate) managed_identity_ref: Option<Object<ManagedIdentityRef>>,
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
