//! What is written into which control group, as plain data, before any is made.

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::jail::limits;
use crate::process::Process;
use crate::spec::limits::{Key, Limit, Scope};
use crate::spec::{Device, Given, VmSpec};

/// The controllers that a machine's group has if it can be, for `ozone stat` and the limits that nobody asked for.
/// Without the processors': with it, processes of one machine would share them in equal parts whatever they do.
pub const WISHED_OF_MACHINE: [&str; 3] = ["memory", "pids", "io"];

/// Likewise for the groups of the processes. Without memory, which is accounted for the whole machine.
pub const WISHED_OF_PROCESS: [&str; 2] = ["pids", "io"];

/// The most processes in `ozone`'s own leaf: it has one thread and starts all others in leaves of theirs.
const TASKS_OF_OZONE: u64 = 8;

/// All groups of one machine.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// The name of the machine's group.
    pub name: String,
    /// What is written to the machine's group.
    pub machine: Vec<Setting>,
    /// The leaves: that of `ozone`, the core's, and the devices' in their order.
    pub leaves: Vec<Leaf>,
}

/// The group of one process.
#[derive(Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its directory's name.
    pub name: String,
    /// The process, as messages name it.
    pub process: String,
    /// What is written to it.
    pub settings: Vec<Setting>,
}

/// One value of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The file, as `memory.max`.
    pub file: Cow<'static, str>,
    /// The value as the kernel reads it.
    pub value: String,
    /// Who asked for it; nobody for a default, which may be missing.
    pub argument: Option<String>,
}

impl Setting {
    fn of(limit: &Limit) -> Self {
        Self { file: limit.key.file().into(), value: limit.value.clone(), argument: Some(limit.argument.clone()) }
    }

    /// What a NUMA node with these processors is written down as.
    pub fn of_node(node: &Given<u32>, processors: &str) -> [Self; 2] {
        [(Key::CpusetCpus, processors.to_owned()), (Key::CpusetMems, node.value.to_string())].map(|(key, value)| Self {
            file: key.file().into(),
            value,
            argument: Some(node.argument.clone()),
        })
    }

    /// The controller that has the file: what stands before the first dot (cgroup-v2.rst, "Conventions").
    pub fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

impl Plan {
    /// The groups of `spec`, with the processors of its NUMA node. A machine without a name is called by `pid`.
    pub fn new(spec: &VmSpec, numa: Option<&str>, pid: u32) -> Self {
        let list = &spec.limits.list;
        let mut machine: Vec<Setting> =
            list.iter().filter(|limit| limit.scope == Scope::Machine).map(Setting::of).collect();
        if let (Some(node), Some(processors)) = (&spec.limits.numa, numa) {
            machine.extend(Setting::of_node(node, processors));
        }
        let ozone = leaf("ozone".to_owned(), TASKS_OF_OZONE, &[&Scope::Ozone], list);
        let others = std::iter::once(None).chain(spec.devices.iter().map(Some)).map(|device| process(device, list));
        let leaves = std::iter::once(ozone).chain(others).collect();
        Self { name: directory_name(spec.name.as_deref(), pid), machine, leaves }
    }

    /// The controllers that the machine's group has to have, with the argument that asks for each: those of the leaves
    /// among them.
    pub fn needed_of_machine(&self) -> Vec<(&str, &str)> {
        let leaves = self.leaves.iter().flat_map(|leaf| &leaf.settings);
        needed(self.machine.iter().chain(leaves))
    }

    /// The controllers that the group of all processes but `ozone` has to have: memory is limited there.
    pub fn needed_of_jailed(&self) -> Vec<(&str, &str)> {
        let memory = self.machine.iter().filter(|setting| setting.controller() == "memory");
        needed(memory.chain(self.leaves.iter().flat_map(|leaf| &leaf.settings)))
    }

    /// The controllers that the leaves have to have.
    pub fn needed_of_leaves(&self) -> Vec<(&str, &str)> {
        needed(self.leaves.iter().flat_map(|leaf| &leaf.settings))
    }
}

fn needed<'a>(settings: impl Iterator<Item = &'a Setting>) -> Vec<(&'a str, &'a str)> {
    let mut seen = BTreeSet::new();
    let asked = settings.filter_map(|it| Some((it.controller(), it.argument.as_deref()?)));
    asked.filter(|(controller, _)| seen.insert(*controller)).collect()
}

fn process(device: Option<&Device>, list: &[Limit]) -> Leaf {
    let process = device.map_or(Process::Core, |it| Process::Backend { kind: it.kind(), device: it.id.clone() });
    let role = process.role();
    let of_role = Scope::Role(role);
    let of_device = device.map(|it| Scope::Device(it.kind(), it.id.clone()));
    // The nearest last: it goes before the others.
    let scopes: Vec<&Scope> = std::iter::once(&of_role).chain(&of_device).collect();
    leaf(process.to_string(), limits::tasks(role), &scopes, list)
}

fn leaf(process: String, tasks: u64, scopes: &[&Scope], list: &[Limit]) -> Leaf {
    let default = Setting { file: Key::PidsMax.file().into(), value: tasks.to_string(), argument: None };
    let mut settings = vec![default];
    for scope in scopes {
        let nearer: Vec<&Limit> = list.iter().filter(|limit| limit.scope == **scope).collect();
        for limit in &nearer {
            // io.max has a value for each block device, of which the nearer ones replace only their own: they come later.
            if limit.key != Key::IoMax {
                settings.retain(|setting| setting.file != limit.key.file());
            }
        }
        settings.extend(nearer.into_iter().map(Setting::of));
    }
    // A name with a dot could be that of a file; no process has one.
    Leaf { name: process.replace('/', "-"), process, settings }
}

