//! An egress policy, checked.

use std::{fmt, net::IpAddr};

use serde::{Serialize, Serializer};

use crate::{
    Cidr, DnsType, HeaderChange, HostName, HostPattern, Method, PathPattern, Protocol, Scheme,
    index::Index,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Action {
    Allow,
    Deny,
}

/// How far the proxy looks into what passes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Inspection {
    /// All TLS is opened; what is not HTTP follows the CIDR rules and the default action.
    Legacy,
    /// All TLS is opened; what is not HTTP passes by a CIDR rule only.
    Full,
    /// TLS is opened where a rule looks at path, method or headers; what is not HTTP follows the
    /// CIDR rules and the default action.
    Partial,
    /// Rules and host rules are not looked at: CIDR rules and the default action are the policy.
    None,
}

/// What is done with TLS where a rule applies, whatever the inspection mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum TlsHandling {
    Open,
    /// It is judged by its server name. For clients that pin certificates or bring their own.
    Passthrough,
}

/// A rule by host alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostRule {
    pub pattern: HostPattern,
    pub action: Action,
    /// Empty: 80 and 443, or every port if the rule denies. An extension.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// An extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsHandling>,
    /// Record types answered besides addresses. An extension.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns_types: Vec<DnsType>,
}

/// Which requests a rule speaks of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Match {
    pub host: HostPattern,
    /// `None`: every path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathPattern>,
    /// Empty: every method.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<Method>,
    /// Empty: 80 and 443, or every port if the rule denies. An extension.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

/// Changes to the headers of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transform {
    pub headers: Vec<HeaderChange>,
    /// They may also be made over HTTP without TLS. An extension.
    pub allow_plain_http: bool,
}

/// A host to send requests to. Addresses are judged as any that is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RewriteHost {
    Name(HostName),
    Address(IpAddr),
}

impl fmt::Display for RewriteHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// Where requests go instead. What is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    pub scheme: Option<Scheme>,
    pub host: Option<RewriteHost>,
    /// `None`: the port of `scheme` if that is given, else that of the request. An extension.
    pub port: Option<u16>,
    /// In place of the whole path; the query stays.
    pub path: Option<String>,
    /// Changes to the headers on the way. Empty: none.
    pub transform: Transform,
}

impl Rewrite {
    /// The scheme of a request of this scheme once it is rewritten.
    pub fn scheme_of(&self, request: Scheme) -> Scheme {
        self.scheme.unwrap_or(request)
    }

    /// The port that such a request goes to, if it was meant for `port`.
    pub fn port_of(&self, port: u16) -> u16 {
        self.port.unwrap_or_else(|| self.scheme.map_or(port, Scheme::default_port))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleAction {
    Allow,
    Deny,
    Transform(Transform),
    Rewrite(Rewrite),
}

impl RuleAction {
    /// What it does to headers.
    pub fn headers(&self) -> &[HeaderChange] {
        match self {
            Self::Transform(transform) => &transform.headers,
            Self::Rewrite(rewrite) => &rewrite.transform.headers,
            Self::Allow | Self::Deny => &[],
        }
    }
}

impl Serialize for RuleAction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Default, Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            r#type: &'static str,
            #[serde(skip_serializing_if = "Option::is_none")]
            scheme: Option<Scheme>,
            #[serde(skip_serializing_if = "Option::is_none")]
            host: Option<String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            port: Option<u16>,
            #[serde(skip_serializing_if = "Option::is_none")]
            path: Option<&'a str>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            headers: &'a [HeaderChange],
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            allow_plain_http: bool,
        }
        let wire = match self {
            Self::Allow => Wire { r#type: "Allow", ..Wire::default() },
            Self::Deny => Wire { r#type: "Deny", ..Wire::default() },
            Self::Transform(Transform { headers, allow_plain_http }) => Wire {
                r#type: "Transform",
                headers,
                allow_plain_http: *allow_plain_http,
                ..Wire::default()
            },
            Self::Rewrite(Rewrite { scheme, host, port, path, transform }) => Wire {
                r#type: "Rewrite",
                scheme: *scheme,
                host: host.as_ref().map(RewriteHost::to_string),
                port: *port,
                path: path.as_deref(),
                headers: &transform.headers,
                allow_plain_http: transform.allow_plain_http,
            },
        };
        wire.serialize(serializer)
    }
}

/// One of the ordered rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub r#match: Match,
    pub action: RuleAction,
    /// An extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsHandling>,
    /// Record types answered besides addresses. An extension.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns_types: Vec<DnsType>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CidrProtocol {
    Tcp,
    Udp,
    Any,
}

impl CidrProtocol {
    pub fn covers(self, protocol: Protocol) -> bool {
        match self {
            Self::Any => true,
            Self::Tcp => protocol == Protocol::Tcp,
            Self::Udp => protocol == Protocol::Udp,
        }
    }
}

/// A rule for flows to addresses. An extension.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CidrRule {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub cidr: Cidr,
    pub protocol: CidrProtocol,
    /// Empty: every port.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    pub action: Action,
}

impl CidrRule {
    pub fn covers(&self, protocol: Protocol, address: IpAddr, port: u16) -> bool {
        self.protocol.covers(protocol)
            && (self.ports.is_empty() || self.ports.contains(&port))
            && self.cidr.contains(address)
    }
}

/// An egress policy. Its form on the wire is what [`Policy::parse`] reads and `Serialize` writes.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    pub(crate) default_action: Action,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) traffic_inspection: Option<Inspection>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<Rule>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) host_rules: Vec<HostRule>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) cidr_rules: Vec<CidrRule>,
    #[serde(skip)]
    pub(crate) index: Index,
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        // The index is made of the rest.
        self.default_action == other.default_action
            && self.traffic_inspection == other.traffic_inspection
            && self.rules == other.rules
            && self.host_rules == other.host_rules
            && self.cidr_rules == other.cidr_rules
    }
}

impl Eq for Policy {}

/// What holds where nobody gave a policy: nothing leaves.
impl Default for Policy {
    fn default() -> Self {
        Self {
            default_action: Action::Deny,
            traffic_inspection: None,
            rules: Vec::new(),
            host_rules: Vec::new(),
            cidr_rules: Vec::new(),
            index: Index::default(),
        }
    }
}

impl Policy {
    pub fn default_action(&self) -> Action {
        self.default_action
    }

    /// As given, or else Full where the default is to deny and Partial where it is to allow.
    pub fn inspection(&self) -> Inspection {
        self.traffic_inspection.unwrap_or(match self.default_action {
            Action::Deny => Inspection::Full,
            Action::Allow => Inspection::Partial,
        })
    }

    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    pub fn host_rules(&self) -> &[HostRule] {
        &self.host_rules
    }

    pub fn cidr_rules(&self) -> &[CidrRule] {
        &self.cidr_rules
    }

    /// What `rules` refers to of the group's secrets and identities.
    pub fn value_refs(&self) -> impl Iterator<Item = &crate::ValueRef> {
        let changes = self.rules.iter().flat_map(|rule| rule.action.headers());
        changes.filter_map(|change| match change.header() {
            Some(crate::Header::ValueRef(reference)) => Some(reference),
            _ => None,
        })
    }

    /// As JSON, in one line.
    pub fn to_json(&self) -> String {
        // Its maps have keys of text and its numbers are integers: nothing in it can fail.
        serde_json::to_string(self).unwrap_or_default()
    }
}
