//! What a policy makes of an address that a person types, step by step, and why.

use std::net::{IpAddr, SocketAddr};

use crate::{
    Action, BadHost, BadMethod, BadPath, Byway, CidrProtocol, CidrRule, DnsType, Flow, HostName,
    Method, Opening, Outcome, Passing, Policy, Protocol, Reason, RuleRef, Scheme, Target, Verdict,
    decide,
};

/// Whatever goes here is a question to the sandbox's own name server, wherever it was sent.
const DNS_PORT: u16 = 53;

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadQuestion {
    #[error(
        "{0:?} is no address: http(s)://host[:port]/path, dns://name[/TYPE], tcp://address:port"
    )]
    Form(String),
    #[error("{0:?} is no record type")]
    RecordType(String),
    #[error(
        "what goes to port 53 is answered by the node, whatever its address: dns://name[/TYPE]"
    )]
    NameServer,
    #[error(
        "the sandbox passes its proxy by and has cidrRules, so what decides is the address that \
         {0} has: tcp://address:port"
    )]
    ByAddress(HostName),
    #[error(transparent)]
    Host(#[from] BadHost),
    #[error(transparent)]
    Path(#[from] BadPath),
    #[error(transparent)]
    Method(#[from] BadMethod),
}

/// One thing that is judged on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step<'p> {
    /// `dns`, `tls`, `http`, `tcp` or `udp`.
    pub of: &'static str,
    /// What is judged, as it is judged.
    pub what: String,
    pub verdict: Verdict<'p>,
}

impl Step<'_> {
    /// The address that is judged, if it is one.
    pub fn address(&self) -> Option<IpAddr> {
        let named = matches!(self.of, "tcp" | "udp");
        let address = named.then(|| self.what.parse::<SocketAddr>().ok()).flatten();
        address.map(|address| address.ip())
    }

    /// The verdict in a word.
    pub fn outcome(&self) -> &'static str {
        match self.verdict.outcome {
            Outcome::Allow => "allow",
            Outcome::Deny => "deny",
            Outcome::Open(Opening::Full | Opening::Partial) => "open",
            Outcome::Transform(_) => "transform",
            Outcome::Rewrite(_) => "rewrite",
        }
    }
}

/// What happens if a sandbox under this policy, whose flows pass its proxy by as `passing` says, goes
/// to `url` with `method`: the steps up to the one that denies, or all of them.
pub fn explain<'p>(
    policy: &'p Policy,
    passing: Passing,
    url: &str,
    method: &str,
) -> Result<Vec<Step<'p>>, BadQuestion> {
    let form = || BadQuestion::Form(url.chars().take(80).collect());
    let (scheme, rest) = url.split_once("://").ok_or_else(form)?;
    let mut steps = Steps { policy, passing, steps: Vec::new() };
    match scheme.to_ascii_lowercase().as_str() {
        "http" => steps.request(Scheme::Http, rest, method)?,
        "https" => steps.request(Scheme::Https, rest, method)?,
        "dns" => {
            let (name, kind) = rest.split_once('/').unwrap_or((rest, "A"));
            let kind = kind.parse().map_err(|()| BadQuestion::RecordType(kind.to_owned()))?;
            steps.add("dns", rest.to_owned(), &Flow::Dns { name: &host(name)?, kind });
        }
        "tcp" | "udp" => {
            let protocol =
                if scheme.eq_ignore_ascii_case("tcp") { Protocol::Tcp } else { Protocol::Udp };
            let (address, port) = rest.trim_end_matches('/').rsplit_once(':').ok_or_else(form)?;
            let port = port.parse().map_err(|_| form())?;
            steps.raw(protocol, address_of(address).ok_or_else(form)?, port)?;
        }
        _ => return Err(form()),
    }
    Ok(steps.steps)
}

/// A name as whoever types it sees it in a browser: what is sent is its A-labels.
fn host(text: &str) -> Result<HostName, BadQuestion> {
    Ok(HostName::of_person(text)?)
}

fn address_of(text: &str) -> Option<IpAddr> {
    let text = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    text.parse().ok()
}

