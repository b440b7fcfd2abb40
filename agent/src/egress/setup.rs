//! What every egress process of this node is configured with.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
};

use fs_err as fs;
use holdfast_model::GroupKey;
use holdfast_netpolicy::Cidr;
use holdfast_wire::egress::{Configure, Resolver, UpstreamProxy};

use super::{
    EgressError,
    process::{EGRESS_OWN_UIDS, EGRESS_UID},
};
use crate::{config, durable::FileError, tls};

/// What tells the text of a PEM file from the path of one.
const PEM_BEGIN: &str = "-----BEGIN ";

/// In the place of a group's name: all of them.
const ALL_GROUPS: &str = "*";

/// Where the system's own name servers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Name servers asked at most, as with the C library.
const RESOLVERS_MAX: usize = 3;

/// Port of a name server that none is given for.
const DNS_PORT: u16 = 53;

/// Where egress processes may go that the host's rules would not let them go otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Guard {
    pub(super) servers: Vec<SocketAddr>,
    /// Of all groups.
    pub(super) lifted: Vec<Cidr>,
    /// Of single groups, by the user that their processes are.
    pub(super) lifted_of: BTreeMap<u32, Vec<Cidr>>,
}

/// Of the configuration, with the files it names read.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    config: config::Egress,
    extra_roots_pem: String,
    upstream_proxy: Option<UpstreamProxy>,
    /// Of this node now.
    addresses: Vec<IpAddr>,
    resolvers: Vec<Resolver>,
}

impl Setup {
    /// Blocks for reading some files.
    pub(super) fn load(config: &config::Egress) -> Result<Self, EgressError> {
        let extra_roots_pem = match config.extra_roots.as_str() {
            "" => String::new(),
            // A node's file system is its image's: there is hardly a place for a file of one's own.
            pem if pem.contains(PEM_BEGIN) => pem.to_owned(),
            path => fs::read_to_string(path).map_err(FileError::of("read", path))?,
        };
        let resolvers = if config.resolvers.is_empty() {
            // Read at each look: DHCP writes it.
            name_servers(&fs::read_to_string(RESOLV_CONF).unwrap_or_default())
        } else {
            config.resolvers.iter().filter_map(|text| parse_resolver(text)).collect()
        };
        Ok(Self {
            upstream_proxy: config.upstream_proxy(),
            config: config.clone(),
            extra_roots_pem,
            addresses: tls::addresses().into_iter().collect(),
            resolvers,
        })
    }

    /// Whether a process that has the other must be told this one.
    pub(super) fn differs(&self, other: &Self) -> bool {
        self.addresses != other.addresses || self.resolvers != other.resolvers
    }

    /// Of the deny-set, for a group.
    pub(super) fn lifted(&self, group: &GroupKey) -> Vec<Cidr> {
        let of = |name: &str| ranges(self.config.lifted.get(name).into_iter().flatten());
        let mut lifted = of(ALL_GROUPS);
        lifted.extend(of(group.name()));
        lifted
    }

    /// What the host's rules must let egress processes reach. Blocks for names.
    pub(super) fn guard(&self) -> Guard {
        let resolvers = self.resolvers.iter().map(|it| SocketAddr::new(it.address, it.port));
        let mut servers: Vec<_> = resolvers.collect();
        if let Some(proxy) = &self.upstream_proxy {
            // One that has no address now is looked up again later.
            servers
                .extend((proxy.host.as_str(), proxy.port).to_socket_addrs().into_iter().flatten());
        }
        servers.sort_unstable();
        servers.dedup();
        let lifted = ranges(self.config.lifted.get(ALL_GROUPS).into_iter().flatten());
        let lifted_of = user_of_each(&self.config)
            .filter_map(|(name, user)| Some((user, ranges(self.config.lifted.get(name)?))))
            .collect();
        Guard { servers, lifted, lifted_of }
    }

    pub(super) fn configure(&self, group: &GroupKey, ca: &tls::Authority) -> Configure {
        let lifted = |name: &str| self.config.lifted.get(name).into_iter().flatten().cloned();
        Configure {
            ca_cert_pem: ca.pem().to_owned(),
            ca_key_pem: ca.key_pem(),
            extra_roots_pem: self.extra_roots_pem.clone(),
            resolvers: self.resolvers.clone(),
            deny_exceptions: lifted(ALL_GROUPS).chain(lifted(group.name())).collect(),
            node_addresses: self.addresses.clone(),
            limits: self.config.limits(),
            upstream_proxy: self.upstream_proxy.clone(),
        }
    }
}

