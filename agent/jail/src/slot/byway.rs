//! A slot's second link: the way past the proxy of a sandbox whose policy lets flows take it. It is
//! there only as long, and what may go over it is judged at its other end, in the host's network.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use fs_err as fs;
use log::warn;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage, State},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage},
};
use rustix::io::Errno;

use super::{
    SlotCounter, counters, failed, inside,
    links::{Kernel, index_of, neighbour, own_address, up},
    load,
};
use crate::{JailError, sys};

/// The slot's end, by which rulesets name it.
const UP: &str = "up0";

/// Hardware addresses of both ends of every such link: each is a network of its own.
const UP_MAC: [u8; 6] = [0x02, 0x48, 0x46, 0, 0, 0x03];
const HOST_MAC: [u8; 6] = [0x02, 0x48, 0x46, 0, 0, 0x04];

/// Whom the slot takes the host's end for. Nobody has it, and nobody asks: its hardware address is
/// known. Of the range for benchmarks, as the slots' own.
const NEXT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

/// Tables of routes that every network has.
const MAIN_TABLE: u8 = 254;
const LOCAL_TABLE: u8 = 255;

/// Where the rule for this machine's own addresses goes, behind the one that comes first instead.
const LOCAL_PRIORITY: u32 = 1;

/// Of the host's end. What comes over it comes from the one address that is led there.
const HOST_LINK_SETTINGS: &[(&str, &str)] = &[
    ("ipv6/conf", "disable_ipv6=1"),
    ("ipv4/conf", "rp_filter=1"),
    ("ipv4/conf", "accept_redirects=0"),
    ("ipv4/conf", "send_redirects=0"),
    ("ipv4/conf", "accept_source_route=0"),
];

/// How long the kernel may take to notice that a link is up, and how often it is asked.
const CARRIER_PATIENCE: Duration = Duration::from_secs(2);
const CARRIER_LOOK: Duration = Duration::from_micros(200);

/// A way past the proxy.
#[derive(Debug, Clone, Copy)]
pub struct BywayPlan<'a> {
    /// Of the host's end of the link.
    pub name: &'a str,
    /// What the sandbox has on it.
    pub address: Ipv4Addr,
    /// For the sets `direct` of the rulesets, as nft(8) reads them: `udp`, or `tcp, udp`.
    pub protocols: &'a str,
    /// Added to the slot's own rules.
    pub ruleset: &'a str,
}

/// What a host needs that has such ways.
#[derive(Debug, Clone, Copy)]
pub struct HostPlan {
    /// What sandboxes have their addresses of: address and bits.
    pub range: (Ipv4Addr, u8),
    /// Of packets from there that may be led on. Those without are dropped before anything is looked
    /// up, so that a host that lost its rules leads nobody anywhere.
    pub mark: u32,
}

/// A slot's network namespace. Keeps it, and thus its links, as long as it is there.
#[derive(Debug)]
pub struct SlotNetwork(OwnedFd);

impl SlotNetwork {
    pub(super) fn of_sockets(sockets: &super::SlotSockets) -> Result<Self, JailError> {
        sys::network_of_socket(&sockets.tcp).map(Self).map_err(failed("be found"))
    }

    /// The one in which this tap lies.
    pub fn of_tap(tap: impl AsFd) -> Result<Self, JailError> {
        sys::network_of_tap(tap).map(Self).map_err(failed("be found by its tap"))
    }

    /// Does the work on a thread that is in there and ends with it.
    pub fn visit<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, JailError> {
        self.inside(|| Ok(work()))
    }

    pub(super) fn inside<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, JailError> + Send,
    ) -> Result<T, JailError> {
        inside(self.0.as_fd(), work)
    }

    /// What the rules have counted so far, by their names for it. Runs nft, and blocks meanwhile.
    pub fn counters(&self) -> Result<Vec<SlotCounter>, JailError> {
        self.inside(|| counters::read().map_err(failed("tell what it counted")))
    }

    /// The name of the host's end of the way past the proxy, if there is one.
    pub fn byway(&self) -> Result<Option<String>, JailError> {
        let alias = self.inside(|| {
            let link = Kernel::open().and_then(|kernel| kernel.link(UP));
            link.map_err(failed("tell whether it has a way past the proxy"))
        })?;
        let name = |link: LinkMessage| {
            link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfAlias(name) => Some(name),
                _ => None,
            })
        };
        Ok(alias.and_then(name))
    }

    /// Makes a way past the proxy from the network namespace of this thread, which is the host's.
    /// The host's rules must say before what may go over it. After a failure there is none. Blocks
    /// for some ten milliseconds.
    pub fn open_byway(&self, plan: &BywayPlan<'_>) -> Result<(), JailError> {
        let opened = self
            .join(plan)
            .map_err(failed("have a link past the proxy"))
            .and_then(|()| self.inside(|| open_inside(plan)))
            .and_then(|()| carries(plan.name).map_err(failed("use its link past the proxy")));
        if opened.is_err()
            && let Err(error) = self.close_byway(plan.name)
        {
            warn!(error:%; "what there is of a way past a proxy is left");
        }
        opened
    }

    /// Takes it away. That there is none is no error.
    pub fn close_byway(&self, name: &str) -> Result<(), JailError> {
        // With one end goes the other, and every route and address on either.
        let closed = unlink(name).map_err(failed("lose its link past the proxy"));
        let back = self.inside(|| close_inside().map_err(failed("be closed again")));
        closed.and(back)
    }

    /// The link, with the host's end ready.
    fn join(&self, plan: &BywayPlan<'_>) -> io::Result<()> {
        let kernel = Kernel::open()?;
        kernel.add(Message::NewLink(pair(plan.name, self.0.as_fd())))?;
        for (place, setting) in HOST_LINK_SETTINGS {
            let (setting, value) = setting.split_once('=').unwrap_or((setting, ""));
            match fs::write(format!("/proc/sys/net/{place}/{}/{setting}", plan.name), value) {
                // A host without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome?,
            }
        }
        let link = index_of(plan.name)?;
        kernel.change(Message::SetLink(up(link, Vec::new())))?;
        kernel.add(Message::NewNeighbour(neighbour(link, plan.address, UP_MAC)))?;
        let mut route = route(link, 32);
        route.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(plan.address)));
        route.header.scope = RouteScope::Link;
        kernel.add(Message::NewRoute(route))
    }
}

