//! The gate between vCPU threads and the guest: closed before the start and during a pause.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::event::{Event, Events};

/// The gate. Nobody who opens or closes it waits for anybody.
pub struct Gate {
    inside: Mutex<usize>,
    opened: Condvar,
    /// Changed under the lock of `inside` alone; read without it before each entry into the guest.
    open: AtomicBool,
    events: Events,
}

impl Gate {
    /// A closed one with nobody inside.
    pub fn new(events: Events) -> Self {
        Self { inside: Mutex::new(0), opened: Condvar::new(), open: AtomicBool::new(false), events }
    }

    /// Lets everyone through, now and later.
    pub fn open(&self) {
        let _inside = self.lock();
        self.open.store(true, Ordering::Release);
        self.opened.notify_all();
    }

    /// Lets nobody through any more. Once nobody is inside, that is an event ([`Event::VcpusHeld`]). By the time it is
    /// taken the gate may have been opened and closed again: so [`is_empty`](Self::is_empty) is to be asked then.
    pub fn close(&self) {
        let inside = self.lock();
        self.open.store(false, Ordering::Release);
        self.tell_if_empty(*inside);
    }

    /// Whether those inside are to come out.
    pub fn is_closed(&self) -> bool {
        !self.open.load(Ordering::Acquire)
    }

    /// Whether nobody is inside, and nobody will be before the gate is opened.
    pub fn is_empty(&self) -> bool {
        let inside = self.lock();
        *inside == 0 && self.is_closed()
    }

    /// Waits until the gate is open and passes it.
    pub fn enter(&self) {
        let closed = |_: &mut usize| self.is_closed();
        let mut inside = self.opened.wait_while(self.lock(), closed).unwrap_or_else(PoisonError::into_inner);
        *inside = inside.saturating_add(1);
    }

    /// Comes out.
    pub fn leave(&self) {
        let mut inside = self.lock();
        *inside = inside.saturating_sub(1);
        if self.is_closed() {
            self.tell_if_empty(*inside);
        }
    }

    /// Does what may take long, during which the caller counts as outside. It must not enter the guest again before it
    /// has seen that the gate [is not closed](Self::is_closed).
    pub fn outside<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.leave();
        let outcome = wait();
        let mut inside = self.lock();
        *inside = inside.saturating_add(1);
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_if_empty(&self, inside: usize) {
        if inside == 0 {
            // A receiver that is gone means that the machine is ending.
            let _ = self.events.send(Event::VcpusHeld);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    fn gate() -> (Gate, Receiver<Event>) {
        let (events, received) = channel();
        (Gate::new(events), received)
    }

    fn held(events: &Receiver<Event>) -> bool {
        matches!(events.recv_timeout(Duration::from_secs(5)), Ok(Event::VcpusHeld))
    }

    #[test]
    fn whoever_comes_out_last_is_told() {
        let (gate, events) = gate();
        gate.open();
        gate.enter();
        gate.enter();
        gate.close();
        gate.leave();
        assert!(events.try_recv().is_err(), "one is inside");
        assert!(!gate.is_empty());
        gate.leave();
        assert!(held(&events) && gate.is_empty());
        gate.close();
        assert!(held(&events), "nobody has to come out");
        gate.open();
        assert!(!gate.is_empty(), "anybody may enter");
    }

    #[test]
    fn nobody_passes_a_closed_gate() {
        let (gate, events) = gate();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| gate.enter());
            gate.close();
            assert!(held(&events));
            assert!(!thread.is_finished());
            gate.open();
        });
        gate.close();
        gate.leave();
        assert!(held(&events));
    }

    #[test]
    fn who_waits_for_something_else_is_not_waited_for() {
        let (gate, events) = gate();
        gate.open();
        gate.enter();
        gate.outside(|| {
            gate.close();
            assert!(held(&events));
        });
        assert!(gate.is_closed(), "it has to see that");
        gate.leave();
        assert!(held(&events));
    }
}
