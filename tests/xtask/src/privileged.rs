//! The packages' own integration tests, which need root and some KVM: jail steps, taps, tiny payloads.
//!
//! Where this machine does not permit them they run in the test host, each executable at the path it was built for.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use agent::wire::{self, Exit};
use anyhow::{Context, Result, ensure};
use ozone_tests::host::{self, DEFAULT_MEMORY, Parcel, Put, Stdin, TestHost};
use ozone_tests::{paths, progress};

use crate::host::show;

/// The packages that have such tests.
const PACKAGES: [&str; 5] = ["vmm-core", "ozone", "ozone-blk", "ozone-net", "ozone-console"];

const DEADLINE: Duration = Duration::from_secs(300);

/// Builds the tests and runs them in a fresh test host each.
pub fn run_in_host() -> Result<()> {
    let built = progress::step("build the tests of jails, devices and tiny payloads", build)?;
    let snapshot = host::snapshot(DEFAULT_MEMORY)?;
    let files: Vec<Put> = built.iter().map(|file| Put { from: file.path.clone(), to: text(&file.path) }).collect();
    let parcel = Parcel::pack(&files)?;
    for test in built.iter().filter(|file| file.is_test) {
        let mut host = TestHost::resume(&snapshot, &parcel)?;
        println!("     Running {} in the test host", test.name);
        let command = wire::Command { argv: vec![text(&test.path)], env: host::environment(), terminal: None };
        let exit = host.run(command, Stdin::Empty, Some(DEADLINE), &mut show)?;
        ensure!(exit == Exit::Code(0), "{}: {exit:?}", test.name);
    }
    Ok(())
}

/// An executable that cargo built.
struct Built {
    name: String,
    path: PathBuf,
    is_test: bool,
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

/// The test executables, and the executables that they start.
fn build() -> Result<Vec<Built>> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command
        .args(["test", "--no-run", "--quiet", "--message-format=json", "--test", "*"])
        .current_dir(paths::workspace());
    command.args(PACKAGES.iter().flat_map(|name| ["--package", name]));
    let output = command.stderr(Stdio::inherit()).output().context("start cargo")?;
    ensure!(output.status.success(), "cargo test --no-run: {}", output.status);
    let mut built = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo's messages")?;
        let Some(path) = message.get("executable").and_then(serde_json::Value::as_str) else { continue };
        let is_test = message.pointer("/profile/test") == Some(&serde_json::Value::Bool(true));
        let name = message.pointer("/target/name").and_then(serde_json::Value::as_str).unwrap_or(path);
        built.push(Built { name: name.to_owned(), path: path.into(), is_test });
    }
    ensure!(built.iter().any(|file| file.is_test), "cargo built no test");
    Ok(built)
}
