//! A VM under test: `ozone run` with pipes for the console, and a guest that takes commands.
//!
//! Every wait has a deadline, and says what it waited for and what came instead.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use serde::de::DeserializeOwned;
use tempfile::TempPath;

use agent::layout;

use crate::artifacts::{self, GuestFiles};
use crate::process_table::{self, Process};
use crate::{child, paths};

/// From `ozone run` to the guest's answer, also on a slow and busy machine.
pub const BOOT: Duration = Duration::from_secs(60);

/// For everything that a booted guest does at once.
pub const ANSWER: Duration = Duration::from_secs(30);

/// Opens the power button as descriptor 3 of the guest's shell. An event is lost to a reader that has not opened the device yet.
pub const OPEN_POWER_BUTTON: &str =
    "exec 3< /dev/input/$(grep -l 'Power Button' /sys/class/input/event*/device/name | cut -d/ -f5)";

/// A failure shows this much of what came instead.
const SHOWN: usize = 3000;

/// The product's executable of that name: in the test host the one that was put there.
#[must_use]
pub fn executable(name: &str) -> PathBuf {
    match std::env::var_os(layout::IN_HOST) {
        Some(_) => Path::new(layout::EXECUTABLES).join(name),
        None => paths::release().join(name),
    }
}

/// A guest to boot: the arguments of `ozone run`.
#[derive(Clone, Debug)]
pub struct Guest {
    files: GuestFiles,
    kernel: PathBuf,
    initramfs: PathBuf,
    init: String,
    append: Vec<String>,
    options: Vec<OsString>,
    has_disk: bool,
    console: String,
    keys: String,
    /// Kept for as long as the guest may be booted.
    made: Option<Arc<TempPath>>,
    ozone: PathBuf,
}

impl Guest {
    /// Debian's 6.1 kernel with a console and nothing else, taking commands in its initramfs.
    pub fn new() -> Result<Self> {
        let files = GuestFiles::here()?;
        Ok(Self {
            kernel: files.bzimage_6_1(),
            initramfs: files.initramfs_6_1(),
            files,
            init: "commands".to_owned(),
            append: Vec::new(),
            options: Vec::new(),
            has_disk: false,
            console: "hvc0".to_owned(),
            keys: String::new(),
            made: None,
            ozone: executable("ozone"),
        })
    }

    /// The 6.12 kernel instead.
    #[must_use]
    pub fn kernel_6_12(mut self) -> Self {
        self.kernel = self.files.bzimage_6_12();
        self.initramfs = self.files.initramfs_6_12();
        self
    }

    /// The ELF kernel instead.
    #[must_use]
    pub fn elf(mut self) -> Self {
        self.kernel = self.files.vmlinux_6_1();
        self
    }

    /// What the guest's init does: `commands` (the default), `shell`, `check`, `poweroff`, `reboot`, `panic`.
    #[must_use]
    pub fn init(mut self, what: &str) -> Self {
        what.clone_into(&mut self.init);
        self
    }

    /// The guest's console: `hvc0` (the default) or `ttyS0`.
    #[must_use]
    pub fn console(mut self, name: &str) -> Self {
        name.clone_into(&mut self.console);
        self
    }

    /// Programs for the guest's `/bin`, by their names among the executables. They are in its initramfs: not for a guest
    /// with a root disk.
    pub fn programs(mut self, names: &[&str]) -> Result<Self> {
        let paths: Vec<_> = names.iter().map(|name| executable(name)).collect();
        let paths: Vec<_> = paths.iter().map(PathBuf::as_path).collect();
        let made = artifacts::with_programs(&self.initramfs, &paths)?;
        self.initramfs = made.to_path_buf();
        self.made = Some(Arc::new(made));
        Ok(self)
    }

    /// Another `ozone` than the one that was built.
    #[must_use]
    pub fn ozone(mut self, path: PathBuf) -> Self {
        self.ozone = path;
        self
    }

