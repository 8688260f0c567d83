//! Control groups (cgroup v2, cgroups(7)): what a machine may use of its host, and what it uses.
//!
//! A machine has one group, with a leaf for each of its processes. A leaf stays for the whole run, so that the next
//! process of a device has what the last one had; a child is born in its leaf (clone3(2), CLONE_INTO_CGROUP). Everything
//! is held by descriptors of directories and goes with [`Cgroups`].

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::geteuid;
use protocol::{Fault, FaultKind};

use crate::control::message::Usage;
use crate::exit::OomKill;
use crate::journal::{Entry, Identity, Journal, JournalError, Object};
use crate::landlock::{Domain, Right};
use crate::report;
use crate::spec::VmSpec;
use crate::spec::limits::{Key, Limits, MOUNT, parse_list};

mod delegated;
mod directory;
mod leftover;
mod numa;
mod place;
mod plan;
mod usage;

use directory::Directory;
pub use leftover::{undo, undo_common, undo_controllers};
use place::{COMMON, Parent, Place};
use plan::Plan;
pub use plan::Setting;

/// How long the last machine of the same name may take to let go.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long killed processes may take to be gone. They may be waiting for a device of the host.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// The group in a machine's group for all of its processes but `ozone`.
const JAILED: &str = "jailed";

/// Where the controllers for the groups in a group are.
const SUBTREE: &str = "cgroup.subtree_control";

/// Who is in a group.
const PROCS: &str = "cgroup.procs";

/// What an ordinary user can do.
const SCOPE: &str = "'systemd-run --user --scope -p Delegate=yes ozone run …'";

/// Why a machine cannot have control groups, or one of its limits.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has the first version, or both.
    #[error("{MOUNT} is not cgroup v2 alone; boot the host with systemd.unified_cgroup_hierarchy=1")]
    Unsupported,
    /// An ordinary user has none.
    #[error("this user has no cgroup to make others in; start ozone in one, as {SCOPE}")]
    NotDelegated,
    /// The parent that was asked for is not there.
    #[error("{argument}: {}; it has to be a cgroup that exists", .errno.desc())]
    Parent {
        /// The argument.
        argument: String,
        /// What openat2(2) says.
        errno: Errno,
    },
    /// The NUMA node cannot be had.
    #[error("{argument}: {problem}")]
    Numa {
        /// The argument.
        argument: String,
        /// Why.
        problem: String,
    },
    /// It cannot be written down that a group is about to be made.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Another machine has the group.
    #[error("{}: a running machine has this cgroup; a machine needs another --name or --cgroup-parent", .0.display())]
    Taken(PathBuf),
    /// The system says no.
    #[error("{operation} {}: {}{}", .path.display(), .errno.desc(), remedy(*.errno))]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// A controller cannot be had.
    #[error("controller {controller} cannot be enabled in {}: {}{}", .path.display(), .errno.desc(), controller_remedy(*.errno))]
    Controller {
        /// Its name.
        controller: String,
        /// The file in which it would be.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// The kernel does not take a value.
    #[error("{} refuses {value}: {}{}", .path.display(), .errno.desc(), value_remedy(*.errno))]
    Value {
        /// The value.
        value: String,
        /// The file.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// Not all processors or nodes of a list are there for the machine.
    #[error("of {value} the machine can have only {}; see {}", if .effective.is_empty() { "none" } else { .effective }, .path.display())]
    Ineffective {
        /// What was asked for.
        value: String,
        /// What there is.
        effective: String,
        /// The file that says so.
        path: PathBuf,
    },
}

impl CgroupError {
    fn kind(&self) -> FaultKind {
        match self {
            Self::Parent { .. } | Self::Numa { .. } | Self::Taken(_) | Self::Ineffective { .. } => FaultKind::Input,
            Self::Value { errno: Errno::EINVAL | Errno::ERANGE | Errno::ENODEV, .. } => FaultKind::Input,
            _ => FaultKind::Host,
        }
    }

    /// Whether the text begins with the argument already.
    fn names_argument(&self) -> bool {
        matches!(self, Self::Parent { .. } | Self::Numa { .. })
    }
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EACCES | Errno::EPERM => {
            "; it has to belong to this user, as a cgroup of 'systemd-run --user --scope -p Delegate=yes' does"
        }
        Errno::EROFS => "; mount it writable, or run ozone outside of this container",
        Errno::EAGAIN => "; see cgroup.max.descendants and cgroup.max.depth of the cgroups above",
        _ => "",
    }
}

