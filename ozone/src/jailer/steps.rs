//! The steps of a program's jail: those of the roles as far as a program of unknown nature can bear them, and its own.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::setrlimit;
use nix::unistd;

use super::host::Host;
use super::init::{ENDING, Fork};
use super::rlimit::ResourceLimit;
use super::root::{Bind, Empty, Seal, names};
use super::source::Uses;
use super::spec::JailSpec;
use super::sys;
use crate::jail::set_securebits;
use crate::jail::steps::{NEWTIME, Planned, SECUREBITS, Special, Step};

/// What the child's descriptors are.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors<'a> {
    /// What the program has as 0, 1 and 2.
    pub standard: [BorrowedFd<'a>; 3],
    /// The write end of the pipe on which its end is told.
    pub ending: BorrowedFd<'a>,
}

/// The namespaces (clone3 flags) of the jail. `root` is whether `ozone` runs as root.
pub fn namespaces(spec: &JailSpec, root: bool) -> u64 {
    let always = libc::CLONE_NEWPID // no process but its own is visible or can be signalled
        | libc::CLONE_NEWNS // a root of its own
        | libc::CLONE_NEWIPC // no System V or POSIX queue of the host
        | libc::CLONE_NEWUTS; // the host's name stays unknown
    // Without a network namespace that was asked for: no interface, no abstract unix socket.
    let net = if spec.netns.is_some() { 0 } else { libc::CLONE_NEWNET };
    // The other namespaces need a capability that an ordinary user has inside a user namespace only.
    let user = if root { 0 } else { libc::CLONE_NEWUSER };
    // How long the host is up stays its own, where the kernel has clocks for that (CONFIG_TIME_NS).
    let time = if Path::new("/proc/self/ns/time").exists() { NEWTIME } else { 0 };
    u64::from((always | net | user).unsigned_abs()) | time
}

/// The steps of the jail, in their order.
pub fn list<'a>(spec: &JailSpec, host: &Host, descriptors: Descriptors<'a>, root: bool) -> Vec<Planned<'a>> {
    let mut steps = Vec::new();
    let mut then = |step, reason| steps.push(Planned { step, reason });
    let program = host.program.id;

    if !root {
        let map = MapOwn { uid: spec.uid, gid: spec.gid };
        then(special(map), "first: it needs the host's /proc, and later steps need a mapped uid");
    }
    if let Some(namespace) = &host.netns {
        let namespace = Rc::clone(namespace);
        then(special(JoinNetwork { namespace }), "while the descriptor of it is open, and the process may");
    }
    then(Step::CgroupNamespace, "the host's cgroup paths stay unknown; while the process may still unshare");
    then(Step::NewSession, "no controlling terminal: nothing to push input into, no job-control signals");
    let [input, output, error] = descriptors.standard;
    debug_assert_eq!(ENDING, 3);
    let declared = vec![input, output, error, descriptors.ending];
    then(Step::Descriptors { declared, kept: 3 }, "only 0 to 2 are the program's, however much ozone's caller leaked");
    then(Step::Signals, "the caller's ignored and blocked signals would survive execve");
    then(special(Personality), "whoever started ozone may have had addresses that are not random");
    then(Step::Hostname, "the copied host name says which host this is");

    then(Step::PrivateMounts, "before any mount: none may propagate to the host");
    let targets = spec.sources.iter().map(|source| &source.target).chain([&spec.target]);
    let places = targets.map(|target| names(target).count()).sum();
    then(special(Empty { places }), "there is nothing to open but what is mounted in it now");
    for (source, found) in spec.sources.iter().zip(&host.sources) {
        then(
            special(Bind {
                title: format!("mount {}", source.argument),
                path: source.path.clone(),
                found: found.id,
                target: source.target.clone(),
                uses: source.uses,
            }),
            "while the host's paths can be seen; restricted before it is anywhere",
        );
    }
    then(
        special(Bind {
            title: format!("mount --exec-file {}", spec.program.display()),
            path: spec.program.clone(),
            found: program,
            target: spec.target.clone(),
            uses: Uses { execute: true, ..Uses::default() },
        }),
        "read-only even to its owner: no copy is made of it",
    );
    then(Step::PivotRoot, "unlike chroot it leaves no way back to the old root");
    then(Step::DetachOldRoot, "the old root is under the new one until it is let go");
    then(special(Seal), "every place is made");
    then(Step::Umask, "a file that the program makes is its own; after the places in the root");

    for limit in &spec.limits {
        then(special(Limit(*limit)), "while a hard limit may still be raised");
    }
    privileges(spec, root, &mut then);
    then(Step::ParentDeath, "after the change of uid, which clears it: what is in the jail ends with ozone");
    then(Step::NoNewPrivileges, "seccomp asks for it; set-uid files gain nothing");
    then(
        special(Fork { filter: host.init_filter.clone() }),
        "the first process stays; before the filters, which are the program's",
    );
    for filter in &host.filters {
        then(Step::Filter(filter.clone()), "last: no step above passes it");
    }
    let (arguments, environment) = (spec.arguments.clone(), spec.environment.clone());
    let interpreter = host.program.interpreter.clone();
    then(
        special(Execute { path: spec.target.clone(), arguments, environment, interpreter }),
        "by its place in the root, where nobody can have put another",
    );
    steps
}

