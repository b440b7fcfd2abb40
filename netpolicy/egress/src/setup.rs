//! What the agent configured, made ready for use.

use std::{net::SocketAddr, sync::Arc};

use holdfast_netpolicy::{BadCidr, Cidr, DenySet};
use holdfast_wire::egress::{Configure, Limits, UpstreamProxy};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::tls::mint::{BadCa, Minter};

/// Resolvers asked at most.
const RESOLVERS_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub(crate) enum BadSetup {
    #[error("deny exception {text:?} is not a range")]
    Exception {
        text: String,
        #[source]
        source: BadCidr,
    },
    #[error("{0} resolvers are more than {RESOLVERS_MAX}")]
    Resolvers(usize),
    #[error("the roots that were handed in cannot be read")]
    Roots(#[source] rustls::pki_types::pem::Error),
    #[error("the group's CA cannot be used")]
    Ca(#[from] BadCa),
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
}

pub(crate) struct Setup {
    pub(crate) deny: DenySet,
    pub(crate) resolvers: Vec<SocketAddr>,
    pub(crate) limits: Limits,
    pub(crate) proxy: Option<UpstreamProxy>,
    pub(crate) minter: Minter,
    /// For upstream servers that are spoken to by HTTP/1.1 only, and by either.
    pub(crate) client_h1: Arc<ClientConfig>,
    pub(crate) client_any: Arc<ClientConfig>,
}

impl Setup {
    pub(crate) fn new(
        configure: &Configure,
        host_roots: &[CertificateDer<'static>],
    ) -> Result<Self, BadSetup> {
        let lifted = configure.deny_exceptions.iter().map(|text| {
            text.parse::<Cidr>()
                .map_err(|source| BadSetup::Exception { text: text.clone(), source })
        });
        let deny = DenySet::new(
            configure.node_addresses.iter().copied(),
            lifted.collect::<Result<Vec<_>, _>>()?,
        );
        if configure.resolvers.len() > RESOLVERS_MAX {
            return Err(BadSetup::Resolvers(configure.resolvers.len()));
        }
        let resolvers = configure.resolvers.iter();
        let resolvers = resolvers.map(|it| SocketAddr::new(it.address, it.port)).collect();
        let mut roots = RootCertStore::empty();
        // A root of the host that cannot be read is one that nothing is verified by.
        roots.add_parsable_certificates(host_roots.iter().cloned());
        for root in CertificateDer::pem_slice_iter(configure.extra_roots_pem.as_bytes()) {
            roots.add(root.map_err(BadSetup::Roots)?)?;
        }
        let roots = Arc::new(roots);
        let client = |protocols: &[&[u8]]| -> Result<_, rustls::Error> {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let mut config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots.clone())
                .with_no_client_auth();
            config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            Ok(Arc::new(config))
        };
        Ok(Self {
            deny,
            resolvers,
            limits: configure.limits,
            proxy: configure.upstream_proxy.clone(),
            minter: Minter::new(&configure.ca_cert_pem, &configure.ca_key_pem)?,
            client_h1: client(&[b"http/1.1"])?,
            client_any: client(&[b"h2", b"http/1.1"])?,
        })
    }
}
