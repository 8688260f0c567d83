//! The first process of a program's jail, which is no program of its own.
//!
//! The kernel keeps signals without a handler from the first process of a pid namespace, and has it take in every process
//! that loses its parent (pid_namespaces(7)). A program that does not know of that would not end on SIGTERM, would not abort,
//! and would be surrounded by the dead. So the process that went through the steps of the jail stays as the first one,
//! and the program is its child.
//!
//! It is as confined as the program, has none of its capabilities, one descriptor, and a filter of six system calls. It neither
//! allocates nor looks at anything that the program could write.

use std::os::fd::{AsFd, RawFd};

use caps::CapSet;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, write};
use seccompiler::BpfProgram;

use super::sys;
use crate::jail::steps::Special;

/// Where the pipe is on which the first process tells how the program ended; 0 to 2 are the program's own.
pub const ENDING: RawFd = 3;

/// What the first process ends with, if it fails itself.
const FAILED: i32 = 125;

/// Makes the program's process; the process that carries this out stays behind as the first one.
#[derive(Debug)]
pub struct Fork {
    /// The first process's filter.
    pub filter: BpfProgram,
}

impl Special for Fork {
    fn name(&self) -> &'static str {
        "fork the program"
    }

    fn remedy(&self, errno: Errno) -> String {
        match errno {
            Errno::EAGAIN => {
                " (pids.max of its cgroup is below 2, or nproc of --resource-limit, which counts all of the \
                              user's processes, and the jail's first)"
                    .to_owned()
            }
            Errno::EPIPE => " (ozone was ended)".to_owned(),
            _ => String::new(),
        }
    }

    fn perform(&self) -> Result<(), Errno> {
        // ozone may have been killed before the kernel was asked to tell of that.
        let mut ending = [PollFd::new(sys::placed(ENDING), PollFlags::empty())];
        if poll(&mut ending, PollTimeout::ZERO)? > 0 {
            return Err(Errno::EPIPE);
        }
        // From before the program's birth: none that comes for it may be lost.
        sys::block_signals(true)?;
        match sys::fork()? {
            None => sys::block_signals(false),
            Some(program) => watch(program, &self.filter),
        }
    }
}

/// The life of the first process.
fn watch(program: Pid, filter: &BpfProgram) -> ! {
    if confine(filter).is_err() {
        sys::exit_at_once(FAILED);
    }
    loop {
        let Some(arrived) = sys::next_signal() else { continue };
        if arrived.signal == libc::SIGCHLD {
            while let Some((pid, status)) = sys::ended_child() {
                if pid == program {
                    let _ = write(sys::placed(ENDING).as_fd(), &status.to_ne_bytes());
                    sys::exit_at_once(0);
                }
            }
        } else if arrived.from_outside {
            // The program has the same uid as this process, so that it can send signals here: those stay here.
            sys::send(program, arrived.signal);
        }
    }
}

fn confine(filter: &BpfProgram) -> Result<(), Errno> {
    sys::close_all_but(ENDING)?;
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set).map_err(|_| Errno::last())?;
    }
    seccompiler::apply_filter(filter).map_err(|_| Errno::last())
}