impl Plan {
    /// The groups of the program that `ozone jail` runs as `name`: all settings are the program's, and `ozone` has none. The
    /// sign in the group's name is in that of no machine.
    pub fn of_program(name: &str, settings: Vec<Setting>) -> Self {
        let leaf = |name: &str| Leaf { name: name.to_owned(), process: name.to_owned(), settings: Vec::new() };
        Self { name: format!("jail@{name}"), machine: settings, leaves: vec![leaf("ozone"), leaf("program")] }
    }
}

/// The kernel's own files in a group have a dot in their names, so no group gets one without another first letter. Names
/// of machines begin with a letter or a digit.
fn directory_name(name: Option<&str>, pid: u32) -> String {
    match name {
        Some(name) if name.contains('.') => format!("_{name}"),
        Some(name) => name.to_owned(),
        None => format!("{UNNAMED}{pid}"),
    }
}

/// What the directories of machines without a name begin with; a process id follows.
pub const UNNAMED: &str = "vm-";

/// The process that a machine without a name was called by.
pub fn unnamed_pid(directory: &str) -> Option<u32> {
    let pid = directory.strip_prefix(UNNAMED)?;
    pid.parse().ok().filter(|_| pid.bytes().all(|digit| digit.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Command, Parsed};
    use crate::spec;

    fn plan(words: &[&str], numa: Option<&str>) -> Plan {
        let line = ["ozone", "run", "--kernel", "k"].iter().chain(words).map(std::ffi::OsString::from);
        let Parsed::Command(command) = cli::parse(line) else { panic!("{words:?}") };
        let Command::Run(options) = *command else { panic!("{words:?}") };
        Plan::new(&spec::load(&options).unwrap(), numa, 7)
    }

    fn text(settings: &[Setting]) -> Vec<String> {
        settings.iter().map(|it| format!("{}={}", it.file, it.value)).collect()
    }

    #[test]
    fn without_limits_every_process_has_a_leaf_with_its_number_of_threads() {
        let plan = plan(&["--disk", "path=d"], None);
        assert_eq!((plan.name.as_str(), plan.machine.len()), ("vm-7", 0));
        let leaves: Vec<(&str, Vec<String>)> =
            plan.leaves.iter().map(|leaf| (leaf.name.as_str(), text(&leaf.settings))).collect();
        let pids = |number: u32| vec![format!("pids.max={number}")];
        let expected =
            [("ozone", pids(8)), ("core", pids(320)), ("blk-disk0", pids(128)), ("console-console0", pids(16))];
        assert_eq!(leaves, expected);
        assert!(plan.needed_of_machine().is_empty(), "defaults may be missing");
    }

    #[test]
    fn the_nearest_limit_counts() {
        let words =
            ["--disk", "path=a", "--disk", "path=b", "--limit", "blk/disk0:pids.max=9", "--limit", "blk:pids.max=5"];
        let more = ["--limit", "blk:cpu.weight=50", "--limit", "ozone:cpu.weight=200", "--limit", "memory.max=1G"];
        let plan = plan(&[&words[..], &more[..]].concat(), None);
        assert_eq!(text(&plan.machine), ["memory.max=1G"]);
        assert_eq!(text(&plan.leaves[0].settings), ["pids.max=8", "cpu.weight=200"]);
        assert_eq!(text(&plan.leaves[1].settings), ["pids.max=320"]);
        assert_eq!(text(&plan.leaves[2].settings), ["cpu.weight=50", "pids.max=9"]);
        assert_eq!(text(&plan.leaves[3].settings), ["pids.max=5", "cpu.weight=50"]);
        let controllers = |list: Vec<(&str, &str)>| list.iter().map(|(it, _)| (*it).to_owned()).collect::<Vec<_>>();
        assert_eq!(controllers(plan.needed_of_machine()), ["memory", "cpu", "pids"]);
        assert_eq!(controllers(plan.needed_of_jailed()), ["memory", "cpu", "pids"]);
        assert_eq!(controllers(plan.needed_of_leaves()), ["cpu", "pids"]);
    }

    #[test]
    fn rates_of_several_block_devices_stand_side_by_side() {
        let words = ["--disk", "path=a", "--limit", "blk/disk0:io.max=8:0 rbps=1", "--limit", "blk:io.max=8:16 rbps=2"];
        let plan = plan(&words, None);
        assert_eq!(text(&plan.leaves[2].settings), ["pids.max=128", "io.max=8:16 rbps=2", "io.max=8:0 rbps=1"]);
    }

    #[test]
    fn a_node_is_its_processors_and_its_memory() {
        let plan = plan(&["--numa", "1", "--name", "web1"], Some("4-7"));
        assert_eq!(plan.name, "web1");
        assert_eq!(text(&plan.machine), ["cpuset.cpus=4-7", "cpuset.mems=1"]);
        assert_eq!(plan.needed_of_machine(), [("cpuset", "--numa 1")]);
    }

    #[test]
    fn no_machine_is_called_like_a_file_of_the_kernels() {
        assert_eq!(directory_name(Some("memory.max"), 1), "_memory.max");
        assert_eq!((unnamed_pid("vm-12"), unnamed_pid("vm-+1"), unnamed_pid("web1")), (Some(12), None, None));
    }
}
