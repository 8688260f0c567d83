//! A line for every step that takes over a second.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Runs `work`; once it has taken a second its name is shown, and at its end the time.
pub fn step<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let (done, is_done) = mpsc::channel::<()>();
    let shown = name.to_owned();
    let watcher = thread::spawn(move || {
        let slow = is_done.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout);
        if slow {
            eprintln!("… {shown}");
        }
        slow
    });
    let result = work();
    drop(done);
    if watcher.join().unwrap_or(false) {
        eprintln!("… {name}: {:.1} s", start.elapsed().as_secs_f64());
    }
    result
}