fn controller_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EBUSY => "; processes are in that cgroup: move them into one below it, or give another --cgroup-parent",
        Errno::ENOENT => "; neither the kernel nor a cgroup above offers it",
        Errno::EOPNOTSUPP => "; that cgroup is threaded, give another --cgroup-parent",
        other => remedy(other),
    }
}

fn value_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENODEV => "; there is no such block device: see lsblk",
        Errno::ENOENT => "; this kernel lacks it",
        Errno::ERANGE | Errno::EINVAL => "; there is no such thing on this host",
        other => remedy(other),
    }
}

/// The control groups of one machine, if it has any. Dropping it ends all that is in them and removes them.
#[derive(Debug)]
pub struct Cgroups {
    groups: Option<Groups>,
}

#[derive(Debug)]
struct Groups {
    place: Place,
    parent: Directory,
    /// The machine's group; its lock is held for as long as the machine runs, however it ends.
    machine: Directory,
    name: String,
    /// The group in it for every process but `ozone`, which has to outlive them when memory is short.
    jailed: Option<Directory>,
    /// That of `ozone`, the core's, and the devices' in their order.
    leaves: Vec<Leaf>,
    /// Whether `ozone` is in its leaf.
    inside: Cell<bool>,
    journal: Journal,
    noted: Noted,
}

/// What the journal says of the groups.
#[derive(Debug, Default)]
struct Noted {
    /// The group of all machines.
    common: Option<Entry>,
    /// The controllers in the group that `ozone` came from.
    controllers: Option<Entry>,
    /// The machine's group.
    machine: Option<Entry>,
    /// The leaf of `ozone`.
    ozone: Option<Entry>,
    /// The group of all others, and the leaves in it.
    jailed: Vec<Entry>,
}

/// The group of one process.
#[derive(Debug)]
struct Leaf {
    name: String,
    process: String,
    directory: Directory,
}

impl Cgroups {
    /// Makes the groups of a machine and writes its limits into them.
    ///
    /// Where no limit is asked for a machine runs without groups as well, and that is said.
    ///
    /// # Errors
    /// An input or host fault for a limit that cannot be had, naming its argument.
    pub fn make(spec: &VmSpec, journal: &Journal) -> Result<Self, Fault> {
        Self::made(Groups::of_machine(spec, journal), spec.limits.argument())
    }

    /// Makes the groups of the program that `ozone jail` runs as `name`, and tells `record` their path before. `settings` are
    /// its limits; place and NUMA node are as for a machine.
    ///
    /// # Errors
    /// As [`Self::make`], and what `record` says.
    pub fn make_for_program(
        name: &str,
        limits: &Limits,
        settings: Vec<Setting>,
        record: impl FnOnce(&Path) -> Result<(), Fault>,
    ) -> Result<Self, Fault> {
        let argument = settings.iter().find_map(|setting| setting.argument.clone());
        let argument = argument.as_deref().or(limits.argument());
        let prepared = numa_settings(limits).and_then(|numa| {
            let plan = Plan::of_program(name, settings.into_iter().chain(numa).collect());
            Ok((plan, Place::find(limits)?))
        });
        match prepared {
            Ok((plan, place)) => {
                record(&place.parent.path().join(&plan.name))?;
                Self::made(Groups::make(place, &plan, &Journal::none()), argument)
            }
            Err(error) => Self::made(Err(general(error)), argument),
        }
    }

