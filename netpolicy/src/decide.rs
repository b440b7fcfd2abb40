//! What a policy makes of a flow.

use std::net::IpAddr;

use crate::{
    Action, DnsType, Flow, HostName, HostPattern, Inspection, List, Method, Opening, Outcome,
    PathPattern, Policy, Protocol, Reason, Rewrite, RuleAction, RuleRef, Scheme, Target,
    TlsHandling, Transform, Verdict,
};

/// Ports that a rule without ports lets through.
const WEB_PORTS: [u16; 2] = [80, 443];

/// What `policy` makes of `flow`: the first rule that matches, else the default action.
pub fn decide<'p>(policy: &'p Policy, flow: &Flow<'_>) -> Verdict<'p> {
    match flow {
        Flow::Dns { name, kind } => dns(policy, name, *kind),
        Flow::Tls { name, port } => tls(policy, name, *port),
        Flow::Http { scheme, host, port, method, target } => {
            http(policy, host, *port, &Request { scheme: *scheme, method, target })
        }
        Flow::Raw { protocol, address, port } => raw(policy, *protocol, *address, *port),
    }
}

/// The CIDR rule, if one does, that forbids a flow with a name to go to this address, though its
/// name is allowed.
pub fn refused_address(
    policy: &Policy,
    protocol: Protocol,
    address: IpAddr,
    port: u16,
) -> Option<RuleRef<'_>> {
    match cidr_rule(policy, protocol, address, port) {
        Some((Action::Deny, rule)) => Some(rule),
        _ => None,
    }
}

fn cidr_rule(
    policy: &Policy,
    protocol: Protocol,
    address: IpAddr,
    port: u16,
) -> Option<(Action, RuleRef<'_>)> {
    let mut rules = policy.cidr_rules().iter().enumerate();
    let (index, rule) = rules.find(|(_, rule)| rule.covers(protocol, address, port))?;
    let name = rule.name.as_deref();
    Some((rule.action, RuleRef::Rule { list: List::CidrRules, index, name }))
}

/// What the parts of a rule and of a host rule have in common.
struct Entry<'p> {
    rule: RuleRef<'p>,
    host: &'p HostPattern,
    path: Option<&'p PathPattern>,
    methods: &'p [Method],
    ports: &'p [u16],
    action: EntryAction<'p>,
    tls: Option<TlsHandling>,
    dns_types: &'p [DnsType],
}

#[derive(Clone, Copy)]
enum EntryAction<'p> {
    Allow,
    Deny,
    Transform(&'p Transform),
    Rewrite(&'p Rewrite),
}

impl<'p> Entry<'p> {
    fn denies(&self) -> bool {
        matches!(self.action, EntryAction::Deny)
    }

    /// Whether it speaks of some requests to its host and not of others.
    fn looks_into_requests(&self) -> bool {
        self.path.is_some() || !self.methods.is_empty()
    }

    fn covers_port(&self, port: u16) -> bool {
        if self.ports.is_empty() {
            // What a rule without ports closes is closed on all of them.
            self.denies() || WEB_PORTS.contains(&port)
        } else {
            self.ports.contains(&port)
        }
    }

    fn covers(&self, request: &Request<'_>) -> bool {
        let path = self.path.is_none_or(|path| {
            if self.denies() {
                path.matches_perhaps(request.target)
            } else {
                path.matches_surely(request.target)
            }
        });
        path && (self.methods.is_empty() || self.methods.contains(request.method))
    }

    fn verdict(&self, outcome: Outcome<'p>, reason: Reason) -> Verdict<'p> {
        Verdict { outcome, rule: self.rule, reason }
    }
}

struct Request<'a> {
    scheme: Scheme,
    method: &'a Method,
    target: &'a Target,
}

/// The rules and host rules that speak of `name`, in order. None where the policy looks at none.
fn entries<'p>(policy: &'p Policy, name: &HostName) -> impl Iterator<Item = Entry<'p>> {
    let positions = match policy.inspection() {
        Inspection::None => Vec::new(),
        _ => policy.index.of(name),
    };
    positions.into_iter().map(|position| entry(policy, position))
}

