//! What `ozone` itself gives up once everything of the host is open.
//!
//! It stays the one process with privilege, for it starts a lost device's process again in a fresh jail. Of its capabilities
//! it keeps those that this takes, of the host's files those that it will open again, and of the system calls those that it
//! and its children make. docs/decisions/0011 says why it is done in this way.

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::geteuid;
use protocol::Fault;
use seccomp::forbidden;

use crate::landlock::Domain;

/// What is kept, and what for (capabilities(7)). Each child gives up these as well, in its jail.
const KEPT: [(Capability, &str); 7] = [
    (Capability::CAP_SYS_ADMIN, "a child's namespaces"),
    (Capability::CAP_SYS_CHROOT, "a child enters the mount namespace with the empty root"),
    (Capability::CAP_SETUID, "a child's uid"),
    (Capability::CAP_SETGID, "a child's gid, and no supplementary groups"),
    (Capability::CAP_SETPCAP, "a child's bounding set and securebits"),
    (Capability::CAP_KILL, "signals to children, which have uids of their own"),
    (Capability::CAP_DAC_OVERRIDE, "images that belong to other users are opened anew for each process of a disk"),
];

/// Gives up core dumps, and every capability but those that are needed to start processes, and any way to new ones; then all files but those
/// that `allow` names, TCP ports, and signals to any process but its own; then every system call that it does not need.
///
/// An ordinary user's children make their own mounts, which nothing in a Landlock domain may: there it is without one, and its
/// filter lets mounts through. Nor are there capabilities to give up.
///
/// # Errors
/// A host fault when the kernel refuses.
pub fn confine(landlock: bool, allow: impl FnOnce(&mut Domain) -> Result<(), Errno>) -> Result<(), Fault> {
    let is_root = geteuid().is_root();
    dump_nothing(is_root)?;
    keep(&KEPT.map(|(capability, _)| capability))?;
    if is_root && landlock {
        let entered = Domain::new().and_then(|mut domain| {
            allow(&mut domain)?;
            domain.enter()
        });
        entered.map_err(|errno| failed("Landlock domain", &errno))?;
    }
    forbidden::report_of_ozone().map_err(|error| failed("SIGSYS handler", &error))?;
    seccomp::install_ozone(!is_root).map_err(|error| failed("filter", &error))
}

/// Leaves no core dump: that of root's `ozone` would show what other users' files it was handed.
///
/// An ordinary user's stays dumpable, that is, his own: the files in /proc of what is not are root's alone, and the audit of that
/// user would see none of the namespaces that the others' are told from (proc(5), ptrace(2)). His other processes could trace it
/// then, and they are him already; the roles are in user namespaces below, which lets them trace nothing outside.
fn dump_nothing(is_root: bool) -> Result<(), Fault> {
    // A program that takes dumps by a pipe gets them whatever the limit, but of a dumpable process alone (core(5)).
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|errno| failed("RLIMIT_CORE", &errno))?;
    if is_root { prctl::set_dumpable(false).map_err(|errno| failed("dumpable", &errno)) } else { Ok(()) }
}

/// Gives up every capability but these, and any way to new ones.
///
/// # Errors
/// A host fault when the kernel refuses.
pub fn keep(kept: &[Capability]) -> Result<(), Fault> {
    prctl::set_no_new_privs().map_err(|errno| failed("no_new_privs", &errno))?;
    if geteuid().is_root() {
        reduce_capabilities(kept).map_err(|(what, error)| failed(what, &error))?;
    }
    Ok(())
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> Fault {
    Fault::host(format!("{what} of ozone itself: {error}"))
}

fn reduce_capabilities(kept: &[Capability]) -> Result<(), (&'static str, caps::errors::CapsError)> {
    let held = caps::read(None, CapSet::Permitted).map_err(|error| ("read the capabilities", error))?;
    let kept: CapsHashSet = kept.iter().copied().filter(|it| held.contains(it)).collect();
    for capability in
        caps::runtime::procfs_all_supported(None).unwrap_or_else(|_| caps::runtime::thread_all_supported())
    {
        if !kept.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).map_err(|error| ("drop a capability", error))?;
        }
    }
    let none = CapsHashSet::new();
    // The effective set first: it is a part of the permitted one.
    for (set, value) in [(CapSet::Effective, &kept), (CapSet::Permitted, &kept), (CapSet::Inheritable, &none)] {
        caps::set(None, set, value).map_err(|error| ("reduce the capabilities", error))?;
    }
    Ok(())
}
