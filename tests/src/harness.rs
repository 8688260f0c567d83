//! Integration tests that run where KVM is.
//!
//! A test is a function of the test executable. Where it cannot run on this machine, the executable puts
//! itself and the product into a fresh test host and runs there again, for this one test.

use std::collections::BTreeMap;
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use agent::wire::{self, Exit};
use anyhow::{Context, Result, bail};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::host::{self, DEFAULT_MEMORY, HostError, Parcel, Put, Snapshot, Stdin, TestHost};
use crate::{artifacts, build, child};

/// The variable that says where tests run; see [`Choice`].
pub const CHOICE: &str = "OZONE_TEST_ON";

/// Runs one test in this process: what the executable is called with in the test host.
const INSIDE: &str = "--inside";

const DEADLINE: Duration = Duration::from_secs(180);

/// Where tests that boot Linux run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// On this machine.
    Kvm,
    /// In the test host.
    #[default]
    Nested,
    /// Nowhere: they are reported as ignored.
    None,
}

impl std::str::FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "kvm" => Ok(Self::Kvm),
            "nested" => Ok(Self::Nested),
            "none" => Ok(Self::None),
            _ => Err(format!("'{text}' is none of kvm, nested, none")),
        }
    }
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Nested => "nested",
            Self::None => "none",
        })
    }
}

/// What a test needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// KVM that runs Linux.
    Host,
    /// Root and any KVM, if only for a tiny payload.
    Local,
}

/// One integration test.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    name: &'static str,
    needs: Needs,
    deadline: Duration,
    memory: u64,
    userland: bool,
    run: fn() -> Result<()>,
}

impl Test {
    /// A test that needs a host whose KVM boots Linux.
    #[must_use]
    pub const fn host(name: &'static str, run: fn() -> Result<()>) -> Self {
        Self { name, needs: Needs::Host, deadline: DEADLINE, memory: DEFAULT_MEMORY, userland: false, run }
    }

    /// A test of jail steps, or with a tiny payload: needs root and a /dev/kvm of any kind.
    #[must_use]
    pub const fn local(name: &'static str, run: fn() -> Result<()>) -> Self {
        Self { needs: Needs::Local, ..Self::host(name, run) }
    }

    /// Its name: the file it is in, and what it shows.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Another deadline than three minutes.
    #[must_use]
    pub const fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// With [`artifacts::Userland`] in the host.
    #[must_use]
    pub const fn with_userland(mut self) -> Self {
        self.userland = true;
        self
    }

    /// A test host with more memory.
    #[must_use]
    pub const fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }
}

/// The `main` of a test executable.
#[must_use]
pub fn main(tests: &[Test]) -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(INSIDE) {
        return inside(tests, &arguments.next().unwrap_or_default());
    }
    let choice = match std::env::var(CHOICE).unwrap_or_default().as_str() {
        "" => Choice::default(),
        text => match text.parse() {
            Ok(choice) => choice,
            Err(error) => {
                eprintln!("{CHOICE}: {error}");
                return ExitCode::FAILURE;
            }
        },
    };
    conclude(tests, choice).exit_code()
}

fn conclude(tests: &[Test], choice: Choice) -> Conclusion {
    let mut arguments = Arguments::from_args();
    // A test host has two processors and keeps them busy.
    arguments.test_threads.get_or_insert(2);
    let local = permits_local_tests();
    let trials = tests
        .iter()
        .map(|test| {
            let test = *test;
            let here = choice == Choice::Kvm || test.needs == Needs::Local && local;
            let ignored = choice == Choice::None && !here;
            Trial::test(test.name, move || {
                let result = if here { run_here(&test) } else { run_in_host(&test) };
                result.map_err(|error| Failed::from(format!("{error:#}")))
            })
            .with_ignored_flag(ignored)
        })
        .collect();
    libtest_mimic::run(&arguments, trials)
}

/// Whether this machine can run tests of jail steps and tiny payloads: root, and a /dev/kvm that makes VMs.
#[must_use]
pub fn permits_local_tests() -> bool {
    nix::unistd::geteuid().is_root() && kvm_ioctls::Kvm::new().is_ok_and(|kvm| kvm.create_vm().is_ok())
}

