//! Where log records go: to journald with their fields under systemd, to stderr elsewhere.

use log::LevelFilter;
use systemd_journal_logger::{JournalLog, connected_to_journal};

/// Installs the logger. `RUST_LOG` chooses what is seen on stderr, a level in `HOLDFAST_LOG` what
/// goes to journald.
pub fn install() -> anyhow::Result<()> {
    if connected_to_journal() {
        JournalLog::new()?.with_syslog_identifier("holdfastd".to_owned()).install()?;
        let level = std::env::var("HOLDFAST_LOG").ok().and_then(|level| level.parse().ok());
        log::set_max_level(level.unwrap_or(LevelFilter::Info));
        return Ok(());
    }
    let default = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(default).try_init()?;
    Ok(())
}
