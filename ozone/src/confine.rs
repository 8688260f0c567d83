//! What `ozone` itself gives up once everything of the host is open.
//!
//! It stays the one process with privilege, for it starts a lost device's process again in a fresh jail; of its capabilities
//! it keeps those that this takes.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::geteuid;
use protocol::Fault;

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

/// Gives up every capability but those that are needed to start processes, and any way to new ones.
///
/// As an ordinary user there is nothing to give up but the way to new ones.
///
/// # Errors
/// A host fault when the kernel refuses.
pub fn confine() -> Result<(), Fault> {
    let failed = |what: &str, error: &dyn std::fmt::Display| Fault::host(format!("{what} of ozone itself: {error}"));
    prctl::set_no_new_privs().map_err(|errno| failed("no_new_privs", &errno))?;
    if !geteuid().is_root() {
        return Ok(());
    }
    let held = caps::read(None, CapSet::Permitted).map_err(|error| failed("read the capabilities", &error))?;
    let kept: CapsHashSet = KEPT.iter().map(|(capability, _)| *capability).filter(|it| held.contains(it)).collect();
    for capability in
        caps::runtime::procfs_all_supported(None).unwrap_or_else(|_| caps::runtime::thread_all_supported())
    {
        if !kept.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).map_err(|error| failed("drop a capability", &error))?;
        }
    }
    let none = CapsHashSet::new();
    // The effective set first: it is a part of the permitted one.
    for (set, value) in [(CapSet::Effective, &kept), (CapSet::Permitted, &kept), (CapSet::Inheritable, &none)] {
        caps::set(None, set, value).map_err(|error| failed("reduce the capabilities", &error))?;
    }
    Ok(())
}
