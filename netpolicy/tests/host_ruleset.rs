//! The host's ruleset in the kernel: loaded into a network namespace with a neighbour on each
//! side, it lets in the API and nothing else, and passes nothing on. Needs root.
#![forbid(unsafe_code)]

use std::{
    io::Write,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// Commands of one network namespace or several, deleted with it.
struct Network {
    names: [String; 3],
}

const HOST: usize = 0;
const LEFT: usize = 1;
const RIGHT: usize = 2;

impl Network {
    /// A host that would route between its two neighbours, were it not for the ruleset.
    fn with_ruleset(ruleset: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let names = ["host", "left", "right"].map(|name| format!("hf-{name}-{id}"));
        let network = Self { names };
        for name in &network.names {
            run("ip", &["netns", "add", name], "");
        }
        for (neighbour, link, net) in [(LEFT, "left0", "10.98.1"), (RIGHT, "right0", "10.98.2")] {
            let (near, far) = (&network.names[HOST], &network.names[neighbour]);
            run(
                "ip",
                &[
                    "-n", near, "link", "add", link, "type", "veth", "peer", "name", "up0",
                    "netns", far,
                ],
                "",
            );
            network.ip(HOST, &["address", "add", &format!("{net}.1/24"), "dev", link]);
            network.ip(HOST, &["link", "set", link, "up"]);
            network.ip(neighbour, &["address", "add", &format!("{net}.2/24"), "dev", "up0"]);
            network.ip(neighbour, &["link", "set", "up0", "up"]);
            network.ip(neighbour, &["route", "add", "default", "via", &format!("{net}.1")]);
        }
        network.ip(HOST, &["link", "set", "lo", "up"]);
        network.run_in(HOST, "sysctl", &["-qw", "net.ipv4.ip_forward=1"], "");
        network.run_in(HOST, "nft", &["-f", "-"], ruleset);
        network
    }

    fn ip(&self, place: usize, args: &[&str]) {
        run("ip", &[&["-n", &self.names[place]], args].concat(), "");
    }

    fn run_in(&self, place: usize, program: &str, args: &[&str], input: &str) {
        run("ip", &[&["netns", "exec", &self.names[place], program], args].concat(), input);
    }

    /// Listens on `port` at `place` until the guard is dropped.
    fn listen(&self, place: usize, port: u16) -> Listener {
        let mut listen = Command::new("ip");
        listen.args(["netns", "exec", &self.names[place], "socat", "-u"]);
        listen.args([&format!("TCP-LISTEN:{port},fork,reuseaddr"), "OPEN:/dev/null"]);
        let listener = Listener(listen.spawn().expect("socat is installed"));
        let mut there = Command::new("ip");
        there.args([
            "netns",
            "exec",
            &self.names[place],
            "ss",
            "-Hltn",
            &format!("sport = :{port}"),
        ]);
        while there.output().expect("ss is installed").stdout.is_empty() {
            std::thread::yield_now();
        }
        listener
    }

    /// Whether a connection from `place` to `address` comes about within a second.
    fn connects(&self, place: usize, address: &str) -> bool {
        let mut connect = Command::new("ip");
        connect.args(["netns", "exec", &self.names[place], "socat", "-u", "/dev/null"]);
        connect.arg(format!("TCP:{address},connect-timeout=1")).stderr(Stdio::null());
        connect.status().expect("socat is installed").success()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

struct Listener(std::process::Child);

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(program: &str, args: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{program} {args:?} failed");
}

#[test]
fn the_api_is_let_in_and_nothing_else_is_nor_passed_on() {
    let network = Network::with_ruleset(holdfast_netpolicy::HOST_RULESET);
    let _api = network.listen(HOST, 8443);
    let _other = network.listen(HOST, 22);
    let _neighbour = network.listen(RIGHT, 8443);

    assert!(network.connects(LEFT, "10.98.1.1:8443"), "the API is not reached");
    assert!(!network.connects(LEFT, "10.98.1.1:22"), "another port is reached");
    assert!(network.connects(HOST, "127.0.0.1:22"), "loopback is shut");
    assert!(network.connects(HOST, "10.98.2.2:8443"), "the host gets no answers");
    assert!(!network.connects(LEFT, "10.98.2.2:8443"), "the host passes packets on");
}

/// Shows that the test above can fail: the network is such that only the rules are in the way.
#[test]
fn without_rules_the_same_network_lets_everything_through() {
    let network = Network::with_ruleset("flush ruleset\n");
    let _other = network.listen(HOST, 22);
    let _neighbour = network.listen(RIGHT, 8443);
    assert!(network.connects(LEFT, "10.98.1.1:22"));
    assert!(network.connects(LEFT, "10.98.2.2:8443"));
}

#[test]
fn the_ruleset_replaces_itself() {
    let network = Network::with_ruleset(holdfast_netpolicy::HOST_RULESET);
    network.run_in(HOST, "nft", &["-f", "-"], holdfast_netpolicy::HOST_RULESET);
}

#[test]
fn every_deny_set_of_the_rules_is_the_one() {
    let sets = holdfast_netpolicy::HOST_RULESET.lines().map(str::trim);
    let sets: Vec<_> = sets.filter(|line| line.starts_with("set denied")).collect();
    assert!(sets.len() > 2);
    for set in sets {
        assert!(set.contains("elements = $denied"), "{set}");
    }
}

#[test]
fn the_deny_set_of_the_rules_is_that_of_the_policies() {
    let listed = |set: &str| {
        let text = holdfast_netpolicy::HOST_RULESET;
        let elements = text.split(&format!("define {set} = {{")).nth(1).expect("it is defined");
        let elements = elements.split('}').next().unwrap();
        let mut ranges: Vec<String> =
            elements.split(',').map(|range| range.trim().to_owned()).collect();
        ranges.sort();
        ranges
    };
    let denied = |v6: bool| {
        let ranges = holdfast_netpolicy::DENY_RANGES.iter();
        let mut ranges: Vec<String> = ranges
            .filter(|range| range.network().is_ipv6() == v6)
            .map(ToString::to_string)
            .collect();
        ranges.sort();
        ranges
    };
    assert_eq!(listed("denied4"), denied(false));
    assert_eq!(listed("denied6"), denied(true));
}
