//! The promises about a machine's processes: a list with one judgement each, of what the kernel says and of nothing else.

use std::collections::BTreeSet;

use seccomp::Role;

use super::descriptor::{self, Kind};
use super::facts::{Executable, Facts, Limit, Namespaces, Seen, Users};
use super::group::{Group, Hierarchy};
use super::report::{Finding, Short, Verdict};
use super::status::{CAPABILITY_SETS, Status};

/// What a process is judged against.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// `ozone`.
    pub ozone: &'a Facts,
    /// `vmm-core`.
    pub core: &'a Facts,
    /// The core and every backend.
    pub children: &'a [&'a Facts],
    /// The namespaces of the host's first process, where they can be seen.
    pub init: Option<&'a Namespaces>,
    /// Who runs on the host.
    pub users: &'a Seen<Users>,
    /// Whether the host has user namespaces to give.
    pub offers_user_namespaces: bool,
    /// The hierarchy of control groups, if the host has one of the second version.
    pub hierarchy: Option<Hierarchy>,
}

impl Around<'_> {
    /// Whether `ozone` is root: otherwise all processes have its user's uid.
    fn has_root(&self) -> bool {
        self.ozone.user() == Some(0)
    }
}

/// One child and what is around it.
struct Child<'a> {
    role: Role,
    facts: &'a Facts,
    around: Around<'a>,
}

/// What was found, in words, where the promise holds, or else why it comes short.
type Judged = Result<String, Short>;

/// Who a promise is given to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Given {
    Always,
    /// Where `ozone` runs as root.
    ToRoot,
    /// Where it runs as an ordinary user.
    ToUser,
}

/// A promise about a child.
struct Promise {
    name: &'static str,
    given: Given,
    judge: fn(&Child<'_>) -> Judged,
}

const fn promise(name: &'static str, given: Given, judge: fn(&Child<'_>) -> Judged) -> Promise {
    Promise { name, given, judge }
}

/// Every promise about a child that can be seen from outside.
const PROMISES: [Promise; 29] = [
    promise("one uid and gid, not root's", Given::Always, one_user),
    promise("a uid that no other process has", Given::ToRoot, own_user),
    promise("no supplementary group", Given::ToRoot, no_groups),
    promise("one uid in its user namespace", Given::Always, one_mapped_user),
    promise("no capability in any set", Given::Always, no_capabilities),
    promise("no new privileges", Given::Always, |child| no_new_privileges(child.facts)),
    promise("seccomp filters in every thread", Given::Always, |child| filtered(child.facts)),
    promise("own user namespace", Given::Always, |child| own_layer(child, "user")),
    promise("own pid namespace", Given::Always, |child| own_namespace(child, "pid")),
    promise("own mount namespace", Given::Always, |child| own_namespace(child, "mnt")),
    promise("own network namespace", Given::Always, |child| own_namespace(child, "net")),
    promise("own IPC namespace", Given::Always, |child| own_namespace(child, "ipc")),
    promise("own UTS namespace", Given::Always, |child| own_namespace(child, "uts")),
    promise("own cgroup namespace", Given::Always, |child| own_namespace(child, "cgroup")),
    promise("own time namespace", Given::Always, |child| own_layer(child, "time")),
    promise("process 1 of its pid namespace", Given::Always, first_process),
    promise("an empty read-only root", Given::Always, empty_root),
    promise("not dumpable", Given::Always, not_dumpable),
    promise("no core dump", Given::Always, |child| no_core_dump(child.facts)),
    promise("limits", Given::Always, limits),
    promise("in a control group of its own", Given::Always, own_group),
    promise("a limit on processes in its group", Given::Always, limited_processes),
    promise("own session without a terminal", Given::Always, own_session),
    promise("empty environment", Given::Always, empty_environment),
    promise("umask 0077", Given::Always, umask),
    promise("only descriptors of its role", Given::Always, descriptors),
    promise("no memory writable and executable", Given::Always, |child| write_or_execute(child.facts)),
    promise("guest memory in no core dump", Given::Always, undumped_guest),
    promise("an executable that no role can write", Given::ToRoot, |child| executable(child.facts, child.around)),
];

/// What the kernel shows nobody but the process itself.
const NOT_VISIBLE: [(&str, &str); 3] = [
    ("Landlock domain", LANDLOCK),
    ("parent-death signal", "the kernel tells it to the process alone (PR_GET_PDEATHSIG)"),
    ("locked securebits", "the kernel tells them to the thread alone (PR_GET_SECUREBITS)"),
];

const LANDLOCK: &str = "the kernel tells nobody who is in one";

/// Everything about a child.
pub fn of_child(role: Role, facts: &Facts, around: Around<'_>) -> Vec<Finding> {
    let child = Child { role, facts, around };
    let other = if around.has_root() { Given::ToUser } else { Given::ToRoot };
    let given = PROMISES.iter().filter(|promise| promise.given != other);
    let judged = given.map(|promise| Finding::judged(promise.name, (promise.judge)(&child)));
    let hidden = NOT_VISIBLE.iter().map(|(name, why)| Finding::new(name, Verdict::NotVisible, why));
    judged.chain(hidden).chain(told(facts)).collect()
}

