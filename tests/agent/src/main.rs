//! Init of the test host: sets the machine up, says that it is ready, and carries out what it is told.

mod boot;
mod entropy;
mod files;
mod root;
mod serve;

use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

fn main() {
    let stage = std::env::args().nth(1).unwrap_or_default();
    let result = match stage.as_str() {
        "serve" => serve::serve(),
        "init" => init(),
        _ => root::move_to_tmpfs(),
    };
    if let Err(error) = result {
        eprintln!("agent {stage}: {error:#}");
        if std::process::id() == 1 {
            power_off();
        }
        std::process::exit(1);
    }
}

/// Process 1: sets up, starts the server, and reaps whatever loses its parent.
fn init() -> Result<()> {
    boot::set_up()?;
    let server = Command::new("/init").arg("serve").spawn().context("start the server")?;
    let server = Pid::from_raw(i32::try_from(server.id())?);
    loop {
        let status = waitpid(None, None).context("wait")?;
        if status.pid() == Some(server) && !matches!(status, WaitStatus::StillAlive) {
            eprintln!("agent: server ended: {status:?}");
            power_off();
        }
    }
}

fn power_off() -> ! {
    nix::unistd::sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(error) => unreachable!("power off: {error}"),
    }
}
