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
    let executables = COMPANIONS.iter().map(|name| paths::release().join(name));
    if std::env::var_os(BUILT).is_some() {
        return Ok(executables.filter(|path| path.exists()).collect());
    }
    progress::step("build the tests' own programs", || {
        let packages = COMPANIONS.iter().flat_map(|name| ["--package", name]);
        cargo(["build", "--quiet", "--release"].into_iter().chain(packages))
    })?;
    Ok(executables.collect())
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
