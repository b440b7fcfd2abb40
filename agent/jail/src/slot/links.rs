//! The links, addresses and routes of a slot, by rtnetlink(7).

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
};

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

/// Bytes of an answer: an error repeats the request, and ours are far shorter; so is what there is
/// to say of one link.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// `ENODEV`.
const NO_DEVICE: i32 = rustix::io::Errno::NODEV.raw_os_error();

/// Sets this thread's network namespace up around `tap`. It is up when this returns.
pub(super) fn set_up(tap: &str) -> io::Result<()> {
    let kernel = Kernel::open()?;
    let tap = index_of(tap)?;
    // A route to this machine needs the loopback.
    kernel.change(Message::SetLink(up(LOOPBACK, Vec::new())))?;
    let own = vec![LinkAttribute::Address(GATEWAY_MAC.to_vec()), LinkAttribute::Mtu(MTU.into())];
    kernel.add(Message::NewAddress(own_address(tap, GATEWAY_ADDRESS, PREFIX_BITS)))?;
    kernel.change(Message::SetLink(up(tap, own)))?;
    // Known from the start, and for good: nothing that the guest says moves it.
    kernel.add(Message::NewNeighbour(neighbour(tap, GUEST_ADDRESS, GUEST_MAC)))?;
    kernel.add(Message::NewRoute(to_this_machine()))?;
    kernel.add(Message::NewRule(marked()))
}

/// Of a link of this thread's network namespace.
pub(super) fn index_of(link: &str) -> io::Result<u32> {
    let any = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    Ok(name_to_index(&any, link)?)
}

pub(super) fn up(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    // Only this flag: with multicast the kernel would join groups of its own accord.
    let changed = LinkFlags::Up | LinkFlags::Multicast;
    let header =
        LinkHeader { index, flags: LinkFlags::Up, change_mask: changed, ..Default::default() };
    let mut message = LinkMessage::default();
    message.header = header;
    message.attributes = attributes;
    message
}

pub(super) fn own_address(index: u32, address: Ipv4Addr, prefix_len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header = AddressHeader {
        family: AddressFamily::Inet,
        prefix_len,
        scope: AddressScope::Universe,
        index,
        ..Default::default()
    };
    let address = IpAddr::V4(address);
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

/// Known without being asked for, and for good.
pub(super) fn neighbour(ifindex: u32, address: Ipv4Addr, mac: [u8; 6]) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: AddressFamily::Inet,
        ifindex,
        state: NeighbourState::Permanent,
        kind: RouteType::Unicast,
        ..Default::default()
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLocalAddress(mac.to_vec()),
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

/// A connection to the kernel, about the network namespace of the thread that makes it.
pub(super) struct Kernel(Socket);

impl Kernel {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    pub(super) fn add(&self, message: Message) -> io::Result<()> {
        self.ask(message, NLM_F_CREATE | NLM_F_EXCL)
    }

    pub(super) fn change(&self, message: Message) -> io::Result<()> {
        self.ask(message, 0)
    }

    /// Makes something that may be there already.
    pub(super) fn ensure(&self, message: Message) -> io::Result<()> {
        match self.add(message) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            outcome => outcome,
        }
    }

    /// What is known of a link. `None`: there is none of that name.
    pub(super) fn link(&self, name: &str) -> io::Result<Option<LinkMessage>> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        match self.answer(Message::GetLink(message), 0)?.payload {
            NetlinkPayload::InnerMessage(Message::NewLink(link)) => Ok(Some(link)),
            NetlinkPayload::Error(error) if error.to_io().raw_os_error() == Some(NO_DEVICE) => {
                Ok(None)
            }
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::Error::other("the kernel answered something else")),
        }
    }

    fn ask(&self, message: Message, flags: u16) -> io::Result<()> {
        match self.answer(message, NLM_F_ACK | flags)?.payload {
            NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::Error::other("the kernel answered something else")),
        }
    }

    /// Sends a request and waits for the answer, which the kernel gives before the call that sends
    /// it returns.
    fn answer(&self, message: Message, flags: u16) -> io::Result<NetlinkMessage<Message>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let mut answer = Vec::with_capacity(ANSWER_BYTES_MAX);
        self.0.recv(&mut answer, 0)?;
        NetlinkMessage::<Message>::deserialize(&answer).map_err(io::Error::other)
    }
}
