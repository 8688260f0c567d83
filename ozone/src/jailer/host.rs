//! Every host path that a jail is about, opened before there is anything to undo, and looked at once.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use caps::{Capability, CapsHashSet};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstat};
use protocol::{Fault, FaultKind};
use seccompiler::{BpfProgram, TargetArch};

use super::root::is_directory;
use super::source::Source;
use super::spec::{JailSpec, Seccomp};
use super::sys;
use crate::directory::FileId;
use crate::directory::walk::{self, WalkError};
use crate::report;
use crate::resources::{reopen, said};

/// The largest file of `--seccomp` in bytes.
const FILTER_MAX: u64 = 1 << 20;

/// The longest path of an interpreter, with what ends it (PATH_MAX).
const INTERPRETER_MAX: usize = 4096;

/// The most program headers of an executable that are looked at: the kernel takes as many as fit into a page.
const HEADERS_MAX: u16 = 128;

/// Why a jail cannot be had on this host.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Something cannot be opened.
    #[error("{argument}: {error}")]
    Open {
        /// The argument.
        argument: String,
        /// What is wrong with its path, or what the system says.
        error: WalkError,
    },
    /// Something is not what it has to be.
    #[error("{argument}: {problem}")]
    Unfit {
        /// The argument.
        argument: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The filters cannot be made.
    #[error(transparent)]
    Filter(#[from] seccomp::FilterError),
}

impl From<HostError> for Fault {
    fn from(error: HostError) -> Self {
        let kind = if matches!(error, HostError::Filter(_)) { FaultKind::Internal } else { FaultKind::Input };
        Self { kind, message: error.to_string() }
    }
}

/// What the jail is made of.
#[derive(Debug)]
pub struct Host {
    /// The program.
    pub program: Program,
    /// What it sees, in the order of the spec.
    pub sources: Vec<Found>,
    /// The network namespace that it joins.
    pub netns: Option<Rc<OwnedFd>>,
    /// The program's filters.
    pub filters: Vec<BpfProgram>,
    /// That of the jail's first process.
    pub init_filter: BpfProgram,
    /// `/dev/null`.
    pub null: OwnedFd,
    /// `/proc`.
    pub proc: OwnedFd,
}

/// Something that is held, so that its number means nothing else.
#[derive(Debug)]
pub struct Found {
    /// Which file it is.
    pub id: FileId,
    _held: OwnedFd,
}

/// The program's executable.
#[derive(Debug)]
pub struct Program {
    /// Which file it is.
    pub id: FileId,
    /// What the kernel executes it with, if it is not linked static.
    pub interpreter: Option<String>,
    _held: OwnedFd,
}

impl Host {
    /// Opens everything.
    ///
    /// # Errors
    /// [`HostError`], which names the argument.
    pub fn open(spec: &JailSpec, root: bool) -> Result<Self, HostError> {
        let user = User { uid: spec.uid, gid: spec.gid, capabilities: &spec.capabilities, root };
        let program = Program::open(&spec.program, user)?;
        let sources = spec.sources.iter().map(|source| Found::open(source, user)).collect::<Result<_, _>>()?;
        let netns = spec.netns.as_deref().map(network_namespace).transpose()?;
        let filters = match &spec.seccomp {
            Seccomp::None => Vec::new(),
            Seccomp::Default => seccomp::program_filters()?,
            Seccomp::File(path) => vec![filter_of(path)?],
        };
        let own = |path: &str, flags| {
            let failed = |errno: Errno| HostError::Open { argument: path.to_owned(), error: errno.into() };
            open(path, flags | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed)
        };
        let (null, proc) = (own("/dev/null", OFlag::O_RDWR)?, own("/proc", OFlag::O_PATH | OFlag::O_DIRECTORY)?);
        Ok(Self { program, sources, netns, filters, init_filter: seccomp::init_filter()?, null, proc })
    }
}

/// Who the program is.
#[derive(Clone, Copy, Debug)]
struct User<'a> {
    uid: u32,
    gid: u32,
    capabilities: &'a CapsHashSet,
    /// Whether `ozone` runs as root, so that the program can have another user than its files.
    root: bool,
}