/// The capabilities that `ozone` has once its machine runs (capabilities(7)), by number: CAP_DAC_OVERRIDE, CAP_KILL,
/// CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_CHROOT and CAP_SYS_ADMIN.
const OF_OZONE: u64 = 1 << 1 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 18 | 1 << 21;

/// Everything about `ozone` itself, which is not jailed: what it is, and the little that it promises.
pub fn of_ozone(around: Around<'_>) -> Vec<Finding> {
    let facts = around.ozone;
    let mut findings = vec![
        Finding::judged("no new privileges", no_new_privileges(facts)),
        Finding::judged("a seccomp filter", filtered(facts)),
        Finding::judged("holds no guest memory", holds_no_guest(around)),
        Finding::judged("no memory writable and executable", write_or_execute(facts)),
        Finding::judged("no core dump", no_core_dump(facts)),
    ];
    if around.has_root() {
        findings.push(Finding::judged("only capabilities to start processes", few_capabilities(facts)));
        findings.push(Finding::judged("an executable that no role can write", executable(facts, around)));
        findings.push(Finding::new("Landlock domain", Verdict::NotVisible, LANDLOCK));
        findings.push(Finding::new(
            "not dumpable",
            Verdict::NotVisible,
            "its files in /proc are root's in either case",
        ));
    }
    let first =
        seen(&facts.threads).and_then(|threads| threads.first().map_or_else(|| broken("no thread".to_owned()), Ok));
    let is = |tell: fn(&Status) -> String| first.clone().map_or_else(Short::words, tell);
    let capabilities = |status: &Status| {
        let sets = CAPABILITY_SETS.iter().zip(status.capabilities);
        sets.map(|(name, set)| format!("{name} {set:#x}")).collect::<Vec<_>>().join(", ")
    };
    let seccomp = |status: &Status| match status.seccomp {
        0 => "off".to_owned(),
        mode => format!("mode {mode}, {} filters", status.filters),
    };
    let user = |status: &Status| format!("uids {:?}, gids {:?}, groups {:?}", status.uids, status.gids, status.groups);
    for (name, text) in [("user", is(user)), ("capabilities", is(capabilities)), ("seccomp", is(seccomp))] {
        findings.push(Finding::new(name, Verdict::Told, &text));
    }
    findings.extend(told(facts));
    findings
}

/// What is neither promised nor broken.
fn told(facts: &Facts) -> Vec<Finding> {
    let tell = |name: &'static str, text: Judged| Finding::new(name, Verdict::Told, &text.unwrap_or_else(Short::words));
    let limits = seen(&facts.limits).map(|limits| {
        let limit = |limit: &Limit| match limit.soft == limit.hard {
            true => format!("{} {}", limit.name, limit.soft),
            false => format!("{} {} of {}", limit.name, limit.soft, limit.hard),
        };
        limits.iter().map(limit).collect::<Vec<_>>().join(", ")
    });
    vec![tell("resource limits", limits), tell("descriptors", seen(&facts.descriptors).map(|it| descriptor::tally(it)))]
}

fn seen<T>(fact: &Seen<T>) -> Result<&T, Short> {
    fact.as_ref().map_err(|unseen| unseen.clone().into())
}

fn broken<T>(found: String) -> Result<T, Short> {
    Err(Short::Broken(found))
}

/// Asks something of every thread; `wrong` says what is wrong with one.
fn every_thread(facts: &Facts, wrong: impl Fn(&Status) -> Option<String>) -> Result<&[Status], Short> {
    let threads = seen(&facts.threads)?;
    match threads.iter().find_map(|thread| Some((thread, wrong(thread)?))) {
        Some((thread, wrong)) => broken(format!("the thread '{}' {wrong}", thread.name)),
        None if threads.is_empty() => broken("it has no thread".to_owned()),
        None => Ok(threads),
    }
}

fn one_user(child: &Child<'_>) -> Judged {
    let threads = every_thread(child.facts, |thread| {
        let one = |ids: &[u32; 4]| ids.iter().all(|id| *id == ids[0] && *id != 0);
        let ids = format!("has uids {:?} and gids {:?}", thread.uids, thread.gids);
        (!one(&thread.uids) || !one(&thread.gids)).then_some(ids)
    })?;
    let users: BTreeSet<(u32, u32)> = threads.iter().map(|thread| (thread.uids[0], thread.gids[0])).collect();
    let text = users.iter().map(|(uid, gid)| format!("uid {uid}, gid {gid}")).collect::<Vec<_>>().join("; ");
    if users.len() == 1 { Ok(text) } else { broken(format!("its threads have {text}")) }
}

