//! What a role that was taken over tries, from every kind of thread that it has: all of it is refused, and reported.
//!
//! This executable is its own jailed child: started with a process name as its first argument it becomes one of that role as
//! the product does, and then makes one call that it may not make. Without a test harness of threads, since `ozone` clones
//! with one thread only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attempts;
mod child;

use std::fs::File;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Instant;

use attempts::{ATTEMPTS, Attempt};
use child::{OWN, PATIENCE, inherited, spawn_as};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Uid;
use ozone::jail::Identity;
use ozone::process::Process;
use protocol::{DeviceId, DeviceKind};
use seccomp::{CoreThread, Role};

/// How a child is told to make a call before it is ready.
const SET_UP: &str = "set-up";
/// By its first thread, once it is ready.
const MAIN: &str = "main thread";
/// By another one.
const ANOTHER: &str = "another thread";
/// The status of a child that got what it tried.
const ALLOWED: u8 = 103;

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    if let Some(role) = Role::ALL.into_iter().find(|role| name.split('/').next() == Some(&role.to_string())) {
        return taken_over(role);
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let root = Uid::effective().is_root();
    // What cannot be tried here is shown as ignored, with the reason in its name, never as passed.
    let own = if root { "" } else { " (needs root)" };
    let mut tests = vec![
        Trial::test(format!("a forbidden call is reported at any time{own}"), at_any_time).with_ignored_flag(!root),
        Trial::test(format!("calls of foreign ABIs end a child without a report{own}"), foreign)
            .with_ignored_flag(!root),
    ];
    let name = format!("a fault of the processor is said as what it is{own}");
    tests.push(Trial::test(name, fault).with_ignored_flag(!root));
    for role in Role::ALL {
        let name = format!("{} things are refused to every thread of {role}{own}", ATTEMPTS.len());
        tests.push(Trial::test(name, move || everything(role)).with_ignored_flag(!root));
    }
    libtest_mimic::run(&arguments, tests).exit_code()
}

/// The child: told by which thread to make which attempt.
fn taken_over(role: Role) -> ExitCode {
    if protocol::process::enter(Signal::SIGKILL).is_err() || seccomp::install_setup(role).is_err() {
        return ExitCode::from(100);
    }
    let mut command = [0; 128];
    let Ok(length) = File::from(inherited()).read(&mut command) else { return ExitCode::from(101) };
    let command = String::from_utf8_lossy(&command[..length]).into_owned();
    let Some((place, name)) = command.split_once('|') else { return ExitCode::from(101) };
    let Some(attempt) = Attempt::named(name) else { return ExitCode::from(101) };
    if place == SET_UP {
        attempt.make();
        return ExitCode::from(ALLOWED);
    }
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let wait_and_try = move || {
        if gate.recv().is_ok() {
            attempt.make();
            std::process::exit(ALLOWED.into());
        }
    };
    let kind = CoreThread::ALL.into_iter().find(|kind| place == kind.to_string());
    let confine = move || {
        let confined = kind.map_or(Ok(()), seccomp::install_core_thread);
        confined.map_err(|error| protocol::Fault::host(error.to_string()))
    };
    let started = protocol::process::spawn_prepared("attempt", confine, wait_and_try);
    let confined =
        if role == Role::Core { seccomp::install_core_thread(CoreThread::Main) } else { seccomp::install_run(role) };
    if started.is_err() || confined.is_err() {
        return ExitCode::from(102);
    }
    if place == MAIN {
        attempt.make();
        return ExitCode::from(ALLOWED);
    }
    let _ = go.send(());
    loop {
        std::thread::park();
    }
}

/// How a child of `role` ends that makes an attempt by the thread of that kind, and what it says.
fn end_of(role: Role, place: &str, attempt: &Attempt) -> Result<(Option<WaitStatus>, String), Failed> {
    let device = DeviceId::try_from("taken-over".to_owned())?;
    let process = match role {
        Role::Core => Process::Core,
        Role::Blk => Process::Backend { kind: DeviceKind::Blk, device },
        Role::Net => Process::Backend { kind: DeviceKind::Net, device },
        Role::Console => Process::Backend { kind: DeviceKind::Console, device },
    };
    let mut child = spawn_as(process, role, Identity::Own(OWN), seccomp::launch_filters(role)?)?;
    child.control.write_all(format!("{place}|{}", attempt.name).as_bytes())?;
    let status = child.jailed.reap(Instant::now() + PATIENCE);
    Ok((status, child.log_text()))
}

fn is_sigsys(status: Option<WaitStatus>) -> bool {
    matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGSYS, _)))
}

/// That the attempt ends the process, by the kernel's word, and that the report names the call.
fn refused(role: Role, place: &str, attempt: &Attempt) -> Result<(), Failed> {
    let (status, log) = end_of(role, place, attempt)?;
    let reported = log.strip_prefix(&format!("error forbidden system call {} (", attempt.call));
    if is_sigsys(status) && reported.is_some_and(|rest| rest.ends_with("), architecture 0xc000003e\n")) {
        return Ok(());
    }
    Err(format!("'{}' by the {place} of {role}: {status:?}, on its log: {log:?}", attempt.name).into())
}

fn everything(role: Role) -> Result<(), Failed> {
    let kinds: Vec<String> = CoreThread::ALL.iter().map(ToString::to_string).collect();
    let places: Vec<&str> = match role {
        Role::Core => kinds.iter().map(String::as_str).collect(),
        _ => vec![MAIN, ANOTHER],
    };
    let mut wrong = Vec::new();
    for place in places {
        for attempt in ATTEMPTS {
            if let Err(error) = refused(role, place, attempt) {
                wrong.push(error.message().unwrap_or_default().to_owned());
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}

fn at_any_time() -> Result<(), Failed> {
    let connect = Attempt::named("a socket of the Internet").ok_or("no such attempt")?;
    let silence = Attempt::named("its own reports silenced").ok_or("no such attempt")?;
    for role in Role::ALL {
        for place in [SET_UP, MAIN, ANOTHER] {
            refused(role, place, connect)?;
            refused(role, place, silence)?;
        }
    }
    Ok(())
}

/// The filters kill the process at once then: a handler of the native ABI could not tell.
fn foreign() -> Result<(), Failed> {
    for role in Role::ALL {
        let (status, log) = end_of(role, MAIN, &attempts::X32)?;
        assert!(is_sigsys(status) && log.is_empty(), "{role}, x32: {status:?}, {log}");
        let (status, log) = end_of(role, MAIN, &attempts::I386)?;
        // Where the kernel has no i386 the processor refuses the instruction.
        let absent = matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGSEGV, _)));
        assert!((is_sigsys(status) || absent) && log.is_empty(), "{role}, i386: {status:?}, {log}");
    }
    assert_eq!(libc::SYS_socket | 0x4000_0000, attempts::X32.call);
    Ok(())
}

fn fault() -> Result<(), Failed> {
    for role in Role::ALL {
        for place in [SET_UP, MAIN, ANOTHER] {
            let (status, log) = end_of(role, place, &attempts::FAULT)?;
            let is_fault = matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGSEGV, _)));
            assert!(is_fault && log.is_empty(), "{role}, {place}: {status:?}, {log}");
        }
    }
    Ok(())
}
