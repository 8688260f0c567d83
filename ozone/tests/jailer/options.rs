//! One test for each option that changes what the jail is.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use libtest_mimic::Failed;
use nix::sched::CloneFlags;

use crate::Test;
use crate::support::{Place, namespace, refused, status, text};

pub const TESTS: &[Test] = &[
    ("--name that would be a path is refused", true, names),
    ("--uid and --gid take every number but root's", true, ids),
    ("--exec-file that its user can write is refused", true, writable_program),
    ("--exec-file is neither copied nor followed later", true, program_by_a_link),
    ("--exec-file with an interpreter needs it", true, interpreter),
    ("--netns is joined, and nothing else is", true, network),
    ("--capability is in all sets, and no other is", true, capability),
    ("--resource-limit is soft and hard", true, resource_limit),
    ("--env is the environment", true, environment),
    ("--seccomp takes a file", true, filter_file),
    ("--cgroup is refused on a host with cgroup v1", true, first_version),
    ("--help has every option", false, help),
];

fn names() -> Result<(), Failed> {
    let place = Place::new();
    let program = place.text("probe");
    let long = "a".repeat(256);
    for name in ["", "a/b", "..", "../../tmp/x", "/", "a\nb", "a\tb", &long] {
        let words = ["--name", name, "--exec-file", &program, "--uid", "7", "--gid", "7"];
        refused(&place.ozone(&words).output()?, 2, &["--name", "a name is 1 to 64"])?;
        let clean = place.ozone(&["--clean-resource", "--name", name]).output()?;
        refused(&clean, 2, &["--name", "a name is 1 to 64"])?;
        let made = Path::new("/run/ozone/jails").join(name);
        assert!(name.is_empty() || name.starts_with(['.', '/']) || !made.exists(), "{name:?} was made");
    }
    assert!(!Path::new("/tmp/x/undo.json").exists());
    Ok(())
}

fn ids() -> Result<(), Failed> {
    let place = Place::new();
    for (options, words) in [
        (["--uid", "0"], ["--uid 0", "--allow-root"]),
        (["--gid", "0"], ["--gid 0", "--allow-root"]),
        (["--uid", "4294967295"], ["--uid 4294967295", "no user"]),
        (["--gid", "-1"], ["--gid -1", "not a number"]),
    ] {
        place.refused(&options, 2, &words)?;
    }
    let said = place.said(&["--uid", "4294967294", "--gid", "65536"], &["look"])?;
    assert_eq!((said.get("uid"), said.get("gid")), ("4294967294 4294967294 4294967294", "65536 65536 65536"));
    let running = place.waiting(&["--uid", "0", "--gid", "0", "--allow-root"], &["look"])?;
    assert_eq!(running.said.get("uid"), "0 0 0");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(running.program, set), "0000000000000000", "{set}");
    }
    Ok(())
}

fn writable_program() -> Result<(), Failed> {
    let place = Place::new();
    let probe = fs::read(place.path("probe"))?;
    let program = |name: &str, mode, owner| {
        fs::create_dir(place.path(name)).unwrap();
        place.make_file(&format!("{name}/probe"), &probe, mode, owner)
    };
    for (path, remedy) in [
        (program("owned", 0o555, 7), "another owner"),
        (program("everyone", 0o757, 0), "chmod o-w"),
        (program("group", 0o575, 7), "another owner"),
    ] {
        let words = ["--name", place.name(), "--exec-file", &path, "--uid", "7", "--gid", "7"];
        refused(&place.ozone(&words).output()?, 2, &["--exec-file", "the program could change itself", remedy])?;
    }
    let path = program("shared", 0o775, 8);
    let words = ["--name", place.name(), "--exec-file", &path, "--uid", "7", "--gid", "8"];
    refused(&place.ozone(&words).output()?, 2, &["gid 8 can write it", "chmod g-w"])?;
    let words = ["--name", place.name(), "--exec-file", &path, "--uid", "7", "--gid", "7", "--", "exit", "3"];
    assert_eq!(place.ozone(&words).output()?.status.code(), Some(3));
    let private = program("private", 0o700, 0);
    let words = ["--name", place.name(), "--exec-file", &private, "--uid", "7", "--gid", "7"];
    refused(&place.ozone(&words).output()?, 2, &["uid 7 may not execute it"])?;
    for (path, problem) in [(place.text("none"), "No such file"), (place.text("."), "it is no file")] {
        let words = ["--name", place.name(), "--exec-file", &path, "--uid", "7", "--gid", "7"];
        refused(&place.ozone(&words).output()?, 2, &["--exec-file", problem])?;
    }
    Ok(())
}

