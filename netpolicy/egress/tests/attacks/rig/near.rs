//! A client outside with a link of its own: as far from the servers as a guest is, and no sandbox in
//! between.

use std::{future::Future, net::Ipv4Addr};

use super::{Namespace, Outside, run};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 128, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 128, 2);

pub(crate) struct Near(Namespace);

impl Near {
    pub(crate) fn new(outside: &Outside) -> Self {
        let namespace = Namespace::new("near");
        let (near, outside) = (&namespace.name, &outside.namespace().name);
        run(&format!(
            "ip link add near0 netns {outside} type veth peer name eth0 netns {near}
             ip -n {outside} addr add {GATEWAY}/30 dev near0; ip -n {outside} link set near0 up
             ip -n {near} addr add {CLIENT}/30 dev eth0; ip -n {near} link set eth0 up
             ip -n {near} route add default via {GATEWAY}"
        ));
        // What one before this had redirected.
        run(&format!(
            "ip netns exec {outside} sh -c 'nft add table ip near; nft delete table ip near'"
        ));
        Self(namespace)
    }

    /// Has what it sends to this port taken in by a program that listens on another.
    pub(crate) fn redirect(&self, outside: &Outside, port: u16, listener: u16) {
        let outside = &outside.namespace().name;
        run(&format!(
            "ip netns exec {outside} nft -f - <<E
table ip near {{
    chain in {{
        type nat hook prerouting priority dstnat;
        iifname near0 tcp dport {port} redirect to :{listener}
    }}
}}
E
"
        ));
    }

    pub(crate) fn run<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.0.block_on(work)
    }

    /// Sets something of its network stack and of the outside's.
    pub(crate) fn sysctl(&self, outside: &Outside, setting: &str) {
        for name in [&self.0.name, &outside.namespace().name] {
            run(&format!("ip netns exec {name} sysctl -qw {setting}"));
        }
    }
}
