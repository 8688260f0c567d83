//! Limits on what a machine may use of its host, as `--limit` and the key `limits` of the spec give them.
//!
//! The keys are those of the kernel's control groups (Documentation/admin-guide/cgroup-v2.rst); so are the values, but for
//! sizes, which may have a unit. Everything is checked for its form here; what the host says to it is found out later.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use protocol::{DeviceId, DeviceKind};
use seccomp::Role;

use super::{Device, Given, SpecError, size};

/// Where the host has its control groups.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// The shortest quota and period of cpu.max, and the longest period, in microseconds.
const CPU_TIME: (u64, u64) = (1_000, 1_000_000);

/// The largest number of a processor or a NUMA node in a list.
const LIST_MAX: u32 = 65_535;

/// The limits of one machine, and where its control groups are.
#[derive(Debug, Default)]
pub struct Limits {
    /// The limits; no two of them say something about the same thing.
    pub list: Vec<Limit>,
    /// The NUMA node for the machine's processors and memory.
    pub numa: Option<Given<u32>>,
    /// The control group to make the machine's in, relative to [`MOUNT`].
    pub parent: Option<Given<PathBuf>>,
}

impl Limits {
    /// These limits, if they do not contradict the choice of a NUMA node.
    ///
    /// # Errors
    /// [`SpecError`] naming the choice.
    pub fn checked(self) -> Result<Self, SpecError> {
        let cpuset = self.list.iter().find(|limit| matches!(limit.key, Key::CpusetCpus | Key::CpusetMems));
        match (&self.numa, cpuset) {
            (Some(numa), Some(limit)) => {
                let problem = format!("it sets cpuset.cpus and cpuset.mems, and so does {}", limit.argument);
                Err(SpecError::Value { argument: numa.argument.clone(), problem })
            }
            _ => Ok(self),
        }
    }

    /// An argument that control groups are needed for, if there is one.
    pub fn argument(&self) -> Option<&str> {
        let limit = self.list.first().map(|limit| &limit.argument);
        let given = || self.numa.as_ref().map(|numa| &numa.argument);
        limit.or_else(given).or_else(|| self.parent.as_ref().map(|parent| &parent.argument)).map(String::as_str)
    }
}

/// One limit.
#[derive(Clone, Debug)]
pub struct Limit {
    /// Whom it is for.
    pub scope: Scope,
    /// What it limits.
    pub key: Key,
    /// The value, in a form that the kernel reads.
    pub value: String,
    /// The argument it comes from, for messages about it.
    pub argument: String,
}

impl Limit {
    /// The key as the user writes it: `memory.max`, `blk:cpu.max`, `blk/disk0:io.max`.
    pub fn name(&self) -> String {
        match &self.scope {
            Scope::Machine => self.key.file().to_owned(),
            scope => format!("{scope}:{}", self.key.file()),
        }
    }

    /// Whether both say something about the same thing.
    pub fn is_rival_of(&self, other: &Self) -> bool {
        let block_device = |limit: &Self| match limit.key {
            Key::IoMax => limit.value.split(' ').next().map(str::to_owned),
            _ => None,
        };
        self.scope == other.scope && self.key == other.key && block_device(self) == block_device(other)
    }
}

/// Whom a limit is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All processes together.
    Machine,
    /// The launcher itself.
    Ozone,
    /// Each process of this role.
    Role(Role),
    /// The process of this device.
    Device(DeviceKind, DeviceId),
}

impl fmt::Display for Scope {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => formatter.write_str("the machine"),
            Self::Ozone => formatter.write_str("ozone"),
            Self::Role(role) => write!(formatter, "{role}"),
            Self::Device(kind, id) => write!(formatter, "{}/{id}", kind.role()),
        }
    }
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Processor time: `QUOTA PERIOD` in microseconds.
    CpuMax,
    /// The share of processor time when it is short: 1 to 10000.
    CpuWeight,
    /// The processors: `0-3,8`.
    CpusetCpus,
    /// The NUMA nodes of the memory: `0`.
    CpusetMems,
    /// Memory, the guest's included; the kernel ends a machine that needs more.
    MemoryMax,
    /// Memory above which the machine is slowed down while the kernel takes some back.
    MemoryHigh,
    /// Swap.
    MemorySwapMax,
    /// Processes and threads.
    PidsMax,
    /// Rates of one block device: `8:0 rbps=10M wiops=500`.
    IoMax,
}