    /// More words for the kernel's command line.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.append.push(words.to_owned());
        self
    }

    /// An option of `ozone run` with its value, such as `("--cpus", "2")`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.options.extend([name.into(), value.as_ref().to_owned()]);
        self
    }

    /// Keys that every device gets, such as `on-fail=stop-vm`.
    #[must_use]
    pub fn keys(mut self, keys: &str) -> Self {
        self.keys = format!(",{keys}");
        self
    }

    /// A disk. The first one is the guest's root.
    #[must_use]
    pub fn disk(mut self, path: &Path) -> Self {
        self.has_disk = true;
        let mut value = OsString::from("path=");
        value.push(path);
        self.option("--disk", value)
    }

    /// A NIC on a fresh tap. The host has `host` (with `/BITS`), the guest's eth0 has `guest`.
    #[must_use]
    pub fn net(self, host: &str, guest: &str) -> Self {
        let address = host.split('/').next().unwrap_or(host);
        let words = format!("ozone.ip={guest} ozone.ping={address}");
        self.append(&words).option("--net", format!("host-ip={host}"))
    }

    /// The arguments after `ozone`.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let mut words = vec!["console=ttyS0".to_owned()];
        if self.console != "ttyS0" {
            words.push(format!("console={}", self.console));
        }
        words.extend(["quiet", "panic=-1"].map(str::to_owned));
        words.push(format!("ozone.init={}", self.init));
        if self.has_disk {
            words.push("root=/dev/vda".to_owned());
        }
        words.extend(self.append.iter().cloned());
        let mut arguments: Vec<OsString> = vec!["run".into()];
        arguments.extend(["--kernel".into(), self.kernel.clone().into()]);
        arguments.extend(["--initrd".into(), self.initramfs.clone().into()]);
        arguments.extend(["--append".into(), words.join(" ").into()]);
        let options = ["--console".into(), "stdio".into()].into_iter().chain(self.options.iter().cloned());
        let mut is_device = false;
        for mut word in options {
            if is_device {
                word.push(&self.keys);
            }
            is_device = ["--disk", "--net", "--console"].iter().any(|option| word == *option);
            arguments.push(word);
        }
        arguments
    }

    /// Starts it.
    pub fn start(&self) -> Result<Vm> {
        Vm::start_with(&self.ozone, self.arguments())
    }

    /// Starts it and waits until it takes commands.
    pub fn boot(&self) -> Result<Vm> {
        let mut vm = self.start()?;
        vm.expect("ozone-guest: ready\n", BOOT)?;
        Ok(vm)
    }

    /// A fresh copy of the root disk, removed with the returned value.
    pub fn root_disk(&self) -> Result<tempfile::TempPath> {
        let mut from = std::fs::File::open(self.files.root_disk()).context("open the root disk")?;
        let mut copy = tempfile::NamedTempFile::new()?;
        std::io::copy(&mut from, &mut copy).context("copy the root disk")?;
        Ok(copy.into_temp_path())
    }
}

/// A running `ozone`, killed on drop.
pub struct Vm {
    /// What failures call it.
    name: String,
    child: Child,
    started: Instant,
    stdin: Option<ChildStdin>,
    console: Stream,
    errors: Stream,
    commands: u32,
}

