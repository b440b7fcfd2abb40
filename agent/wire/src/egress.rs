//! Between the agent and one `holdfast-egress`, which serves the sandboxes of one group.
//!
//! The process is started with two Unix sockets of type SOCK_SEQPACKET: [`CONTROL_FD`], connected
//! to the agent, and [`LISTEN_FD`], listening, for an agent that starts anew. The newest connection
//! is the agent's; the one before it is closed. When the agent goes away the process goes on as it
//! was told last.
//!
//! One packet is one message: postcard without a length in front, at most [`MESSAGE_BYTES_MAX`].
//! Kernels send a packet of that size only after SO_SNDBUF was set to [`SEND_BUFFER_BYTES`], which
//! both ends do. The first request of a connection is [`Request::Hello`].

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::frame::{self, FrameError};

/// The connected socket with which the process starts.
pub const CONTROL_FD: i32 = 3;

/// The listening socket with which the process starts.
pub const LISTEN_FD: i32 = 4;

/// Largest message in bytes.
pub const MESSAGE_BYTES_MAX: usize = frame::FRAME_BYTES_MAX;

/// What SO_SNDBUF is set to on both ends: Linux doubles it, and takes this much with its usual
/// limits.
pub const SEND_BUFFER_BYTES: usize = 208 * 1024;

/// Sandboxes one process serves at most.
pub const SANDBOXES_MAX: usize = 4096;

/// Longest JSON of one policy, in bytes.
pub const POLICY_BYTES_MAX: usize = 160 * 1024;

/// Sockets that come with the first [`Request::Put`] of a sandbox, in this order: a TCP socket that
/// listens, made in the sandbox's namespace with IP_TRANSPARENT; and a UDP socket on port 53 made
/// there with IP_TRANSPARENT and IP_RECVORIGDSTADDR.
pub const SOCKETS_OF_SANDBOX: usize = 2;

/// Agent to egress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToEgress {
    /// Chosen by the agent, returned in the answer. Answers may come in another order.
    pub id: u64,
    pub request: Request,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Answered by [`ToAgent::Hello`], or refused when the versions differ.
    Hello { version: u16 },
    /// Must come before the first Put. Later ones replace it, and hold for new flows.
    Configure(Box<Configure>),
    /// Answered when the new policy rules everywhere: flows that it no longer allows are reset, and
    /// no byte of them passes after the answer.
    Put(Put),
    /// Answered when these hold: the next request of whatever connection has them and no others.
    /// What its policy refers to and is not among them is withdrawn, and tunnels that were opened
    /// with a secret among that are reset. A sandbox that is not held has
    /// none: that is no error.
    Values(Values),
    /// Answered when all its flows and both sockets are closed. A sandbox that is not held is gone
    /// already: that is no error.
    Remove { sandbox: String },
    /// Answered by [`ToAgent::Stats`]; refused when the sandbox is not held.
    Stats { sandbox: String },
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// The group's CA: certificate and PKCS #8 key.
    pub ca_cert_pem: String,
    pub ca_key_pem: String,
    /// Roots that upstream servers are verified against, beside those of the host. PEM, may be
    /// empty.
    pub extra_roots_pem: String,
    /// Upstream resolvers, asked in this order.
    pub resolvers: Vec<Resolver>,
    /// Ranges (`192.0.2.0/24`) that the operator lifts from the deny-set.
    pub deny_exceptions: Vec<String>,
    /// Addresses of this node and its pool: denied whatever the exceptions say.
    pub node_addresses: Vec<IpAddr>,
    pub limits: Limits,
    pub upstream_proxy: Option<UpstreamProxy>,
}

// The key must not reach a log through `{:?}`.
impl fmt::Debug for Configure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Configure")
            .field("resolvers", &self.resolvers)
            .field("deny_exceptions", &self.deny_exceptions)
            .field("node_addresses", &self.node_addresses)
            .field("limits", &self.limits)
            .field("upstream_proxy", &self.upstream_proxy)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolver {
    pub address: IpAddr,
    pub port: u16,
}