fn entry(policy: &Policy, position: usize) -> Entry<'_> {
    if let Some(rule) = policy.rules().get(position) {
        let name = rule.name.as_deref();
        return Entry {
            rule: RuleRef::Rule { list: List::Rules, index: position, name },
            host: &rule.r#match.host,
            path: rule.r#match.path.as_ref().filter(|path| !path.is_any()),
            methods: &rule.r#match.methods,
            ports: &rule.r#match.ports,
            action: match &rule.action {
                RuleAction::Allow => EntryAction::Allow,
                RuleAction::Deny => EntryAction::Deny,
                RuleAction::Transform(transform) => EntryAction::Transform(transform),
                RuleAction::Rewrite(rewrite) => EntryAction::Rewrite(rewrite),
            },
            tls: rule.tls,
            dns_types: &rule.dns_types,
        };
    }
    let index = position - policy.rules().len();
    let rule = &policy.host_rules()[index];
    Entry {
        rule: RuleRef::Rule { list: List::HostRules, index, name: None },
        host: &rule.pattern,
        path: None,
        methods: &[],
        ports: &rule.ports,
        action: match rule.action {
            Action::Allow => EntryAction::Allow,
            Action::Deny => EntryAction::Deny,
        },
        tls: rule.tls,
        dns_types: &rule.dns_types,
    }
}

fn by_default<'p>(outcome: Outcome<'p>, reason: Reason) -> Verdict<'p> {
    Verdict { outcome, rule: RuleRef::Default, reason }
}

fn default_action(policy: &Policy) -> Verdict<'_> {
    let outcome = match policy.default_action() {
        Action::Allow => Outcome::Allow,
        Action::Deny => Outcome::Deny,
    };
    by_default(outcome, Reason::DefaultAction)
}

/// A query leaves only if something to that name could be allowed: a query is itself a message to
/// whoever owns the name.
fn dns<'p>(policy: &'p Policy, name: &HostName, kind: DnsType) -> Verdict<'p> {
    let local = name.is_local();
    let mut without_this_type = None;
    for entry in entries(policy, name) {
        if entry.denies() {
            let whole = !entry.looks_into_requests() && entry.ports.is_empty();
            if whole {
                return without_this_type
                    .unwrap_or_else(|| entry.verdict(Outcome::Deny, Reason::Rule));
            }
        } else if local && *entry.host == HostPattern::Any {
            // Whoever wrote `*` meant the names of the world.
        } else if kind.is_ordinary() || entry.dns_types.contains(&kind) {
            return entry.verdict(Outcome::Allow, Reason::Rule);
        } else if without_this_type.is_none() {
            without_this_type = Some(entry.verdict(Outcome::Deny, Reason::RecordType));
        }
    }
    if let Some(verdict) = without_this_type {
        return verdict;
    }
    match policy.default_action() {
        _ if local => by_default(Outcome::Deny, Reason::LocalName),
        Action::Deny => by_default(Outcome::Deny, Reason::NameNotAllowed),
        Action::Allow if kind.is_ordinary() => default_action(policy),
        Action::Allow => by_default(Outcome::Deny, Reason::RecordType),
    }
}

