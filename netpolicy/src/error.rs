//! Why a policy was refused: which rule, which of its fields, why, and what to do.

use std::fmt;

use crate::{BadCidr, BadHeader, BadHost, BadMethod, BadPath, limits};

/// Where in a policy something is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Place {
    /// The list that the rule is in, and its index there.
    pub rule: Option<(&'static str, usize)>,
    /// The rule's name, if it has one.
    pub name: Option<String>,
    /// The field, by its path in the rule, or in the policy.
    pub field: String,
}

/// `rules[3] "name": match.host`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((list, index)) = self.rule {
            write!(f, "{list}[{index}]")?;
            if let Some(name) = &self.name {
                write!(f, " {name:?}")?;
            }
            if !self.field.is_empty() {
                f.write_str(": ")?;
            }
        }
        f.write_str(&self.field)
    }
}

/// What is wrong with a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("the policy is not JSON: {0}")]
    Syntax(String),
    #[error("{0}")]
    Shape(String),
    #[error("is longer than {max} bytes")]
    Bytes { max: usize },
    #[error("has {found} entries, more than {max}")]
    Count { found: usize, max: usize },
    #[error("{0}")]
    Host(#[from] BadHost),
    #[error("{0}")]
    Path(#[from] BadPath),
    #[error("{0}")]
    Method(#[from] BadMethod),
    #[error("{0:?} would match nothing that is sent: methods are told apart by case")]
    MethodCase(String),
    #[error("{0}")]
    Header(#[from] BadHeader),
    #[error("{0}")]
    Cidr(#[from] BadCidr),
    #[error("{0:?} is no record type that can be allowed")]
    RecordType(String),
    #[error("0 is no port")]
    Port,
    #[error("{0}")]
    Word(String),
    #[error("is missing")]
    Missing,
    #[error("means nothing for {0}")]
    NotFor(&'static str),
    #[error("{0}")]
    Contradiction(&'static str),
}

/// Why a policy was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", self.before())]
pub struct PolicyError {
    pub place: Place,
    pub problem: Problem,
}

impl PolicyError {
    fn before(&self) -> String {
        let place = self.place.to_string();
        if place.is_empty() { place } else { format!("{place}: ") }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match &self.problem {
            Problem::Syntax(_) => "send one JSON object in UTF-8".to_owned(),
            Problem::Shape(_) => {
                "docs/api.md lists the fields of a policy and what they take".into()
            }
            Problem::Bytes { max } => format!("keep it to {max} bytes"),
            Problem::Count { max, .. } => {
                format!("keep to {max}; one `*.` pattern may stand for many names")
            }
            Problem::Host(BadHost::Address(_)) => "name addresses in cidrRules".to_owned(),
            Problem::Host(_) => {
                "write a full name, `*.example.com` for all names below one, or `*`".to_owned()
            }
            Problem::Path(_) => {
                "write a path as a request has it, `*` for any characters".to_owned()
            }
            Problem::Method(_) => "write the method's name, as GET".to_owned(),
            Problem::MethodCase(method) => format!("write {}", method.to_ascii_uppercase()),
            Problem::Header(BadHeader::Framing(name)) if name == "host" => {
                "send the request to another host with a rule of type Rewrite".to_owned()
            }
            Problem::Header(BadHeader::Format) => "write it as `Bearer {value}`".to_owned(),
            Problem::Header(_) => "change the header".to_owned(),
            Problem::Cidr(_) => "write it as 203.0.113.0/24".to_owned(),
            Problem::RecordType(_) => {
                "NS, CNAME, SOA, MX, TXT, SRV and CAA can be; addresses are answered anyway".into()
            }
            Problem::Port => format!("give 1 to 65535, at most {} of them", limits::PORTS_MAX),
            Problem::Word(_) => "correct it".to_owned(),
            Problem::Missing => "add the field".to_owned(),
            Problem::NotFor(_) => "leave the field out, or change the rule's type".to_owned(),
            Problem::Contradiction(_) => "decide for one of the two".to_owned(),
        }
    }
}
