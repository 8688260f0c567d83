//! What a `kill -9` of `ozone` leaves at each step, and that `ozone gc` and the next start undo it.
//!
//! An `ozone` with the feature `crash-points` kills itself at the n-th step, for n = 1, 2, 3 and so on until a run comes to its
//! end.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use agent::layout::ORDINARY_USER;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use ozone_tests::harness::Test;
use ozone_tests::payload::Code;
use ozone_tests::product::Product;
use ozone_tests::vm::{ANSWER, BOOT, Vm};

use crate::cgroup::{Made, inside};
use crate::kvm_device;
use crate::traces::Traces;

/// The tests of this file.
pub const TESTS: [Test; 4] = [
    Test::host("gc::undoes_what_a_kill_at_each_step_leaves", gc_as_root),
    Test::host("gc::a_start_of_the_same_name_undoes_it_too", again_as_root),
    Test::host("gc::undoes_it_for_an_ordinary_user", gc_as_user),
    Test::host("gc::a_start_of_an_ordinary_users_undoes_it_too", again_as_user),
];

/// No run has as many steps.
const MOST: u32 = 1000;

/// Fewer than the objects of a run alone.
const LEAST: u32 = 20;

/// What comes after the kill.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// `ozone gc`, twice.
    Gc,
    /// A run of the same name.
    Again,
}

/// A machine of a few instructions, with one of everything that its user may have.
struct Bench {
    product: Product,
    directory: tempfile::TempDir,
    user: Option<u32>,
    /// A control group that is left to the user.
    group: Option<Made>,
}

impl Bench {
    fn new(user: Option<u32>, group: Option<Made>) -> Result<Self> {
        let product = Product::with(&[("ozone", "ozone-crash-points")])?;
        let directory = tempfile::tempdir()?;
        for path in [product.directory(), directory.path()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        fs::write(directory.path().join("kernel"), Code::default().power_off().elf())?;
        fs::File::create(directory.path().join("disk.img"))?.set_len(1 << 20)?;
        for name in ["runtime", "sockets"] {
            let path = directory.path().join(name);
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
            chown(path, user, user)?;
        }
        chown(directory.path().join("disk.img"), user, user)?;
        Ok(Self { product, directory, user, group })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn ozone(&self) -> Command {
        let mut command = Command::new(self.product.ozone());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("XDG_RUNTIME_DIR", self.path("runtime"));
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Runs the machine, and kills it at that step; nothing if it came to its end before.
    fn run(&self, step: Option<u32>) -> Result<Option<String>> {
        let mut command = self.ozone();
        command.arg("run").args(["--name", "crashed", "--memory", "64M"]).arg("--kernel").arg(self.path("kernel"));
        command.args(["--disk", &format!("path={}", self.path("disk.img").display())]);
        command.args(["--console", &format!("socket={}", self.path("sockets/console").display())]);
        if self.user.is_none() {
            command.args(["--net", "host-ip=192.0.2.1/24"]);
        }
        if let Some(step) = step {
            command.env("OZONE_CRASH_POINT", step.to_string());
        }
        if let Some(group) = &self.group {
            inside(&mut command, group.path())?;
        }
        let mut vm = Vm::spawn(&mut command)?;
        let status = vm.wait(BOOT)?;
        if status.signal() == Some(Signal::SIGKILL as i32) {
            vm.expect_error("crash point: ", ANSWER).context("it was killed by another")?;
            return Ok(Some(vm.expect_error("\n", ANSWER)?));
        }
        ensure!(status.code() == Some(0), "{status}: {}", vm.error_text());
        Ok(None)
    }

    fn gc(&self) -> Result<String> {
        let output = self.ozone().arg("gc").stdin(Stdio::null()).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && errors.is_empty(), "ozone gc: {}: {errors}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn at_each_step(bench: &Bench, then: Then) -> Result<()> {
    bench.run(None)?;
    let before = Traces::of_this_host()?;
    let mut points = Vec::new();
    for step in 1..MOST {
        let Some(point) = bench.run(Some(step))? else { break };
        let look = || {
            if then == Then::Again {
                ensure!(bench.run(None)?.is_none());
                return before.expect_again();
            }
            let removed = bench.gc()?;
            before.expect_again().with_context(|| format!("after ozone gc, which said:\n{removed}"))?;
            let second = bench.gc()?;
            ensure!(second.is_empty(), "the second ozone gc: {second}");
            before.expect_again()
        };
        look().with_context(|| format!("step {step}, {point}"))?;
        points.push(point);
    }
    println!("{} steps:\n{}", points.len(), points.join("\n"));
    ensure!(points.len() as u32 >= LEAST && (points.len() as u32) < MOST - 1, "{} steps", points.len());
    // Each kind of thing was among them.
    let mut kinds =
        vec!["half a line", "control socket", "sockets/console", "machine's lock", "journal removed", "made and"];
    if bench.user.is_none() {
        kinds.extend(["tap", "uids", "cgroup /sys/fs/cgroup/ozone/crashed/jailed/core", "file of uids removed"]);
    }
    if bench.group.is_some() {
        kinds.extend(["controllers of cgroup", "user.scope/crashed/jailed/blk-disk0"]);
    }
    for kind in kinds {
        ensure!(points.iter().any(|point| point.contains(kind)), "no step is about '{kind}': {points:#?}");
    }
    Ok(())
}

fn gc_as_root() -> Result<()> {
    at_each_step(&Bench::new(None, None)?, Then::Gc)
}

fn again_as_root() -> Result<()> {
    at_each_step(&Bench::new(None, None)?, Then::Again)
}

fn gc_as_user() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    at_each_step(&Bench::new(Some(ORDINARY_USER), Some(Made::of_user("user.scope")?))?, Then::Gc)
}

fn again_as_user() -> Result<()> {
    kvm_device::with_mode(0o666)?;
    // Without a control group: a start in one that a killed machine has put controllers in is for its manager to permit.
    at_each_step(&Bench::new(Some(ORDINARY_USER), None)?, Then::Again)
}
