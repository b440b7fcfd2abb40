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
use rustix::process::{Resource, getrlimit};

use self::fair::{Crowd, Fair, Wait};

/// Tries what a sandbox does to its neighbour, and first connections after an answer.
#[derive(Parser)]
struct Arguments {
    /// First connections right after the answer that told their address. 0: none.
    #[arg(long, default_value_t = 10_000)]
    trials: u32,
    /// Connections of the sandbox that takes all it can, or as many as there are descriptors for. 0:
    /// no neighbours are tried.
    #[arg(long, default_value_t = 10_000)]
    connections: u32,
    /// Rounds, each beside a busy sandbox and beside a hostile one.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each half of a round.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

/// The slowest hundredth beside a hostile sandbox, of that beside a busy one, at most: in CPU that
/// the process used meanwhile, since on a machine that others use time tells of them.
const RATIO_MAX: f64 = 2.0;

fn hundredth(mut times: Vec<f64>, which: usize) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() * which / 100).or(times.last()).copied().unwrap_or(f64::NAN)
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
    let time = Duration::from_secs(arguments.seconds);
    // Two descriptors each, in the process that is tried and in this one; and some for pipes.
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let fit = u32::try_from(descriptors.saturating_sub(2000) / 2).unwrap_or(u32::MAX);
    let connections = arguments.connections.min(fit);
    println!("connections_of_the_hostile: {connections}");
    // What it asks for beyond these it does not get, and no descriptors are used up by that.
    let fair = Fair::new(connections);
    let hostile = Crowd::Hostile(connections);
    // What, and of each round beside whom.
    let mut figures: Vec<(&str, [Vec<Wait>; 3])> =
        ["request", "connection", "name"].map(|what| (what, <[Vec<Wait>; 3]>::default())).into();
    for round in 0..arguments.rounds {
        for (at, crowd) in [Crowd::Nobody, Crowd::Busy, hostile].into_iter().enumerate() {
            eprintln!("-- round {} of {}: {crowd:?}", round + 1, arguments.rounds);
            let waits = fair.measure(crowd, time);
            let waits = [waits.requests, waits.connections, waits.names];
            for ((what, figures), waits) in figures.iter_mut().zip(waits) {
                let (p50, p99) = (of(&waits, 50), of(&waits, 99));
                eprintln!("   {what}, {} times: p50 {p50:?}, p99 {p99:?}", waits.len());
                figures[at].push(p99);
            }
        }
    }
    let mut good = true;
    for (what, [nobody, busy, hostile]) in figures {
        for (beside, waits) in [("nobody", &nobody), ("busy", &busy), ("hostile", &hostile)] {
            let Wait { time, cpu } = of(waits, 50);
            println!("{what}_p99_ms_beside_{beside}: {time:.3}");
            println!("{what}_p99_cpu_ms_beside_{beside}: {cpu:.3}");
        }
        let rounds = || hostile.iter().zip(&busy);
        let ratios = |of: fn(&Wait) -> f64| -> Vec<f64> {
            rounds().map(|(hostile, busy)| of(hostile) / of(busy)).collect()
        };
        let (time, cpu) = (ratios(|wait| wait.time), ratios(|wait| wait.cpu));
        println!("{what}_p99_ratio_hostile_to_busy: {:.3}", hundredth(time, 50));
        let ratio = hundredth(cpu, 50);
        println!("{what}_p99_cpu_ratio_hostile_to_busy: {ratio:.3}");
        good &= ratio <= RATIO_MAX;
    }
    good
}

fn of(waits: &[Wait], which: usize) -> Wait {
    let all = |of: fn(&Wait) -> f64| hundredth(waits.iter().map(of).collect(), which);
    Wait { time: all(|wait| wait.time), cpu: all(|wait| wait.cpu) }
}
