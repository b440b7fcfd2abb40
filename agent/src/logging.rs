//! Where log records go: to journald with their fields under systemd, to stderr elsewhere. The last
//! lines are kept in memory for support bundles.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use log::{
    LevelFilter, Log, Metadata, Record,
    kv::{Error, Key, Value, VisitSource},
};
use systemd_journal_logger::{JournalLog, connected_to_journal};

/// Bytes of log lines that are kept: the last hour of a busy node.
const KEPT_BYTES_MAX: usize = 256 * 1024;

/// Bytes of one kept line; the rest of a longer one is cut.
const LINE_BYTES_MAX: usize = 1024;

/// Fields with what a guest wrote. They go to the journal, which stays on the node, and into no
/// bundle.
const OF_GUESTS: [&str; 2] = ["serial", "vmm"];

/// Lines kept by this process, the oldest first.
static KEPT: Mutex<Kept> = Mutex::new(Kept { lines: VecDeque::new(), bytes: 0 });

/// Installs the logger. `RUST_LOG` chooses what is seen on stderr, a level in `HOLDFAST_LOG` what
/// goes to journald.
pub fn install() -> anyhow::Result<()> {
    if connected_to_journal() {
        let journal = JournalLog::new()?.with_syslog_identifier("holdfastd".to_owned());
        let level = std::env::var("HOLDFAST_LOG").ok().and_then(|level| level.parse().ok());
        return install_over(Box::new(journal), level.unwrap_or(LevelFilter::Info));
    }
    let default = env_logger::Env::default().default_filter_or("info");
    let stderr = env_logger::Builder::from_env(default).build();
    let level = stderr.filter();
    install_over(Box::new(stderr), level)
}

/// Keeps what passes, and hands it on.
pub fn install_over(inner: Box<dyn Log>, level: LevelFilter) -> anyhow::Result<()> {
    log::set_boxed_logger(Box::new(Keeping { inner }))?;
    log::set_max_level(level);
    Ok(())
}

/// The lines kept, the oldest first.
pub(crate) fn kept() -> Vec<String> {
    lock().lines.iter().cloned().collect()
}

fn lock() -> MutexGuard<'static, Kept> {
    // A panic under the lock leaves at worst a wrong count of bytes.
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Keeping {
    inner: Box<dyn Log>,
}

impl Log for Keeping {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.inner.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.inner.enabled(record.metadata()) {
            lock().push(line(&Timestamp::now().to_string(), record));
            self.inner.log(record);
        }
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

struct Kept {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Kept {
    fn push(&mut self, line: String) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.bytes > KEPT_BYTES_MAX
            && let Some(oldest) = self.lines.pop_front()
        {
            self.bytes -= oldest.len();
        }
    }
}

/// Time, level, message and fields on one line.
fn line(time: &str, record: &Record<'_>) -> String {
    let mut text = format!("{time} {} {}", record.level(), record.args());
    // Writing into a string does not fail, and a field that cannot be shown is left out.
    let _ = record.key_values().visit(&mut Fields(&mut text));
    if text.len() > LINE_BYTES_MAX {
        text.truncate(text.floor_char_boundary(LINE_BYTES_MAX));
        // Half a secret would not be known as one.
        text.truncate(text.rfind(' ').unwrap_or(0));
    }
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

struct Fields<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        if !OF_GUESTS.contains(&key.as_str()) {
            write!(self.0, " {key}={value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    #[test]
    fn a_kept_line_has_every_field_but_what_a_guest_wrote_and_is_one_line() {
        let fields = [("id", "abc"), ("serial", "password=x"), ("error", "a\nb")];
        let record = Record::builder()
            .level(Level::Warn)
            .args(format_args!("sandbox failed"))
            .key_values(&fields)
            .build();
        assert_eq!(line("T", &record), "T WARN sandbox failed id=abc error=a b");
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_newest_stays() {
        let mut kept = Kept { lines: VecDeque::new(), bytes: 0 };
        for number in 0..1000 {
            kept.push(format!("{number} {}", "ä".repeat(LINE_BYTES_MAX / 2)));
        }
        assert!(kept.bytes <= KEPT_BYTES_MAX, "{}", kept.bytes);
        assert_eq!(kept.bytes, kept.lines.iter().map(String::len).sum::<usize>());
        assert!(kept.lines.back().unwrap().starts_with("999 "));
        let long = "ä".repeat(LINE_BYTES_MAX);
        let record = line("T", &Record::builder().args(format_args!("cut {long}")).build());
        assert_eq!(record, "T INFO cut");
    }
}
