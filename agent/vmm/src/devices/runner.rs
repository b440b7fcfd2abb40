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
};

use holdfast_wire::vmm::Exit;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    interrupt::Interrupt,
    queue::{Broken, Progress, Ring},
};
use crate::{
    event::{Event, EventSender},
    seccomp::{self, ThreadKind},
    vm::Memory,
};

/// Stack of a device's thread. Workers keep no large values on it.
const STACK_BYTES: usize = 128 * 1024;
/// fds looked at in one turn.
const EVENTS_PER_TURN: usize = 16;
/// Stops of one device that are reported. A driver that resets and breaks it again and again only
/// repeats itself.
const STOPS_REPORTED_MAX: u32 = 4;

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

    /// The driver has started the device.
    fn start(&mut self) {}

    /// An fd of its own is ready. Also called while paused: it notes that, and acts in `work`.
    fn ready(&mut self, _token: u64, _events: EventSet) {}

    /// Handles a bounded batch of whatever there is to do.
    fn work(&mut self, rings: &mut [Ring], memory: &Memory) -> Result<Progress, Broken>;

    /// The driver reset the device, or broke it: forget what was going on.
    fn reset(&mut self) {}
}

enum Order {
    Start(Result<Vec<Ring>, Broken>),
    Reset(SyncSender<()>),
    Pause(SyncSender<()>),
    Resume,
    End,
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
        let builder = thread::Builder::new().name(name).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || inside.run())?;
        Ok(Self { orders: sender, bell, thread: Some(thread) })
    }

    /// Hands the queues over, and the worker looks at them at once; or stops the device for how
    /// they were set up.
    pub(super) fn start(&self, rings: Result<Vec<Ring>, Broken>) {
        self.order(Order::Start(rings));
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
            let timeout = if progress == Progress::More { 0 } else { -1 };
            let count = match self.epoll.wait(timeout, &mut events) {
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
                Order::Start(Err(broken)) => self.stop(&reason(&broken)),
                Order::Start(Ok(rings)) => {
                    self.rings = rings;
                    self.running = true;
                    self.worker.start();
                }
                Order::Reset(done) => {
                    self.halt();
                    let _ = done.send(());
                }
                Order::Pause(done) => {
                    self.paused = true;
                    let _ = done.send(());
                }
                Order::Resume => self.paused = false,
                Order::End => return Follow::End,
            }
        }
        Follow::On
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
        match self.worker.work(&mut self.rings, &self.setting.memory) {
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

#[derive(PartialEq, Eq)]
enum Follow {
    On,
    End,
}

/// The error with its causes, on one line.
fn reason(broken: &Broken) -> String {
    let mut text = broken.to_string();
    let mut cause = std::error::Error::source(broken);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
