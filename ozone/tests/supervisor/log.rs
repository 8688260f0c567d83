//! Lines on standard error: their form, and that nobody waits for whoever reads them.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{FlowArg, tcflow};
use nix::unistd::pipe;
use serde_json::Value;

use super::{Bench, ORDINARY, Run, ask, pid_of, unique};

const PATIENCE: Duration = Duration::from_secs(20);

/// The lines of a run that ends by itself, each of which has to be an object with the keys of a line and no others.
fn objects(lines: &[String]) -> Vec<Value> {
    let object = |line: &String| {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let keys: Vec<&String> = value.as_object().unwrap_or_else(|| panic!("{line}")).keys().collect();
        assert_eq!(keys, ["level", "message", "pid", "role", "time", "vm"], "{line}");
        let time = value["time"].as_str().unwrap();
        assert!(time.len() == 27 && time.as_bytes()[10] == b'T' && time.ends_with('Z'), "{line}");
        value
    };
    lines.iter().map(object).collect()
}

pub fn json() -> Result<(), Failed> {
    let bench = Bench::new("flood");
    let (code, lines) = bench.run(&["--log-format", "json"]);
    assert_eq!(code, 0, "{lines:?}");
    let objects = objects(&lines);
    let noise: Vec<_> = objects.iter().filter(|line| line["message"] == "noise").collect();
    assert!((100..2000).contains(&noise.len()), "{} lines got through", noise.len());
    // What a process says without a level is worth a warning.
    assert!(noise.iter().all(|line| line["role"] == "core" && line["level"] == "warn"), "{noise:?}");
    let lost = objects.iter().find(|line| line["message"].as_str().unwrap().contains("lines were lost: too many"));
    assert!(lost.is_some_and(|line| line["role"] == "core" && line["level"] == "warn"), "{lost:?}");
    let last = objects.last().unwrap();
    assert_eq!((&last["role"], &last["level"]), (&Value::from("ozone"), &Value::from("info")));
    assert_eq!(last["message"], "the guest switched itself off");
    assert_eq!(last["vm"], format!("vm-{}", last["pid"]));

    // The form holds for what is wrong with the description as well, and the file can ask for it.
    let (code, lines) = bench.run(&["--log-format", "json", "--memory", "0"]);
    let objects = self::objects(&lines);
    assert_eq!((code, objects.len(), &objects[0]["level"]), (2, 1, &Value::from("error")));
    bench.script("panic");
    std::fs::write(
        bench.path("vm.json"),
        r#"{"version": 1, "kernel": "kernel", "name": "web1", "log-format": "json"}"#,
    )?;
    let (code, lines) = bench.run(&["--spec", "vm.json"]);
    let objects = self::objects(&lines);
    let last = objects.last().unwrap();
    assert_eq!((code, &last["vm"], &last["level"]), (10, &Value::from("web1"), &Value::from("error")));
    Ok(())
}

pub fn flooding_role() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let words = ["--log-format", "json", "--name", &name, "--disk", "path=disk.img,id=noisy"];
    let mut run = bench.start(&words);
    let children = run.children(3);
    let (noise, heard) = std::sync::mpsc::channel();
    let errors = run.child.stderr.take().unwrap();
    // Read all the time, or it would be the reader that blocks.
    let reader = std::thread::spawn(move || {
        BufReader::new(errors).lines().map_while(Result::ok).for_each(|line| drop(noise.send(line)));
    });
    let mut seen = Vec::new();
    let mut expect = |part: &str| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = heard.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            seen.push(line.unwrap_or_else(|_| panic!("no '{part}' within {PATIENCE:?}")));
            if seen.last().unwrap().contains(part) {
                return;
            }
        }
    };
    expect("lines were lost: too many at once");
    assert_eq!(ask(&bench, &["status", &name]).0, 0);
    kill(pid_of(&children, "console/console"), Signal::SIGKILL)?;
    expect("[console/console0] back after");
    assert_eq!(ask(&bench, &["restart", &name, "console0"]).0, 0);
    expect("lines were lost: too many at once");
    kill(run.pid(), Signal::SIGTERM)?;
    expect("ended by SIGTERM");
    run.child.wait()?;
    reader.join().unwrap();
    let noisy =
        |line: &Value| line["role"] == "blk/noisy" && line["message"] == "\"noise\" {}" && line["level"] == "warn";
    assert!(objects(&seen).iter().any(noisy), "{seen:?}");
    Ok(())
}

