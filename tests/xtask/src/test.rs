//! `cargo xtask test`.

use anyhow::{Context, Result};
use ozone_tests::harness::{self, CHOICE, Choice};
use ozone_tests::{artifacts, build, host, progress};

use crate::{prerequisites, privileged};

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Where tests that boot guests run: this machine's KVM, the test host, or nowhere.
    #[arg(long, value_name = "kvm|nested|none", default_value_t)]
    host: Choice,
    /// Only name what this machine lacks.
    #[arg(long)]
    no_install: bool,
    /// Run the integration tests whose name contains this, and nothing else.
    #[arg(value_name = "NAME")]
    filter: Option<String>,
}

/// Runs every check, the quick ones first; the first that fails ends it.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let install = !arguments.no_install;
    prerequisites::ensure_programs(install)?;
    if arguments.filter.is_none() {
        prerequisites::ensure_cargo_tools(install)?;
        checks(arguments.host)?;
    }
    integration_tests(arguments)?;
    Ok(0)
}

fn checks(host: Choice) -> Result<()> {
    progress::step("check the format", || build::cargo(["fmt", "--all", "--check"]))?;
    progress::step("check the lints", || {
        build::cargo(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])
    })?;
    // The tests that boot guests are the one test target that cannot run like this.
    progress::step("run the unit tests", || {
        if harness::permits_local_tests() {
            build::cargo(["test", "--workspace", "--exclude", "ozone-tests"])?;
            let jail = ["--test", "jailer", "--", "each step"];
            build::cargo(["test", "--package", "ozone", "--features", "crash-points"].into_iter().chain(jail))?;
        } else {
            build::cargo(["test", "--workspace", "--exclude", "ozone-tests", "--lib", "--bins"])?;
        }
        build::cargo(["test", "--package", "ozone-tests", "--lib"])
    })?;
    if !harness::permits_local_tests() {
        match host {
            Choice::Nested => progress::step("run the tests that need root and KVM", privileged::run_in_host)?,
            Choice::Kvm | Choice::None => {
                eprintln!(
                    "note: left out, for they need root and /dev/kvm: the tests of jails, devices and tiny payloads"
                );
            }
        }
    }
    Ok(())
}

fn integration_tests(arguments: &Arguments) -> Result<()> {
    build::product()?;
    build::companions()?;
    // Made here rather than in the first test, whose deadline and time they are none of.
    match arguments.host {
        Choice::Nested => drop(host::snapshot(host::DEFAULT_MEMORY)?),
        Choice::Kvm => drop(artifacts::guest()?),
        Choice::None => {}
    }
    let mut words = vec!["test", "--release", "--package", "ozone-tests", "--test", "vm", "--"];
    words.extend(arguments.filter.as_deref());
    progress::step("run the integration tests", || {
        let environment = [(CHOICE, arguments.host.to_string()), (build::BUILT, "1".to_owned())];
        build::cargo_with(&environment, words)
    })
    .context("integration tests")
}
