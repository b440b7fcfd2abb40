//! What the host's rules say of flows that pass proxies by, as they begin (nfnetlink_log).

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use holdfast_netpolicy::Protocol;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nflog::{
        self as logged, ConfigCmd, ConfigMode, ConfigNla, PacketNla, ULogMessage, config_request,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::{BywayNumber, NftError, kernel::split};

/// Groups of host.nft.
const ALLOWED: u16 = 18_502;
const DENIED: u16 = 18_503;

/// Bytes of each packet: its headers.
const HEADER_BYTES: u32 = 28;

/// How long the kernel gathers packets at most, in hundredths of a second.
const GATHERED_HUNDREDTHS: u32 = 10;

/// Bytes of one read: some tens of packets.
const READ_BYTES_MAX: usize = 64 * 1024;

/// Bytes that wait for us. What is more is not heard of, and counted.
const BACKLOG_BYTES: u32 = 2 << 20;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// One flow that began, or was not let begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    pub number: BywayNumber,
    pub allowed: bool,
    pub protocol: Protocol,
    pub address: Ipv4Addr,
    pub port: u16,
}

/// What came of a wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Flows(Vec<Heard>),
    Nothing,
    /// More than could be kept: some is lost.
    TooMuch,
}

/// Hears of flows of the network namespace of the thread that made it.
pub struct Listener {
    socket: Socket,
}

impl Listener {
    /// `patience`: how long [`Self::wait`] waits. There can be one of these.
    pub fn open(patience: Duration) -> Result<Self, NftError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_rx_buf_sz(BACKLOG_BYTES)?;
            set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
            Ok::<_, io::Error>(socket)
        };
        let socket = open().map_err(NftError::Talk)?;
        for group in [ALLOWED, DENIED] {
            let wishes = vec![
                ConfigNla::from(ConfigCmd::Bind),
                ConfigNla::from(ConfigMode::new_packet(HEADER_BYTES)),
                ConfigNla::from(logged::Timeout::new(GATHERED_HUNDREDTHS)),
            ];
            for wish in wishes {
                let request = config_request(NetfilterProtoFamily::IPv4, group, vec![wish]);
                let mut bytes = vec![0; request.buffer_len()];
                request.serialize(&mut bytes);
                socket.send(&bytes, 0).map_err(NftError::Talk)?;
                let mut answer = Vec::with_capacity(READ_BYTES_MAX);
                socket.recv(&mut answer, 0).map_err(NftError::Talk)?;
                let answer = NetlinkMessage::<NetfilterMessage>::deserialize(&answer);
                match answer.map_err(|_| NftError::Answer)?.payload {
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        let what = "that somebody hears of flows";
                        return Err(NftError::Refused { what, source: error.to_io() });
                    }
                    _ => {}
                }
            }
        }
        Ok(Self { socket })
    }

    /// What is said next.
    pub fn wait(&self) -> Result<Said, NftError> {
        let mut buffer = Vec::with_capacity(READ_BYTES_MAX);
        match self.socket.recv(&mut buffer, 0) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Said::Nothing),
            Err(error)
                if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) =>
            {
                return Ok(Said::TooMuch);
            }
            Err(error) => return Err(NftError::Talk(error)),
        }
        let messages = split::<NetfilterMessage>(&buffer)?;
        Ok(Said::Flows(messages.into_iter().filter_map(heard).collect()))
    }
}

fn heard(message: NetlinkMessage<NetfilterMessage>) -> Option<Heard> {
    let NetlinkPayload::InnerMessage(message) = message.payload else { return None };
    let group = message.header.res_id;
    let NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)) = message.inner else {
        return None;
    };
    let packet = attributes.into_iter().find_map(|attribute| match attribute {
        PacketNla::Payload(bytes) => Some(bytes),
        _ => None,
    })?;
    of_packet(&packet, group == ALLOWED)
}

/// An IPv4 packet (RFC 791) from a sandbox, whose headers have no options.
fn of_packet(packet: &[u8], allowed: bool) -> Option<Heard> {
    let address = |at: usize| {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(octets))
    };
    let protocol = match *packet.get(9)? {
        TCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        _ => return None,
    };
    let words = usize::from(packet.first()? & 0xf);
    let port = packet.get(words * 4 + 2..words * 4 + 4)?.try_into().ok()?;
    Some(Heard {
        number: BywayNumber::of_address(address(12)?)?,
        allowed,
        protocol,
        address: address(16)?,
        port: u16::from_be_bytes(port),
    })
}

impl From<Heard> for std::net::SocketAddr {
    fn from(heard: Heard) -> Self {
        Self::new(IpAddr::V4(heard.address), heard.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_cut_anywhere_is_no_flow_or_the_one_it_is() {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[9] = UDP;
        packet[12..16].copy_from_slice(&[198, 19, 0, 7]);
        packet[16..20].copy_from_slice(&[9, 9, 9, 10]);
        packet[22..24].copy_from_slice(&443_u16.to_be_bytes());
        let whole = Heard {
            number: BywayNumber::new(7).unwrap(),
            allowed: true,
            protocol: Protocol::Udp,
            address: [9, 9, 9, 10].into(),
            port: 443,
        };
        for cut in 0..=packet.len() {
            let expected = (cut >= 24).then_some(whole);
            assert_eq!(of_packet(&packet[..cut], true), expected, "cut at {cut}");
        }
        packet[12] = 10;
        assert_eq!(of_packet(&packet, true), None, "of nobody here");
    }
}
