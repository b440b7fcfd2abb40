//! Connections to the outside. Only addresses that we found ourselves are dialled, and each is
//! checked right before.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use holdfast_netpolicy::{Denied, HostName, Protocol, refused_address};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    dns::{self, ResolveError},
    proxy::{self, Line, ProxyError},
    sandbox::flow::Flow,
    setup::Setup,
    socket::Socket,
};

/// How long one address may take to answer, and how many of a name are tried.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
const ADDRESSES_TRIED_MAX: usize = 3;

/// Where a flow is to go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Destination<'a> {
    Name(&'a HostName),
    Address(IpAddr),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("a CIDR rule denies every address of the name")]
    CidrRule,
    #[error("the server cannot be reached")]
    Connect(#[source] io::Error),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
}

impl DialError {
    /// Why, for the record.
    pub(crate) const fn reason(&self) -> &'static str {
        match self {
            Self::Resolve(error) => error.reason(),
            Self::Denied(_) => "deny_set",
            Self::CidrRule => "cidr_rule",
            Self::Connect(_) => "unreachable",
            Self::Proxy(_) => "upstream_proxy",
        }
    }

    /// Whether we would not, rather than could not.
    pub(crate) const fn is_denial(&self) -> bool {
        matches!(
            self,
            Self::Denied(_)
                | Self::CidrRule
                | Self::Resolve(ResolveError::Denied(_) | ResolveError::TooManyNames)
        )
    }

    /// The address it is about.
    pub(crate) const fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Denied(denied) | Self::Resolve(ResolveError::Denied(denied)) => match denied {
                Denied::Own(address) | Denied::Range { address, .. } => Some(*address),
            },
            _ => None,
        }
    }
}

/// Connects for a flow whose policy has allowed it. `wanted` is where the guest's packets went.
pub(crate) async fn dial(
    flow: &Arc<Flow>,
    setup: &Setup,
    to: Destination<'_>,
    port: u16,
    wanted: IpAddr,
) -> Result<(Line, IpAddr), DialError> {
    let mut addresses = match to {
        Destination::Address(address) => vec![address],
        Destination::Name(name) => dns::addresses(&flow.sandbox, setup, name, Some(wanted)).await?,
    };
    if matches!(to, Destination::Name(_)) {
        let rules = flow.sandbox.rules();
        addresses.retain(|address| {
            refused_address(&rules.policy, Protocol::Tcp, *address, port).is_none()
        });
        if addresses.is_empty() {
            return Err(DialError::CidrRule);
        }
    }
    let mut failed = io::ErrorKind::AddrNotAvailable.into();
    for address in addresses.into_iter().take(ADDRESSES_TRIED_MAX) {
        setup.deny.check(address)?;
        let end = SocketAddr::new(address, port);
        if let Some(through) = &setup.proxy {
            return Ok((proxy::connect(flow, setup, through, end).await?, address));
        }
        match timeout(CONNECT_TIME_MAX, TcpStream::connect(end)).await {
            Ok(Ok(stream)) => {
                return Ok((Line::Plain(Socket::new(stream, flow.clone())), address));
            }
            Ok(Err(error)) => failed = error,
            Err(_) => failed = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(DialError::Connect(failed))
}
