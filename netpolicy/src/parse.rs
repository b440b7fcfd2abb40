//! From the bytes a client sent to a policy, or to the reason why they are none.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::{
    Action, CidrRule, DnsType, Header, HeaderChange, HeaderName, HeaderValue, HostName,
    HostPattern, HostRule, Identity, ManagedIdentityRef, Match, Method, PathPattern, Place, Policy,
    PolicyError, Problem, Rewrite, RewriteHost, Rule, RuleAction, Scheme, SecretRef, Target,
    TlsHandling, Transform, ValueFormat, ValueRef, check_secret_id, check_secret_key,
    index::Index,
    limits::{
        CIDR_RULES_MAX, DNS_TYPES_MAX, HEADER_BYTES_MAX, HEADERS_MAX, HOST_RULES_MAX, METHODS_MAX,
        NAME_BYTES_MAX, PATH_PATTERN_BYTES_MAX, POLICY_BYTES_MAX, PORTS_MAX, RESOURCE_BYTES_MAX,
        RULES_MAX,
    },
    wire::{self, ActionType, IdentityType, Object, Operation},
};

impl Policy {
    /// Reads a policy from JSON. One that is wrong anywhere is refused whole.
    pub fn parse(bytes: &[u8]) -> Result<Self, PolicyError> {
        if bytes.len() > POLICY_BYTES_MAX {
            return Err(at("", Problem::Bytes { max: POLICY_BYTES_MAX }));
        }
        let mut input = serde_json::Deserializer::from_slice(bytes);
        let policy: Object<wire::Policy> = serde_path_to_error::deserialize(&mut input)
            .map_err(|error| of_serde(bytes, &error))?;
        input.end().map_err(|error| at("", Problem::Syntax(error.to_string())))?;
        policy.0.check()
    }
}

/// As a part of another JSON text. Its length is that of what is made of it.
impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let wire = Object::<wire::Policy>::deserialize(from)?;
        let policy = wire.0.check().map_err(D::Error::custom)?;
        if policy.to_json().len() > POLICY_BYTES_MAX {
            return Err(D::Error::custom(at("", Problem::Bytes { max: POLICY_BYTES_MAX })));
        }
        Ok(policy)
    }
}

/// In words: what serde says, at the place it says.
fn of_serde(bytes: &[u8], error: &serde_path_to_error::Error<serde_json::Error>) -> PolicyError {
    let reason = error.inner().to_string();
    if !error.inner().is_data() {
        return at("", Problem::Syntax(reason));
    }
    let path = error.path().to_string();
    let place = place_of(bytes, &path);
    PolicyError { place, problem: Problem::Shape(reason) }
}

/// The place that serde calls `rules[3].match.host`.
fn place_of(bytes: &[u8], path: &str) -> Place {
    let whole = || Place { field: path.trim_matches('.').to_owned(), ..Place::default() };
    let Some((list, rest)) = path.split_once('[') else { return whole() };
    let Some((index, rest)) = rest.split_once(']') else { return whole() };
    let list = ["rules", "hostRules", "cidrRules"].into_iter().find(|known| *known == list);
    let (Some(list), Ok(index)) = (list, index.parse::<usize>()) else { return whole() };
    // Only to name the rule: it need not be a policy for that.
    let name = serde_json::from_slice::<serde_json::Value>(bytes).ok().and_then(|policy| {
        let name = policy.get(list)?.get(index)?.get("name")?.as_str()?;
        Some(name.chars().take(NAME_BYTES_MAX).collect())
    });
    Place { rule: Some((list, index)), name, field: rest.trim_start_matches('.').to_owned() }
}

fn at(field: impl Into<String>, problem: impl Into<Problem>) -> PolicyError {
    let place = Place { field: field.into(), ..Place::default() };
    PolicyError { place, problem: problem.into() }
}

type Checked<T> = Result<T, PolicyError>;

/// `value`, which must be there.
fn needed<T>(field: &str, value: Option<T>) -> Checked<T> {
    value.ok_or_else(|| at(field, Problem::Missing))
}

fn count(field: &str, found: usize, max: usize) -> Checked<()> {
    if found > max { Err(at(field, Problem::Count { found, max })) } else { Ok(()) }
}

/// What `found` gives for each of a list, which must not be longer than `max`. An error says which.
fn each<W, T>(
    list: &'static str,
    wire: Option<Vec<Object<W>>>,
    max: usize,
    name: impl Fn(&W) -> Option<String>,
    check: impl Fn(W) -> Checked<T>,
) -> Checked<Vec<T>> {
    let wire = wire.unwrap_or_default();
    count(list, wire.len(), max)?;
    let checked = wire.into_iter().enumerate().map(|(index, Object(rule))| {
        let named = name(&rule).map(|name| name.chars().take(NAME_BYTES_MAX).collect());
        check(rule).map_err(|mut error| {
            error.place.rule = Some((list, index));
            error.place.name = named;
            error
        })
    });
    checked.collect()
}

