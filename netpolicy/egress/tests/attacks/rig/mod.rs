//! Three network namespaces and what is in them:
//!
//! - *guest*: nothing but a link, with the sandbox's namespace at its end;
//! - *box*: no route out, and rules that steer TCP and DNS to two sockets made there;
//! - *outside*: the program, a resolver and servers, on the addresses of documentation.

mod agent;
pub(crate) mod client;
mod near;
mod outside;

use std::{
    future::Future,
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fs_err::File;
use holdfast_wire::egress::{
    Configure, Credential, Decision, Ended, Limits, ProxyKind, Reference, Request, Resolver, Stats,
    ToAgent, UpstreamProxy, Verdict,
};
use rustix::{
    net::{AddressFamily, SocketType, sockopt},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

pub(crate) use self::{
    agent::Agent,
    near::Near,
    outside::{Answer, Authority, Outside},
};
use crate::sys;

pub(crate) const SANDBOX: &str = "aaaaaaaaaaaaaaaaaaaa";
pub(crate) const ALLOWED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
pub(crate) const WILD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 11);
pub(crate) const API: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);
pub(crate) const EVIL: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 66);
pub(crate) const DATABASE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
pub(crate) const PROXY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 2);
const LISTENER_PORT: u16 = 15001;

/// How long anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The reference policy of the attack list.
pub(crate) const REFERENCE: &str = r#"{
    "defaultAction": "Deny", "trafficInspection": "Full",
    "rules": [
        {"name": "no admin", "match": {"host": "allowed.test", "path": "/admin*"}, "action": {"type": "Deny"}},
        {"name": "allowed", "match": {"host": "allowed.test"}, "action": {"type": "Allow"}},
        {"match": {"host": "*.wild.test"}, "action": {"type": "Allow"}},
        {"name": "api", "match": {"host": "api.test"}, "action": {"type": "Transform", "headers": [
            {"operation": "Set", "name": "Authorization",
             "valueRef": {"secretRef": {"secretId": "token", "format": "Bearer {value}"}}}]}}
    ],
    "cidrRules": [{"cidr": "203.0.113.7/32", "protocol": "tcp", "ports": [5432], "action": "Allow"}]
}"#;
pub(crate) const SECRET: &str = "hunter2-the-secret";

/// The same hosts, judged by name and not opened.
pub(crate) const BY_NAME: &str = r#"{
    "defaultAction": "Deny", "trafficInspection": "Partial",
    "hostRules": [{"pattern": "allowed.test", "action": "Allow"}, {"pattern": "*.wild.test", "action": "Allow"}],
    "cidrRules": [{"cidr": "203.0.113.7/32", "protocol": "tcp", "ports": [5432], "action": "Allow"}]
}"#;

pub(crate) const EVERYTHING: &str = r#"{"defaultAction": "Allow", "trafficInspection": "Partial"}"#;

pub(crate) fn allow_hosts(hosts: &[&str], inspection: &str) -> String {
    let rules: Vec<_> = hosts
        .iter()
        .map(|host| serde_json::json!({"match": {"host": host}, "action": {"type": "Allow"}}))
        .collect();
    serde_json::json!({
        "defaultAction": "Deny", "trafficInspection": inspection, "rules": rules
    })
    .to_string()
}

/// A network namespace, named for this test run. Gone when it is dropped.
struct Namespace {
    name: String,
    file: File,
}

