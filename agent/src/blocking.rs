//! The one door by which disk and CPU work leaves the async threads.

use tokio::task::spawn_blocking;

/// Does the work on a thread that may block. A panic of the work is a panic here.
pub(crate) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down: nobody is left to answer to.
            Err(_) => std::future::pending().await,
        },
    }
}
