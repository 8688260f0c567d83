//! An ordinary user's machines: what works without root, and what is refused with which reason. The table of the README has a
//! row for each; rows about control groups are in `cgroup.rs`, that about the processes' user in `jail.rs`, and that about
//! rights on /dev/kvm in `input.rs`.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use agent::layout::ORDINARY_USER;
use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ozone_tests::harness::Test;
use ozone_tests::tool;
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm, executable};

use crate::kvm_device;
use crate::traces::Traces;

/// The tests of this file.
pub const TESTS: [Test; 7] = [
    Test::host("rootless::a_lost_device_comes_back", a_lost_device_comes_back),
    Test::host("rootless::a_name_needs_a_runtime_directory", a_name_needs_a_runtime_directory),
    Test::host("rootless::a_tap_that_root_made_works_and_a_new_one_is_refused", taps),
    Test::host("rootless::a_block_device_needs_rights", a_block_device_needs_rights),
    Test::host("rootless::without_user_namespaces_it_is_refused", without_user_namespaces),
    Test::host("rootless::a_controller_that_is_not_delegated_is_refused", a_controller_that_is_not_delegated),
    Test::host("rootless::a_record_goes_where_the_user_may_write", a_record_goes_where_the_user_may_write),
];

/// `ozone` as an ordinary user who may use KVM.
fn as_user(words: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>) -> Command {
    let mut command = Command::new(executable("ozone"));
    command.args(words).uid(ORDINARY_USER).gid(ORDINARY_USER);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn boot(command: &mut Command) -> Result<Vm> {
    let mut vm = Vm::spawn(command)?;
    vm.expect("ozone-guest: ready\n", BOOT)?;
    Ok(vm)
}

/// The user's own directory, as a login gives one.
fn runtime_directory() -> Result<String> {
    let directory = format!("/run/user/{ORDINARY_USER}");
    fs::DirBuilder::new().recursive(true).mode(0o755).create("/run/user")?;
    fs::DirBuilder::new().mode(0o700).create(&directory)?;
    chown(&directory, Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    Ok(directory)
}

/// Must end with this code, and a last line that has every part.
fn refused(output: &Output, code: i32, parts: &[&str]) -> Result<()> {
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.lines().last().unwrap_or_default();
    ensure!(output.status.code() == Some(code), "{:?}: {errors}", output.status);
    for part in parts {
        ensure!(last.contains(part), "'{last}' lacks '{part}'");
    }
    Ok(())
}

fn a_lost_device_comes_back() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let guest = guest.disk(&disk);
    let argument = format!("--disk path={}: Permission denied", disk.display());
    refused(&as_user(guest.arguments()).output()?, 2, &[&argument])?;
    chown(&disk, Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    let before = Traces::of_this_host()?;
    let mut vm = boot(&mut as_user(guest.arguments()))?;
    let processes = vm.processes()?;
    let blk = processes.iter().find(|process| process.role == "blk/disk0").context("no blk/disk0")?;
    kill(Pid::from_raw(blk.pid), Signal::SIGKILL)?;
    vm.expect_error("[blk/disk0] back after", ANSWER)?;
    vm.guest("echo works > /file && sync && cat /file")?;
    vm.power_off()?;
    before.expect_again()
}

fn a_name_needs_a_runtime_directory() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let guest = Guest::new()?.option("--name", "mine");
    let mut vm = boot(as_user(guest.arguments()).env_remove("XDG_RUNTIME_DIR"))?;
    vm.expect_error("XDG_RUNTIME_DIR is not set: no command finds this machine", ANSWER)?;
    vm.power_off()?;

    let directory = runtime_directory()?;
    let before = Traces::of_this_host()?;
    let mut vm = boot(as_user(guest.arguments()).env("XDG_RUNTIME_DIR", &directory))?;
    for words in [&["status", "mine"][..], &["restart", "mine", "console0"], &["pause", "mine"], &["resume", "mine"]] {
        let output = as_user(words).env("XDG_RUNTIME_DIR", &directory).output()?;
        ensure!(output.status.success(), "{words:?}: {output:?}");
    }
    // Nothing is broken; what only root is shown counts as not visible.
    let output = as_user(["audit", "mine"]).env("XDG_RUNTIME_DIR", &directory).output()?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(table.contains("not visible from outside"), "{table}");
    vm.power_off()?;
    before.expect_again()
}

/// Makes a tap of a user's that stays, as 'ip tuntap add NAME mode tap user UID' does.
#[allow(unsafe_code)]
fn tap(name: &str, owner: u32) -> Result<()> {
    // linux/if_tun.h: TUNSETIFF, TUNSETOWNER and TUNSETPERSIST.
    nix::ioctl_write_ptr_bad!(set_interface, nix::request_code_write!(b'T', 202, 4), libc::ifreq);
    nix::ioctl_write_int_bad!(set_owner, nix::request_code_write!(b'T', 204, 4));
    nix::ioctl_write_int_bad!(set_persistent, nix::request_code_write!(b'T', 203, 4));
    let tun = fs::File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut wanted = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI) as i16 },
    };
    for (place, byte) in wanted.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    let owner = i32::try_from(owner)?;
    // SAFETY: the first reads a structure that lives across the call, the others take a number.
    unsafe {
        set_interface(tun.as_raw_fd(), &raw const wanted)?;
        set_owner(tun.as_raw_fd(), owner)?;
        set_persistent(tun.as_raw_fd(), 1)?;
    }
    Ok(())
}

