//! What the tests of `ozone jail` have in common: a jail with a probe in it, and what the host sees of it.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

/// Who the program is in most tests, as root.
pub const OWN: u32 = 1_879_111_111;

/// An ordinary user of the host.
pub const ORDINARY: u32 = 1000;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A place for a jail's files, with the probe in it, which nobody but root can write.
pub struct Place {
    directory: tempfile::TempDir,
    user: Option<u32>,
    name: String,
}

impl Place {
    /// One for root.
    pub fn new() -> Self {
        Self::of(None)
    }

    /// One for an ordinary user.
    pub fn of_ordinary_user() -> Self {
        let user = if Uid::effective().is_root() { ORDINARY } else { Uid::effective().as_raw() };
        Self::of(Some(user))
    }

    fn of(user: Option<u32>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let copy = directory.path().join("probe");
        fs::copy("/proc/self/exe", &copy).unwrap();
        fs::set_permissions(&copy, Permissions::from_mode(0o555)).unwrap();
        let name = format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let place = Self { directory, user, name };
        if let Some(user) = user {
            place.make_directory("runtime", 0o700, user);
            // The build's directory may be closed to other users.
            fs::copy(env!("CARGO_BIN_EXE_ozone"), place.path("ozone")).unwrap();
            place.set("ozone", 0o755, 0);
        }
        place
    }

    /// The jail's name, which no other test has.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The same as text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub fn make_directory(&self, name: &str, mode: u32, owner: u32) -> String {
        fs::create_dir(self.path(name)).unwrap();
        self.set(name, mode, owner)
    }

    pub fn make_file(&self, name: &str, content: impl AsRef<[u8]>, mode: u32, owner: u32) -> String {
        fs::write(self.path(name), content).unwrap();
        self.set(name, mode, owner)
    }

    fn set(&self, name: &str, mode: u32, owner: u32) -> String {
        if Uid::effective().is_root() {
            chown(self.path(name), Some(owner), Some(owner)).unwrap();
        }
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
        self.text(name)
    }

    /// Where `ozone` records the jail.
    pub fn record(&self) -> PathBuf {
        let base = self.user.map_or_else(|| PathBuf::from("/run/ozone"), |_| self.path("runtime/ozone"));
        base.join("jails").join(&self.name)
    }

    /// `ozone jail` with these words alone.
    pub fn ozone(&self, words: &[&str]) -> Command {
        self.command(&[&["jail"], words].concat())
    }

    /// What `ozone gc` removes, which is called with these words and leaves nothing.
    pub fn gc(&self, words: &[&str]) -> Result<String, Failed> {
        let output = self.command(&[&["gc"], words].concat()).output()?;
        if output.status.success() && output.stderr.is_empty() {
            Ok(text(&output.stdout))
        } else {
            Err(format!("gc {words:?}: {}: {}{}", output.status, text(&output.stdout), text(&output.stderr)).into())
        }
    }

    /// `ozone` with these words alone.
    pub fn command(&self, words: &[&str]) -> Command {
        let ozone = self.user.map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_ozone")), |_| self.path("ozone"));
        let mut command = Command::new(ozone);
        command.args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(user) = self.user {
            command.env("XDG_RUNTIME_DIR", self.path("runtime"));
            if Uid::effective().is_root() {
                command.current_dir("/").uid(user).gid(user);
            }
        }
        command
    }

    /// `ozone jail` with the probe, these options, and these words for the probe.
    pub fn jail(&self, options: &[&str], probe: &[&str]) -> Command {
        let (program, id) = (self.text("probe"), self.user.unwrap_or(OWN).to_string());
        let mut words = vec!["--name", &self.name, "--exec-file", &program];
        for option in ["--uid", "--gid"] {
            if !options.contains(&option) {
                words.extend([option, &id]);
            }
        }
        words.extend(options);
        words.push("--");
        words.extend(probe);
        self.ozone(&words)
    }

    /// What the probe says, which ends well.
    pub fn said(&self, options: &[&str], probe: &[&str]) -> Result<Said, Failed> {
        let output = self.jail(options, probe).output()?;
        let said = Said::of(&output.stdout);
        if output.status.success() {
            Ok(said)
        } else {
            Err(format!("{options:?} {probe:?}: {}: {said:?} {}", output.status, text(&output.stderr)).into())
        }
    }

    /// That it is refused with this exit code and one line, which has all of these words in it, and leaves nothing behind.
    pub fn refused(&self, options: &[&str], code: i32, words: &[&str]) -> Result<(), Failed> {
        let output = self.jail(options, &["look"]).output()?;
        refused(&output, code, words)?;
        self.nothing_left()
    }

    /// That there is no record and no control group of it.
    pub fn nothing_left(&self) -> Result<(), Failed> {
        if self.record().exists() {
            return Err(format!("{} is still there", self.record().display()).into());
        }
        Ok(())
    }

    /// A jail whose probe waits after these words.
    pub fn waiting(&self, options: &[&str], probe: &[&str]) -> Result<Running, Failed> {
        let words = [probe, &["wait"]].concat();
        let mut command = self.jail(options, &words);
        Running::start(&mut command, self.record())
    }
}