/// What one sandbox may use at a time. 0 allows none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Accepted connections, of whatever kind.
    pub connections: u32,
    /// Connections whose ClientHello or TLS handshake with us is not finished.
    pub handshakes: u32,
    /// Bytes of all its relays' buffers.
    pub buffer_bytes: u32,
    pub dns_per_second: u32,
    /// Different names looked up in ten minutes: a name under a wildcard carries data to whoever
    /// serves the zone.
    pub dns_names: u32,
    /// Certificates made in a minute.
    pub mints_per_minute: u32,
    /// Seconds without a byte in either direction after which a connection is closed.
    pub idle_seconds: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            handshakes: 256,
            buffer_bytes: 64 << 20,
            dns_per_second: 200,
            dns_names: 1000,
            mints_per_minute: 600,
            idle_seconds: 3600,
        }
    }
}

/// A proxy of the site through which connections go out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamProxy {
    pub kind: ProxyKind,
    /// Name or address.
    pub host: String,
    pub port: u16,
    pub username: Option<String>,
    pub password: Option<String>,
}

impl fmt::Debug for UpstreamProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UpstreamProxy({:?} {}:{}, ..)", self.kind, self.host, self.port)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProxyKind {
    /// CONNECT over plain TCP.
    Http,
    /// CONNECT over TLS.
    Https,
    Socks5,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    pub sandbox: String,
    /// Grows with every policy of this sandbox; an older one is refused.
    pub generation: u64,
    /// JSON of the policy, at most [`POLICY_BYTES_MAX`].
    #[serde(with = "serde_bytes")]
    pub policy: Vec<u8>,
    /// Values of what the policy refers to. A request that needs one that is not here is denied.
    pub secrets: Vec<Credential>,
}

/// Other values for the policy that a sandbox has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Values {
    pub sandbox: String,
    pub secrets: Vec<Credential>,
}

/// The value behind a reference in a policy.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    pub reference: Reference,
    pub value: String,
    /// Milliseconds since the epoch, from which on it is put into nothing. `None`: it has no end.
    pub expires_at_ms: Option<u64>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({:?}, ..)", self.reference)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reference {
    Secret {
        id: String,
        key: Option<String>,
    },
    /// A token of the group's (`None`) or a named identity for a resource.
    Identity {
        resource: String,
        identity: Option<String>,
    },
}

/// Egress to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    Hello {
        request: u64,
        version: u16,
        /// False: a Configure must come first.
        configured: bool,
        sandboxes: Vec<Held>,
    },
    Done {
        request: u64,
    },
    /// What was asked is wrong or failed. All is as it was before.
    Refused {
        request: u64,
        reason: String,
    },
    Stats {
        request: u64,
        stats: Stats,
    },
    Decisions(Decisions),
}

/// A sandbox that the process serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub sandbox: String,
    pub generation: u64,
}

/// What was decided since the last of these.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decisions {
    /// Decisions and ends of flows that were not told because the queue was full, since the process
    /// started.
    pub dropped: u64,
    pub entries: Vec<Decision>,
    pub ended: Vec<Ended>,
}

/// One verdict over one name asked for, connection or request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Microseconds since the epoch.
    pub time_us: u64,
    pub sandbox: String,
    /// Generation of the policy that decided.
    pub generation: u64,
    pub kind: Kind,
    pub verdict: Verdict,
    /// Number of the flow in this process, for [`Ended::flow`]. 0: nothing more will be told.
    pub flow: u64,
    /// Name as we judged it, or the address where there is none. At most 255 bytes; what a guest
    /// wrote may hold any character.
    pub host: String,
    /// Empty where the flow has none.
    pub method: String,
    /// Without its query, cut at [`PATH_BYTES_MAX`]. Empty where the flow has none.
    pub path: String,
    /// `https`, `http`, `tcp` or `dns`.
    pub scheme: String,
    /// Where the flow goes, or where the guest wanted it to go.
    pub address: Option<IpAddr>,
    /// 0: none.
    pub port: u16,
    /// Name of the rule that decided, or its place (`rules[3]`). `None`: no rule did.
    pub rule: Option<String>,
    /// One word: `rule`, `default`, `deny_set`, `no_name`, `host_mismatch`, ….
    pub reason: String,
}