impl wire::Policy {
    fn check(self) -> Checked<Policy> {
        let default_action = needed("defaultAction", self.default_action)?;
        let rules = each("rules", self.rules, RULES_MAX, |r| r.name.clone(), wire::Rule::check)?;
        let host_rules =
            each("hostRules", self.host_rules, HOST_RULES_MAX, |_| None, wire::HostRule::check)?;
        let cidr_rules = each(
            "cidrRules",
            self.cidr_rules,
            CIDR_RULES_MAX,
            |r| r.name.clone(),
            wire::CidrRule::check,
        )?;
        let changes = rules.iter().flat_map(|rule| rule.action.headers());
        let header_bytes: usize = changes.map(HeaderChange::bytes).sum();
        if header_bytes > HEADER_BYTES_MAX {
            return Err(at("headers of all rules", Problem::Bytes { max: HEADER_BYTES_MAX }));
        }
        let patterns = rules.iter().map(|rule| &rule.r#match.host);
        let index = Index::new(patterns.chain(host_rules.iter().map(|rule| &rule.pattern)));
        Ok(Policy {
            default_action,
            traffic_inspection: self.traffic_inspection,
            rules,
            host_rules,
            cidr_rules,
            index,
        })
    }
}

fn check_name(name: Option<String>) -> Checked<Option<String>> {
    match name {
        Some(name) if name.len() > NAME_BYTES_MAX => {
            Err(at("name", Problem::Bytes { max: NAME_BYTES_MAX }))
        }
        Some(name) if name.is_empty() || name.chars().any(char::is_control) => {
            let reason = "a name has 1 character or more, none of them a control character";
            Err(at("name", Problem::Word(reason.to_owned())))
        }
        name => Ok(name),
    }
}

fn check_ports(field: &str, ports: Option<Vec<u16>>) -> Checked<Vec<u16>> {
    let ports = ports.unwrap_or_default();
    count(field, ports.len(), PORTS_MAX)?;
    if ports.contains(&0) { Err(at(field, Problem::Port)) } else { Ok(ports) }
}

fn check_dns_types(types: Option<Vec<String>>, denies: bool) -> Checked<Vec<DnsType>> {
    let types = types.unwrap_or_default();
    count("dnsTypes", types.len(), DNS_TYPES_MAX)?;
    if denies && !types.is_empty() {
        return Err(at("dnsTypes", Problem::NotFor("a rule that denies")));
    }
    let parse = |text: String| {
        text.parse().map_err(|()| at("dnsTypes", Problem::RecordType(shortened(&text))))
    };
    types.into_iter().map(parse).collect()
}

fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

impl wire::HostRule {
    fn check(self) -> Checked<HostRule> {
        let pattern = needed("pattern", self.pattern)?;
        let action = needed("action", self.action)?;
        if self.tls.is_some() && action == Action::Deny {
            return Err(at("tls", Problem::NotFor("a rule that denies")));
        }
        Ok(HostRule {
            pattern: HostPattern::parse(&pattern).map_err(|error| at("pattern", error))?,
            action,
            ports: check_ports("ports", self.ports)?,
            tls: self.tls,
            dns_types: check_dns_types(self.dns_types, action == Action::Deny)?,
        })
    }
}

impl wire::Rule {
    fn check(self) -> Checked<Rule> {
        let name = check_name(self.name)?;
        let r#match = needed("match", self.r#match)?.0.check()?;
        let action = needed("action", self.action)?.0.check()?;
        let denies = action == RuleAction::Deny;
        let needs_request = r#match.path.as_ref().is_some_and(|path| !path.is_any())
            || !r#match.methods.is_empty()
            || matches!(action, RuleAction::Transform(_) | RuleAction::Rewrite(_));
        match self.tls {
            Some(TlsHandling::Passthrough) if needs_request => {
                let reason = "looks into requests (path, methods, headers, rewrite), and TLS that \
                              is passed through shows none";
                return Err(at("tls", Problem::Contradiction(reason)));
            }
            Some(_) if denies => return Err(at("tls", Problem::NotFor("a rule that denies"))),
            _ => {}
        }
        let dns_types = check_dns_types(self.dns_types, denies)?;
        Ok(Rule { name, r#match, action, tls: self.tls, dns_types })
    }
}

impl wire::Match {
    fn check(self) -> Checked<Match> {
        let host = needed("match.host", self.host)?;
        let host = HostPattern::parse(&host).map_err(|error| at("match.host", error))?;
        let path = match self.path {
            Some(path) => Some(PathPattern::parse(&path).map_err(|error| at("match.path", error))?),
            None => None,
        };
        let methods = self.methods.unwrap_or_default();
        count("match.methods", methods.len(), METHODS_MAX)?;
        let methods = methods.into_iter().map(|text| {
            let method = Method::parse(&text).map_err(|error| at("match.methods", error))?;
            if text.bytes().any(|b| b.is_ascii_lowercase()) {
                return Err(at("match.methods", Problem::MethodCase(text)));
            }
            Ok(method)
        });
        Ok(Match {
            host,
            path,
            methods: methods.collect::<Checked<_>>()?,
            ports: check_ports("match.ports", self.ports)?,
        })
    }
}

impl wire::RuleAction {
    fn check(self) -> Checked<RuleAction> {
        let Self { r#type, scheme, host, port, path, headers, allow_plain_http } = self;
        let r#type = needed("action.type", r#type)?;
        let headers = headers.unwrap_or_default();
        let has_headers = !headers.is_empty();
        let given = [
            ("action.scheme", scheme.is_some()),
            ("action.host", host.is_some()),
            ("action.port", port.is_some()),
            ("action.path", path.is_some()),
            ("action.headers", has_headers),
            ("action.allowPlainHttp", allow_plain_http.is_some()),
        ];
        let (what, first_foreign, last_foreign) = match r#type {
            ActionType::Allow => ("a rule of type Allow", 0, 6),
            ActionType::Deny => ("a rule of type Deny", 0, 6),
            ActionType::Transform => ("a rule of type Transform", 0, 4),
            ActionType::Rewrite => ("", 0, 0),
        };
        let foreign = given[first_foreign..last_foreign].iter().find(|(_, given)| *given);
        if let Some((field, _)) = foreign {
            return Err(at(*field, Problem::NotFor(what)));
        }
        count("action.headers", headers.len(), HEADERS_MAX)?;
        let headers = headers.into_iter().enumerate().map(|(index, Object(change))| {
            change.check().map_err(|mut error| {
                error.place.field = format!("action.headers[{index}].{}", error.place.field);
                error
            })
        });
        let transform = Transform {
            headers: headers.collect::<Checked<_>>()?,
            allow_plain_http: allow_plain_http.unwrap_or(false),
        };
        match r#type {
            ActionType::Allow => Ok(RuleAction::Allow),
            ActionType::Deny => Ok(RuleAction::Deny),
            ActionType::Transform if !has_headers => Err(at("action.headers", Problem::Missing)),
            ActionType::Transform => Ok(RuleAction::Transform(transform)),
            ActionType::Rewrite => {
                check_rewrite(scheme, host, port, path, transform).map(RuleAction::Rewrite)
            }
        }
    }
}

fn check_rewrite(
    scheme: Option<String>,
    host: Option<String>,
    port: Option<u16>,
    path: Option<String>,
    transform: Transform,
) -> Checked<Rewrite> {
    if scheme.is_none() && host.is_none() && port.is_none() && path.is_none() {
        return Err(at("action.host", Problem::Missing));
    }
    let scheme = match scheme.as_deref() {
        None => None,
        Some("https") => Some(Scheme::Https),
        Some("http") if !transform.headers.is_empty() && !transform.allow_plain_http => {
            let reason = "headers are not put in over plain HTTP unless allowPlainHttp is true";
            return Err(at("action.scheme", Problem::Contradiction(reason)));
        }
        Some("http") => Some(Scheme::Http),
        Some(_) => {
            let reason = "a scheme is \"http\" or \"https\"";
            return Err(at("action.scheme", Problem::Word(reason.to_owned())));
        }
    };
    let host = match host {
        None => None,
        Some(host) => {
            let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
            Some(match address {
                Ok(address) => RewriteHost::Address(address),
                Err(_) => RewriteHost::Name(
                    HostName::of_person(&host).map_err(|error| at("action.host", error))?,
                ),
            })
        }
    };
    if port == Some(0) {
        return Err(at("action.port", Problem::Port));
    }
    let path = match path {
        None => None,
        Some(path) if path.len() > PATH_PATTERN_BYTES_MAX => {
            return Err(at("action.path", Problem::Bytes { max: PATH_PATTERN_BYTES_MAX }));
        }
        Some(path) if path.contains(['?', '*']) => {
            let reason = "a path that is put in has no '*' and no '?': it is sent as it is";
            return Err(at("action.path", Problem::Word(reason.to_owned())));
        }
        Some(path) => {
            let target =
                Target::parse(path.as_bytes()).map_err(|error| at("action.path", error))?;
            Some(target.path().to_owned())
        }
    };
    Ok(Rewrite { scheme, host, port, path, transform })
}

impl wire::HeaderChange {
    fn check(self) -> Checked<HeaderChange> {
        let operation = needed("operation", self.operation)?;
        let name = needed("name", self.name)?;
        let name = HeaderName::parse(&name).map_err(|error| at("name", error))?;
        let header = match (self.value, self.value_ref) {
            (None, None) => None,
            (Some(value), None) => {
                let value = HeaderValue::parse(&value).map_err(|error| at("value", error))?;
                Some(Header::Value(value))
            }
            (None, Some(reference)) => Some(Header::ValueRef(reference.0.check()?)),
            (Some(_), Some(_)) => {
                let reason = "a header has a value or a valueRef, not both";
                return Err(at("valueRef", Problem::Contradiction(reason)));
            }
        };
        match (operation, header) {
            (Operation::Remove, None) => Ok(HeaderChange::Remove(name)),
            (Operation::Remove, Some(_)) => Err(at("value", Problem::NotFor("Remove"))),
            (_, None) => Err(at("value", Problem::Missing)),
            (Operation::Set, Some(header)) => Ok(HeaderChange::Set(name, header)),
            (Operation::Insert, Some(header)) => Ok(HeaderChange::Insert(name, header)),
        }
    }
}

fn check_format(field: &str, format: Option<String>) -> Checked<Option<ValueFormat>> {
    let parse = |text: String| ValueFormat::parse(&text).map_err(|error| at(field, error));
    format.map(parse).transpose()
}

impl wire::ValueRef {
    fn check(self) -> Checked<ValueRef> {
        match (self.secret_ref, self.managed_identity_ref) {
            (Some(secret), None) => secret.0.check().map(ValueRef::SecretRef),
            (None, Some(identity)) => identity.0.check().map(ValueRef::ManagedIdentityRef),
            (None, None) => Err(at("valueRef.secretRef", Problem::Missing)),
            (Some(_), Some(_)) => {
                let reason = "a valueRef has a secretRef or a managedIdentityRef, not both";
                Err(at("valueRef", Problem::Contradiction(reason)))
            }
        }
    }
}

impl wire::SecretRef {
    fn check(self) -> Checked<SecretRef> {
        let secret_id = needed("valueRef.secretRef.secretId", self.secret_id)?;
        let word = |field: &str, outcome: Result<(), String>| {
            outcome.map_err(|reason| at(field, Problem::Word(reason)))
        };
        word("valueRef.secretRef.secretId", check_secret_id(&secret_id))?;
        if let Some(key) = &self.secret_key {
            word("valueRef.secretRef.secretKey", check_secret_key(key))?;
        }
        let format = check_format("valueRef.secretRef.format", self.format)?;
        Ok(SecretRef { secret_id, secret_key: self.secret_key, format })
    }
}

impl wire::ManagedIdentityRef {
    fn check(self) -> Checked<ManagedIdentityRef> {
        const RESOURCE: &str = "valueRef.managedIdentityRef.resource";
        const ID: &str = "valueRef.managedIdentityRef.identityResourceId";
        let resource = needed(RESOURCE, self.resource)?;
        let printable = |field: &str, text: &str| {
            let fits = (1..=RESOURCE_BYTES_MAX).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_graphic());
            let reason = format!("must be 1 to {RESOURCE_BYTES_MAX} printable ASCII characters");
            if fits { Ok(()) } else { Err(at(field, Problem::Word(reason))) }
        };
        printable(RESOURCE, &resource)?;
        let r#type = needed("valueRef.managedIdentityRef.type", self.r#type)?;
        let identity = match (r#type, self.identity_resource_id) {
            (IdentityType::SystemAssigned, None) => Identity::SystemAssigned,
            (IdentityType::SystemAssigned, Some(_)) => {
                return Err(at(ID, Problem::NotFor("SystemAssigned")));
            }
            (IdentityType::UserAssigned, None) => return Err(at(ID, Problem::Missing)),
            (IdentityType::UserAssigned, Some(resource_id)) => {
                printable(ID, &resource_id)?;
                Identity::UserAssigned { resource_id }
            }
        };
        let format = check_format("valueRef.managedIdentityRef.format", self.format)?;
        Ok(ManagedIdentityRef { identity, resource, format })
    }
}

impl wire::CidrRule {
    fn check(self) -> Checked<CidrRule> {
        let name = check_name(self.name)?;
        let cidr = needed("cidr", self.cidr)?;
        Ok(CidrRule {
            name,
            cidr: cidr.parse().map_err(|error: crate::BadCidr| at("cidr", error))?,
            protocol: needed("protocol", self.protocol)?,
            ports: check_ports("ports", self.ports)?,
            action: needed("action", self.action)?,
        })
    }
}