/// What `ozone` said, but that this host has no control groups for it.
pub fn without_cgroups(bytes: &[u8]) -> String {
    text(bytes)
        .lines()
        .filter(|line| !line.starts_with("ozone: no cgroups: "))
        .map(|line| format!("{line}\n"))
        .collect()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// That `ozone` was in the way: with this code and this line.
pub fn refused(output: &Output, code: i32, words: &[&str]) -> Result<(), Failed> {
    let line = without_cgroups(&output.stderr);
    let right = output.status.code() == Some(code)
        && line.lines().count() == 1
        && line.starts_with("ozone: ")
        && words.iter().all(|word| line.contains(word));
    if right { Ok(()) } else { Err(format!("{:?} instead of {code} and {words:?}: {line}", output.status).into()) }
}

/// What a probe said.
#[derive(Debug, Default)]
pub struct Said(BTreeMap<String, String>);

impl Said {
    fn of(output: &[u8]) -> Self {
        let mut said = Self::default();
        text(output).lines().for_each(|line| said.take(line));
        said
    }

    fn take(&mut self, line: &str) {
        if let Some((key, value)) = line.split_once('=') {
            self.0.insert(key.to_owned(), value.to_owned());
        }
    }

    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).unwrap_or_else(|| panic!("nothing of '{key}' was said: {self:?}"))
    }

    pub fn calls(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().filter_map(|(key, value)| Some((key.strip_prefix("call ")?, value.as_str())))
    }
}

/// A jail with a probe that waits in it. Dropping it ends it.
pub struct Running {
    pub ozone: Child,
    pub said: Said,
    /// The jail's first process.
    pub first: i32,
    /// The program.
    pub program: i32,
    _input: OwnedFd,
}

impl Running {
    /// Kills `ozone` with SIGKILL and waits until nothing runs any more.
    pub fn kill(&mut self) -> Result<(), Failed> {
        self.ozone.kill()?;
        self.ends()?;
        until("the end of the jail's processes", || (!is_alive(self.first) && !is_alive(self.program)).then_some(()))
    }

    fn start(command: &mut Command, record: PathBuf) -> Result<Self, Failed> {
        let mut ozone = command.stdin(Stdio::piped()).spawn()?;
        let input = ozone.stdin.take().unwrap().into();
        let mut said = Said::default();
        let mut lines = BufReader::new(ozone.stdout.take().unwrap());
        let mut line = String::new();
        loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                let mut why = String::new();
                ozone.stderr.take().unwrap().read_to_string(&mut why)?;
                return Err(format!("awaited: the probe in its jail; {:?}, {why}", ozone.wait()?).into());
            }
            if line == "ready=\n" {
                break;
            }
            said.take(line.trim_end());
        }
        let pid = record.join("pid");
        let first = until("the process id", || fs::read_to_string(&pid).ok()?.trim().parse().ok())?;
        let program = until("the program's process", || child_of(first))?;
        Ok(Self { ozone, said, first, program, _input: input })
    }

    pub fn ends(&mut self) -> Result<std::process::ExitStatus, Failed> {
        let ozone = &mut self.ozone;
        until("ozone's end", || ozone.try_wait().ok()?)
    }

    pub fn signal(&self, signal: Signal) -> Result<(), Failed> {
        Ok(kill(Pid::from_raw(self.ozone.id().cast_signed()), signal)?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, or ends in good order, or is killed.
        let _ = self.signal(Signal::SIGTERM);
        let _ = self.ends();
        let _ = self.ozone.kill();
        let _ = self.ozone.wait();
    }
}

/// The first child of a process.
pub fn child_of(pid: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

pub fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::trim));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).replace('\t', " ")
}

/// Where a process's descriptors lead to.
pub fn descriptors(pid: i32) -> Vec<String> {
    let entry = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
        Some(format!("{} {}", entry.file_name().to_string_lossy(), target.split(':').next().unwrap_or_default()))
    };
    let mut open: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().filter_map(entry).collect();
    open.sort();
    open
}

pub fn namespace(pid: i32, name: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap()
}

pub fn is_alive(pid: i32) -> bool {
    // One that nobody has reaped yet is dead.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Waits for something that nothing tells of.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T, Failed> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(format!("awaited for {PATIENCE:?}: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// 200 descriptors that `ozone` inherits.
pub fn leak() -> Vec<File> {
    let leaked: Vec<File> = (0..200).map(|_| File::open("/etc/passwd").unwrap()).collect();
    for file in &leaked {
        fcntl(file, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    }
    leaked
}

/// Runs a body in a thread of its own that has copies of these namespaces (flags of unshare(2)).
pub fn apart<T: Send + 'static>(
    namespaces: nix::sched::CloneFlags,
    body: impl FnOnce() -> Result<T, Failed> + Send + 'static,
) -> Result<T, Failed> {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(namespaces)?;
        if namespaces.contains(nix::sched::CloneFlags::CLONE_NEWNS) {
            private_mounts()?;
        }
        body()
    });
    thread.join().unwrap_or_else(|_| Err("the thread panicked".into()))
}

fn private_mounts() -> nix::Result<()> {
    use nix::mount::{MsFlags, mount};
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
}

pub fn owner_and_mode(path: &Path) -> (u32, u32, u32) {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).unwrap();
    (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
}