/// Writes until there is no room at all.
fn fill(end: &OwnedFd) {
    let flags = OFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFL).unwrap());
    fcntl(end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    let mut file = File::from(end.try_clone().unwrap());
    for block in [4096, 64, 1] {
        while file.write(&b"x".repeat(block)).is_ok() {}
    }
    fcntl(end, FcntlArg::F_SETFL(flags)).unwrap();
}

/// Reads until `part` has come.
fn read_until(end: &OwnedFd, part: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    let mut file = File::from(end.try_clone().unwrap());
    let mut text = String::new();
    while !text.contains(part) {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap();
        let ready = poll(&mut [PollFd::new(end.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
        let text_so_far = text.trim_start_matches('x');
        assert!(ready > 0, "no '{part}' within {PATIENCE:?}: {text_so_far}");
        let mut block = [0; 4096];
        let length = file.read(&mut block).unwrap_or(0);
        assert!(length > 0, "it ended without '{part}': {text_so_far}");
        text.push_str(&String::from_utf8_lossy(&block[..length]));
    }
    text
}

/// Nobody reads standard error, and there is no room in it from the beginning: everything else goes on. When it is read at
/// last, after `release`, what was lost is said, though nothing else happens then.
fn nobody_reads(mut command: Command, bench: &Bench, name: &str, ours: &OwnedFd, theirs: OwnedFd, release: impl Fn()) {
    command.stderr(Stdio::from(theirs));
    let mut run = Run { child: command.spawn().unwrap() };
    drop(command);
    let mut children = run.children(3);
    for _ in 0..3 {
        kill(pid_of(&children, "blk/disk0"), Signal::SIGKILL).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let killed = pid_of(&children, "blk/disk0");
        while pid_of(&children, "blk/disk0") == killed {
            assert!(Instant::now() < deadline, "a process is not replaced while standard error is full");
            children = run.children(3);
        }
        if let Some(name) = Some(name).filter(|name| !name.is_empty()) {
            assert_eq!(ask(bench, &["restart", name, "console0"]).0, 0);
            assert_eq!(ask(bench, &["pause", name]).0, 0);
            assert_eq!(ask(bench, &["resume", name]).0, 0);
            children = run.children(3);
        }
    }
    release();
    let text = read_until(ours, "lines were lost: standard error was not read");
    let lost = text.split("ozone: ").find(|line| line.contains("lines were lost")).unwrap_or_default();
    let count: u64 = lost.split(' ').next().unwrap_or_default().parse().unwrap_or(0);
    assert!(count >= 3, "{lost}");
    fill_is_over(ours);
    kill(run.pid(), Signal::SIGTERM).unwrap();
    read_until(ours, "ended by SIGTERM");
    assert_eq!(run.child.wait().unwrap().code(), Some(143));
}

/// What was written before is read.
fn fill_is_over(end: &OwnedFd) {
    let mut file = File::from(end.try_clone().unwrap());
    while poll(&mut [PollFd::new(end.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1) {
        assert!(file.read(&mut [0; 4096]).unwrap() > 0);
    }
}

/// A machine with a disk and this name.
fn machine(bench: &Bench, name: &str) -> Command {
    bench.command(&["--name", name, "--disk", "path=disk.img"])
}

pub fn full_pipe() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let (ours, theirs) = pipe()?;
    fill(&theirs);
    nobody_reads(machine(&bench, &name), &bench, &name, &ours, theirs, || {});
    Ok(())
}

pub fn stopped_terminal() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let pty = openpty(None, None)?;
    let theirs = pty.slave.try_clone()?;
    // As Ctrl-S does (termios(3)).
    tcflow(&pty.slave, FlowArg::TCOOFF)?;
    let release = || tcflow(&pty.slave, FlowArg::TCOON).unwrap();
    nobody_reads(machine(&bench, &name), &bench, &name, &pty.master, theirs, release);
    Ok(())
}

pub fn full_socket() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let (ours, theirs) = UnixStream::pair()?;
    let (ours, theirs) = (ours.into(), theirs.into());
    fill(&theirs);
    nobody_reads(machine(&bench, &name), &bench, &name, &ours, theirs, || {});
    Ok(())
}

/// After 'su' and its like the pipe belongs to another user and cannot be opened anew.
pub fn pipe_of_another() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    std::os::unix::fs::chown(bench.path("disk.img"), Some(ORDINARY), Some(ORDINARY))?;
    let (ours, theirs) = pipe()?;
    fill(&theirs);
    let command = bench.command_in("kvm-for-all", &["--disk", "path=disk.img"]);
    nobody_reads(command, &bench, "", &ours, theirs, || {});
    Ok(())
}
