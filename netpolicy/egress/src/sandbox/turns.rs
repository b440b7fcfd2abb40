//! Turns: what the tasks of one sandbox may run in one go. Whoever has used its turn up waits until
//! everybody else who is ready has had one, so that ten thousand connections of one sandbox are to
//! the others what one is.

use std::{
    cell::Cell,
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use pin_project_lite::pin_project;
use tokio::sync::Notify;

/// How long a turn is: some ten steps of a relay. What others wait for is this and one step more:
/// what can go on for longer asks [`is_over`] between its steps.
const TURN: Duration = Duration::from_micros(250);
/// What a task has at least, once it runs.
const TASK_TIME_MIN: Duration = Duration::from_micros(20);
/// A sandbox that was at rest for as long as it was at work has used up nothing: it never waits.
const REST_SHARE: u32 = 2;
/// Tasks woken when a turn begins. Each that ends wakes the next.
const WOKEN: usize = 2;

thread_local! {
    /// When the task that runs on this thread should let others run.
    static UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Whether the task that asks has had its time. A runtime lets it go on for a hundred reads and
/// more, each of which may be of 64 KiB.
pub(crate) fn is_over() -> bool {
    UNTIL.get().is_some_and(|until| Instant::now() >= until)
}

/// Lets others run if the task that waits for this has had its time.
pub(crate) async fn pause() {
    if is_over() {
        tokio::task::yield_now().await;
    }
}

/// The turns of one sandbox.
#[derive(Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    /// Tasks wait.
    crowded: AtomicBool,
    /// Nanoseconds used of this turn.
    used: AtomicU64,
    /// Somebody waits for the next turn.
    wanted: Notify,
}

#[derive(Default)]
struct State {
    /// When this turn began.
    begun: Option<Instant>,
    /// Who waits, the longest first.
    waiting: VecDeque<Waker>,
    /// Places given so far to those who wait, and how many of them were called.
    given: u64,
    called: u64,
}

pin_project! {
    /// A task that runs in the turns of its sandbox.
    pub(crate) struct InTurn<F> {
        turns: Arc<Turns>,
        // Its place in the queue. 0: it has none.
        place: u64,
        #[pin]
        task: F,
    }
}

impl Turns {
    pub(crate) fn task<F: Future>(self: &Arc<Self>, task: F) -> InTurn<F> {
        InTurn { turns: self.clone(), place: 0, task }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one turn after the other for as long as somebody waits.
    pub(crate) async fn keep(self: Arc<Self>) {
        loop {
            self.wanted.notified().await;
            while self.crowded.load(Relaxed) {
                // Behind all who are ready, and all who became so meanwhile.
                tokio::task::yield_now().await;
                let mut state = self.state();
                self.begin(&mut state, Instant::now());
                for _ in 0..WOKEN {
                    self.call(&mut state);
                }
            }
        }
    }

    fn begin(&self, state: &mut State, now: Instant) {
        self.used.store(0, Relaxed);
        state.begun = Some(now);
    }

    /// Wakes who waits the longest.
    fn call(&self, state: &mut State) {
        if let Some(waker) = state.waiting.pop_front() {
            state.called += 1;
            waker.wake();
        }
        self.crowded.store(!state.waiting.is_empty(), Relaxed);
    }

    /// What is left of this turn.
    fn left(&self) -> Duration {
        TURN.saturating_sub(Duration::from_nanos(self.used.load(Relaxed)))
    }

    fn is_used_up(&self) -> bool {
        u128::from(self.used.load(Relaxed)) >= TURN.as_nanos()
    }

    /// Whether a task may run now. It has a place in the queue otherwise.
    fn admit(&self, place: &mut u64, now: Instant, waker: &Waker) -> bool {
        if !self.crowded.load(Relaxed) && !self.is_used_up() {
            *place = 0;
            return true;
        }
        let mut state = self.state();
        let rested = |begun| now.saturating_duration_since(begun) >= TURN * REST_SHARE;
        if state.waiting.is_empty() && state.begun.is_none_or(rested) {
            self.begin(&mut state, now);
        }
        let called = *place > 0 && *place <= state.called;
        if !self.is_used_up() && (called || state.waiting.is_empty()) {
            *place = 0;
            return true;
        }
        if *place == 0 || called {
            state.waiting.push_back(waker.clone());
            state.given += 1;
            *place = state.given;
            self.crowded.store(true, Relaxed);
            self.wanted.notify_one();
        }
        false
    }

    /// A task has run for so long.
    fn ran(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.used.fetch_add(time, Relaxed);
        if self.crowded.load(Relaxed) && !self.is_used_up() {
            self.call(&mut self.state());
        }
    }
}

impl<F: Future> Future for InTurn<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let start = Instant::now();
        if !this.turns.admit(this.place, start, cx.waker()) {
            return Poll::Pending;
        }
        let before = UNTIL.replace(Some(start + this.turns.left().max(TASK_TIME_MIN)));
        let polled = this.task.poll(cx);
        UNTIL.set(before);
        this.turns.ran(start.elapsed());
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex},
        task::Wake,
    };

    use super::*;

    struct Nobody;

    impl Wake for Nobody {
        fn wake(self: Arc<Self>) {}
    }

    fn waker() -> Waker {
        Arc::new(Nobody).into()
    }

    #[test]
    fn who_has_used_its_turn_up_waits_and_who_was_at_rest_does_not() {
        let (turns, now, mut place) = (Turns::default(), Instant::now(), 0);
        assert!(turns.admit(&mut place, now, &waker()));
        turns.ran(TURN);
        assert!(turns.admit(&mut place, now, &waker()), "its first turn had not begun yet");
        turns.ran(TURN);
        assert!(!turns.admit(&mut place, now, &waker()));
        assert_eq!((place, turns.state().waiting.len()), (1, 1));
        assert!(!turns.admit(&mut place, now, &waker()), "woken by something else");
        assert_eq!((place, turns.state().waiting.len()), (1, 1), "it has its place already");

        let rested = Turns::default();
        rested.begin(&mut rested.state(), now);
        rested.ran(TURN);
        assert!(rested.admit(&mut 0, now + TURN * REST_SHARE, &waker()));
    }

    #[test]
    fn those_who_wait_are_called_in_order_and_nobody_passes_them() {
        let (turns, now) = (Turns::default(), Instant::now());
        turns.begin(&mut turns.state(), now);
        turns.ran(TURN);
        let mut places = [0; 3];
        for place in &mut places {
            assert!(!turns.admit(place, now, &waker()));
        }
        let mut state = turns.state();
        turns.begin(&mut state, now);
        turns.call(&mut state);
        drop(state);
        assert!(!turns.admit(&mut 0, now, &waker()), "a new one");
        assert!(!turns.admit(&mut places[1], now, &waker()), "one that was not called yet");
        assert!(turns.admit(&mut places[0], now, &waker()));
        assert_eq!(places[0], 0);
    }

    #[test]
    fn f14_a_task_that_never_has_to_wait_lets_others_run_when_its_turn_is_over() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (mut longest, mut rounds) = (Duration::ZERO, 0);
        runtime.block_on(async {
            let turns = Arc::new(Turns::default());
            tokio::spawn(turns.clone().keep());
            let busy = tokio::spawn(turns.task(async {
                for _ in 0..10_000 {
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_micros(5) {}
                    pause().await;
                }
            }));
            while !busy.is_finished() {
                let start = Instant::now();
                tokio::task::yield_now().await;
                longest = longest.max(start.elapsed());
                rounds += 1;
            }
            busy.await.unwrap();
        });
        // It takes 50 ms, and took all of them at once.
        assert!(rounds > 20, "{rounds} times in between, the longest wait {longest:?}");
    }

    #[test]
    fn f14_a_thousand_busy_tasks_of_one_sandbox_do_not_keep_another_waiting() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let begun = Instant::now();
        runtime.block_on(async {
            let (crowd, other) = (Arc::new(Turns::default()), Arc::new(Turns::default()));
            for turns in [&crowd, &other] {
                tokio::spawn(turns.clone().keep());
            }
            let spin = |steps: u32| async move {
                for _ in 0..steps {
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_micros(20) {}
                    tokio::task::yield_now().await;
                }
            };
            let mut all = Vec::new();
            for _ in 0..1000 {
                let order = order.clone();
                all.push(tokio::spawn(crowd.task(async move {
                    spin(10).await;
                    order.lock().unwrap().push("crowd");
                })));
            }
            let told = order.clone();
            all.push(tokio::spawn(other.task(async move {
                spin(10).await;
                told.lock().unwrap().push("other");
            })));
            for task in all {
                task.await.unwrap();
            }
        });
        // The crowd takes 200 ms; without turns the other would be done when it is.
        let order = order.lock().unwrap();
        let at = order.iter().position(|who| *who == "other").unwrap();
        assert!(at < 100, "after {at} of the crowd, all in {:?}", begun.elapsed());
        assert_eq!(order.len(), 1001, "nobody is forgotten");
    }
}