impl Vm {
    /// Starts `ozone` with these arguments.
    pub fn start<I, S>(arguments: I) -> Result<Self>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        Self::start_with(&executable("ozone"), arguments)
    }

    /// Starts this `ozone` with these arguments.
    pub fn start_with<I, S>(program: &Path, arguments: I) -> Result<Self>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::spawn(&mut command).with_context(|| format!("start {}", program.display()))
    }

    /// Starts any program that behaves as `ozone run` does; its stdio must be pipes.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let started = Instant::now();
        let mut child = child::spawn(command, Vec::new())?;
        let stdin = child.stdin.take();
        let console = Stream::new(child.stdout.take().context("no pipe")?);
        let errors = Stream::new(child.stderr.take().context("no pipe")?);
        Ok(Self { name, child, started, stdin, console, errors, commands: 0 })
    }

    /// The id of the `ozone` process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    /// Time since it was started.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits until the console shows `text`, and returns what came before it.
    pub fn expect(&mut self, text: &str, deadline: Duration) -> Result<String> {
        self.console.expect(text, deadline).map_err(|error| {
            let errors = self.errors.text();
            anyhow::anyhow!("console: {error:#}\n--- standard error of {}:\n{}", self.name, end_of(&errors))
        })
    }

    /// Waits until ozone's standard error shows `text`, and returns what came before it.
    pub fn expect_error(&mut self, text: &str, deadline: Duration) -> Result<String> {
        self.errors.expect(text, deadline).context("standard error")
    }

    /// Types bytes on the console.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the console's input is closed")?;
        stdin.write_all(bytes).and_then(|()| stdin.flush()).context("write to the console")
    }

    /// Types a line on the console.
    pub fn send_line(&mut self, line: &str) -> Result<()> {
        self.send(format!("{line}\n").as_bytes())
    }

    /// Runs a command in a guest whose init takes commands; returns its exit status and its output.
    pub fn command(&mut self, line: &str, deadline: Duration) -> Result<(i32, String)> {
        self.commands += 1;
        let mark = format!("ozone-end-{}:", self.commands);
        self.send_line(&format!("{line}\necho {mark}$status."))?;
        let output = self.expect(&mark, deadline).with_context(|| format!("in the guest: {line}"))?;
        let status = self.expect(".\n", ANSWER)?;
        Ok((status.parse().with_context(|| format!("exit status '{status}'"))?, output))
    }

    /// Waits for one line of JSON on the console.
    pub fn expect_json<T: DeserializeOwned>(&mut self, deadline: Duration) -> Result<T> {
        self.expect("{", deadline)?;
        let rest = self.expect("\n", deadline)?;
        serde_json::from_str(&format!("{{{rest}")).with_context(|| format!("not the JSON that was awaited: {{{rest}"))
    }

    /// Runs a command in the guest that must succeed; returns its output.
    pub fn guest(&mut self, line: &str) -> Result<String> {
        let (status, output) = self.command(line, ANSWER)?;
        ensure!(status == 0, "in the guest: {line}: exit status {status}\n{output}");
        Ok(output)
    }

    /// Waits until `ozone` ends.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
        let timeout = Timespec::try_from(deadline).context("deadline")?;
        // The process is not reaped until we do it below, so the descriptor means this one.
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).context("poll")?;
        if ready == 0 {
            bail!(
                "{} did not end within {deadline:?}\n--- console:\n{}\n--- standard error:\n{}",
                self.name,
                end_of(&self.console.text()),
                end_of(&self.errors.text())
            );
        }
        Ok(self.child.wait()?)
    }

    /// Waits until `ozone` ends, which must be with this exit code.
    pub fn expect_exit(&mut self, code: i32, deadline: Duration) -> Result<()> {
        let status = self.wait(deadline)?;
        ensure!(
            status.code() == Some(code),
            "{} ended with {} instead of exit code {code}\n--- console:\n{}\n--- standard error:\n{}",
            self.name,
            status.signal().map_or_else(|| status.to_string(), |signal| format!("signal {signal}")),
            end_of(&self.console.text()),
            end_of(&self.errors.text())
        );
        Ok(())
    }

    /// Powers the guest off, after which `ozone` must end with 0.
    pub fn power_off(&mut self) -> Result<()> {
        self.send_line("sync; poweroff -f")?;
        self.expect_exit(0, ANSWER)
    }

    /// Sends a signal to `ozone`.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), signal)?)
    }

    /// Closes the console's input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The VM's processes, `ozone` first.
    pub fn processes(&self) -> Result<Vec<Process>> {
        process_table::read(self.pid())
    }

    /// All that the console showed so far.
    #[must_use]
    pub fn console_text(&self) -> String {
        self.console.text()
    }

    /// All that `ozone` wrote to its standard error so far.
    #[must_use]
    pub fn error_text(&self) -> String {
        self.errors.text()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn end_of(text: &str) -> &str {
    let start = text.len().saturating_sub(SHOWN);
    let start = (start..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(start..).unwrap_or_default()
}

/// Output that a thread collects.
struct Stream {
    shared: Arc<(Mutex<Collected>, Condvar)>,
    /// Up to here it was matched.
    position: usize,
}

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn new(mut source: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Collected::default()), Condvar::new()));
        let writer = Arc::clone(&shared);
        thread::spawn(move || {
            let mut block = vec![0; 16 << 10];
            loop {
                let count = source.read(&mut block).unwrap_or(0);
                let mut collected = lock(&writer.0);
                // Terminals end lines with both characters.
                let data = block.get(..count).unwrap_or_default();
                collected.bytes.extend(data.iter().filter(|byte| **byte != b'\r'));
                collected.ended = count == 0;
                writer.1.notify_all();
                if count == 0 {
                    break;
                }
            }
        });
        Self { shared, position: 0 }
    }

    fn expect(&mut self, text: &str, deadline: Duration) -> Result<String> {
        let start = Instant::now();
        let (mutex, changed) = &*self.shared;
        let mut collected = lock(mutex);
        loop {
            let rest = collected.bytes.get(self.position..).unwrap_or_default();
            if let Some(found) = find(rest, text.as_bytes()) {
                let before = String::from_utf8_lossy(rest.get(..found).unwrap_or_default()).into_owned();
                self.position += found + text.len();
                return Ok(before);
            }
            let left = deadline.saturating_sub(start.elapsed());
            if collected.ended || left.is_zero() {
                let why = if collected.ended { "ended" } else { "has not shown it" };
                let seen = String::from_utf8_lossy(rest).into_owned();
                bail!("awaited '{text}'; after {:.1?} it {why}; last seen:\n{}", start.elapsed(), end_of(&seen));
            }
            collected = changed.wait_timeout(collected, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared.0).bytes).into_owned()
    }
}

fn lock(mutex: &Mutex<Collected>) -> MutexGuard<'_, Collected> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Vm {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Vm::spawn(&mut command).unwrap()
    }

    #[test]
    fn output_is_awaited_in_order() {
        let mut vm = shell("echo one; read -r word; echo two $word; exit 3");
        assert_eq!(vm.expect("one\n", ANSWER).unwrap(), "");
        vm.send_line("three").unwrap();
        assert_eq!(vm.expect("three", ANSWER).unwrap(), "two ");
        vm.expect_exit(3, ANSWER).unwrap();
    }

    #[test]
    fn a_failure_says_what_came_instead() {
        let error = shell("echo other; echo why >&2").expect("text", ANSWER).unwrap_err().to_string();
        assert!(error.contains("awaited 'text'") && error.contains("other"), "{error}");
        let mut silent = shell("exec sleep 1000");
        let error = silent.expect("text", Duration::from_millis(10)).unwrap_err().to_string();
        assert!(error.contains("has not shown it"), "{error}");
        assert!(silent.wait(Duration::from_millis(10)).is_err());
    }

    #[test]
    fn commands_have_a_status_and_an_output() {
        let mut vm = shell("while read -r line; do eval \"$line\"; status=$?; done");
        assert_eq!(vm.guest("echo a b").unwrap(), "a b\n");
        assert_eq!(vm.command("(exit 4)", ANSWER).unwrap(), (4, String::new()));
    }
}