    /// What came of it: where no limit is asked for the lack of groups is said.
    fn made(outcome: Result<Groups, About>, argument_of_any: Option<&str>) -> Result<Self, Fault> {
        match outcome {
            Ok(groups) => Ok(Self { groups: Some(groups) }),
            Err((argument, error)) => match argument.as_deref().or(argument_of_any) {
                None => {
                    report::warn(&format!("no cgroups: {error}"));
                    Ok(Self { groups: None })
                }
                Some(_) if error.names_argument() => Err(Fault { kind: error.kind(), message: error.to_string() }),
                Some(argument) => Err(Fault { kind: error.kind(), message: format!("{argument}: {error}") }),
            },
        }
    }

    /// The directory of the leaf for the process at this place in the machine: 0 for the core, 1 and up for devices.
    pub fn leaf(&self, place: usize) -> Option<BorrowedFd<'_>> {
        // The first leaf is that of `ozone`.
        let leaf = self.groups.as_ref()?.leaves.get(place.checked_add(1)?)?;
        Some(leaf.directory.as_fd())
    }

    /// What is read, written and removed while the machine runs, and at its end.
    ///
    /// # Errors
    /// See [`Domain::allow`].
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        self.groups.as_ref().map_or(Ok(()), |groups| groups.allow(domain))
    }

    /// Moves `ozone` into its leaf, if it is not there.
    ///
    /// This takes the kernel some 10 ms, in which it waits for all processors of the host (percpu_down_write), so it is
    /// done when the guest runs.
    pub fn enter(&self) {
        let Some(groups) = &self.groups else { return };
        if let Err(error) = groups.enter() {
            report::warn(&format!("ozone stays in the cgroup that it was started in: {error}"));
        }
    }

    /// What the machine uses; nothing if it has no groups.
    pub fn usage(&self) -> Option<Usage> {
        let groups = self.groups.as_ref()?;
        let leaves = groups.leaves.iter().map(|leaf| (leaf.process.as_str(), &leaf.directory));
        Some(usage::read(&groups.machine, leaves))
    }

    /// What the kernel killed of the machine because memory was short, if it did.
    pub fn oom_kill(&self) -> Option<OomKill> {
        let groups = self.groups.as_ref()?;
        let processes = usage::kills(&groups.machine);
        let jailed = groups.jailed.as_ref().unwrap_or(&groups.machine);
        // A word for no limit is no number.
        let limit = || jailed.read(Key::MemoryMax.file()).ok()?.trim().parse().ok();
        (processes > 0).then(|| OomKill { processes, limit: limit() })
    }

    /// Says so when the kernel killed processes of the program that `ozone jail` runs because memory was short.
    pub fn tell_program_kills(&self) {
        let Some(OomKill { processes, limit }) = self.oom_kill() else { return };
        report::warn(&match limit {
            Some(limit) => format!(
                "the program needed more memory than it may have, and the kernel killed its processes \
                 (memory.max {limit}, {processes} killed); give more with --cgroup memory.max=…"
            ),
            None => format!(
                "the host, or a cgroup above the program's, was short of memory, and the kernel killed its processes \
                 ({processes} killed)"
            ),
        });
    }
}

/// Whether there is a group at this path, relative to the root of the hierarchy.
pub fn is_there(path: &Path) -> bool {
    Directory::root(Path::new(MOUNT)).is_ok_and(|root| root.is_unified() && root.open(path).is_ok())
}

