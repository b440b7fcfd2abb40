//! What connections cost the process in the middle: ours beside nginx, haproxy and squid, on the
//! same machine in the same run. CPU and memory are those of the process itself, as the kernel
//! counts them; times are of the clients. Needs root; `scripts/bench egress` brings the peers.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::cast_precision_loss)]

// The attacks use what this does not.
#[allow(dead_code, unused_imports)]
#[path = "../../tests/attacks/rig/mod.rs"]
mod rig;
#[path = "../../tests/attacks/sys.rs"]
mod sys;

mod change;
mod load;
mod middle;
mod origin;

use std::{collections::BTreeMap, io};

use clap::Parser;

use self::{
    load::Times,
    middle::{Kind, Middle},
};
use rig::Rig;

const BY_NAME: &str = r#"{"defaultAction": "Deny", "trafficInspection": "Partial", "hostRules": [
    {"pattern": "other.test", "action": "Allow"}, {"pattern": "origin.test", "action": "Allow"},
    {"pattern": "raw.test", "action": "Allow"}]}"#;
const OPENED: &str = r#"{"defaultAction": "Deny", "trafficInspection": "Full", "rules": [
    {"match": {"host": "other.test"}, "action": {"type": "Allow"}},
    {"match": {"host": "origin.test"}, "action": {"type": "Transform", "headers": [
        {"operation": "Set", "name": "Authorization",
         "valueRef": {"secretRef": {"secretId": "token", "format": "Bearer {value}"}}}]}}]}"#;

/// Measures what stands between client and server, round by round.
#[derive(Parser)]
struct Arguments {
    /// Little of everything, twice.
    #[arg(long)]
    small: bool,
    /// Rounds; each starts everything anew, and every other one in reverse order.
    #[arg(long)]
    rounds: Option<usize>,
    /// Only what has one of these names.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these of: connections, requests, relay, idle, change.
    #[arg(long, value_delimiter = ',')]
    parts: Vec<String>,
}

struct Amounts {
    connections: u32,
    /// Requests of one connection alone, and of each of many.
    requests: [u32; 2],
    relay_bytes: usize,
    /// Idle connections at which memory is read.
    idle: [u32; 2],
    changes: u32,
}

/// Connections side by side, where it is not one.
const MANY: u32 = 32;
/// Idle connections that are made by one run of clients: nothing in the rig may take long.
const IDLE_PIECE: u32 = 500;

type Figures = BTreeMap<(&'static str, String), Vec<f64>>;

struct Round<'a> {
    arguments: &'a Arguments,
    amounts: &'a Amounts,
    figures: &'a mut Figures,
    kind: Kind,
}

impl Round<'_> {
    fn wanted(&self, part: &str) -> bool {
        // The second nginx is there for its buffers.
        let all = self.kind != Kind::NginxLargeBuffers || part == "relay";
        all && (self.arguments.parts.is_empty() || self.arguments.parts.iter().any(|it| it == part))
    }

    fn note(&mut self, what: impl Into<String>, value: f64) {
        let what = what.into();
        eprintln!("   {what}: {value:.3}");
        self.figures.entry((self.kind.name(), what)).or_default().push(value);
    }

    fn measure(&mut self, middle: &Middle<'_>) {
        let counted = self.kind != Kind::Direct;
        middle.run(load::connections(middle.target.clone(), 20));
        if counted && self.wanted("idle") {
            self.idle(middle);
        }
        if self.wanted("connections") {
            let count = self.amounts.connections;
            let before = middle.cpu_ms();
            let times = Times::of(middle.run(load::connections(middle.target.clone(), count)));
            if counted {
                self.note("cpu_ms_per_connection", (middle.cpu_ms() - before) / f64::from(count));
            }
            self.note("connection_ms_p50", times.p50);
            self.note("connection_ms_p99", times.p99);
        }
        if self.wanted("requests") {
            for (side_by_side, each) in [1, MANY].into_iter().zip(self.amounts.requests) {
                let before = middle.cpu_ms();
                let target = middle.target.clone();
                let (times, seconds) = middle.run(load::requests(target, side_by_side, each));
                let (count, times) = (times.len() as f64, Times::of(times));
                self.note(format!("requests_per_s_at_{side_by_side}"), count / seconds);
                self.note(format!("request_ms_p50_at_{side_by_side}"), times.p50);
                self.note(format!("request_ms_p99_at_{side_by_side}"), times.p99);
                if counted {
                    let cost = (middle.cpu_ms() - before) / count;
                    self.note(format!("cpu_ms_per_request_at_{side_by_side}"), cost);
                }
            }
        }
        if self.wanted("relay") {
            for side_by_side in [1, MANY] {
                let each = self.amounts.relay_bytes / side_by_side as usize;
                let before = middle.cpu_ms();
                let target = middle.target.clone();
                let opened = self.kind.opens();
                let seconds = middle.run(load::relay(target, opened, side_by_side, each));
                let gb = (each * side_by_side as usize) as f64 / 1e9;
                self.note(format!("gbit_per_s_at_{side_by_side}"), gb * 8.0 / seconds);
                if counted {
                    let cost = (middle.cpu_ms() - before) / 1e3 / gb;
                    self.note(format!("relay_cpu_s_per_gb_at_{side_by_side}"), cost);
                }
            }
        }
    }

    fn idle(&mut self, middle: &Middle<'_>) {
        let before = middle.own_kib();
        let mut held = Vec::new();
        for count in self.amounts.idle {
            let so_far = |held: &Vec<load::Idle>| u32::try_from(held.len()).unwrap_or(u32::MAX);
            while so_far(&held) < count {
                let more = IDLE_PIECE.min(count - so_far(&held));
                let target = middle.target.clone();
                held.extend(middle.run(load::idle(target, self.kind.opens(), more)));
            }
            let kib = (middle.own_kib() - before) / f64::from(count);
            self.note(format!("idle_kib_at_{count}"), kib);
        }
        drop(held);
    }
}

