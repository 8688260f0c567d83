//! `vmm-core`: KVM, guest memory and vCPU threads of one virtual machine, and nothing else.
//!
//! It is started by `ozone` in a jail with one descriptor, the control channel; everything else arrives over it.
//! It opens no path and connects no socket. When it ends, the machine ends.
#![warn(clippy::indexing_slicing)]

mod arch;
mod bus;
mod event;
mod gate;
mod kvm;
mod legacy;
mod machine;
mod memory;
mod pause;
mod signal;
mod thread;
mod trace;
mod vcpu;
mod virtio;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use event::Event;
use machine::Machine;
use nix::sys::signal::Signal;
use pause::{Pauses, Request, Step};
use protocol::trace::{Laps, Point};
use protocol::{Boot, Cause, Channel, Fault, FromCore, LinkError, ToCore};
use seccomp::CoreThread;

type Control = Arc<Channel<FromCore, ToCore>>;

fn main() -> ExitCode {
    let entered = protocol::trace::now();
    if let Err(error) = protocol::process::enter(Signal::SIGKILL) {
        eprintln!("vmm-core: prctl: {error}");
        return ExitCode::FAILURE;
    }
    protocol::log::install();
    if let Err(error) = seccomp::install_setup(seccomp::Role::Core) {
        eprintln!("vmm-core: {error}");
        return ExitCode::FAILURE;
    }
    let control: Control = match Channel::inherited() {
        Ok(control) => Arc::new(control),
        // The machine has come to its end before this process began.
        Err(LinkError::Closed) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm-core: {error}; it is started by ozone, not by hand");
            return ExitCode::FAILURE;
        }
    };
    let last_word = match run(&control, entered) {
        Ok(cause) => FromCore::Exited(cause),
        Err(fault) => FromCore::Failed(fault),
    };
    match control.send(&last_word) {
        Ok(()) => {
            // Until ozone has read it: Linux up to 6.1 throws away what a closing socket's peer has not read yet, if that
            // peer sends at the same moment.
            while control.receive().is_ok() {}
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// One machine, from its first message to its end.
fn run(control: &Control, entered: u64) -> Result<Cause, Fault> {
    let boot = receive_boot(control)?;
    let mut laps = Laps::new(boot.trace, entered);
    laps.done(Point::Told);
    let (events, received) = channel();
    // Never dropped: the vCPUs run on in its memory until the process exits.
    let machine = Box::leak(Box::new(Machine::build(boot, &events, &mut laps)?));
    let reader = control.clone();
    thread::spawn(CoreThread::Control, "control", move || {
        loop {
            let message = reader.receive();
            let ended = message.is_err();
            if events.send(Event::Control(message)).is_err() || ended {
                return;
            }
        }
    })?;
    serve(control, machine, &received, laps)
}

fn receive_boot(control: &Control) -> Result<Boot, Fault> {
    match control.receive() {
        Ok(ToCore::Boot(boot)) => Ok(boot),
        Ok(_) => Err(Fault::internal("the first message to the core was not 'boot'")),
        Err(error) => Err(Fault::internal(error.to_string())),
    }
}

/// Answers `ozone` and watches over the threads until the machine ends.
fn serve(control: &Control, machine: &mut Machine, events: &Receiver<Event>, laps: Laps) -> Result<Cause, Fault> {
    let mut laps = Some(laps);
    let mut asked_to_run = false;
    let mut pauses = Pauses::new(machine.devices());
    loop {
        let Some(event) = next(events, machine.hang_up_overdue())? else { continue };
        match event {
            Event::Conversation => {}
            Event::Control(Ok(ToCore::Attach(attach))) => machine.attach(&attach.device, attach.socket.into_fd())?,
            Event::Control(Ok(ToCore::Detach { device })) => machine.detach(&device)?,
            Event::Control(Ok(ToCore::Dead { device })) => machine.dead(&device)?,
            Event::Control(Ok(ToCore::Gone { device })) => machine.gone(&device)?,
            Event::Control(Ok(ToCore::NeedsReset { device })) => machine.needs_reset(&device)?,
            Event::Control(Ok(ToCore::Run)) if !asked_to_run => asked_to_run = true,
            Event::Control(Ok(ToCore::PowerButton)) => machine.press_power_button(),
            Event::Control(Ok(ToCore::ConfigChanged { device })) => machine.config_changed(&device)?,
            Event::Control(Ok(ToCore::Pause)) => pauses.ask(Request::Pause),
            Event::Control(Ok(ToCore::Resume)) => pauses.ask(Request::Resume),
            Event::Control(Ok(ToCore::Boot(_) | ToCore::Run)) => {
                return Err(Fault::internal("a message to the core that its state does not allow"));
            }
            Event::Control(Err(LinkError::Closed)) => return Err(Fault::internal("ozone is gone")),
            Event::Control(Err(error)) => return Err(Fault::internal(error.to_string())),
            Event::VcpusHeld if machine.is_held() => pauses.vcpus_held(),
            // Of an earlier pause: the next one is told of when it is so.
            Event::VcpusHeld => {}
            Event::QueuesDone => pauses.queues_done(),
            Event::Attached(device) => {
                machine.attached(&device);
                tell(control, &FromCore::Attached { device })?;
            }
            Event::Gone(device) => tell(control, &FromCore::Gone { device })?,
            Event::Detached(device) => tell(control, &FromCore::Detached { device })?,
            Event::Lost(device, reason) => tell(control, &FromCore::Lost { device, reason })?,
            Event::Trace(mark) => tell(control, &FromCore::Trace(vec![mark]))?,
            Event::End(cause) => {
                machine.flush_serial();
                return Ok(cause);
            }
            Event::Failed(fault) => {
                machine.flush_serial();
                return Err(fault);
            }
        }
        while let Some(step) = pauses.step() {
            match step {
                Step::HoldVcpus => machine.hold(),
                Step::StopQueues => machine.stop_queues(),
                Step::SayPaused => tell(control, &FromCore::Paused)?,
                Step::StartQueues => machine.start_queues(),
                // Those that have not been started yet are later.
                Step::ReleaseVcpus if laps.is_none() => machine.start(),
                Step::ReleaseVcpus => {}
                Step::SayResumed => tell(control, &FromCore::Resumed)?,
            }
        }
        if asked_to_run
            && pauses.is_running()
            && machine.is_complete()
            && let Some(mut laps) = laps.take()
        {
            laps.done(Point::Attached);
            // Every thread exists and every descriptor is made, and the other threads have their filters: from here on
            // nothing new can be obtained.
            thread::confine(CoreThread::Main)?;
            laps.done(Point::Filter);
            tell(control, &FromCore::Running)?;
            machine.start();
            if let Some(marks) = laps.finish() {
                tell(control, &FromCore::Trace(marks))?;
            }
        }
    }
}

/// The next event, or none when `deadline` passes first.
fn next(events: &Receiver<Event>, deadline: Option<Instant>) -> Result<Option<Event>, Fault> {
    let gone = || Fault::internal("every thread of the core has ended");
    let Some(deadline) = deadline else { return events.recv().map(Some).map_err(|_| gone()) };
    match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(event) => Ok(Some(event)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(gone()),
    }
}

fn tell(control: &Control, message: &FromCore) -> Result<(), Fault> {
    control.send(message).map_err(|error| Fault::internal(error.to_string()))
}
