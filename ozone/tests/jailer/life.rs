//! A jail from its beginning to its end, however that comes.

use std::fs;
use std::path::Path;

use libtest_mimic::Failed;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Test;
use crate::support::{Place, apart, child_of, descriptors, is_alive, refused, status, text, until, without_cgroups};

pub const TESTS: &[Test] = &[
    ("the program's exit status is ozone's", true, exit_status),
    ("signals are passed on to a program that does not handle them", true, signals),
    ("what a program leaves behind ends with it", true, left_behind),
    ("a name is taken once", true, taken),
    ("--daemonize returns when the program runs, and someone cleans up", true, daemonize),
    ("--daemonize that fails says why", true, daemonize_fails),
    ("everything ends with a killed ozone, and --clean-resource removes the rest", true, killed),
    ("gc removes what a killed ozone left of a jail, and no jail that runs", true, collected),
    #[cfg(feature = "crash-points")]
    ("gc and --clean-resource undo what a kill at each step leaves", false, each_step),
    ("--clean-resource and gc remove nothing through a mount", true, covered),
    ("the next jail of a name takes over what a killed one left", true, taken_over),
    ("ozone itself keeps little", true, ozone_itself),
];

fn exit_status() -> Result<(), Failed> {
    let place = Place::new();
    for code in [0, 1, 3, 77, 255] {
        let output = place.jail(&[], &["exit", &code.to_string()]).output()?;
        assert_eq!((output.status.code(), without_cgroups(&output.stderr).as_str()), (Some(code), ""), "{output:?}");
    }
    let output = place.jail(&[], &["abort"]).output()?;
    assert_eq!(output.status.code(), Some(128 + 6), "{output:?}");
    assert!(text(&output.stderr).contains(&format!("{} was ended by SIGABRT", place.name())), "{output:?}");
    place.nothing_left()
}

fn signals() -> Result<(), Failed> {
    let place = Place::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        let mut running = place.waiting(&[], &[])?;
        running.signal(signal)?;
        assert_eq!(running.ends()?.code(), Some(128 + signal as i32), "{signal}");
        assert!(!is_alive(running.first) && !is_alive(running.program));
    }
    // One that the program sends to the first process stays there: it is of the same user.
    let mut running = place.waiting(&[], &[])?;
    kill(Pid::from_raw(running.program), Signal::SIGKILL)?;
    assert_eq!(running.ends()?.code(), Some(128 + 9));
    let mut running = place.waiting(&[], &[])?;
    kill(Pid::from_raw(running.first), Signal::SIGTERM)?;
    assert_eq!(running.ends()?.code(), Some(128 + 15), "the recorded process id takes signals too");
    place.nothing_left()
}

fn left_behind() -> Result<(), Failed> {
    let place = Place::new();
    let mut running = place.waiting(&[], &["leave"])?;
    assert_eq!(running.said.get("left"), "allowed");
    let left = until("the process that is left", || child_of(running.program))?;
    running.signal(Signal::SIGTERM)?;
    running.ends()?;
    assert!(!is_alive(left), "process {left} has outlived its jail");
    Ok(())
}

fn taken() -> Result<(), Failed> {
    let place = Place::new();
    let running = place.waiting(&[], &[])?;
    refused(&place.jail(&[], &["nothing"]).output()?, 2, &["--name", place.name(), "is running"])?;
    refused(&place.ozone(&["--clean-resource", "--name", place.name()]).output()?, 2, &["is running"])?;
    assert!(is_alive(running.program));
    Ok(())
}

fn daemonize() -> Result<(), Failed> {
    let place = Place::new();
    let _leaked = crate::support::leak();
    let output = place.jail(&["--daemonize"], &["sleep"]).output()?;
    assert!(output.status.success() && without_cgroups(&output.stderr).is_empty(), "{output:?}");
    let first: i32 = text(&output.stdout).trim().parse()?;
    assert_eq!(fs::read_to_string(place.record().join("pid"))?, format!("{first}\n"));
    let program = child_of(first).ok_or("no program")?;
    assert_eq!(descriptors(program), ["0 /dev/null", "1 /dev/null", "2 /dev/null"]);
    // Who waits for it holds nothing of its caller's.
    let ozone: i32 = status(first, "PPid").parse()?;
    assert!(!descriptors(ozone).iter().any(|it| it.contains("passwd")), "{:?}", descriptors(ozone));
    assert_eq!(fs::read_link(format!("/proc/{ozone}/cwd"))?, Path::new("/"));
    kill(Pid::from_raw(first), Signal::SIGTERM)?;
    until("the jail's end", || (!place.record().exists() && !is_alive(ozone)).then_some(()))?;
    assert!(!is_alive(program));
    place.nothing_left()
}

fn daemonize_fails() -> Result<(), Failed> {
    let place = Place::new();
    let nonsense = place.make_file("nonsense", "nothing", 0o555, 0);
    let words = ["--name", place.name(), "--exec-file", &nonsense, "--uid", "7", "--gid", "7", "--daemonize"];
    let output = place.ozone(&words).output()?;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty() && text(&output.stderr).contains("execute /nonsense"), "{output:?}");
    place.nothing_left()
}

fn killed() -> Result<(), Failed> {
    let place = Place::new();
    place.waiting(&[], &[])?.kill()?;
    assert!(place.record().exists());
    for _ in 0..2 {
        let output = place.ozone(&["--clean-resource", "--name", place.name()]).output()?;
        assert!(output.status.success() && output.stderr.is_empty() && output.stdout.is_empty(), "{output:?}");
        place.nothing_left()?;
    }
    // With all that the jail was started with, as other jailers want it.
    assert!(place.jail(&["--clean-resource"], &[]).output()?.status.success());
    Ok(())
}

