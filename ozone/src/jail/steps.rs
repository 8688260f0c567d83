//! The jail's steps: a straight list with the reason beside each, and the one function that runs it.

use std::convert::Infallible;
use std::ffi::CString;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::rc::Rc;

use caps::CapSet;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::libc::{self, c_int};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::resource::{getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{self, Gid, Uid};
use protocol::trace::now;
use seccompiler::BpfProgram;

use super::limits::Limit;
use super::{Identity, Plan, Root, sys, user};
use crate::landlock;

/// The uid and gid that a child of an ordinary user has inside its user namespace ("nobody").
pub const INSIDE: u32 = 65534;

/// The length of a [`Report`]: three numbers.
pub(super) const REPORT: usize = 24;

/// Where the executable and the processes' `/proc` are once a role's descriptors are placed; 0 to 3 are the child's own.
const EXECUTABLE: RawFd = 4;
const PROC: RawFd = 5;

/// One thing that the child does to itself.
#[derive(Clone, Debug)]
pub enum Step<'a> {
    /// Map the inside uid and gid of a new user namespace to the caller's.
    MapUser {
        /// `/proc`, where the process finds itself.
        proc: BorrowedFd<'a>,
        /// The uid outside.
        uid: u32,
        /// The gid outside.
        gid: u32,
    },
    /// Make the control group that the child was born in the root of all that it sees of them.
    CgroupNamespace,
    /// Enter the mount namespace that was made for all children of the machine, and copy it.
    Root(BorrowedFd<'a>),
    /// setsid(2).
    NewSession,
    /// Put the declared descriptors on their numbers, the status pipe after them, and close all others.
    Descriptors {
        /// What stands on number 0, 1 and so on.
        declared: Vec<BorrowedFd<'a>>,
        /// How many of them stay open when the executable runs.
        kept: usize,
    },
    /// Default dispositions, nothing blocked.
    Signals,
    /// umask(2).
    Umask,
    /// sethostname(2).
    Hostname,
    /// Make every mount of the new namespace private.
    PrivateMounts,
    /// Mount an empty read-only tmpfs over the root and enter it.
    EmptyRoot,
    /// Make the empty tmpfs the root.
    PivotRoot,
    /// Let go of the old root.
    DetachOldRoot,
    /// setrlimit(2).
    Limit(Limit),
    /// Securebits: root gains nothing, and nothing of this can be undone.
    Securebits,
    /// Empty the capability bounding set.
    BoundingSet,
    /// Empty the supplementary groups.
    Groups,
    /// setresgid(2).
    Gid(u32),
    /// Make a user namespace that knows this uid and gid alone, and be nobody else in it.
    UserNamespace(u32),
    /// setresuid(2).
    Uid(u32),
    /// Empty one capability set.
    Capabilities(CapSet),
    /// PR_SET_PDEATHSIG.
    ParentDeath,
    /// PR_SET_NO_NEW_PRIVS.
    NoNewPrivileges,
    /// Enter a Landlock domain in which nothing but the executable can be opened.
    Landlock,
    /// Install a seccomp filter.
    Filter(BpfProgram),
    /// execveat(2).
    Execute {
        /// The first and only argument.
        name: String,
    },
    /// A step of one kind of child alone.
    Special(Rc<dyn Special>),
}

/// A step that is not in the list of every child.
pub trait Special: fmt::Debug {
    /// The name in traces.
    fn name(&self) -> &'static str;

    /// The name in messages, with what it is about.
    fn title(&self) -> String {
        self.name().to_owned()
    }

    /// What to do about a failure, where something can be done: in parentheses, after a space.
    fn remedy(&self, _errno: Errno) -> String {
        String::new()
    }

    /// Carries it out, in the child.
    ///
    /// # Errors
    /// What the system call says that failed.
    fn perform(&self) -> Result<(), Errno>;
}

impl Step<'_> {
    /// What to say of it.
    pub(super) fn described(&self) -> Described {
        let special = if let Self::Special(special) = self { Some(Rc::clone(special)) } else { None };
        Described { name: self.name(), special }
    }

    /// The name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MapUser { .. } => "map user",
            Self::CgroupNamespace => "unshare cgroup namespace",
            Self::Root(_) => "enter empty root",
            Self::NewSession => "setsid",
            Self::Descriptors { .. } => "place descriptors",
            Self::Signals => "reset signals",
            Self::Umask => "umask",
            Self::Hostname => "sethostname",
            Self::PrivateMounts => "make mounts private",
            Self::EmptyRoot => "mount empty root",
            Self::PivotRoot => "pivot_root",
            Self::DetachOldRoot => "detach old root",
            Self::Limit(_) => "setrlimit",
            Self::Securebits => "lock securebits",
            Self::BoundingSet => "empty bounding set",
            Self::Groups => "setgroups",
            Self::Gid(_) => "setresgid",
            Self::UserNamespace(_) => "make user namespace",
            Self::Uid(_) => "setresuid",
            Self::Capabilities(_) => "drop capabilities",
            Self::ParentDeath => "parent-death signal",
            Self::NoNewPrivileges => "no_new_privs",
            Self::Landlock => "enter Landlock domain",
            Self::Filter(_) => "install seccomp filter",
            Self::Execute { .. } => "execveat",
            Self::Special(special) => special.name(),
        }
    }
}

