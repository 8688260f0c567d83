//! What machine to run: the options and the file of `--spec`, brought together and found valid once.
//!
//! After [`load`] nothing is parsed or checked again, except against the host.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Read;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use protocol::{CpuModel, Cpus, DeviceId, DeviceKind, Fault, Machine, Memory};

use crate::cli::Options;
use crate::report::Format;
use crate::runtime;

pub mod file;
pub mod limits;
pub mod options;
pub mod policy;
pub mod size;

use file::{
    ConsoleFile, CpusFile, DeviceEntry, DeviceFile, Devices, DiskFile, LimitsFile, MemoryFile, NetFile, Size, SpecFile,
};
use limits::{Limit, Limits};
use policy::Policy;

/// The least memory of a machine in bytes: less does not hold a kernel and its initial ramdisk.
pub const MEMORY_MIN: u64 = 64 << 20;

/// The most vCPUs: APIC ids are 8 bits wide and 255 addresses all of them.
pub const CPUS_MAX: u8 = 254;

/// The longest command line in bytes. The core finds out whether the kernel's own limit holds it.
const APPEND_MAX: usize = 8192;

/// The highest uid; the number after it stands for "no change" in system calls (setresuid(2)).
const UID_MAX: u32 = u32::MAX - 1;

/// The uid that stands for all that have none (user_namespaces(7), overflowuid), and that unprivileged services share.
const NOBODY: u32 = 65534;

/// What a name of a machine or a jail is: see [`runtime::is_name`].
pub const NAME: &str = "a name is 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit";

/// The largest file of `--spec` in bytes.
const FILE_MAX: u64 = 1 << 20;

/// A machine that can be run, as far as can be told without looking at the host.
#[derive(Debug)]
pub struct VmSpec {
    /// The name by which `ozone restart` and its like find it; without one nothing does.
    pub name: Option<String>,
    /// The board.
    pub machine: Machine,
    /// The processor model.
    pub cpu: CpuModel,
    /// The vCPUs, and the argument that says so.
    pub cpus: Given<Cpus>,
    /// The memory, and the argument that says so.
    pub memory: Given<Memory>,
    /// The kernel's path.
    pub kernel: Given<PathBuf>,
    /// The initial ramdisk's path.
    pub initrd: Option<Given<PathBuf>>,
    /// The kernel's command line.
    pub append: String,
    /// Whether a reset starts the machine again.
    pub reboot: bool,
    /// What it may use of the host.
    pub limits: Limits,
    /// The first uid of its processes, if one is asked for: the core's; each device has the next. All of them can be used.
    pub uid_base: Option<Given<u32>>,
    /// The form of ozone's lines on standard error.
    pub log_format: Format,
    /// Where the record of its end goes.
    pub status_file: Option<Given<PathBuf>>,
    /// The devices; a device's place in the list is its slot on the board.
    pub devices: Vec<Device>,
}

impl VmSpec {
    /// How many processes it has beside `ozone`: the core, and one for each device.
    pub fn processes(&self) -> u32 {
        u32::try_from(self.devices.len()).unwrap_or(u32::MAX).saturating_add(1)
    }
}

/// A value and the argument it comes from, for messages about it.
#[derive(Clone, Debug)]
pub struct Given<T> {
    /// The value.
    pub value: T,
    /// The option as the user wrote it, or the key and the file.
    pub argument: String,
}

/// One device of the machine.
#[derive(Debug)]
pub struct Device {
    /// Its name.
    pub id: DeviceId,
    /// Its place on the board.
    pub slot: u8,
    /// What it is.
    pub config: DeviceConfig,
    /// What is done when its process is lost.
    pub policy: Policy,
    /// The argument it comes from, for messages about it.
    pub argument: String,
}

impl Device {
    /// The kind of the device.
    pub fn kind(&self) -> DeviceKind {
        match self.config {
            DeviceConfig::Disk(_) => DeviceKind::Blk,
            DeviceConfig::Net(_) => DeviceKind::Net,
            DeviceConfig::Console(_) => DeviceKind::Console,
        }
    }
}

