//! A child's user namespace (user_namespaces(7)): it knows one uid and one gid.

use std::os::fd::BorrowedFd;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{Uid, seteuid};

use super::procfs;

/// Puts this process, which is root, into a new user namespace in which `id`, a uid and an equal gid, is all there is. The
/// effective uid is `id` from then on.
///
/// The process has the gid already and no other group.
pub(super) fn namespace(proc: BorrowedFd<'_>, id: u32) -> Result<(), Errno> {
    // The effective uid of whoever makes a namespace owns it and may map itself. The saved uid is still root's: so the
    // permitted capabilities stay, for some hosts leave user namespaces to CAP_SYS_ADMIN.
    seteuid(Uid::from_raw(id))?;
    let making = CapsHashSet::from([Capability::CAP_SYS_ADMIN]);
    caps::set(None, CapSet::Effective, &making).map_err(|_| Errno::last())?;
    unshare(CloneFlags::CLONE_NEWUSER)?;
    // The files are root's unless the process is dumpable (proc(5)); it has a uid of its own, so that nobody else gains by it.
    prctl::set_dumpable(true)?;
    let mapped = map(proc, (id, id), (id, id));
    prctl::set_dumpable(false)?;
    mapped
}

/// Maps a uid and a gid, each as inside and outside of this process's user namespace.
pub(super) fn map(proc: BorrowedFd<'_>, uid: (u32, u32), gid: (u32, u32)) -> Result<(), Errno> {
    // setgroups has to be denied before a gid map is accepted of a process without privilege outside.
    procfs::write(proc, "setgroups", "deny")?;
    procfs::write(proc, "uid_map", &format!("{} {} 1", uid.0, uid.1))?;
    procfs::write(proc, "gid_map", &format!("{} {} 1", gid.0, gid.1))
}
