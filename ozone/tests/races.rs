//! Another user swaps what stands in a directory that is theirs while root's `ozone` makes, removes and opens things there.
//!
//! Nothing outside of that directory may be made, removed, changed or opened by it, whatever the other user puts into its way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use caps::CapsHashSet;
use libtest_mimic::{Arguments, Trial};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::socket::{SockFlag, SockType};
use nix::sys::stat::{fstat, lstat};
use nix::unistd::{Uid, write};
use ozone::cli::{self, Parsed};
use ozone::directory::FileId;
use ozone::directory::walk::{self, Last};
use ozone::gc;
use ozone::jailer::host::Host;
use ozone::jailer::source::{Source, Uses};
use ozone::jailer::spec::{JailSpec, Seccomp};
use ozone::journal::{Identity, Journal, Object};
use ozone::resources::console::{self, Place};
use ozone::resources::status_file::StatusFile;
use ozone::resources::{disk, trace_file};
use ozone::runtime::Home;
use ozone::socket;
use ozone::spec::file::ConsoleFile;
use ozone::spec::limits::Limits;
use ozone::spec::{self, Given};

/// The first argument of this executable when it is the other user.
const SWAPPER: &str = "as-swapper";

/// The other user.
const OTHER: u32 = 64_738;

/// How many things are made and removed, or tried to be.
const SET_UPS: u64 = 10_000;

/// How many of those have to succeed.
const SUCCESSES: u64 = 1_000;

/// How often the other user has changed everything by then, at least.
const SWAPS: u64 = 1_000;

/// How often two things change their places before others come.
const BURST: usize = 40;

const DEADLINE: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(SWAPPER) {
        swap(Path::new(&std::env::args().nth(2).unwrap()));
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    let root = Uid::effective().is_root();
    let name = "no file outside of a directory that another user writes is touched";
    let name = if root { name.to_owned() } else { format!("{name} (needs root)") };
    let trial = Trial::test(name, || {
        races();
        Ok(())
    });
    libtest_mimic::run(&arguments, vec![trial.with_ignored_flag(!root)]).exit_code()
}

/// The names in the other user's directory that `ozone` is told to use.
const NAMES: [&str; 7] = ["console", "log", "trace", "status", "disk", "source", "sub"];

/// What an image is filled with, and more than a sector of it.
const THEIRS: [u8; 1024] = [b'x'; 1024];

/// Puts one thing after another in the place of each name, until standard input ends.
fn swap(arena: &Path) {
    std::env::set_current_dir(arena).unwrap();
    let done = Arc::new(AtomicU64::new(0));
    let ended = Arc::clone(&done);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        ended.store(1, Ordering::Relaxed);
    });
    fs::create_dir_all("real/deep").unwrap();
    let mut said = std::io::stdout();
    for number in 0_u64.. {
        if done.load(Ordering::Relaxed) == 1 {
            return;
        }
        for (place, name) in NAMES.iter().enumerate() {
            let decoy = format!("decoy-{name}");
            put(&decoy, name, number + place as u64);
            let rename = |flags| renameat2(AT_FDCWD, decoy.as_str(), AT_FDCWD, *name, flags);
            // Back and forth, faster than anything else: between two looks at the name it is another thing.
            for _ in 0..BURST {
                if rename(RenameFlags::RENAME_EXCHANGE).is_err() {
                    let _ = rename(RenameFlags::empty());
                    put(&decoy, name, number + place as u64);
                }
            }
            clear(&decoy);
            // For a while nothing is in the way, until there is again.
            if *name != "sub" {
                clear(name);
            }
        }
        // Counted by the reader.
        if said.write_all(b".").and_then(|()| said.flush()).is_err() {
            return;
        }
    }
}

/// Something that `ozone` could be led astray by.
fn put(decoy: &str, name: &str, number: u64) {
    let outside = Path::new("../outside");
    let outcome = match (name, number % 8) {
        (_, 0) => symlink(outside.join("canary"), decoy),
        (_, 1) => symlink(outside.join("new"), decoy),
        (_, 2) => symlink(outside, decoy),
        ("sub", 3 | 4) => symlink("real", decoy),
        ("sub", _) => fs::create_dir(decoy),
        (_, 3) => symlink("real/deep/file", decoy),
        (_, 4) => fs::write(decoy, THEIRS),
        (_, 5) => UnixListener::bind(decoy).map(drop),
        (_, 6) => fs::create_dir(decoy),
        // What they may give another name they may read and write.
        ("disk" | "source", _) => symlink(outside.join("socket"), decoy),
        // Where the host permits it (fs.protected_hardlinks).
        _ => fs::hard_link(outside.join("canary"), decoy).or_else(|_| symlink(outside.join("socket"), decoy)),
    };
    let _ = outcome;
}

