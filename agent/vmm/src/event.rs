//! What the parts of the VMM report to its control thread.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
};

use holdfast_wire::vmm::Exit;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::limits::control::EVENTS_WAITING_MAX;

/// One report to the control thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// PID 1 serves: it knocked on `READY_PORT`.
    GuestReady,
    /// A device was stopped because the guest broke its protocol.
    DeviceStopped { device: String, reason: String },
    /// The microVM is over. The first such event decides what the agent is told, and it is never
    /// dropped.
    Ended(Exit),
}

/// The sending end, held by every vCPU and device. Sending never blocks.
#[derive(Clone)]
pub(crate) struct EventSender {
    queue: SyncSender<Event>,
    ended: Arc<OnceLock<Exit>>,
    bell: Arc<EventFd>,
}

impl EventSender {
    pub(crate) fn send(&self, event: Event) {
        let queued = match event {
            Event::Ended(exit) => {
                // A later reason is a consequence of the first.
                let _ = self.ended.set(exit);
                Ok(())
            }
            event => self.queue.try_send(event),
        };
        match queued {
            Ok(()) => {}
            // The queue holds an earlier event, which has rung already.
            Err(TrySendError::Full(event)) => log::warn!(event:?; "event dropped: queue is full"),
            // The control thread is gone, so the process is about to be.
            Err(TrySendError::Disconnected(_)) => return,
        }
        // Fails only when the counter is full, and then the bell rings as it is.
        let _ = self.bell.write(1);
    }
}

/// The receiving end, and a bell to put into an epoll set.
pub(crate) struct EventReceiver {
    queue: Receiver<Event>,
    ended: Arc<OnceLock<Exit>>,
    bell: Arc<EventFd>,
}

impl EventReceiver {
    /// Readable while events wait.
    pub(crate) fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Takes what has arrived, the end last, and silences the bell.
    pub(crate) fn drain(&self) -> Vec<Event> {
        // Silenced first: an event that comes in between rings again.
        let _ = self.bell.read();
        let ended = self.ended.get().cloned().map(Event::Ended);
        self.queue.try_iter().take(EVENTS_WAITING_MAX).chain(ended).collect()
    }
}

/// Makes both ends.
pub(crate) fn channel() -> io::Result<(EventSender, EventReceiver)> {
    let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let (sender, receiver) = mpsc::sync_channel(EVENTS_WAITING_MAX);
    let ended = Arc::new(OnceLock::new());
    let sender = EventSender { queue: sender, ended: Arc::clone(&ended), bell: Arc::clone(&bell) };
    Ok((sender, EventReceiver { queue: receiver, ended, bell }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_arrive_in_order_and_ring_the_bell_once_drained() {
        let (sender, receiver) = channel().unwrap();
        sender.send(Event::GuestReady);
        sender.send(Event::Ended(Exit::Reset));
        assert_eq!(receiver.bell().read().unwrap(), 2);
        assert_eq!(receiver.drain(), vec![Event::GuestReady, Event::Ended(Exit::Reset)]);
        assert!(receiver.bell().read().is_err(), "bell still rings");
    }

    #[test]
    fn a_full_queue_drops_what_comes_and_never_blocks_but_keeps_the_first_end() {
        let (sender, receiver) = channel().unwrap();
        for _ in 0..EVENTS_WAITING_MAX + 5 {
            sender.send(Event::GuestReady);
        }
        sender.send(Event::Ended(Exit::GuestPanic));
        sender.send(Event::Ended(Exit::Reset));
        let events = receiver.drain();
        assert_eq!(events.len(), EVENTS_WAITING_MAX + 1);
        assert_eq!(events.last(), Some(&Event::Ended(Exit::GuestPanic)));
    }
}