/// What a device is made of.
#[derive(Debug)]
pub enum DeviceConfig {
    /// A disk.
    Disk(Disk),
    /// A network interface.
    Net(Net),
    /// A console.
    Console(ConsoleFile),
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// The image or block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether the host's page cache is passed by (O_DIRECT).
    pub direct: bool,
    /// Request queues, at least 1.
    pub queues: u16,
}

/// A network interface.
#[derive(Debug)]
pub struct Net {
    /// The tap behind it.
    pub tap: Tap,
    /// The guest's MAC address: an individual one.
    pub mac: [u8; 6],
    /// The MTU in bytes, if one is asked for.
    pub mtu: Option<u16>,
    /// Queue pairs, at least 1.
    pub queues: u16,
}

/// The tap behind a network interface.
#[derive(Debug, PartialEq, Eq)]
pub enum Tap {
    /// One that exists.
    Named(String),
    /// One to be made for the run, with this address and prefix length on the host's side.
    Made(Option<(Ipv4Addr, u8)>),
}

/// What is wrong with the machine that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// An option or key has a wrong value.
    #[error("{argument}: {problem}")]
    Value {
        /// Which, as the user wrote it.
        argument: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The file of `--spec` cannot be read.
    #[error("--spec {path}: {}", crate::resources::said(.error))]
    Read {
        /// Its path.
        path: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// The file of `--spec` is not a spec.
    #[error("--spec {path}: {error}")]
    Parse {
        /// Its path.
        path: String,
        /// What is wrong, and where.
        error: serde_json::Error,
    },
}

impl SpecError {
    pub(crate) fn new(argument: &str, problem: impl Into<String>) -> Self {
        Self::Value { argument: argument.escape_debug().to_string(), problem: problem.into() }
    }
}

impl From<SpecError> for Fault {
    fn from(error: SpecError) -> Self {
        Fault::input(error.to_string())
    }
}

/// Brings options and file together: the machine as it is asked for, nothing of it checked yet but its form.
struct RawSpec {
    file: SpecFile,
    /// The path of the file, if there is one.
    path: Option<String>,
    /// The options that go before the file.
    overridden: BTreeSet<&'static str>,
    /// The argument of each device of `file`, in the same order.
    arguments: Vec<String>,
    /// The limits that options give.
    limits: Vec<Limit>,
}

/// The machine that `options`, and the file they may name, describe.
///
/// # Errors
/// [`SpecError`] naming the argument.
pub fn load(options: &Options) -> Result<VmSpec, SpecError> {
    RawSpec::gather(options)?.validate()
}

/// The file of `--status-file`, whatever the rest of the options says.
pub fn status_file_of(options: &Options) -> Option<Given<PathBuf>> {
    let path = options.status_file.as_ref()?;
    let argument = format!("--status-file {path}");
    Some(Given { value: path_of(path, &argument).ok()?, argument })
}

/// The machine's name, whatever else the options and their file say; it need not be one that a machine can have.
///
/// # Errors
/// [`SpecError`] when the file cannot be read.
pub fn name_of(options: &Options) -> Result<Option<String>, SpecError> {
    match (&options.name, &options.spec) {
        (None, Some(path)) => Ok(read_file(path)?.name),
        (name, _) => Ok(name.clone()),
    }
}

impl RawSpec {
    fn gather(options: &Options) -> Result<Self, SpecError> {
        let file = options.spec.as_deref().map_or_else(|| Ok(SpecFile::default()), read_file)?;
        let arguments = match &options.spec {
            Some(path) => file.devices.0.iter().map(|(id, _)| format!("devices.{id} in {path}")).collect(),
            None => Vec::new(),
        };
        let mut raw =
            Self { file, path: options.spec.clone(), overridden: BTreeSet::new(), arguments, limits: Vec::new() };

        let Self { file, overridden, .. } = &mut raw;
        let mut text = |option: &'static str, given: &Option<String>, field: &mut Option<String>| {
            if given.is_some() {
                overridden.insert(option);
                field.clone_from(given);
            }
        };
        text("--kernel", &options.kernel, &mut file.kernel);
        text("--initrd", &options.initrd, &mut file.initrd);
        text("--append", &options.append, &mut file.append);
        text("--name", &options.name, &mut file.name);
        text("--cgroup-parent", &options.cgroup_parent, &mut file.cgroup_parent);
        text("--status-file", &options.status_file, &mut file.status_file);
        if let Some(memory) = &options.memory {
            overridden.insert("--memory");
            file.memory = MemoryFile { size: Some(Size::Text(memory.clone())), ..MemoryFile::default() };
        }
        if let Some(cpus) = &options.cpus {
            overridden.insert("--cpus");
            let number =
                cpus.parse().map_err(|_| SpecError::new(&format!("--cpus {cpus}"), "not a number of processors"))?;
            file.cpus = CpusFile { boot: Some(number), max: None };
        }
        if let Some(node) = &options.numa {
            overridden.insert("--numa");
            let number =
                node.parse().map_err(|_| SpecError::new(&format!("--numa {node}"), "not a number of a node"))?;
            file.numa = Some(number);
        }
        if let Some(uid) = &options.uid_base {
            overridden.insert("--uid-base");
            let number = uid.parse().map_err(|_| SpecError::new(&format!("--uid-base {uid}"), "not a uid"))?;
            file.uid_base = Some(number);
        }
        if let Some(format) = &options.log_format {
            file.log_format = Some(
                policy::word(format)
                    .map_err(|words| SpecError::new(&format!("--log-format {format}"), format!("it is {words}")))?,
            );
        }
        if options.no_reboot {
            file.reboot = Some(false);
        }
        raw.limits = options.limit.iter().map(|text| limits::option(text)).collect::<Result<_, _>>()?;

        for text in &options.disk {
            raw.add(options::disk(text)?, "disk")?;
        }
        for text in &options.net {
            raw.add(options::net(text)?, "net")?;
        }
        for text in &options.console {
            raw.add(options::console(text)?, "console")?;
        }
        let has_console = raw.file.devices.0.iter().any(|(_, entry)| matches!(entry.device, DeviceFile::Console(_)));
        if !has_console {
            raw.add(options::console("stdio")?, "console")?;
        }
        Ok(raw)
    }

    /// Adds a device of an option. One of the same name in the file gives way and leaves its place; a second option of the
    /// same name is a mistake.
    fn add(&mut self, device: options::OptionDevice, stem: &str) -> Result<(), SpecError> {
        let taken = |name: &str| self.file.devices.0.iter().position(|(id, _)| id.as_str() == name);
        let options::OptionDevice { id, entry, argument } = device;
        let id = match id {
            Some(id) => id,
            None => {
                let free = (0..).map(|number| format!("{stem}{number}")).find(|name| taken(name).is_none());
                DeviceId::try_from(free.unwrap_or_default()).map_err(|problem| SpecError::new(&argument, problem))?
            }
        };
        match taken(id.as_str()) {
            None => {
                self.file.devices.0.push((id, entry));
                self.arguments.push(argument);
            }
            Some(place) => {
                let (Some(slot), Some(from)) = (self.file.devices.0.get_mut(place), self.arguments.get_mut(place))
                else {
                    return Ok(());
                };
                if from.starts_with("--") {
                    return Err(SpecError::new(
                        &argument,
                        format!("the id '{id}' is taken by {from}; give another id="),
                    ));
                }
                *slot = (id, entry);
                *from = argument;
            }
        }
        Ok(())
    }

    /// How messages name a value: as the option, or as the key in the file.
    fn argument(&self, option: &'static str, key: &str, value: &str) -> String {
        match &self.path {
            Some(path) if !self.overridden.contains(option) => format!("{key} {value} in {path}"),
            _ => format!("{option} {value}"),
        }
    }

    fn validate(self) -> Result<VmSpec, SpecError> {
        if self.file.version != file::VERSION {
            let argument = self.argument("--spec", "version", &self.file.version.to_string());
            return Err(SpecError::new(&argument, format!("this ozone reads version {}", file::VERSION)));
        }
        let name = self.name()?;
        let cpus = self.cpus()?;
        let memory = self.memory()?;
        let kernel = match &self.file.kernel {
            None => return Err(SpecError::new("--kernel", "missing: give the kernel to boot, as --kernel vmlinuz")),
            Some(path) => {
                Given { value: path_of(path, "--kernel")?, argument: self.argument("--kernel", "kernel", path) }
            }
        };
        let initrd = match &self.file.initrd {
            None => None,
            Some(path) => {
                Some(Given { value: path_of(path, "--initrd")?, argument: self.argument("--initrd", "initrd", path) })
            }
        };
        let status_file = self.file.status_file.as_ref().map(|path| {
            let argument = self.argument("--status-file", "status-file", path);
            Ok(Given { value: path_of(path, &argument)?, argument })
        });
        let append = self.file.append.clone().unwrap_or_default();
        if append.len() > APPEND_MAX {
            let argument = self.argument("--append", "append", "…");
            let length = append.len();
            return Err(SpecError::new(
                &argument,
                format!("{length} bytes, where a command line has at most {APPEND_MAX}"),
            ));
        }
        if append.chars().any(char::is_control) {
            return Err(SpecError::new(&self.argument("--append", "append", &append), "a control character in it"));
        }

        let (limits, in_file) = (self.limits()?, self.limits_of_file()?);
        let uid_base = self.uid_base()?;
        let machine = self.file.machine.unwrap_or_default();
        let mut devices = Vec::new();
        for ((id, entry), argument) in self.file.devices.0.into_iter().zip(self.arguments) {
            let slot = u8::try_from(devices.len()).ok().filter(|slot| usize::from(*slot) < machine.slots());
            let Some(slot) = slot else {
                let problem = format!("one device too many; the machine has room for {}", machine.slots());
                return Err(SpecError::new(&argument, problem));
            };
            let policy =
                Policy { restart: entry.restart.unwrap_or_default(), on_fail: entry.on_fail.unwrap_or_default() };
            let config = config(entry.device, &argument)?;
            let on_stdio = |config: &DeviceConfig| matches!(config, DeviceConfig::Console(ConsoleFile::Stdio));
            if on_stdio(&config) && devices.iter().any(|other: &Device| on_stdio(&other.config)) {
                return Err(SpecError::new(&argument, "only one console can be on stdio"));
            }
            devices.push(Device { id, slot, config, policy, argument: argument.escape_debug().to_string() });
        }
        let limits = Limits { list: limits::merge(self.limits, in_file, &devices)?, ..limits }.checked()?;
        Ok(VmSpec {
            name,
            machine,
            cpu: self.file.cpu.unwrap_or_default(),
            cpus,
            memory,
            kernel,
            initrd,
            append,
            reboot: self.file.reboot.unwrap_or(true),
            limits,
            uid_base,
            log_format: self.file.log_format.unwrap_or_default(),
            status_file: status_file.transpose()?,
            devices,
        })
    }

    /// The first of the machine's uids. The highest number stands for none in system calls, and one is everybody's.
    fn uid_base(&self) -> Result<Option<Given<u32>>, SpecError> {
        let Some(first) = self.file.uid_base else { return Ok(None) };
        let argument = self.argument("--uid-base", "uid-base", &first.to_string());
        // The core's, and one per device.
        let last = first.saturating_add(self.file.devices.0.len() as u64);
        let problem = match u32::try_from(first) {
            Ok(0) => "uid 0 is root's; give a number that no user of this host has".to_owned(),
            _ if last > u64::from(UID_MAX) => {
                format!("the last of the machine's uids would be {last}, and there is none above {UID_MAX}")
            }
            _ if (first..=last).contains(&u64::from(NOBODY)) => {
                format!(
                    "the machine's uids {first} to {last} have {NOBODY} among them, which is nobody's and so everybody's"
                )
            }
            Ok(value) => return Ok(Some(Given { value, argument })),
            Err(_) => "not a uid".to_owned(),
        };
        Err(SpecError::new(&argument, problem))
    }

    /// Where the limits hold, and the node; the list of limits comes when the devices are known.
    fn limits(&self) -> Result<Limits, SpecError> {
        let numa = self.file.numa.map(|node| {
            let argument = self.argument("--numa", "numa", &node.to_string());
            Given { value: node, argument }
        });
        let parent = self.file.cgroup_parent.as_ref().map(|path| {
            let argument = self.argument("--cgroup-parent", "cgroup-parent", path);
            let value = limits::parent(path).map_err(|problem| SpecError::new(&argument, problem))?;
            Ok(Given { value, argument })
        });
        Ok(Limits { list: Vec::new(), numa, parent: parent.transpose()? })
    }

    fn limits_of_file(&self) -> Result<Vec<Limit>, SpecError> {
        let path = self.path.as_deref().unwrap_or_default();
        let mut list: Vec<Limit> = Vec::new();
        for (name, values) in &self.file.limits.0 {
            for value in values.texts() {
                let argument = format!("limits.{name} {value} in {path}");
                let limit = limits::parse(name, &value, argument)?;
                if list.iter().any(|other| other.is_rival_of(&limit)) {
                    return Err(SpecError::Value { argument: limit.argument, problem: "given already".to_owned() });
                }
                list.push(limit);
            }
        }
        Ok(list)
    }

    fn name(&self) -> Result<Option<String>, SpecError> {
        let Some(name) = self.file.name.clone() else { return Ok(None) };
        if runtime::is_name(&name) {
            Ok(Some(name))
        } else {
            Err(SpecError::new(&self.argument("--name", "name", &name), NAME))
        }
    }

    fn cpus(&self) -> Result<Given<Cpus>, SpecError> {
        let boot = self.file.cpus.boot.unwrap_or(1);
        let max = self.file.cpus.max.unwrap_or(boot);
        let argument = self.argument("--cpus", "cpus", &boot.to_string());
        let wrong = |problem: String| SpecError::new(&argument, problem);
        if boot == 0 {
            return Err(wrong("a machine has at least 1 processor".to_owned()));
        }
        let number = |number: u32| u8::try_from(number).ok().filter(|number| *number <= CPUS_MAX);
        let too_many = || wrong(format!("a machine has at most {CPUS_MAX} processors"));
        let cpus = Cpus { boot: number(boot).ok_or_else(too_many)?, max: number(max).ok_or_else(too_many)? };
        if cpus.max < cpus.boot {
            return Err(wrong(format!("cpus.max is {max}, less than the {boot} to start with")));
        }
        Ok(Given { value: cpus, argument })
    }

    fn memory(&self) -> Result<Given<Memory>, SpecError> {
        let memory = &self.file.memory;
        let given = memory.size.as_ref().map_or_else(|| "256M".to_owned(), ToString::to_string);
        let argument = self.argument("--memory", "memory.size", &given);
        let wrong = |problem: String| SpecError::new(&argument, problem);
        let size = bytes(memory.size.as_ref().unwrap_or(&Size::Bytes(256 << 20))).map_err(&wrong)?;
        if size < MEMORY_MIN {
            return Err(wrong(format!("a machine has at least {}", size::text(MEMORY_MIN))));
        }
        if size % 4096 != 0 {
            return Err(wrong("not a multiple of 4096 bytes".to_owned()));
        }
        if memory.max.as_ref().is_some_and(|max| bytes(max) != Ok(size)) || memory.slots.unwrap_or(0) != 0 {
            return Err(wrong(
                "memory.max other than the size and memory.slots other than 0 are not supported yet".to_owned(),
            ));
        }
        Ok(Given { value: Memory { size, max: size, slots: 0 }, argument })
    }
}

