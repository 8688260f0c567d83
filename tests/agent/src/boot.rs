//! Makes a bare kernel into a small host that looks like a Debian server to the product.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use agent::layout;
use anyhow::{Context, Result, ensure};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
ordinary:x:1000:1000:ordinary:/home/ordinary:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
";
const GROUP: &str = "root:x:0:\nkvm:x:104:\nordinary:x:1000:\nnogroup:x:65534:\n";

/// Everything up to the ready point.
pub fn set_up() -> Result<()> {
    directories()?;
    mounts()?;
    busybox(&["--install", "-s"])?;
    modules()?;
    devices()?;
    cgroups()?;
    // Shared guest memory without huge pages costs more than half of a nested guest's boot time.
    let _ = fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise");
    users()?;
    busybox(&["ip", "link", "set", "lo", "up"])?;
    busybox(&["hostname", "test-host"])
}

fn directories() -> Result<()> {
    for name in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "home",
        "etc",
        "mnt",
        "bin",
        "sbin",
        "usr/bin",
        "usr/sbin",
        "usr/local/bin",
        "var/tmp",
        "var/run",
    ] {
        fs::create_dir_all(Path::new("/").join(name)).with_context(|| format!("make /{name}"))?;
    }
    for name in ["/tmp", "/var/tmp"] {
        fs::set_permissions(name, Permissions::from_mode(0o1777))?;
    }
    Ok(())
}

fn mounts() -> Result<()> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let dev = MsFlags::MS_NOSUID;
    for (kind, target, flags, options, required) in [
        ("proc", "/proc", plain, "", true),
        ("sysfs", "/sys", plain, "", true),
        ("devtmpfs", "/dev", dev, "mode=755", true),
        ("devpts", "/dev/pts", dev | MsFlags::MS_NOEXEC, "mode=620,gid=5,ptmxmode=666", true),
        ("tmpfs", "/dev/shm", dev | MsFlags::MS_NODEV, "mode=1777", true),
        ("tmpfs", "/run", dev | MsFlags::MS_NODEV, "mode=755", true),
        ("cgroup2", "/sys/fs/cgroup", plain, "nsdelegate", true),
        ("debugfs", "/sys/kernel/debug", plain, "", false),
        ("tracefs", "/sys/kernel/tracing", plain, "", false),
        ("securityfs", "/sys/kernel/security", plain, "", false),
        ("bpf", "/sys/fs/bpf", plain, "", false),
    ] {
        // Directories under /sys cannot be made; where one is missing the kernel lacks the file system.
        let _ = fs::create_dir_all(target);
        let done = mount(Some(kind), target, Some(kind), flags, Some(options));
        if required {
            done.with_context(|| format!("mount {kind} on {target}"))?;
        }
    }
    // As an ordinary system does, so that a test of propagation means something.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)
        .context("make mounts shared")
}

fn modules() -> Result<()> {
    let order = fs::read_to_string(layout::MODULE_ORDER).context("read the module order")?;
    for name in order.lines() {
        let file = File::open(Path::new(layout::MODULES).join(name))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => eprintln!("agent: module {name}: {error}"),
        }
    }
    Ok(())
}

fn devices() -> Result<()> {
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let _ = symlink(target, Path::new("/dev").join(link));
    }
    // Owners and modes as Debian's udev rules set them.
    chown("/dev/kvm", Some(0), Some(layout::KVM_GROUP)).context("chown /dev/kvm")?;
    fs::set_permissions("/dev/kvm", Permissions::from_mode(0o660))?;
    fs::set_permissions("/dev/net/tun", Permissions::from_mode(0o666)).context("chmod /dev/net/tun")
}

fn cgroups() -> Result<()> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in controllers.split_whitespace() {
        let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}"));
    }
    Ok(())
}

fn users() -> Result<()> {
    fs::write("/etc/passwd", PASSWD)?;
    fs::write("/etc/group", GROUP)?;
    fs::write("/etc/hosts", "127.0.0.1 localhost test-host\n")?;
    fs::create_dir_all("/home/ordinary")?;
    let user = Some(layout::ORDINARY_USER);
    chown("/home/ordinary", user, user).context("chown the home directory")
}

fn busybox(arguments: &[&str]) -> Result<()> {
    let status = Command::new("/bin/busybox").args(arguments).status().context("start busybox")?;
    ensure!(status.success(), "busybox {arguments:?}: {status}");
    Ok(())
}
