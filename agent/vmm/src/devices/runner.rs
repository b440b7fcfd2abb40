//! The thread of one device: waits for kicks, for orders and for the device's own fds, and lets the
//! worker handle one bounded batch at a time. The worker owns the queues while the device runs;
//! everybody else sends it orders.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use holdfast_wire::vmm::Exit;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    interrupt::Interrupt,
    queue::{Broken, Progress, Ring},
    saved::{Differs, RunState, Unfit, WorkerState},
};
use crate::{
    event::{Event, EventSender},
    limits::threads::{DEVICE_STACK_BYTES, EVENTS_PER_TURN, STOPS_REPORTED_MAX},
    seccomp::{self, ThreadKind},
    vm::Memory,
};

/// Tokens of the thread's own fds. Workers use numbers below [`Self::OWN`].
struct Token;

impl Token {
    const OWN: u64 = 1 << 63;
    const ORDERS: u64 = Self::OWN;
    const KICKS: u64 = Self::OWN + 1;
}

/// What a device does on its thread.
pub(super) trait Worker: Send {
    /// What its thread may ask of the kernel.
    fn thread_kind(&self) -> ThreadKind;

    /// Adds the fds of its own, each with a token below 2^63.
    fn watch(&mut self, _epoll: &Arc<Epoll>) -> io::Result<()> {
        Ok(())
    }

    /// The driver has started the device, and agreed on `features`.
    fn start(&mut self, _features: u64) -> Result<(), Broken> {
        Ok(())
    }

    /// An fd of its own is ready. Also called while paused: it notes that, and acts in `work`.
    fn ready(&mut self, _token: u64, _events: EventSet) {}

    /// Handles a bounded batch of whatever there is to do.
    fn work(
        &mut self,
        rings: &mut [Ring],
        memory: &Memory,
        now: Instant,
    ) -> Result<Progress, Broken>;

    /// The driver reset the device, or broke it: forget what was going on.
    fn reset(&mut self) {}

    /// What a snapshot keeps of it beside its queues; called while paused.
    fn save(&self) -> WorkerState;

    /// Takes up what was saved, before [`Self::start`].
    fn restore(&mut self, state: WorkerState) -> Result<(), Differs>;
}

enum Order {
    Start(Result<Started, Broken>),
    Reset(SyncSender<()>),
    Pause(SyncSender<()>),
    Save(SyncSender<RunState>),
    Restore(Box<Restored>, SyncSender<Result<(), Refusal>>),
    Resume,
    End,
}

/// What a device goes on with.
struct Restored {
    worker: WorkerState,
    /// `None`: it was not running.
    started: Option<Started>,
}

/// Why a device does not go on with what it was given.
enum Refusal {
    Differs(Differs),
    Broken(Broken),
}

/// What the driver set up before it started the device.
pub(super) struct Started {
    pub(super) rings: Vec<Ring>,
    /// Agreed on.
    pub(super) features: u64,
}

/// The end of the thread that others hold. Dropping it ends the thread.
pub(super) struct Runner {
    orders: Sender<Order>,
    bell: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread needs beside its worker.
pub(super) struct Setting {
    pub(super) name: String,
    pub(super) kicks: Vec<Arc<EventFd>>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) memory: Memory,
    pub(super) events: EventSender,
}

impl Runner {
    pub(super) fn spawn(setting: Setting, mut worker: Box<dyn Worker>) -> io::Result<Self> {
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let epoll = Arc::new(Epoll::new()?);
        let add =
            |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
        add(bell.as_raw_fd(), Token::ORDERS)?;
        for (token, kick) in (Token::KICKS..).zip(&setting.kicks) {
            add(kick.as_raw_fd(), token)?;
        }
        worker.watch(&epoll)?;
        let (sender, orders) = mpsc::channel();
        let name = setting.name.clone();
        let inside = Inside {
            setting,
            worker,
            epoll,
            orders,
            bell: Arc::clone(&bell),
            rings: Vec::new(),
            running: false,
            paused: false,
            stops: 0,
        };
        let builder = thread::Builder::new().name(name).stack_size(DEVICE_STACK_BYTES);
        let thread = builder.spawn(move || inside.run())?;
        Ok(Self { orders: sender, bell, thread: Some(thread) })
    }

    /// Hands the queues over, and the worker looks at them at once; or stops the device for how
    /// they were set up.
    pub(super) fn start(&self, started: Result<Started, Broken>) {
        self.order(Order::Start(started));
    }