fn run(command: &str) {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Namespace {
    fn new(role: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hfe-{}-{number}-{role}", std::process::id());
        // The one way of congestion control that is there on every machine: figures depend on it.
        run(&format!(
            "ip netns add {name}; ip -n {name} link set lo up
             ip netns exec {name} sysctl -qw net.ipv4.tcp_congestion_control=reno"
        ));
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        Self { name, file }
    }

    /// Runs `work` on a thread of this namespace.
    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = || {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(self.file.as_fd(), network).unwrap();
                work()
            };
            scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Namespace {
    fn block_on<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.run(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::time::timeout(PATIENCE, work).await.expect("the guest waits for too long")
            })
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// One sandbox: its guest's namespace and the one it sits in.
pub(crate) struct Box_ {
    guest: Namespace,
    inner: Namespace,
}

impl Box_ {
    fn new() -> Self {
        let (guest, inner) = (Namespace::new("guest"), Namespace::new("box"));
        let (g, b) = (&guest.name, &inner.name);
        run(&format!(
            "ip link add tap0 netns {b} type veth peer name eth0 netns {g}
             ip -n {b} addr add 192.168.127.1/30 dev tap0; ip -n {b} link set tap0 up
             ip -n {g} addr add {GUEST}/30 dev eth0; ip -n {g} link set eth0 up
             ip -n {g} route add default via 192.168.127.1
             ip -n {b} rule add fwmark 1 lookup 100
             ip -n {b} route add local default dev lo table 100
             ip netns exec {b} sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.tap0.rp_filter=0
             ip netns exec {b} nft -f - <<E
table ip steer {{
    chain in {{
        type filter hook prerouting priority mangle; policy drop;
        iifname lo accept
        iifname tap0 ip saddr {GUEST} meta l4proto tcp tproxy to :{LISTENER_PORT} meta mark set 1 accept
        iifname tap0 ip saddr {GUEST} udp dport 53 tproxy to :53 meta mark set 1 accept
    }}
    chain forward {{ type filter hook forward priority filter; policy drop; }}
}}
E
"
        ));
        Self { guest, inner }
    }

    /// The two sockets, as the agent makes them.
    fn sockets(&self) -> [OwnedFd; 2] {
        self.inner.run(|| {
            let any = |port| std::net::SocketAddr::from(([0, 0, 0, 0], port));
            let socket = |kind| rustix::net::socket(AddressFamily::INET, kind, None).unwrap();
            let tcp = socket(SocketType::STREAM);
            sys::switch_on(&tcp, libc::IP_TRANSPARENT);
            sockopt::set_socket_reuseaddr(&tcp, true).unwrap();
            rustix::net::bind(&tcp, &any(LISTENER_PORT)).unwrap();
            rustix::net::listen(&tcp, 1024).unwrap();
            let udp = socket(SocketType::DGRAM);
            sys::switch_on(&udp, libc::IP_TRANSPARENT);
            sys::switch_on(&udp, libc::IP_RECVORIGDSTADDR);
            rustix::net::bind(&udp, &any(53)).unwrap();
            [tcp, udp]
        })
    }
}

pub(crate) struct Rig {
    pub(crate) outside: Arc<Outside>,
    pub(crate) agent: Agent,
    /// The group's CA, which guests trust.
    pub(crate) ca: Authority,
    boxes: Vec<Box_>,
    generation: AtomicU32,
    _program: Program,
}

struct Program(std::process::Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Rig {
    /// A sandbox under this policy, with all servers of the attack list outside.
    pub(crate) fn new(policy: &str) -> Self {
        Self::with(policy, |_| {})
    }

    pub(crate) fn with(policy: &str, change: impl FnOnce(&mut Configure)) -> Self {
        Self::on_threads(1, policy, change)
    }

    pub(crate) fn on_threads(
        threads: usize,
        policy: &str,
        change: impl FnOnce(&mut Configure),
    ) -> Self {
        let outside = Arc::new(Outside::new(Namespace::new("outside")));
        let ca = Authority::new("group");
        let (agent, ours, listener) = Agent::new();
        let program = outside.namespace().run(|| start(&ours, &listener, threads));
        let mut configure = Configure {
            ca_cert_pem: ca.pem(),
            ca_key_pem: ca.key_pem(),
            extra_roots_pem: outside.authority.pem(),
            resolvers: vec![Resolver { address: RESOLVER.into(), port: 53 }],
            deny_exceptions: vec!["198.51.100.0/24".into(), "203.0.113.0/24".into()],
            node_addresses: vec![],
            limits: Limits::default(),
            upstream_proxy: None,
        };
        change(&mut configure);
        let hello = Request::Hello { version: holdfast_wire::WIRE_VERSION };
        assert!(matches!(agent.ask(hello, &[]), ToAgent::Hello { .. }));
        agent.done(Request::Configure(Box::new(configure)), &[]);
        let mut rig = Self {
            outside,
            agent,
            ca,
            boxes: Vec::new(),
            generation: AtomicU32::new(0),
            _program: Program(program),
        };
        rig.add(SANDBOX, policy);
        rig
    }

    /// One more sandbox. Its guest is `rig.guest_of(number)`.
    pub(crate) fn add(&mut self, sandbox: &str, policy: &str) {
        let new = Box_::new();
        let sockets = new.sockets();
        self.agent.done(self.put_request(sandbox, policy, SECRET), &sockets);
        self.boxes.push(new);
    }

    pub(crate) fn put_request(&self, sandbox: &str, policy: &str, secret: &str) -> Request {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        let reference = Reference::Secret { id: "token".into(), key: None };
        Request::Put(holdfast_wire::egress::Put {
            sandbox: sandbox.to_owned(),
            generation: generation.into(),
            policy: policy.as_bytes().to_vec(),
            secrets: vec![Credential { reference, value: secret.to_owned(), expires_at_ms: None }],
        })
    }

    /// Has the first sandbox's policy refer to these values.
    pub(crate) fn values(&self, secrets: Vec<Credential>) {
        let values = holdfast_wire::egress::Values { sandbox: SANDBOX.to_owned(), secrets };
        self.agent.done(Request::Values(values), &[]);
    }

    /// Puts a policy in force.
    pub(crate) fn put(&self, policy: &str) {
        self.agent.done(self.put_request(SANDBOX, policy, SECRET), &[]);
    }

    /// Runs something in the first guest.
    pub(crate) fn guest<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.guest_of(0, work)
    }

    /// Runs something on a thread of the first guest's.
    pub(crate) fn in_guest<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.boxes[0].guest.run(work)
    }

    /// The same in any guest.
    pub(crate) fn in_guest_of<T: Send>(&self, number: usize, work: impl FnOnce() -> T + Send) -> T {
        self.boxes[number].guest.run(work)
    }

    pub(crate) fn guest_of<T: Send>(
        &self,
        number: usize,
        work: impl Future<Output = T> + Send,
    ) -> T {
        self.boxes[number].guest.block_on(work)
    }

    /// Waits for a decision that fits, among those told so far and to come.
    pub(crate) fn decision(&self, what: &str, fits: impl Fn(&Decision) -> bool) -> Decision {
        let found = self.agent.wait_for(|told| told.decisions.iter().find(|it| fits(it)).cloned());
        found.unwrap_or_else(|| panic!("no decision {what}: {:#?}", self.agent.told().decisions))
    }

    /// The decision that denied this host.
    pub(crate) fn denial(&self, host: &str) -> Decision {
        self.decision(&format!("denies {host:?}"), |it| {
            it.verdict == Verdict::Denied && it.host == host
        })
    }

    pub(crate) fn end_of(&self, flow: u64) -> Ended {
        let find = |told: &agent::Told| told.ended.iter().find(|it| it.flow == flow).cloned();
        self.agent.wait_for(find).expect("the end of the flow is told")
    }

    pub(crate) fn stats(&self) -> Stats {
        match self.agent.ask(Request::Stats { sandbox: SANDBOX.into() }, &[]) {
            ToAgent::Stats { stats, .. } => stats,
            other => panic!("{other:?}"),
        }
    }

    /// Runs something on a thread outside.
    pub(crate) fn in_outside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.outside.namespace().run(work)
    }

    /// Runs something outside, as `guest` does inside.
    pub(crate) fn outside_too<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.outside.namespace().block_on(work)
    }

    pub(crate) fn program_id(&self) -> u32 {
        self._program.0.id()
    }

    /// Sets something of the first guest's network stack.
    pub(crate) fn sysctl(&self, setting: &str) {
        run(&format!("ip netns exec {} sysctl -qw {setting}", self.boxes[0].guest.name));
    }

    /// The same, and of the outside's.
    pub(crate) fn sysctl_of_both(&self, setting: &str) {
        self.sysctl(setting);
        run(&format!("ip netns exec {} sysctl -qw {setting}", self.outside.namespace().name));
    }

    /// New sockets of the first sandbox's namespace, for a program that starts anew.
    pub(crate) fn sockets(&self) -> [OwnedFd; 2] {
        self.boxes[0].sockets()
    }
}

