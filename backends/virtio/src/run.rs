//! The life of a backend process.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::Signal;
use protocol::trace::{Laps, Point, now};
use protocol::{DeviceSpec, Fault, FromBackend, LinkError, ToBackend};
use seccomp::Role;

use crate::descriptor::{self, Wake};
use crate::device::{Device, Opened, QueueHandler};
use crate::heartbeat::Heartbeat;
use crate::outbox::{Control, Errand, Outbox};
use crate::server::{self, Server};
use crate::threads;
use crate::worker::Worker;

/// Is a backend of `role`: takes what `ozone` sends, opens the device with `open`, and serves it to the core until the
/// core or `ozone` is gone.
///
/// `on_parent_death` is the signal that ends this process when `ozone` dies.
pub fn run<D: Device>(
    role: Role,
    on_parent_death: Signal,
    open: impl FnOnce(DeviceSpec, &Outbox) -> Result<Opened<D>, Fault>,
) -> ExitCode {
    let entered = now();
    protocol::log::install();
    if let Err(error) = protocol::process::enter(on_parent_death) {
        log::error!("prepare the process: {error}");
        return ExitCode::FAILURE;
    }
    if let Err(error) = seccomp::install_setup(role) {
        log::error!("{error}");
        return ExitCode::FAILURE;
    }
    let control = match Control::inherited() {
        Ok(control) => Arc::new(control),
        // The machine has come to its end before this process began.
        Err(LinkError::Closed) => return ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}: this program is started by ozone, not by hand");
            return ExitCode::FAILURE;
        }
    };
    match backend(role, &control, open, entered) {
        Ok(reason) => {
            log::info!("{role} ends: {reason}");
            ExitCode::SUCCESS
        }
        Err(fault) => {
            log::error!("{fault}");
            if let Err(error) = control.try_send(&FromBackend::Failed(fault)) {
                log::warn!("report the failure: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

/// One launch, top to bottom; returns why the process ends.
fn backend<D: Device>(
    role: Role,
    control: &Arc<Control>,
    open: impl FnOnce(DeviceSpec, &Outbox) -> Result<Opened<D>, Fault>,
    entered: u64,
) -> Result<String, Fault> {
    let start = match control.receive() {
        Ok(ToBackend::Start(start)) => start,
        Ok(_) => return Err(Fault::internal("the first message to a backend was not 'start'")),
        Err(LinkError::Closed) => return Ok("ozone has gone".into()),
        Err(error) => return Err(Fault::internal(error.to_string())),
    };
    let mut laps = Laps::new(start.trace, entered);
    laps.done(Point::Told);
    let (outbox, errands, wake) =
        Outbox::new(Arc::clone(control)).map_err(|errno| Fault::host(format!("make an eventfd: {errno}")))?;
    let Opened { device, queues } = open(start.spec, &outbox)?;
    laps.done(Point::Open);
    let device = Arc::new(device);
    let socket = UnixStream::from(start.socket.into_fd());
    let outcome = serve(role, control, &device, queues, socket, &Errands { outbox, errands, wake }, laps);
    device.close();
    outcome
}

/// The errands of the main thread, from both ends.
struct Errands {
    outbox: Outbox,
    errands: Receiver<Errand>,
    wake: Arc<Wake>,
}

/// Serves an open device until the core or `ozone` is gone; returns why.
fn serve<D: Device>(
    role: Role,
    control: &Control,
    device: &Arc<D>,
    queues: Vec<Box<dyn QueueHandler>>,
    socket: UnixStream,
    errands: &Errands,
    mut laps: Laps,
) -> Result<String, Fault> {
    // Every thread has to exist before the run filter: there is no clone(2) in it.
    let outbox = &errands.outbox;
    let workers = (0..).zip(queues).map(|(queue, handler)| Worker::spawn(queue, handler, outbox.clone()));
    let workers = workers.collect::<Result<Vec<_>, _>>()?;
    let watched = workers.iter().map(Worker::watched).collect();
    let mut heartbeat = Heartbeat::new(watched, &errands.wake);
    let outbox = outbox.clone();
    let server = Server::new(Arc::clone(device), workers, outbox.clone());
    let (go, gate) = channel::<()>();
    let thread = move || {
        if gate.recv().is_ok() {
            outbox.end(server::serve(socket, server));
        }
    };
    threads::start("vhost-user", thread)?;
    laps.done(Point::Threads);

    seccomp::install_run(role).map_err(|error| Fault::host(error.to_string()))?;
    laps.done(Point::Filter);
    let _ = go.send(());
    let trace = laps.finish().map(FromBackend::Trace);
    let sent = control.send(&FromBackend::Ready).and_then(|()| trace.map_or(Ok(()), |trace| control.send(&trace)));
    match sent {
        Ok(()) => {}
        Err(LinkError::Closed) => return Ok("ozone has gone".into()),
        Err(error) => return Err(Fault::internal(error.to_string())),
    }
    loop {
        wait(control, &errands.wake)?;
        let alive = heartbeat.answer().map(|number| Errand::Send(FromBackend::Alive { number }));
        for errand in alive.into_iter().chain(errands.errands.try_iter()) {
            match errand {
                Errand::Send(message) => match control.try_send(&message) {
                    Ok(()) => {}
                    // Nothing that is sent matters once more than ozone's socket holds is waiting there.
                    Err(LinkError::WouldBlock) => log::warn!("ozone does not read: a message to it was dropped"),
                    Err(LinkError::Closed) => return Ok("ozone has gone".into()),
                    Err(error) => return Err(Fault::internal(error.to_string())),
                },
                Errand::End(reason) => return Ok(reason),
            }
        }
        match control.try_receive() {
            Ok(ToBackend::Ping { number }) => {
                heartbeat.ask(number);
                // Threads that rest do not wake this one: it looks again.
                errands.wake.raise();
            }
            Ok(message) if device.message(&message) => {}
            Ok(_) => return Err(Fault::internal("ozone sent a message that this device does not expect")),
            Err(LinkError::WouldBlock) => {}
            Err(LinkError::Closed) => return Ok("ozone has gone".into()),
            Err(error) => return Err(Fault::internal(error.to_string())),
        }
    }
}

/// Waits for a message of `ozone` or an errand.
fn wait(control: &Control, wake: &Wake) -> Result<(), Fault> {
    let mut fds = [PollFd::new(control.as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
    match descriptor::wait(&mut fds, None) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(Fault::host(format!("wait for messages: {errno}"))),
    }
    if fds[1].any() == Some(true) {
        wake.lower();
    }
    Ok(())
}
