//! Whether the threads of the queues go round.
//!
//! `ozone` asks ([`ToBackend::Ping`](protocol::ToBackend::Ping)), the main thread wakes every queue's thread and answers
//! when all of them have passed their loop since. A thread that waits for a ring, or for the host's storage, is known to
//! be where it should be and counts as having passed: slow storage is no hang. The thread that answers the core is not
//! asked, for it may be waiting for a queue to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::descriptor::Wake;

/// What a queue's thread shows of itself.
///
/// The main thread asks and then looks whether the thread rests; the thread begins or ends a rest and then looks whether it
/// was asked. All of that is sequentially consistent, so that one of the two sees the other.
#[derive(Debug, Default)]
pub struct Pulse {
    asked: AtomicU64,
    /// The question that the thread has seen last.
    seen: AtomicU64,
    /// Whether it waits for a ring or for the host's storage.
    resting: AtomicBool,
    /// Wakes the main thread.
    main: OnceLock<Arc<Wake>>,
}

impl Pulse {
    /// Carries out what may take as long as the host's storage does.
    pub fn storage<T>(&self, call: impl FnOnce() -> T) -> T {
        self.rest(true);
        let outcome = call();
        self.rest(false);
        outcome
    }

    /// A rest begins or ends.
    pub(crate) fn rest(&self, resting: bool) {
        self.resting.store(resting, Ordering::SeqCst);
        self.beat();
    }

    /// The thread is where it can be seen to go round.
    pub(crate) fn beat(&self) {
        let asked = self.asked.load(Ordering::SeqCst);
        // No other thread stores it.
        if self.seen.load(Ordering::Relaxed) != asked {
            self.seen.store(asked, Ordering::SeqCst);
            if let Some(main) = self.main.get() {
                main.raise();
            }
        }
    }

    fn ask(&self, question: u64) {
        self.asked.store(question, Ordering::SeqCst);
    }

    fn answers(&self, question: u64) -> bool {
        self.resting.load(Ordering::SeqCst) || self.seen.load(Ordering::SeqCst) == question
    }
}

/// A queue's thread, and what makes it go round once.
#[derive(Debug)]
pub(crate) struct Watched {
    pub pulse: Arc<Pulse>,
    pub nudge: Arc<Wake>,
}

/// The main thread's half: at most one question at a time.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    threads: Vec<Watched>,
    question: u64,
    /// The number that `ozone` gave its question.
    number: Option<u64>,
}

impl Heartbeat {
    /// Of `threads`, each of which raises `main` when it has gone round.
    pub fn new(threads: Vec<Watched>, main: &Arc<Wake>) -> Self {
        for thread in &threads {
            // Nobody else sets it.
            let _ = thread.pulse.main.set(Arc::clone(main));
        }
        Self { threads, question: 0, number: None }
    }

    /// Asks every thread. A question that was not answered yet is forgotten.
    pub fn ask(&mut self, number: u64) {
        self.question = self.question.wrapping_add(1);
        self.number = Some(number);
        for Watched { pulse, nudge } in &self.threads {
            pulse.ask(self.question);
            if !pulse.answers(self.question) {
                nudge.raise();
            }
        }
    }

    /// The number of the question, once, when every thread has answered.
    pub fn answer(&mut self) -> Option<u64> {
        let all = self.threads.iter().all(|thread| thread.pulse.answers(self.question));
        self.number.take_if(|_| all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat(threads: usize) -> (Heartbeat, Vec<Arc<Pulse>>, Arc<Wake>) {
        let main = Arc::new(Wake::new().unwrap());
        let watched = || Watched { pulse: Arc::default(), nudge: Arc::new(Wake::new().unwrap()) };
        let threads: Vec<Watched> = (0..threads).map(|_| watched()).collect();
        let pulses = threads.iter().map(|thread| Arc::clone(&thread.pulse)).collect();
        (Heartbeat::new(threads, &main), pulses, main)
    }

    #[test]
    fn all_threads_have_to_go_round_since_the_question() {
        let (mut heartbeat, pulses, main) = heartbeat(2);
        pulses.iter().for_each(|pulse| pulse.beat());
        assert_eq!(heartbeat.answer(), None, "nobody asked");
        heartbeat.ask(7);
        assert_eq!(heartbeat.answer(), None);
        pulses[0].beat();
        main.lower();
        assert_eq!(heartbeat.answer(), None);
        pulses[1].beat();
        main.lower();
        assert_eq!(heartbeat.answer(), Some(7));
        assert_eq!(heartbeat.answer(), None, "one answer for one question");
    }

    #[test]
    fn a_thread_that_waits_for_storage_is_no_hang() {
        let (mut heartbeat, pulses, _main) = heartbeat(1);
        pulses[0].storage(|| {
            heartbeat.ask(1);
            assert_eq!(heartbeat.answer(), Some(1), "asked meanwhile");
        });
        heartbeat.ask(2);
        assert_eq!(heartbeat.answer(), None, "it is back and has not gone round");
        pulses[0].storage(|| assert_eq!(heartbeat.answer(), Some(2), "asked before"));
        heartbeat.ask(3);
        pulses[0].storage(|| ());
        assert_eq!(heartbeat.answer(), Some(3), "it went in and out");
    }

    #[test]
    fn a_newer_question_replaces_an_older_one() {
        let (mut heartbeat, pulses, _main) = heartbeat(1);
        (1..1000).for_each(|number| heartbeat.ask(number));
        heartbeat.ask(5);
        pulses[0].beat();
        assert_eq!(heartbeat.answer(), Some(5));
        assert_eq!(heartbeat.answer(), None);
    }

    #[test]
    fn a_device_without_queues_is_alive() {
        let (mut heartbeat, ..) = heartbeat(0);
        heartbeat.ask(1);
        assert_eq!(heartbeat.answer(), Some(1));
    }
}