/// Groups that have ranges of their own, each with the user that is for its processes alone.
fn user_of_each(config: &config::Egress) -> impl Iterator<Item = (&str, u32)> {
    let names = config.lifted.keys().map(String::as_str).filter(|name| *name != ALL_GROUPS);
    names.zip(EGRESS_OWN_UIDS)
}

/// The user and group that a group's processes are. The host's rules know them by that: what is
/// lifted for one group is for no other.
pub(super) fn user_of(config: &config::Egress, group: &GroupKey) -> u32 {
    let own = user_of_each(config).find(|(name, _)| *name == group.name());
    own.map_or(EGRESS_UID, |(_, user)| user)
}

fn ranges<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<Cidr> {
    texts.into_iter().filter_map(|range| range.parse().ok()).collect()
}

/// `ADDRESS` or `ADDRESS:PORT`, with brackets around an IPv6 address that has a port.
pub(crate) fn parse_resolver(text: &str) -> Option<Resolver> {
    if let Ok(address) = text.parse() {
        return Some(Resolver { address, port: DNS_PORT });
    }
    let socket: std::net::SocketAddr = text.parse().ok()?;
    Some(Resolver { address: socket.ip(), port: socket.port() })
}

/// The name servers of resolv.conf(5).
fn name_servers(text: &str) -> Vec<Resolver> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        // An address with a zone is of a link-local one, which no other process can ask.
        (words.next() == Some("nameserver"))
            .then(|| words.next())
            .flatten()
            .and_then(parse_resolver)
    };
    text.lines().filter_map(server).take(RESOLVERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_with_ranges_of_its_own_is_a_user_of_its_own_and_the_others_are_one() {
        let toml =
            r#"lifted = { "*" = ["10.0.0.0/8"], b = ["11.0.0.0/8"], a = [], "0" = ["fd00::/8"] }"#;
        let config: config::Egress = toml::from_str(toml).unwrap();
        let user = |name: &str| user_of(&config, &GroupKey::new("local", "default", name).unwrap());
        let first = EGRESS_OWN_UIDS.start;
        assert_eq!((user("0"), user("a"), user("b")), (first, first + 1, first + 2));
        assert_eq!((user("c"), user("default")), (EGRESS_UID, EGRESS_UID));
        assert!(!EGRESS_OWN_UIDS.contains(&EGRESS_UID));
        let setup = Setup::load(&config).unwrap();
        let Guard { lifted, lifted_of, .. } = setup.guard();
        assert_eq!(lifted, ["10.0.0.0/8".parse().unwrap()]);
        let own: Vec<_> = lifted_of.into_iter().collect();
        let range = |text: &str| vec![text.parse::<Cidr>().unwrap()];
        assert_eq!(
            own,
            [(first, range("fd00::/8")), (first + 1, vec![]), (first + 2, range("11.0.0.0/8"))]
        );
    }

    fn resolver(address: &str, port: u16) -> Resolver {
        Resolver { address: address.parse().unwrap(), port }
    }

    #[test]
    fn name_servers_are_read_as_the_c_library_does() {
        let text = "# a comment\nsearch example.test\nnameserver 127.0.0.53\noptions edns0\n\
                    nameserver\t2001:db8::1\nnameserver fe80::1%eth0\nnameservers 1.1.1.1\n\
                    nameserver 10.0.0.1 # ours\nnameserver 10.0.0.2\n";
        let expected =
            [resolver("127.0.0.53", 53), resolver("2001:db8::1", 53), resolver("10.0.0.1", 53)];
        assert_eq!(name_servers(text), expected);
        assert_eq!(name_servers(""), []);
    }

    #[test]
    fn a_resolver_has_the_usual_port_unless_it_has_another() {
        assert_eq!(parse_resolver("10.0.0.1"), Some(resolver("10.0.0.1", 53)));
        assert_eq!(parse_resolver("10.0.0.1:5353"), Some(resolver("10.0.0.1", 5353)));
        assert_eq!(parse_resolver("[2001:db8::1]:54"), Some(resolver("2001:db8::1", 54)));
        assert_eq!(parse_resolver("2001:db8::1"), Some(resolver("2001:db8::1", 53)));
        for text in ["", "dns.test", "10.0.0.1:", "10.0.0", "10.0.0.1:70000"] {
            assert_eq!(parse_resolver(text), None, "{text:?}");
        }
    }
}