/// Removes a group that a killed `ozone jail` left, with all that is in it; whether it was there. `path` is as it was recorded.
///
/// # Errors
/// [`CgroupError`] when it stays.
pub fn remove_left(path: &Path) -> Result<bool, CgroupError> {
    let (Some(parent_path), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(false);
    };
    let root = Directory::root(Path::new(MOUNT)).map_err(|_| CgroupError::Unsupported)?;
    let opened = root.open(parent_path).and_then(|parent| Ok((parent.open(Path::new(name))?, parent)));
    let was_there = match opened {
        Ok((group, parent)) if group.claim(&parent, name) => {
            clear(&parent, &group, name, Instant::now() + KILL_PATIENCE)?;
            true
        }
        Ok(_) => return Err(CgroupError::Taken(root.path().join(path))),
        Err(Errno::ENOENT) => false,
        Err(errno) => return Err(file("open", root.path().join(path), errno)),
    };
    if parent_path == Path::new(COMMON) {
        // It may have been made, or be left, without the group. Not when another one is in it.
        let _ = root.remove(COMMON);
    }
    Ok(was_there)
}

/// An error, and the argument that it is about if there is one in particular.
type About = (Option<String>, CgroupError);

/// An error that is about the groups as such.
fn general(error: CgroupError) -> About {
    (None, error)
}

/// The processors of the node that was asked for, if one was.
fn numa_processors(limits: &Limits) -> Result<Option<String>, CgroupError> {
    let processors = limits.numa.as_ref().map(|node| {
        let problem = |problem| CgroupError::Numa { argument: node.argument.clone(), problem };
        numa::processors(Path::new(numa::NODES), node.value).map_err(problem)
    });
    processors.transpose()
}

/// What that node is written down as.
fn numa_settings(limits: &Limits) -> Result<Vec<Setting>, CgroupError> {
    let processors = numa_processors(limits)?;
    let Some((node, processors)) = limits.numa.as_ref().zip(processors) else { return Ok(Vec::new()) };
    Ok(Setting::of_node(node, &processors).into())
}

impl Groups {
    fn of_machine(spec: &VmSpec, journal: &Journal) -> Result<Self, About> {
        let numa = numa_processors(&spec.limits).map_err(general)?;
        let plan = Plan::new(spec, numa.as_deref(), std::process::id());
        let place = Place::find(&spec.limits).map_err(general)?;
        Self::make(place, &plan, journal)
    }

    fn make(place: Place, plan: &Plan, journal: &Journal) -> Result<Self, About> {
        let (parent, machine, noted) = noted_claim(&place, &plan.name, journal).map_err(general)?;
        let name = plan.name.clone();
        let (leaves, inside) = (Vec::new(), Cell::new(false));
        let journal = journal.clone();
        let mut groups = Self { place, parent, machine, name, jailed: None, leaves, inside, journal, noted };
        groups.fill(plan)?;
        groups.sweep();
        Ok(groups)
    }

    fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        domain.allow(&self.machine, Right::ReadFile | Right::WriteFile | Right::ReadDir | Right::RemoveDir)?;
        domain.allow(&self.parent, Right::RemoveDir)?;
        match self.place.parent {
            Parent::Common => domain.allow(&self.place.root, Right::RemoveDir)?,
            Parent::Own(_) => self.parent.allow(domain, SUBTREE, Right::ReadFile | Right::WriteFile)?,
            Parent::Given(_) => {}
        }
        // Where `ozone` goes back to.
        for place in self.place.origin.iter().chain([&self.place.root]) {
            place.allow(domain, PROCS, Right::WriteFile.into())?;
        }
        Ok(())
    }

    /// Makes a group in another, with its entry in the journal.
    fn make_in(&self, parent: &Directory, name: &str) -> Result<(Directory, Entry), CgroupError> {
        let path = parent.path_of(name);
        let path = path.strip_prefix(self.place.root.path()).unwrap_or(&path).to_owned();
        self.journal.make(Object::Cgroup { path }, || {
            let group = make(parent, name)?;
            let identity = group.id().ok().map(Identity::File);
            Ok((group, identity))
        })
    }

    fn make_leaf(&self, parent: &Directory, planned: &plan::Leaf) -> Result<(Leaf, Entry), About> {
        let (directory, entry) = self.make_in(parent, &planned.name).map_err(general)?;
        Ok((Leaf { name: planned.name.clone(), process: planned.process.clone(), directory }, entry))
    }

    /// Makes the leaves and writes every value.
    fn fill(&mut self, plan: &Plan) -> Result<(), About> {
        let mut leaves = plan.leaves.iter();
        if let Some(ozone) = leaves.next() {
            let (leaf, entry) = self.make_leaf(&self.machine, ozone)?;
            self.leaves.push(leaf);
            self.noted.ozone = Some(entry);
        }
        // A group with processes in it cannot have controllers for those below; and a user who cannot come in from where
        // ozone is cannot clone into it either, so that is found out now.
        if matches!(self.place.parent, Parent::Own(_)) || !geteuid().is_root() {
            self.enter().map_err(general)?;
        }
        let path = self.place.parent.path().to_owned();
        let chain =
            self.place.chain().map_err(|errno| (None, file("open", self.place.root.path().join(path), errno)))?;
        let mut missing = enable(&chain, &plan.needed_of_machine(), &plan::WISHED_OF_MACHINE)?;
        let (memory, others): (Vec<_>, Vec<_>) = plan.machine.iter().partition(|it| it.controller() == "memory");
        for setting in others {
            set(&self.machine, setting)?;
        }
        let needed_of_jailed: Vec<_> = plan.needed_of_jailed();
        missing.extend(enable(std::slice::from_ref(&self.machine), &needed_of_jailed, &plan::WISHED_OF_MACHINE)?);
        let (jailed, entry) = self.make_in(&self.machine, JAILED).map_err(general)?;
        self.noted.jailed.push(entry);
        let jailed = self.jailed.insert(jailed);
        for setting in memory {
            set(jailed, setting)?;
        }
        // None of them is of use without the others, and to end one gives no memory back that they share.
        let _ = jailed.write("memory.oom.group", "1");
        missing.extend(enable(std::slice::from_ref(jailed), &plan.needed_of_leaves(), &plan::WISHED_OF_PROCESS)?);
        for leaf in leaves {
            let Some(jailed) = &self.jailed else { break };
            let (leaf, entry) = self.make_leaf(jailed, leaf)?;
            self.leaves.push(leaf);
            self.noted.jailed.push(entry);
        }
        for (leaf, planned) in self.leaves.iter().zip(&plan.leaves) {
            for setting in &planned.settings {
                set(&leaf.directory, setting)?;
            }
        }
        missing.sort_unstable();
        missing.dedup();
        if !missing.is_empty() {
            let (path, missing) = (self.parent.path().display(), missing.join(", "));
            report::warn(&format!("cgroups: no {missing} in {path}: 'ozone stat' lacks it, and so do default limits"));
        }
        Ok(())
    }

    fn enter(&self) -> Result<(), CgroupError> {
        // Without a way back it stays where it is: its leaf could not be removed.
        let Some(leaf) = self.leaves.first().filter(|_| !self.inside.get() && self.place.origin.is_some()) else {
            return Ok(());
        };
        join(&leaf.directory)?;
        self.inside.set(true);
        Ok(())
    }

    /// Moves `ozone` back to where it was started, or else to the root.
    fn leave(&self) -> Result<(), CgroupError> {
        if !self.inside.get() {
            return Ok(());
        }
        if matches!(self.place.parent, Parent::Own(_)) {
            // As long as the group has controllers for those below, no process can be in it. From the inside out; one
            // that another machine needs stays.
            for directory in [&self.machine, &self.parent] {
                for controller in directory.words(SUBTREE).unwrap_or_default() {
                    let _ = directory.write(SUBTREE, &format!("-{controller}"));
                }
            }
        }
        let places = self.place.origin.iter().chain(std::iter::once(&self.place.root));
        let mut outcome = Ok(());
        for place in places {
            outcome = join(place);
            if outcome.is_ok() {
                self.inside.set(false);
                break;
            }
        }
        outcome
    }

    /// Removes what killed machines without a name have left: those with one give way to the next of the name.
    fn sweep(&self) {
        if self.place.parent != Parent::Common {
            return;
        }
        for name in self.parent.children() {
            let dead = plan::unnamed_pid(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
            if dead
                && let Ok(machine) = self.parent.open(Path::new(&name))
                && machine.claim(&self.parent, &name)
            {
                let _ = clear(&self.parent, &machine, &name, Instant::now());
            }
        }
    }

    fn remove(&mut self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + KILL_PATIENCE;
        if let Some(jailed) = &self.jailed {
            clear(&self.machine, jailed, JAILED, deadline)?;
        }
        self.noted.jailed.drain(..).rev().for_each(Entry::undone);
        self.leave()?;
        if let Some(leaf) = self.leaves.first() {
            remove(&self.machine, &leaf.directory, &leaf.name, deadline)?;
        }
        self.noted.ozone.take().into_iter().for_each(Entry::undone);
        remove(&self.parent, &self.machine, &self.name, deadline)?;
        self.noted.machine.take().into_iter().for_each(Entry::undone);
        self.noted.controllers.take().into_iter().for_each(Entry::undone);
        if let Some(common) = self.noted.common.take() {
            // Not when another machine is in it, whose it is then.
            let _ = self.place.root.remove(COMMON);
            common.undone();
        }
        Ok(())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            report::warn(&format!("a cgroup stays: {error}"));
        }
    }
}

