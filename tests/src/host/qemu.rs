//! The emulator: its command line, its process, its log.

use std::fmt::Display;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use agent::layout;
use anyhow::{Context, Result};

use super::error::HostError;
use super::link::Link;
use super::parcel::Parcel;
use super::qmp::Qmp;
use crate::artifacts::{self, HostFiles};
use crate::{child, paths};

/// What never changes. The processor is EPYC-v3 less what QEMU gets wrong: old versions break cmpxchg16b, and none
/// lets KVM see that a guest sets XCR0, so that KVM runs the guest with another value than the guest believes in.
const MACHINE: &str =
    "-cpu EPYC-v3,-cx16,-xsave,-avx,-avx2,-f16c,-fma -nodefaults -no-user-config -display none -no-reboot -S";
/// The kernel's crypto self-tests were seen to hang; the processors' time stamp counters are one, whatever the kernel
/// measures between QEMU's threads.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 quiet mitigations=off cryptomgr.notests audit=0 tsc=reliable rdinit=/init";

/// What makes a host's time pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// This machine's time; two processors.
    #[default]
    Wall,
    /// Every executed instruction is a nanosecond, of one processor, and idle time is skipped: figures repeat, whatever else
    /// this machine does.
    Instructions,
}

impl Clock {
    fn options(self) -> &'static str {
        match self {
            Self::Wall => "-accel tcg,thread=multi -smp 2",
            Self::Instructions => "-accel tcg,thread=single -smp 1 -icount shift=0,sleep=off",
        }
    }
}

/// Logs of this many hosts are kept.
const KEPT_LOGS: usize = 60;

/// How the machine's memory file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// The file becomes the machine's memory: for making a snapshot.
    Save,
    /// The file is where the memory starts from; it is not written to.
    Resume,
}

/// Stands for everything here that a snapshot depends on.
pub fn key(clock: Clock) -> Result<String> {
    let version = artifacts::emulator()?.version()?;
    let options = clock.options();
    Ok(format!("{version}{MACHINE}{options}{KERNEL_COMMAND_LINE}{}", include_str!("qemu.rs")))
}

/// A QEMU process, killed on drop.
pub struct Qemu {
    child: Child,
    log: PathBuf,
}

/// A machine that is stopped before its first instruction, and the ways to talk to it.
pub struct Stopped {
    /// The process.
    pub qemu: Qemu,
    /// Its control socket.
    pub qmp: Qmp,
    /// The agent's port.
    pub link: Link,
    /// What QEMU calls the descriptor of the state, if there is one.
    pub state_uri: String,
}

impl Qemu {
    /// Starts a machine, stopped. `state` is the file that it will be resumed from.
    pub fn start(
        files: &HostFiles,
        memory_file: &Path,
        memory_bytes: u64,
        memory: Memory,
        clock: Clock,
        parcel: &Parcel,
        state: Option<OwnedFd>,
    ) -> Result<Stopped> {
        let log = log_file()?;
        let (qmp, qmp_theirs) = UnixStream::pair()?;
        let (link, link_theirs) = UnixStream::pair()?;
        let (qmp_theirs, link_theirs) = (OwnedFd::from(qmp_theirs), OwnedFd::from(link_theirs));
        let parcel = parcel.descriptor()?;
        let state_uri = state.as_ref().map(|it| format!("fd:{}", child::number(it))).unwrap_or_default();
        let share = if memory == Memory::Save { "on" } else { "off" };

        let emulator = artifacts::emulator()?;
        let mut command = emulator.command();
        command
            .args(MACHINE.split_whitespace())
            .args(clock.options().split_whitespace())
            .args(["-M", "q35,memory-backend=memory"])
            .arg("-m")
            .arg(format!("{memory_bytes}B"))
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=memory,size={memory_bytes},mem-path={},share={share}",
                option(memory_file)
            ))
            .arg("-kernel")
            .arg(files.kernel())
            .arg("-initrd")
            .arg(files.initramfs())
            .args(["-append", KERNEL_COMMAND_LINE])
            .arg("-chardev")
            .arg(format!("file,id=serial,path={}", option(&log)))
            .args(["-serial", "chardev:serial"])
            .arg("-chardev")
            .arg(format!("socket,id=qmp,fd={}", child::number(&qmp_theirs)))
            .args(["-mon", "chardev=qmp,mode=control"])
            .args(["-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!("socket,id=agent,fd={}", child::number(&link_theirs)))
            .arg("-device")
            .arg(format!("virtserialport,chardev=agent,name={}", layout::PORT))
            .arg("-drive")
            .arg(format!("if=none,id=parcel,format=raw,readonly=on,file=/proc/self/fd/{}", child::number(&parcel)))
            .args(["-device", "virtio-blk-pci,drive=parcel"])
            .stdin(Stdio::null())
            .stdout(File::options().append(true).open(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        if memory == Memory::Resume {
            command.args(["-incoming", "defer"]);
        }
        let inherited = [qmp_theirs, link_theirs, parcel].into_iter().chain(state).collect();
        let child = child::spawn(&mut command, inherited).context("start the emulator")?;
        // Holds our copies of their ends of the sockets, which would hide QEMU's death.
        drop(command);
        let mut qemu = Self { child, log };
        let qmp = Qmp::new(qmp).map_err(|error| qemu.infrastructure(format!("did not start: {error:#}")))?;
        let link = Link::new(link)?;
        Ok(Stopped { qemu, qmp, link, state_uri })
    }

    /// The error for a host that failed by itself.
    pub fn infrastructure(&mut self, what: impl Display) -> HostError {
        let status = match self.child.try_wait() {
            Ok(Some(status)) => format!(" (QEMU: {status})"),
            _ => String::new(),
        };
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        // QEMU names each feature of the processor that it leaves out, in every run.
        let lines: Vec<_> = log.lines().filter(|line| !line.contains("TCG doesn't support")).collect();
        let last_lines = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n");
        HostError::Infrastructure { what: format!("{what}{status}"), log: self.log.clone(), last_lines }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's options are separated by commas; one in a value is doubled.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn log_file() -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let directory = paths::logs();
    fs::create_dir_all(&directory)?;
    remove_old_logs(&directory)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!("{now}-{}-{count}.log", std::process::id()));
    File::create(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

fn remove_old_logs(directory: &Path) -> Result<()> {
    let mut logs: Vec<_> = fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    logs.sort();
    let surplus = logs.len().saturating_sub(KEPT_LOGS);
    for log in logs.into_iter().take(surplus) {
        // Another process may have removed it already.
        let _ = fs::remove_file(log);
    }
    Ok(())
}
