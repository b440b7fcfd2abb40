//! What sandboxes reach outside, and who the node is there.

use std::collections::BTreeMap;

use holdfast_model::Secret;
use holdfast_netpolicy::Cidr;
use holdfast_wire::egress::{self, ProxyKind, UpstreamProxy};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::egress::EGRESS_OWN_UIDS;

use super::Config;
use crate::tls::host_name;

/// How what sandboxes' policies allow goes out, and how much of it one may have at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Egress {
    /// Name servers that are asked, `ADDRESS` or `ADDRESS:PORT`. Empty: the host's own.
    pub resolvers: Vec<String>,
    /// Roots that servers outside may be verified by, besides the host's: PEM, or the path of a file
    /// of it. Empty: none.
    pub extra_roots: String,
    /// `http://`, `https://` or `socks5://`, then `USER:PASSWORD@` if need be, `HOST:PORT`: through
    /// which everything goes out. None: nothing is in between.
    #[serde(skip_serializing)]
    pub upstream_proxy: Option<Secret>,
    /// Ranges by a group's name, `*` for all, that are not refused for being private or reserved.
    pub lifted: BTreeMap<String, Vec<String>>,
    /// Open connections of one sandbox.
    pub connections: u32,
    /// Of those, ones whose TLS handshake is under way.
    pub handshakes: u32,
    /// MiB of one sandbox's buffers.
    pub buffer_mib: u32,
    /// Questions of one sandbox to name servers.
    pub dns_per_second: u32,
    /// Different names under one wildcard in ten minutes.
    pub dns_names: u32,
    /// Certificates made for one sandbox.
    pub mints_per_minute: u32,
    /// Seconds after which a connection ends that says nothing.
    pub idle_seconds: u32,
}

/// Who the node says it is in the tokens of groups' identities.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Identity {
    /// `https://HOST[:PORT][/PATH]`, below which whoever verifies tokens finds what the node serves
    /// for that. Empty: the first of the API's names, and its port.
    pub issuer: String,
}

impl Default for Egress {
    fn default() -> Self {
        let limits = egress::Limits::default();
        Self {
            resolvers: Vec::new(),
            extra_roots: String::new(),
            upstream_proxy: None,
            lifted: BTreeMap::new(),
            connections: limits.connections,
            handshakes: limits.handshakes,
            buffer_mib: limits.buffer_bytes >> 20,
            dns_per_second: limits.dns_per_second,
            dns_names: limits.dns_names,
            mints_per_minute: limits.mints_per_minute,
            idle_seconds: limits.idle_seconds,
        }
    }
}

impl Egress {
    pub fn limits(&self) -> egress::Limits {
        egress::Limits {
            connections: self.connections,
            handshakes: self.handshakes,
            buffer_bytes: self.buffer_mib.saturating_mul(1 << 20),
            dns_per_second: self.dns_per_second,
            dns_names: self.dns_names,
            mints_per_minute: self.mints_per_minute,
            idle_seconds: self.idle_seconds,
        }
    }

    /// `None`: there is none, or it is none.
    pub fn upstream_proxy(&self) -> Option<UpstreamProxy> {
        let url = Url::parse(self.upstream_proxy.as_ref()?.reveal()).ok()?;
        let (kind, usual_port) = match url.scheme() {
            "http" => (ProxyKind::Http, 80),
            "https" => (ProxyKind::Https, 443),
            "socks5" => (ProxyKind::Socks5, 1080),
            _ => return None,
        };
        let plain = matches!(url.path(), "" | "/") && url.query().is_none();
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Some(UpstreamProxy {
            kind,
            host: given(url.host_str().filter(|_| plain)?)?,
            port: url.port().unwrap_or(usual_port),
            username: given(url.username()),
            password: url.password().and_then(given),
        })
    }

    pub(super) fn ranges_fit(&self) -> bool {
        self.lifted.len() <= EGRESS_OWN_UIDS.len()
            && self.lifted.values().flatten().all(|text| text.parse::<Cidr>().is_ok())
    }
}

impl Config {
    /// The issuer of the node's tokens (OpenID Connect Discovery 1.0, section 3).
    pub fn issuer_url(&self) -> String {
        if !self.identity.issuer.is_empty() {
            return self.identity.issuer.clone();
        }
        let host = self.api.server_names.first().cloned().unwrap_or_else(host_name);
        let host = match host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => host,
        };
        match self.api.listen.port() {
            443 => format!("https://{host}"),
            port => format!("https://{host}:{port}"),
        }
    }
}

impl Identity {
    pub(super) fn is_an_issuer(&self) -> bool {
        let plain = |url: Url| {
            url.scheme() == "https"
                && url.has_host()
                && url.username().is_empty()
                && url.query().is_none()
                && url.fragment().is_none()
        };
        !self.issuer.ends_with('/') && Url::parse(&self.issuer).is_ok_and(plain)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::ConfigError;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("config.toml"))
    }

    #[test]
    fn the_issuer_is_the_one_named_or_the_apis_own_name() {
        let issuer = |text: &str| parse(text).unwrap().issuer_url();
        assert_eq!(issuer("[identity]\nissuer = 'https://id.test/x'"), "https://id.test/x");
        assert_eq!(issuer("[api]\nserver_names = ['a.test', 'b']"), "https://a.test:8443");
        let own = "[api]\nserver_names = ['2001:db8::1']\nlisten = '[::]:443'";
        assert_eq!(issuer(own), "https://[2001:db8::1]");
        assert_eq!(issuer(""), format!("https://{}:8443", host_name()));
    }
}