fn own_user(child: &Child<'_>) -> Judged {
    let Child { facts, around, .. } = child;
    let own: BTreeSet<u32> = seen(&facts.threads)?.iter().flat_map(|thread| thread.uids).collect();
    for uid in &own {
        let others = seen(around.users)?.get(uid).into_iter().flatten();
        if let Some(other) = others.copied().find(|pid| *pid != facts.pid) {
            return broken(format!("process {other} has uid {uid} as well"));
        }
    }
    Ok(format!("uid {own:?} of no other process of the host"))
}

fn no_groups(child: &Child<'_>) -> Judged {
    let wrong = |thread: &Status| (!thread.groups.is_empty()).then(|| format!("has the groups {:?}", thread.groups));
    every_thread(child.facts, wrong).map(|_| "none".to_owned())
}

fn one_mapped_user(child: &Child<'_>) -> Judged {
    let map = seen(&child.facts.user_map)?;
    let found = format!("a map of {} uids", map.iter().map(|length| u64::from(*length)).sum::<u64>());
    if map.as_slice() == [1] { Ok(found) } else { Err(not_offered(child, "user").unwrap_or(Short::Broken(found))) }
}

fn no_capabilities(child: &Child<'_>) -> Judged {
    every_thread(child.facts, |thread| {
        let (name, set) = CAPABILITY_SETS.iter().zip(thread.capabilities).find(|(_, set)| *set != 0)?;
        Some(format!("has {name} {set:#x}"))
    })?;
    Ok("all five are empty".to_owned())
}

fn few_capabilities(facts: &Facts) -> Judged {
    every_thread(facts, |thread| {
        // In the order of the sets' names; nothing is inherited.
        let expected = [0, OF_OZONE, OF_OZONE, OF_OZONE, 0];
        let sets = CAPABILITY_SETS.iter().zip(thread.capabilities.into_iter().zip(expected));
        let mut wrong = sets.filter(|(_, (set, expected))| set != expected);
        wrong.next().map(|(name, (set, _))| format!("has {name} {set:#x}"))
    })?;
    Ok(format!("exactly {OF_OZONE:#x}, none of them inheritable"))
}

fn no_new_privileges(facts: &Facts) -> Judged {
    let wrong = |thread: &Status| (!thread.no_new_privs).then(|| "can gain privileges".to_owned());
    every_thread(facts, wrong).map(|threads| format!("set in each of {} threads", threads.len()))
}

fn filtered(facts: &Facts) -> Judged {
    let most = seen(&facts.threads)?.iter().map(|thread| thread.filters).max().unwrap_or(0);
    let threads = every_thread(facts, |thread| match thread.seccomp {
        2 if thread.filters == most && most > 0 => None,
        2 => Some(format!("has {} of {most} filters", thread.filters)),
        mode => Some(format!("has seccomp mode {mode}, not 2")),
    })?;
    Ok(format!("{most} in each of {} threads", threads.len()))
}

fn own_namespace(child: &Child<'_>, kind: &str) -> Judged {
    let Child { facts, around, .. } = child;
    let of = |namespaces: &Namespaces| namespaces.get(kind).cloned();
    let own = of(seen(&facts.namespaces)?).ok_or_else(|| Short::Broken(format!("there is no {kind} namespace")))?;
    if of(seen(&around.ozone.namespaces)?).as_ref() == Some(&own) {
        return broken(format!("{own}, as ozone"));
    }
    if around.init.and_then(of).as_ref() == Some(&own) {
        return broken(format!("{own}, as the host's first process"));
    }
    for other in around.children.iter().filter(|other| other.pid != facts.pid) {
        if of(seen(&other.namespaces)?).as_ref() == Some(&own) {
            return broken(format!("{own}, as process {}", other.pid));
        }
    }
    Ok(own)
}

/// A namespace of a kind that not every host has.
fn own_layer(child: &Child<'_>, kind: &str) -> Judged {
    own_namespace(child, kind).map_err(|short| not_offered(child, kind).unwrap_or(short))
}

/// Why a child has no namespace of a kind, if that is the host's doing: there are none, or it can have none and is in that
/// of `ozone`.
fn not_offered(child: &Child<'_>, kind: &str) -> Option<Short> {
    let Child { facts, around, .. } = child;
    let of = |facts: &Facts| facts.namespaces.as_ref().ok().map(|namespaces| namespaces.get(kind).cloned());
    let (own, of_ozone) = (of(facts)?, of(around.ozone)?);
    let lacks = of_ozone.is_none() || (kind == "user" && !around.offers_user_namespaces);
    (lacks && own == of_ozone).then(|| Short::NotOffered(format!("this host has no {kind} namespaces to give")))
}

fn first_process(child: &Child<'_>) -> Judged {
    // Every thread has an id of its own; the first one's is the process's.
    let threads = seen(&child.facts.threads)?;
    match threads.first().map(|thread| thread.ids.as_slice()) {
        Some([_, .., 1]) => Ok("1 inside".to_owned()),
        ids => broken(format!("its ids from outside to inside are {:?}", ids.unwrap_or_default())),
    }
}