/// Longest path in a [`Decision`], in bytes.
pub const PATH_BYTES_MAX: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Dns,
    Tls,
    Http,
    Tcp,
    /// Never of an egress process, which has none.
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    Allowed,
    Denied,
    /// The policy allows it; what was beyond failed.
    Failed,
}

/// The end of a flow that was allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub sandbox: String,
    pub flow: u64,
    /// Bytes from the guest.
    pub sent_bytes: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// The policy changed and no longer allowed it.
    pub revoked: bool,
}

/// Counters of one sandbox since its first Put, and what it uses now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub connections: u32,
    pub handshakes: u32,
    pub buffer_bytes: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub allowed: u64,
    pub denied: u64,
    pub failed: u64,
    /// Connections and queries that a limit turned away.
    pub limited: u64,
    pub dns_queries: u64,
    /// Queries that went to a resolver.
    pub dns_upstream: u64,
    pub minted: u64,
}

/// Encodes one message as a packet.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let bytes = postcard::to_stdvec(message).map_err(FrameError::Malformed)?;
    let announced = bytes.len();
    if announced > MESSAGE_BYTES_MAX { Err(FrameError::TooLong { announced }) } else { Ok(bytes) }
}

/// Decodes one packet.
pub fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, FrameError> {
    let announced = packet.len();
    if announced > MESSAGE_BYTES_MAX {
        return Err(FrameError::TooLong { announced });
    }
    frame::decode(packet)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(policy: Vec<u8>) -> ToEgress {
        let reference = Reference::Secret { id: "token".into(), key: None };
        let secrets = vec![Credential { reference, value: "hunter2".into(), expires_at_ms: None }];
        let put = Put { sandbox: "a".repeat(20), generation: 7, policy, secrets };
        ToEgress { id: 1, request: Request::Put(put) }
    }

    #[test]
    fn the_longest_policy_fits_a_message_with_room_for_secrets() {
        let packet = encode(&put(vec![b' '; POLICY_BYTES_MAX])).unwrap();
        assert!(packet.len() + 64 * 1024 < MESSAGE_BYTES_MAX);
        assert_eq!(decode::<ToEgress>(&packet).unwrap(), put(vec![b' '; POLICY_BYTES_MAX]));
    }

    #[test]
    fn what_is_over_the_limit_is_neither_sent_nor_read() {
        let long = put(vec![0; MESSAGE_BYTES_MAX]);
        assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
        let packet = vec![0; MESSAGE_BYTES_MAX + 1];
        assert!(matches!(decode::<ToEgress>(&packet), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let proxy = UpstreamProxy {
            kind: ProxyKind::Http,
            host: "proxy".into(),
            port: 3128,
            username: Some("me".into()),
            password: Some("hunter2".into()),
        };
        let configure = Configure {
            ca_cert_pem: String::new(),
            ca_key_pem: "hunter2".into(),
            extra_roots_pem: String::new(),
            resolvers: vec![],
            deny_exceptions: vec![],
            node_addresses: vec![],
            limits: Limits::default(),
            upstream_proxy: Some(proxy),
        };
        let shown = format!("{configure:?} {:?}", put(vec![]));
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    proptest! {
        #[test]
        fn any_packet_is_a_message_or_an_error(packet: Vec<u8>) {
            let _ = decode::<ToEgress>(&packet);
            let _ = decode::<ToAgent>(&packet);
        }
    }
}
