//! Backends that do not play by the rules: they harm their own guest at most.
//!
//! Every disk of a machine is served by the hostile backend; a disk's name says what its backend does wrong, and at which of
//! its starts. One disk is honest and busy all the time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ozone_tests::harness::Test;
use ozone_tests::product::Product;
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm};
use ozone_tests::{backends, control, trial};

/// The tests of this file.
pub const TESTS: [Test; 7] = [
    Test::host("hostile_backend::one_that_behaves_is_a_disk", one_that_behaves_is_a_disk),
    Test::host("hostile_backend::answers_that_are_none", answers_that_are_none),
    Test::host("hostile_backend::connections_that_close", connections_that_close),
    Test::host("hostile_backend::launches_that_go_wrong", launches_that_go_wrong),
    Test::host("hostile_backend::words_that_nobody_asked_for", words_that_nobody_asked_for),
    Test::host("hostile_backend::memory_that_is_none", memory_that_is_none),
    Test::host("hostile_backend::queues_that_are_tampered_with", queues_that_are_tampered_with),
];

const NAME: &str = "hostile";

/// A disk's size in bytes; the backend keeps the last sector for itself.
const DISK: u64 = 4 << 20;

/// Everything that the product gives up on or finds out by waiting, and a slow machine.
const PATIENCE: Duration = Duration::from_secs(100);

fn product() -> Result<Product> {
    Product::with(&[("ozone-blk", "hostile-backend")])
}

/// What the other tests take for granted.
fn one_that_behaves_is_a_disk() -> Result<()> {
    let product = product()?;
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(DISK)?;
    let guest = Guest::new()?.ozone(product.ozone());
    for _ in 0..2 {
        let option = format!("path={},id=honest,queues=2", image.path().display());
        let mut vm = guest.clone().option("--disk", option).boot()?;
        ensure!(vm.guest("cat /sys/block/vda/serial")?.trim() == "honest");
        ensure!(vm.guest("cat /sys/block/vda/size")?.trim() == (DISK / 512 - 1).to_string());
        vm.guest("dd if=/dev/urandom of=/sample bs=64k count=16 && dd if=/sample of=/dev/vda oflag=direct bs=64k")?;
        vm.guest("sync; dd if=/dev/vda bs=64k count=16 iflag=direct | cmp - /sample")?;
        vm.power_off()?;
    }
    let mut starts = [0; 8];
    File::open(image.path())?.read_exact_at(&mut starts, DISK - 512)?;
    ensure!(u64::from_ne_bytes(starts) == 2, "started {starts:?} times");
    Ok(())
}

/// A machine whose first two disks are honest, the oracle's, and whose others are not.
struct Stage {
    vm: Vm,
    plays: Vec<&'static str>,
    // Let go of after the machine.
    _images: tempfile::TempDir,
    _product: Product,
}

/// The descriptors of the two processes that outlive backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptors {
    ozone: usize,
    core: usize,
}

