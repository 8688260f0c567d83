//! A real systemd, as the first process of namespaces of its own and with a control group delegated to it: what a container's
//! is. It needs no boot of another host.
#![allow(unsafe_code)]

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::artifacts::{GuestFiles, Userland};
use crate::child;
use crate::vm::{BOOT, executable};

/// The control group that it has.
const GROUP: &str = "/sys/fs/cgroup/with-systemd";

const INTERVAL: Duration = Duration::from_millis(50);

/// A running systemd, gone with all that it started when this is dropped.
pub struct Systemd {
    /// Waits for it outside of its pid namespace.
    outside: Child,
    pid: i32,
}

impl Systemd {
    /// Starts it and waits until it takes commands.
    pub fn start() -> Result<Self> {
        let userland = Userland::here()?;
        let guest = GuestFiles::here()?.bzimage_6_1();
        let (guest, product) = (parent(&guest)?, executable("ozone"));
        fs::create_dir(GROUP).context(GROUP)?;
        let procs = fs::File::options().write(true).open(format!("{GROUP}/cgroup.procs"))?;
        let mut command = Command::new("/bin/busybox");
        command.args(["unshare", "-p", "-f", "/bin/busybox", "sh", "-c", include_str!("systemd/enter.sh"), "enter"]);
        command.arg(userland.root()).arg(guest).arg(parent(&product)?).arg(GROUP).stdin(Stdio::null());
        command.env_clear().env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin");
        // SAFETY: between fork and exec the child makes system calls only, with constants and a descriptor opened before.
        unsafe {
            command.pre_exec(move || {
                (&procs).write_all(b"0")?;
                let namespaces = [CloneFlags::CLONE_NEWNS, CloneFlags::CLONE_NEWCGROUP, CloneFlags::CLONE_NEWIPC];
                unshare(namespaces.into_iter().fold(CloneFlags::CLONE_NEWUTS, CloneFlags::union))?;
                Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)?)
            });
        }
        let outside = child::spawn(&mut command, Vec::new()).context("start systemd's namespaces")?;
        let mut systemd = Self { outside, pid: 0 };
        systemd.pid = systemd.first_process()?;
        systemd.until("systemd takes commands", BOOT, |systemd| {
            let state = systemd.systemctl(&["is-system-running"])?.1;
            Ok(["running", "degraded"].contains(&state.trim()).then_some(()))
        })?;
        Ok(systemd)
    }

    fn first_process(&mut self) -> Result<i32> {
        let deadline = Instant::now() + BOOT;
        let outside = self.outside.id();
        loop {
            let children = fs::read_to_string(format!("/proc/{outside}/task/{outside}/children")).unwrap_or_default();
            if let Some(pid) = children.split_whitespace().next().and_then(|pid| pid.parse::<i32>().ok()) {
                // The group is systemd's alone, which waits for that.
                fs::write("/sys/fs/cgroup/cgroup.procs", outside.to_string())?;
                if fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "systemd") {
                    return Ok(pid);
                }
            }
            if let Some(status) = self.outside.try_wait()? {
                bail!("systemd did not start: {status}");
            }
            ensure!(Instant::now() < deadline, "awaited for {BOOT:?}: systemd as the first process");
            std::thread::sleep(INTERVAL);
        }
    }

    /// Where a path of its root is for this process.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// Writes a file in its root.
    pub fn write(&self, path: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let path = self.path(path);
        fs::create_dir_all(parent(&path)?)?;
        fs::write(&path, contents).with_context(|| path.display().to_string())
    }

    /// A command in its namespaces.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("/bin/busybox");
        command.args(["nsenter", "-t", &self.pid.to_string(), "-m", "-p", "-u", "-i"]).args(words);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").stdin(Stdio::null());
        command
    }

    /// Runs a command in its namespaces to the end.
    pub fn run(&self, words: &[&str]) -> Result<Output> {
        self.command(words).output().with_context(|| format!("run {words:?}"))
    }

    /// Runs `systemctl`; its exit code and all of its output.
    pub fn systemctl(&self, words: &[&str]) -> Result<(i32, String)> {
        let output = self.run(&[&["/bin/systemctl"], words].concat())?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned()))
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let (code, text) = self.systemctl(&["show", unit, "--value", "--property", name])?;
        ensure!(code == 0, "systemctl show {unit}: {text}");
        Ok(text.trim().to_owned())
    }

    /// What the journal has of a unit, and what is known of its state: for failures.
    pub fn told(&self, unit: &str) -> String {
        let status = self.systemctl(&["status", "--no-pager", "--full", unit]).map(|(_, text)| text);
        let journal = self.run(&["/bin/journalctl", "--no-pager", "--boot", "--unit", unit]);
        let journal = journal.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let record = fs::read_to_string(self.path("/var/lib/ozone/web1.status.json")).unwrap_or_default();
        format!("{}\n{}\n{record}", status.unwrap_or_default(), journal.unwrap_or_default())
    }

    /// Waits until something is so: systemd can be asked, and says nothing by itself to one that is no bus client.
    pub fn until<T>(
        &self,
        what: &str,
        patience: Duration,
        mut is_so: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = is_so(self)? {
                return Ok(found);
            }
            ensure!(Instant::now() < deadline, "awaited for {patience:?}: {what}");
            std::thread::sleep(INTERVAL);
        }
    }

    /// Waits until a property of a unit has a value.
    pub fn expect(&self, unit: &str, name: &str, value: &str, patience: Duration) -> Result<()> {
        let mut last = String::new();
        let found = self.until(name, patience, |systemd| {
            last = systemd.property(unit, name)?;
            Ok((last == value).then_some(()))
        });
        found.with_context(|| format!("{name} of {unit} is '{last}' instead of '{value}'\n{}", self.told(unit)))
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // The first process takes all others of its namespace along.
        if self.pid > 0 {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
        let _ = self.outside.kill();
        let _ = self.outside.wait();
    }
}

fn parent(path: &Path) -> Result<&Path> {
    path.parent().with_context(|| format!("{}: no directory", path.display()))
}
