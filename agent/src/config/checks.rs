//! Values that cannot be worked with.

use holdfast_model::Secret;

use super::Config;
use crate::egress::parse_resolver;

/// Shortest admin token taken from the configuration: shorter ones can be guessed.
const ADMIN_TOKEN_BYTES_MIN: usize = 16;

impl Config {
    /// The first key whose value cannot be worked with, and why.
    pub(super) fn problem(&self) -> Option<(&'static str, &'static str)> {
        let factor = |value: f64| value.is_finite() && (0.1..=100.0).contains(&value);
        let token_fits = |token: &Secret| {
            token.reveal().len() >= ADMIN_TOKEN_BYTES_MIN
                && token.reveal().bytes().all(|b| b.is_ascii_graphic())
        };
        let name_fits = |name: &String| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
        };
        let remote = &self.remote;
        let checks = [
            (
                "api.admin_token",
                self.api.admin_token.as_ref().is_none_or(token_fits),
                "must be at least 16 printable ASCII characters without spaces",
            ),
            (
                "api.server_names",
                self.api.server_names.iter().all(name_fits),
                "must hold host names and addresses",
            ),
            ("paths.state", self.paths.state.is_absolute(), "must be an absolute path"),
            ("paths.run", self.paths.run.is_absolute(), "must be an absolute path"),
            ("paths.cgroups", self.paths.cgroups.is_absolute(), "must be an absolute path"),
            ("capacity.memory_factor", factor(self.capacity.memory_factor), "must be 0.1 to 100"),
            ("capacity.cpu_factor", factor(self.capacity.cpu_factor), "must be 0.1 to 100"),
            ("images.gc_above_percent", self.images.gc_above_percent < 100, "must be 0 to 99"),
            (
                "egress.resolvers",
                self.egress.resolvers.iter().all(|text| parse_resolver(text).is_some()),
                "must be addresses, with or without a port",
            ),
            (
                "egress.lifted",
                self.egress.ranges_fit(),
                "must be ranges, as 10.0.0.0/8, by group, of 512 at most",
            ),
            (
                "egress.upstream_proxy",
                self.egress.upstream_proxy.is_none() || self.egress.upstream_proxy().is_some(),
                "must be http://, https:// or socks5://, and HOST:PORT behind it",
            ),
            ("egress.buffer_mib", (1..4096).contains(&self.egress.buffer_mib), "must be 1 to 4095"),
            (
                "identity.issuer",
                self.identity.issuer.is_empty() || self.identity.is_an_issuer(),
                "must be https://HOST[:PORT][/PATH], without a slash at its end",
            ),
            ("limits.connections_max", self.limits.connections_max > 0, "must be at least 1"),
            (
                "remote.url",
                remote.url.is_empty() || remote.location().is_ok(),
                "must be s3://BUCKET/PREFIX or azure://ACCOUNT/CONTAINER/PREFIX, and \
                 remote.endpoint an http or https address",
            ),
            ("remote.key", remote.url.is_empty() || remote.key.is_some(), "must be given"),
            (
                "remote.key_id",
                !remote.url.starts_with("s3:") || !remote.key_id.is_empty(),
                "must be given",
            ),
            (
                "remote.site_key",
                remote.url.is_empty() || remote.site_key_bytes().is_some(),
                "must be 64 hex digits, the same on each node that shares the store",
            ),
        ];
        checks.into_iter().find(|(_, fits, _)| !fits).map(|(key, _, problem)| (key, problem))
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
    fn a_value_that_cannot_work_is_refused_by_its_key() {
        let cases = [
            ("[api]\nadmin_token = 'short'", "api.admin_token"),
            ("[api]\nserver_names = ['a b']", "api.server_names"),
            ("[paths]\nstate = 'here'", "paths.state"),
            ("[capacity]\nmemory_factor = nan", "capacity.memory_factor"),
            ("[capacity]\ncpu_factor = 0.0", "capacity.cpu_factor"),
            ("[images]\ngc_above_percent = 100", "images.gc_above_percent"),
            ("[limits]\nconnections_max = 0", "limits.connections_max"),
            ("[egress]\nresolvers = ['dns.test']", "egress.resolvers"),
            ("[egress]\nlifted = { default = ['10.0.0.0/8', 'all'] }", "egress.lifted"),
            ("[egress]\nupstream_proxy = 'ftp://proxy.test'", "egress.upstream_proxy"),
            ("[egress]\nupstream_proxy = 'http://proxy.test/path'", "egress.upstream_proxy"),
            ("[egress]\nbuffer_mib = 4096", "egress.buffer_mib"),
            ("[identity]\nissuer = 'http://node.test'", "identity.issuer"),
            ("[identity]\nissuer = 'https://node.test/'", "identity.issuer"),
            ("[identity]\nissuer = 'https://node.test?a'", "identity.issuer"),
            ("[host]\nsmt = 'on'", "smt"),
            ("[remote]\nurl = 'file:///srv'", "remote.url"),
            ("[remote]\nurl = 's3://b'\nendpoint = 'x'", "remote.url"),
            ("[remote]\nurl = 's3://b'", "remote.key"),
            ("[remote]\nurl = 's3://b'\nkey = 'k'", "remote.key_id"),
            ("[remote]\nurl = 's3://b'\nkey = 'k'\nkey_id = 'i'", "remote.site_key"),
            ("[remote]\nurl = 'azure://a/b'\nkey = 'k'\nsite_key = 'g0'", "remote.site_key"),
        ];
        for (text, key) in cases {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }
}
