//! Hosts as registries are named by them, and which of them are not places of the network.

use std::net::IpAddr;

use reqwest::Url;

/// `host[:port]` of an address, as registries are named.
pub(super) fn host_and_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// `host[:port]` without the port.
pub(super) fn host_of(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

pub(super) fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || address(host).is_some_and(|a| a.is_loopback())
}

/// This machine, or what only this machine reaches (a cloud's metadata service).
pub(super) fn is_inward(host: &str) -> bool {
    let link_local = |address| match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    is_loopback(host) || address(host).is_some_and(|a| a.is_unspecified() || link_local(a))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_split_from_their_ports_in_every_form() {
        let cases = [
            ("r.io", "r.io"),
            ("r.io:5000", "r.io"),
            ("127.0.0.1:5000", "127.0.0.1"),
            ("[::1]:5000", "[::1]"),
            ("[::1]", "[::1]"),
        ];
        for (text, host) in cases {
            assert_eq!(host_of(text), host, "{text}");
        }
    }
}
