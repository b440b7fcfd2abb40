//! What a policy makes of a request, free of the policy it came from.

use std::sync::Arc;

use holdfast_netpolicy::{
    self as netpolicy, Outcome, Protocol, Rewrite, RewriteHost, Scheme, Transform,
};

use super::{
    Door,
    ask::{Asked, Host},
    headers::{self, Change},
};
use crate::{
    audit,
    sandbox::{
        Because, Rules,
        flow::{Claim, RequestClaim},
    },
};

/// Where an allowed request goes, and how.
pub(super) struct Plan {
    pub(super) because: Because,
    /// Of the rules it was made under.
    pub(super) revision: u64,
    pub(super) scheme: Scheme,
    pub(super) host: Host,
    pub(super) port: u16,
    /// Path and query.
    pub(super) target: String,
    pub(super) changes: Vec<Change>,
    rewrite: Option<Rewrite>,
}

/// Judges a request under a policy.
pub(super) fn judge(rules: &Arc<Rules>, door: &Door, asked: &Asked) -> Result<Plan, Because> {
    let (scheme, port) = (door.scheme, door.port);
    let (method, target) = (&asked.method, &asked.target);
    let flow = match &asked.host {
        Host::Name(host) => netpolicy::Flow::Http { scheme, host, port, method, target },
        Host::Address(address) => {
            netpolicy::Flow::Raw { protocol: Protocol::Tcp, address: *address, port }
        }
    };
    let verdict = netpolicy::decide(&rules.policy, &flow);
    let because = Because::of(rules, &verdict);
    let values = |transform: &Transform| {
        let changes = headers::changes(rules, transform, audit::now_us() / 1000);
        changes.map_err(|unusable| because.but(unusable.reason()))
    };
    let stays = |changes, because| Plan {
        because,
        revision: rules.revision,
        scheme,
        host: asked.host.clone(),
        port,
        target: target.path_and_query(),
        changes,
        rewrite: None,
    };
    match verdict.outcome {
        Outcome::Allow => Ok(stays(Vec::new(), because)),
        Outcome::Transform(transform) => Ok(stays(values(transform)?, because)),
        Outcome::Rewrite(rewrite) => {
            let host = match &rewrite.host {
                None => asked.host.clone(),
                Some(RewriteHost::Name(name)) => Host::Name(name.clone()),
                Some(RewriteHost::Address(address)) => Host::Address(*address),
            };
            Ok(Plan {
                revision: rules.revision,
                scheme: rewrite.scheme_of(scheme),
                host,
                port: rewrite.port_of(port),
                target: match &rewrite.path {
                    Some(path) => target.with_path(path),
                    None => target.path_and_query(),
                },
                changes: values(&rewrite.transform)?,
                rewrite: Some(rewrite.clone()),
                because,
            })
        }
        Outcome::Deny | Outcome::Open(_) => Err(because),
    }
}

impl Plan {
    /// What a tunnel made of this request stands by.
    pub(super) fn claim(&self, door: &Door, asked: &Asked, address: std::net::IpAddr) -> Claim {
        match &asked.host {
            Host::Name(host) => Claim::Request(Box::new(RequestClaim {
                scheme: door.scheme,
                host: host.clone(),
                port: door.port,
                method: asked.method.clone(),
                target: asked.target.clone(),
                rewrite: self.rewrite.clone(),
                address: Some(address),
                server_port: self.port,
            })),
            Host::Address(address) => Claim::Raw { address: *address, port: door.port },
        }
    }
}
