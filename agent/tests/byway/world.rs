//! A host, an outside with an attacker, and sandboxes with ways past their proxies.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_jail::{BywayPlan, HostPlan, Slot, SlotNetwork, prepare_host};
use holdfast_netpolicy::{
    BYWAY_RULESET, Byway, Cidr, HOST_RULESET, Passing, Policy, SANDBOX_RULESET,
};
use holdfast_nft::{BYWAY_MARK, BYWAY_RANGE, BywayNumber, Nft};
use rustix::{
    io::Errno,
    net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with},
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    frames::Packet,
    guest::{Guest, PATIENCE},
};

/// Whom policies here allow, and whom they do not.
pub(super) const ALLOWED: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 10);
pub(super) const EVIL: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 66);
/// In ranges that no policy opens.
pub(super) const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
pub(super) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The host's own.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(5, 5, 5, 1);

/// `ETH_P_IP`: packets that come in.
const INCOMING_IP: u16 = 0x0800;

pub(super) struct World {
    host: Network,
    pub(super) outside: Outside,
}

struct Network {
    name: String,
    handle: OwnedFd,
}

/// Every address there is out there, and a recording of what comes to any of them.
pub(super) struct Outside {
    network: Network,
    recorder: OwnedFd,
}

pub(super) struct Sandbox {
    pub(super) guest: Guest,
    pub(super) network: SlotNetwork,
    pub(super) number: BywayNumber,
}

/// A policy that lets UDP go to one address, on these ports or on all.
pub(super) fn udp_to(address: Ipv4Addr, ports: &[u16]) -> String {
    format!(
        r#"{{"defaultAction":"Deny","cidrRules":[{{"cidr":"{address}/32","protocol":"udp","ports":{ports:?},"action":"Allow"}}]}}"#
    )
}

impl Network {
    fn new(kind: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hfby-{kind}-{}-{count}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let handle = fs::File::open(format!("/run/netns/{name}")).unwrap().into();
        Self { name, handle }
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let work = || {
                move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
                    .unwrap();
                work()
            };
            scope.spawn(work).join().unwrap()
        })
    }

    fn shell(&self, line: &str) -> String {
        let run = || Command::new("sh").args(["-ec", line]).output().unwrap();
        let output = self.inside(run);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

impl World {
    pub(super) fn new() -> Self {
        let (host, network) = (Network::new("host"), Network::new("out"));
        host.shell(&format!(
            "ip link set lo up
             ip link add wan0 type veth peer name wan0 netns {}
             ip address add {HOST}/24 dev wan0; ip link set wan0 up
             # As on a node.
             echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter",
            network.name
        ));
        network.shell(&format!(
            "ip link set lo up; ip address add 5.5.5.2/24 dev wan0; ip link set wan0 up
             for address in {ALLOWED} {EVIL} {PRIVATE} {METADATA}; do
                 ip address add $address/32 dev lo
             done"
        ));
        host.shell("ip route add default via 5.5.5.2");
        let recorder = network.inside(|| {
            let kind = Protocol::from_raw(u32::from(INCOMING_IP.to_be()).try_into().unwrap());
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, Some(kind)).unwrap()
        });
        let world = Self { host, outside: Outside { network, recorder } };
        world.load_ruleset();
        let plan = HostPlan { range: BYWAY_RANGE, mark: BYWAY_MARK };
        // Twice is no error.
        world.host.inside(|| prepare_host(&plan).and_then(|()| prepare_host(&plan)).unwrap());
        world
    }

    pub(super) fn load_ruleset(&self) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), HOST_RULESET).unwrap();
        self.in_host(&format!("nft -f {}", file.path().display()));
    }

    pub(super) fn in_host(&self, line: &str) -> String {
        self.host.shell(line)
    }

    pub(super) fn nft(&self) -> Nft {
        self.host.inside(|| Nft::open().unwrap())
    }

    /// Does it as a user of the host.
    pub(super) fn as_user<T: Send>(&self, user: u32, work: impl FnOnce() -> T + Send) -> T {
        self.host.inside(|| {
            crate::guard::become_user(user);
            work()
        })
    }

    /// All of whose threads are in the host's network.
    pub(super) fn runtime(&self) -> tokio::runtime::Runtime {
        let host = self.host.handle.try_clone().unwrap();
        let enter = move || {
            move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        };
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(enter)
            .build()
            .unwrap()
    }

    /// A sandbox with a way past its proxy of this number.
    pub(super) fn sandbox(&self, number: u16, passing: Passing, policy: &str) -> Sandbox {
        let Slot { tap, sockets } = Slot::make(SANDBOX_RULESET).unwrap();
        let network = sockets.network().unwrap();
        let number = BywayNumber::new(number).unwrap();
        let sandbox = Sandbox { guest: Guest { tap, sockets }, network, number };
        self.open(&sandbox, passing, policy);
        sandbox
    }

    pub(super) fn open(&self, sandbox: &Sandbox, passing: Passing, policy: &str) {
        self.put(sandbox, passing, policy);
        let name = sandbox.number.to_string();
        let protocols = match passing {
            Passing::Udp => "udp",
            Passing::All => "tcp, udp",
        };
        let plan = BywayPlan {
            name: &name,
            address: sandbox.number.address(),
            protocols,
            ruleset: BYWAY_RULESET,
        };
        self.host.inside(|| sandbox.network.open_byway(&plan).unwrap());
    }

    pub(super) fn put(&self, sandbox: &Sandbox, passing: Passing, policy: &str) {
        self.put_lifted(sandbox, passing, policy, &[]);
    }

    pub(super) fn put_lifted(
        &self,
        sandbox: &Sandbox,
        passing: Passing,
        policy: &str,
        lifted: &[&str],
    ) {
        let policy = Policy::parse(policy.as_bytes()).unwrap();
        let byway = Byway::of(&policy, passing).expect("the policy needs no way");
        let lifted: Vec<Cidr> = lifted.iter().map(|text| text.parse().unwrap()).collect();
        self.nft().put_byway(sandbox.number, &byway, &lifted).unwrap();
    }

    pub(super) fn close(&self, sandbox: &Sandbox) {
        let nft = self.nft();
        nft.remove_byway(sandbox.number).unwrap();
        let name = sandbox.number.to_string();
        self.host.inside(|| sandbox.network.close_byway(&name).unwrap());
        nft.forget_connections(sandbox.number).unwrap();
    }

    /// Somebody outside.
    pub(super) fn server(&self, address: Ipv4Addr, port: u16) -> UdpSocket {
        bound(&self.outside.network, address, port)
    }

    /// Somebody on the host itself.
    pub(super) fn server_on_host(&self, address: Ipv4Addr, port: u16) -> UdpSocket {
        bound(&self.host, address, port)
    }

    pub(super) fn listener_on_host(&self, address: Ipv4Addr, port: u16) -> TcpListener {
        self.host.inside(|| TcpListener::bind((address, port)).unwrap())
    }

    pub(super) fn listener(&self, address: Ipv4Addr, port: u16) -> TcpListener {
        self.outside.network.inside(|| TcpListener::bind((address, port)).unwrap())
    }
}

