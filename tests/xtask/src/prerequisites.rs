//! What this machine must have beside Rust and gcc.

use std::fmt;
use std::process::Command;

use anyhow::{Result, ensure};
use ozone_tests::{progress, tool};

/// A program and the Debian package that has it.
type Program = (&'static str, &'static str);

/// For making the guest's files.
const GUEST: [Program; 3] = [("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("mke2fs", "e2fsprogs")];

/// Something is missing and was not installed; its text is the command that does.
#[derive(Debug)]
pub struct Lacking(String);

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "This machine lacks programs. Install them, then run this again:\n\n    {}\n", self.0)
    }
}

impl std::error::Error for Lacking {}

/// Sees to it that guests and the test host can be made. The emulator is fetched like a kernel is.
pub fn ensure_programs(install: bool) -> Result<()> {
    let packages: Vec<_> =
        GUEST.into_iter().filter(|(program, _)| !tool::exists(program)).map(|(_, package)| package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    let install_line = format!("apt-get install -y --no-install-recommends {}", packages.join(" "));
    if !install || !nix::unistd::geteuid().is_root() {
        let sudo = if nix::unistd::geteuid().is_root() { "" } else { "sudo " };
        return Err(Lacking(format!("{sudo}apt-get update && {sudo}{install_line}")).into());
    }
    eprintln!("… this machine lacks {}", packages.join(", "));
    progress::step("apt-get update", || {
        tool::output(Command::new("apt-get").arg("update").env("DEBIAN_FRONTEND", "noninteractive"))
    })?;
    progress::step(&install_line, || {
        let mut words = install_line.split_whitespace();
        let program = words.next().unwrap_or("apt-get");
        tool::output(Command::new(program).args(words).env("DEBIAN_FRONTEND", "noninteractive"))
    })?;
    Ok(())
}

/// Sees to it that cargo has its formatter and its linter.
pub fn ensure_cargo_tools(install: bool) -> Result<()> {
    let lacking: Vec<_> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(command, _)| tool::output(Command::new("cargo").args([command, "--version"])).is_err())
        .map(|(_, component)| component)
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let line = format!("rustup component add {}", lacking.join(" "));
    if !install || !tool::exists("rustup") {
        return Err(Lacking(line).into());
    }
    let status = Command::new("rustup").args(["component", "add"]).args(&lacking).status()?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}
