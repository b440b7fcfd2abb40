//! What of a policy the kernel carries out by itself, packet by packet: flows to addresses that pass
//! the proxy by.

use std::net::{IpAddr, Ipv4Addr};

use crate::{
    Action, Cidr, CidrProtocol, Inspection, List, Outcome, Policy, Protocol, Reason, RuleRef,
    Verdict,
};

/// Which flows of a sandbox pass its proxy by, if its policy lets them. DNS never does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passing {
    /// UDP: the proxy has none.
    Udp,
    /// UDP and TCP: the sandbox was made so (`skipEgressProxy`). No name is looked at.
    All,
}

impl Passing {
    /// Of a sandbox that skips its proxy, or does not.
    pub const fn of(skips_proxy: bool) -> Self {
        if skips_proxy { Self::All } else { Self::Udp }
    }

    /// The protocols, in the order of their numbers.
    pub const fn protocols(self) -> &'static [Protocol] {
        match self {
            Self::Udp => &[Protocol::Udp],
            Self::All => &[Protocol::Tcp, Protocol::Udp],
        }
    }

    /// The part of a policy that nobody would look at, if there is one.
    pub fn ignores(self, policy: &Policy) -> Option<&'static str> {
        match self {
            Self::Udp => None,
            Self::All if !policy.rules().is_empty() => Some("rules"),
            Self::All if !policy.host_rules().is_empty() => Some("hostRules"),
            Self::All => policy
                .traffic_inspection
                .is_some_and(|mode| mode != Inspection::None)
                .then_some("trafficInspection"),
        }
    }
}

/// A CIDR rule, as far as it speaks of flows that pass by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BywayRule<'p> {
    pub rule: RuleRef<'p>,
    pub action: Action,
    /// Of IPv4: guests have no other.
    pub range: Cidr,
    /// `None`: all that pass by.
    pub protocol: Option<Protocol>,
    /// Empty: every port.
    pub ports: &'p [u16],
}

impl BywayRule<'_> {
    fn covers(&self, protocol: Protocol, address: Ipv4Addr, port: u16) -> bool {
        self.protocol.is_none_or(|own| own == protocol)
            && (self.ports.is_empty() || self.ports.contains(&port))
            && self.range.contains(IpAddr::V4(address))
    }
}

/// A way past the proxy for what a policy lets pass. Above it holds the deny-set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Byway<'p> {
    pub passing: Passing,
    /// In order; the first that covers a flow decides.
    pub rules: Vec<BywayRule<'p>>,
    /// Of what no rule covers.
    pub otherwise: Action,
}

impl<'p> Byway<'p> {
    /// `None`: nothing passes by, and there must be no way.
    pub fn of(policy: &'p Policy, passing: Passing) -> Option<Self> {
        let rules = policy.cidr_rules().iter().enumerate();
        let rules: Vec<_> = rules
            .filter(|(_, rule)| rule.cidr.network().is_ipv4())
            .filter_map(|(index, rule)| {
                let protocol = match (passing, rule.protocol) {
                    (Passing::Udp, CidrProtocol::Tcp) => return None,
                    (Passing::Udp, _) | (Passing::All, CidrProtocol::Any) => None,
                    (Passing::All, CidrProtocol::Tcp) => Some(Protocol::Tcp),
                    (Passing::All, CidrProtocol::Udp) => Some(Protocol::Udp),
                };
                let name = rule.name.as_deref();
                Some(BywayRule {
                    rule: RuleRef::Rule { list: List::CidrRules, index, name },
                    action: rule.action,
                    range: rule.cidr,
                    protocol,
                    ports: &rule.ports,
                })
            })
            .collect();
        let otherwise = match passing {
            // Rules by name would be gone round by QUIC to the name's address.
            Passing::Udp => Action::Deny,
            Passing::All => policy.default_action(),
        };
        let any = otherwise == Action::Allow || rules.iter().any(|it| it.action == Action::Allow);
        any.then_some(Self { passing, rules, otherwise })
    }

