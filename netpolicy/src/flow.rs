//! What a guest wants of the network, as far as a policy looks at it.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Serialize, Serializer};

use crate::{HostName, Target, limits::METHOD_BYTES_MAX};

/// A method of HTTP. Methods are told apart by case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Method(Box<str>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a method: 1 to {METHOD_BYTES_MAX} characters of a token")]
pub struct BadMethod(String);

impl Method {
    pub fn parse(text: &str) -> Result<Self, BadMethod> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if (1..=METHOD_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.into()))
        } else {
            Err(BadMethod(text.chars().take(40).collect()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    pub const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

impl Serialize for Scheme {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Of a flow that is not looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

macro_rules! dns_types {
    ($($name:ident = $number:literal,)*) => {
        /// A record type that DNS may be asked for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
        #[serde(rename_all = "UPPERCASE")]
        pub enum DnsType {
            $($name,)*
            /// Any that no rule can allow: ANY, AXFR, NULL, those for private use.
            #[serde(skip)]
            Other(u16),
        }

        impl DnsType {
            pub const fn number(self) -> u16 {
                match self {
                    $(Self::$name => $number,)*
                    Self::Other(number) => number,
                }
            }
        }

        impl From<u16> for DnsType {
            fn from(number: u16) -> Self {
                match number {
                    $($number => Self::$name,)*
                    other => Self::Other(other),
                }
            }
        }

        impl FromStr for DnsType {
            type Err = ();

            fn from_str(text: &str) -> Result<Self, ()> {
                $(if text == stringify!($name).to_ascii_uppercase() { return Ok(Self::$name) })*
                Err(())
            }
        }
    };
}

dns_types! {
    A = 1,
    Ns = 2,
    Cname = 5,
    Soa = 6,
    Mx = 15,
    Txt = 16,
    Aaaa = 28,
    Srv = 33,
    Svcb = 64,
    Https = 65,
    Caa = 257,
}

impl DnsType {
    /// Answered for every name that is answered at all. The others only where a rule names them:
    /// they carry what the owner of the name likes.
    pub const fn is_ordinary(self) -> bool {
        matches!(self, Self::A | Self::Aaaa | Self::Https | Self::Svcb)
    }
}

/// One thing that a guest wants to do.
#[derive(Debug, Clone)]
pub enum Flow<'a> {
    /// It asks for a name.
    Dns { name: &'a HostName, kind: DnsType },
    /// It begins TLS, to this server name. Nothing of what is inside is known yet.
    Tls { name: &'a HostName, port: u16 },
    /// It sends a request. Of TLS that was opened: `name` is both the server name and the host.
    Http { scheme: Scheme, host: &'a HostName, port: u16, method: &'a Method, target: &'a Target },
    /// It sends to an address, and nothing in it says to which name: TLS without a server name, a
    /// request whose host is an address, any other protocol.
    Raw { protocol: Protocol, address: IpAddr, port: u16 },
}
