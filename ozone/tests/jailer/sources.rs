//! `--source`: what of the host a program sees, and what it may do with it.

use std::fs;
use std::os::unix::fs::symlink;

use libtest_mimic::Failed;

use crate::Test;
use crate::support::{OWN, Place, owner_and_mode};

pub const TESTS: &[Test] = &[
    ("a source is read-only, without set-uid, devices and execution", true, read_only),
    ("rw, exec and dev are what they say", true, keys),
    ("a device is a source that is asked for", true, devices),
    ("links in the operator's path are followed, and none in a source", true, links),
    ("nobody's files change owner or mode", true, owners),
    ("sources that would be one in the other are refused", true, apart),
];

fn read_only() -> Result<(), Failed> {
    let place = Place::new();
    let directory = place.make_directory("directory", 0o777, OWN);
    let file = place.make_file("directory/file", "content", 0o666, OWN);
    fs::copy(place.path("probe"), place.path("directory/probe"))?;
    let single = place.make_file("single", "alone", 0o666, OWN);
    let (directory_option, single_option) = (format!("{directory}:/d"), format!("{single}:/e/f/single"));
    let words = [
        "read",
        "/d/file",
        "write",
        "/d/file",
        "create",
        "/d/new",
        "execute",
        "/d/probe",
        "read",
        "/e/f/single",
        "write",
        "/e/f/single",
        "list",
        "/",
        "list",
        "/e/f",
        "create",
        "/e/new",
    ];
    let running = place.waiting(&["--source", &directory_option, "--source", &single_option], &words)?;
    let said = &running.said;
    assert_eq!((said.get("read /d/file"), said.get("read /e/f/single")), ("content", "alone"));
    for denied in ["write /d/file", "create /d/new", "write /e/f/single", "create /e/new"] {
        assert_eq!(said.get(denied), "EROFS", "{denied}");
    }
    assert_eq!(said.get("execute /d/probe"), "EACCES");
    assert_eq!((said.get("list /"), said.get("list /e/f")), ("d e probe", "single"));
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", running.program))?;
    for target in [" /d ", " /e/f/single "] {
        let mount = mounts.lines().find(|line| line.contains(target)).unwrap();
        assert!([" ro,", "nosuid", "nodev", "noexec"].iter().all(|it| mount.contains(it)), "{mount}");
        assert!(!mount.contains("shared:") && !mount.contains("master:"), "{mount}");
    }
    assert_eq!(fs::read_to_string(&file)?, "content");
    Ok(())
}

fn keys() -> Result<(), Failed> {
    let place = Place::new();
    let directory = place.make_directory("directory", 0o777, 0);
    place.make_file("directory/file", "content", 0o666, 0);
    fs::copy(place.path("probe"), place.path("directory/probe"))?;
    let words = ["write", "/d/file", "create", "/d/new", "execute", "/d/probe"];
    let said = place.said(&["--source", &format!("{directory}:/d:rw")], &words)?;
    assert_eq!((said.get("write /d/file"), said.get("create /d/new")), ("allowed", "allowed"));
    assert_eq!(said.get("execute /d/probe"), "EACCES");
    assert_eq!(fs::read_to_string(place.path("directory/file"))?, "xontent");
    let said = place.said(&["--source", &format!("{directory}:/d:exec")], &words)?;
    assert_eq!(said.get("write /d/file"), "EROFS");
    assert_eq!(said.get("execute /d/probe"), "exit status: 0");
    place.refused(&["--source", &format!("{directory}:ro")], 2, &["the keys are rw, dev, exec"])?;
    place.refused(&["--source", "/nowhere/at/all"], 2, &["--source /nowhere/at/all", "No such file"])
}

