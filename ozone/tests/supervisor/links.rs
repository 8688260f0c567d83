//! Symbolic links in the paths that are given: the operator's are followed, those of another user are not.

use std::fs;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};

use libtest_mimic::Failed;

use super::{Bench, ORDINARY};

/// A kernel, an image and a place for the record, behind links in this directory.
fn linked(bench: &Bench) -> std::io::Result<()> {
    fs::create_dir(bench.path("links"))?;
    fs::create_dir(bench.path("records"))?;
    for (link, to) in [("vmlinuz", "../kernel"), ("by-id", "../disk.img"), ("records", "../records")] {
        symlink(to, bench.path("links").join(link))?;
    }
    // As /vmlinuz and /dev/disk/by-id lead over others.
    symlink("links/vmlinuz", bench.path("vmlinuz"))?;
    symlink(bench.path("links"), bench.path("disks"))
}

const WORDS: [&str; 8] = [
    "--kernel",
    "vmlinuz",
    "--initrd",
    "links/vmlinuz",
    "--disk",
    "path=disks/by-id",
    "--status-file",
    "links/records/web1.json",
];

pub fn operators() -> Result<(), Failed> {
    let bench = Bench::new("power-off");
    linked(&bench)?;
    let (code, lines) = bench.run(&WORDS);
    assert_eq!(code, 0, "{lines:?}");
    assert!(bench.path("records/web1.json").is_file());
    assert!(fs::symlink_metadata(bench.path("links/by-id"))?.is_symlink());
    Ok(())
}

pub fn of_others() -> Result<(), Failed> {
    let bench = Bench::new("power-off");
    linked(&bench)?;
    let links = bench.path("links");
    fs::set_permissions(&links, fs::Permissions::from_mode(0o1777))?;
    for (option, name) in [
        ("--kernel vmlinuz", "vmlinuz"),
        ("--disk path=disks/by-id", "by-id"),
        ("--status-file links/records/web1.json", "records"),
    ] {
        let link = links.join(name);
        lchown(&link, Some(ORDINARY), None)?;
        let (code, lines) = bench.run(&WORDS);
        let problem = format!("is a symbolic link of user {ORDINARY}, in a directory that others can write");
        let expected = format!("ozone: {option}: {} {problem}; name what it leads to", link.display());
        assert_eq!((code, lines), (2, vec![expected]));
        assert_eq!(fs::read_dir(bench.path("records"))?.count(), usize::from(name != "records"), "{name}");
        let _ = fs::remove_file(bench.path("records/web1.json"));
        lchown(&link, Some(0), None)?;
    }
    assert_eq!(bench.run(&WORDS).0, 0, "root's own are followed there, too");
    Ok(())
}
