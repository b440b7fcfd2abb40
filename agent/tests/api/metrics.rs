//! `/metrics`, read as Prometheus reads it, and what the node says of itself and its host.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_api::{
    node::{HostCheck, NodeStatus, Verdict},
    path,
};
use holdfastd::metrics::{Kind, LIST, Values};
use reqwest::Method;

use crate::server::{Server, TOKEN, sandboxes};

/// One sample: name, labels, value.
type Sample = (String, BTreeMap<String, String>, f64);

/// A scrape, read strictly: anything that is not the text form 0.0.4 is a panic.
#[derive(Default)]
struct Scrape {
    helps: BTreeMap<String, String>,
    types: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

impl Scrape {
    fn read(text: &str) -> Self {
        assert!(text.ends_with('\n'));
        let mut scrape = Self::default();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect(line);
                assert!(scrape.helps.insert(name.into(), help.into()).is_none(), "{line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                assert!(scrape.types.insert(name.into(), kind.into()).is_none(), "{line}");
            } else {
                scrape.samples.push(sample(line));
            }
        }
        scrape
    }

    /// Samples of a metric, a histogram's parts among them.
    fn of(&self, metric: &str) -> Vec<&Sample> {
        let own = |name: &str| {
            let rest = name.strip_prefix(metric);
            rest.is_some_and(|rest| matches!(rest, "" | "_bucket" | "_sum" | "_count"))
        };
        self.samples.iter().filter(|(name, ..)| own(name)).collect()
    }

    fn value(&self, metric: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |(name, own, _): &&Sample| {
            name == metric && labels.iter().all(|(label, value)| own[*label] == *value)
        };
        self.samples.iter().find(fits).unwrap_or_else(|| panic!("no {metric} {labels:?}")).2
    }
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').expect(line);
    let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}').expect(line)),
        None => (series, ""),
    };
    let word = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    assert!(word(name), "{line}");
    let mut pairs = BTreeMap::new();
    let mut rest = labels;
    while !rest.is_empty() {
        let (label, tail) = rest.split_once("=\"").expect(line);
        let (value, tail) = tail.split_once('"').expect(line);
        assert!(word(label) && !value.contains('\\'), "{line}");
        assert!(pairs.insert(label.to_owned(), value.to_owned()).is_none(), "{line}");
        rest = tail.strip_prefix(',').unwrap_or(tail);
    }
    (name.to_owned(), pairs, value)
}

async fn scrape(server: &Server) -> Scrape {
    let answer = server.get(path::METRICS).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    Scrape::read(&answer.text)
}

#[tokio::test]
async fn every_metric_of_the_list_is_scraped_with_its_help_and_type_and_no_other() {
    let server = Server::start().await;
    server.get(path::NODE).await;
    let scrape = scrape(&server).await;
    let listed: BTreeSet<_> = LIST.iter().map(|metric| metric.name).collect();
    let scraped: BTreeSet<_> = scrape.types.keys().map(String::as_str).collect();
    assert_eq!(scraped, listed);
    for metric in LIST {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        assert_eq!(scrape.types[metric.name], kind, "{}", metric.name);
        assert_eq!(scrape.helps[metric.name], metric.help, "{}", metric.name);
        assert!(!scrape.of(metric.name).is_empty(), "{}", metric.name);
    }
}

#[tokio::test]
async fn no_label_takes_values_without_bound_and_none_names_a_sandbox() {
    let server = Server::start().await;
    let id = "abcdefghijklmnopqrst";
    for number in 0..50 {
        server.get(&format!("{}/{id}{number}", sandboxes())).await;
        server.get(&format!("/made-up/{number}")).await;
        let method = Method::from_bytes(format!("M{number}").as_bytes()).unwrap();
        server.request(method, path::NODE).send().await.unwrap();
        let other = server.open(Method::GET, &format!("/v1/made-up/{number}"));
        other.send().await.unwrap();
    }
    let scrape = scrape(&server).await;
    for metric in LIST {
        let mut values: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (_, labels, _) in scrape.of(metric.name) {
            for (label, value) in labels.iter().filter(|(label, _)| *label != "le") {
                values.entry(label).or_default().insert(value);
            }
        }
        let labels: Vec<&str> = metric.labels.iter().map(|label| label.name).collect();
        assert!(values.keys().all(|label| labels.contains(label)), "{}", metric.name);
        for label in metric.labels {
            let found = values.remove(label.name).unwrap_or_default();
            match label.values {
                Values::Of(known) => {
                    assert!(found.iter().all(|value| known.contains(value)), "{found:?}");
                }
                Values::AtMost(max) => assert!(found.len() <= max, "{}: {found:?}", metric.name),
            }
            assert!(!found.iter().any(|value| value.contains("abcdefgh")), "{found:?}");
        }
    }
    let series = scrape.of("holdfast_api_requests_total").len();
    assert!(series < 20, "{series} series");
}

#[tokio::test]
async fn calls_refusals_and_states_are_counted() {
    let server = Server::start().await;
    for _ in 0..3 {
        server.get(path::NODE).await;
    }
    let open = server.open(Method::GET, path::NODE).send().await.unwrap();
    assert_eq!(open.status(), 401);
    let scrape = scrape(&server).await;
    let calls = |route: &str, status: &str| {
        let labels = [("method", "GET"), ("route", route), ("status", status)];
        scrape.value("holdfast_api_requests_total", &labels)
    };
    assert_eq!((calls(path::NODE, "200"), calls("none", "401")), (3.0, 1.0));
    assert_eq!(scrape.value("holdfast_sandboxes", &[("state", "running")]), 0.0);
    assert_eq!(scrape.value("holdfast_admission_refusals_total", &[("short", "memory")]), 0.0);
    assert!(scrape.value("holdfast_memory_bytes", &[("what", "capacity")]) > 0.0);
    assert!(scrape.value("holdfast_agent_resident_bytes", &[]) > 0.0);
}

#[tokio::test]
async fn the_status_tells_what_there_is_and_that_nothing_was_refused() {
    let server = Server::start().await;
    let answer = server.get(path::NODE_STATUS).await.json();
    let status: NodeStatus = serde_json::from_value(answer).unwrap();
    assert!(status.memory_mib.capacity > 0.0 && status.memory_mib.reserved == 0.0, "{status:?}");
    assert_eq!((status.memory_factor, status.cpu_factor), (1.0, 4.0));
    assert_eq!(status.refusals, Default::default());
    assert_eq!(status.sandboxes, []);
}

#[tokio::test]
async fn the_doctor_names_every_check_and_a_remedy_for_each_that_is_not_well() {
    let server = Server::start().await;
    let answer = server.get(path::NODE_DOCTOR).await.json();
    let checks: Vec<HostCheck> = serde_json::from_value(answer).unwrap();
    let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "kvm",
            "landlock",
            "core dumps",
            "ksm",
            "mitigations",
            "smt",
            "swap",
            "cgroups",
            "disk traffic"
        ]
    );
    for check in &checks {
        assert_eq!(check.remedy.is_none(), check.verdict == Verdict::Ok, "{check:?}");
    }
    // The test's daemon has a folder that is in no cgroup file system.
    assert_eq!(checks[7].verdict, Verdict::Failed);
    assert!(!format!("{checks:?}").contains(TOKEN));
}
