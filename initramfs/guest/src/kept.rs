//! Execs that outlive their connection: who may have one, and the door by which a new connection
//! comes to the thread that carries it.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use holdfast_wire::guest::{ExecKey, Failure, FailureKind, Keep, REPLAY_BYTES_MIN};
use rustix::event::{EventfdFlags, eventfd};

use crate::{
    failure::{failure, from_errno, not_found},
    limits::{self, Memory},
    link::Link,
};

/// Fewest and most execs kept at once. Each takes a replay of 1 MiB and a thread.
const KEPT_MIN: u64 = 8;
const KEPT_MAX: u64 = 32;

/// PID 1's reserve of memory, in replays, for each one given away: the rest is for connections.
const REPLAYS_PER_KEPT: u64 = 2;

/// How many execs a machine of this memory keeps.
fn kept_max(memory: Memory) -> usize {
    let replay = u64::try_from(REPLAY_BYTES_MIN).unwrap_or(u64::MAX);
    let many = limits::reserve_bytes(memory) / (replay * REPLAYS_PER_KEPT);
    usize::try_from(many.clamp(KEPT_MIN, KEPT_MAX)).unwrap_or(usize::MAX)
}

/// All kept execs of the machine.
#[derive(Debug)]
pub(crate) struct Keeper {
    kept: Mutex<HashMap<ExecKey, Arc<Kept>>>,
    max: usize,
}

/// One of them as others see it.
#[derive(Debug)]
pub(crate) struct Kept {
    door: Mutex<Door>,
    /// Readable when somebody came to the door.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct Door {
    newcomer: Option<Link>,
    /// The exec's thread has left or is to leave: nobody is let in.
    closed: bool,
    ended: Option<Instant>,
}

/// The exec's own side. Dropping it forgets the exec.
#[derive(Debug)]
pub(crate) struct Seat {
    key: ExecKey,
    kept: Arc<Kept>,
    keeper: Arc<Keeper>,
    /// How long it may be without a connection while it runs.
    pub alone_max: Duration,
}

impl Default for Keeper {
    fn default() -> Self {
        Self { kept: Mutex::default(), max: kept_max(Memory::read()) }
    }
}

impl Keeper {
    /// Gives the exec a seat. `None`: all are taken by execs that run.
    pub(crate) fn seat(self: &Arc<Self>, keep: &Keep) -> Result<Option<Seat>, Failure> {
        let mut table = self.table();
        if table.contains_key(&keep.key) {
            let message = format!("there is an exec {:?} already", keep.key);
            return Err(failure(FailureKind::Exists, message));
        }
        if table.len() >= self.max {
            let ended = table.iter().filter_map(|(key, kept)| Some((kept.door().ended?, *key)));
            let Some((_, oldest)) = ended.min() else { return Ok(None) };
            if let Some(kept) = table.remove(&oldest) {
                kept.send_away();
            }
        }
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| from_errno("cannot keep the command", error))?;
        let kept = Arc::new(Kept { door: Mutex::default(), bell });
        table.insert(keep.key, Arc::clone(&kept));
        let alone_max = Duration::from_millis(u64::from(keep.alone_ms_max));
        Ok(Some(Seat { key: keep.key, kept, keeper: Arc::clone(self), alone_max }))
    }

    /// How many of them run.
    pub(crate) fn running(&self) -> u32 {
        let running = self.table().values().filter(|kept| kept.door().ended.is_none()).count();
        u32::try_from(running).unwrap_or(u32::MAX)
    }

    pub(crate) fn find(&self, key: ExecKey) -> Result<Arc<Kept>, Failure> {
        let found = self.table().get(&key).map(Arc::clone);
        found.ok_or_else(|| unknown(key))
    }

    fn table(&self) -> MutexGuard<'_, HashMap<ExecKey, Arc<Kept>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown(key: ExecKey) -> Failure {
    not_found(format!("there is no exec {key:?}, or its end was collected"))
}

impl Kept {
    /// Brings a connection to the exec, in place of one that waits at the door.
    pub(crate) fn enter(&self, key: ExecKey, link: Link) {
        {
            let mut door = self.door();
            if !door.closed {
                door.newcomer = Some(link);
                drop(door);
                return self.ring();
            }
        }
        link.refuse(unknown(key));
    }

    fn send_away(&self) {
        self.door().closed = true;
        self.ring();
    }

    fn ring(&self) {
        // It can only fail by being full, and then it is readable.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Readable when [`Self::answer_door`] is due.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.kept.bell.as_fd()
    }

    /// Who came, if somebody did. `Err`: the exec is to be forgotten.
    pub(crate) fn answer_door(&self) -> Result<Option<Link>, Forgotten> {
        // Empty already is as good.
        let _ = rustix::io::read(&self.kept.bell, &mut [0; 8]);
        let mut door = self.kept.door();
        if door.closed { Err(Forgotten) } else { Ok(door.newcomer.take()) }
    }

    /// It ended: it may be forgotten to make room for another.
    pub(crate) fn has_ended(&self, at: Instant) {
        self.kept.door().ended = Some(at);
    }
}

/// Another exec got the seat.
#[derive(Debug)]
pub(crate) struct Forgotten;

impl Drop for Seat {
    fn drop(&mut self) {
        {
            let mut table = self.keeper.table();
            if table.get(&self.key).is_some_and(|kept| Arc::ptr_eq(kept, &self.kept)) {
                table.remove(&self.key);
            }
        }
        let newcomer = {
            let mut door = self.kept.door();
            door.closed = true;
            door.newcomer.take()
        };
        if let Some(link) = newcomer {
            link.refuse(unknown(self.key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(number: u8) -> Keep {
        Keep { key: ExecKey([number; 16]), alone_ms_max: 0 }
    }

    fn keeper(max: usize) -> Arc<Keeper> {
        Arc::new(Keeper { kept: Mutex::default(), max })
    }

    #[test]
    fn a_key_is_given_once_and_again_after_its_exec_is_forgotten() {
        let keeper = keeper(2);
        let seat = keeper.seat(&keep(1)).unwrap();
        assert_eq!(keeper.seat(&keep(1)).unwrap_err().kind, FailureKind::Exists);
        assert!(keeper.find(keep(1).key).is_ok());
        drop(seat);
        assert_eq!(keeper.find(keep(1).key).unwrap_err().kind, FailureKind::NotFound);
        assert!(keeper.seat(&keep(1)).unwrap().is_some());
    }

    #[test]
    fn the_one_that_ended_first_makes_room_and_those_that_run_stay() {
        let keeper = keeper(3);
        let seats: Vec<_> = (0..3).map(|n| keeper.seat(&keep(n)).unwrap().unwrap()).collect();
        assert!(keeper.seat(&keep(9)).unwrap().is_none());
        let now = Instant::now();
        seats[2].has_ended(now);
        seats[1].has_ended(now + Duration::from_secs(1));
        assert_eq!(keeper.running(), 1);
        let _new = keeper.seat(&keep(9)).unwrap().unwrap();
        let known: Vec<_> = (0..3).map(|n| keeper.find(keep(n).key).is_ok()).collect();
        assert_eq!(known, [true, true, false]);
        assert!(seats[2].answer_door().is_err() && seats[1].answer_door().is_ok());
    }

    #[test]
    fn small_machines_keep_few_execs_and_large_ones_not_many() {
        for (mib, most) in [(128, 8), (512, 16), (8192, 32)] {
            let memory = Memory { total: mib << 20, available: mib << 20 };
            assert_eq!(kept_max(memory), most, "{mib} MiB");
        }
    }
}