impl User<'_> {
    /// Whether one of the three bits of a file's mode, as for others, is set for this user (inode(7), path_resolution(7)).
    fn has(self, stat: &FileStat, bit: libc::mode_t) -> bool {
        let shift = match (stat.st_uid == self.uid, stat.st_gid == self.gid) {
            (true, _) => 6,
            (_, true) => 3,
            _ => 0,
        };
        stat.st_mode & (bit << shift) != 0
    }

    /// Whether it can write to a device, which a read-only mount does not keep it from.
    fn can_write(self, stat: &FileStat) -> bool {
        self.has(stat, 0o2) || self.capabilities.contains(&Capability::CAP_DAC_OVERRIDE)
    }

    /// Why it could change the executable, if it could.
    fn changes(self, stat: &FileStat) -> Option<String> {
        let User { uid, gid, root, .. } = self;
        // Root owns nearly every executable, and was asked for.
        if uid != 0 && stat.st_uid == uid && (root || stat.st_mode & 0o200 != 0) {
            let remedy = if root { "give it another owner" } else { "take that away with chmod a-w" };
            return Some(format!("it belongs to uid {uid}, which can write it; {remedy}"));
        }
        if stat.st_gid == gid && stat.st_mode & 0o020 != 0 {
            return Some(format!("gid {gid} can write it; take that away with chmod g-w"));
        }
        (stat.st_mode & 0o002 != 0).then(|| "everyone can write it; take that away with chmod o-w".to_owned())
    }
}

fn opened(path: &Path, argument: &str) -> Result<(OwnedFd, FileStat), HostError> {
    let failed = |error| HostError::Open { argument: argument.to_owned(), error };
    let held = walk::hold(path).map_err(failed)?;
    let stat = fstat(&held).map_err(|errno| failed(errno.into()))?;
    Ok((held, stat))
}

impl Found {
    fn open(source: &Source, user: User<'_>) -> Result<Self, HostError> {
        let (held, stat) = opened(&source.path, &source.argument)?;
        let unfit = |problem: &str| HostError::Unfit { argument: source.argument.clone(), problem: problem.to_owned() };
        if matches!(stat.st_mode & libc::S_IFMT, libc::S_IFBLK | libc::S_IFCHR) {
            if !source.uses.devices {
                return Err(unfit("it is a device, which could not be opened in the jail; add the key dev"));
            }
            if !source.uses.write && user.can_write(&stat) {
                return Err(unfit(
                    "the program's user can write to this device, whatever the mount says; add the key rw, or take that from \
                     its mode",
                ));
            }
        }
        Ok(Self { id: FileId::from(&stat), _held: held })
    }
}

impl Program {
    fn open(path: &Path, user: User<'_>) -> Result<Self, HostError> {
        let argument = format!("--exec-file {}", path.to_string_lossy().escape_debug());
        let (held, stat) = opened(path, &argument)?;
        let unfit = |problem: String| HostError::Unfit { argument: argument.clone(), problem };
        if is_directory(&stat) || stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(unfit("it is no file".to_owned()));
        }
        if !user.has(&stat, 0o1) {
            return Err(unfit(format!("uid {} may not execute it; see its mode", user.uid)));
        }
        if let Some(problem) = user.changes(&stat) {
            return Err(unfit(format!("the program could change itself: {problem}")));
        }
        Ok(Self { id: FileId::from(&stat), interpreter: interpreter(&held), _held: held })
    }
}

fn network_namespace(path: &Path) -> Result<Rc<OwnedFd>, HostError> {
    let argument = format!("--netns {}", path.to_string_lossy().escape_debug());
    let failed = |error| HostError::Open { argument: argument.clone(), error };
    // Not to be hung by a pipe.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    let namespace = reopen(walk::hold(path).map_err(failed)?, flags).map_err(|errno| failed(errno.into()))?;
    if !sys::is_network_namespace(std::os::fd::AsFd::as_fd(&namespace)) {
        let problem = "it is no network namespace, as 'ip netns add' makes them in /run/netns".to_owned();
        return Err(HostError::Unfit { argument, problem });
    }
    Ok(Rc::new(namespace))
}

/// The filter of a file of seccompiler's JSON, which has one.
fn filter_of(path: &Path) -> Result<BpfProgram, HostError> {
    let argument = format!("--seccomp {}", path.to_string_lossy().escape_debug());
    let unfit = |problem: String| HostError::Unfit { argument: argument.clone(), problem: problem.replace('\n', " ") };
    let read = |file: File| {
        let mut text = Vec::new();
        file.take(FILTER_MAX).read_to_end(&mut text).map(|_| text)
    };
    let found = walk::hold(path).map_err(|error| unfit(error.to_string()))?;
    let file = reopen(found, OFlag::O_RDONLY).map_err(|errno| unfit(errno.desc().to_owned()))?;
    let text = read(file.into()).map_err(|error| unfit(said(&error)))?;
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| unfit(error.to_string()))?;
    let filters = seccompiler::compile_from_json(text.as_slice(), arch).map_err(|error| unfit(error.to_string()))?;
    let mut filters = filters.into_values();
    match (filters.next(), filters.next()) {
        (Some(mut filter), None) => {
            seccomp::refuse_x32(&mut filter);
            Ok(filter)
        }
        _ => Err(unfit("it has to have one filter".to_owned())),
    }
}

