//! The product with some of its executables replaced: `ozone` finds them beside its own file.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::build;
use crate::vm::executable;

/// A directory with the product's executables, removed on drop.
#[derive(Debug)]
pub struct Product {
    directory: tempfile::TempDir,
}

impl Product {
    /// The product, in which `instead` of the executable of each first name that of the second name is.
    pub fn with(instead: &[(&str, &str)]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        for name in build::PRODUCT {
            let from = instead.iter().find(|(replaced, _)| *replaced == name).map_or(name, |(_, by)| by);
            let from = executable(from);
            // A link would lead back to where the others are.
            fs::copy(&from, directory.path().join(name)).with_context(|| format!("copy {}", from.display()))?;
        }
        Ok(Self { directory })
    }

    /// The `ozone` among them.
    #[must_use]
    pub fn ozone(&self) -> PathBuf {
        self.directory.path().join("ozone")
    }

    /// Where they are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}
