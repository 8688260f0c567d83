//! What a machine could leave behind, before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ozone_tests::vm::ANSWER;

/// What a machine could leave on its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    /// Process ids and names.
    processes: BTreeSet<String>,
    /// Lines of the mount table.
    mounts: BTreeSet<String>,
    /// Network interfaces.
    links: BTreeSet<String>,
    /// Files and directories where machines make some.
    pub files: BTreeSet<String>,
    /// What is locked, and how (proc(5), /proc/locks).
    locks: BTreeSet<String>,
}

fn names(directory: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path().display().to_string();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(path.clone());
            }
            found.insert(path);
        }
    }
    found
}

impl Traces {
    /// What there is now.
    pub fn of_this_host() -> Result<Self> {
        let mut processes = BTreeSet::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let directory = Path::new("/proc").join(&name);
            // Kernel threads have no executable; a process may end while we look.
            let Ok(command) = fs::read_to_string(directory.join("comm")) else { continue };
            if name.parse::<u32>().is_ok() && fs::read_link(directory.join("exe")).is_ok() {
                processes.insert(format!("{name} {}", command.trim()));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo")?.lines().map(str::to_owned).collect();
        // Without the number at the beginning of each line, which is its place in the list.
        let locks = fs::read_to_string("/proc/locks")?;
        let locks = locks.lines().filter_map(|line| Some(line.split_once(": ")?.1.to_owned())).collect();
        let mut files = names("/run");
        files.extend(names("/tmp"));
        files.extend(names("/sys/fs/cgroup").into_iter().filter(|path| Path::new(path).is_dir()));
        Ok(Self { processes, mounts, links: names("/sys/class/net"), files, locks })
    }

    /// Waits until the host looks as it did.
    pub fn expect_again(&self) -> Result<()> {
        let deadline = Instant::now() + ANSWER;
        loop {
            let now = Self::of_this_host()?;
            if now == *self {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("left behind or lost after {ANSWER:?}:\nbefore {self:#?}\nafter {now:#?}");
            }
            // Polled: the last of a dead process goes when the kernel gets to it, and nothing tells.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
