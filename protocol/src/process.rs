//! What every jailed process does before anything else.

use std::io;
use std::panic;
use std::sync::mpsc;
use std::thread;

use nix::sys::prctl;
use nix::sys::signal::Signal;

use crate::allocator;
use crate::fault::Fault;
use crate::faults;

/// The exit status of a process that met a defect of its own.
pub const PANICKED: i32 = 101;

/// Keeps the allocator to one heap, has forbidden system calls reported and faults of the processor end it, takes the process name from the first argument,
/// forbids core dumps and ptrace by the same user, and asks for `on_parent_death` when `ozone` dies.
///
/// It is called first thing in `main`, before the set-up filter: `execve` has just reset all of them (prctl(2),
/// PR_SET_DUMPABLE and PR_SET_PDEATHSIG). Should `ozone` have died already, the control socket reads as closed.
///
/// # Errors
/// What sigaction(2) or prctl(2) answers.
pub fn enter(on_parent_death: Signal) -> io::Result<()> {
    allocator::one_heap();
    seccomp::forbidden::report()?;
    faults::end_the_process()?;
    // The standard library's way out of a panic makes calls that no run table has, and would look like an attack.
    panic::set_hook(Box::new(|defect| {
        log::error!("panic, a defect of ozone: {defect}");
        std::process::exit(PANICKED);
    }));
    prctl::set_dumpable(false)?;
    prctl::set_pdeathsig(on_parent_death)?;
    if let Some(name) = std::env::args_os().next() {
        let mut bytes = name.into_encoded_bytes();
        bytes.truncate(15);
        if let Ok(name) = std::ffi::CString::new(bytes) {
            prctl::set_name(&name)?;
        }
    }
    Ok(())
}

/// Starts a thread and returns once it is about to run `body`.
///
/// The system calls of a thread's start (its name, its signal stack) and of its end are not in any run table. So the first
/// are waited for, and the others never come: a thread whose body has returned rests until the process ends.
///
/// # Errors
/// A host fault when there is no room for a thread.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Fault> {
    spawn_prepared(name, || Ok(()), body)
}

/// The same for a thread that first calls `prepare`, which is waited for.
///
/// # Errors
/// What `prepare` answers, or a host fault when there is no room for a thread.
pub fn spawn_prepared(
    name: &str,
    prepare: impl FnOnce() -> Result<(), Fault> + Send + 'static,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), Fault> {
    let (started, wait) = mpsc::channel();
    let run = move || {
        let prepared = prepare();
        let goes_on = prepared.is_ok();
        // The receiver waits for this one message.
        let _ = started.send(prepared);
        if goes_on {
            body();
        }
        loop {
            thread::park();
        }
    };
    let failed = |error: &dyn std::fmt::Display| Fault::host(format!("start the thread '{name}': {error}"));
    let thread = thread::Builder::new().name(name.chars().take(15).collect()).spawn(run);
    thread.map_err(|error| failed(&error))?;
    wait.recv().map_err(|error| failed(&error))?
}
