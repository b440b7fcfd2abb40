//! What stands between client and server: a process whose CPU and memory are counted, or nothing.

use std::{
    io,
    net::Ipv4Addr,
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::{
    load::Target,
    origin::{RAW, RAW_NAME, WEB, WEB_NAME},
    rig::{self, Near, PROXY, RESOLVER, Rig},
};

/// Where squid takes in what its clients sent elsewhere.
const SQUID_PORT: u16 = 3129;
/// Descriptors that a peer may have, and connections for which they are enough.
const DESCRIPTORS_MAX: u32 = 20_000;
const CONNECTIONS_MAX: u32 = 9_300;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Direct,
    Ours,
    Nginx,
    /// With larger buffers, which are said to make it cheaper by the byte.
    NginxLargeBuffers,
    HaproxyByName,
    SquidSplice,
    OursOpened,
    HaproxyOpened,
    SquidBump,
}

impl Kind {
    pub(crate) const ALL: [Self; 9] = [
        Self::Direct,
        Self::Ours,
        Self::Nginx,
        Self::NginxLargeBuffers,
        Self::HaproxyByName,
        Self::SquidSplice,
        Self::OursOpened,
        Self::HaproxyOpened,
        Self::SquidBump,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ours => "ours",
            Self::Nginx => "nginx",
            Self::NginxLargeBuffers => "nginx_64k",
            Self::HaproxyByName => "haproxy",
            Self::SquidSplice => "squid_splice",
            Self::OursOpened => "ours_opened",
            Self::HaproxyOpened => "haproxy_opened",
            Self::SquidBump => "squid_bump",
        }
    }

    pub(crate) const fn opens(self) -> bool {
        matches!(self, Self::OursOpened | Self::HaproxyOpened | Self::SquidBump)
    }
}

/// Something that clients can be sent through.
pub(crate) struct Middle<'a> {
    rig: &'a Rig,
    /// Where its clients are. `None`: in the sandbox.
    near: Option<Near>,
    process: Option<u32>,
    pub(crate) target: Target,
    _peer: Option<Peer>,
}

impl<'a> Middle<'a> {
    pub(crate) fn new(rig: &'a Rig, kind: Kind, folder: &Path) -> Self {
        let ours = matches!(kind, Kind::Ours | Kind::OursOpened);
        let near = (!ours).then(|| Near::new(&rig.outside));
        // A client's ports are used again at once: the kernel keeps them for a minute otherwise.
        for setting in ["net.ipv4.ip_local_port_range='2048 65000'", "net.ipv4.tcp_tw_reuse=1"] {
            match &near {
                Some(near) => near.sysctl(&rig.outside, setting),
                None => rig.sysctl_of_both(setting),
            }
        }
        let squid = matches!(kind, Kind::SquidSplice | Kind::SquidBump);
        if let Some(near) = near.as_ref().filter(|_| squid) {
            near.redirect(&rig.outside, 443, SQUID_PORT);
        }
        let peer = peer(rig, kind, folder);
        let process = peer.as_ref().map(|peer| peer.0.id()).or(ours.then(|| rig.program_id()));
        let (web, raw) = match kind {
            Kind::Direct | Kind::Ours | Kind::OursOpened => (WEB, RAW),
            Kind::SquidSplice | Kind::SquidBump => (WEB, RAW),
            _ => (PROXY, PROXY),
        };
        let authority = if kind.opens() { &rig.ca } else { &rig.outside.authority };
        let target = Target::new(web, raw, authority.roots());
        Self { rig, near, process, target, _peer: peer }
    }

    /// Runs clients.
    pub(crate) fn run<T: Send>(&self, work: impl Future<Output = io::Result<T>> + Send) -> T {
        let done = match &self.near {
            Some(near) => near.run(work),
            None => self.rig.guest(work),
        };
        done.unwrap_or_else(|error| panic!("a client failed: {error}"))
    }

    /// CPU time of it so far in milliseconds, of all threads and children.
    pub(crate) fn cpu_ms(&self) -> f64 {
        self.process.map(cpu_ms_of).unwrap_or_default()
    }

    /// Memory that is its own, in KiB.
    pub(crate) fn own_kib(&self) -> f64 {
        let of = |process: u32| -> f64 {
            let rollup = fs_err::read_to_string(format!("/proc/{process}/smaps_rollup"));
            let text = rollup.unwrap_or_default();
            let private = text.lines().filter(|line| line.starts_with("Private_"));
            private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).sum()
        };
        self.process.map(family).unwrap_or_default().into_iter().map(of).sum()
    }
}

/// CPU time of a process so far in milliseconds, of all threads and children.
fn cpu_ms_of(process: u32) -> f64 {
    let mut nanoseconds = 0.0;
    for process in family(process) {
        let Ok(tasks) = fs_err::read_dir(format!("/proc/{process}/task")) else { continue };
        for task in tasks.flatten() {
            let text = fs_err::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let first = text.split_whitespace().next().and_then(|it| it.parse::<f64>().ok());
            nanoseconds += first.unwrap_or(0.0);
        }
    }
    nanoseconds / 1e6
}

/// A process and its children: nginx and haproxy have workers, squid has helpers.
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