/// Waits until the kernel has noticed that both ends are up: until then it drops what goes into the
/// end that was up first.
fn carries(name: &str) -> io::Result<()> {
    let kernel = Kernel::open()?;
    let end = Instant::now() + CARRIER_PATIENCE;
    let up = LinkAttribute::OperState(State::Up);
    while !kernel.link(name)?.is_some_and(|link| link.attributes.contains(&up)) {
        if Instant::now() > end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(CARRIER_LOOK);
    }
    Ok(())
}

/// In the slot's network namespace.
fn open_inside(plan: &BywayPlan<'_>) -> Result<(), JailError> {
    let BywayPlan { ruleset, protocols, .. } = plan;
    let sets = ["netdev sandbox", "ip sandbox", "ip byway"];
    let sets = sets.map(|table| format!("add element {table} direct {{ {protocols} }}\n"));
    load(&format!("{ruleset}\n{}", sets.concat())).map_err(failed("have rules for a way out"))?;
    link_inside(plan).map_err(failed("have a route past the proxy"))
}

fn link_inside(plan: &BywayPlan<'_>) -> io::Result<()> {
    // There since rules follow connections. One that began before them is none.
    fs::write("/proc/sys/net/netfilter/nf_conntrack_tcp_loose", "0")?;
    let kernel = Kernel::open()?;
    let link = index_of(UP)?;
    kernel.add(Message::NewAddress(own_address(link, plan.address, 32)))?;
    let alias = vec![LinkAttribute::IfAlias(plan.name.to_owned())];
    kernel.change(Message::SetLink(up(link, alias)))?;
    kernel.add(Message::NewNeighbour(neighbour(link, NEXT, HOST_MAC)))?;
    let mut route = route(link, 0);
    route.header.flags = RouteFlags::Onlink;
    route.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(NEXT)));
    kernel.add(Message::NewRoute(route))?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")
}

fn close_inside() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
    // Made first, so that it is there to be deleted.
    load(
        "flush set netdev sandbox direct\nflush set ip sandbox direct\n\
         table ip byway { }\ndelete table ip byway\n",
    )?;
    // There when it failed half way.
    unlink(UP)
}

fn unlink(name: &str) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    match Kernel::open()?.change(Message::DelLink(message)) {
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
        outcome => outcome,
    }
}

/// Both ends of a link, the other one in that network.
fn pair(name: &str, other: impl AsRawFd) -> LinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(UP.to_owned()),
        LinkAttribute::Address(UP_MAC.to_vec()),
        LinkAttribute::NetNsFd(other.as_raw_fd()),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(HOST_MAC.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    message
}

fn route(link: u32, destination_bits: u8) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: destination_bits,
        table: MAIN_TABLE,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..Default::default()
    };
    message.attributes = vec![RouteAttribute::Oif(link)];
    message
}

/// Makes the network namespace of this thread one that leads packets on which its rules let through
/// and marked. Does nothing that was done before.
pub fn prepare_host(plan: &HostPlan) -> Result<(), JailError> {
    prepare(plan).map_err(failed("have a host that leads packets on"))
}

fn prepare(plan: &HostPlan) -> io::Result<()> {
    let kernel = Kernel::open()?;
    // This machine's own addresses are looked up in the first rule of all. Behind it comes a second
    // such rule, then the one that must be before, and then the first goes: there is always one.
    kernel.ensure(Message::NewRule(own_addresses(LOCAL_PRIORITY)))?;
    kernel.ensure(Message::NewRule(unmarked(plan)))?;
    match kernel.change(Message::DelRule(own_addresses(0))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        outcome => outcome?,
    }
    // Whether an answer may come from where it comes from is asked with the mark too.
    fs::write("/proc/sys/net/ipv4/conf/all/src_valid_mark", "1")?;
    fs::write("/proc/sys/net/netfilter/nf_conntrack_tcp_loose", "0")?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")
}

fn rule(priority: u32, action: RuleAction) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header = RuleHeader { family: AddressFamily::Inet, action, ..Default::default() };
    // Of the kernel's, say: whoever manages links and rules leaves those alone.
    message.attributes =
        vec![RuleAttribute::Priority(priority), RuleAttribute::Protocol(RouteProtocol::Kernel)];
    message
}

/// `ip rule add lookup local`
fn own_addresses(priority: u32) -> RuleMessage {
    let mut message = rule(priority, RuleAction::ToTable);
    message.header.table = LOCAL_TABLE;
    if priority == 0 {
        // The one that is there from the start, whoever made it.
        message.attributes.truncate(1);
    }
    message
}

/// `ip rule add from RANGE fwmark 0 blackhole`
fn unmarked(plan: &HostPlan) -> RuleMessage {
    let mut message = rule(0, RuleAction::Blackhole);
    let (address, bits) = plan.range;
    message.header.src_len = bits;
    message.attributes.extend([
        RuleAttribute::Source(IpAddr::V4(address)),
        RuleAttribute::FwMark(0),
        RuleAttribute::FwMask(plan.mark),
    ]);
    message
}
