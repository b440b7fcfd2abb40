//! A host name, a request's path and a policy, in three lines: the first two by a guest, the rest by
//! a client.
#![no_main]

use holdfast_netpolicy::{
    DnsType, Flow, HostName, HostPattern, Method, Outcome, Policy, Scheme, Target, decide,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut lines = input.splitn(3, |byte| *byte == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    let (host, target, policy) = (line(), line(), line());
    let host = String::from_utf8_lossy(host);
    let _ = HostPattern::parse(&host);
    let target = Target::parse(target);
    if let Ok(target) = &target {
        let sent = target.path_and_query();
        assert_eq!(Target::parse(sent.as_bytes()).as_ref(), Ok(target), "{sent}");
    }
    let policy = match Policy::parse(policy) {
        Ok(policy) => policy,
        Err(error) => {
            assert!(!error.to_string().is_empty() && !error.remedy().is_empty());
            return;
        }
    };
    assert_eq!(Policy::parse(policy.to_json().as_bytes()).as_ref(), Ok(&policy));
    let (Ok(name), Ok(target)) = (HostName::of_wire(&host), target) else { return };
    let method = Method::parse("GET").unwrap();
    for port in [443, 8443] {
        let (scheme, host) = (Scheme::Https, &name);
        let (method, target) = (&method, &target);
        let inside = decide(&policy, &Flow::Http { scheme, host, port, method, target });
        match decide(&policy, &Flow::Tls { name: &name, port }).outcome {
            Outcome::Allow => assert_eq!(inside.outcome, Outcome::Allow),
            Outcome::Deny => assert!(inside.is_deny()),
            _ => {}
        }
        let query = decide(&policy, &Flow::Dns { name: &name, kind: DnsType::A });
        // A name of the local network needs a rule of its own to be looked up.
        let local = query.reason.as_str() == "local_name";
        assert!(!query.is_deny() || inside.is_deny() || local);
    }
});
