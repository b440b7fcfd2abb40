//! What connections cost the process in the middle: ours beside nginx and haproxy, on the same
//! machine in the same run. Figures are of the process's own CPU and memory, as the kernel counts
//! them. Needs root; `scripts/bench egress` brings the peers.
#![allow(clippy::print_stdout, clippy::print_stderr)]

// The attacks use what this does not.
#[allow(dead_code, unused_imports)]
#[path = "../../tests/attacks/rig/mod.rs"]
mod rig;
#[path = "../../tests/attacks/sys.rs"]
mod sys;

use std::{
    io,
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rig::{
    ALLOWED, API, BY_NAME, PROXY, REFERENCE, Rig,
    client::{exchange, get, tls},
};
use rustls::RootCertStore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: usize = 1 << 20;

/// Connections of a measurement, in turn; idle ones at a time; bytes relayed.
struct Amounts {
    connections: u32,
    idle: u32,
    relayed_mib: usize,
}

/// Processes whose cost is counted.
struct Middle {
    name: &'static str,
    roots: fn(&Rig) -> RootCertStore,
    /// The server that is asked through it.
    host: &'static str,
    /// Where clients connect to.
    address: Ipv4Addr,
    /// Clients are in the sandbox, not outside.
    in_guest: bool,
    root_process: u32,
}

/// The process and its children: nginx and haproxy have workers.
fn family(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut at = 0;
    while at < all.len() {
        let tasks = format!("/proc/{0}/task/{0}/children", all[at]);
        let children = fs_err::read_to_string(tasks).unwrap_or_default();
        all.extend(children.split_whitespace().filter_map(|id| id.parse::<u32>().ok()));
        at += 1;
    }
    all
}

/// CPU time so far in milliseconds, of all threads.
fn cpu_ms(root: u32) -> f64 {
    let mut nanoseconds = 0.0;
    for process in family(root) {
        let Ok(tasks) = fs_err::read_dir(format!("/proc/{process}/task")) else { continue };
        for task in tasks.flatten() {
            let text = fs_err::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let first = text.split_whitespace().next().and_then(|it| it.parse::<f64>().ok());
            nanoseconds += first.unwrap_or(0.0);
        }
    }
    nanoseconds / 1e6
}

/// Memory that is its own, in KiB.
fn own_kib(root: u32) -> f64 {
    let of = |process: u32| -> f64 {
        let rollup = fs_err::read_to_string(format!("/proc/{process}/smaps_rollup"));
        let text = rollup.unwrap_or_default();
        let private = text.lines().filter(|line| line.starts_with("Private_"));
        private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).sum()
    };
    family(root).into_iter().map(of).sum()
}

impl Middle {
    fn run<T: Send>(&self, rig: &Rig, work: impl Future<Output = T> + Send) -> T {
        if self.in_guest { rig.guest(work) } else { rig.outside_too(work) }
    }

    /// Milliseconds of CPU for a connection with one request.
    fn connection_cost(&self, rig: &Rig, amounts: &Amounts) -> (f64, f64) {
        let go = |count: u32| {
            let roots = (self.roots)(rig);
            self.run(rig, async move {
                let mut taken = Vec::new();
                for _ in 0..count {
                    let start = Instant::now();
                    let mut stream = tls(self.address, self.host, roots.clone()).await.unwrap();
                    exchange(&mut stream, &get(self.host, "/")).await.unwrap();
                    taken.push(start.elapsed().as_secs_f64() * 1e3);
                    let _ = stream.shutdown().await;
                }
                taken.sort_by(f64::total_cmp);
                taken[taken.len() / 2]
            })
        };
        go(20);
        let before = cpu_ms(self.root_process);
        let mut medians = Vec::new();
        // Pieces, since nothing in the rig may take long.
        let pieces = 10;
        for _ in 0..pieces {
            medians.push(go(amounts.connections / pieces));
        }
        medians.sort_by(f64::total_cmp);
        let cost = cpu_ms(self.root_process) - before;
        (cost / f64::from(amounts.connections), medians[medians.len() / 2])
    }

