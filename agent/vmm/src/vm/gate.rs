//! The gate all vCPUs stop at: closed for a pause, shut for good at the end.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What a vCPU that came to the gate does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Into the guest; `waited` says whether the gate was closed in between.
    Run { waited: bool },
    /// Back to the gate, once it has told its state.
    Tell,
    /// Out of its thread.
    Leave,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Wait,
    Leave,
}

#[derive(Debug)]
struct Inside {
    order: Order,
    /// Counts the times that those who stand at the gate were asked for their state.
    round: u32,
    /// vCPUs standing at the gate.
    waiting: usize,
    /// Some of them ended the microVM: they go nowhere and tell no state.
    ended: bool,
    /// vCPUs sent out of their threads.
    left: usize,
}

#[derive(Debug)]
pub(crate) struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
}

impl Gate {
    /// An open gate.
    pub(crate) fn new() -> Self {
        let inside = Inside { order: Order::Run, round: 0, waiting: 0, ended: false, left: 0 };
        Self { inside: Mutex::new(inside), changed: Condvar::new() }
    }

    /// Called by a vCPU's thread when it is out of the guest by request. Returns when it may go on,
    /// or is asked for its state; `round` is the last time that it was, and starts at 0.
    pub(crate) fn pass(&self, round: &mut u32) -> Pass {
        let mut inside = self.lock();
        let waited = inside.order == Order::Wait;
        inside.waiting += 1;
        self.changed.notify_all();
        while inside.order == Order::Wait && inside.round == *round {
            inside = self.changed.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        inside.waiting -= 1;
        match inside.order {
            Order::Wait => {
                *round = inside.round;
                Pass::Tell
            }
            Order::Run => {
                *round = inside.round;
                Pass::Run { waited }
            }
            Order::Leave => {
                inside.left += 1;
                self.changed.notify_all();
                Pass::Leave
            }
        }
    }

    /// Asks every vCPU that stands at the closed gate for its state, once.
    pub(crate) fn ask(&self) {
        let mut inside = self.lock();
        inside.round = inside.round.wrapping_add(1);
        drop(inside);
        self.changed.notify_all();
    }

    /// Called by a vCPU's thread that ended the microVM: stands at the gate, whatever its order,
    /// until it is dismissed.
    pub(crate) fn await_dismissal(&self) {
        let mut inside = self.lock();
        inside.waiting += 1;
        inside.ended = true;
        self.changed.notify_all();
        let dismissed = self.changed.wait_while(inside, |inside| inside.order != Order::Leave);
        inside = dismissed.unwrap_or_else(PoisonError::into_inner);
        inside.waiting -= 1;
        inside.left += 1;
        self.changed.notify_all();
    }

    /// Closes the gate. Whoever is in the guest must then be fetched out of it.
    pub(crate) fn close(&self) {
        self.order(Order::Wait);
    }

    pub(crate) fn open(&self) {
        self.order(Order::Run);
    }

    /// Sends every vCPU out of its thread, those that wait and those that come.
    pub(crate) fn dismiss(&self) {
        self.order(Order::Leave);
    }

    /// Waits until `count` vCPUs stand at the closed gate; false when they do not within `limit`.
    pub(crate) fn await_all(&self, count: usize, limit: Duration) -> bool {
        self.await_that(limit, |inside| inside.waiting >= count)
    }

    /// Whether a vCPU that ended the microVM is among those who stand here.
    pub(crate) fn holds_an_end(&self) -> bool {
        self.lock().ended
    }

    /// Waits until `count` vCPUs have left; false when they do not within `limit`.
    pub(crate) fn await_left(&self, count: usize, limit: Duration) -> bool {
        self.await_that(limit, |inside| inside.left >= count)
    }

    fn await_that(&self, limit: Duration, holds: impl Fn(&Inside) -> bool) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |inside| !holds(inside));
        let (inside, _) = waited.unwrap_or_else(PoisonError::into_inner);
        holds(&inside)
    }

    fn order(&self, order: Order) {
        self.lock().order = order;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // Nothing inside can be left half-changed by a panic.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, mpsc},
        thread,
    };

    use super::*;

    /// Longer than any test needs; only a broken gate waits this long.
    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn an_open_gate_lets_pass_without_waiting() {
        assert_eq!(Gate::new().pass(&mut 0), Pass::Run { waited: false });
    }

    #[test]
    fn a_closed_gate_holds_all_until_it_opens() {
        let gate = Arc::new(Gate::new());
        gate.close();
        let comers: Vec<_> = (0..3)
            .map(|_| {
                let gate = Arc::clone(&gate);
                thread::spawn(move || gate.pass(&mut 0))
            })
            .collect();
        assert!(gate.await_all(3, LONG));
        assert!(!gate.holds_an_end());
        gate.open();
        for comer in comers {
            assert_eq!(comer.join().unwrap(), Pass::Run { waited: true });
        }
    }

    #[test]
    fn who_stands_at_the_gate_is_asked_once_each_time_and_goes_on_waiting() {
        let gate = Arc::new(Gate::new());
        gate.close();
        let (tell, told) = mpsc::channel();
        let comer = thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                let mut round = 0;
                loop {
                    match gate.pass(&mut round) {
                        Pass::Tell => tell.send(()).unwrap(),
                        other => return other,
                    }
                }
            }
        });
        for _ in 0..3 {
            gate.ask();
            told.recv_timeout(LONG).unwrap();
        }
        assert!(gate.await_all(1, LONG));
        gate.open();
        assert_eq!(comer.join().unwrap(), Pass::Run { waited: true });
        assert!(told.try_recv().is_err(), "asked more often than told");
    }

    #[test]
    fn dismissal_reaches_those_who_wait_and_those_who_come() {
        let gate = Arc::new(Gate::new());
        gate.close();
        let waiting = thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.pass(&mut 0)
        });
        assert!(gate.await_all(1, LONG));
        gate.dismiss();
        assert_eq!(waiting.join().unwrap(), Pass::Leave);
        assert!(!gate.await_left(2, Duration::from_millis(1)));
        assert_eq!(gate.pass(&mut 0), Pass::Leave);
        assert!(gate.await_left(2, LONG));
    }

    #[test]
    fn who_awaits_dismissal_counts_as_waiting_and_an_opened_gate_does_not_let_it_go() {
        let gate = Arc::new(Gate::new());
        let ended = thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.await_dismissal()
        });
        gate.close();
        assert!(gate.await_all(1, LONG));
        assert!(gate.holds_an_end());
        gate.open();
        assert!(!gate.await_left(1, Duration::from_millis(5)));
        gate.dismiss();
        assert!(gate.await_left(1, LONG));
        ended.join().unwrap();
    }

    #[test]
    fn waiting_for_more_than_come_ends_with_the_limit() {
        assert!(!Gate::new().await_all(1, Duration::from_millis(1)));
    }
}
