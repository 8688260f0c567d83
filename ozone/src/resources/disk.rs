//! Disk images: opened once by path, kept by an O_PATH descriptor, opened anew for every incarnation of their backend.

use std::fs::{File, TryLockError};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::unistd::{Whence, lseek};

use super::{ResourceError, reopen, said};
use crate::directory::walk;
use crate::spec::{Device, DeviceConfig, Disk, VmSpec};

/// How long another holder of the owner's lock may take to let go: a machine that has just been killed is about to.
const OWNER_PATIENCE: Duration = Duration::from_secs(2);

/// A disk's image, owned by this machine for as long as the value lives.
#[derive(Debug)]
pub struct Image {
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The answer to VIRTIO_BLK_T_GET_ID.
    pub serial: String,
    /// Request queues.
    pub queues: u16,
    /// Whether the host's page cache is passed by.
    pub direct: bool,
    path: OwnedFd,
    argument: String,
    identity: Identity,
    /// Carries the owner's lock; never handed to a child.
    _owner: OwnedFd,
}

/// What makes two paths the same image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    /// A file by file system and inode.
    File(u64, u64),
    /// A block device by number, whatever the node.
    Device(u64),
}

/// Opens the images of a machine, in the order of its devices.
///
/// # Errors
/// [`ResourceError`] naming the argument.
pub fn open_all(spec: &VmSpec) -> Result<Vec<Image>, ResourceError> {
    let mut images: Vec<Image> = Vec::new();
    for device in &spec.devices {
        let DeviceConfig::Disk(disk) = &device.config else { continue };
        let (path, identity) = open_path(disk, &device.argument)?;
        // Before the lock, which would say that another machine holds what this one does.
        for other in images.iter().filter(|other| other.identity == identity) {
            if !(other.read_only && disk.read_only) {
                let problem =
                    format!("the same image as {}; only one writer, or readers alone, can use it", other.argument);
                return Err(ResourceError::input(&device.argument, problem));
            }
        }
        images.push(own(device, disk, path, identity)?);
    }
    Ok(images)
}

fn open_path(disk: &Disk, argument: &str) -> Result<(OwnedFd, Identity), ResourceError> {
    let wrong = |problem: &str| ResourceError::input(argument, problem);
    let path = walk::hold(&disk.path).map_err(|error| wrong(&error.to_string()))?;
    let metadata = path.try_clone().and_then(|path| File::from(path).metadata());
    let metadata = metadata.map_err(|error| wrong(&said(&error)))?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        Err(wrong("is a directory; a disk is a raw image or a block device"))
    } else if kind.is_block_device() {
        Ok((path, Identity::Device(metadata.rdev())))
    } else if kind.is_file() {
        Ok((path, Identity::File(metadata.dev(), metadata.ino())))
    } else {
        Err(wrong("is neither a file nor a block device"))
    }
}

fn own(device: &Device, disk: &Disk, path: OwnedFd, identity: Identity) -> Result<Image, ResourceError> {
    let argument = &device.argument;
    let owner = open_image(&path, disk.read_only, disk.direct, argument)?;
    // Also the size of a block device, whose metadata says 0.
    let size = lseek(&owner, 0, Whence::SeekEnd).unwrap_or(0);
    if size < 512 {
        let problem = "is empty, or smaller than a sector: give it a size, as with 'truncate -s 1G'";
        return Err(ResourceError::input(argument, problem));
    }
    lock_as_owner(&owner, disk.read_only, argument)?;
    // At most 20 bytes (virtio 1.2, section 5.2.6); names are ASCII.
    let serial = device.id.as_str().chars().take(20).collect();
    Ok(Image {
        read_only: disk.read_only,
        serial,
        queues: disk.queues,
        direct: disk.direct,
        path,
        argument: argument.clone(),
        identity,
        _owner: owner,
    })
}