fn empty_root(child: &Child<'_>) -> Judged {
    let root = seen(&child.facts.root)?;
    if let Some(entry) = root.entries.first() {
        return broken(format!("'{entry}' is in it"));
    }
    let [mount] = root.mounts.as_slice() else { return broken(format!("it sees {} mounts", root.mounts.len())) };
    if mount.place != "/" || mount.kind != "tmpfs" || !root.is_tmpfs {
        return broken(format!("a {} on {}", mount.kind, mount.place));
    }
    let missing = ["ro", "nosuid", "nodev", "noexec"].into_iter().find(|it| !mount.options.iter().any(|is| is == it));
    match missing {
        Some(option) => broken(format!("mounted without {option}")),
        None if !root.is_read_only => broken("statfs(2) says that it can be written".to_owned()),
        None if !root.is_working_directory => broken("the working directory is elsewhere".to_owned()),
        None => Ok("a tmpfs without an entry, the only mount, and the working directory".to_owned()),
    }
}

/// The files in `/proc/PID` belong to the process's own uid if it is dumpable, and to root if it is not (proc(5)).
fn not_dumpable(child: &Child<'_>) -> Judged {
    let owner = *seen(&child.facts.owner)?;
    match child.facts.user() {
        Some(user) if user != owner && owner == 0 => Ok("its files in /proc are root's".to_owned()),
        _ => broken(format!("its files in /proc are those of uid {owner}")),
    }
}

fn no_core_dump(facts: &Facts) -> Judged {
    limited(facts, "Max core file size", |limit| limit == "0")
}

/// What no role needs is 0, and what each needs a little of has an end.
fn limits(child: &Child<'_>) -> Judged {
    for name in ["Max msgqueue size", "Max realtime priority", "Max nice priority"] {
        limited(child.facts, name, |limit| limit == "0")?;
    }
    let files = limited(child.facts, "Max open files", |limit| limit != "unlimited")?;
    let processes = limited(child.facts, "Max processes", |limit| limit != "unlimited")?;
    Ok(format!("{files}, {processes}; no message queue, no real-time or raised priority"))
}

fn limited(facts: &Facts, name: &str, is_right: impl Fn(&str) -> bool) -> Judged {
    let limit = seen(&facts.limits)?.iter().find(|limit| limit.name == name);
    let limit = limit.ok_or_else(|| Short::Broken(format!("the kernel tells no '{name}'")))?;
    let found = format!("{name} {}", limit.soft);
    match is_right(&limit.soft) && is_right(&limit.hard) {
        true if limit.soft == limit.hard => Ok(found),
        _ => broken(format!("{found}, which it may raise to {}", limit.hard)),
    }
}

/// No other process is in its group, and the group is one of the machine's: beside another process's, or below the one in
/// which that of `ozone` is, which may have stayed where it was started.
fn own_group(child: &Child<'_>) -> Judged {
    let Child { facts, around, .. } = child;
    let (group, _) = group(child)?;
    let path = &group.path;
    if group.is_outermost() {
        return broken(format!("it is in {path}"));
    }
    if let Some(other) = group.members.iter().find(|member| **member != facts.pid) {
        return broken(format!("process {other} is in {path} as well"));
    }
    let others = around.children.iter().filter(|other| other.pid != facts.pid);
    let mut groups = others.filter_map(|other| other.group.as_ref().ok());
    let of_ozone = around.ozone.group.as_ref().is_ok_and(|it| it.parent() == group.grandparent());
    match of_ozone || groups.any(|other| other.parent() == group.parent()) {
        true => Ok(path.clone()),
        false => broken(format!("{path} is not beside the machine's others")),
    }
}

fn limited_processes(child: &Child<'_>) -> Judged {
    let (Group { path, most_processes, .. }, hierarchy) = group(child)?;
    match most_processes.as_deref() {
        Some("max") => broken(format!("pids.max of {path} is max")),
        Some(most) => Ok(format!("pids.max {most}")),
        None if hierarchy.counts_processes && child.around.has_root() => broken(format!("{path} has no pids.max")),
        None => Err(Short::NotOffered("there is no controller pids for its group".to_owned())),
    }
}

/// A child's group, unless the machine could have none.
fn group<'a>(child: &Child<'a>) -> Result<(&'a Group, Hierarchy), Short> {
    let Child { facts, around, .. } = child;
    let Some(hierarchy) = around.hierarchy else {
        return Err(Short::NotOffered("this host has no control groups of the second version alone".to_owned()));
    };
    let of = |facts: &'a Facts| facts.group.as_ref().ok().map(|group| &group.path);
    let is_given = hierarchy.is_writable && around.has_root();
    if !is_given && of(around.ozone).is_some() && around.children.iter().all(|child| of(child) == of(around.ozone)) {
        return Err(Short::NotOffered("ozone has no control group to make others in".to_owned()));
    }
    Ok((seen(&facts.group)?, hierarchy))
}