    /// On return its thread is under its filter. Nothing has started the device yet.
    pub(super) fn await_thread(&self) {
        // It follows orders from then on, and of this one there is nothing to do.
        self.order_and_wait(Order::Reset);
    }

    /// Takes the queues away. On return the device touches guest memory no more.
    pub(super) fn reset(&self) {
        self.order_and_wait(Order::Reset);
    }

    /// On return nothing is in flight and nothing new is begun.
    pub(super) fn pause(&self) {
        self.order_and_wait(Order::Pause);
    }

    pub(super) fn resume(&self) {
        self.order(Order::Resume);
    }

    /// What a snapshot keeps; the device must be paused. `None`: its thread has ended.
    pub(super) fn save(&self) -> Option<RunState> {
        let (told, wait) = mpsc::sync_channel(1);
        self.order(Order::Save(told));
        wait.recv().ok()
    }

    /// Takes up what was saved; the device must be paused. `name` is for the error.
    pub(super) fn restore(
        &self,
        started: Option<Started>,
        worker: WorkerState,
        name: &str,
    ) -> Result<(), Unfit> {
        let (told, wait) = mpsc::sync_channel(1);
        self.order(Order::Restore(Box::new(Restored { worker, started }), told));
        let device = name.to_owned();
        match wait.recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Refusal::Differs(Differs { found, wanted }))) => {
                Err(Unfit::Other { device, found, wanted })
            }
            Ok(Err(Refusal::Broken(broken))) => {
                Err(Unfit::Broken { device, reason: reason(&broken) })
            }
            Err(_) => Err(Unfit::Ended { device }),
        }
    }

    fn order(&self, order: Order) {
        // Fails only when the thread has ended, and then there is nothing to order.
        if self.orders.send(order).is_ok() {
            let _ = self.bell.write(1);
        }
    }

    fn order_and_wait(&self, order: impl FnOnce(SyncSender<()>) -> Order) {
        let (done, wait) = mpsc::sync_channel(1);
        self.order(order(done));
        // An error says that the thread has ended, which is as good.
        let _ = wait.recv();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.order(Order::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's own side.
struct Inside {
    setting: Setting,
    worker: Box<dyn Worker>,
    epoll: Arc<Epoll>,
    orders: Receiver<Order>,
    bell: Arc<EventFd>,
    rings: Vec<Ring>,
    running: bool,
    paused: bool,
    stops: u32,
}

impl Inside {
    fn run(mut self) {
        if let Err(error) = seccomp::install(self.worker.thread_kind()) {
            let reason = format!("{}: {error}", self.setting.name);
            return self.setting.events.send(Event::Ended(Exit::VmmError(reason)));
        }
        let mut events = [EpollEvent::default(); EVENTS_PER_TURN];
        let mut progress = Progress::Idle;
        loop {
            let count = match self.epoll.wait(timeout_ms(progress, Instant::now), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.stop(&error.to_string()),
            };
            for event in &events[..count] {
                match event.data() {
                    Token::ORDERS => {
                        if self.follow_orders() == Follow::End {
                            return;
                        }
                    }
                    own if own & Token::OWN != 0 => self.silence_kick(own - Token::KICKS),
                    token => self.worker.ready(token, event.event_set()),
                }
            }
            progress = self.work();
        }
    }

    fn follow_orders(&mut self) -> Follow {
        // Silenced first: an order that comes in between rings again.
        let _ = self.bell.read();
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Start(started) => {
                    if let Err(broken) = started.and_then(|started| self.start(started)) {
                        self.stop(&reason(&broken));
                    }
                }
                Order::Reset(done) => {
                    self.halt();
                    let _ = done.send(());
                }
                Order::Pause(done) => {
                    self.paused = true;
                    let _ = done.send(());
                }
                Order::Save(told) => {
                    let rings = self.rings.iter().map(Ring::save).collect();
                    let _ = told.send(RunState { rings, worker: self.worker.save() });
                }
                Order::Restore(restored, told) => _ = told.send(self.restore(*restored)),
                Order::Resume => self.paused = false,
                Order::End => return Follow::End,
            }
        }
        Follow::On
    }

    fn restore(&mut self, Restored { worker, started }: Restored) -> Result<(), Refusal> {
        self.worker.restore(worker).map_err(Refusal::Differs)?;
        started.map_or(Ok(()), |started| self.start(started)).map_err(Refusal::Broken)
    }

    fn start(&mut self, Started { rings, features }: Started) -> Result<(), Broken> {
        self.worker.start(features)?;
        self.rings = rings;
        self.running = true;
        Ok(())
    }

    fn silence_kick(&self, queue: u64) {
        let kick = usize::try_from(queue).ok().and_then(|queue| self.setting.kicks.get(queue));
        // Readable a moment ago, and nobody else reads it.
        let _ = kick.map(|kick| kick.read());
    }

    fn work(&mut self) -> Progress {
        if !self.running || self.paused {
            return Progress::Idle;
        }
        match self.worker.work(&mut self.rings, &self.setting.memory, Instant::now()) {
            Ok(progress) => progress,
            Err(broken) => {
                self.stop(&reason(&broken));
                Progress::Idle
            }
        }
    }

    fn halt(&mut self) {
        self.running = false;
        self.rings.clear();
        self.worker.reset();
    }

    /// Ends what the driver has broken; a reset by the driver begins anew.
    fn stop(&mut self, reason: &str) {
        self.halt();
        self.setting.interrupt.broken();
        self.stops += 1;
        if self.stops <= STOPS_REPORTED_MAX {
            let device = self.setting.name.clone();
            log::warn!(device:% = device, reason:% = reason; "device stopped");
            self.setting.events.send(Event::DeviceStopped { device, reason: reason.to_owned() });
        }
    }
}