fn file(operation: &'static str, path: PathBuf, errno: Errno) -> CgroupError {
    CgroupError::File { operation, path, errno }
}

/// Makes the machine's group, as [`claim`] does, with what the journal says of it.
fn noted_claim(place: &Place, name: &str, journal: &Journal) -> Result<(Directory, Directory, Noted), CgroupError> {
    let mut noted = Noted::default();
    match &place.parent {
        Parent::Common => noted.common = Some(journal.record(Object::CommonCgroup { path: COMMON.into() })?),
        Parent::Own(path) => noted.controllers = Some(journal.record(Object::Controllers { path: path.clone() })?),
        Parent::Given(_) => {}
    }
    let claimed = journal.make(Object::Cgroup { path: place.parent.path().join(name) }, || {
        let (parent, machine) = claim(place, name)?;
        let identity = machine.id().ok().map(Identity::File);
        Ok(((parent, machine), identity))
    });
    match claimed {
        Ok(((parent, machine), entry)) => {
            noted.machine = Some(entry);
            Ok((parent, machine, noted))
        }
        Err(error) => {
            if noted.common.is_some() {
                let _ = place.root.remove(COMMON);
            }
            noted.common.into_iter().chain(noted.controllers).for_each(Entry::undone);
            Err(error)
        }
    }
}

/// Makes the machine's group and takes its lock; the parent, and the group. One that a killed machine has left is removed.
fn claim(place: &Place, name: &str) -> Result<(Directory, Directory), CgroupError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if place.parent == Parent::Common
            && let Err(errno) = place.root.make(COMMON)
            && errno != Errno::EEXIST
        {
            return Err(file("make", place.root.path_of(COMMON), errno));
        }
        let path = place.parent.path();
        let made = place.root.open(path).and_then(|parent| match parent.make(name) {
            Ok(()) => Ok((parent, true)),
            Err(Errno::EEXIST) => Ok((parent, false)),
            Err(errno) => Err(errno),
        });
        match made {
            Ok((parent, fresh)) => {
                if let Ok(machine) = parent.open(Path::new(name))
                    && machine.claim(&parent, name)
                {
                    if fresh {
                        return Ok((parent, machine));
                    }
                    clear(&parent, &machine, name, deadline)?;
                    continue;
                }
            }
            // The last machine in it has just removed the common group.
            Err(Errno::ENOENT | Errno::ENODEV) if place.parent == Parent::Common && Instant::now() < deadline => {
                continue;
            }
            Err(errno) => return Err(file("make", place.root.path().join(path).join(name), errno)),
        }
        if Instant::now() >= deadline {
            return Err(CgroupError::Taken(place.root.path().join(path).join(name)));
        }
        // Polled: nothing tells of a lock that is given back.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Makes a group in another.
