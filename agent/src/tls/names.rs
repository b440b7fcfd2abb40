//! The names and addresses a client may know the node by.

use std::{collections::BTreeSet, net::IpAddr};

/// Addresses put into the certificate at most: a certificate is sent with every handshake.
const ADDRESSES_MAX: usize = 32;

/// The node's address under QEMU's user networking: clients outside reach it by loopback, what runs
/// beside it by this.
const USER_NETWORK_ADDRESS: &str = "10.0.2.15";

/// The node's own addresses, loopback and link-local ones left out.
pub fn addresses() -> BTreeSet<IpAddr> {
    let link_local = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    // An interface list that cannot be read is an empty one: the other names still serve.
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let found = interfaces.into_iter().map(|interface| interface.ip());
    let usable = found.filter(|address| !address.is_loopback() && !link_local(address));
    usable.take(ADDRESSES_MAX).collect()
}

pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Every name of the certificate: the fixed ones, the configured ones, the found ones.
pub fn served_names(configured: &[String]) -> BTreeSet<String> {
    let fixed = ["localhost", "127.0.0.1", "::1", USER_NETWORK_ADDRESS].map(str::to_owned);
    let host_name = Some(host_name()).filter(|name| fits_certificate(name));
    let found = addresses().into_iter().map(|address| address.to_string());
    fixed.into_iter().chain(configured.iter().cloned()).chain(host_name).chain(found).collect()
}

fn fits_certificate(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
    !name.is_empty() && name.bytes().all(allowed)
}
