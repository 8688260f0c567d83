//! The executables, built by cargo.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{paths, progress};

/// The product's executables, each in the package of the same name.
pub const PRODUCT: [&str; 5] = ["ozone", "vmm-core", "ozone-blk", "ozone-net", "ozone-console"];

/// What the tests put beside the product.
pub const COMPANIONS: [&str; 2] = ["oracle", "hostile-backend"];

/// The product's launcher with points at which it kills itself, under a name of its own.
pub const CRASH_POINTS: &str = "ozone-crash-points";

/// Set to anything, it makes [`product`] and [`companions`] take the executables as they are.
pub const BUILT: &str = "OZONE_BUILT";

/// Builds the product's executables.
pub fn product() -> Result<Vec<PathBuf>> {
    let executables = PRODUCT.iter().map(|name| paths::release().join(name));
    if std::env::var_os(BUILT).is_some() {
        return Ok(executables.filter(|path| path.exists()).collect());
    }
    progress::step("build the product", || {
        cargo(["build", "--quiet", "--release"].into_iter().chain(PRODUCT.iter().flat_map(|name| ["--package", name])))
    })?;
    Ok(executables.collect())
}

/// Builds the programs that the tests put beside the product.
pub fn companions() -> Result<Vec<PathBuf>> {
    let executables = COMPANIONS.iter().chain([&CRASH_POINTS]).map(|name| paths::release().join(name));
    if std::env::var_os(BUILT).is_some() {
        return Ok(executables.filter(|path| path.exists()).collect());
    }
    progress::step("build the tests' own programs", || {
        let packages = COMPANIONS.iter().flat_map(|name| ["--package", name]);
        cargo(["build", "--quiet", "--release"].into_iter().chain(packages))?;
        let built = crash_points("ozone")?;
        std::fs::copy(&built, paths::release().join(CRASH_POINTS)).with_context(|| built.display().to_string())
    })?;
    Ok(executables.collect())
}

/// Builds the executable of a package with its feature `crash-points`, where it cannot be taken for that which is shipped.
pub fn crash_points(package: &str) -> Result<PathBuf> {
    let target = paths::target().join("crash-points");
    let directory = [("CARGO_TARGET_DIR", target.display().to_string())];
    cargo_with(&directory, ["build", "--quiet", "--release", "--package", package, "--features", "crash-points"])?;
    Ok(target.join("x86_64-unknown-linux-gnu/release").join(package))
}

/// Builds this workspace's xtask as it runs in a host.
pub fn xtask() -> Result<PathBuf> {
    progress::step("build xtask", || cargo(["build", "--quiet", "--release", "--package", "xtask"]))?;
    Ok(paths::release().join("xtask"))
}

/// Builds the test host's init.
pub fn agent() -> Result<PathBuf> {
    progress::step("build the agent", || cargo(["build", "--quiet", "--release", "--package", "agent"]))?;
    Ok(paths::release().join("agent"))
}

/// Runs cargo in the workspace; its output is shown.
pub fn cargo<I, S>(arguments: I) -> Result<()>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    cargo_with(&[], arguments)
}

/// Runs cargo with these variables set.
pub fn cargo_with<I, S>(environment: &[(&str, String)], arguments: I) -> Result<()>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let arguments: Vec<_> = arguments.into_iter().map(|it| it.as_ref().to_owned()).collect();
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(&arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir(paths::workspace())
        .status()
        .context("start cargo")?;
    ensure!(status.success(), "cargo {}: {status}", arguments.join(OsStr::new(" ")).display());
    Ok(())
}
