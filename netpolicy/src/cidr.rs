//! Ranges of addresses.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// A range of addresses, by the bits they begin with. The others are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCidr {
    #[error("{0:?} is not an address, '/' and the number of bits that count")]
    Form(String),
    #[error("{network} has bits set after the first {prefix}; did you mean {aligned}?")]
    NotAligned { network: IpAddr, prefix: u8, aligned: Cidr },
    #[error("{0} is an IPv4 range in IPv6 clothes: write it as IPv4")]
    Mapped(String),
}

impl Cidr {
    /// The range in which `address` lies, of the first `prefix` bits.
    pub(crate) fn around(address: IpAddr, prefix: u8) -> Self {
        let network = match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
        };
        Self { network, prefix }
    }

    /// A range whose form the compiler cannot check: for the list of [`super::DENY_RANGES`].
    pub(crate) const fn v4(a: u8, b: u8, c: u8, prefix: u8) -> Self {
        Self { network: IpAddr::V4(std::net::Ipv4Addr::new(a, b, c, 0)), prefix }
    }

    pub(crate) const fn v6(segments: [u16; 8], prefix: u8) -> Self {
        let [a, b, c, d, e, f, g, h] = segments;
        Self { network: IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)), prefix }
    }

    /// Its lowest address.
    pub fn network(&self) -> IpAddr {
        self.network
    }

    /// How many bits of its addresses are the same.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether `address` lies in it. An IPv4 address lies in no IPv6 range, however it is written.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.network.is_ipv4() == address.is_ipv4()
            && Self::around(address, self.prefix).network == self.network
    }
}

impl FromStr for Cidr {
    type Err = BadCidr;

    fn from_str(text: &str) -> Result<Self, BadCidr> {
        let form = || BadCidr::Form(text.chars().take(64).collect());
        let (address, prefix) = text.split_once('/').ok_or_else(form)?;
        let network: IpAddr = address.parse().map_err(|_| form())?;
        let bits = if network.is_ipv4() { 32 } else { 128 };
        let digits = prefix.bytes().all(|b| b.is_ascii_digit()) && !prefix.starts_with("00");
        let prefix: u8 = prefix.parse().map_err(|_| form())?;
        if prefix > bits || !digits {
            return Err(form());
        }
        if let IpAddr::V6(v6) = network
            && v6.to_ipv4_mapped().is_some()
        {
            return Err(BadCidr::Mapped(text.to_owned()));
        }
        let aligned = Self::around(network, prefix);
        if aligned.network == network {
            Ok(aligned)
        } else {
            Err(BadCidr::NotAligned { network, prefix, aligned })
        }
    }
}

impl TryFrom<String> for Cidr {
    type Error = BadCidr;

    fn try_from(text: String) -> Result<Self, BadCidr> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_as_it_is_written_and_holds_its_borders() {
        let cases = [
            ("0.0.0.0/0", "255.255.255.255", None),
            ("203.0.113.7/32", "203.0.113.7", Some("203.0.113.8")),
            ("10.0.0.0/8", "10.255.255.255", Some("11.0.0.0")),
            ("::/0", "ffff::1", Some("1.2.3.4")),
            ("2001:db8::/33", "2001:db8:7fff::1", Some("2001:db8:8000::")),
        ];
        for (text, inside, outside) in cases {
            let cidr: Cidr = text.parse().unwrap();
            assert_eq!(cidr.to_string(), text);
            assert!(cidr.contains(inside.parse().unwrap()), "{text}");
            assert!(!outside.is_some_and(|a| cidr.contains(a.parse().unwrap())), "{text}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for text in [
            "",
            "/",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "10.0.0.0/+8",
            "010.0.0.0/8",
            "10.0.0.0/8 ",
            "10.0.0.0/008",
            "::1/64",
            "::ffff:10.0.0.0/104",
            "a/8",
            "10.0.0.0/8/8",
            "fe80::1%eth0/64",
            "10/8",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
        let error = "10.0.0.1/8".parse::<Cidr>().unwrap_err().to_string();
        assert!(error.ends_with("did you mean 10.0.0.0/8?"), "{error}");
    }
}