/// The path that the kernel takes for the interpreter of an executable: of a script (execve(2)), or of what is linked dynamic
/// (elf(5), PT_INTERP). None for what is linked static, and for what cannot be read.
fn interpreter(held: &OwnedFd) -> Option<String> {
    let file = File::open(format!("/proc/self/fd/{}", held.as_raw_fd())).ok()?;
    let mut head = [0; 256];
    let length = file.read_at(&mut head, 0).ok()?;
    let head = head.get(..length)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next()?;
        let text = String::from_utf8_lossy(line);
        return text.split_whitespace().next().map(printable);
    }
    let number = |bytes: &[u8], at: usize, size: usize| {
        let field = bytes.get(at..at.checked_add(size)?)?;
        Some(field.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    // ELFCLASS64 and ELFDATA2LSB.
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (headers, size, count) = (number(head, 32, 8)?, number(head, 54, 2)?, number(head, 56, 2)?);
    for index in 0..count.min(HEADERS_MAX.into()) {
        let mut header = [0; 56];
        file.read_exact_at(&mut header, headers.checked_add(index.checked_mul(size)?)?).ok()?;
        if number(&header, 0, 4)? == u64::from(libc::PT_INTERP) {
            let (at, length) = (number(&header, 8, 8)?, usize::try_from(number(&header, 32, 8)?).ok()?);
            let mut path = vec![0; length.min(INTERPRETER_MAX)];
            file.read_exact_at(&mut path, at).ok()?;
            let path = path.split(|byte| *byte == 0).next()?;
            return Some(printable(&String::from_utf8_lossy(path)));
        }
    }
    None
}

fn printable(text: &str) -> String {
    text.escape_debug().to_string()
}

/// Says what of a jail is wider than it looks.
pub fn announce(spec: &JailSpec) {
    for capability in super::spec::ESCAPES.into_iter().filter(|it| spec.capabilities.contains(it)) {
        report::warn(&format!("--capability {capability}: whoever has it can leave the jail"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    fn stat(uid: u32, gid: u32, mode: u32) -> FileStat {
        let mut stat = nix::sys::stat::stat("/dev/null").unwrap();
        (stat.st_uid, stat.st_gid, stat.st_mode) = (uid, gid, mode);
        stat
    }

    #[test]
    fn a_program_that_its_user_can_write_is_told_from_one_that_it_cannot() {
        let none = CapsHashSet::new();
        let user = |uid, gid, root| User { uid, gid, capabilities: &none, root };
        for (user, stat, changes) in [
            (user(7, 7, true), stat(0, 0, 0o755), false),
            (user(7, 7, true), stat(7, 0, 0o555), true),
            (user(7, 7, true), stat(0, 7, 0o775), true),
            (user(7, 7, true), stat(0, 8, 0o775), false),
            (user(7, 7, true), stat(0, 0, 0o757), true),
            (user(7, 7, false), stat(7, 7, 0o755), true),
            (user(7, 7, false), stat(7, 7, 0o555), false),
            (user(0, 0, true), stat(0, 0, 0o755), false),
        ] {
            assert_eq!(user.changes(&stat).is_some(), changes, "{user:?} {:o}", stat.st_mode);
        }
    }

    fn interpreter_of(bytes: &[u8]) -> Option<String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        interpreter(&File::open(file.path()).unwrap().into())
    }

    #[test]
    fn the_interpreter_is_that_of_the_kernels() {
        assert_eq!(interpreter_of(b"#! /bin/sh -e\nexit"), Some("/bin/sh".into()));
        assert_eq!(interpreter_of(b"#!\x1b[2J\n"), Some("\\u{1b}[2J".into()));
        assert_eq!(interpreter_of(b""), None);
        assert_eq!(interpreter_of(b"\x7fELF\x02\x01"), None);
        assert_eq!(interpreter_of(&fs::read("/proc/self/exe").unwrap()), None, "tests are linked static");
        let shell = interpreter_of(&fs::read("/bin/sh").unwrap());
        assert!(shell.is_none_or(|path| path.starts_with('/')));
        // Headers that lead nowhere.
        let mut elf = vec![0xff; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert_eq!(interpreter_of(&elf), None);
    }

    #[test]
    fn a_file_of_filters_has_one() {
        let compile = |text: &str| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            filter_of(file.path()).map_err(|error| error.to_string())
        };
        let one = r#""a": { "mismatch_action": "allow", "match_action": "trap", "filter": [{ "syscall": "swapon" }] }"#;
        assert!(compile(&format!("{{ {one} }}")).is_ok());
        for text in ["", "{}", "{ \"a\": 1 }", &format!("{{ {one}, {} }}", one.replace("\"a\"", "\"b\""))] {
            let wrong = compile(text).unwrap_err();
            assert!(wrong.starts_with("--seccomp /") && wrong.lines().count() == 1, "{wrong}");
        }
    }
}
