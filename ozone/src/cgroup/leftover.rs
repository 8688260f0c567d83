//! What a killed machine's control groups leave, undone by their paths.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::directory::Directory;
use super::{CgroupError, KILL_PATIENCE, PATIENCE, SUBTREE, clear, file};
use crate::directory::FileId;
use crate::journal::Undone;
use crate::spec::limits::MOUNT;

fn root() -> Result<Directory, CgroupError> {
    let root = Directory::root(Path::new(MOUNT)).map_err(|_| CgroupError::Unsupported)?;
    if root.is_unified() { Ok(root) } else { Err(CgroupError::Unsupported) }
}

/// Ends all that is in a group, and removes it. One that a running machine has stays, and so does one with another inode.
///
/// # Errors
/// [`CgroupError`].
pub fn undo(path: &Path, id: Option<FileId>) -> Result<Undone, CgroupError> {
    let root = root()?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let failed = |errno| file("open", root.path().join(path), errno);
    let above = path.parent().unwrap_or(Path::new(""));
    let (parent, group) = match root.open(above).and_then(|parent| parent.open(Path::new(name)).map(|it| (parent, it)))
    {
        Ok(found) => found,
        Err(Errno::ENOENT | Errno::ENODEV) => return Ok(Undone::Gone),
        Err(errno) => return Err(failed(errno)),
    };
    if id.is_some_and(|id| group.id() != Ok(id)) {
        return Ok(Undone::Replaced(format!("{} is another cgroup than it was", group.path().display())));
    }
    // A running machine has the lock of its group; one that was killed may have a child that is about to die with it. What
    // others can open they can lock, which says nothing.
    let deadline = Instant::now() + PATIENCE;
    let mut held = Vec::new();
    for ancestor in path.ancestors().filter(|path| !path.as_os_str().is_empty()) {
        let directory = root.open(ancestor).map_err(failed)?;
        if !directory.is_private() {
            continue;
        }
        while !directory.claim_shared() {
            if Instant::now() >= deadline {
                return Err(CgroupError::Taken(group.path().to_owned()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        held.push(directory);
    }
    if parent.open(Path::new(name)).and_then(|now| now.id()) != group.id() {
        return Ok(Undone::Gone);
    }
    clear(&parent, &group, name, Instant::now() + KILL_PATIENCE)?;
    Ok(Undone::Removed)
}

/// Removes the group that all machines share, unless one of them is in it.
pub fn undo_common(path: &Path) -> Undone {
    let removed = root().is_ok_and(|root| root.remove(&path.to_string_lossy()).is_ok());
    if removed { Undone::Removed } else { Undone::Gone }
}

/// Takes back the controllers for the groups in one, unless there still are some.
pub fn undo_controllers(path: &Path) -> Undone {
    let Some(group) = root().ok().and_then(|root| root.open(path).ok()) else { return Undone::Gone };
    if !group.children().is_empty() {
        return Undone::Gone;
    }
    let controllers = group.words(SUBTREE).unwrap_or_default();
    let taken = controllers.iter().filter(|controller| group.write(SUBTREE, &format!("-{controller}")).is_ok());
    if taken.count() > 0 { Undone::Removed } else { Undone::Gone }
}