impl Stage {
    /// Boots it; each of `plays` is a disk's name, and what else its option says.
    fn set(plays: &[(&'static str, &str)]) -> Result<Self> {
        let (product, images) = (product()?, tempfile::tempdir()?);
        let mut guest = Guest::new()?.ozone(product.ozone()).option("--name", NAME).programs(&["oracle"])?;
        for (id, more) in [("honest", ""), ("honest-journal", "")].iter().chain(plays) {
            let image = images.path().join(id);
            File::create(&image)?.set_len(DISK)?;
            guest = guest.option("--disk", format!("path={},id={id}{more}", image.display()));
        }
        let mut vm = guest.start()?;
        vm.expect("ozone-guest: ready\n", PATIENCE)?;
        let plays = plays.iter().map(|(id, _)| *id).collect();
        let mut stage = Self { vm, plays, _images: images, _product: product };
        // Its drivers complain, and rightly; the console is for the oracle.
        stage.vm.guest("dmesg -n 1")?;
        stage.busy()?;
        trial::start(&mut stage.vm, "--depth 4")?;
        Ok(stage)
    }

    /// Every disk is read from, over and over.
    fn busy(&mut self) -> Result<()> {
        for letter in ('c'..).take(self.plays.len()) {
            self.vm.guest(&format!(
                "(while [ ! -e /over ]; do dd if=/dev/vd{letter} of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null; usleep 100000; done) &"
            ))?;
        }
        Ok(())
    }

    fn descriptors(&self) -> Result<Descriptors> {
        let status = control::status(NAME)?;
        Ok(Descriptors { ozone: backends::descriptors(status.pid)?, core: backends::descriptors(status.core_pid)? })
    }

    /// Ends the first process of every disk that plays; the next one plays.
    fn raise_the_curtain(&self) -> Result<()> {
        for play in &self.plays {
            backends::kill(self.vm.pid(), &format!("blk/{play}"))?;
        }
        Ok(())
    }

    /// Waits until `is` holds for every disk that plays. Meanwhile the honest disk and the console serve, and the machine
    /// answers.
    fn watch(&mut self, what: &str, is: impl Fn(&control::Device) -> bool) -> Result<control::Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            trial::await_writes(&mut self.vm, 5, ANSWER).context("the honest disk")?;
            let status = control::status(NAME)?;
            let honest = status.device("honest")?;
            ensure!(honest.restarts == 0 && honest.state == "up", "the honest disk was lost: {honest:?}");
            let waits: Vec<_> =
                self.plays.iter().filter_map(|play| status.device(play).ok()).filter(|device| !is(device)).collect();
            if waits.is_empty() {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "awaited for {PATIENCE:?} that {what}: {waits:#?}\n{}", self.errors());
        }
    }

    /// The end of what `ozone` said.
    fn errors(&self) -> String {
        let text = self.vm.error_text();
        let start = text.len().saturating_sub(4000);
        text.get(start..).unwrap_or(&text).to_owned()
    }