fn bound(network: &Network, address: Ipv4Addr, port: u16) -> UdpSocket {
    let socket = network.inside(|| UdpSocket::bind((address, port)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The next datagram.
pub(super) fn received(server: &UdpSocket) -> Option<(Vec<u8>, SocketAddr)> {
    let mut bytes = [0; 2048];
    let (count, from) = server.recv_from(&mut bytes).ok()?;
    Some((bytes[..count].to_vec(), from))
}

impl Outside {
    /// Whether anything came to this address since it was asked last, or comes soon.
    pub(super) fn saw(&self, address: Ipv4Addr) -> bool {
        self.count_until(address, |count| count > 0) > 0
    }

    /// How much came to this address since it was asked last.
    pub(super) fn count(&self, address: Ipv4Addr) -> usize {
        self.count_until(address, |_| false)
    }

    fn count_until(&self, address: Ipv4Addr, enough: impl Fn(usize) -> bool) -> usize {
        let end = Instant::now() + PATIENCE;
        let mut count = 0;
        while !enough(count) && Instant::now() < end {
            match self.next() {
                Some(packet) => count += usize::from(packet[16..20] == address.octets()),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
        count
    }

    /// What was recorded so far does not matter.
    pub(super) fn forget(&self) {
        while self.next().is_some() {}
    }

    fn next(&self) -> Option<Vec<u8>> {
        let mut packet = [0; 128];
        match recv(&self.recorder, &mut packet, RecvFlags::empty()) {
            Ok((count, _)) => Some(packet[..count].to_vec()),
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }
}

impl Sandbox {
    pub(super) fn send_udp(&self, to: Ipv4Addr, port: u16, bytes: &[u8]) {
        self.guest.send(&Packet::udp(to, port, bytes).frame());
    }

    /// Whether it is told at once that it may not.
    pub(super) fn is_refused(&self) -> bool {
        // Unreachable: prohibited.
        self.guest.receive(|it| it.is(crate::frames::ICMP) && it.inner()[..2] == [3, 13]).is_some()
    }
}

/// A program of this tree, built if that was not done yet.
pub(super) fn built(name: &str) -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let folder = here.parent().and_then(Path::parent).unwrap();
    static BUILT: std::sync::Once = std::sync::Once::new();
    BUILT.call_once(|| {
        let arguments = ["build", "--quiet", "-p", name];
        assert!(Command::new(env!("CARGO")).args(arguments).status().unwrap().success());
    });
    folder.join(name)
}

/// Kills every process of this program.
pub(super) fn kill_all_of(program: &Path) {
    for entry in fs::read_dir("/proc").unwrap() {
        let name = entry.unwrap().file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program) {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

pub(super) fn eventually(otherwise: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "{otherwise}");
        thread::sleep(Duration::from_millis(10));
    }
}