fn program_by_a_link() -> Result<(), Failed> {
    let place = Place::new();
    fs::create_dir(place.path("real"))?;
    fs::rename(place.path("probe"), place.path("real/program"))?;
    symlink("real/program", place.path("probe"))?;
    let before = fs::read_dir(place.path(""))?.count();
    let running = place.waiting(&[], &["look"])?;
    assert_eq!(running.said.get("list /"), "probe");
    // It is the operator's file itself: nothing was copied.
    let (theirs, ours) = (format!("/proc/{}/exe", running.program), place.path("real/program"));
    use std::os::unix::fs::MetadataExt;
    let id = |path: &std::path::Path| fs::metadata(path).map(|it| (it.dev(), it.ino()));
    assert_eq!(id(theirs.as_ref())?, id(&ours)?);
    assert_eq!(fs::read_dir(place.path(""))?.count(), before);
    Ok(())
}

fn interpreter() -> Result<(), Failed> {
    let place = Place::new();
    let user = ["--uid", "7", "--gid", "7"];
    let run = |program: &str, options: &[&str], arguments: &[&str]| {
        let name = place.name().to_owned();
        let words = [&["--name", &name, "--exec-file", program], &user[..], options, &["--"], arguments].concat();
        place.ozone(&words).output()
    };
    let shell = "/bin/sh";
    let loader = "/lib64/ld-linux-x86-64.so.2";
    let remedy = format!("{loader}:exec");
    refused(&run(shell, &[], &[])?, 2, &["execute /sh", &format!("interpreter {loader} is not in"), &remedy])?;
    refused(&run(shell, &["--source", loader], &[])?, 2, &["execute /sh", loader, "without the key exec"])?;
    let libraries = ["--source", &remedy, "--source", "/lib:exec"];
    assert_eq!(run(shell, &libraries, &["-c", "exit 5"])?.status.code(), Some(5));
    let script = place.make_file("script", "#!/bin/sh\nexit 6\n", 0o555, 0);
    refused(&run(&script, &[], &[])?, 2, &["execute /script", "/bin/sh is not in the jail"])?;
    let more = [&libraries[..], &["--source", "/bin/sh:exec"]].concat();
    assert_eq!(run(&script, &more, &[])?.status.code(), Some(6));
    let nonsense = place.make_file("nonsense", "nothing", 0o555, 0);
    refused(&run(&nonsense, &[], &[])?, 2, &["execute /nonsense", "no program"])?;
    Ok(())
}

fn network() -> Result<(), Failed> {
    crate::support::apart(CloneFlags::CLONE_NEWNET, || {
        let place = Place::new();
        let (pid, thread) = (std::process::id(), nix::unistd::gettid());
        let path = format!("/proc/{pid}/task/{thread}/ns/net");
        let running = place.waiting(&["--netns", &path], &[])?;
        assert_eq!(namespace(running.program, "net"), fs::read_link(&path)?);
        drop(running);
        let alone = place.waiting(&[], &[])?;
        assert_ne!(namespace(alone.program, "net"), fs::read_link(&path)?);
        let interfaces = fs::read_to_string(format!("/proc/{}/net/dev", alone.program))?;
        assert_eq!(interfaces.lines().skip(2).count(), 1, "lo alone: {interfaces}");
        drop(alone);
        for path in ["/etc/passwd", "/proc/self/ns/mnt", "/dev/null"] {
            place.refused(&["--netns", path], 2, &["--netns", "no network namespace"])?;
        }
        place.refused(&["--netns", "/run/netns/none-of-this-name"], 2, &["No such file"])
    })
}