/// The change to the program's user, and the capabilities.
fn privileges<'a>(spec: &JailSpec, root: bool, then: &mut impl FnMut(Step<'a>, &'static str)) {
    let kept = &spec.capabilities;
    if kept.is_empty() {
        then(Step::Securebits, "needs CAP_SETPCAP, so before the capabilities go");
        then(Step::BoundingSet, "needs CAP_SETPCAP too; no execve can ever bring a capability back");
    } else {
        then(special(BoundingTo(kept.clone())), "needs CAP_SETPCAP; no execve can ever bring another capability back");
        then(special(KeepAcross), "the change of uid would clear what is kept");
    }
    if root {
        then(Step::Groups, "needs CAP_SETGID; root's groups would open root's files");
    }
    if spec.uid == 0 || spec.gid == 0 {
        let ids = AnyIds { uid: spec.uid, gid: spec.gid };
        then(special(ids), "group before user: needs CAP_SETGID; root is what was asked for");
    } else {
        then(Step::Gid(spec.gid), "before the uid: needs CAP_SETGID");
        then(Step::Uid(spec.uid), "real, effective and saved uid alike");
    }
    if kept.is_empty() {
        then(Step::Capabilities(CapSet::Ambient), "not cleared by the change of uid when securebits say so");
        then(Step::Capabilities(CapSet::Effective), "a change of uid leaves them in a user namespace");
        then(Step::Capabilities(CapSet::Permitted), "after the effective ones, which it bounds");
        then(Step::Capabilities(CapSet::Inheritable), "untouched by every step before");
    } else {
        then(special(Ambient(kept.clone())), "after the change of uid; securebits are locked when they are raised");
    }
}

fn special<'a>(step: impl Special + 'static) -> Step<'a> {
    Step::Special(Rc::new(step))
}

/// Maps the uid and gid of an ordinary user to themselves in a new user namespace.
#[derive(Debug)]
struct MapOwn {
    uid: u32,
    gid: u32,
}

impl Special for MapOwn {
    fn name(&self) -> &'static str {
        "map user"
    }

    fn remedy(&self, errno: Errno) -> String {
        match errno {
            Errno::EPERM => " (this user may not make user namespaces, or runs with capabilities)".to_owned(),
            _ => String::new(),
        }
    }

    fn perform(&self) -> Result<(), Errno> {
        let write = |path: &str, text: String| {
            std::fs::write(path, text)
                .map_err(|error| error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw))
        };
        // setgroups has to be denied before an unprivileged gid map is accepted (user_namespaces(7)).
        write("/proc/self/setgroups", "deny".to_owned())?;
        write("/proc/self/uid_map", format!("{0} {0} 1", self.uid))?;
        write("/proc/self/gid_map", format!("{0} {0} 1", self.gid))
    }
}

/// Joins a network namespace.
#[derive(Debug)]
struct JoinNetwork {
    namespace: Rc<OwnedFd>,
}

impl Special for JoinNetwork {
    fn name(&self) -> &'static str {
        "join network namespace"
    }

    fn perform(&self) -> Result<(), Errno> {
        setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET)
    }
}

/// The personality that processes have (personality(2)).
#[derive(Debug)]
struct Personality;

impl Special for Personality {
    fn name(&self) -> &'static str {
        "reset personality"
    }

    fn perform(&self) -> Result<(), Errno> {
        sys::reset_personality()
    }
}

/// One resource limit, soft and hard.
#[derive(Debug)]
struct Limit(ResourceLimit);

