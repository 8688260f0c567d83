//! A child in the jail, and what its parent knows of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Each executable of tests uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;
use ozone::jail::{self, Entering, Ground, Identity, JailError, Layers, Plan, limits};
use ozone::process::Process;
use seccomp::Role;
use seccompiler::BpfProgram;

/// A uid that nothing else on the host has.
pub const OWN: u32 = 0x7000_0000 + 63 * 64 + 7;

/// How long a child may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A child that runs this executable in its jail.
pub struct Child {
    /// The process.
    pub jailed: jail::Jailed,
    /// Its control channel.
    pub control: UnixStream,
    /// The read end of its log.
    pub log: OwnedFd,
}

/// Puts this executable in the jail of `role`.
pub fn spawn_as(
    process: Process,
    role: Role,
    identity: Identity,
    filters: Vec<BpfProgram>,
) -> Result<Child, JailError> {
    enter(process, role, identity, filters, None).and_then(awaited)
}

/// A child that is on its way, once it is there.
pub fn awaited((entering, control, log): (Entering, UnixStream, OwnedFd)) -> Result<Child, JailError> {
    Ok(Child { jailed: entering.wait(PATIENCE)?, control, log })
}

/// What the jails stand on: those of root, with children of their own uids, or those of an ordinary user.
pub fn ground(identity: Identity) -> &'static Ground {
    static GROUNDS: [OnceLock<Ground>; 2] = [const { OnceLock::new() }; 2];
    let (ground, identity) = match identity {
        Identity::Own(_) => (&GROUNDS[0], Identity::Own(OWN)),
        identity => (&GROUNDS[1], identity),
    };
    ground.get_or_init(|| Ground::make(identity).unwrap())
}

/// A child that was cloned and is on its way, its control channel, and its log.
pub fn enter(
    process: Process,
    role: Role,
    identity: Identity,
    filters: Vec<BpfProgram>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<(Entering, UnixStream, OwnedFd), JailError> {
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    enter_with(process, role, identity, filters, cgroup, (null.as_fd(), ground(identity).layers()))
}

/// The same with something else for descriptors 0 and 1, and fewer layers perhaps.
pub fn enter_with(
    process: Process,
    role: Role,
    identity: Identity,
    filters: Vec<BpfProgram>,
    cgroup: Option<BorrowedFd<'_>>,
    (null, layers): (BorrowedFd<'_>, Layers),
) -> Result<(Entering, UnixStream, OwnedFd), JailError> {
    let ground = ground(identity);
    let executable = open("/proc/self/exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    let (log, log_end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    let (control, theirs) = UnixStream::pair().unwrap();
    control.set_read_timeout(Some(PATIENCE)).unwrap();
    let plan = Plan {
        process,
        executable: executable.as_fd(),
        identity,
        layers,
        root: ground.root(),
        proc: ground.as_fd(),
        cgroup,
        limits: limits::for_role(role, 128 << 20),
        filters,
        null,
        log: log_end.as_fd(),
        control: theirs.as_fd(),
        trace: false,
    };
    Ok((jail::spawn(&plan)?, control, log))
}

impl Child {
    /// What the child said about itself.
    pub fn report(&mut self) -> BTreeMap<String, String> {
        let mut text = Vec::new();
        let mut byte = [0];
        while self.control.read(&mut byte).unwrap() == 1 && byte[0] != 0 {
            text.push(byte[0]);
        }
        assert!(!text.is_empty(), "the child said nothing, and on its log: {}", self.log_text());
        let text = String::from_utf8(text).unwrap();
        text.lines().filter_map(|line| line.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect()
    }

    /// What is on its log.
    pub fn log_text(&self) -> String {
        let mut bytes = [0; 4096];
        let length = nix::unistd::read(&self.log, &mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    /// A file of it in /proc.
    pub fn proc(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.jailed.pid())
    }

    /// A field of its status in /proc.
    pub fn status(&self, key: &str) -> String {
        let text = fs::read_to_string(self.proc("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::trim));
        line.unwrap_or_else(|| panic!("no {key} in {text}")).replace('\t', " ")
    }
}

/// The child's own end of its control channel.
pub fn inherited() -> OwnedFd {
    // Through the standard streams' number 0 (the null device) nothing can be read, so the control socket is duplicated by
    // the one safe way there is: from a descriptor borrowed as a raw number by nix.
    #[allow(unsafe_code)]
    // SAFETY: the jail leaves a descriptor 3, and this is called once.
    unsafe {
        std::os::fd::FromRawFd::from_raw_fd(3)
    }
}
