//! Options with keys: `--disk path=root.img,readonly`.

use protocol::DeviceId;

use super::SpecError;
use super::file::{ConsoleFile, DeviceEntry, DeviceFile, DiskFile, NetFile};
use super::policy::{self, Word};

/// A device as an option gives it: perhaps without a name, which is chosen later then.
#[derive(Debug)]
pub struct OptionDevice {
    /// The name, if one is given.
    pub id: Option<DeviceId>,
    /// What it is, and what is done when its process is lost.
    pub entry: DeviceEntry,
    /// The option as the user wrote it, for messages.
    pub argument: String,
}

/// The keys of one option, each used up as it is read.
struct Keys<'a> {
    argument: String,
    pairs: Vec<(String, Option<String>)>,
    known: &'a [&'a str],
}

impl<'a> Keys<'a> {
    fn parse(option: &str, text: &str, known: &'a [&'a str]) -> Result<Self, SpecError> {
        let argument = format!("{option} {text}");
        let wrong = |problem: String| SpecError::new(&argument, problem);
        let mut pairs: Vec<(String, Option<String>)> = Vec::new();
        for part in split(text) {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (part, None),
            };
            if !known.contains(&key.as_str()) {
                let list = known.join(", ");
                return Err(wrong(format!("unknown key '{}'; the keys are {list}", key.escape_debug())));
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(wrong(format!("the key '{key}' is given twice")));
            }
            pairs.push((key, value));
        }
        Ok(Self { argument, pairs, known })
    }

    fn wrong(&self, problem: impl Into<String>) -> SpecError {
        SpecError::new(&self.argument, problem)
    }

    fn take(&mut self, key: &str) -> Option<Option<String>> {
        debug_assert!(self.known.contains(&key));
        let place = self.pairs.iter().position(|(other, _)| other == key)?;
        Some(self.pairs.swap_remove(place).1)
    }

    fn text(&mut self, key: &str) -> Result<Option<String>, SpecError> {
        match self.take(key) {
            None => Ok(None),
            Some(Some(value)) if !value.is_empty() => Ok(Some(value)),
            Some(_) => Err(self.wrong(format!("the key '{key}' needs a value: {key}=…"))),
        }
    }

    fn number(&mut self, key: &str) -> Result<Option<u32>, SpecError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.wrong(format!("{key}={text} is not a number")))
    }

    fn flag(&mut self, key: &str) -> Result<bool, SpecError> {
        match self.take(key) {
            None => Ok(false),
            Some(None) => Ok(true),
            Some(Some(value)) if value == "on" || value == "true" => Ok(true),
            Some(Some(value)) if value == "off" || value == "false" => Ok(false),
            Some(Some(value)) => Err(self.wrong(format!("{key}={value}: it is on or off"))),
        }
    }

    fn word<T: Word>(&mut self, key: &str) -> Result<Option<T>, SpecError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        let value = policy::word(&text);
        value.map(Some).map_err(|words| self.wrong(format!("{key}={}: it is {words}", text.escape_debug())))
    }

    /// The keys that every device has are read last.
    fn device(mut self, device: DeviceFile) -> Result<OptionDevice, SpecError> {
        let entry = DeviceEntry { device, restart: self.word("restart")?, on_fail: self.word("on-fail")? };
        Ok(OptionDevice { id: self.id()?, entry, argument: self.argument })
    }

    fn id(&mut self) -> Result<Option<DeviceId>, SpecError> {
        let Some(text) = self.text("id")? else { return Ok(None) };
        DeviceId::try_from(text).map(Some).map_err(|problem| self.wrong(problem))
    }
}

/// Splits at commas; two of them stand for one inside of a value.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

/// Reads a `--disk`.
///
/// # Errors
/// [`SpecError`] naming the option and the key.
pub fn disk(text: &str) -> Result<OptionDevice, SpecError> {
    let mut keys = Keys::parse("--disk", text, &["path", "readonly", "direct", "queues", "id", "restart", "on-fail"])?;
    let path = keys.text("path")?.ok_or_else(|| keys.wrong("the key 'path' is missing: path=IMAGE"))?;
    let (readonly, direct) = (keys.flag("readonly")?, keys.flag("direct")?);
    let device = DiskFile { path, readonly, direct, queues: keys.number("queues")? };
    keys.device(DeviceFile::Disk(device))
}

/// Reads a `--net`.
///
/// # Errors
/// [`SpecError`] naming the option and the key.
pub fn net(text: &str) -> Result<OptionDevice, SpecError> {
    let mut keys = Keys::parse("--net", text, &["tap", "mac", "mtu", "host-ip", "queues", "id", "restart", "on-fail"])?;
    let device = NetFile {
        tap: keys.text("tap")?,
        mac: keys.text("mac")?,
        mtu: keys.number("mtu")?,
        host_ip: keys.text("host-ip")?,
        queues: keys.number("queues")?,
    };
    keys.device(DeviceFile::Net(device))
}

/// Reads a `--console`.
///
/// # Errors
/// [`SpecError`] naming the option and the key.
pub fn console(text: &str) -> Result<OptionDevice, SpecError> {
    let mut keys = Keys::parse("--console", text, &["stdio", "pty", "file", "socket", "id", "restart", "on-fail"])?;
    let mut places = Vec::new();
    for key in ["stdio", "pty"] {
        match keys.take(key) {
            None => {}
            Some(None) => places.push(if key == "stdio" { ConsoleFile::Stdio } else { ConsoleFile::Pty }),
            Some(Some(_)) => return Err(keys.wrong(format!("the key '{key}' takes no value"))),
        }
    }
    places.extend(keys.text("file")?.map(ConsoleFile::File));
    places.extend(keys.text("socket")?.map(ConsoleFile::Socket));
    let [place] = <[ConsoleFile; 1]>::try_from(places)
        .map_err(|_| keys.wrong("it goes to one place: stdio, pty, file=PATH or socket=PATH"))?;
    keys.device(DeviceFile::Console(place))
}