struct Steps<'p> {
    policy: &'p Policy,
    passing: Passing,
    steps: Vec<Step<'p>>,
}

impl Steps<'_> {
    /// Whether there is a next step.
    fn add(&mut self, of: &'static str, what: String, flow: &Flow<'_>) -> bool {
        let verdict = decide(self.policy, flow);
        let goes_on = !verdict.is_deny();
        self.steps.push(Step { of, what, verdict });
        goes_on
    }

    fn raw(&mut self, protocol: Protocol, address: IpAddr, port: u16) -> Result<(), BadQuestion> {
        if port == DNS_PORT {
            return Err(BadQuestion::NameServer);
        }
        let what = SocketAddr::new(address, port).to_string();
        if self.passing == Passing::Udp {
            self.add(protocol.as_str(), what, &Flow::Raw { protocol, address, port });
            return Ok(());
        }
        // Such a guest has IPv4 and no other; and a policy that lets nothing pass gives it no way.
        let byway = Byway::of(self.policy, self.passing);
        let verdict = match (byway, address) {
            (Some(byway), IpAddr::V4(v4)) => byway.decide(protocol, v4, port),
            _ => Verdict {
                outcome: Outcome::Deny,
                rule: RuleRef::Default,
                reason: Reason::DefaultAction,
            },
        };
        self.steps.push(Step { of: protocol.as_str(), what, verdict });
        Ok(())
    }

    /// TCP to whatever address a name has. Nobody looks at the name: only where no rule could speak
    /// of the address is it known what becomes of it.
    fn some_address(&mut self, name: HostName, port: u16) -> Result<(), BadQuestion> {
        let speaks = |rule: &CidrRule| {
            rule.protocol != CidrProtocol::Udp
                && (rule.ports.is_empty() || rule.ports.contains(&port))
        };
        if self.policy.cidr_rules().iter().any(speaks) {
            return Err(BadQuestion::ByAddress(name));
        }
        let outcome = match self.policy.default_action() {
            Action::Allow => Outcome::Allow,
            Action::Deny => Outcome::Deny,
        };
        let (rule, reason) = (RuleRef::Default, Reason::DefaultAction);
        let verdict = Verdict { outcome, rule, reason };
        self.steps.push(Step { of: "tcp", what: format!("{name}:{port}"), verdict });
        Ok(())
    }

    fn request(&mut self, scheme: Scheme, rest: &str, method: &str) -> Result<(), BadQuestion> {
        let form = || BadQuestion::Form(rest.chars().take(80).collect());
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let target = target.split('#').next().unwrap_or_default();
        let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
        if authority.contains('@') {
            return Err(form());
        }
        let (name, port) = match authority.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => (name, port.parse().map_err(|_| form())?),
            _ => (authority, scheme.default_port()),
        };
        let (method, target) = (Method::parse(method)?, Target::parse(target.as_bytes())?);
        if let Some(address) = address_of(name) {
            return self.raw(Protocol::Tcp, address, port);
        }
        let name = host(name)?;
        if !self.add("dns", name.to_string(), &Flow::Dns { name: &name, kind: DnsType::A }) {
            return Ok(());
        }
        if self.passing == Passing::All {
            return self.some_address(name, port);
        }
        if scheme == Scheme::Https {
            let what = format!("{name}:{port}");
            if !self.add("tls", what, &Flow::Tls { name: &name, port }) {
                return Ok(());
            }
            let opened = matches!(
                self.steps.last().map(|step| &step.verdict.outcome),
                Some(Outcome::Open(_))
            );
            if !opened {
                // Nobody sees the request.
                return Ok(());
            }
        }
        let what = format!("{method} {}://{name}:{port}{}", scheme.as_str(), target.path());
        let flow = Flow::Http { scheme, host: &name, port, method: &method, target: &target };
        self.add("http", what, &flow);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(policy: &str, passing: Passing, url: &str) -> Vec<String> {
        let policy = Policy::parse(policy.as_bytes()).unwrap();
        let steps = explain(&policy, passing, url, "GET").unwrap();
        let line = |step: &Step<'_>| {
            let rule = step.verdict.rule;
            format!("{} {}: {}, {rule}", step.of, step.what, step.outcome())
        };
        steps.iter().map(line).collect()
    }

    const POLICY: &str = r#"{
        "defaultAction": "Deny", "trafficInspection": "Partial",
        "rules": [{"name": "r", "match": {"host": "a.test", "path": "/x"}, "action": {"type": "Deny"}}],
        "hostRules": [{"pattern": "*", "action": "Allow"}],
        "cidrRules": [{"cidr": "10.0.0.0/8", "protocol": "udp", "action": "Allow"}]
    }"#;

    #[test]
    fn the_steps_up_to_the_one_that_denies_are_told() {
        let cases: [(&str, &[&str]); 8] = [
            (
                "https://A.test/x?q#f",
                &[
                    "dns a.test: allow, hostRules[0]",
                    "tls a.test:443: open, rules[0] \"r\"",
                    "http GET https://a.test:443/x: deny, rules[0] \"r\"",
                ],
            ),
            (
                "https://b.test",
                &["dns b.test: allow, hostRules[0]", "tls b.test:443: allow, hostRules[0]"],
            ),
            (
                "http://bücher.test:80?q",
                &[
                    "dns xn--bcher-kva.test: allow, hostRules[0]",
                    "http GET http://xn--bcher-kva.test:80/: allow, hostRules[0]",
                ],
            ),
            ("http://localhost/", &["dns localhost: deny, default"]),
            ("https://[2001:db8::1]/", &["tcp [2001:db8::1]:443: deny, default"]),
            ("udp://10.0.0.1:54", &["udp 10.0.0.1:54: allow, cidrRules[0]"]),
            ("tcp://[::1]:22", &["tcp [::1]:22: deny, default"]),
            ("dns://a.test/TXT", &["dns a.test/TXT: deny, hostRules[0]"]),
        ];
        for (url, expected) in cases {
            assert_eq!(lines(POLICY, Passing::Udp, url), expected, "{url}");
        }
    }

    #[test]
    fn of_a_sandbox_that_skips_its_proxy_the_address_alone_decides() {
        let by_range = r#"{"defaultAction": "Allow", "cidrRules": [
            {"cidr": "9.0.0.0/8", "protocol": "tcp", "ports": [22, 443], "action": "Deny"}]}"#;
        let cases: [(&str, &str, &[&str]); 7] = [
            (by_range, "tcp://9.1.2.3:443", &["tcp 9.1.2.3:443: deny, cidrRules[0]"]),
            (by_range, "https://9.1.2.3/", &["tcp 9.1.2.3:443: deny, cidrRules[0]"]),
            (by_range, "tcp://9.1.2.3:80", &["tcp 9.1.2.3:80: allow, default"]),
            // Through the proxy it would want a rule.
            (by_range, "udp://9.1.2.3:443", &["udp 9.1.2.3:443: allow, default"]),
            (by_range, "tcp://[2a00::1]:80", &["tcp [2a00::1]:80: deny, default"]),
            (
                by_range,
                "http://a.test/x",
                &["dns a.test: allow, default", "tcp a.test:80: allow, default"],
            ),
            (r#"{"defaultAction": "Deny"}"#, "https://a.test/", &["dns a.test: deny, default"]),
        ];
        for (policy, url, expected) in cases {
            assert_eq!(lines(policy, Passing::All, url), expected, "{url}");
        }
        let policy = Policy::parse(by_range.as_bytes()).unwrap();
        let refused = explain(&policy, Passing::All, "https://a.test/", "GET").unwrap_err();
        assert_eq!(refused, BadQuestion::ByAddress(HostName::of_wire("a.test").unwrap()));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let policy = Policy::default();
        for url in [
            "",
            "a.test",
            "ftp://a.test",
            "https://",
            "https://a@b.test/",
            "https://a.test:x/",
            "https://a.test/%zz",
            "tcp://a.test:1",
            "tcp://1.2.3.4",
            "dns://a.test/ANY",
            "udp://1.2.3.4:53",
        ] {
            assert!(explain(&policy, Passing::Udp, url, "GET").is_err(), "{url}");
        }
        assert!(explain(&policy, Passing::Udp, "https://a.test/", "G T").is_err());
    }
}