/// What the parent says of a step.
#[derive(Debug)]
pub(super) struct Described {
    /// The name in traces.
    pub name: &'static str,
    special: Option<Rc<dyn Special>>,
}

impl Described {
    /// The name in messages, with what it is about.
    pub fn title(&self) -> String {
        self.special.as_ref().map_or_else(|| self.name.to_owned(), |special| special.title())
    }

    /// What to do about a failure.
    pub fn remedy(&self, errno: Errno) -> String {
        self.special.as_ref().map_or_else(|| remedy(self.name, errno).to_owned(), |special| special.remedy(errno))
    }
}

/// A step and why it is there.
#[derive(Clone, Debug)]
pub struct Planned<'a> {
    /// What is done.
    pub step: Step<'a>,
    /// Why, and why at this place.
    pub reason: &'static str,
}

/// What to do about a step that failed, where something can be done.
pub(super) fn remedy(step: &str, errno: Errno) -> &'static str {
    match (step, errno) {
        ("pivot_root", Errno::EINVAL) => " (the host runs from its initramfs: switch_root to a tmpfs or a disk first)",
        ("setresuid" | "setresgid", Errno::EINVAL) => {
            " (ozone is root of a user namespace without ids above 1,879,048,192: run it as an ordinary user there)"
        }
        ("setresuid" | "setresgid", Errno::EPERM) => " (a jailed process is never root)",
        ("make user namespace", Errno::ENOSPC) => " (see user.max_user_namespaces in sysctl)",
        ("map user", Errno::EPERM) => " (this user may not make user namespaces, or runs with capabilities)",
        ("execveat", Errno::EACCES) => {
            " (the executable has to be executable for everyone, on a mount without the noexec option)"
        }
        ("execveat", Errno::ENOENT) => " (the executable has to be linked static)",
        _ => "",
    }
}

/// CLONE_NEWTIME (clone(2), Linux 5.6). In clone3 it puts the child itself in the new namespace, whose clocks are those of
/// the old one: a trace's times stay comparable.
pub(crate) const NEWTIME: u64 = 0x80;

/// The namespaces (clone3 flags) of a child.
pub fn namespaces(plan: &Plan<'_>) -> u64 {
    let always = libc::CLONE_NEWPID // no process but its own is visible or can be signalled
        | libc::CLONE_NEWNET // no interface, no abstract unix socket
        | libc::CLONE_NEWIPC // no System V or POSIX queue of the host
        | libc::CLONE_NEWUTS; // the host's name stays unknown
    let mount = match plan.root {
        // The host's mounts are not even copied.
        Root::Made(_) => 0,
        Root::Fresh => libc::CLONE_NEWNS,
    };
    let user = match plan.identity {
        // It makes its own when it is that user: the others, made before, are not its to rule over.
        Identity::Own(_) => 0,
        // The other namespaces need a capability that an ordinary user has inside a user namespace only.
        Identity::Mapped { .. } => libc::CLONE_NEWUSER,
    };
    let time = if plan.layers.time { NEWTIME } else { 0 }; // how long the host is up stays its own
    u64::from((always | mount | user).unsigned_abs()) | time
}

/// The steps that make an empty root of a copy of the host's mounts.
pub(super) fn empty_root() -> Vec<Planned<'static>> {
    let then = |step, reason| Planned { step, reason };
    vec![
        then(Step::PrivateMounts, "before any mount: none may propagate to the host"),
        then(Step::EmptyRoot, "there is nothing to open; mounted while the process may still mount"),
        then(Step::PivotRoot, "unlike chroot it leaves no way back to the old root"),
        then(Step::DetachOldRoot, "the old root is under the new one until it is let go"),
    ]
}

