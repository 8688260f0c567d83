//! Bad input: one line that names the argument, one exit code, and nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ozone_tests::artifacts::GuestFiles;
use ozone_tests::harness::Test;
use ozone_tests::vm::{Vm, executable};

use crate::kvm_device;
use crate::traces::Traces;

/// The tests of this file.
pub const TESTS: [Test; 6] = [
    // In a host of their own: elsewhere others come and go, and nobody can tell what is left behind.
    Test::host("input::wrong_options_are_the_users_fault", wrong_options),
    Test::host("input::wrong_files_are_the_users_fault", wrong_files),
    Test::host("input::wrong_specs_are_the_users_fault", wrong_specs),
    Test::host("input::a_host_without_kvm_is_the_hosts_fault", a_host_without_kvm),
    Test::host("input::a_truncated_debian_kernel_is_the_users_fault", a_truncated_debian_kernel),
    Test::host("input::what_does_not_fit_into_memory_is_the_users_fault", what_does_not_fit),
];

const END: Duration = Duration::from_secs(30);
const INPUT: i32 = 2;
const HOST: i32 = 3;

/// Runs `ozone` with these arguments; it must end with `code` and one line that has every word of `says`, and leave nothing
/// behind. With a pipe for its input, and with none.
fn refused(arguments: &[&str], code: i32, says: &[&str]) -> Result<()> {
    refused_by(Command::new(executable("ozone")).args(arguments), code, says).with_context(|| format!("{arguments:?}"))
}

fn refused_by(command: &mut Command, code: i32, says: &[&str]) -> Result<()> {
    let before = Traces::of_this_host()?;
    refused_with(command.stdin(Stdio::piped()), code, says).context("with a pipe for its input")?;
    refused_with(command.stdin(Stdio::null()), code, says).context("without input")?;
    before.expect_again()
}

fn refused_with(command: &mut Command, code: i32, says: &[&str]) -> Result<()> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut vm = Vm::spawn(command)?;
    vm.expect_exit(code, END)?;
    // The stream ends with the process; whatever comes is there by then.
    let _ = vm.expect_error("\0", END);
    let text = vm.error_text();
    ensure!(text.trim_end().lines().count() == 1, "not one line:\n{text}");
    ensure!(text.starts_with("ozone: "), "{text}");
    for word in says {
        ensure!(text.contains(word), "'{word}' is not in: {text}");
    }
    Ok(())
}

/// A file that ozone takes for a kernel as long as nobody looks into it.
fn some_file() -> Result<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), [0; 4096])?;
    Ok(file)
}

fn wrong_options() -> Result<()> {
    let file = some_file()?;
    let kernel = file.path().to_str().context("path")?;
    let run = |options: &[&str], says: &[&str]| {
        let mut arguments = vec!["run", "--kernel", kernel];
        arguments.extend(options);
        refused(&arguments, INPUT, says)
    };
    refused(&["run"], INPUT, &["--kernel"])?;
    run(&["--memory", "0"], &["--memory"])?;
    run(&["--memory", "1M"], &["--memory"])?;
    run(&["--memory", "100T"], &["--memory", "host"])?;
    run(&["--memory", "much"], &["--memory", "much"])?;
    run(&["--cpus", "0"], &["--cpus"])?;
    run(&["--cpus", "100000"], &["--cpus"])?;
    run(&["--net", "mac=52:54:00:12:34"], &["--net", "mac"])?;
    run(&["--net", "mac=53:54:00:12:34:56"], &["--net", "mac"])?;
    run(&["--net", "tap=nosuchtap0"], &["--net", "nosuchtap0"])?;
    run(&["--net", "tap=lo"], &["--net", "'lo' is not a tap"])?;
    run(&["--net", "queues=9"], &["--net", "queues is 1 to 8"])?;
    run(&["--net", "colour=blue"], &["--net", "colour"])?;
    run(&["--colour", "blue"], &["--colour"])?;
    run(&["--console", "telephone"], &["--console", "telephone"])
}