/// How long to wait for events, as epoll wants it: rounded up, so that it is never too early.
fn timeout_ms(progress: Progress, now: impl FnOnce() -> Instant) -> i32 {
    match progress {
        Progress::More => 0,
        Progress::Idle => -1,
        Progress::At(moment) => {
            let left = moment.saturating_duration_since(now());
            i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        }
    }
}

#[derive(PartialEq, Eq)]
enum Follow {
    On,
    End,
}

/// The error with its causes, on one line.
pub(super) fn reason(broken: &Broken) -> String {
    let mut text = broken.to_string();
    let mut cause = std::error::Error::source(broken);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{devices::testing, event};

    /// Holds until a moment, then is idle; tells of each look at it.
    struct Held {
        until: Instant,
        looks: mpsc::Sender<Instant>,
    }

    impl Worker for Held {
        fn thread_kind(&self) -> ThreadKind {
            ThreadKind::Disk
        }

        fn work(&mut self, _: &mut [Ring], _: &Memory, now: Instant) -> Result<Progress, Broken> {
            self.looks.send(now).unwrap();
            Ok(if now < self.until { Progress::At(self.until) } else { Progress::Idle })
        }

        fn save(&self) -> WorkerState {
            unreachable!("nobody saves it")
        }

        fn restore(&mut self, _: WorkerState) -> Result<(), Differs> {
            unreachable!("nobody restores it")
        }
    }

    #[test]
    fn a_held_device_sleeps_until_its_moment_and_then_until_it_is_asked() {
        let setting = Setting {
            name: "held".to_owned(),
            kicks: Vec::new(),
            interrupt: Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            memory: testing::memory(),
            events: event::channel().unwrap().0,
        };
        let (sender, looks) = mpsc::channel();
        let until = Instant::now() + Duration::from_millis(50);
        let runner = Runner::spawn(setting, Box::new(Held { until, looks: sender })).unwrap();
        runner.start(Ok(Started { rings: Vec::new(), features: 0 }));
        let in_time = looks.iter().find(|look| *look >= until);
        assert!(in_time.is_some());
        // Orders are followed between looks, and a paused device is not looked at.
        runner.pause();
        drop(runner);
        let more = looks.iter().count();
        assert!(more <= 1, "{more} looks at an idle device");
    }

    #[test]
    fn waits_are_never_too_short_and_never_endless_when_there_is_a_moment() {
        let now = Instant::now();
        let after = |nanos| Progress::At(now + Duration::from_nanos(nanos));
        for (progress, timeout) in [
            (Progress::More, 0),
            (Progress::Idle, -1),
            (after(0), 0),
            (after(1), 1),
            (after(1_000_000), 1),
            (after(1_000_001), 2),
            (after(u64::MAX), i32::MAX),
        ] {
            assert_eq!(timeout_ms(progress, || now), timeout, "{progress:?}");
        }
        assert_eq!(timeout_ms(after(0), || now + Duration::from_secs(1)), 0);
    }
}
