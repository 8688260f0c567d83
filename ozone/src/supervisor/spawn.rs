//! One child: its pipes, its channel, and its way into its jail.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use protocol::Channel;

use super::log_pipe::LogPipe;
use super::processes::Link;
use super::{Setting, SupervisorError};
use crate::jail::{self, Entering, Plan, limits};
use crate::process::Process;

/// A child on its way, and ozone's ends of what connects them.
pub struct Entered {
    /// Its name.
    pub process: Process,
    /// The child.
    pub child: Entering,
    /// Its control channel.
    pub link: Link,
    /// Its log.
    pub log: LogPipe,
}

/// Clones the child at `place` into its jail: 0 is the core, the others are devices in their order.
///
/// # Errors
/// [`SupervisorError`], without a child left behind.
pub fn enter(setting: &Setting<'_>, place: usize, traced: bool) -> Result<Entered, SupervisorError> {
    let Setting { spec, resources, uids, ground, cgroups, trace, .. } = setting;
    let device = place.checked_sub(1).and_then(|index| spec.devices.get(index));
    let process =
        device.map_or(Process::Core, |device| Process::Backend { kind: device.kind(), device: device.id.clone() });
    let role = process.role();
    let (log, log_end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(make("pipe", &process))?;
    let failed = |error| SupervisorError::Link { process: process.to_string(), error };
    let (link, control) = match process {
        Process::Core => Channel::pair().map(|(ours, theirs)| (Link::Core(ours), theirs)).map_err(failed)?,
        Process::Backend { .. } => {
            Channel::pair().map(|(ours, theirs)| (Link::Backend(ours), theirs)).map_err(failed)?
        }
    };
    let start = trace.now();
    let filters =
        seccomp::launch_filters(role).map_err(|error| SupervisorError::Filter { process: process.clone(), error })?;
    trace.done(start, &"compile filters");
    let plan = Plan {
        executable: resources.executable(&process).as_fd(),
        // The board has far fewer slots than a byte has values.
        identity: uids.identity(u8::try_from(place).unwrap_or(u8::MAX)),
        layers: ground.layers(),
        root: ground.root(),
        proc: ground.as_fd(),
        cgroup: cgroups.leaf(place),
        limits: limits::for_role(role, spec.memory.value.size),
        filters,
        null: resources.null.as_fd(),
        log: log_end.as_fd(),
        control: control.as_fd(),
        trace: traced,
        process,
    };
    let child = jail::spawn(&plan)?;
    Ok(Entered { process: plan.process, child, link, log: LogPipe::new(log) })
}

/// What it means that the host did not give something for `process`.
pub fn make(operation: &'static str, process: &Process) -> impl Fn(Errno) -> SupervisorError {
    let process = process.clone();
    move |errno| SupervisorError::Make { operation, process: process.clone(), errno }
}
