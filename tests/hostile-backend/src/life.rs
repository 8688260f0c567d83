//! The life of the process, as a backend's is, and how it goes wrong.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::Signal;
use protocol::{Channel, DeviceSpec, Fault, FromBackend, LinkError, ToBackend};
use seccomp::Role;

use crate::image::Image;
use crate::play::{Launch, Play, Serving};
use crate::server::{Next, Server};

type Control = Channel<FromBackend, ToBackend>;

/// How many messages or lines come at once in a flood.
const WAVE: u64 = 200;

/// From the first instruction to the end.
pub fn live() -> Result<(), String> {
    protocol::log::install();
    protocol::process::enter(Signal::SIGKILL).map_err(|error| error.to_string())?;
    seccomp::install_setup(Role::Blk).map_err(|error| error.to_string())?;
    let control = match Control::inherited() {
        Ok(control) => control,
        Err(LinkError::Closed) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    let start = match control.receive() {
        Ok(ToBackend::Start(start)) => start,
        Ok(_) => return Err("the first message was not 'start'".to_owned()),
        Err(LinkError::Closed) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    let DeviceSpec::Blk(spec) = start.spec else { return Err("not a disk".to_owned()) };
    let image = Image::open(spec.image.into_fd())?;
    let play = Play::of(&spec.serial, image.start);
    log::info!("start {}: {play:?}", image.start);
    let sentinel = spec.sentinel.into_fd();
    let mut server = Server::new(start.socket.into_fd(), image, spec.serial, spec.queues, play, sentinel);
    seccomp::install_run(Role::Blk).map_err(|error| error.to_string())?;
    match play {
        Play::Launch(Launch::NeverReady) => {}
        Play::Launch(Launch::Failed) => tell(&control, &FromBackend::Failed(Fault::host("a play")))?,
        Play::Launch(Launch::ExitWell) => return Ok(()),
        Play::Launch(Launch::ExitBadly) => return Err("a play".to_owned()),
        Play::Launch(Launch::ReadyTwice) => {
            tell(&control, &FromBackend::Ready)?;
            tell(&control, &FromBackend::Ready)?;
        }
        _ => tell(&control, &FromBackend::Ready)?,
    }
    serve(&control, &mut server, play)
}

fn tell(control: &Control, message: &FromBackend) -> Result<(), String> {
    match control.try_send(message) {
        Ok(()) | Err(LinkError::WouldBlock) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Serves the core, `ozone` and the driver until one of the first two is gone.
fn serve(control: &Control, server: &mut Server, play: Play) -> Result<(), String> {
    loop {
        let (talks, asked, kicked) = wait(control, server, play)?;
        if let Play::Serving(serving) = play {
            flood(control, serving)?;
        }
        if asked {
            match control.try_receive() {
                Ok(ToBackend::Ping { number }) => alive(control, play, number)?,
                Ok(_) | Err(LinkError::WouldBlock) => {}
                Err(LinkError::Closed) => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
        }
        if talks && server.request(control.as_fd())? == Next::End {
            return Ok(());
        }
        for index in kicked {
            server.kicked(index)?;
        }
    }
}

/// Waits for the core, `ozone` and the driver: whether the first two have something, and which queues were kicked.
fn wait(control: &Control, server: &Server, play: Play) -> Result<(bool, bool, Vec<usize>), String> {
    let input = PollFlags::POLLIN;
    let mut fds = vec![PollFd::new(control.as_fd(), input)];
    fds.extend(server.socket.iter().map(|socket| PollFd::new(socket.as_fd(), input)));
    let kicks = fds.len();
    let running: Vec<_> = (0..).zip(&server.vrings).filter(|(_, vring)| vring.is_running()).collect();
    fds.extend(running.iter().filter_map(|(_, vring)| Some(PollFd::new(vring.kick.as_ref()?.as_fd(), input))));
    // A flood does not wait.
    let timeout = matches!(play, Play::Serving(Serving::FloodControl | Serving::FloodLog)).then_some(Duration::ZERO);
    match ppoll(&mut fds, timeout.map(Into::into), None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(format!("wait: {errno}")),
    }
    let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
    let is = |index: usize| ready.get(index).copied().unwrap_or(false);
    let kicked = (kicks..).zip(&running).filter(|(at, _)| is(*at)).map(|(_, (index, _))| *index).collect();
    Ok((kicks > 1 && is(1), is(0), kicked))
}

/// The answer to a question for a sign of life.
fn alive(control: &Control, play: Play, number: u64) -> Result<(), String> {
    match play {
        Play::Serving(Serving::NoAlive) => Ok(()),
        Play::Serving(Serving::WrongAlive) => tell(control, &FromBackend::Alive { number: number ^ 1 << 63 }),
        _ => tell(control, &FromBackend::Alive { number }),
    }
}

fn flood(control: &Control, serving: Serving) -> Result<(), String> {
    for number in 0..WAVE {
        match serving {
            Serving::FloodControl => tell(control, &FromBackend::Alive { number })?,
            Serving::FloodLog => log::info!("flood {number}"),
            Serving::Resubmitted => tell(control, &FromBackend::Resubmitted { requests: u32::MAX })?,
            Serving::NoAlive | Serving::WrongAlive => return Ok(()),
        }
    }
    Ok(())
}