fn taps() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let guest = Guest::new()?.option("--net", "host-ip=192.0.2.1/24");
    let hint = format!("made by root with 'ip tuntap add NAME mode tap user {ORDINARY_USER}'");
    refused(&as_user(guest.arguments()).output()?, 3, &["--net host-ip=192.0.2.1/24: no rights on taps", &hint])?;

    // One without an owner is everybody's who may open /dev/net/tun.
    tap("roots0", 0)?;
    let guest = Guest::new()?.option("--net", "tap=roots0");
    refused(&as_user(guest.arguments()).output()?, 3, &["--net tap=roots0: no rights on taps"])?;
    tool::output(Command::new("tunctl").args(["-d", "roots0"]))?;

    tap("users0", ORDINARY_USER)?;
    for words in [&["addr", "add", "192.0.2.1/24", "dev", "users0"][..], &["link", "set", "users0", "up"]] {
        tool::output(Command::new("/sbin/ip").args(words))?;
    }
    let mut vm = boot(&mut as_user(Guest::new()?.option("--net", "tap=users0").arguments()))?;
    vm.guest("ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 5 192.0.2.1")?;
    vm.power_off()?;
    tool::output(Command::new("tunctl").args(["-d", "users0"])).map(drop)
}

fn a_block_device_needs_rights() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let guest = Guest::new()?;
    let image = guest.root_disk()?;
    let device = tool::output(Command::new("losetup").arg("-f"))?.trim().to_owned();
    tool::output(Command::new("losetup").arg(&device).arg(&image))?;
    fs::set_permissions(&device, std::os::unix::fs::PermissionsExt::from_mode(0o660))?;
    let guest = guest.disk(Path::new(&device));
    let argument = format!("--disk path={device}: Permission denied");
    refused(&as_user(guest.arguments()).output()?, 2, &[&argument])?;
    chown(&device, Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    let mut vm = boot(&mut as_user(guest.arguments()))?;
    vm.guest("echo works > /file && sync && cat /file")?;
    vm.power_off()?;
    tool::output(Command::new("losetup").args(["-d", &device])).map(drop)
}

fn without_user_namespaces() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let limit = "/proc/sys/user/max_user_namespaces";
    let before = fs::read_to_string(limit)?;
    fs::write(limit, "0")?;
    let output = as_user(Guest::new()?.arguments()).output();
    fs::write(limit, before.trim())?;
    refused(&output?, 3, &["jail of core: clone3 into new namespaces", "this user may not make user namespaces"])
}

fn a_controller_that_is_not_delegated() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let group = Path::new("/sys/fs/cgroup/user.scope");
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids -cpuset")?;
    fs::create_dir(group)?;
    for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        chown(group.join(file), Some(ORDINARY_USER), Some(ORDINARY_USER))?;
    }
    let before = Traces::of_this_host()?;
    for limit in ["cpuset.cpus=0", "cpuset.mems=0"] {
        let mut command = as_user(Guest::new()?.option("--limit", limit).arguments());
        let procs = fs::File::options().write(true).open(group.join("cgroup.procs"))?;
        // SAFETY: between fork and exec the child makes one system call, write(2), on a descriptor opened before.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(move || std::io::Write::write_all(&mut &procs, b"0"));
        }
        refused(&command.output()?, 3, &[&format!("--limit {limit}: "), "controller cpuset cannot be enabled"])?;
        before.expect_again()?;
    }
    // Another one's group is none to make others in.
    let words = Guest::new()?.option("--cgroup-parent", "/sys/fs/cgroup").option("--limit", "pids.max=100").arguments();
    refused(&as_user(words).output()?, 3, &["Permission denied", "Delegate=yes"])?;
    Ok(fs::remove_dir(group)?)
}

fn a_record_goes_where_the_user_may_write() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    let directory = runtime_directory()?;
    let file = format!("{directory}/status.json");
    let guest = Guest::new()?.init("poweroff");
    let output = as_user(guest.clone().option("--status-file", &file).arguments()).output()?;
    ensure!(output.status.success(), "{output:?}");
    let record: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
    ensure!(record["cause"] == "power-off" && record["memory"]["of"] == "largest-process", "{record:#}");
    let output = as_user(guest.option("--status-file", "/root/status.json").arguments()).output()?;
    refused(&output, 2, &["--status-file /root/status.json: Permission denied"])
}