    /// What becomes of a flow of a protocol that passes by.
    pub fn decide(&self, protocol: Protocol, address: Ipv4Addr, port: u16) -> Verdict<'p> {
        let (action, rule, reason) =
            match self.rules.iter().find(|rule| rule.covers(protocol, address, port)) {
                Some(found) => (found.action, found.rule, Reason::Rule),
                None if self.passing == Passing::Udp => {
                    (self.otherwise, RuleRef::Default, Reason::UdpNeedsCidrRule)
                }
                None => (self.otherwise, RuleRef::Default, Reason::DefaultAction),
            };
        let outcome = match action {
            Action::Allow => Outcome::Allow,
            Action::Deny => Outcome::Deny,
        };
        Verdict { outcome, rule, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Policy {
        Policy::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn what_needs_no_way_has_none() {
        let none = [
            (Passing::Udp, r#"{"defaultAction":"Allow"}"#),
            (
                Passing::Udp,
                r#"{"defaultAction":"Deny","hostRules":[{"pattern":"*","action":"Allow"}]}"#,
            ),
            (
                Passing::Udp,
                r#"{"defaultAction":"Allow","cidrRules":[{"cidr":"9.0.0.0/8","protocol":"tcp","action":"Allow"}]}"#,
            ),
            (
                Passing::Udp,
                r#"{"defaultAction":"Allow","cidrRules":[{"cidr":"9.0.0.0/8","protocol":"udp","action":"Deny"}]}"#,
            ),
            (
                Passing::Udp,
                r#"{"defaultAction":"Allow","cidrRules":[{"cidr":"2a00::/16","protocol":"udp","action":"Allow"}]}"#,
            ),
            (Passing::All, r#"{"defaultAction":"Deny"}"#),
        ];
        for (passing, text) in none {
            assert_eq!(Byway::of(&policy(text), passing), None, "{text}");
        }
        for (passing, text) in [
            (
                Passing::Udp,
                r#"{"defaultAction":"Deny","cidrRules":[{"cidr":"9.0.0.0/8","protocol":"any","action":"Allow"}]}"#,
            ),
            (Passing::All, r#"{"defaultAction":"Allow"}"#),
            (
                Passing::All,
                r#"{"defaultAction":"Deny","cidrRules":[{"cidr":"9.0.0.0/8","protocol":"tcp","action":"Allow"}]}"#,
            ),
        ] {
            assert!(Byway::of(&policy(text), passing).is_some(), "{text}");
        }
    }

    #[test]
    fn what_nobody_would_look_at_is_named() {
        for (text, field) in [
            (r#"{"defaultAction":"Allow"}"#, None),
            (r#"{"defaultAction":"Deny","trafficInspection":"None"}"#, None),
            (r#"{"defaultAction":"Deny","trafficInspection":"Full"}"#, Some("trafficInspection")),
            (
                r#"{"defaultAction":"Deny","hostRules":[{"pattern":"a.test","action":"Allow"}]}"#,
                Some("hostRules"),
            ),
            (
                r#"{"defaultAction":"Deny","rules":[{"match":{"host":"a.test"},"action":{"type":"Allow"}}]}"#,
                Some("rules"),
            ),
        ] {
            assert_eq!(Passing::All.ignores(&policy(text)), field, "{text}");
            assert_eq!(Passing::Udp.ignores(&policy(text)), None, "{text}");
        }
    }

    #[test]
    fn the_first_rule_that_covers_a_flow_decides_and_is_named() {
        let policy = policy(
            r#"{"defaultAction":"Allow","cidrRules":[
                {"cidr":"2a00::/16","protocol":"any","action":"Deny"},
                {"name":"not this","cidr":"9.9.9.9/32","protocol":"udp","ports":[53,99],"action":"Deny"},
                {"cidr":"9.9.0.0/16","protocol":"any","action":"Allow"},
                {"cidr":"8.0.0.0/8","protocol":"tcp","action":"Deny"}]}"#,
        );
        let said = |passing, protocol, address: [u8; 4], port| {
            let byway = Byway::of(&policy, passing).unwrap();
            let verdict = byway.decide(protocol, address.into(), port);
            format!("{} {} {}", !verdict.is_deny(), verdict.rule, verdict.reason.as_str())
        };
        use {Passing as P, Protocol as Q};
        for (passing, protocol, address, port, expected) in [
            (P::Udp, Q::Udp, [9, 9, 9, 9], 99, "false cidrRules[1] \"not this\" rule"),
            (P::Udp, Q::Udp, [9, 9, 9, 9], 98, "true cidrRules[2] rule"),
            (P::Udp, Q::Udp, [8, 8, 8, 8], 53, "false default udp_needs_cidr_rule"),
            (P::All, Q::Tcp, [9, 9, 9, 9], 99, "true cidrRules[2] rule"),
            (P::All, Q::Tcp, [8, 8, 8, 8], 53, "false cidrRules[3] rule"),
            (P::All, Q::Udp, [8, 8, 8, 8], 53, "true default default_action"),
        ] {
            assert_eq!(said(passing, protocol, address, port), expected);
        }
    }
}