fn peer(rig: &Rig, kind: Kind, folder: &Path) -> Option<Peer> {
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs_err::write(&path, text).expect("a file of the peer's can be written");
        path.display().to_string()
    };
    let (port, program, arguments): (u16, &str, Vec<String>) = match kind {
        Kind::Direct | Kind::Ours | Kind::OursOpened => return None,
        Kind::Nginx | Kind::NginxLargeBuffers => {
            let buffer = if kind == Kind::Nginx { "16k" } else { "64k" };
            let configuration = write("nginx.conf", nginx(folder, buffer));
            let prefix = folder.display().to_string();
            (443, "nginx", vec!["-c".into(), configuration, "-p".into(), prefix])
        }
        Kind::HaproxyByName => {
            let configuration = write("haproxy.cfg", haproxy_by_name());
            (443, "haproxy", vec!["-db".into(), "-f".into(), configuration])
        }
        Kind::HaproxyOpened => {
            let leaf = write("leaf.pem", rig.ca.pair(&[WEB_NAME]));
            let web = write("web.pem", rig.outside.authority.pem());
            let configuration = write("opening.cfg", haproxy_opened(&leaf, &web));
            (443, "haproxy", vec!["-db".into(), "-f".into(), configuration])
        }
        Kind::SquidSplice | Kind::SquidBump => {
            let ca = write("ca.pem", format!("{}{}", rig.ca.pem(), rig.ca.key_pem()));
            let web = write("web.pem", rig.outside.authority.pem());
            let text = squid(folder, &ca, &web, kind == Kind::SquidBump);
            let configuration = write("squid.conf", text);
            (SQUID_PORT, "squid", vec!["-N".into(), "-f".into(), configuration])
        }
    };
    let output = fs_err::File::create(folder.join("output")).expect("a file for its output");
    let mut command = Command::new(program);
    command.args(&arguments).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::from(output.into_parts().0));
    let spawned = rig.in_outside(|| command.spawn());
    let peer = Peer(spawned.unwrap_or_else(|error| panic!("{program}: {error}")));
    rig::until("the peer listens", || {
        rig.in_outside(|| std::net::TcpStream::connect((PROXY, port)).is_ok())
    });
    Some(peer)
}

fn nginx(folder: &Path, buffer: &str) -> String {
    let pid = folder.join("nginx.pid").display().to_string();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so; worker_processes 1;
         worker_rlimit_nofile {DESCRIPTORS_MAX}; daemon off; pid {pid}; error_log stderr crit;
         events {{ worker_connections {DESCRIPTORS_MAX}; multi_accept on; }}
         stream {{ resolver {RESOLVER} ipv6=off valid=300s; proxy_buffer_size {buffer};
         server {{ listen {PROXY}:443 backlog=1024; ssl_preread on;
         proxy_pass $ssl_preread_server_name:443; proxy_timeout 1h; }} }}",
    )
}

fn haproxy_by_name() -> String {
    let raw: Ipv4Addr = RAW;
    format!(
        "global
 nbthread 1
 maxconn {CONNECTIONS_MAX}
 maxpipes 400
defaults
 mode tcp
 option splice-auto
 timeout connect 5s
 timeout client 1h
 timeout server 1h
frontend f
 bind {PROXY}:443
 tcp-request inspect-delay 5s
 tcp-request content accept if {{ req.ssl_hello_type 1 }}
 use_backend web if {{ req.ssl_sni -i {WEB_NAME} }}
 use_backend raw if {{ req.ssl_sni -i {RAW_NAME} }}
backend web
 server s {WEB}:443
backend raw
 server s {raw}:443
"
    )
}

/// A connection of its own for each client, as ours has it: what was opened for one is nobody else's.
fn haproxy_opened(leaf: &str, web: &str) -> String {
    format!(
        "global
 nbthread 1
 maxconn {CONNECTIONS_MAX}
 maxpipes 400
 ssl-default-bind-options no-tls-tickets
defaults
 mode http
 timeout connect 5s
 timeout client 1h
 timeout server 1h
 timeout http-keep-alive 1h
frontend f
 bind {PROXY}:443 ssl crt {leaf} alpn http/1.1
 http-request set-header Authorization \"Bearer x\"
 default_backend b
backend b
 http-reuse never
 server s {WEB}:443 ssl verify required ca-file {web} sni str({WEB_NAME}) verifyhost {WEB_NAME}
"
    )
}

fn squid(folder: &Path, ca: &str, web: &str, bump: bool) -> String {
    let known = folder.join("known");
    let pid = folder.join("squid.pid").display().to_string();
    let program = "/usr/lib/squid/security_file_certgen";
    // It works as a user of its own, with a database that it must be able to write.
    let prepare = format!(
        "rm -rf {0}; {program} -c -s {0} -M 4MB >/dev/null; chown -R proxy {0}; chmod 755 {1}",
        known.display(),
        folder.display()
    );
    let prepared = Command::new("sh").args(["-ec", &prepare]).status();
    assert!(prepared.is_ok_and(|status| status.success()), "{prepare}");
    let what = if bump { "bump" } else { "splice" };
    format!(
        "visible_hostname bench
pid_filename {pid}
access_log none
cache_log /dev/null
cache_store_log none
cache deny all
pinger_enable off
max_filedescriptors {DESCRIPTORS_MAX}
shutdown_lifetime 0 seconds
dns_nameservers {RESOLVER}
client_idle_pconn_timeout 1 hour
server_idle_pconn_timeout 1 hour
http_port {PROXY}:3128
https_port {SQUID_PORT} intercept ssl-bump tls-cert={ca} generate-host-certificates=on dynamic_cert_mem_cache_size=4MB
sslcrtd_program {program} -s {known} -M 4MB
sslcrtd_children 2 startup=1 idle=1
tls_outgoing_options cafile={web}
acl begun at_step SslBump1
ssl_bump peek begun
ssl_bump {what} all
request_header_add Authorization \"Bearer x\" all
http_access allow all
",
        known = known.display(),
    )
}
