//! The egress process under more than anybody should ask of it. Needs root; `scripts/soak egress`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

// The attacks use what this does not.
#[allow(dead_code, unused_imports)]
#[path = "../../tests/attacks/rig/mod.rs"]
mod rig;
#[path = "../../tests/attacks/sys.rs"]
mod sys;

mod fair;
mod first;

use std::{process::ExitCode, time::Duration};

use clap::Parser;

use self::fair::{Crowd, Fair};

/// Tries what a sandbox does to its neighbour, and first connections after an answer.
#[derive(Parser)]
struct Arguments {
    /// First connections right after the answer that told their address. 0: none.
    #[arg(long, default_value_t = 10_000)]
    trials: u32,
    /// Connections of the sandbox that takes all it can. 0: no neighbours are tried.
    #[arg(long, default_value_t = 10_000)]
    connections: u32,
    /// Rounds, each beside a busy sandbox and beside a hostile one.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each half of a round.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

/// The slowest hundredth beside a hostile sandbox, of that beside a busy one, at most.
const RATIO_MAX: f64 = 2.0;

fn hundredth(mut times: Vec<f64>, which: usize) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() * which / 100).or(times.last()).copied().unwrap_or(f64::NAN)
}

fn median(values: &[f64]) -> f64 {
    hundredth(values.to_vec(), 50)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut good = true;
    if arguments.trials > 0 {
        let mut refused = 0;
        for threads in [1, 2] {
            refused += first::trials(arguments.trials / 2, threads);
        }
        println!("first_connections: {}", arguments.trials);
        println!("first_connections_refused: {refused}");
        good &= refused == 0;
    }
    if arguments.connections > 0 {
        good &= neighbours(&arguments);
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn neighbours(arguments: &Arguments) -> bool {
    let fair = Fair::new();
    let time = Duration::from_secs(arguments.seconds);
    let hostile = Crowd::Hostile(arguments.connections);
    // What, and of each round beside whom.
    let mut figures: Vec<(&str, [Vec<f64>; 3])> =
        ["request", "connection", "name"].map(|what| (what, <[Vec<f64>; 3]>::default())).into();
    for round in 0..arguments.rounds {
        for (at, crowd) in [Crowd::Nobody, Crowd::Busy, hostile].into_iter().enumerate() {
            eprintln!("-- round {} of {}: {crowd:?}", round + 1, arguments.rounds);
            let waits = fair.measure(crowd, time);
            let waits = [waits.requests, waits.connections, waits.names];
            for ((what, figures), waits) in figures.iter_mut().zip(waits) {
                let (p50, p99) = (hundredth(waits.clone(), 50), hundredth(waits, 99));
                eprintln!("   {what}: p50 {p50:.3} ms, p99 {p99:.3} ms");
                figures[at].push(p99);
            }
        }
    }
    let mut good = true;
    for (what, [nobody, busy, hostile]) in figures {
        for (beside, times) in [("nobody", &nobody), ("busy", &busy), ("hostile", &hostile)] {
            println!("{what}_p99_ms_beside_{beside}: {:.3}", median(times));
        }
        let ratios: Vec<_> = hostile.iter().zip(&busy).map(|(it, busy)| it / busy).collect();
        let ratio = median(&ratios);
        println!("{what}_p99_ratio_hostile_to_busy: {ratio:.3}");
        good &= ratio <= RATIO_MAX;
    }
    good
}