fn read_file(path: &str) -> Result<SpecFile, SpecError> {
    let read = |path: &str| {
        let file = std::fs::File::open(path)?;
        let mut text = String::new();
        file.take(FILE_MAX + 1).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read(path).map_err(|error| SpecError::Read { path: path.to_owned(), error })?;
    if text.len() as u64 > FILE_MAX {
        return Err(SpecError::new(&format!("--spec {path}"), "larger than 1 MiB"));
    }
    serde_json::from_str(&text).map_err(|error| SpecError::Parse { path: path.to_owned(), error })
}

fn path_of(text: &str, argument: &str) -> Result<PathBuf, SpecError> {
    if text.is_empty() || text.contains('\0') {
        return Err(SpecError::new(argument, "not a path"));
    }
    Ok(PathBuf::from(text))
}

fn bytes(size: &Size) -> Result<u64, String> {
    match size {
        Size::Bytes(bytes) => Ok(*bytes),
        Size::Text(text) => size::parse(text),
    }
}

fn config(device: DeviceFile, argument: &str) -> Result<DeviceConfig, SpecError> {
    let wrong = |problem: String| SpecError::new(argument, problem);
    let queues = |kind: DeviceKind, queues: Option<u32>| {
        let most = kind.most_queues();
        let queues = u16::try_from(queues.unwrap_or(1)).ok().filter(|queues| (1..=most).contains(queues));
        queues.ok_or_else(|| wrong(format!("queues is 1 to {most}")))
    };
    match device {
        DeviceFile::Disk(DiskFile { path, readonly, direct, queues: number }) => Ok(DeviceConfig::Disk(Disk {
            path: path_of(&path, argument)?,
            read_only: readonly,
            direct,
            queues: queues(DeviceKind::Blk, number)?,
        })),
        DeviceFile::Net(NetFile { tap, mac, mtu, host_ip, queues: number }) => {
            let tap = match (tap, host_ip) {
                (Some(_), Some(_)) => {
                    let problem =
                        "host-ip is for a tap made for the run; give an address to yours with 'ip address add'";
                    return Err(wrong(problem.to_owned()));
                }
                (Some(name), None) => Tap::Named(tap_name(name).map_err(wrong)?),
                (None, text) => Tap::Made(text.as_deref().map(host_ip_of).transpose().map_err(wrong)?),
            };
            let mac = mac.as_deref().map_or_else(|| Ok(drawn_mac()), mac_of).map_err(wrong)?;
            let mtu = mtu.map(|mtu| {
                // Below 68 bytes IPv4 does not work (RFC 791); 65521 is the most that a tap takes.
                u16::try_from(mtu)
                    .ok()
                    .filter(|mtu| (68..=65521).contains(mtu))
                    .ok_or_else(|| wrong("mtu is 68 to 65521".to_owned()))
            });
            Ok(DeviceConfig::Net(Net { tap, mac, mtu: mtu.transpose()?, queues: queues(DeviceKind::Net, number)? }))
        }
        DeviceFile::Console(place) => {
            if let ConsoleFile::File(path) | ConsoleFile::Socket(path) = &place {
                path_of(path, argument)?;
            }
            Ok(DeviceConfig::Console(place))
        }
    }
}

fn tap_name(name: String) -> Result<String, String> {
    // What the kernel takes as an interface's name (dev_valid_name), without the '%' of a pattern.
    let odd = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
    if (1..=15).contains(&name.len()) && name != "." && name != ".." && !name.contains(odd) {
        Ok(name)
    } else {
        Err(format!("tap={} is not a name of a network interface", name.escape_debug()))
    }
}

fn host_ip_of(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)));
    match parsed {
        Some((address, prefix)) if (1..=32).contains(&prefix) => Ok((address, prefix)),
        _ => Err(format!("host-ip={text} is not an address with a prefix length, as 192.168.100.1/24")),
    }
}

