//! Kernel modules and what they depend on.
//!
//! Debian's packages hold no `modules.dep` (installation makes it), so the dependencies are read from
//! the modules themselves.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use lzma_rust2::XzReader;

/// One module, ready to load.
#[derive(Debug)]
pub struct Module {
    /// File name without directories, ending in `.ko`.
    pub file_name: String,
    /// The uncompressed contents.
    pub contents: Vec<u8>,
}

/// Finds `wanted` and everything it depends on in an unpacked kernel package, dependencies first. What is
/// not there (built in, or absent from that kernel) is left out.
pub fn collect(package: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut tree = Tree { files: HashMap::new(), seen: HashSet::new(), found: Vec::new() };
    tree.index(&package.join("lib/modules"))?;
    for name in wanted {
        tree.add(name)?;
    }
    Ok(tree.found)
}

struct Tree {
    files: HashMap<String, PathBuf>,
    seen: HashSet<String>,
    found: Vec<Module>,
}

impl Tree {
    fn index(&mut self, directory: &Path) -> Result<()> {
        for entry in fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                self.index(&path)?;
            } else if let Some((stem, _)) = name.split_once(".ko") {
                self.files.insert(canonical(stem), path);
            }
        }
        Ok(())
    }

    fn add(&mut self, name: &str) -> Result<()> {
        let name = canonical(name);
        let Some(path) = self.files.get(&name).cloned() else { return Ok(()) };
        if !self.seen.insert(name) {
            return Ok(());
        }
        let contents = read(&path).with_context(|| format!("read {}", path.display()))?;
        for dependency in dependencies(&contents) {
            self.add(&dependency)?;
        }
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        self.found.push(Module { file_name: file_name.trim_end_matches(".xz").to_owned(), contents });
        Ok(())
    }
}

/// The kernel takes `-` and `_` in module names for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|it| it == "xz") {
        let mut contents = Vec::new();
        XzReader::new(File::open(path)?, true).read_to_end(&mut contents)?;
        return Ok(contents);
    }
    Ok(fs::read(path)?)
}

/// The `depends=` entry of a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const ENTRY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(ENTRY.len()).position(|window| window == ENTRY) else {
        return Vec::new();
    };
    let list = module.get(start + ENTRY.len()..).unwrap_or_default();
    let list = list.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(list).split(',').filter(|it| !it.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"ELF\0license=GPL\0depends=net_failover,virtio\0name=x\0";
        assert_eq!(dependencies(module), ["net_failover", "virtio"]);
        assert!(dependencies(b"ELF\0depends=\0name=x\0").is_empty());
        assert!(dependencies(b"ELF").is_empty());
    }
}
