//! The machine as JSON: what stands in the file of `--spec` and what `ozone spec` prints.

use std::fmt;
use std::marker::PhantomData;

use protocol::{CpuModel, DeviceId, Machine};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::policy::{OnFail, Restart};
use crate::report::Format;

/// The version of the format.
pub const VERSION: u32 = 1;

/// The whole file. Everything but the version may be left out; an unknown key is an error.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SpecFile {
    /// The version of the format.
    pub version: u32,
    /// The machine's name in messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The board.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// The processor model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuModel>,
    /// Numbers of processors.
    #[serde(default)]
    pub cpus: CpusFile,
    /// Sizes of memory.
    #[serde(default)]
    pub memory: MemoryFile,
    /// Path of the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Path of the initial ramdisk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// The kernel's command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// Whether a reset starts the machine again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reboot: Option<bool>,
    /// What the machine may use of its host, by the names that `--limit` has for it.
    #[serde(default, skip_serializing_if = "LimitsFile::is_empty")]
    pub limits: LimitsFile,
    /// The NUMA node for its processors and memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<u32>,
    /// The control group to make the machine's in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup_parent: Option<String>,
    /// The first uid of the machine's processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid_base: Option<u64>,
    /// The form of ozone's lines on standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<Format>,
    /// Path of the record of how the run ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status_file: Option<String>,
    /// The devices by name; their order is that of the board.
    #[serde(default)]
    pub devices: Devices,
}

impl Default for SpecFile {
    fn default() -> Self {
        Self {
            version: VERSION,
            name: None,
            machine: None,
            cpu: None,
            cpus: CpusFile::default(),
            memory: MemoryFile::default(),
            kernel: None,
            initrd: None,
            append: None,
            reboot: None,
            limits: LimitsFile::default(),
            numa: None,
            cgroup_parent: None,
            uid_base: None,
            log_format: None,
            status_file: None,
            devices: Devices::default(),
        }
    }
}

/// Numbers of processors.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CpusFile {
    /// Started with the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot: Option<u32>,
    /// That the machine has room for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
}

/// Sizes of memory.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MemoryFile {
    /// At the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// That the machine can grow to; has to equal the size as yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<Size>,
    /// Slots for more memory; has to be 0 as yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
}

/// A size: a text like `512M`, or a number of bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged, expecting = "a size: a text like \"512M\" or a number of bytes")]
pub enum Size {
    /// A number of bytes.
    Bytes(u64),
    /// With a unit.
    Text(String),
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(formatter, "{bytes}"),
            Self::Text(text) => formatter.write_str(text),
        }
    }
}

/// Limits by name, in the order of the text.
#[derive(Debug, Default)]
pub struct LimitsFile(pub Vec<(String, LimitFile)>);

/// The value of a limit. `io.max` can have several: one for each block device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged, expecting = "a limit: a text, a number, or a list of texts")]
pub enum LimitFile {
    /// A plain number.
    Number(u64),
    /// As `--limit` has it.
    Text(String),
    /// Several.
    List(Vec<String>),
}

impl LimitFile {
    /// Each value as `--limit` has it.
    pub fn texts(&self) -> Vec<String> {
        match self {
            Self::Number(number) => vec![number.to_string()],
            Self::Text(text) => vec![text.clone()],
            Self::List(texts) => texts.clone(),
        }
    }
}

impl LimitsFile {
    /// The limits of a machine as they stand in a file.
    pub fn new(limits: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut list: Vec<(String, LimitFile)> = Vec::new();
        for (name, value) in limits {
            match list.iter_mut().find(|(other, _)| *other == name) {
                Some((_, values)) => {
                    let mut texts = values.texts();
                    texts.push(value);
                    *values = LimitFile::List(texts);
                }
                None => list.push((name, LimitFile::Text(value))),
            }
        }
        Self(list)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One device, and what is done when its process is lost.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "Keys", into = "Keys")]