fn devices() -> Result<(), Failed> {
    let place = Place::new();
    let words = ["write", "/dev/null", "kind", "/dev/null", "list", "/dev"];
    let said = place.said(&["--source", "/dev/null:dev,rw"], &words)?;
    assert_eq!(said.get("write /dev/null"), "allowed");
    assert_eq!(said.get("kind /dev/null"), "block false, character true");
    assert_eq!(said.get("list /dev"), "null", "no device but that");
    place.refused(&["--source", "/dev/null"], 2, &["it is a device", "add the key dev"])?;
    place.refused(&["--source", "/dev/null:dev"], 2, &["can write to this device", "add the key rw"])?;
    // A whole /dev without dev: its devices cannot be opened.
    let said = place.said(&["--source", "/dev:/d"], &["read", "/d/null"])?;
    assert_eq!(said.get("read /d/null"), "EACCES");

    let device = fs::read_dir("/sys/class/block")?.flatten().find_map(|entry| {
        let path = format!("/dev/{}", entry.file_name().to_string_lossy());
        fs::metadata(&path).is_ok().then_some(path)
    });
    let device = device.ok_or("this host has no block device")?;
    let said = place.said(&["--source", &format!("{device}:/disk:dev")], &["kind", "/disk", "read", "/disk"])?;
    assert_eq!(said.get("kind /disk"), "block true, character false");
    // Its mode is the host's: nothing was changed for the program.
    assert_eq!(said.get("read /disk"), "EACCES");
    Ok(())
}

fn links() -> Result<(), Failed> {
    let place = Place::new();
    let directory = place.make_directory("real", 0o755, 0);
    place.make_file("real/file", "content", 0o644, 0);
    place.make_file("outside", "secret", 0o644, 0);
    symlink("real", place.path("link"))?;
    symlink(place.path("outside"), place.path("real/absolute"))?;
    symlink("../outside", place.path("real/relative"))?;
    let (through, file) = (format!("{}:/d", place.text("link")), format!("{}/file:/f", place.text("link")));
    let words = ["read", "/d/file", "read", "/f", "read", "/d/absolute", "read", "/d/relative"];
    let said = place.said(&["--source", &through, "--source", &file], &words)?;
    assert_eq!((said.get("read /d/file"), said.get("read /f")), ("content", "content"));
    assert_eq!((said.get("read /d/absolute"), said.get("read /d/relative")), ("ENOENT", "ENOENT"));
    // The path in the jail is the one that was given, with its links as directories.
    let path = place.text("link");
    let said = place.said(&["--source", &path], &["read", &format!("{path}/file")])?;
    assert_eq!(said.get(&format!("read {path}/file")), "content");
    drop(directory);
    Ok(())
}

fn owners() -> Result<(), Failed> {
    let place = Place::new();
    place.make_directory("directory", 0o750, 33);
    place.make_file("directory/file", "content", 0o640, 44);
    place.make_file("single", "content", 0o4711, 55);
    let paths = ["directory", "directory/file", "single", "probe", ""].map(|name| place.path(name));
    let all = || {
        let devices = ["/dev/null", "/dev"].map(std::path::PathBuf::from);
        paths.iter().chain(&devices).map(|path| owner_and_mode(path)).collect::<Vec<_>>()
    };
    let before = all();
    let options = [
        "--source",
        &format!("{}:rw,exec,dev", place.text("directory")),
        "--source",
        &place.text("single"),
        "--source",
        "/dev/null:dev,rw",
    ];
    let running = place.waiting(&options, &["read", &place.text("directory/file")])?;
    assert_eq!(running.said.get(&format!("read {}", place.text("directory/file"))), "EACCES");
    assert_eq!(all(), before);
    drop(running);
    place.ozone(&["--clean-resource", "--name", place.name()]).output()?;
    assert_eq!(all(), before);
    Ok(())
}

fn apart() -> Result<(), Failed> {
    let place = Place::new();
    let directory = place.make_directory("directory", 0o755, 0);
    for (first, second) in [("/a", "/a"), ("/a", "/a/b"), ("/a/b", "/a")] {
        let (one, other) = (format!("{directory}:{first}:rw"), format!("{directory}:{second}"));
        place.refused(&["--source", &one, "--source", &other], 2, &["one in the other"])?;
    }
    place.refused(&["--source", &format!("{directory}:/probe")], 2, &["where the program is"])?;
    place.refused(&["--source", &format!("{directory}:/x/../../y")], 2, &["'..'"])?;
    assert_eq!(fs::read_dir(directory)?.count(), 0, "no place was made in it");
    Ok(())
}