impl Key {
    /// Every key.
    pub const ALL: [Self; 9] = [
        Self::CpuMax,
        Self::CpuWeight,
        Self::CpusetCpus,
        Self::CpusetMems,
        Self::MemoryMax,
        Self::MemoryHigh,
        Self::MemorySwapMax,
        Self::PidsMax,
        Self::IoMax,
    ];

    /// The kernel's file for it, which is its name as well.
    pub fn file(self) -> &'static str {
        match self {
            Self::CpuMax => "cpu.max",
            Self::CpuWeight => "cpu.weight",
            Self::CpusetCpus => "cpuset.cpus",
            Self::CpusetMems => "cpuset.mems",
            Self::MemoryMax => "memory.max",
            Self::MemoryHigh => "memory.high",
            Self::MemorySwapMax => "memory.swap.max",
            Self::PidsMax => "pids.max",
            Self::IoMax => "io.max",
        }
    }

    /// The kernel's controller that has the file.
    pub fn controller(self) -> &'static str {
        match self {
            Self::CpuMax | Self::CpuWeight => "cpu",
            Self::CpusetCpus | Self::CpusetMems => "cpuset",
            Self::MemoryMax | Self::MemoryHigh | Self::MemorySwapMax => "memory",
            Self::PidsMax => "pids",
            Self::IoMax => "io",
        }
    }

    /// Why no single process can have it, if so.
    fn whole_machine(self) -> Option<&'static str> {
        match self {
            Self::MemoryMax | Self::MemoryHigh | Self::MemorySwapMax => Some(
                "is for the whole machine only: its processes share the guest's memory, which is charged to whichever \
                 touches a page first",
            ),
            Self::CpusetCpus | Self::CpusetMems => Some("is for the whole machine only"),
            _ => None,
        }
    }

    /// The value in the form that the kernel reads, or what is wrong with it.
    fn value(self, text: &str) -> Result<String, String> {
        match self {
            Self::CpuMax => cpu_max(text),
            Self::CpuWeight => match number(text) {
                Some(1..=10_000) => Ok(text.to_owned()),
                _ => Err("a weight is 1 to 10000, and 100 is what others have".to_owned()),
            },
            Self::CpusetCpus | Self::CpusetMems => parse_list(text).map(|_| text.to_owned()),
            Self::MemoryMax | Self::MemoryHigh => match size_or_max(text)? {
                Some(0) => Err("nothing runs without memory".to_owned()),
                bytes => Ok(bytes.map_or_else(|| "max".to_owned(), size::text)),
            },
            Self::MemorySwapMax => Ok(size_or_max(text)?.map_or_else(|| "max".to_owned(), size::text)),
            Self::PidsMax => match number(text) {
                _ if text == "max" => Ok(text.to_owned()),
                // The kernel's own limit on process ids (PID_MAX_LIMIT).
                Some(1..=4_194_304) => Ok(text.to_owned()),
                _ => Err("a number of processes and threads is 1 to 4194304, or max".to_owned()),
            },
            Self::IoMax => io_max(text),
        }
    }
}

/// A number of digits alone: no sign, which the standard library would take.
fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|_| text.bytes().all(|digit| digit.is_ascii_digit()))
}

fn cpu_max(text: &str) -> Result<String, String> {
    let wrong = || {
        let (least, most) = CPU_TIME;
        format!(
            "write it as \"QUOTA PERIOD\" in microseconds: a quota of {least} or more, or max; a period of {least} to {most}"
        )
    };
    let mut words = text.split(' ');
    let (quota, period, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or("100000"), words.next());
    let at_least = |word: &str, most: u64| number(word).is_some_and(|time| (CPU_TIME.0..=most).contains(&time));
    // The kernel counts a quota in nanoseconds, in 44 bits at least.
    if rest.is_some() || !(quota == "max" || at_least(quota, 1 << 34)) || !at_least(period, CPU_TIME.1) {
        return Err(wrong());
    }
    Ok(format!("{quota} {period}"))
}