/// A terminal that a console is on is one of its descriptors, and controls nothing.
fn own_session(child: &Child<'_>) -> Judged {
    let session = seen(&child.facts.session)?;
    if session.terminal != 0 {
        return broken(format!("device {:#x} is its controlling terminal", session.terminal));
    }
    match session.leader == child.facts.pid {
        true => Ok("it leads its session".to_owned()),
        false => broken(format!("it is in the session of process {}", session.leader)),
    }
}

fn empty_environment(child: &Child<'_>) -> Judged {
    match seen(&child.facts.environment)? {
        0 => Ok("empty".to_owned()),
        length => broken(format!("{length} bytes")),
    }
}

fn umask(child: &Child<'_>) -> Judged {
    let wrong =
        |thread: &Status| (thread.umask != Some(0o077)).then(|| format!("has umask {:04o}", thread.umask.unwrap_or(0)));
    every_thread(child.facts, wrong).map(|_| "0077".to_owned())
}

fn descriptors(child: &Child<'_>) -> Judged {
    let descriptors = seen(&child.facts.descriptors)?;
    let strangers = descriptor::strangers(child.role, descriptors);
    if strangers.is_empty() { Ok(descriptor::tally(descriptors)) } else { broken(strangers.join("; ")) }
}

fn write_or_execute(facts: &Facts) -> Judged {
    let mappings = seen(&facts.mappings)?;
    match mappings.iter().find(|mapping| mapping.write && mapping.execute) {
        Some(both) => broken(format!("{} {} is both", both.range, both.name)),
        None => Ok(format!("{} mappings", mappings.len())),
    }
}

/// The files of guest memory: what the core maps of memfd_create(2). It carries regions of requests in flight as well, but
/// maps none of those.
fn guest_memory<'a>(around: Around<'a>) -> Result<BTreeSet<&'a (String, u64)>, Short> {
    let mappings = around.core.mappings.as_ref().map_err(|unseen| Short::from(unseen.clone()))?;
    Ok(mappings.iter().filter(|mapping| mapping.is_memfd()).map(|mapping| &mapping.file).collect())
}

fn undumped_guest(child: &Child<'_>) -> Judged {
    let files = guest_memory(child.around)?;
    if files.is_empty() && child.role == Role::Core {
        return broken("the core maps no guest memory".to_owned());
    }
    let mut count = 0;
    for mapping in seen(&child.facts.mappings)?.iter().filter(|it| it.is_memfd() && files.contains(&it.file)) {
        if !mapping.undumped {
            return broken(format!("{} {} would be in one", mapping.range, mapping.name));
        }
        count += 1;
    }
    Ok(if count == 0 { "it maps none".to_owned() } else { format!("mappings left out: {count}") })
}

fn holds_no_guest(around: Around<'_>) -> Judged {
    let files = guest_memory(around)?;
    if let Some(mapping) = seen(&around.ozone.mappings)?.iter().find(|it| it.is_memfd() && files.contains(&it.file)) {
        return broken(format!("{} {} is mapped", mapping.range, mapping.name));
    }
    let is_memfd = |it: &&descriptor::Descriptor| it.kind == Kind::Memfd;
    let of_core: BTreeSet<_> = seen(&around.core.descriptors)?.iter().filter(is_memfd).map(|it| it.file).collect();
    let held = seen(&around.ozone.descriptors)?.iter().filter(is_memfd).find(|it| of_core.contains(&it.file));
    match held {
        Some(descriptor) => broken(format!("descriptor {} is {}", descriptor.number, descriptor.target)),
        None => Ok("neither mapped nor held".to_owned()),
    }
}