/// The steps of a plan, in their order.
pub fn list<'a>(plan: &Plan<'a>) -> Vec<Planned<'a>> {
    let mut steps = Vec::new();
    let mut then = |step, reason| steps.push(Planned { step, reason });

    if let Identity::Mapped { uid, gid } = plan.identity {
        let proc = plan.proc;
        then(Step::MapUser { proc, uid, gid }, "first: later steps need a mapped uid");
    }
    // By clone3 the namespace's root would be ozone's own control group: it is taken before the child is in another.
    then(Step::CgroupNamespace, "the host's cgroup paths stay unknown; while the process may still unshare");
    match plan.root {
        Root::Made(namespace) => {
            then(Step::Root(namespace), "there is nothing to open, and no way back; no step mounts anything");
        }
        Root::Fresh => steps.extend(empty_root()),
    }
    let mut then = |step, reason| steps.push(Planned { step, reason });
    then(Step::NewSession, "no controlling terminal: nothing to push input into, no job-control signals");
    // What comes after the first four closes on exec.
    let declared = vec![plan.null, plan.null, plan.log, plan.control, plan.executable, plan.proc];
    then(Step::Descriptors { declared, kept: 4 }, "only what was declared is open, however much ozone's caller leaked");
    then(Step::Signals, "the caller's ignored and blocked signals would survive execveat");
    then(Step::Umask, "a file that a child should ever make is its own");
    then(Step::Hostname, "the copied host name says which host this is");

    for limit in &plan.limits {
        then(Step::Limit(*limit), limit.reason);
    }

    let lock = |then: &mut dyn FnMut(Step<'a>, &'static str)| {
        then(Step::Securebits, "needs CAP_SETPCAP, so before the capabilities go");
        then(Step::BoundingSet, "needs CAP_SETPCAP too; no execve can ever bring a capability back");
    };
    match plan.identity {
        Identity::Own(id) if plan.layers.user => {
            then(Step::Groups, "needs CAP_SETGID; root's groups would open root's files");
            then(Step::Gid(id), "before the uid: needs CAP_SETGID");
            then(Step::UserNamespace(id), "whatever it should ever gain counts for nothing on the host");
            then(Step::Uid(id), "no other process of the host has this uid");
            // A new user namespace begins with no securebit and every capability.
            lock(&mut then);
        }
        Identity::Own(id) => {
            // The change of uid takes the capability that it needs.
            lock(&mut then);
            then(Step::Groups, "needs CAP_SETGID; root's groups would open root's files");
            then(Step::Gid(id), "before the uid: needs CAP_SETGID");
            then(Step::Uid(id), "no other process of the host has this uid");
        }
        // setgroups is denied in a user namespace without privilege: the caller's groups stay, outside of the map.
        Identity::Mapped { .. } => {
            lock(&mut then);
            then(Step::Gid(INSIDE), "real, effective and saved gid alike");
            then(Step::Uid(INSIDE), "real, effective and saved uid alike");
        }
    }
    then(Step::Capabilities(CapSet::Ambient), "not cleared by the change of uid when securebits say so");
    then(Step::Capabilities(CapSet::Effective), "a change of uid leaves them in a user namespace");
    then(Step::Capabilities(CapSet::Permitted), "after the effective ones, which it bounds");
    then(Step::Capabilities(CapSet::Inheritable), "untouched by every step before");
    then(Step::ParentDeath, "after the change of uid, which clears it; covers the time until main asks again");
    then(Step::NoNewPrivileges, "Landlock and seccomp ask for it; set-uid files gain nothing");
    if plan.layers.landlock {
        then(Step::Landlock, "should a descriptor ever lead to a directory, nothing in it can be opened");
    }
    for filter in &plan.filters {
        then(Step::Filter(filter.clone()), "last: no step above passes it");
    }
    then(Step::Execute { name: plan.process.to_string() }, "an empty environment, one argument");
    steps
}

/// Runs the steps in the child and becomes the executable. Does not return.
pub(super) fn run(trace: bool, steps: &[Planned<'_>], status: BorrowedFd<'_>) -> Infallible {
    let mut status = status;
    let report = |index, errno, status| {
        let report = Report { index, errno, at: if trace { now() } else { 0 } };
        let _ = unistd::write(status, &report.to_bytes());
    };
    if trace {
        report(0, None, status);
    }
    for (index, planned) in (1..).zip(steps) {
        let outcome = perform(&planned.step, status);
        if outcome.is_ok()
            && let Step::Descriptors { declared, .. } = &planned.step
        {
            status = sys::placed(declared.len() as RawFd);
        }
        match outcome {
            Ok(()) if !trace => {}
            Ok(()) => report(index, None, status),
            Err(errno) => {
                report(index, Some(errno), status);
                break;
            }
        }
    }
    sys::exit_at_once()
}

/// What the child tells about a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// The step's place in the list, from 1; 0 is its birth.
    pub index: usize,
    /// Why it failed; without it the step is done, which is told if a trace is wanted.
    pub errno: Option<Errno>,
    /// When, if a trace is wanted.
    pub at: u64,
}