fn size_or_max(text: &str) -> Result<Option<u64>, String> {
    if text == "max" { Ok(None) } else { size::parse(text).map(Some).map_err(|problem| format!("{problem}, or max")) }
}

fn io_max(text: &str) -> Result<String, String> {
    let wrong = || {
        "write it as \"8:0 rbps=10M wiops=500\": the block device's numbers, and rbps, wbps, riops, wiops".to_owned()
    };
    let mut words = text.split(' ');
    let device = words.next().unwrap_or_default();
    let is_number = |part: &str| number(part).is_some_and(|number| u32::try_from(number).is_ok());
    if !device.split_once(':').is_some_and(|(major, minor)| is_number(major) && is_number(minor)) {
        return Err(wrong());
    }
    let mut value = device.to_owned();
    let mut seen = Vec::new();
    for word in words {
        let (key, rate) = word.split_once('=').ok_or_else(wrong)?;
        if !["rbps", "wbps", "riops", "wiops"].contains(&key) {
            return Err(wrong());
        }
        if seen.contains(&key) {
            return Err(format!("{key} is given twice"));
        }
        seen.push(key);
        match size_or_max(rate).map_err(|problem| format!("{key}: {problem}"))? {
            Some(0) => return Err(format!("{key}=0 would stop the device; leave it away or write max")),
            Some(rate) => value += &format!(" {key}={rate}"),
            None => value += &format!(" {key}=max"),
        }
    }
    if seen.is_empty() { Err(wrong()) } else { Ok(value) }
}

/// Reads a list of numbers as the kernel writes it: `0-3,8`, as pairs of first and last (cpuset(7), list format).
///
/// # Errors
/// What is wrong, as a clause.
pub fn parse_list(text: &str) -> Result<Vec<(u32, u32)>, String> {
    let number = |text: &str| u32::try_from(number(text)?).ok().filter(|number| *number <= LIST_MAX);
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        (first <= last).then_some((first, last))
    };
    let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
    ranges.ok_or_else(|| "not a list of numbers; write it as 0-3,8".to_owned())
}

/// Reads a limit: `name` is `memory.max`, `blk:cpu.max` or `blk/disk0:io.max`; the argument is for messages.
///
/// # Errors
/// [`SpecError`] naming the argument.
pub fn parse(name: &str, value: &str, argument: String) -> Result<Limit, SpecError> {
    let argument = argument.escape_debug().to_string();
    let wrong = |problem: String| SpecError::Value { argument: argument.clone(), problem };
    let (scope, key) = match name.split_once(':') {
        Some((scope, key)) => (scope_of(scope).map_err(&wrong)?, key),
        None => (Scope::Machine, name),
    };
    let key = Key::ALL.into_iter().find(|known| known.file() == key).ok_or_else(|| {
        let known = Key::ALL.map(Key::file).join(", ");
        wrong(format!("unknown key '{}'; the keys are {known}", key.escape_debug()))
    })?;
    if scope != Scope::Machine
        && let Some(reason) = key.whole_machine()
    {
        return Err(wrong(format!("{} {reason}; write it as {}=…", key.file(), key.file())));
    }
    let value = key.value(value).map_err(&wrong)?;
    Ok(Limit { scope, key, value, argument })
}

fn scope_of(text: &str) -> Result<Scope, String> {
    let (role, device) = match text.split_once('/') {
        Some((role, device)) => (role, Some(device)),
        None => (text, None),
    };
    let kind = [DeviceKind::Blk, DeviceKind::Net, DeviceKind::Console].into_iter().find(|kind| kind.role() == role);
    match (Role::ALL.into_iter().find(|known| known.to_string() == role), kind, device) {
        (_, Some(kind), Some(device)) => DeviceId::try_from(device.to_owned()).map(|id| Scope::Device(kind, id)),
        (Some(role), _, None) => Ok(Scope::Role(role)),
        (None, None, None) if role == "ozone" => Ok(Scope::Ozone),
        _ => Err(format!(
            "unknown process '{}'; a limit is for ozone, core, blk, net, console, or one device as blk/disk0",
            text.escape_debug()
        )),
    }
}