    /// Seconds of CPU for a GB that is sent to the client.
    fn relay_cost(&self, rig: &Rig, amounts: &Amounts) -> f64 {
        let roots = (self.roots)(rig);
        let before = cpu_ms(self.root_process);
        let got = self.run(rig, async move {
            let mut stream = tls(self.address, self.host, roots).await.unwrap();
            let path = format!("/zeros/{}", amounts.relayed_mib);
            stream.write_all(get(self.host, &path).as_bytes()).await.unwrap();
            let (mut got, mut buffer) = (0, vec![0; 256 * 1024]);
            while got < amounts.relayed_mib * MIB {
                got += stream.read(&mut buffer).await.unwrap();
            }
            got
        });
        let cost = cpu_ms(self.root_process) - before;
        #[allow(clippy::cast_precision_loss)]
        let bytes = got as f64;
        cost / 1e3 / (bytes / 1e9)
    }

    /// KiB of its memory for a connection that says nothing.
    fn idle_cost(&self, rig: &Rig, amounts: &Amounts) -> f64 {
        let before = own_kib(self.root_process);
        let roots = (self.roots)(rig);
        let (held, kib) = self.run(rig, async move {
            let mut held = Vec::new();
            for _ in 0..amounts.idle {
                let mut stream = tls(self.address, self.host, roots.clone()).await.unwrap();
                exchange(&mut stream, &get(self.host, "/")).await.unwrap();
                held.push(stream);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            let kib = own_kib(self.root_process);
            (held, kib)
        });
        drop(held);
        (kib - before) / f64::from(amounts.idle)
    }
}

struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        // Its workers go with it.
        if let Ok(id) = i32::try_from(self.0.id())
            && let Some(id) = rustix::process::Pid::from_raw(id)
        {
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

fn start(rig: &Rig, program: &str, arguments: &[&str]) -> Peer {
    let spawn = || Command::new(program).args(arguments).stdout(Stdio::null()).spawn();
    let peer = Peer(rig.in_outside(spawn).unwrap_or_else(|error| panic!("{program}: {error}")));
    rig::until("the peer listens", || {
        rig.in_outside(|| std::net::TcpStream::connect((PROXY, 443)).is_ok())
    });
    peer
}

fn main() -> io::Result<()> {
    let small = std::env::args().any(|argument| argument == "--small");
    let amounts = if small {
        Amounts { connections: 100, idle: 100, relayed_mib: 64 }
    } else {
        Amounts { connections: 2000, idle: 1000, relayed_mib: 1024 }
    };
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let by_name = Rig::new(BY_NAME);
    let opened = Rig::new(REFERENCE);

    fs_err::write(
        path("nginx.conf"),
        format!(
            "load_module /usr/lib/nginx/modules/ngx_stream_module.so; worker_processes 1;
             daemon off; pid {}; error_log stderr crit; events {{ worker_connections 8000; }}
             stream {{ resolver {}; server {{ listen {PROXY}:443; ssl_preread on;
             proxy_pass $ssl_preread_server_name:443; }} }}",
            path("nginx.pid"),
            rig::RESOLVER
        ),
    )?;
    fs_err::write(
        path("haproxy.cfg"),
        format!(
            "global\n nbthread 1\n maxconn 4000\ndefaults\n mode tcp\n timeout connect 5s
             timeout client 1h\n timeout server 1h\nfrontend f\n bind {PROXY}:443
             tcp-request inspect-delay 5s\n tcp-request content accept if {{ req.ssl_hello_type 1 }}
             use_backend b if {{ req.ssl_sni -i allowed.test }}\nbackend b\n server s {ALLOWED}:443\n"
        ),
    )?;
    let leaf = opened.ca.pair(&["api.test"]);
    fs_err::write(path("leaf.pem"), leaf)?;
    fs_err::write(path("web.pem"), opened.outside.authority.pem())?;
    fs_err::write(
        path("opening.cfg"),
        format!(
            "global\n nbthread 1\n maxconn 4000\n ssl-default-bind-options no-tls-tickets
defaults\n mode http\n timeout connect 5s\n timeout client 1h\n timeout server 1h
frontend f\n bind {PROXY}:443 ssl crt {}\n http-request set-header Authorization \"Bearer x\"
 default_backend b\nbackend b\n http-reuse never
 server s {API}:443 ssl verify required ca-file {} sni str(api.test) verifyhost api.test\n",
            path("leaf.pem"),
            path("web.pem")
        ),
    )?;

    let mut figures: Vec<(String, f64)> = Vec::new();
    let mut measure = |rig: &Rig, middle: &Middle| {
        eprintln!("-- {}", middle.name);
        let (cpu, p50) = middle.connection_cost(rig, &amounts);
        let relay = middle.relay_cost(rig, &amounts);
        let idle = middle.idle_cost(rig, &amounts);
        for (what, value) in [
            ("cpu_ms_per_connection", cpu),
            ("p50_ms_per_connection", p50),
            ("relay_cpu_s_per_gb", relay),
            ("idle_kib", idle),
        ] {
            figures.push((format!("{}_{what}", middle.name), value));
        }
    };
    let web = |rig: &Rig| rig.outside.authority.roots();
    let group = |rig: &Rig| rig.ca.roots();
    measure(
        &by_name,
        &Middle {
            name: "ours_by_name",
            roots: web,
            host: "allowed.test",
            address: ALLOWED,
            in_guest: true,
            root_process: by_name.program_id(),
        },
    );
    {
        let peer = start(&by_name, "nginx", &["-c", &path("nginx.conf"), "-p", &path("")]);
        let root_process = peer.0.id();
        let (host, address) = ("allowed.test", PROXY);
        let name = "nginx_by_name";
        measure(
            &by_name,
            &Middle { name, roots: web, host, address, in_guest: false, root_process },
        );
    }
    {
        let peer = start(&by_name, "haproxy", &["-db", "-f", &path("haproxy.cfg")]);
        let root_process = peer.0.id();
        let (host, address) = ("allowed.test", PROXY);
        let name = "haproxy_by_name";
        measure(
            &by_name,
            &Middle { name, roots: web, host, address, in_guest: false, root_process },
        );
    }
    measure(
        &opened,
        &Middle {
            name: "ours_opened",
            roots: group,
            host: "api.test",
            address: API,
            in_guest: true,
            root_process: opened.program_id(),
        },
    );
    {
        let peer = start(&opened, "haproxy", &["-db", "-f", &path("opening.cfg")]);
        let root_process = peer.0.id();
        let (host, address) = ("api.test", PROXY);
        let name = "haproxy_opened";
        measure(
            &opened,
            &Middle { name, roots: group, host, address, in_guest: false, root_process },
        );
    }
    for (name, value) in &figures {
        println!("{name}: {value:.3}");
    }
    let of = |name: &str| {
        figures.iter().find(|(own, _)| own == name).map_or(f64::NAN, |(_, value)| *value)
    };
    for (name, ours, peer) in [
        (
            "ratio_by_name_cpu_to_nginx",
            "ours_by_name_cpu_ms_per_connection",
            "nginx_by_name_cpu_ms_per_connection",
        ),
        (
            "ratio_by_name_relay_to_nginx",
            "ours_by_name_relay_cpu_s_per_gb",
            "nginx_by_name_relay_cpu_s_per_gb",
        ),
        (
            "ratio_opened_cpu_to_haproxy",
            "ours_opened_cpu_ms_per_connection",
            "haproxy_opened_cpu_ms_per_connection",
        ),
    ] {
        println!("{name}: {:.3}", of(ours) / of(peer));
    }
    Ok(())
}
