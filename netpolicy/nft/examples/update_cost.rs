//! How long a change of one sandbox's policy takes in nftables, beside how many others there are:
//! `scripts/bench nft` runs this in a network namespace of its own with the host's ruleset.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use holdfast_netpolicy::{Byway, Passing, Policy};
use holdfast_nft::{BywayNumber, Nft};

/// Changes that are measured.
const CHANGES: usize = 300;

/// A policy with so many rules, each for two ports of a range of its own.
fn policy(rules: usize, salt: usize) -> Policy {
    let rule = |n: usize| {
        let (a, b) = ((n + salt) % 200 + 1, n % 250);
        format!(
            r#"{{"cidr":"9.{a}.{b}.0/24","protocol":"udp","ports":[53,{}],"action":"Allow"}}"#,
            1000 + n
        )
    };
    let rules: Vec<String> = (0..rules).map(rule).collect();
    let text = format!(r#"{{"defaultAction":"Deny","cidrRules":[{}]}}"#, rules.join(","));
    Policy::parse(text.as_bytes()).expect("it is a policy")
}

fn put(nft: &Nft, number: u16, policy: &Policy) -> Duration {
    let number = BywayNumber::new(number).expect("a number of a way");
    let byway = Byway::of(policy, Passing::Udp).expect("it needs a way");
    let begun = Instant::now();
    nft.put_byway(number, &byway, &[]).expect("the kernel takes it");
    begun.elapsed()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number =
        |usual: usize| arguments.next().map_or(usual, |text| text.parse().expect("a number"));
    let (others, rules) = (number(1000), number(4));
    let nft = Nft::open().expect("nftables");
    let policies: Vec<Policy> = (0..2).map(|salt| policy(rules, salt)).collect();
    let mut made = Duration::ZERO;
    for other in 1..=others {
        made += put(&nft, u16::try_from(other).expect("few"), &policies[other % 2]);
    }
    let mut took: Vec<Duration> = (0..CHANGES)
        .map(|round| {
            let which = u16::try_from(round * 7 % others + 1).expect("few");
            put(&nft, which, &policies[(round + 1) % 2])
        })
        .collect();
    took.sort_unstable();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let mut out = std::io::stdout().lock();
    let at = |part: f64| {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        let index = (part * (took.len() - 1) as f64) as usize;
        ms(took[index])
    };
    writeln!(
        out,
        "update_ms_p50: {:.3}\nupdate_ms_p99: {:.3}\nupdate_ms_max: {:.3}",
        at(0.5),
        at(0.99),
        at(1.0)
    )
    .and_then(|()| writeln!(out, "make_ms_mean: {:.3}", ms(made) / others as f64))
    .expect("stdout");
}