/// Reads a `--limit`.
///
/// # Errors
/// [`SpecError`] naming the option.
pub fn option(text: &str) -> Result<Limit, SpecError> {
    let argument = format!("--limit {text}");
    match text.split_once('=') {
        Some((name, value)) => parse(name, value, argument),
        None => Err(SpecError::new(&argument, "write it as KEY=VALUE, for example memory.max=2G")),
    }
}

/// Brings the limits of the options and those of the file together; the options go before the file.
///
/// # Errors
/// [`SpecError`] for two that say something about the same thing, and for one of a device that is not there.
pub fn merge(options: Vec<Limit>, file: Vec<Limit>, devices: &[Device]) -> Result<Vec<Limit>, SpecError> {
    let mut list: Vec<Limit> = Vec::new();
    for limit in options {
        if let Some(other) = list.iter().find(|other| other.is_rival_of(&limit)) {
            let problem = format!("{} is given already, by {}", limit.name(), other.argument);
            return Err(SpecError::Value { argument: limit.argument, problem });
        }
        list.push(limit);
    }
    for limit in file {
        if !list.iter().any(|other| other.is_rival_of(&limit)) {
            list.push(limit);
        }
    }
    for limit in &list {
        if let Scope::Device(kind, id) = &limit.scope
            && !devices.iter().any(|device| device.kind() == *kind && device.id == *id)
        {
            let known: Vec<String> = devices.iter().map(|it| format!("{}/{}", it.kind().role(), it.id)).collect();
            let problem = format!("there is no {}; the devices are {}", limit.scope, known.join(", "));
            return Err(SpecError::Value { argument: limit.argument.clone(), problem });
        }
    }
    Ok(list)
}

