//! The metrics of the node: the list of them, and the doors by which the parts count.
//!
//! No label names a sandbox, group, image or client: those come and go, and every one would be a
//! series for ever. What each sandbox uses is in `holdfast node status`.

mod events;
mod list;
mod now;

use std::{collections::BTreeMap, time::Duration};

use prometheus::{
    Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder,
};

pub use events::{Adoption, End};
use list::{BUILD, known_labels};
pub use list::{Kind, LIST, Label, Metric, Values};
pub use now::Now;

/// The form of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Seconds; from a hot restore to a conversion of gigabytes.
const BUCKETS: [f64; 14] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 600.0];

/// The metrics of one daemon.
pub struct Metrics {
    registry: Registry,
    counters: BTreeMap<&'static str, IntCounterVec>,
    gauges: BTreeMap<&'static str, GaugeVec>,
    histograms: BTreeMap<&'static str, HistogramVec>,
}

impl Metrics {
    /// Every metric of [`LIST`], the ones with known labels at zero.
    pub fn new() -> Result<Self, prometheus::Error> {
        let mut metrics = Self {
            registry: Registry::new(),
            counters: BTreeMap::new(),
            gauges: BTreeMap::new(),
            histograms: BTreeMap::new(),
        };
        for metric in LIST {
            metrics.register(metric)?;
        }
        metrics.set(&BUILD, &[env!("CARGO_PKG_VERSION")], 1.0);
        Ok(metrics)
    }

    fn register(&mut self, metric: &Metric) -> Result<(), prometheus::Error> {
        let names: Vec<&str> = metric.labels.iter().map(|label| label.name).collect();
        let known = known_labels(metric.labels);
        match metric.kind {
            Kind::Counter => {
                let vec = IntCounterVec::new(Opts::new(metric.name, metric.help), &names)?;
                known.iter().for_each(|values| drop(vec.with_label_values(values)));
                self.registry.register(Box::new(vec.clone()))?;
                self.counters.insert(metric.name, vec);
            }
            Kind::Gauge => {
                let vec = GaugeVec::new(Opts::new(metric.name, metric.help), &names)?;
                known.iter().for_each(|values| drop(vec.with_label_values(values)));
                self.registry.register(Box::new(vec.clone()))?;
                self.gauges.insert(metric.name, vec);
            }
            Kind::Histogram => {
                let options =
                    HistogramOpts::new(metric.name, metric.help).buckets(BUCKETS.to_vec());
                let vec = HistogramVec::new(options, &names)?;
                known.iter().for_each(|values| drop(vec.with_label_values(values)));
                self.registry.register(Box::new(vec.clone()))?;
                self.histograms.insert(metric.name, vec);
            }
        }
        Ok(())
    }

    /// Everything, in Prometheus's text form 0.0.4.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }

    fn add(&self, metric: &Metric, labels: &[&str], count: u64) {
        if let Some(vec) = self.counters.get(metric.name) {
            vec.with_label_values(labels).inc_by(count);
        }
    }

    /// Brings a counter up to what another part has counted. One caller at a time.
    fn raise(&self, metric: &Metric, labels: &[&str], total: u64) {
        if let Some(vec) = self.counters.get(metric.name) {
            let counter = vec.with_label_values(labels);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    fn set(&self, metric: &Metric, labels: &[&str], value: f64) {
        if let Some(vec) = self.gauges.get(metric.name) {
            vec.with_label_values(labels).set(value);
        }
    }

    fn observe(&self, metric: &Metric, labels: &[&str], took: Duration) {
        if let Some(vec) = self.histograms.get(metric.name) {
            vec.with_label_values(labels).observe(took.as_secs_f64());
        }
    }
}

/// Exact up to 2^53, which no count here reaches.
#[expect(clippy::cast_precision_loss, reason = "counts and bytes far below 2^53")]
fn as_f64(number: u64) -> f64 {
    number as f64
}
