//! The links, addresses and routes of a slot, by rtnetlink(7).

use std::{io, net::IpAddr};

use holdfast_model::link::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, MTU, PREFIX_BITS,
};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressHeader, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkHeader, LinkMessage},
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourHeader, NeighbourMessage, NeighbourState,
    },
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::net::netdevice::name_to_index;

/// What rules mark packets with that are for this machine, whatever their destination.
const MARK: u32 = 1;

/// Where the route for such packets is. Not among the tables with names.
const TABLE: u8 = 100;

/// The loopback's index in every namespace.
const LOOPBACK: u32 = 1;

/// Bytes of an acknowledgement: an error repeats the request, and ours are far shorter.
const ANSWER_BYTES_MAX: usize = 4096;

/// Sets this thread's network namespace up around `tap`. It is up when this returns.
pub(super) fn set_up(tap: &str) -> io::Result<()> {
    let kernel = Kernel::open()?;
    let any = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    let tap = name_to_index(&any, tap)?;
    // A route to this machine needs the loopback.
    kernel.change(Message::SetLink(up(LOOPBACK, Vec::new())))?;
    let own = vec![LinkAttribute::Address(GATEWAY_MAC.to_vec()), LinkAttribute::Mtu(MTU.into())];
    kernel.add(Message::NewAddress(gateway(tap)))?;
    kernel.change(Message::SetLink(up(tap, own)))?;
    kernel.add(Message::NewNeighbour(guest(tap)))?;
    kernel.add(Message::NewRoute(to_this_machine()))?;
    kernel.add(Message::NewRule(marked()))
}

fn up(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    // Only this flag: with multicast the kernel would join groups of its own accord.
    let changed = LinkFlags::Up | LinkFlags::Multicast;
    let header =
        LinkHeader { index, flags: LinkFlags::Up, change_mask: changed, ..Default::default() };
    let mut message = LinkMessage::default();
    message.header = header;
    message.attributes = attributes;
    message
}

fn gateway(index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header = AddressHeader {
        family: AddressFamily::Inet,
        prefix_len: PREFIX_BITS,
        scope: AddressScope::Universe,
        index,
        ..Default::default()
    };
    let address = IpAddr::V4(GATEWAY_ADDRESS);
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

/// Known from the start, and for good: nothing that the guest says moves it.
fn guest(ifindex: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: AddressFamily::Inet,
        ifindex,
        state: NeighbourState::Permanent,
        kind: RouteType::Unicast,
        ..Default::default()
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(GUEST_ADDRESS)),
        NeighbourAttribute::LinkLocalAddress(GUEST_MAC.to_vec()),
    ];
    message
}

/// `ip route add local 0.0.0.0/0 dev lo table TABLE`
fn to_this_machine() -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: 0,
        table: TABLE,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..Default::default()
    };
    message.attributes = vec![RouteAttribute::Oif(LOOPBACK)];
    message
}

/// `ip rule add fwmark MARK lookup TABLE`
fn marked() -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header = RuleHeader {
        family: AddressFamily::Inet,
        table: TABLE,
        action: RuleAction::ToTable,
        ..Default::default()
    };
    message.attributes = vec![RuleAttribute::FwMark(MARK)];
    message
}

/// A connection to the kernel.
struct Kernel(Socket);

impl Kernel {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    fn add(&self, message: Message) -> io::Result<()> {
        self.ask(message, NLM_F_CREATE | NLM_F_EXCL)
    }

    fn change(&self, message: Message) -> io::Result<()> {
        self.ask(message, 0)
    }

    /// Sends a request and waits for the answer, which the kernel gives before the call that sends
    /// it returns.
    fn ask(&self, message: Message, flags: u16) -> io::Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let mut answer = Vec::with_capacity(ANSWER_BYTES_MAX);
        self.0.recv(&mut answer, 0)?;
        let answer = NetlinkMessage::<Message>::deserialize(&answer).map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::Error::other("the kernel answered something else")),
        }
    }
}