fn wrong_files() -> Result<()> {
    let file = some_file()?;
    let kernel = file.path().to_str().context("path")?;
    let disk = some_file()?;
    let disk = disk.path().to_str().context("path")?;
    let empty = tempfile::NamedTempFile::new()?;
    let empty = empty.path().to_str().context("path")?;
    let link = tempfile::tempdir()?;
    let link = link.path().join("link");
    std::os::unix::fs::symlink(disk, &link)?;
    let run = |options: &[&str], says: &[&str]| {
        let mut arguments = vec!["run", "--kernel", kernel];
        arguments.extend(options);
        refused(&arguments, INPUT, says)
    };
    refused(&["run", "--kernel", "/no/such/kernel"], INPUT, &["--kernel", "/no/such/kernel"])?;
    refused(&["run", "--kernel", "/tmp"], INPUT, &["--kernel", "/tmp"])?;
    run(&["--initrd", "/no/such/initrd"], &["--initrd", "/no/such/initrd"])?;
    run(&["--disk", "path=/no/such/disk"], &["--disk", "/no/such/disk"])?;
    run(&["--disk", "path=/tmp"], &["--disk", "/tmp"])?;
    run(&["--disk", &format!("path={empty}")], &["--disk", empty])?;
    let (once, twice) = (format!("path={disk},id=a"), format!("path={},id=b", link.display()));
    run(&["--disk", &once, "--disk", &twice], &["--disk", "link"])?;
    // As root every file is readable: an ordinary user it is.
    let kernel_only_for_root = some_file()?;
    fs::set_permissions(kernel_only_for_root.path(), fs::Permissions::from_mode(0o600))?;
    let path = kernel_only_for_root.path().to_str().context("path")?;
    refused_by(as_nobody().args(["run", "--kernel", path]), INPUT, &["--kernel", path])
}

/// `ozone` as a user without any rights.
fn as_nobody() -> Command {
    let mut command = Command::new(executable("ozone"));
    command.uid(65534).gid(65534);
    command
}

fn wrong_specs() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let spec = |text: &str, says: &[&str]| {
        let path = directory.path().join("vm.json");
        fs::write(&path, text)?;
        let mut words = vec!["vm.json"];
        words.extend(says);
        refused(&["run", "--spec", path.to_str().context("path")?], INPUT, &words)
    };
    refused(&["run", "--spec", "/no/such/spec.json"], INPUT, &["--spec", "/no/such/spec.json"])?;
    spec("{", &[])?;
    spec(r#"{"version": 1, "kernel": "/k", "colour": "blue"}"#, &["colour"])?;
    spec(r#"{"version": 99, "kernel": "/k"}"#, &["version"])
}

fn a_host_without_kvm() -> Result<()> {
    let file = some_file()?;
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644))?;
    let kernel = file.path().to_str().context("path")?;
    kvm_device::with_mode(0o600)?;
    refused_by(as_nobody().args(["run", "--kernel", kernel]), HOST, &["/dev/kvm", "user 65534 has no rights"])?;
    kvm_device::without()?;
    refused(&["run", "--kernel", kernel], HOST, &["/dev/kvm", "no KVM"])
}

fn a_truncated_debian_kernel() -> Result<()> {
    let files = GuestFiles::here()?;
    for kernel in [files.bzimage_6_1(), files.vmlinux_6_1()] {
        let whole = fs::read(&kernel)?;
        for part in 0..32 {
            let cut = tempfile::NamedTempFile::new()?;
            fs::write(cut.path(), whole.get(..whole.len() / 32 * part + part).context("length")?)?;
            let path = cut.path().to_str().context("path")?;
            refused(&["run", "--kernel", path], INPUT, &["--kernel"]).with_context(|| format!("{part}/32"))?;
        }
    }
    Ok(())
}

fn what_does_not_fit() -> Result<()> {
    let files = GuestFiles::here()?;
    let kernel = files.bzimage_6_1();
    let kernel = kernel.to_str().context("path")?;
    let large = tempfile::NamedTempFile::new()?;
    large.as_file().set_len(1 << 30)?;
    let initrd = large.path().to_str().context("path")?;
    refused(&["run", "--kernel", kernel, "--initrd", initrd], INPUT, &["--initrd"])?;
    refused(&["run", "--kernel", kernel, "--append", &"x".repeat(3000)], INPUT, &["--append"])?;
    refused(&["run", "--kernel", kernel, "--memory", "64M"], INPUT, &["--kernel", "memory"])?;
    ensure!(Path::new(kernel).exists());
    Ok(())
}