fn make(parent: &Directory, name: &str) -> Result<Directory, CgroupError> {
    let made = parent.make(name).and_then(|()| parent.open(Path::new(name)));
    made.map_err(|errno| file("make", parent.path_of(name), errno))
}

/// Ends all that is in a group and removes it with the groups in it.
fn clear(parent: &Directory, group: &Directory, name: &str, deadline: Instant) -> Result<(), CgroupError> {
    kill(group);
    for child in group.children() {
        if let Ok(inner) = group.open(Path::new(&child)) {
            clear(group, &inner, &child, deadline)?;
        }
    }
    remove(parent, group, name, deadline)
}

fn kill(directory: &Directory) {
    // It has failed if there is nobody, and then nobody is what there is to end.
    let _ = directory.write("cgroup.kill", "1");
}

/// Removes a group once nobody is in it any more.
fn remove(parent: &Directory, directory: &Directory, name: &str, deadline: Instant) -> Result<(), CgroupError> {
    loop {
        directory.wait_until_empty(deadline);
        match parent.remove(name) {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            // Someone has come in since.
            Err(Errno::EBUSY) if Instant::now() < deadline && !directory.wait_until_empty(Instant::now()) => {}
            Err(errno) => return Err(file("remove", parent.path_of(name), errno)),
        }
    }
}

/// Moves this process into a group.
fn join(directory: &Directory) -> Result<(), CgroupError> {
    directory.write(PROCS, "0").map_err(|errno| file("write to", directory.path_of(PROCS), errno))
}

