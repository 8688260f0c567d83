//! `ozone jail` from an ordinary user: as root these tests drop to one.

use std::fs;
use std::os::unix::process::CommandExt;

use libtest_mimic::Failed;
use nix::sys::signal::Signal;
use nix::unistd::Uid;

use crate::Test;
use crate::closest::{closest, confined};
use crate::support::{ORDINARY, Place, leak, namespace, refused, status, text};

pub const TESTS: &[Test] = &[
    ("an ordinary user's program is as confined", false, as_confined),
    ("an ordinary user's sources are read-only", false, sources),
    ("what takes root is refused to an ordinary user with the reason", false, refusals),
    ("an ordinary user's jail ends and is removed as any", false, ends),
    ("an ordinary user's gc removes all that killed jails left, and nothing that runs", false, collected),
];

fn user() -> u32 {
    if Uid::effective().is_root() { ORDINARY } else { Uid::effective().as_raw() }
}

fn as_confined() -> Result<(), Failed> {
    let place = Place::of_ordinary_user();
    let _leaked = leak();
    let running = place.waiting(&[], &["look", "calls"])?;
    closest(&running.said);
    let id = user();
    assert_eq!(running.said.get("uid"), format!("{id} {id} {id}"));
    assert_eq!(status(running.program, "Uid"), format!("{id} {id} {id} {id}"));
    for pid in [running.program, running.first] {
        confined(pid);
        assert_ne!(namespace(pid, "user"), namespace(std::process::id().cast_signed(), "user"));
    }
    assert_eq!(running.said.get("call unshare user"), "EPERM");
    let map = fs::read_to_string(format!("/proc/{}/uid_map", running.program))?;
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), [id.to_string(), id.to_string(), "1".to_owned()]);
    Ok(())
}

fn sources() -> Result<(), Failed> {
    let place = Place::of_ordinary_user();
    let directory = place.make_directory("directory", 0o755, user());
    place.make_file("directory/file", "content", 0o644, user());
    let words = ["read", "/d/file", "write", "/d/file"];
    let said = place.said(&["--source", &format!("{directory}:/d")], &words)?;
    assert_eq!((said.get("read /d/file"), said.get("write /d/file")), ("content", "EROFS"));
    let said = place.said(&["--source", &format!("{directory}:/d:rw")], &words)?;
    assert_eq!(said.get("write /d/file"), "allowed");
    let said = place.said(&["--source", "/dev/null:dev,rw"], &["write", "/dev/null"])?;
    assert_eq!(said.get("write /dev/null"), "allowed");
    Ok(())
}

fn refusals() -> Result<(), Failed> {
    let place = Place::of_ordinary_user();
    for (options, code, words) in [
        (&["--uid", "7"][..], 3, &["--uid 7", "its own uid only", "run ozone as root"][..]),
        (&["--gid", "7"], 3, &["--gid 7", "its own gid only", "run ozone as root"]),
        (&["--netns", "/proc/self/ns/net"], 3, &["--netns", "joins no network namespace"]),
        (&["--capability", "CAP_NET_RAW"], 3, &["--capability CAP_NET_RAW", "no capabilities to keep"]),
        (&["--cgroup", "pids.max=5"], 3, &["--cgroup pids.max=5"]),
        (&["--uid", "0"], 2, &["--uid 0", "--allow-root"]),
    ] {
        place.refused(options, code, words)?;
    }
    // Its own executable, which it could write.
    let program = place.make_file("own", "#!/probe\n", 0o755, user());
    let id = user().to_string();
    let words = ["--name", place.name(), "--exec-file", &program, "--uid", &id, "--gid", &id];
    refused(&place.ozone(&words).output()?, 2, &["could change itself", "chmod a-w"])?;
    let output = place.jail(&[], &["nothing"]).env_remove("XDG_RUNTIME_DIR").output()?;
    refused(&output, 3, &["XDG_RUNTIME_DIR is not set"])
}

fn collected() -> Result<(), Failed> {
    let place = Place::of_ordinary_user();
    place.waiting(&[], &[])?.kill()?;
    assert!(place.record().exists());
    let said = place.gc(&[])?;
    assert!(said.starts_with(&format!("jail {}: removed ", place.name())), "{said}");
    for _ in 0..2 {
        assert_eq!(fs::read_dir(place.path("runtime"))?.count(), 0);
        assert_eq!(place.gc(&[])?, "");
    }
    let mut running = place.waiting(&[], &[])?;
    assert_eq!(place.gc(&[])?, "");
    let pid = fs::read_to_string(place.record().join("pid"))?;
    assert_eq!(pid, format!("{}\n", running.first));
    running.signal(Signal::SIGTERM)?;
    assert_eq!(running.ends()?.code(), Some(128 + 15));
    Ok(())
}

fn ends() -> Result<(), Failed> {
    let place = Place::of_ordinary_user();
    let mut running = place.waiting(&[], &[])?;
    running.signal(Signal::SIGTERM)?;
    assert_eq!(running.ends()?.code(), Some(128 + 15));
    place.nothing_left()?;
    let mut running = place.waiting(&[], &[])?;
    running.ozone.kill()?;
    running.ends()?;
    assert!(place.record().exists());
    for _ in 0..2 {
        let output = place.ozone(&["--clean-resource", "--name", place.name()]).output()?;
        assert!(output.status.success(), "{}", text(&output.stderr));
        place.nothing_left()?;
    }
    let mut command = place.jail(&[], &["exit", "9"]);
    command.arg0("ozone");
    assert_eq!(command.output()?.status.code(), Some(9));
    Ok(())
}
