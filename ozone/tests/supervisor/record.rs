//! The record of how a run ended, for every way of ending that can be brought about with scripted processes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};

use libtest_mimic::Failed;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::{Bench, Lines, pid_of, unique};

const STATUS: [&str; 2] = ["--status-file", "status.json"];

fn record(bench: &Bench) -> Value {
    let text = fs::read_to_string(bench.path("status.json")).expect("a record");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

pub fn endings() -> Result<(), Failed> {
    let forbidden = json!({ "number": 41, "name": "socket" });
    let none = Value::Null;
    let stop = "path=disk.img,on-fail=stop-vm,id=";
    let table: [(&str, &str, i32, &str, Value, Value, Value); 14] = [
        ("power-off", "", 0, "power-off", none.clone(), none.clone(), none.clone()),
        ("reset", "", 0, "reboot", none.clone(), none.clone(), none.clone()),
        ("panic", "", 10, "panic", none.clone(), none.clone(), none.clone()),
        ("triple-fault", "", 11, "triple-fault", none.clone(), none.clone(), none.clone()),
        ("die", "", 12, "core-died", json!("core"), none.clone(), none.clone()),
        ("forbidden", "", 12, "forbidden-syscall", json!("core"), json!("SIGSYS"), forbidden.clone()),
        ("forbidden-unsaid", "", 12, "forbidden-syscall", json!("core"), json!("SIGSYS"), none.clone()),
        ("lie", "", 12, "core-died", json!("core"), none.clone(), none.clone()),
        ("wait", "offender", 13, "forbidden-syscall", json!("blk/offender"), json!("SIGSYS"), forbidden),
        ("wait", "mortal", 13, "backend-died", json!("blk/mortal"), none.clone(), none.clone()),
        ("lost-after-hanging-up", "follower", 13, "backend-died", json!("blk/follower"), none.clone(), none.clone()),
        ("wait", "faulty", 3, "host-error", none.clone(), none.clone(), none.clone()),
        ("bad-image", "", 2, "input-error", none.clone(), none.clone(), none.clone()),
        ("running-early", "disk0", 4, "internal-error", none.clone(), none.clone(), none),
    ];
    for (script, device, code, cause, process, signal, call) in table {
        let bench = Bench::new(script);
        let disk = format!("{stop}{device}");
        let mut words = [&STATUS[..], &["--no-reboot"]].concat();
        if !device.is_empty() {
            words.extend(["--disk", &disk]);
        }
        let (got, lines) = bench.run(&words);
        let record = record(&bench);
        assert_eq!((got, &record["exit-code"]), (code, &json!(code)), "{script} {device}: {lines:?} {record:#}");
        assert_eq!(record["cause"], cause, "{script} {device}: {record:#}");
        assert_eq!((&record["process"], &record["signal"]), (&process, &signal), "{script} {device}: {record:#}");
        assert_eq!(record["system-call"], call, "{script} {device}: {record:#}");
        // The last line is the record's too.
        let message = record["message"].as_str().unwrap();
        assert_eq!(lines.last().unwrap(), &format!("ozone: {message}"), "{script} {device}");
        assert_eq!(record["version"], 1);
        assert!(record["started"].as_str() <= record["ended"].as_str(), "{record:#}");
        assert!(record["memory"]["peak-bytes"].as_u64() > Some(1 << 16), "{record:#}");
        let mode = fs::metadata(bench.path("status.json"))?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // And in words, if the guest has run. A backend can die before that.
        let ran = lines.iter().any(|line| line.starts_with("ozone: ran for "));
        assert!(ran == (code == 0 || code > 4) || code == 13, "{script} {device}: {lines:?}");
    }
    Ok(())
}

pub fn counts() -> Result<(), Failed> {
    let bench = Bench::new("reset");
    let name = unique(&bench);
    let words = [&STATUS[..], &["--name", &name, "--disk", "path=disk.img"]].concat();
    let mut run = bench.start(&words);
    let mut lines = BufReader::new(run.child.stderr.take().unwrap());
    let mut resets = 0;
    let mut line = String::new();
    while resets < 3 {
        line.clear();
        assert!(lines.read_line(&mut line)? > 0, "ozone ended after {resets} resets");
        resets += u64::from(line.contains("the guest reset itself"));
    }
    bench.script("wait");
    run.child.stderr = Some(lines.into_inner());
    let mut lines = Lines::of(&mut run);
    for _ in 0..2 {
        // A guest that still resets itself has other processes a moment later.
        let mut children = run.children(3);
        while run.children(3) != children {
            children = run.children(3);
        }
        kill(pid_of(&children, "blk/disk0"), Signal::SIGKILL)?;
        lines.expect("back after");
    }
    kill(run.pid(), Signal::SIGTERM)?;
    let said = lines.expect("ran for");
    assert!(said.contains("restarts: blk/disk0 2") && said.contains("guest resets: "), "{said}");
    assert_eq!(run.child.wait()?.code(), Some(143));
    let record = record(&bench);
    assert_eq!((&record["cause"], &record["signal"]), (&json!("signal"), &json!("SIGTERM")), "{record:#}");
    assert!(record["guest-resets"].as_u64() >= Some(3), "{record:#}");
    let disk = &record["devices"][0];
    let away = disk["away-ms"].clone();
    let expected = json!({ "id": "disk0", "kind": "blk", "restarts": 2, "reexecuted": 0, "away-ms": away,
        "causes": [{ "cause": "killed by SIGKILL", "count": 2 }] });
    assert_eq!(disk, &expected, "{record:#}");
    Ok(())
}

/// A start that does not get its name writes to no file of the machine that has it.
pub fn taken() -> Result<(), Failed> {
    let bench = Bench::new("wait");
    let name = unique(&bench);
    let words = [&STATUS[..], &["--name", &name, "--boot-trace", "trace.json"]].concat();
    fs::write(bench.path("status.json"), "earlier")?;
    fs::write(bench.path("web1.json"), json!({ "version": 1, "name": name, "memory": { "size": "0" } }).to_string())?;
    fs::write(bench.path("broken.json"), "{")?;
    let first = bench.start(&words);
    first.children(2);
    fs::write(bench.path("trace.json"), "not yet")?;
    let of_file = |file| [&STATUS[..], &["--spec", file]].concat();
    for (words, problem) in [
        (words.clone(), "a machine of this name is running"),
        ([&words[..], &["--memory", "0"]].concat(), "--memory 0"),
        (of_file("web1.json"), "memory"),
        // Whose it is cannot be told.
        (of_file("broken.json"), "broken.json"),
    ] {
        let (code, lines) = bench.run(&words);
        assert!(code == 2 && lines.last().unwrap().contains(problem), "{lines:?}");
        assert_eq!(fs::read_to_string(bench.path("status.json"))?, "earlier", "{words:?}");
        assert_eq!(fs::read_to_string(bench.path("trace.json"))?, "not yet", "{words:?}");
    }
    let pid = first.pid();
    kill(pid, Signal::SIGTERM)?;
    assert_eq!(first.end().0, 143);
    assert_eq!((&record(&bench)["cause"], &record(&bench)["pid"]), (&json!("signal"), &json!(pid.as_raw())));
    // When nobody has the name, a start that fails is the last that there was of it.
    for words in [
        of_file("web1.json"),
        [&words[..], &["--memory", "0"]].concat(),
        [&words[..], &["--disk", "path=none"]].concat(),
    ] {
        fs::remove_file(bench.path("status.json"))?;
        assert_eq!(bench.run(&words).0, 2, "{words:?}");
        assert_eq!(record(&bench)["cause"], "input-error", "{words:?}");
    }
    Ok(())
}

/// Whatever has the name is replaced; nothing that it leads to is touched.
pub fn planted() -> Result<(), Failed> {
    let bench = Bench::new("power-off");
    fs::write(bench.path("mine"), "mine")?;
    symlink("mine", bench.path("status.json"))?;
    assert_eq!(bench.run(&STATUS).0, 0);
    assert_eq!(fs::read_to_string(bench.path("mine"))?, "mine");
    assert!(fs::symlink_metadata(bench.path("status.json"))?.is_file());
    assert_eq!(record(&bench)["cause"], "power-off");
    // What was asked for cannot be, and that is an end as well.
    let (code, lines) = bench.run(&[&STATUS[..], &["--memory", "0"]].concat());
    assert_eq!((code, &record(&bench)["cause"]), (2, &json!("input-error")), "{lines:?}");
    let (code, lines) = bench.run(&["--status-file", "no/such/file"]);
    assert_eq!(code, 2, "{lines:?}");
    assert_eq!(lines, ["ozone: --status-file no/such/file: No such file or directory"]);
    Ok(())
}