fn mac_of(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("mac={text} is not a MAC address, as 52:54:00:12:34:56");
    let parts: Vec<&str> = text.split(':').collect();
    let mut mac = [0; 6];
    if parts.len() != mac.len() {
        return Err(wrong());
    }
    for (byte, part) in mac.iter_mut().zip(parts) {
        if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if mac == [0; 6] || mac[0] & 1 == 1 {
        return Err(format!("mac={text} is no address of a single interface: it is zero or has the group bit"));
    }
    Ok(mac)
}

/// A random, locally administered address.
fn drawn_mac() -> [u8; 6] {
    // The standard library seeds every RandomState from the kernel's random numbers.
    let [_, _, mut mac @ ..] = RandomState::new().build_hasher().finish().to_be_bytes();
    mac[0] = (mac[0] & !1) | 2;
    mac
}

impl From<&VmSpec> for SpecFile {
    fn from(spec: &VmSpec) -> Self {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let device = |device: &Device| {
            let file = match &device.config {
                DeviceConfig::Disk(disk) => DeviceFile::Disk(DiskFile {
                    path: text(&disk.path),
                    readonly: disk.read_only,
                    direct: disk.direct,
                    queues: Some(disk.queues.into()),
                }),
                DeviceConfig::Net(net) => DeviceFile::Net(NetFile {
                    tap: match &net.tap {
                        Tap::Named(name) => Some(name.clone()),
                        Tap::Made(_) => None,
                    },
                    mac: Some(net.mac.map(|byte| format!("{byte:02x}")).join(":")),
                    mtu: net.mtu.map(u32::from),
                    host_ip: match &net.tap {
                        Tap::Made(Some((address, prefix))) => Some(format!("{address}/{prefix}")),
                        _ => None,
                    },
                    queues: Some(net.queues.into()),
                }),
                DeviceConfig::Console(place) => DeviceFile::Console(place.clone()),
            };
            let Policy { restart, on_fail } = device.policy;
            (device.id.clone(), DeviceEntry { device: file, restart: Some(restart), on_fail: Some(on_fail) })
        };
        Self {
            version: file::VERSION,
            name: spec.name.clone(),
            machine: Some(spec.machine),
            cpu: Some(spec.cpu),
            cpus: CpusFile { boot: Some(spec.cpus.value.boot.into()), max: Some(spec.cpus.value.max.into()) },
            memory: MemoryFile {
                size: Some(Size::Text(size::text(spec.memory.value.size))),
                max: Some(Size::Text(size::text(spec.memory.value.max))),
                slots: Some(spec.memory.value.slots.into()),
            },
            kernel: Some(text(&spec.kernel.value)),
            initrd: spec.initrd.as_ref().map(|initrd| text(&initrd.value)),
            append: Some(spec.append.clone()),
            reboot: Some(spec.reboot),
            limits: LimitsFile::new(spec.limits.list.iter().map(|limit| (limit.name(), limit.value.clone()))),
            numa: spec.limits.numa.as_ref().map(|numa| numa.value),
            cgroup_parent: spec
                .limits
                .parent
                .as_ref()
                .map(|parent| text(&Path::new(limits::MOUNT).join(&parent.value))),
            uid_base: spec.uid_base.as_ref().map(|first| first.value.into()),
            log_format: Some(spec.log_format),
            status_file: spec.status_file.as_ref().map(|file| text(&file.value)),
            devices: Devices(spec.devices.iter().map(device).collect()),
        }
    }
}

#[cfg(test)]
mod tests;