fn open_image(path: &OwnedFd, read_only: bool, direct: bool, argument: &str) -> Result<OwnedFd, ResourceError> {
    let mut flags = if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    flags.set(OFlag::O_DIRECT, direct);
    reopen(path, flags).map_err(|errno| {
        let problem = match errno {
            Errno::EINVAL if direct => "its file system has no direct I/O; leave 'direct' away".to_owned(),
            Errno::EACCES | Errno::EPERM | Errno::EROFS if !read_only => {
                format!("{}; for a disk the guest only reads add ',readonly'", errno.desc())
            }
            errno => errno.desc().to_owned(),
        };
        ResourceError::input(argument, problem)
    })
}

/// Takes the owner's lock: one on the open file description, which ends with ozone however it ends (fcntl(2), F_OFD_SETLK).
fn lock_as_owner(owner: &OwnedFd, read_only: bool, argument: &str) -> Result<(), ResourceError> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let lock = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    let deadline = Instant::now() + OWNER_PATIENCE;
    loop {
        match fcntl(owner, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Err(ResourceError::input(argument, "held by another VM; end that one first"));
            }
            Err(errno) => return Err(ResourceError::host(argument, format!("lock: {}", errno.desc()))),
        }
    }
}

impl Image {
    /// Opens the image for the next backend process. It is of no use to one before [`Fresh::is_drained`] says so.
    ///
    /// # Errors
    /// [`ResourceError`] when the file can no longer be opened.
    pub fn fresh(&self) -> Result<Fresh, ResourceError> {
        let file = File::from(open_image(&self.path, self.read_only, self.direct, &self.argument)?);
        Ok(Fresh { file, read_only: self.read_only, argument: self.argument.clone() })
    }

    /// What is said when earlier requests do not end.
    pub fn draining(&self, seconds: u64) -> ResourceError {
        let problem =
            format!("draining: earlier requests, or another program's flock, still hold it after {seconds} s");
        ResourceError::host(&self.argument, problem)
    }
}

/// An open file description of an image, for one backend process.
#[derive(Debug)]
pub struct Fresh {
    file: File,
    read_only: bool,
    argument: String,
}

impl Fresh {
    /// Whether no request of an earlier process is under way any more; asked again and again until then.
    ///
    /// The flock of an incarnation is held by its description and by every request on it, so that a fresh one is granted
    /// only when the last of them is done.
    ///
    /// # Errors
    /// [`ResourceError`] when the kernel cannot say.
    pub fn is_drained(&self) -> Result<bool, ResourceError> {
        match if self.read_only { self.file.try_lock_shared() } else { self.file.try_lock() } {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => {
                Err(ResourceError::host(&self.argument, format!("flock: {}", said(&error))))
            }
        }
    }

    /// The description, for a process that is to use it.
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.path.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, lchown, symlink};
    use std::path::Path;

    fn opened(path: &Path) -> Result<Identity, String> {
        let disk = Disk { path: path.to_owned(), read_only: false, direct: false, queues: 1 };
        open_path(&disk, "--disk root").map(|(_, identity)| identity).map_err(|error| error.to_string())
    }

    #[test]
    fn a_link_of_another_user_is_no_disk() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let (image, theirs) = (base.path().join("image"), base.path().join("theirs"));
        fs::write(&image, [0; 512]).unwrap();
        fs::create_dir(&theirs).unwrap();
        symlink("../image", theirs.join("link")).unwrap();
        symlink("theirs/link", base.path().join("operators")).unwrap();
        let (link, operators) = (theirs.join("link"), base.path().join("operators"));
        assert_eq!(opened(&link), opened(&image), "the operator's own");
        assert_eq!(opened(&operators), opened(&image));
        fs::set_permissions(&theirs, Permissions::from_mode(0o777)).unwrap();
        assert_eq!(opened(&link), opened(&image), "also where others write");
        lchown(&link, Some(65534), None).unwrap();
        for path in [&link, &operators] {
            let error = opened(path).unwrap_err();
            assert!(
                error.starts_with("--disk root: /") && error.contains("link is a symbolic link of user 65534"),
                "{error}"
            );
        }
    }
}