impl Special for Limit {
    fn name(&self) -> &'static str {
        "setrlimit"
    }

    fn title(&self) -> String {
        format!("--resource-limit {}", self.0.name)
    }

    fn remedy(&self, errno: Errno) -> String {
        match errno {
            Errno::EPERM => {
                " (it is above the hard limit of ozone itself, which it may not raise: see ulimit -H)".to_owned()
            }
            _ => String::new(),
        }
    }

    fn perform(&self) -> Result<(), Errno> {
        let ResourceLimit { resource, soft, hard, given, .. } = self.0;
        if given {
            return setrlimit(resource, soft, hard);
        }
        // Nobody asked for it: whoever started ozone may have meant less.
        let (_, most) = nix::sys::resource::getrlimit(resource)?;
        setrlimit(resource, soft.min(most), hard.min(most))
    }
}

/// Empties the bounding set but for what is kept.
#[derive(Debug)]
struct BoundingTo(CapsHashSet);

impl Special for BoundingTo {
    fn name(&self) -> &'static str {
        "reduce bounding set"
    }

    fn perform(&self) -> Result<(), Errno> {
        let known = caps::runtime::procfs_all_supported(None).unwrap_or_else(|_| caps::runtime::thread_all_supported());
        for capability in known.difference(&self.0) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(|_| Errno::last())?;
        }
        Ok(())
    }
}

/// Has permitted capabilities outlive the change of uid (PR_SET_KEEPCAPS).
#[derive(Debug)]
struct KeepAcross;

impl Special for KeepAcross {
    fn name(&self) -> &'static str {
        "keep capabilities"
    }

    fn perform(&self) -> Result<(), Errno> {
        caps::securebits::set_keepcaps(true).map_err(|_| Errno::last())
    }
}

/// Has these capabilities in all sets, those that execve hands on among them, and no others; and locks the securebits.
#[derive(Debug)]
struct Ambient(CapsHashSet);

impl Special for Ambient {
    fn name(&self) -> &'static str {
        "reduce capabilities"
    }

    fn remedy(&self, errno: Errno) -> String {
        match errno {
            Errno::EPERM => " (ozone has not got them all itself)".to_owned(),
            _ => String::new(),
        }
    }

    fn perform(&self) -> Result<(), Errno> {
        let set = |set, value: &CapsHashSet| caps::set(None, set, value).map_err(|_| Errno::last());
        let kept = &self.0;
        let mut meanwhile = kept.clone();
        // For the securebits.
        meanwhile.insert(Capability::CAP_SETPCAP);
        set(CapSet::Effective, &meanwhile)?;
        set(CapSet::Inheritable, kept)?;
        set(CapSet::Ambient, kept)?;
        caps::securebits::set_keepcaps(false).map_err(|_| Errno::last())?;
        set_securebits(SECUREBITS)?;
        set(CapSet::Effective, kept)?;
        set(CapSet::Permitted, kept)
    }
}

/// A uid and gid one of which is 0.
#[derive(Debug)]
struct AnyIds {
    uid: u32,
    gid: u32,
}

impl Special for AnyIds {
    fn name(&self) -> &'static str {
        "setresuid"
    }

    fn perform(&self) -> Result<(), Errno> {
        sys::set_ids(self.uid, self.gid)
    }
}

/// Becomes the program.
#[derive(Debug)]
struct Execute {
    path: std::path::PathBuf,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    interpreter: Option<String>,
}

impl Special for Execute {
    fn name(&self) -> &'static str {
        "execve"
    }

    fn title(&self) -> String {
        format!("execute {}", self.path.display())
    }

    fn remedy(&self, errno: Errno) -> String {
        match (errno, &self.interpreter) {
            (Errno::ENOENT, Some(interpreter)) => format!(
                " (it is not linked static, and its interpreter {interpreter} is not in the jail: give that, as --source \
                 {interpreter}:exec, and the program's libraries likewise)"
            ),
            (Errno::EACCES, Some(interpreter)) => format!(
                " (its user may not execute its interpreter {interpreter}, or the source of that is without the key exec: \
                 --source {interpreter}:exec)"
            ),
            (Errno::EACCES, None) => " (it is on a mount of the host's with the noexec option)".to_owned(),
            (Errno::EPERM, _) => " (the file of --seccomp has to let execve pass)".to_owned(),
            (Errno::ENOEXEC, _) => " (it is no program of this machine's)".to_owned(),
            _ => String::new(),
        }
    }

    fn perform(&self) -> Result<(), Errno> {
        let path = CString::new(self.path.as_os_str().as_encoded_bytes()).map_err(|_| Errno::EINVAL)?;
        unistd::execve(&path, &self.arguments, &self.environment).map(drop)
    }
}