pub(crate) fn through(kind: ProxyKind) -> Option<UpstreamProxy> {
    let (username, password) = (Some("site".to_owned()), Some("open sesame".to_owned()));
    let host = if kind == ProxyKind::Https { "proxy.site.test".into() } else { PROXY.to_string() };
    Some(UpstreamProxy { kind, host, port: 3128, username, password })
}

/// Starts the program as the agent does: with its two sockets on 3 and 4, as nobody, confined.
fn start(agent: &OwnedFd, listener: &OwnedFd, threads: usize) -> std::process::Child {
    use std::os::fd::AsRawFd;
    let (agent, listener) = (agent.as_raw_fd(), listener.as_raw_fd());
    let built = option_env!("CARGO_BIN_EXE_holdfast-egress").map(str::to_owned);
    let program = std::env::var("HOLDFAST_EGRESS").ok().or(built);
    let program = program.expect("HOLDFAST_EGRESS is the path of the program");
    // Above the numbers in use first: one of the two may be 3 or 4.
    let script = format!(
        "exec 100<&{agent} 101<&{listener} 3<&100 4<&101 100<&- 101<&-
         exec {program} --uid 65534 --gid 65534 --threads {threads}"
    );
    Command::new("bash")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
        .spawn()
        .unwrap()
}

/// Waits until something holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
