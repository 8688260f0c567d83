//! The processes that are measured: the product's backends, and those of others.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ozone_tests::child;
use protocol::{BlkSpec, DeviceSpec, FromBackend};
use virtio_backend::testing::Backend;

use crate::cpu;
use crate::vhost_net::VhostNet;

/// Who serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Disk {
    /// `ozone-blk`, under its filters.
    Ozone,
    /// `qemu-storage-daemon` with its image opened by io_uring.
    QemuIoUring,
    /// The same by Linux's own asynchronous input and output, which takes O_DIRECT.
    QemuNative,
    /// The same by a pool of threads.
    QemuThreads,
}

/// A running backend, ended on drop.
pub enum Process {
    /// One of the product's.
    Ozone(Backend),
    /// Another program.
    Other(Other),
    /// A thread of the kernel.
    Kernel(VhostNet),
}

/// A child that is killed and waited for.
pub struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Processor time that it has used.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> Result<Duration> {
        match self {
            Self::Ozone(backend) => cpu::of(backend.pid()),
            Self::Other(other) => cpu::of(other.0.id()),
            Self::Kernel(device) => device.cpu(),
        }
    }

    /// Processor time of the driver, which is this process, and of the backend.
    ///
    /// # Errors
    /// It has ended.
    pub fn both(&self) -> Result<(Duration, Duration)> {
        let (own, theirs) = (cpu::own()?, self.cpu()?);
        let is_ours = matches!(self, Self::Kernel(device) if device.is_ours);
        Ok((if is_ours { own.saturating_sub(theirs) } else { own }, theirs))
    }
}

/// A disk image and how it is served.
#[derive(Clone, Debug, clap::Args)]
pub struct Image {
    /// Who serves it.
    #[arg(long, default_value = "ozone")]
    pub by: Disk,
    /// The image.
    #[arg(long)]
    pub image: PathBuf,
    /// Past the page cache (O_DIRECT).
    #[arg(long)]
    pub direct: bool,
    /// How many queues it has.
    #[arg(long, default_value_t = 1)]
    pub queues: u16,
    /// How long QEMU's thread polls before it sleeps, in microseconds; 32 is its own default.
    #[arg(long, default_value_t = 32)]
    pub poll: u32,
    /// The executable, where it is not the program that is found.
    #[arg(long)]
    pub executable: Option<PathBuf>,
}

impl Image {
    /// Starts the backend; returns it and the front-end's end of the vhost-user socket.
    ///
    /// # Errors
    /// An image that cannot be opened, a program that is not there.
    pub fn start(&self) -> Result<(Process, UnixStream)> {
        if self.by == Disk::Ozone { self.start_ozone() } else { self.start_qemu() }
    }

    fn start_ozone(&self) -> Result<(Process, UnixStream)> {
        let flags = if self.direct { libc::O_DIRECT } else { 0 };
        let image = File::options().read(true).write(true).custom_flags(flags).open(&self.image);
        let image = image.with_context(|| format!("open {}", self.image.display()))?;
        let image = OwnedFd::from(image).into();
        let (_, sentinel) = std::io::pipe()?;
        let spec = BlkSpec {
            image,
            sentinel: OwnedFd::from(sentinel).into(),
            direct: self.direct,
            successor: false,
            read_only: false,
            serial: "load".into(),
            queues: self.queues,
        };
        ozone(self.executable.as_deref(), "ozone-blk", DeviceSpec::Blk(spec))
    }

    fn start_qemu(&self) -> Result<(Process, UnixStream)> {
        // The listening socket is there before the daemon, so that nobody has to wait for it.
        let directory = std::env::temp_dir().join(format!("load-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let path = directory.join("socket");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
        let stream = UnixStream::connect(&path)?;
        std::fs::remove_dir_all(&directory)?;
        let listener = OwnedFd::from(listener);
        let engine = match self.by {
            Disk::QemuNative => "native",
            Disk::QemuThreads => "threads",
            _ => "io_uring",
        };
        let program = self.executable.clone().unwrap_or_else(|| "qemu-storage-daemon".into());
        let mut command = Command::new(&program);
        let direct = if self.direct { "on" } else { "off" };
        let image = self.image.display().to_string().replace(',', ",,");
        command
            .args(["--object", &format!("iothread,id=thread,poll-max-ns={}", u64::from(self.poll) * 1000)])
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=image,filename={image},aio={engine},cache.direct={direct}"))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=disk,node-name=image,writable=on,iothread=thread,num-queues={},addr.type=fd,addr.str={}",
                self.queues,
                listener.as_raw_fd()
            ))
            .stdin(Stdio::null());
        let child = child::spawn(&mut command, vec![listener]);
        let child = child.with_context(|| format!("start {}", program.display()))?;
        Ok((Process::Other(Other(child)), stream))
    }
}

/// Starts one of the product's backends, and waits until it is ready.
///
/// # Errors
/// An executable that is not there, or one that does not get ready.
pub fn ozone(executable: Option<&Path>, name: &str, spec: DeviceSpec) -> Result<(Process, UnixStream)> {
    let executable = match executable {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()?.with_file_name(name),
    };
    ensure!(executable.exists(), "there is no {}: build the product, in release", executable.display());
    let (backend, socket) = Backend::start(&executable.to_string_lossy(), spec);
    let message = backend.message();
    ensure!(matches!(message, FromBackend::Ready), "{name} did not get ready: {message:?}");
    Ok((Process::Ozone(backend), socket))
}
