//! Threads of a process that cannot start or end one once it is ready.

use std::sync::mpsc::sync_channel;

use protocol::Fault;

/// The size of a thread's stack in bytes.
const STACK: usize = 256 * 1024;

/// Starts a thread called `name` and waits until it is in `body`.
///
/// What the standard library does at the start of a thread, and at its end, takes calls that the run filters leave out.
/// So the first is waited for, and the second never comes: a thread whose body has returned rests until the process
/// ends.
///
/// # Errors
/// A host that has no thread left.
pub fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Fault> {
    let (begin, begun) = sync_channel(1);
    let whole = move || {
        let _ = begin.send(());
        body();
        loop {
            std::thread::park();
        }
    };
    let error = |reason: &dyn std::fmt::Display| Fault::host(format!("start thread '{name}': {reason}"));
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(whole).map_err(|e| error(&e))?;
    begun.recv().map_err(|e| error(&e))
}