fn tls<'p>(policy: &'p Policy, name: &HostName, port: u16) -> Verdict<'p> {
    let mode = policy.inspection();
    if mode == Inspection::None {
        return default_action(policy);
    }
    // What is decided inside, request by request, and the rule or default that all others meet.
    let mut inside = None;
    let mut some_inside_allowed = false;
    let mut last = None;
    for entry in entries(policy, name).filter(|entry| entry.covers_port(port)) {
        if !entry.looks_into_requests() {
            last = Some(entry);
            break;
        }
        some_inside_allowed |= !entry.denies();
        inside.get_or_insert(entry.rule);
    }
    let last_denies = match &last {
        Some(entry) => entry.denies(),
        None => policy.default_action() == Action::Deny,
    };
    let last_rule = last.as_ref().map_or(RuleRef::Default, |entry| entry.rule);
    let all_opened = matches!(mode, Inspection::Full | Inspection::Legacy);
    let open = |rule| {
        let (opening, reason) = if all_opened {
            (Opening::Full, Reason::InspectionFull)
        } else {
            (Opening::Partial, Reason::RuleNeedsRequest)
        };
        Verdict { outcome: Outcome::Open(opening), rule, reason }
    };
    if let Some(rule) = inside {
        return if last_denies && !some_inside_allowed {
            let reason = Reason::NothingInsideAllowed;
            Verdict { outcome: Outcome::Deny, rule: last_rule, reason }
        } else {
            open(rule)
        };
    }
    let Some(entry) = last else {
        return if all_opened && !last_denies { open(last_rule) } else { default_action(policy) };
    };
    match (entry.action, entry.tls) {
        (EntryAction::Deny, _) => entry.verdict(Outcome::Deny, Reason::Rule),
        (EntryAction::Transform(_) | EntryAction::Rewrite(_), _) => open(last_rule),
        (EntryAction::Allow, Some(TlsHandling::Open)) => open(last_rule),
        (EntryAction::Allow, None) if all_opened => open(last_rule),
        (EntryAction::Allow, _) => entry.verdict(Outcome::Allow, Reason::Rule),
    }
}

fn http<'p>(policy: &'p Policy, host: &HostName, port: u16, request: &Request<'_>) -> Verdict<'p> {
    let mut entries = entries(policy, host).filter(|entry| entry.covers_port(port));
    let Some(entry) = entries.find(|entry| entry.covers(request)) else {
        return default_action(policy);
    };
    let (outcome, transform, scheme) = match entry.action {
        EntryAction::Allow => return entry.verdict(Outcome::Allow, Reason::Rule),
        EntryAction::Deny => return entry.verdict(Outcome::Deny, Reason::Rule),
        EntryAction::Transform(transform) => {
            (Outcome::Transform(transform), transform, request.scheme)
        }
        EntryAction::Rewrite(rewrite) => {
            let scheme = rewrite.scheme_of(request.scheme);
            (Outcome::Rewrite(rewrite), &rewrite.transform, scheme)
        }
    };
    if !transform.headers.is_empty() {
        if scheme == Scheme::Http && !transform.allow_plain_http {
            return entry.verdict(Outcome::Deny, Reason::PlainHttpTransform);
        }
        if request.method.as_str().eq_ignore_ascii_case("TRACE") {
            return entry.verdict(Outcome::Deny, Reason::TraceTransform);
        }
    }
    entry.verdict(outcome, Reason::Rule)
}

fn raw(policy: &Policy, protocol: Protocol, address: IpAddr, port: u16) -> Verdict<'_> {
    match cidr_rule(policy, protocol, address, port) {
        Some((Action::Allow, rule)) => {
            return Verdict { outcome: Outcome::Allow, rule, reason: Reason::Rule };
        }
        Some((Action::Deny, rule)) => {
            return Verdict { outcome: Outcome::Deny, rule, reason: Reason::Rule };
        }
        None => {}
    }
    match policy.default_action() {
        Action::Deny => default_action(policy),
        // Rules by name would be gone round by QUIC to the name's address.
        Action::Allow if protocol == Protocol::Udp => {
            by_default(Outcome::Deny, Reason::UdpNeedsCidrRule)
        }
        Action::Allow if policy.inspection() == Inspection::Full => {
            by_default(Outcome::Deny, Reason::NotInspectable)
        }
        Action::Allow => default_action(policy),
    }
}
