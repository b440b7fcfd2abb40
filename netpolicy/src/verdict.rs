//! What a policy makes of a flow, and why.

use std::fmt;

use crate::{Rewrite, Transform};

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<'p> {
    Allow,
    Deny,
    /// TLS: what the policy says can be told only from the requests inside it.
    Open(Opening),
    /// Let it through with these changes to its headers.
    Transform(&'p Transform),
    /// Send it elsewhere.
    Rewrite(&'p Rewrite),
}

/// Why TLS is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// The policy has all of it opened.
    Full,
    /// A rule that may apply looks at path, method or headers.
    Partial,
}

/// Which list of the policy a rule is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum List {
    Rules,
    HostRules,
    CidrRules,
}

impl List {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rules => "rules",
            Self::HostRules => "hostRules",
            Self::CidrRules => "cidrRules",
        }
    }
}

/// What gave a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleRef<'p> {
    Rule {
        list: List,
        index: usize,
        name: Option<&'p str>,
    },
    /// The default action, or what holds in every policy.
    Default,
}

/// `rules[3] "name"`, `hostRules[0]` or `default`.
impl fmt::Display for RuleRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Rule { list, index, name: None } => write!(f, "{}[{index}]", list.as_str()),
            Self::Rule { list, index, name: Some(name) } => {
                write!(f, "{}[{index}] {name:?}", list.as_str())
            }
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why, for machines.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// The rule says so.
    Rule = "rule",
    /// No rule speaks of it.
    DefaultAction = "default_action",
    /// DNS: no rule could allow anything to this name.
    NameNotAllowed = "name_not_allowed",
    /// DNS: a name of the machine or its network, which no rule names.
    LocalName = "local_name",
    /// DNS: a record type that no rule adds for this name.
    RecordType = "record_type",
    /// TLS: the policy has all TLS opened.
    InspectionFull = "inspection_full",
    /// TLS: a rule that may apply looks at path, method or headers.
    RuleNeedsRequest = "rule_needs_request",
    /// TLS, and every request in it would be denied.
    NothingInsideAllowed = "nothing_inside_allowed",
    /// The inspection mode lets nothing pass that it cannot look into.
    NotInspectable = "not_inspectable",
    /// UDP passes by a CIDR rule only.
    UdpNeedsCidrRule = "udp_needs_cidr_rule",
    /// Headers are not put in over plain HTTP unless the rule says that they may be.
    PlainHttpTransform = "plain_http_transform",
    /// TRACE would send back what was put in.
    TraceTransform = "trace_transform",
}

/// What a policy makes of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict<'p> {
    pub outcome: Outcome<'p>,
    pub rule: RuleRef<'p>,
    pub reason: Reason,
}

impl Verdict<'_> {
    /// Whether nothing may leave.
    pub fn is_deny(&self) -> bool {
        matches!(self.outcome, Outcome::Deny)
    }
}