fn collected() -> Result<(), Failed> {
    // By their names only: those of other tests are in the same directory.
    let (place, other) = (Place::new(), Place::new());
    let running = other.waiting(&[], &[])?;
    place.waiting(&[], &[])?.kill()?;
    let record = place.record();
    assert!(record.exists());
    let removed = format!("jail {}: removed directory {}\n", place.name(), record.display());
    assert_eq!(place.gc(&[place.name()])?, removed);
    place.nothing_left()?;
    assert_eq!(place.gc(&[place.name()])?, "", "there is nothing left");

    // A name that is asked for and runs is refused; what is removed besides is told.
    place.waiting(&[], &[])?.kill()?;
    let output = place.command(&["gc", other.name(), place.name()]).output()?;
    refused(&output, 2, &[&format!("jail '{}': it is running", other.name())])?;
    assert_eq!(text(&output.stdout), removed);
    place.nothing_left()?;
    assert!(is_alive(running.program) && other.record().join("pid").exists());

    // What cannot be removed is told with the reason, as often as it is tried.
    place.waiting(&[], &[])?.kill()?;
    fs::write(record.join("of-the-user"), "")?;
    for _ in 0..2 {
        let output = place.command(&["gc", "--json", place.name()]).output()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(output.status.code(), Some(1), "{report}");
        let jail = &report["jails"][0];
        assert!(jail["name"] == place.name() && jail["running"] == false, "{report}");
        assert!(jail["left"][0]["reason"].as_str().is_some_and(|it| it.contains("Directory not empty")), "{report}");
    }
    refused(&place.command(&["gc", place.name()]).output()?, 1, &["jail ", "is not removed", "Directory not empty"])?;
    fs::remove_file(record.join("of-the-user"))?;
    place.gc(&[place.name()])?;
    place.nothing_left()
}

/// An `ozone` with the feature `crash-points` kills itself at the n-th step, until one comes to its end.
#[cfg(feature = "crash-points")]
fn each_step() -> Result<(), Failed> {
    use std::os::unix::process::ExitStatusExt;

    let place = Place::of_ordinary_user();
    let mut points = Vec::new();
    for step in 1..1000 {
        let run = || place.jail(&[], &["nothing"]).env("OZONE_CRASH_POINT", step.to_string()).output();
        let output = run()?;
        if output.status.success() {
            break;
        }
        let errors = text(&output.stderr);
        let point = errors.lines().find_map(|line| line.split_once("crash point: ")).ok_or(errors.clone())?.1;
        assert_eq!(output.status.signal(), Some(9), "{errors}");
        for _ in 0..2 {
            let said = place.gc(&[])?;
            assert_eq!(fs::read_dir(place.path("runtime"))?.count(), 0, "{step}, {point}: gc said {said}");
        }
        assert_eq!(run()?.status.signal(), Some(9), "{point}");
        for _ in 0..2 {
            let output = place.ozone(&["--clean-resource", "--name", place.name()]).output()?;
            assert!(output.status.success() && output.stderr.is_empty(), "{step}, {point}: {output:?}");
            assert_eq!(fs::read_dir(place.path("runtime"))?.count(), 0, "{step}, {point}");
        }
        points.push(point.to_owned());
    }
    for kind in
        [" made", "lock taken", "pid begun", "pid written", "cloned", "runs", "has ended", "pid forgotten", "removed"]
    {
        assert!(points.iter().any(|point| point.contains(kind)), "no step is about '{kind}': {points:#?}");
    }
    assert!(points.len() < 999, "{points:#?}");
    Ok(())
}

fn covered() -> Result<(), Failed> {
    apart(CloneFlags::CLONE_NEWNS, || {
        let place = Place::new();
        let mut running = place.waiting(&[], &[])?;
        running.ozone.kill()?;
        running.ends()?;
        let precious = place.make_directory("precious", 0o700, 0);
        for name in ["undo.json", "pid", "unfinished", "other"] {
            place.make_file(&format!("precious/{name}"), "kept", 0o600, 0);
        }
        let none = None::<&str>;
        mount(Some(precious.as_str()), &place.record(), none, MsFlags::MS_BIND, none)?;
        let output = place.ozone(&["--clean-resource", "--name", place.name()]).output()?;
        refused(&output, 3, &["something is mounted on it", "nothing was removed"])?;
        assert_eq!(fs::read_dir(&precious)?.count(), 4);
        refused(&place.jail(&[], &["nothing"]).output()?, 3, &["something is mounted on it"])?;
        refused(&place.command(&["gc", place.name()]).output()?, 1, &["is not removed", "something is mounted on it"])?;
        umount2(&place.record(), MntFlags::MNT_DETACH)?;
        assert_eq!(fs::read_dir(&precious)?.count(), 4);
        assert!(place.ozone(&["--clean-resource", "--name", place.name()]).output()?.status.success());
        place.nothing_left()
    })
}

fn taken_over() -> Result<(), Failed> {
    let place = Place::new();
    let mut running = place.waiting(&[], &[])?;
    running.ozone.kill()?;
    running.ends()?;
    place.said(&[], &["nothing"])?;
    place.nothing_left()
}

fn ozone_itself() -> Result<(), Failed> {
    let place = Place::new();
    let running = place.waiting(&[], &[])?;
    let ozone = running.ozone.id().cast_signed();
    // CAP_DAC_OVERRIDE and CAP_KILL are 1 and 5 (linux/capability.h).
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(ozone, set), "0000000000000022", "{set}");
    }
    assert_eq!(status(ozone, "NoNewPrivs"), "1");
    Ok(())
}