/// Reads a path of `--cgroup-parent`: below [`MOUNT`], or relative to it.
///
/// # Errors
/// What is wrong, as a clause.
pub fn parent(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let relative = match path.strip_prefix(MOUNT) {
        Ok(relative) => relative,
        Err(_) if path.is_absolute() => {
            return Err(format!("not below {MOUNT}; write a path relative to that, as machine.slice"));
        }
        Err(_) => path,
    };
    let is_plain = |component: Component<'_>| matches!(component, Component::Normal(_));
    if text.is_empty() || text.contains(char::is_control) || !relative.components().all(is_plain) {
        return Err("not the path of a cgroup; it has names and slashes only, as machine.slice".to_owned());
    }
    Ok(relative.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(String, String), String> {
        option(text).map(|limit| (limit.name(), limit.value)).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read_in_its_own_form() {
        for (text, name, value) in [
            ("cpu.max=50000", "cpu.max", "50000 100000"),
            ("cpu.max=max 20000", "cpu.max", "max 20000"),
            ("blk:cpu.weight=10", "blk:cpu.weight", "10"),
            ("ozone:cpu.weight=10000", "ozone:cpu.weight", "10000"),
            ("cpuset.cpus=0-3,8", "cpuset.cpus", "0-3,8"),
            ("cpuset.mems=0", "cpuset.mems", "0"),
            ("memory.max=1024M", "memory.max", "1G"),
            ("memory.high=max", "memory.high", "max"),
            ("memory.swap.max=0", "memory.swap.max", "0"),
            ("core:pids.max=300", "core:pids.max", "300"),
            ("blk/disk0:io.max=8:0 rbps=1M wiops=50", "blk/disk0:io.max", "8:0 rbps=1048576 wiops=50"),
            ("io.max=259:1 wbps=max", "io.max", "259:1 wbps=max"),
        ] {
            assert_eq!(read(text), Ok((name.to_owned(), value.to_owned())), "{text}");
            let again = format!("{name}={value}");
            assert_eq!(read(&again), Ok((name.to_owned(), value.to_owned())), "{again}");
        }
    }

    #[test]
    fn each_wrong_limit_is_refused_in_one_line_that_says_what_to_write() {
        for (text, expected) in [
            ("memory.max", "KEY=VALUE"),
            ("memory.maximum=1G", "the keys are cpu.max, cpu.weight, cpuset.cpus"),
            ("memory=1G", "unknown key 'memory'"),
            ("gpu:cpu.max=max", "unknown process 'gpu'"),
            ("core/x:cpu.max=max", "unknown process 'core/x'"),
            ("ozone/x:cpu.max=max", "unknown process"),
            (":cpu.max=max", "unknown process ''"),
            ("blk/Disk:cpu.max=max", "device id 'Disk'"),
            ("blk:memory.max=1G", "charged to whichever touches a page first"),
            ("net:memory.swap.max=1G", "for the whole machine only"),
            ("core:cpuset.cpus=0", "for the whole machine only"),
            ("cpu.max=", "QUOTA PERIOD"),
            ("cpu.max=999", "QUOTA PERIOD"),
            ("cpu.max=+5000", "QUOTA PERIOD"),
            ("cpu.max=5000 1000001", "QUOTA PERIOD"),
            ("cpu.max=5000 max", "QUOTA PERIOD"),
            ("cpu.max=5000 10000 1", "QUOTA PERIOD"),
            ("cpu.max=5000  10000", "QUOTA PERIOD"),
            ("cpu.max=99999999999999999", "QUOTA PERIOD"),
            ("cpu.weight=0", "1 to 10000"),
            ("cpu.weight=10001", "1 to 10000"),
            ("cpuset.cpus=", "0-3,8"),
            ("cpuset.cpus=3-1", "0-3,8"),
            ("cpuset.cpus=0,,1", "0-3,8"),
            ("cpuset.mems=0-4294967295", "0-3,8"),
            ("memory.max=0", "without memory"),
            ("memory.max=lots", "not a size"),
            ("pids.max=0", "1 to 4194304"),
            ("pids.max=-1", "1 to 4194304"),
            ("io.max=8:0", "8:0 rbps"),
            ("io.max=sda rbps=1", "8:0 rbps"),
            ("io.max=8:+0 rbps=1", "8:0 rbps"),
            ("io.max=8:0 rbps=1 rbps=2", "twice"),
            ("io.max=8:0 rbps=0", "would stop"),
            ("io.max=8:0 speed=1", "8:0 rbps"),
            ("pids.max=1\nx", "--limit pids.max=1\\nx"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(expected), "{text}: '{error}' lacks '{expected}'");
            assert!(error.starts_with("--limit ") && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn a_number_with_a_sign_is_none() {
        for text in ["+1", "0-+1", " 1", "1 "] {
            assert!(parse_list(text).is_err(), "{text}");
        }
        assert_eq!(parse_list("0-1,7"), Ok(vec![(0, 1), (7, 7)]));
    }

    #[test]
    fn options_go_before_the_file_and_are_given_once() {
        let limit = |text: &str| option(text).unwrap();
        let list = merge(
            vec![limit("memory.max=1G"), limit("io.max=8:0 rbps=1M")],
            vec![limit("memory.max=2G"), limit("io.max=8:16 rbps=1M"), limit("core:pids.max=9")],
            &[],
        );
        let values: Vec<String> = list.unwrap().iter().map(|it| format!("{}={}", it.name(), it.value)).collect();
        let expected = ["memory.max=1G", "io.max=8:0 rbps=1048576", "io.max=8:16 rbps=1048576", "core:pids.max=9"];
        assert_eq!(values, expected);
        let twice = merge(vec![limit("pids.max=9"), limit("pids.max=8")], Vec::new(), &[]).unwrap_err();
        assert!(twice.to_string().contains("given already, by --limit pids.max=9"), "{twice}");
        let nobody = merge(vec![limit("blk/x:pids.max=9")], Vec::new(), &[]).unwrap_err();
        assert!(nobody.to_string().contains("there is no blk/x"), "{nobody}");
    }

    #[test]
    fn a_parent_is_below_the_mount() {
        assert_eq!(parent("/sys/fs/cgroup/machine.slice"), Ok("machine.slice".into()));
        assert_eq!(parent("a/b"), Ok("a/b".into()));
        assert_eq!(parent("/sys/fs/cgroup"), Ok("".into()));
        for wrong in ["", "/etc", "..", "a/../../b", "./a", "/sys/fs/cgroup/../x", "/sys/fs/cgroups", "a\n"] {
            assert!(parent(wrong).is_err(), "{wrong:?}");
        }
    }
}