    /// Nobody holds more than before.
    fn expect_descriptors(&self, before: Descriptors) -> Result<()> {
        let deadline = Instant::now() + ANSWER;
        loop {
            let now = self.descriptors()?;
            if now == before {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "descriptors: {before:?} before, {now:?} after\n{}", self.errors());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Every disk is written and read once more, and the machine ends in good order.
    fn end(mut self) -> Result<()> {
        let found = self.stop()?;
        ensure!(found.faults.is_clean() && found.io_errors == 0, "the honest disk: {found:?}");
        self.vm.guest("touch /over; dd if=/dev/urandom of=/sample bs=4k count=64 2>/dev/null")?;
        for (letter, play) in ('c'..).zip(self.plays.clone()) {
            let disk = format!("/dev/vd{letter}");
            let write = format!("dd if=/sample of={disk} bs=4k oflag=direct 2>/dev/null");
            let read = format!("dd if={disk} bs=4k count=64 iflag=direct 2>/dev/null | cmp - /sample");
            self.vm.guest(&format!("{write} && {read}")).with_context(|| play)?;
        }
        self.vm.power_off()
    }

    fn stop(&mut self) -> Result<oracle::Found> {
        trial::stop(&mut self.vm)
    }
}

/// Shows what became of each device.
fn tell(status: &control::Status) {
    for device in &status.devices {
        println!("{}: {} restarts, {}", device.id, device.restarts, device.cause.as_deref().unwrap_or("never lost"));
    }
}

/// Plays that end with a process that behaves: each disk is lost or not, and serves again.
fn survive(plays: &[(&'static str, &str)]) -> Result<()> {
    let mut stage = Stage::set(plays)?;
    let before = stage.descriptors()?;
    stage.raise_the_curtain()?;
    // Some behave until their driver has a request.
    let status = stage.watch("every disk is back", |device| {
        device.state == "up" && device.restarts > u64::from(device.id.starts_with("events"))
    })?;
    tell(&status);
    stage.expect_descriptors(before)?;
    stage.end()
}

fn answers_that_are_none() -> Result<()> {
    survive(&[
        ("late", ""),
        ("too-late", ""),
        ("wrong-code", ""),
        ("no-answer", ""),
        ("half", ""),
        ("short", ""),
        ("long", ""),
        ("huge", ""),
        ("never", ""),
        ("never9", ""),
        ("wrong-code9", ""),
        ("half12", ""),
    ])
}

fn connections_that_close() -> Result<()> {
    survive(&[
        ("close1", ""),
        ("close2", ""),
        ("close3", ""),
        ("close4", ""),
        ("close5", ""),
        ("close6", ""),
        ("close8", ""),
        ("close10", ""),
        ("close12", ""),
        ("events-full", ""),
        ("events-block", ""),
    ])
}

fn launches_that_go_wrong() -> Result<()> {
    survive(&[
        ("never-ready", ""),
        ("ready-twice", ""),
        ("failed", ""),
        ("exit-well", ""),
        ("exit-badly", ""),
        ("less-features", ""),
        ("less-queues", ",queues=2"),
        ("less-capacity", ""),
        ("exit7", ""),
        ("exit11", ""),
        ("close14", ""),
    ])
}

fn words_that_nobody_asked_for() -> Result<()> {
    const MOST: usize = 1 << 20;
    let mut stage = Stage::set(&[
        ("no-alive", ""),
        ("wrong-alive", ""),
        ("flood-control", ""),
        ("flood-log", ""),
        ("resubmitted", ""),
    ])?;
    let before = stage.descriptors()?;
    stage.raise_the_curtain()?;
    // The one that gives no sign of life is found last; the flood of lines alone breaks no rule.
    let replaced = |device: &control::Device| {
        let harmless = ["flood-log", "resubmitted"].contains(&device.id.as_str());
        let found_out = device.cause.as_ref().is_some_and(|cause| !cause.contains("SIGKILL"));
        device.state == "up" && device.restarts > 0 && (harmless || found_out)
    };
    let status = stage.watch("every disk is back", replaced)?;
    tell(&status);
    ensure!(stage.vm.error_text().len() < MOST, "{} bytes of log", stage.vm.error_text().len());
    stage.expect_descriptors(before)?;
    stage.end()
}

/// The core asks for memory for what is in flight when the driver is ready: the first process plays.
fn memory_that_is_none() -> Result<()> {
    let mut stage = Stage::set(&[
        ("inflight-none-1", ""),
        ("inflight-two-1", ""),
        ("inflight-image-1", ""),
        ("inflight-pipe-1", ""),
        ("inflight-socket-1", ""),
        ("inflight-small-1", ""),
        ("inflight-zero-1", ""),
        ("inflight-huge-1", ""),
        ("inflight-odd-1", ""),
        ("inflight-offset-1", ""),
        ("inflight-unsealed-1", ""),
        ("inflight-cut-1", ""),
    ])?;
    let status = stage.watch("every disk is up", |device| device.state == "up")?;
    tell(&status);
    let before = stage.descriptors()?;
    stage.raise_the_curtain()?;
    stage.watch("every disk is back", |device| device.state == "up" && device.restarts > 0)?;
    stage.expect_descriptors(before)?;
    stage.end()
}

/// What such a backend does to its guest's memory is the guest's own loss: its driver may give the disk up.
fn queues_that_are_tampered_with() -> Result<()> {
    let mut stage = Stage::set(&[("used-jump", ""), ("used-back", ""), ("head-twice", ""), ("head-unknown", "")])?;
    stage.raise_the_curtain()?;
    // Linux gives a queue up for good whose used ring makes no sense: nothing more is asked of some of them.
    stage.watch("every disk was replaced", |device| device.restarts >= 1 && device.state == "up")?;
    let found = stage.stop()?;
    ensure!(found.faults.is_clean() && found.io_errors == 0, "the honest disk: {found:?}");
    tell(&control::status(NAME)?);
    stage.vm.signal(nix::sys::signal::Signal::SIGTERM)?;
    stage.vm.wait(BOOT).map(drop)
}