impl Report {
    pub(super) fn to_bytes(&self) -> [u8; REPORT] {
        let mut bytes = [0; REPORT];
        let numbers = [u64::try_from(self.index).unwrap_or(u64::MAX), self.errno.map_or(0, |it| it as u64), self.at];
        for (place, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }

    /// A report from its bytes, if they are one.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; REPORT] = bytes.try_into().ok()?;
        let mut numbers = bytes.chunks_exact(8).filter_map(|it| Some(u64::from_ne_bytes(it.try_into().ok()?)));
        let index = usize::try_from(numbers.next()?).ok()?;
        let errno = i32::try_from(numbers.next()?).ok()?;
        let errno = (errno != 0).then(|| Errno::from_raw(errno));
        Some(Self { index, errno, at: numbers.next()? })
    }
}

pub(super) fn perform(step: &Step<'_>, status: BorrowedFd<'_>) -> Result<(), Errno> {
    match step {
        Step::MapUser { proc, uid, gid } => user::map(*proc, (INSIDE, *uid), (INSIDE, *gid)),
        Step::CgroupNamespace => unshare(CloneFlags::CLONE_NEWCGROUP),
        Step::Root(namespace) => {
            setns(namespace, CloneFlags::CLONE_NEWNS)?;
            // A copy of one mount; the other children are in the original no more than this one stays there.
            unshare(CloneFlags::CLONE_NEWNS)
        }
        Step::NewSession => unistd::setsid().map(drop),
        Step::Descriptors { declared, kept } => {
            let mut declared = declared.clone();
            declared.push(status);
            sys::place_descriptors(&declared, *kept)
        }
        Step::Signals => sys::reset_signals(),
        Step::Umask => {
            umask(Mode::S_IRWXG | Mode::S_IRWXO);
            Ok(())
        }
        Step::Hostname => unistd::sethostname("jail"),
        Step::PrivateMounts => {
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        }
        Step::EmptyRoot => {
            let root = sys::empty_tmpfs()?;
            sys::mount_over_root(root.as_fd())?;
            unistd::fchdir(&root)
        }
        // With both arguments the same the old root ends up on top of the new one, where "." finds it (pivot_root(2), NOTES).
        Step::PivotRoot => unistd::pivot_root(".", "."),
        Step::DetachOldRoot => {
            umount2(".", MntFlags::MNT_DETACH)?;
            unistd::chdir("/")
        }
        Step::Limit(limit) => {
            // Never raised: that would take a capability, and whoever started ozone may have meant it.
            let (_, hard) = getrlimit(limit.resource)?;
            let value = limit.value.min(hard);
            setrlimit(limit.resource, value, value)
        }
        Step::Securebits => {
            caps::securebits::set_keepcaps(false).map_err(|_| Errno::last())?;
            sys::set_securebits(SECUREBITS)
        }
        Step::BoundingSet => caps::clear(None, CapSet::Bounding).map_err(|_| Errno::last()),
        Step::Groups => unistd::setgroups(&[]),
        // 0 is root, and -1 means "leave it as it is" to the system call, which is root as well.
        Step::Gid(0 | u32::MAX) | Step::UserNamespace(0 | u32::MAX) | Step::Uid(0 | u32::MAX) => Err(Errno::EPERM),
        Step::Gid(id) => unistd::setresgid(Gid::from_raw(*id), Gid::from_raw(*id), Gid::from_raw(*id)),
        Step::UserNamespace(id) => user::namespace(sys::placed(PROC), *id),
        Step::Uid(id) => unistd::setresuid(Uid::from_raw(*id), Uid::from_raw(*id), Uid::from_raw(*id)),
        Step::Capabilities(set) => caps::clear(None, *set).map_err(|_| Errno::last()),
        Step::ParentDeath => prctl::set_pdeathsig(Signal::SIGKILL),
        Step::NoNewPrivileges => prctl::set_no_new_privs(),
        Step::Landlock => landlock::execute_alone(sys::placed(EXECUTABLE)),
        Step::Filter(program) => seccompiler::apply_filter(program).map_err(|_| Errno::last()),
        Step::Execute { name } => {
            let name = CString::new(name.as_str()).map_err(|_| Errno::EINVAL)?;
            let nothing: [&CString; 0] = [];
            unistd::execveat(sys::placed(EXECUTABLE), c"", &[&name], &nothing, AtFlags::AT_EMPTY_PATH).map(drop)
        }
        Step::Special(special) => special.perform(),
    }
}

