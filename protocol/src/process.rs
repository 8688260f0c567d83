//! What every jailed process does before anything else.

use std::io;

use nix::sys::prctl;
use nix::sys::signal::Signal;

/// Takes the process name from the first argument, forbids core dumps and ptrace by the same user, and asks for
/// `on_parent_death` when `ozone` dies.
///
/// It is called first thing in `main`: `execve` has just reset all three (prctl(2), PR_SET_DUMPABLE and
/// PR_SET_PDEATHSIG). Should `ozone` have died already, the control socket reads as closed.
///
/// # Errors
/// What prctl(2) answers.
pub fn enter(on_parent_death: Signal) -> io::Result<()> {
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