/// Without the group's bit for writing no entry of an access control list lets anyone write either (acl(5)).
fn executable(facts: &Facts, around: Around<'_>) -> Judged {
    let Executable { path, uid, mode } = seen(&facts.executable)?;
    let found = format!("{path}, of uid {uid}, mode {mode:04o}");
    let is_a_roles = around.children.iter().any(|child| child.user() == Some(*uid));
    if is_a_roles || mode & 0o022 != 0 { broken(found) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::descriptor::tests::of;
    use crate::audit::facts::Unseen;
    use crate::audit::facts::tests::jailed;

    /// The surroundings of children, of which the first is the core, on a host that has everything.
    fn around<'a>(ozone: &'a Facts, children: &'a [&'a Facts], users: &'a Seen<Users>) -> Around<'a> {
        let hierarchy = Some(Hierarchy { is_writable: true, counts_processes: true });
        let core = children[0];
        Around { ozone, core, children, init: None, users, offers_user_namespaces: true, hierarchy }
    }

    /// Judges a core beside a second child. `change` is given the core, `ozone` and the users of the host.
    fn broken_by(uid: u32, change: impl FnOnce(&mut Facts, &mut Facts, &mut Users)) -> Vec<&'static str> {
        let (mut core, other, mut ozone) = (jailed(99), jailed(100), jailed(97));
        for thread in ozone.threads.as_mut().unwrap() {
            (thread.uids, thread.gids, thread.parent) = ([uid; 4], [uid; 4], 1);
        }
        ozone.mappings.as_mut().unwrap().retain(|mapping| !mapping.is_memfd());
        let mut users = Users::new();
        users.entry(core.user().unwrap()).or_default().insert(99);
        change(&mut core, &mut ozone, &mut users);
        let (init, users) = (ozone.namespaces.clone().unwrap(), Ok(users));
        let children = [&core, &other];
        let around = Around { init: Some(&init), ..around(&ozone, &children, &users) };
        let findings = of_child(Role::Core, &core, around);
        let expected = if uid == 0 { 29 } else { 26 };
        assert_eq!(findings.iter().filter(|it| it.verdict != Verdict::Told).count(), expected + NOT_VISIBLE.len());
        findings.iter().filter(|it| it.verdict == Verdict::Broken).map(|it| it.promise).collect()
    }

    #[test]
    fn a_jailed_process_keeps_every_promise() {
        assert!(broken_by(0, |_, _, _| {}).is_empty());
        assert!(broken_by(1000, |_, _, _| {}).is_empty());
    }

    fn thread(facts: &mut Facts) -> &mut Status {
        // Not the first one: what is promised of threads is promised of all.
        &mut facts.threads.as_mut().unwrap()[1]
    }

    fn limit(facts: &mut Facts, name: &str, hard: &str) {
        let limits = facts.limits.as_mut().unwrap();
        limits.iter_mut().find(|limit| limit.name == name).unwrap().hard = hard.to_owned();
    }

    fn group_of(facts: &mut Facts) -> &mut Group {
        facts.group.as_mut().unwrap()
    }

    type Change = fn(&mut Facts, &mut Facts, &mut Users);

    /// A change for every promise, in the order of [`PROMISES`].
    const CHANGES: [(&str, Change); 29] = [
        ("one uid and gid, not root's", |core, _, _| thread(core).gids[3] = 0),
        ("a uid that no other process has", |core, _, users| {
            users.entry(core.user().unwrap()).or_default().insert(7);
        }),
        ("no supplementary group", |core, _, _| thread(core).groups.push(0)),
        ("one uid in its user namespace", |core, _, _| core.user_map = Ok(vec![65536])),
        ("no capability in any set", |core, _, _| thread(core).capabilities[3] = 1),
        ("no new privileges", |core, _, _| thread(core).no_new_privs = false),
        ("seccomp filters in every thread", |core, _, _| thread(core).filters = 4),
        ("own user namespace", |core, ozone, _| share("user", core, ozone)),
        ("own pid namespace", |core, ozone, _| share("pid", core, ozone)),
        ("own mount namespace", |core, ozone, _| share("mnt", core, ozone)),
        ("own network namespace", |core, ozone, _| share("net", core, ozone)),
        ("own IPC namespace", |core, ozone, _| share("ipc", core, ozone)),
        ("own UTS namespace", |core, ozone, _| share("uts", core, ozone)),
        ("own cgroup namespace", |core, _, _| {
            // Another child's is no better than ozone's.
            core.namespaces.as_mut().unwrap().insert("cgroup", "cgroup:[100]".to_owned());
        }),
        ("own time namespace", |core, ozone, _| share("time", core, ozone)),
        ("process 1 of its pid namespace", |core, _, _| core.threads.as_mut().unwrap()[0].ids = vec![99]),
        ("an empty read-only root", |core, _, _| core.root.as_mut().unwrap().mounts[0].options.retain(|it| it != "ro")),
        ("not dumpable", |core, _, _| core.owner = Ok(core.user().unwrap())),
        ("no core dump", |core, _, _| limit(core, "Max core file size", "unlimited")),
        ("limits", |core, _, _| limit(core, "Max open files", "unlimited")),
        ("in a control group of its own", |core, _, _| core.group.as_mut().unwrap().members.push(7)),
        ("a limit on processes in its group", |core, _, _| group_of(core).most_processes = Some("max".to_owned())),
        ("own session without a terminal", |core, _, _| core.session.as_mut().unwrap().terminal = 0x8800),
        ("empty environment", |core, _, _| core.environment = Ok(12)),
        ("umask 0077", |core, _, _| thread(core).umask = Some(0o022)),
        ("only descriptors of its role", |core, _, _| core.descriptors.as_mut().unwrap().push(of(9, Kind::Directory))),
        ("no memory writable and executable", |core, _, _| core.mappings.as_mut().unwrap()[2].write = true),
        ("guest memory in no core dump", |core, _, _| core.mappings.as_mut().unwrap()[1].undumped = false),
        ("an executable that no role can write", |core, _, _| core.executable.as_mut().unwrap().mode = 0o775),
    ];

    fn share(kind: &'static str, core: &mut Facts, ozone: &Facts) {
        let of_ozone = ozone.namespaces.as_ref().unwrap()[kind].clone();
        core.namespaces.as_mut().unwrap().insert(kind, of_ozone);
    }

    #[test]
    fn each_promise_is_broken_by_what_breaks_it_and_by_nothing_else() {
        for (promise, (name, change)) in PROMISES.iter().zip(CHANGES) {
            assert_eq!(promise.name, name);
            let uid = if promise.given == Given::ToUser { 1000 } else { 0 };
            assert_eq!(broken_by(uid, change), [name]);
        }
    }

    #[test]
    fn there_is_more_than_one_way_to_break_a_promise() {
        let ways: [(&str, Change); 18] = [
            ("one uid and gid, not root's", |core, _, _| thread(core).uids = [7; 4]),
            ("one uid and gid, not root's", |core, _, _| core.threads.as_mut().unwrap()[0].uids[1] += 9),
            ("seccomp filters in every thread", |core, _, _| thread(core).seccomp = 0),
            ("seccomp filters in every thread", |core, _, _| {
                core.threads.as_mut().unwrap().iter_mut().for_each(|thread| thread.filters = 0);
            }),
            ("an empty read-only root", |core, _, _| core.root.as_mut().unwrap().entries.push("etc".to_owned())),
            ("an empty read-only root", |core, _, _| core.root.as_mut().unwrap().is_read_only = false),
            ("an empty read-only root", |core, _, _| core.root.as_mut().unwrap().is_working_directory = false),
            ("an empty read-only root", |core, _, _| core.root.as_mut().unwrap().is_tmpfs = false),
            ("an empty read-only root", |core, _, _| {
                let mounts = &mut core.root.as_mut().unwrap().mounts;
                mounts.push(mounts[0].clone());
            }),
            ("process 1 of its pid namespace", |core, _, _| core.threads.as_mut().unwrap()[0].ids = vec![1]),
            ("limits", |core, _, _| limit(core, "Max nice priority", "1")),
            ("limits", |core, _, _| limit(core, "Max processes", "321")),
            ("in a control group of its own", |core, _, _| group_of(core).path = "/".to_owned()),
            ("in a control group of its own", |core, _, _| group_of(core).path = "/other/web1/jailed/core".to_owned()),
            ("a limit on processes in its group", |core, _, _| group_of(core).most_processes = None),
            ("own session without a terminal", |core, _, _| core.session.as_mut().unwrap().leader = 1),
            ("an executable that no role can write", |core, _, _| {
                core.executable.as_mut().unwrap().uid = core.user().unwrap();
            }),
            ("empty environment", |core, _, _| core.environment = Err(Unseen::Failed(String::new()))),
        ];
        for (name, change) in ways {
            assert_eq!(broken_by(0, change).first(), Some(&name));
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_held() {
        let all = broken_by(0, |core, _, _| {
            let why = || Unseen::Failed("cannot be read".to_owned());
            (core.threads, core.namespaces, core.root, core.owner) = (Err(why()), Err(why()), Err(why()), Err(why()));
            core.user_map = Err(why());
            (core.limits, core.session, core.environment) = (Err(why()), Err(why()), Err(why()));
            (core.descriptors, core.mappings, core.executable) = (Err(why()), Err(why()), Err(why()));
            core.group = Err(why());
        });
        assert_eq!(all.len(), PROMISES.iter().filter(|promise| promise.given != Given::ToUser).count());
    }

    #[test]
    fn what_the_host_does_not_offer_is_not_called_broken() {
        let (mut core, mut ozone) = (jailed(99), jailed(97));
        let users = Ok(Users::new());
        let namespaces = |facts: &mut Facts| facts.namespaces.as_mut().unwrap().clone();
        let judge = |core: &Facts, ozone: &Facts, offers_user_namespaces| {
            let children = [core];
            let around = Around { offers_user_namespaces, ..around(ozone, &children, &users) };
            let of = |name| {
                let promise = PROMISES.iter().find(|promise| promise.name == name).unwrap();
                let judged = (promise.judge)(&Child { role: Role::Core, facts: core, around });
                Finding::judged(promise.name, judged).verdict
            };
            [of("own user namespace"), of("one uid in its user namespace"), of("own time namespace")]
        };
        assert_eq!(judge(&core, &ozone, false), [Verdict::Holds; 3]);
        share("user", &mut core, &ozone);
        core.user_map = Ok(vec![u32::MAX]);
        assert_eq!(judge(&core, &ozone, true), [Verdict::Broken, Verdict::Broken, Verdict::Holds]);
        assert_eq!(judge(&core, &ozone, false), [Verdict::NotOffered, Verdict::NotOffered, Verdict::Holds]);
        for facts in [&mut core, &mut ozone] {
            let mut without = namespaces(facts);
            without.remove("time");
            facts.namespaces = Ok(without);
        }
        assert_eq!(judge(&core, &ozone, false), [Verdict::NotOffered; 3]);
    }

    #[test]
    fn control_groups_that_nobody_could_make_are_not_called_broken() {
        let ((mut core, mut other), (mut root, mut user)) = ((jailed(99), jailed(100)), (jailed(97), jailed(97)));
        for thread in root.threads.as_mut().unwrap() {
            thread.uids = [0; 4];
        }
        let users = Ok(Users::new());
        let judge = |ozone: &Facts, core: &Facts, other: &Facts, hierarchy| {
            let children = [core, other];
            let around = Around { hierarchy, ..around(ozone, &children, &users) };
            let child = Child { role: Role::Core, facts: core, around };
            [own_group(&child), limited_processes(&child)].map(|judged| Finding::judged("", judged).verdict)
        };
        let offers = |is_writable, counts_processes| Some(Hierarchy { is_writable, counts_processes });
        let [holds, broken, not_offered] = [Verdict::Holds, Verdict::Broken, Verdict::NotOffered].map(|it| [it; 2]);
        for ozone in [&root, &user] {
            assert_eq!(judge(ozone, &core, &other, offers(true, true)), holds);
            assert_eq!(judge(ozone, &core, &other, None), not_offered);
        }
        group_of(&mut core).most_processes = None;
        assert_eq!(judge(&root, &core, &other, offers(true, false))[1], Verdict::NotOffered);
        assert_eq!(judge(&user, &core, &other, offers(true, true))[1], Verdict::NotOffered, "not delegated");
        for facts in [&mut core, &mut other, &mut root, &mut user] {
            (group_of(facts).path, group_of(facts).members) = ("/user.slice".to_owned(), vec![97, 99, 100]);
        }
        assert_eq!(judge(&root, &core, &other, offers(true, true)), broken);
        assert_eq!(judge(&root, &core, &other, offers(false, true)), not_offered);
        assert_eq!(judge(&user, &core, &other, offers(true, true)), not_offered);
        group_of(&mut other).path = "/user.slice/own".to_owned();
        assert_eq!(judge(&user, &core, &other, offers(true, true))[0], Verdict::Broken, "others have one");
    }

    #[test]
    fn what_an_ordinary_user_may_not_read_is_not_called_broken() {
        let denied = || Unseen::Denied(String::new());
        assert!(broken_by(1000, |core, _, _| core.environment = Err(denied())).is_empty());
        assert!(broken_by(1000, |core, _, _| core.descriptors = Err(denied())).is_empty());
    }

    #[test]
    fn ozone_is_told_and_promises_little() {
        let (core, mut ozone) = (jailed(99), jailed(97));
        let users = Ok(Users::new());
        let judge = |ozone: &Facts| {
            let findings = of_ozone(around(ozone, &[&core], &users));
            assert!(findings.iter().any(|it| it.verdict == Verdict::Told && it.promise == "seccomp"));
            let broken = findings.iter().filter(|it| it.verdict == Verdict::Broken);
            broken.map(|it| it.promise).collect::<Vec<_>>()
        };
        assert_eq!(judge(&ozone), ["holds no guest memory"], "it is mapped");
        ozone.mappings.as_mut().unwrap().remove(1);
        assert_eq!(judge(&ozone), ["holds no guest memory"], "its descriptor is held");
        ozone.descriptors.as_mut().unwrap().retain(|it| it.kind != Kind::Memfd);
        assert!(judge(&ozone).is_empty());
        ozone.mappings.as_mut().unwrap()[0].execute = true;
        assert_eq!(judge(&ozone), ["no memory writable and executable"]);
        ozone.mappings.as_mut().unwrap()[0].execute = false;
        limit(&mut ozone, "Max core file size", "unlimited");
        assert_eq!(judge(&ozone), ["no core dump"]);
        limit(&mut ozone, "Max core file size", "0");
        for thread in ozone.threads.as_mut().unwrap() {
            (thread.uids, thread.capabilities) = ([0; 4], [0, OF_OZONE, OF_OZONE, OF_OZONE, 0]);
        }
        assert!(judge(&ozone).is_empty());
        for (set, change) in [(3, 1 << 16), (1, 1 << 21), (0, 1 << 21), (4, 1 << 1)] {
            thread(&mut ozone).capabilities[set] ^= change;
            assert_eq!(judge(&ozone), ["only capabilities to start processes"], "{set}");
            thread(&mut ozone).capabilities[set] ^= change;
        }
        thread(&mut ozone).seccomp = 0;
        assert_eq!(judge(&ozone), ["a seccomp filter"]);
        thread(&mut ozone).seccomp = 2;
        thread(&mut ozone).capabilities[3] |= 1 << 16;
        thread(&mut ozone).no_new_privs = false;
        assert_eq!(judge(&ozone), ["no new privileges", "only capabilities to start processes"]);
    }
}
