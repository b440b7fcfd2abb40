//! Where the node is and how it is trusted.

use std::sync::Arc;

use holdfast_api::model::GroupKey;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::{args::Target, error::CliError};

/// Splits `https://host[:port]` into host and port.
pub(crate) fn host_and_port(endpoint: &str) -> Result<(String, u16), CliError> {
    let wrong = || {
        CliError::Wrong(format!("{endpoint:?} is not an endpoint of the form https://host[:port]"))
    };
    let rest = endpoint.strip_prefix("https://").ok_or_else(wrong)?.trim_end_matches('/');
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !host.ends_with(':') && !port.ends_with(']') => {
            (host, port.parse().map_err(|_| wrong())?)
        }
        _ => (rest, 443),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() || host.contains(['/', '@', '?']) {
        return Err(wrong());
    }
    Ok((host.to_owned(), port))
}

/// `name` alone is of the local subscription's default resource group.
pub(crate) fn group(text: &str) -> Result<GroupKey, CliError> {
    let parts: Vec<_> = text.split('/').collect();
    let key = match parts[..] {
        [name] => GroupKey::new("local", "default", name),
        [subscription, resource_group, name] => GroupKey::new(subscription, resource_group, name),
        _ => {
            let form = "`name` or `subscription/resource-group/name`";
            return Err(CliError::Wrong(format!("{text:?} is not a group of the form {form}")));
        }
    };
    key.map_err(|error| CliError::Wrong(error.to_string()))
}

/// The certificates of the file given with `--ca`, if one was given.
pub(crate) fn ca(target: &Target) -> Result<Option<Vec<CertificateDer<'static>>>, CliError> {
    let Some(path) = &target.ca else { return Ok(None) };
    let pem = fs_err::read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(list) if !list.is_empty() => Ok(Some(list)),
        _ => Err(CliError::Wrong(format!("{} holds no PEM certificate", path.display()))),
    }
}

/// TLS for the streaming calls; the plain ones go through reqwest.
pub(crate) fn tls(target: &Target) -> Result<Arc<ClientConfig>, CliError> {
    let mut roots = RootCertStore::empty();
    let certificates = match ca(target)? {
        Some(list) => list,
        None => rustls_native_certs::load_native_certs().certs,
    };
    roots.add_parsable_certificates(certificates);
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_split_and_nonsense_is_refused() {
        let ours = |host: &str, port| Some((host.to_owned(), port));
        assert_eq!(host_and_port("https://node:8443/").ok(), ours("node", 8443));
        assert_eq!(host_and_port("https://[::1]:8443").ok(), ours("::1", 8443));
        assert_eq!(host_and_port("https://node").ok(), ours("node", 443));
        for text in ["", "node", "http://node", "https://", "https://a:b", "https://a/b"] {
            assert!(host_and_port(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_group_is_a_name_or_a_whole_key() {
        assert_eq!(group("default").ok(), Some(GroupKey::local_default()));
        assert_eq!(group("local/default/default").ok(), Some(GroupKey::local_default()));
        for text in ["", "a/b", "../..", "a/b/c/d"] {
            assert!(group(text).is_err(), "{text}");
        }
    }
}
