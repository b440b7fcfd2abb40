//! Telling how far it is, a few times a second, until it is over.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use holdfast_wire::{
    convert::{Progress, Report},
    frame::{self, FrameError},
};

use crate::work::Counters;

/// Time between two reports. One is sent even if nothing has changed: a reader that is gone shows
/// only when it is written to.
const TICK: Duration = Duration::from_millis(300);

/// To whom.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reporter {
    /// The agent, on stdout.
    Frames,
    /// A person, on stderr.
    Lines,
}

/// The thread that reports. Nothing is reported any more once `stop` returns.
#[must_use]
pub(crate) struct Ticker {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Ticker {
    pub(crate) fn start(reporter: Reporter, counters: &Arc<Counters>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let counters = Arc::clone(counters);
        let thread = thread::spawn(move || {
            let mut last = Progress::default();
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let progress = counters.progress();
                let changed = progress != last;
                last = progress;
                if !reporter.report(&last, changed) {
                    counters.gone.store(true, Ordering::Relaxed);
                    return;
                }
            }
        });
        Self { stop, thread }
    }

    pub(crate) fn stop(self) {
        // Either may have ended already, when the reader was gone.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

impl Reporter {
    /// `false`: nobody listens.
    fn report(self, progress: &Progress, changed: bool) -> bool {
        match self {
            Self::Frames => send(&Report::Progress(progress.clone())).is_ok(),
            Self::Lines => {
                if changed {
                    // A terminal that cannot be written to is no reason to stop.
                    let _ = line(progress);
                }
                true
            }
        }
    }
}

/// Sends one frame now: frames hold no line ends, at which stdout would pass them on by itself.
pub(crate) fn send(report: &Report) -> Result<(), FrameError> {
    let mut stdout = io::stdout().lock();
    frame::write_frame(&mut stdout, report)?;
    stdout.flush().map_err(FrameError::Io)
}

fn line(progress: &Progress) -> io::Result<()> {
    const MIB: u64 = 1024 * 1024;
    let mut stderr = io::stderr().lock();
    // A person sees one line that changes; a log gets one line for each change.
    let (start, end) = if stderr.is_terminal() { ("\r", "") } else { ("", "\n") };
    let Progress { layers, layers_done, bytes, bytes_done } = progress;
    write!(
        stderr,
        "{start}layers {layers_done}/{layers}, {} of {} MiB{end}",
        bytes_done / MIB,
        bytes.div_ceil(MIB)
    )?;
    stderr.flush()
}