/// Enables controllers in the last group of a chain from the root, and above it as far as need be. Answers those wished for
/// that there are not.
fn enable(chain: &[Directory], needed: &[(&str, &str)], wished: &[&'static str]) -> Result<Vec<&'static str>, About> {
    let needed_names: Vec<&str> = needed.iter().map(|(controller, _)| *controller).collect();
    let wished: Vec<&'static str> = wished.iter().copied().filter(|it| !needed_names.contains(it)).collect();
    // As a rule all of them can be had, and one write is faster than five.
    if enable_all(chain, &[&needed_names[..], &wished[..]].concat()).is_ok() {
        return Ok(Vec::new());
    }
    for (controller, argument) in needed {
        enable_all(chain, &[controller]).map_err(|(path, errno)| {
            (
                Some((*argument).to_owned()),
                CgroupError::Controller { controller: (*controller).to_owned(), path, errno },
            )
        })?;
    }
    Ok(wished.into_iter().filter(|controller| enable_all(chain, &[controller]).is_err()).collect())
}

fn enable_all(chain: &[Directory], controllers: &[&str]) -> Result<(), (PathBuf, Errno)> {
    let Some((last, above)) = chain.split_last() else { return Ok(()) };
    let failed = |errno| (last.path_of(SUBTREE), errno);
    let enabled = last.words(SUBTREE).map_err(failed)?;
    let missing: Vec<&str> = controllers.iter().copied().filter(|it| !enabled.iter().any(|word| word == it)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let offered = last.words("cgroup.controllers").map_err(failed)?;
    let lacking: Vec<&str> = missing.iter().copied().filter(|it| !offered.iter().any(|word| word == it)).collect();
    if !lacking.is_empty() {
        if above.is_empty() {
            return Err(failed(Errno::ENOENT));
        }
        enable_all(above, &lacking)?;
    }
    let words: Vec<String> = missing.iter().map(|controller| format!("+{controller}")).collect();
    last.write(SUBTREE, &words.join(" ")).map_err(failed)
}

/// Writes a value. A default may be missing.
fn set(directory: &Directory, setting: &Setting) -> Result<(), About> {
    let name = setting.file.as_ref();
    let written = directory.write(name, &setting.value);
    let Some(argument) = &setting.argument else { return Ok(()) };
    let about = |error| (Some(argument.clone()), error);
    let value = &setting.value;
    written
        .map_err(|errno| about(CgroupError::Value { value: value.clone(), path: directory.path_of(name), errno }))?;
    if [Key::CpusetCpus.file(), Key::CpusetMems.file()].contains(&name) {
        // The kernel takes processors that are not there, and goes on with others.
        let file = format!("{name}.effective");
        let effective = directory.read(&file).unwrap_or_default().trim().to_owned();
        if !covers(&effective, value) {
            let path = directory.path_of(&file);
            return Err(about(CgroupError::Ineffective { value: value.clone(), effective, path }));
        }
    }
    Ok(())
}

/// Whether every number of the second list is in the first.
fn covers(list: &str, part: &str) -> bool {
    let (Ok(list), Ok(part)) = (parse_list(list), parse_list(part)) else { return false };
    part.into_iter()
        .all(|(first, last)| (first..=last).all(|number| list.iter().any(|(from, to)| (*from..=*to).contains(&number))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn group(parent: &Path, enabled: &str, offered: &str) -> Directory {
        fs::create_dir_all(parent).unwrap();
        fs::write(parent.join(SUBTREE), enabled).unwrap();
        fs::write(parent.join("cgroup.controllers"), offered).unwrap();
        Directory::root(parent).unwrap()
    }

    #[test]
    fn controllers_are_matched_by_the_whole_word() {
        let directory = tempfile::tempdir().unwrap();
        let chain = [group(directory.path(), "cpuset memory\n", "cpuset cpu memory\n")];
        enable_all(&chain, &["memory", "cpuset"]).unwrap();
        assert_eq!(chain[0].read(SUBTREE).unwrap(), "cpuset memory\n", "nothing was missing");
        enable_all(&chain, &["cpu"]).unwrap();
        assert!(chain[0].read(SUBTREE).unwrap().starts_with("+cpu"));
        assert_eq!(enable_all(&chain, &["io"]).unwrap_err().1, Errno::ENOENT);
    }

    #[test]
    fn what_a_group_does_not_offer_is_enabled_above_it() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("a");
        let chain = [group(directory.path(), "\n", "cpu io\n"), group(&below, "\n", "\n")];
        enable_all(&chain, &["cpu", "io"]).unwrap();
        assert!(chain.iter().all(|group| group.read(SUBTREE).unwrap().starts_with("+cpu +io")));
    }

    #[test]
    fn a_controller_that_cannot_be_had_is_named_with_its_argument() {
        let directory = tempfile::tempdir().unwrap();
        let chain = [group(directory.path(), "memory\n", "memory\n")];
        let (argument, error) = enable(&chain, &[("io", "--limit io.max=x")], &[]).unwrap_err();
        assert_eq!(argument.as_deref(), Some("--limit io.max=x"));
        assert!(error.to_string().contains("controller io cannot be enabled in"), "{error}");
        assert_eq!(enable(&chain, &[], &["memory", "pids"]).unwrap(), ["pids"]);
    }

    #[test]
    fn lists_are_compared_by_their_numbers() {
        assert!(covers("0-3,8", "1,3,8"));
        assert!(!covers("0-3", "2-4"));
        assert!(!covers("", "0"));
    }

    #[test]
    fn every_error_is_one_line() {
        let path = || PathBuf::from("/sys/fs/cgroup/x");
        for error in [
            CgroupError::Unsupported,
            CgroupError::NotDelegated,
            CgroupError::Taken(path()),
            file("make", path(), Errno::EACCES),
            CgroupError::Controller { controller: "io".into(), path: path(), errno: Errno::EBUSY },
            CgroupError::Value { value: "1".into(), path: path(), errno: Errno::ENODEV },
            CgroupError::Ineffective { value: "9".into(), effective: String::new(), path: path() },
        ] {
            let text = error.to_string();
            assert!(text.lines().count() == 1 && text.contains("cgroup"), "{text}");
        }
    }
}