pub struct DeviceEntry {
    /// What it is.
    pub device: DeviceFile,
    /// When a lost process is started again.
    pub restart: Option<Restart>,
    /// What a loss means for the guest.
    pub on_fail: Option<OnFail>,
}

/// A device's keys as they stand in the file: exactly one of the first three.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Keys {
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<DiskFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    net: Option<NetFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    console: Option<ConsoleFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restart: Option<Restart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    on_fail: Option<OnFail>,
}

impl TryFrom<Keys> for DeviceEntry {
    type Error = &'static str;

    fn try_from(keys: Keys) -> Result<Self, Self::Error> {
        let device = match (keys.disk, keys.net, keys.console) {
            (Some(disk), None, None) => DeviceFile::Disk(disk),
            (None, Some(net), None) => DeviceFile::Net(net),
            (None, None, Some(console)) => DeviceFile::Console(console),
            _ => return Err("a device is one of 'disk', 'net' and 'console'"),
        };
        Ok(Self { device, restart: keys.restart, on_fail: keys.on_fail })
    }
}

impl From<DeviceEntry> for Keys {
    fn from(entry: DeviceEntry) -> Self {
        let keys = Self { restart: entry.restart, on_fail: entry.on_fail, ..Self::default() };
        match entry.device {
            DeviceFile::Disk(disk) => Self { disk: Some(disk), ..keys },
            DeviceFile::Net(net) => Self { net: Some(net), ..keys },
            DeviceFile::Console(console) => Self { console: Some(console), ..keys },
        }
    }
}

/// What a device is.
#[derive(Clone, Debug)]
pub enum DeviceFile {
    /// A disk.
    Disk(DiskFile),
    /// A network interface.
    Net(NetFile),
    /// A console.
    Console(ConsoleFile),
}

/// A disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskFile {
    /// The image or block device.
    pub path: String,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the host's page cache is passed by (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// Request queues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u32>,
}

/// A network interface.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetFile {
    /// An existing tap; one is made for the run when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The guest's MAC address; drawn when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The MTU; the tap's own, or 1500, when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The host's address and prefix length on a tap made for the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<String>,
    /// Queue pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u32>,
}

/// A console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleFile {
    /// Standard input and output of `ozone`.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// Output to the end of a file, no input.
    File(String),
    /// A unix socket to be made.
    Socket(String),
}

/// Devices by name, in the order of the text.
#[derive(Debug, Default)]
pub struct Devices(pub Vec<(DeviceId, DeviceEntry)>);

impl Serialize for Devices {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, device)| (id, device)))
    }
}

impl<'de> Deserialize<'de> for Devices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        in_order(deserializer, "device").map(Self)
    }
}

impl Serialize for LimitsFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, limit)| (name, limit)))
    }
}

impl<'de> Deserialize<'de> for LimitsFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        in_order(deserializer, "limit").map(Self)
    }
}

/// Reads a map in the order of the text, in which no key stands twice.
fn in_order<'de, D, K, V>(deserializer: D, thing: &'static str) -> Result<Vec<(K, V)>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + PartialEq + fmt::Display,
    V: Deserialize<'de>,
{
    struct InOrder<K, V>(&'static str, PhantomData<(K, V)>);

    impl<'de, K: Deserialize<'de> + PartialEq + fmt::Display, V: Deserialize<'de>> Visitor<'de> for InOrder<K, V> {
        type Value = Vec<(K, V)>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "{}s by name", self.0)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut pairs: Vec<(K, V)> = Vec::new();
            while let Some((key, value)) = map.next_entry::<K, V>()? {
                if pairs.iter().any(|(other, _)| *other == key) {
                    return Err(A::Error::custom(format!("{} '{key}' stands there twice", self.0)));
                }
                pairs.push((key, value));
            }
            Ok(pairs)
        }
    }

    deserializer.deserialize_map(InOrder(thing, PhantomData))
}