fn inside(tests: &[Test], name: &str) -> ExitCode {
    let Some(test) = tests.iter().find(|test| test.name == name) else {
        eprintln!("no test named '{name}'");
        return ExitCode::FAILURE;
    };
    match (test.run)() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the test in a process of its own on this machine.
fn run_here(test: &Test) -> Result<()> {
    product()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args([INSIDE, test.name]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child::spawn(&mut command, Vec::new()).context("start the test")?;
    let mut readers = Vec::new();
    let pipes: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|it| Box::new(it) as Box<dyn Read + Send>),
        child.stderr.take().map(|it| Box::new(it) as Box<dyn Read + Send>),
    ];
    for mut pipe in pipes.into_iter().flatten() {
        readers.push(thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            bytes
        }));
    }
    let pidfd = pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty())?;
    let timeout = Timespec::try_from(test.deadline)?;
    let in_time = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout))? > 0;
    if !in_time {
        child.kill()?;
    }
    let status = child.wait()?;
    let output: Vec<u8> = readers.into_iter().flat_map(|it| it.join().unwrap_or_default()).collect();
    let output = String::from_utf8_lossy(&output);
    match in_time {
        true if status.success() => Ok(()),
        true => bail!("{status}\n{output}"),
        false => bail!("not finished after {:?}\n{output}", test.deadline),
    }
}

/// Runs the test in a fresh test host; once more if the host itself failed.
fn run_in_host(test: &Test) -> Result<()> {
    match run_in_host_once(test) {
        Err(error) if is_infrastructure(&error) => {
            eprintln!("note: {} is run again after an {error:#}", test.name);
            run_in_host_once(test)
        }
        result => result,
    }
}

fn is_infrastructure(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(HostError::Infrastructure { .. }))
}

fn run_in_host_once(test: &Test) -> Result<()> {
    let (snapshot, parcel) = (snapshot(test.memory)?, parcel(test.userland)?);
    let mut host = TestHost::resume(&snapshot, parcel)?;
    let argv = vec![host::executable(TEST_EXECUTABLE), INSIDE.to_owned(), test.name.to_owned()];
    let command = wire::Command { argv, env: host::environment(), terminal: None };
    let mut output = Vec::new();
    let exit = host.run(command, Stdin::Empty, Some(test.deadline), &mut |_, bytes| output.extend(bytes));
    let output = String::from_utf8_lossy(&output);
    match exit {
        Ok(Exit::Code(0)) => Ok(()),
        Ok(exit) => bail!("{exit:?} in the test host\n{output}"),
        Err(error) if is_infrastructure(&error) => Err(error),
        Err(error) => bail!("{error:#}\n{output}"),
    }
}

/// The name of this executable in the test host.
const TEST_EXECUTABLE: &str = "integration-tests";

/// The product and the tests' own programs, built once.
fn product() -> Result<&'static [Put]> {
    static PRODUCT: OnceLock<Result<Vec<Put>, String>> = OnceLock::new();
    let built = PRODUCT.get_or_init(|| {
        let text = |error| format!("{error:#}");
        let product = build::product().map_err(text)?.into_iter().chain(build::companions().map_err(text)?);
        Ok(product.map(Put::executable).collect())
    });
    built.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// The product and this executable, with or without the userland, packed once.
fn parcel(with_userland: bool) -> Result<&'static Parcel> {
    static PARCELS: [OnceLock<Result<Parcel, String>>; 2] = [const { OnceLock::new() }; 2];
    let [plain, full] = &PARCELS;
    let pack = || -> Result<Parcel> {
        let ourselves = Put { from: std::env::current_exe()?, to: host::executable(TEST_EXECUTABLE) };
        let mut puts: Vec<_> = product()?.iter().cloned().chain([ourselves]).collect();
        if with_userland {
            puts.extend(artifacts::userland_puts()?);
        }
        Parcel::pack(&puts)
    };
    let place = if with_userland { full } else { plain };
    let packed = place.get_or_init(|| pack().map_err(|error| format!("{error:#}")));
    packed.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// The snapshot of that size, made or found once.
fn snapshot(memory: u64) -> Result<Arc<Snapshot>> {
    static SNAPSHOTS: Mutex<BTreeMap<u64, Arc<Snapshot>>> = Mutex::new(BTreeMap::new());
    let mut snapshots = SNAPSHOTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(snapshot) = snapshots.get(&memory) {
        return Ok(Arc::clone(snapshot));
    }
    let snapshot = Arc::new(host::snapshot(memory)?);
    snapshots.insert(memory, Arc::clone(&snapshot));
    Ok(snapshot)
}