fn capability() -> Result<(), Failed> {
    let place = Place::new();
    // CAP_NET_BIND_SERVICE and CAP_NET_RAW are 10 and 13 (linux/capability.h).
    let running = place.waiting(&["--capability", "net_bind_service,CAP_NET_RAW"], &["look"])?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(running.program, set), "0000000000002400", "{set}");
    }
    assert_eq!(running.said.get("securebits"), "0xeb");
    assert_eq!(status(running.program, "NoNewPrivs"), "1");
    drop(running);
    place.refused(&["--capability", "CAP_NONE"], 2, &["--capability CAP_NONE", "there is no"])?;
    let output = place.jail(&["--capability", "CAP_SYS_PTRACE"], &["nothing"]).output()?;
    assert!(text(&output.stderr).contains("whoever has it can leave the jail"), "{output:?}");
    Ok(())
}

fn resource_limit() -> Result<(), Failed> {
    let place = Place::new();
    let options = ["--resource-limit", "no-file=100:200", "--resource-limit", "fsize=1M", "--resource-limit", "as=4G"];
    let said = place.said(&options, &["look"])?;
    assert_eq!(
        (said.get("nofile"), said.get("fsize"), said.get("as"), said.get("core")),
        ("100:200", "1048576:1048576", "4294967296:4294967296", "0:0")
    );
    place.refused(&["--resource-limit", "files=1"], 2, &["unknown resource 'files'", "nofile"])
}

fn environment() -> Result<(), Failed> {
    let place = Place::new();
    let mut command = place.jail(&["--env", "A=b c", "--env", "PATH=/"], &["look"]);
    let output = command.env("SECRET", "s").output()?;
    assert!(text(&output.stdout).contains("\nenvironment=A=b c PATH=/\n"), "{output:?}");
    place.refused(&["--env", "SECRET"], 2, &["--env SECRET", "NAME=VALUE"])
}

fn filter_file() -> Result<(), Failed> {
    let place = Place::new();
    let filter =
        r#"{"a": {"mismatch_action": "allow", "match_action": {"errno": 7}, "filter": [{"syscall": "setns"}]}}"#;
    let file = place.make_file("filter.json", filter, 0o600, 0);
    let said = place.said(&["--seccomp", &file], &["calls"])?;
    assert_eq!(said.get("call setns"), "E2BIG");
    assert_ne!(said.get("call io_uring_setup"), "EPERM", "it stands in the default's place");
    let output = place.jail(&["--seccomp", &file], &["x32"]).output()?;
    assert_eq!(output.status.code(), Some(128 + 31), "{output:?}");
    let wrong = place.make_file("wrong.json", "{}", 0o600, 0);
    place.refused(&["--seccomp", &wrong], 2, &["--seccomp", "one filter"])?;
    place.refused(&["--seccomp", "deafult"], 2, &["--seccomp", "No such file"])
}

fn first_version() -> Result<(), Failed> {
    use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
    if statfs("/sys/fs/cgroup").is_ok_and(|it| it.filesystem_type() == CGROUP2_SUPER_MAGIC) {
        // The integration tests try it on a host with the second version.
        return Ok(());
    }
    let place = Place::new();
    let remedy = "systemd.unified_cgroup_hierarchy=1";
    place.refused(&["--cgroup", "memory.max=64M"], 3, &["--cgroup memory.max=64M", remedy])?;
    place.refused(&["--cgroup-parent", "x"], 3, &["--cgroup-parent x", remedy])?;
    let output = place.jail(&[], &["nothing"]).output()?;
    assert!(output.status.success() && text(&output.stderr).contains("no cgroups"), "{output:?}");
    Ok(())
}

fn help() -> Result<(), Failed> {
    let output = Place::new().ozone(&["--help"]).output()?;
    let help = text(&output.stdout);
    for option in [
        "name",
        "exec-file",
        "source",
        "netns",
        "cgroup",
        "numa",
        "capability",
        "resource-limit",
        "daemonize",
        "clean-resource",
    ] {
        assert!(help.contains(&format!("--{option}")), "{option}: {help}");
    }
    assert!(help.contains("Exit codes:"));
    Ok(())
}