fn clear(name: &str) {
    let _ = fs::remove_file(name).or_else(|_| fs::remove_dir_all(name));
}

/// The other user at work.
struct Swapper {
    child: Child,
    stdin: Option<ChildStdin>,
    swaps: Arc<AtomicU64>,
}

impl Swapper {
    fn start(arena: &Path) -> Self {
        let own = std::env::current_exe().unwrap();
        // Where the other user can execute it.
        let copy = arena.with_file_name("swapper");
        fs::copy(own, &copy).unwrap();
        let mut command = Command::new(copy);
        command.args([SWAPPER.as_ref(), arena.as_os_str()]).uid(OTHER).gid(OTHER);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let swaps = Arc::new(AtomicU64::new(0));
        let (counted, mut stdout) = (Arc::clone(&swaps), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut block = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut block) {
                counted.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
        let stdin = child.stdin.take();
        Self { child, stdin, swaps }
    }

    fn end(mut self) {
        self.stdin = None;
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Swapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What stands at each path: inode, owner, mode, links, size, times and content.
fn tree(path: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![path.to_owned()];
    while let Some(path) = left.pop() {
        let it = fs::symlink_metadata(&path).unwrap();
        let content = if it.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        // The other user may give a file more names where the host permits it, which changes its change time.
        let text = format!(
            "inode {}, owner {}:{}, mode {:o}, {} bytes, modified {}.{}, {content:?}",
            it.ino(),
            it.uid(),
            it.gid(),
            it.mode(),
            it.len(),
            it.mtime(),
            it.mtime_nsec()
        );
        if it.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(path, text);
    }
    found
}

/// How often what was tried.
#[derive(Debug, Default)]
struct Tally {
    made: u64,
    refused: u64,
    collected: u64,
}

impl Tally {
    fn count<T, E>(&mut self, outcome: &Result<T, E>) {
        *(if outcome.is_ok() { &mut self.made } else { &mut self.refused }) += 1;
    }
}

fn races() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (arena, outside) = (directory.path().join("arena"), directory.path().join("outside"));
    fs::create_dir(&arena).unwrap();
    chown(&arena, Some(OTHER), Some(OTHER)).unwrap();
    fs::create_dir_all(outside.join("directory")).unwrap();
    for name in ["canary", "disk", "source"] {
        fs::write(outside.join(name), [b'y'; 1024]).unwrap();
        fs::set_permissions(outside.join(name), fs::Permissions::from_mode(0o644)).unwrap();
    }
    drop(UnixListener::bind(outside.join("socket")).unwrap());
    for name in ["console", "log", "trace"] {
        drop(UnixListener::bind(outside.join("directory").join(name)).unwrap());
    }
    let before = tree(&outside);
    let canaries: Vec<FileId> = before.keys().map(|path| FileId::from(&lstat(path).unwrap())).collect();
    let beside = names(directory.path());

    let base = directory.path().join("runtime");
    let swapper = Swapper::start(&arena);
    let mut tally = Tally::default();
    let deadline = Instant::now() + DEADLINE;
    let mut rounds = 0;
    let is_enough = |tally: &Tally| {
        let swaps = swapper.swaps.load(Ordering::Relaxed);
        tally.made + tally.refused >= SET_UPS && tally.made >= SUCCESSES && swaps >= SWAPS
    };
    while !is_enough(&tally) {
        assert!(Instant::now() < deadline, "{rounds} rounds and {:?} swaps after {DEADLINE:?}", swapper.swaps);
        round(&arena, &base, rounds, &canaries, &mut tally);
        if rounds.is_multiple_of(100) {
            assert_eq!(tree(&outside), before, "round {rounds}");
        }
        rounds += 1;
    }
    println!("{rounds} rounds, {} swaps: {tally:?}", swapper.swaps.load(Ordering::Relaxed));
    swapper.end();
    assert_eq!(tree(&outside), before, "something outside is changed");
    let mut now = names(directory.path());
    now.retain(|name| name != "swapper");
    assert_eq!(now, beside, "something is beside it");
    // It was tried in earnest: some of it went well, and all of it does when nobody interferes.
    assert!(tally.refused > 0 && tally.collected > 0, "{tally:?}");
    NAMES.iter().for_each(|name| clear(arena.join(name).to_str().unwrap()));
    let mut last = Tally::default();
    fs::create_dir(arena.join("sub")).unwrap();
    for name in ["disk", "source", "sub/disk", "sub/source"] {
        fs::write(arena.join(name), THEIRS).unwrap();
    }
    round(&arena, &base, 0, &canaries, &mut last);
    assert_eq!((last.refused, last.collected), (0, 1), "{last:?}");
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Makes and removes what a machine makes by a path of its user's, and collects what a killed one has left.
fn round(arena: &Path, base: &Path, number: u64, canaries: &[FileId], tally: &mut Tally) {
    let (home, _) = Home::claim(base, Some("victim")).unwrap();
    let journal = home.journal();
    for place in [arena.to_owned(), arena.join("sub")] {
        let path = |name: &str| place.join(name).display().to_string();
        tally.count(&console::open(&ConsoleFile::Socket(path("console")), "--console", &journal));
        let log = console::open(&ConsoleFile::File(path("log")), "--console", &journal);
        if let Ok(Place::Stream { output, .. }) = &log {
            // As its guest would.
            let _ = write(output, b"x");
        }
        tally.count(&log);
        let trace = trace_file(Some(&path("trace")));
        if let Ok(Some(mut trace)) = trace.as_ref().map(Option::as_ref) {
            let _ = trace.write_all(b"y");
        }
        tally.count(&trace);
        tally.count(&status(&path("status"), &journal));
        for opened in [disk(&path("disk")), source(place.join("source"))] {
            assert!(opened.as_ref().is_none_or(|id| !canaries.contains(id)), "round {number} opened what is outside");
            tally.count(&opened.ok_or(()));
        }
    }
    if number.is_multiple_of(4) {
        let left = [arena.to_owned(), arena.join("sub")].iter().filter(|place| leave(place, &journal)).count();
        drop(home);
        let report = gc::collect_below(base, &["victim".to_owned()]).unwrap();
        assert!(report.is_clean(), "{report:?}");
        tally.collected += u64::from(left > 0);
    }
}

/// Makes a record of how a run ended.
fn status(path: &str, journal: &Journal) -> Result<(), String> {
    let argument = format!("--status-file {path}");
    let given = Given { value: path.into(), argument };
    let file = StatusFile::open(&given, journal).map_err(|error| error.to_string())?;
    file.write(b"z").map_err(|error| error.to_string())
}

/// Opens a disk: which file it is.
fn disk(path: &str) -> Option<FileId> {
    let words = ["ozone", "run", "--kernel", "none", "--disk", &format!("path={path}")].map(OsString::from);
    let Parsed::Command(command) = cli::parse(words) else { panic!("--disk {path}") };
    let cli::Command::Run(options) = *command else { panic!("{command:?}") };
    let images = disk::open_all(&spec::load(&options).unwrap()).ok()?;
    Some(FileId::from(&fstat(&images[0]).unwrap()))
}

/// Finds what a program in a jail is to see: which file it is.
fn source(path: PathBuf) -> Option<FileId> {
    let source = Source { path, target: "/source".into(), uses: Uses::default(), argument: "--source".to_owned() };
    let spec = JailSpec {
        name: "victim".to_owned(),
        program: "/proc/self/exe".into(),
        target: "/program".into(),
        uid: OTHER + 1,
        gid: OTHER + 1,
        sources: vec![source],
        netns: None,
        settings: Vec::new(),
        place: Limits::default(),
        capabilities: CapsHashSet::new(),
        limits: Vec::new(),
        environment: Vec::new(),
        arguments: Vec::new(),
        seccomp: Seccomp::None,
        daemonize: false,
    };
    match Host::open(&spec, true) {
        Ok(host) => Some(host.sources[0].id),
        Err(error) => {
            assert!(error.to_string().starts_with("--source: "), "{error}");
            None
        }
    }
}

/// Makes a socket and leaves it, as `kill -9` does.
fn leave(place: &Path, journal: &Journal) -> bool {
    let Ok(named) = walk::resolve(&place.join("console"), Last::Itself) else { return false };
    let Ok(id) = named.directory.id() else { return false };
    let (directory, name) = (named.directory.path().to_owned(), "console".to_owned());
    let entry = journal.record(Object::Socket { directory, id, name }).unwrap();
    let made = socket::listen_at(&named.directory, &named.name, SockType::Stream, SockFlag::empty(), 1);
    match made {
        Ok((socket, id)) => {
            entry.made(Identity::File(id));
            drop((socket, entry));
            true
        }
        Err(_) => {
            entry.undone();
            false
        }
    }
}