/// Median, least and most.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let median = match values.len() {
        0 => f64::NAN,
        count if count % 2 == 0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    };
    let [least, most] = [values.first(), values.last()].map(|it| it.copied().unwrap_or(f64::NAN));
    (median, least, most)
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let amounts = if arguments.small {
        Amounts {
            connections: 100,
            requests: [300, 30],
            relay_bytes: 64 << 20,
            idle: [100, 500],
            changes: 10,
        }
    } else {
        Amounts {
            connections: 1000,
            requests: [2000, 200],
            relay_bytes: 1 << 30,
            idle: [1000, 9000],
            changes: 50,
        }
    };
    let rounds = arguments.rounds.unwrap_or(if arguments.small { 2 } else { 5 });
    let folder = tempfile::tempdir()?;
    let mut figures = Figures::new();
    for round in 0..rounds {
        let (by_name, opened) = (Rig::new(BY_NAME), Rig::new(OPENED));
        for rig in [&by_name, &opened] {
            origin::start(&rig.outside);
        }
        let mut kinds = Kind::ALL.to_vec();
        if round % 2 == 1 {
            kinds.reverse();
        }
        let only = &arguments.only;
        kinds.retain(|kind| only.is_empty() || only.iter().any(|it| it == kind.name()));
        for kind in kinds {
            eprintln!("-- round {} of {rounds}: {}", round + 1, kind.name());
            let rig = if kind.opens() { &opened } else { &by_name };
            let middle = Middle::new(rig, kind, folder.path());
            let (arguments, amounts, figures) = (&arguments, &amounts, &mut figures);
            Round { arguments, amounts, figures, kind }.measure(&middle);
        }
        if arguments.parts.is_empty() || arguments.parts.iter().any(|it| it == "change") {
            change::measure(&by_name, amounts.changes, |what, value| {
                figures.entry(("change", what.to_owned())).or_default().push(value);
            });
        }
    }
    print(&figures);
    Ok(())
}

fn print(figures: &Figures) {
    for ((name, what), values) in figures {
        let (median, least, most) = spread(values);
        println!("{name}_{what}: {median:.3} ({least:.3} to {most:.3}, {} runs)", values.len());
    }
    let of = |name: &'static str, what: &str| figures.get(&(name, what.to_owned()));
    // Figures of one round were taken under the same load of the machine: they are compared first,
    // and the median is taken of the ratios.
    let ratio = |label: &str, ours: Option<&Vec<f64>>, peer: Option<&Vec<f64>>| {
        let (Some(ours), Some(peer)) = (ours, peer) else { return };
        let ratios: Vec<_> = ours.iter().zip(peer).map(|(ours, peer)| ours / peer).collect();
        let (median, least, most) = spread(&ratios);
        println!("{label}: {median:.3} ({least:.3} to {most:.3})");
    };
    let cpu = "cpu_ms_per_connection";
    for peer in ["nginx", "haproxy", "squid_splice"] {
        ratio(&format!("ratio_connection_cpu_to_{peer}"), of("ours", cpu), of(peer, cpu));
    }
    for at in ["1", "32"] {
        let what = format!("relay_cpu_s_per_gb_at_{at}");
        for peer in ["nginx", "nginx_64k", "haproxy", "squid_splice"] {
            let label = format!("ratio_relay_cpu_to_{peer}_at_{at}");
            ratio(&label, of("ours", &what), of(peer, &what));
        }
    }
    for peer in ["haproxy_opened", "squid_bump"] {
        let label = format!("ratio_opened_connection_cpu_to_{peer}");
        ratio(&label, of("ours_opened", cpu), of(peer, cpu));
    }
    for kind in Kind::ALL {
        for at in ["1", "32"] {
            let what = format!("requests_per_s_at_{at}");
            let label = format!("ratio_{}_{what}_to_direct", kind.name());
            ratio(&label, of(kind.name(), &what), of("direct", &what));
        }
        for what in ["request_ms_p50_at_1", "request_ms_p99_at_1"] {
            let (Some(own), Some(direct)) = (of(kind.name(), what), of("direct", what)) else {
                continue;
            };
            let added: Vec<_> = own.iter().zip(direct).map(|(own, none)| own - none).collect();
            let (median, least, most) = spread(&added);
            println!("added_{}_{what}: {median:.3} ({least:.3} to {most:.3})", kind.name());
        }
    }
}