/// Uid 0 means nothing, capabilities are neither kept nor raised, and all of that is locked. The automatic drop of
/// capabilities on a change of uid (SECBIT_NO_SETUID_FIXUP clear) is locked as it is.
pub(crate) const SECUREBITS: c_int = libc::SECBIT_NOROOT
    | libc::SECBIT_NOROOT_LOCKED
    | libc::SECBIT_NO_SETUID_FIXUP_LOCKED
    | libc::SECBIT_KEEP_CAPS_LOCKED
    | libc::SECBIT_NO_CAP_AMBIENT_RAISE
    | libc::SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::Layers;
    use crate::process::Process;
    use std::fs::File;

    fn names(identity: Identity, made: bool, layers: Layers) -> Vec<&'static str> {
        let null = File::open("/dev/null").unwrap();
        let plan = Plan {
            process: Process::Core,
            executable: null.as_fd(),
            identity,
            layers,
            root: if made { Root::Made(null.as_fd()) } else { Root::Fresh },
            proc: null.as_fd(),
            cgroup: None,
            limits: super::super::limits::for_role(seccomp::Role::Core, 1 << 20),
            filters: vec![Vec::new(), Vec::new()],
            null: null.as_fd(),
            log: null.as_fd(),
            control: null.as_fd(),
            trace: false,
        };
        let steps = list(&plan);
        assert!(steps.iter().all(|planned| planned.reason.len() > 8));
        steps.iter().map(|planned| planned.step.name()).collect()
    }

    const ALL: Layers = Layers { time: true, user: true, landlock: true };
    const NONE: Layers = Layers { time: false, user: false, landlock: false };

    fn place(names: &[&str], name: &str) -> usize {
        names.iter().position(|candidate| *candidate == name).unwrap_or_else(|| panic!("{name} is missing"))
    }

    #[test]
    fn privileges_go_in_the_only_order_that_works() {
        let names = names(Identity::Own(0x7000_0000), true, ALL);
        let order = [
            "unshare cgroup namespace",
            "enter empty root",
            "place descriptors",
            "setrlimit",
            "setgroups",
            "setresgid",
            "make user namespace",
            "setresuid",
            "lock securebits",
            "empty bounding set",
            "drop capabilities",
            "no_new_privs",
            "enter Landlock domain",
            "install seccomp filter",
            "execveat",
        ];
        let places: Vec<usize> = order.iter().map(|name| place(&names, name)).collect();
        assert!(places.is_sorted(), "{names:?}");
        assert_eq!(names.iter().filter(|name| **name == "install seccomp filter").count(), 2);
        assert_eq!(names.last(), Some(&"execveat"));
        for name in ["map user", "make mounts private", "mount empty root", "pivot_root", "detach old root"] {
            assert!(!names.contains(&name), "{name}");
        }
    }

    #[test]
    fn without_root_the_user_map_comes_first_and_groups_stay() {
        let names = names(Identity::Mapped { uid: 1000, gid: 1000 }, false, ALL);
        assert_eq!(place(&names, "map user"), 0);
        assert!(!names.contains(&"setgroups") && !names.contains(&"make user namespace"));
        let order = ["make mounts private", "mount empty root", "pivot_root", "detach old root", "place descriptors"];
        assert!(order.map(|name| place(&names, name)).is_sorted(), "{names:?}");
    }

    #[test]
    fn what_the_kernel_lacks_is_left_out() {
        let names = names(Identity::Own(0x7000_0000), true, NONE);
        assert!(!names.contains(&"make user namespace") && !names.contains(&"enter Landlock domain"));
        let before = |name: &str| place(&names, name) < place(&names, "setresuid");
        assert!(before("lock securebits") && before("empty bounding set"), "{names:?}");
    }

    #[test]
    fn a_report_reads_back() {
        for report in
            [Report { index: 7, errno: Some(Errno::EINVAL), at: 0 }, Report { index: 0, errno: None, at: u64::MAX }]
        {
            let bytes = report.to_bytes();
            assert_eq!(Report::parse(&bytes), Some(report));
            assert_eq!(Report::parse(&bytes[..8]), None);
        }
        assert_eq!(Report::parse(&[]), None);
    }
}
