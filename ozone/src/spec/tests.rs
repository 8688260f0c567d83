//! Every bad input that can be told from the text alone, and the way of a good one.

use std::io::Write;

use super::*;
use crate::cli::{self, Command, Parsed};

fn machine(words: &[&str]) -> Result<VmSpec, String> {
    let line = ["ozone", "run"].iter().chain(words).map(std::ffi::OsString::from);
    match cli::parse(line) {
        Parsed::Command(command) => match *command {
            Command::Run(options) | Command::Spec(options) => load(&options).map_err(|error| error.to_string()),
            other => panic!("{words:?}: {other:?}"),
        },
        other => panic!("{words:?}: {other:?}"),
    }
}

fn written(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn the_least_that_makes_a_machine() {
    let spec = machine(&["--kernel", "vmlinuz"]).unwrap();
    assert_eq!((spec.cpus.value.boot, spec.cpus.value.max, spec.memory.value.size), (1, 1, 256 << 20));
    assert_eq!(spec.name, None);
    assert!(spec.reboot);
    let [console] = &spec.devices[..] else { panic!("{:?}", spec.devices) };
    assert_eq!(console.id.as_str(), "console0");
    assert!(matches!(console.config, DeviceConfig::Console(ConsoleFile::Stdio)));
}

#[test]
fn each_wrong_argument_is_refused_in_one_line_that_names_it() {
    let long = format!("--append={}", "x".repeat(9000));
    let many: Vec<String> = (0..16).map(|number| format!("--disk=path=d{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let table: &[(&[&str], &[&str])] = &[
        (&["--memory", "0"], &["--memory 0", "64M"]),
        (&["--memory", "1MiB"], &["--memory 1MiB", "64M"]),
        (&["--memory", "lots"], &["--memory lots", "not a size"]),
        (&["--memory", "-1"], &["--memory -1", "not a size"]),
        (&["--memory", "67108865"], &["--memory 67108865", "4096"]),
        (&["--cpus", "0"], &["--cpus 0", "at least 1"]),
        (&["--cpus", "255"], &["--cpus 255", "at most 254"]),
        (&["--cpus", "-1"], &["--cpus -1", "not a number"]),
        (&["--cpus", "two"], &["--cpus two", "not a number"]),
        (&["--disk", "root.img"], &["--disk root.img", "unknown key 'root.img'", "path"]),
        (&["--disk", "readonly"], &["--disk readonly", "'path' is missing"]),
        (&["--disk", "path="], &["--disk path=", "path=…"]),
        (&["--disk", "path=a,readonly=maybe"], &["readonly=maybe"]),
        (&["--disk", "path=a,path=b"], &["twice"]),
        (&["--disk", "path=a,queues=0"], &["queues is 1 to"]),
        (&["--disk", "path=a,queues=17"], &["--disk path=a,queues=17", "queues is 1 to 16"]),
        (&["--net", "queues=9"], &["--net queues=9", "queues is 1 to 8"]),
        (&["--disk", "path=a,queues=x"], &["queues=x"]),
        (&["--disk", "path=a,id=Root"], &["'Root'"]),
        (&["--disk", "path=a,id=x", "--disk", "path=b,id=x"], &["--disk path=b,id=x", "taken by --disk path=a,id=x"]),
        (&["--net", "mac=52:54:00:12:34"], &["mac=52:54:00:12:34"]),
        (&["--net", "mac=52:54:00:12:34:5g"], &["mac=52:54:00:12:34:5g"]),
        (&["--net", "mac=+5:54:00:12:34:56"], &["mac=+5"]),
        (&["--net", "mac=01:00:5e:00:00:01"], &["group bit"]),
        (&["--net", "mac=00:00:00:00:00:00"], &["zero"]),
        (&["--net", "mtu=67"], &["mtu is 68"]),
        (&["--net", "mtu=70000"], &["mtu is 68"]),
        (&["--net", "tap=a/b"], &["tap=a/b"]),
        (&["--net", "tap=abcdefghijklmnop"], &["tap=abcdefghijklmnop"]),
        (&["--net", "tap=tap0,host-ip=10.0.0.1/8"], &["host-ip"]),
        (&["--net", "host-ip=10.0.0.1"], &["host-ip=10.0.0.1"]),
        (&["--net", "host-ip=10.0.0.1/33"], &["host-ip=10.0.0.1/33"]),
        (&["--net", "bridge=br0"], &["unknown key 'bridge'", "host-ip"]),
        (&["--console", "tty"], &["unknown key 'tty'", "stdio"]),
        (&["--console", "stdio,pty"], &["one place"]),
        (&["--console", "stdio", "--console", "stdio"], &["only one console"]),
        (&["--name", "../x"], &["--name ../x"]),
        (&["--name", ""], &["--name"]),
        (&["--limit", "memory"], &["--limit memory", "KEY=VALUE"]),
        (&["--limit", "blk/disk0:pids.max=9"], &["--limit blk/disk0:pids.max=9", "console/console0"]),
        (&["--limit", "pids.max=9", "--limit", "pids.max=9"], &["--limit pids.max=9", "given already"]),
        (&["--numa", "0", "--limit", "cpuset.mems=1"], &["--numa 0", "and so does --limit cpuset.mems=1"]),
        (&["--numa", "-1"], &["--numa -1", "not a number"]),
        (&["--log-format", "xml"], &["--log-format xml", "it is text or json"]),
        (&["--status-file", ""], &["--status-file", "not a path"]),
        (&["--cgroup-parent", "/etc"], &["--cgroup-parent /etc", "/sys/fs/cgroup"]),
        (&["--uid-base", "0"], &["--uid-base 0: uid 0 is root's"]),
        (&["--uid-base", "-1"], &["--uid-base -1: not a uid"]),
        (&["--uid-base", "tenant"], &["--uid-base tenant: not a uid"]),
        (&["--uid-base", "65533"], &["--uid-base 65533", "65534 among them"]),
        (&["--uid-base", "65534"], &["--uid-base 65534", "nobody's"]),
        (&["--uid-base", "4294967294"], &["--uid-base 4294967294", "would be 4294967295", "none above 4294967294"]),
        (&["--uid-base", "18446744073709551615"], &["--uid-base 18446744073709551615", "none above"]),
        (&["--uid-base", "99999999999999999999"], &["not a uid"]),
        (&[&long], &["--append", "9000"]),
        (&["--append", "a\nb"], &["--append", "control character"]),
        (&many, &["--disk path=d15", "room for 15"]),
        (&["--spec", "/nonexistent/vm.json"], &["--spec /nonexistent/vm.json", "No such file"]),
    ];
    for (words, expected) in table {
        let words: Vec<&str> = ["--kernel", "k"].iter().chain(*words).copied().collect();
        let text = machine(&words).expect_err(&format!("{words:?}"));
        assert_eq!(text.lines().count(), 1, "{text}");
        for part in *expected {
            assert!(text.contains(part), "{words:?}: '{text}' lacks '{part}'");
        }
    }
    assert!(machine(&[]).unwrap_err().contains("--kernel"));
}

#[test]
fn each_wrong_file_is_refused_in_one_line_that_names_the_key() {
    for (text, expected) in [
        ("", "EOF"),
        ("[]", "struct SpecFile"),
        (r#"{"version": 2, "kernel": "k"}"#, "version 2"),
        (r#"{"kernel": "k"}"#, "`version`"),
        (r#"{"version": 1, "kernal": "k"}"#, "`kernal`"),
        (r#"{"version": 1, "kernel": "k", "kernel": "k"}"#, "`kernel`"),
        (r#"{"version": 1, "kernel": "k", "memory": {"sizes": 1}}"#, "`sizes`"),
        (r#"{"version": 1, "kernel": "k", "memory": {"size": "1M"}}"#, "memory.size 1M"),
        (r#"{"version": 1, "kernel": "k", "memory": {"size": true}}"#, "a size"),
        (r#"{"version": 1, "kernel": "k", "memory": {"max": "1G"}}"#, "memory.max"),
        (r#"{"version": 1, "kernel": "k", "cpus": {"boot": 4, "max": 2}}"#, "cpus.max is 2"),
        (r#"{"version": 1, "kernel": "k", "cpu": "z80"}"#, "`z80`"),
        (r#"{"version": 1, "kernel": "k", "machine": "microvm-9"}"#, "`microvm-9`"),
        (r#"{"version": 1, "kernel": "k", "devices": {"A": {"disk": {"path": "x"}}}}"#, "'A'"),
        (r#"{"version": 1, "kernel": "k", "devices": {"a": {"floppy": {"path": "x"}}}}"#, "`floppy`"),
        (r#"{"version": 1, "kernel": "k", "devices": {"a": {"disk": {"path": "x", "ro": true}}}}"#, "`ro`"),
        (r#"{"version": 1, "kernel": "k", "devices": {"a": {"disk": {"readonly": true}}}}"#, "`path`"),
        (
            r#"{"version": 1, "kernel": "k", "devices": {"a": {"console": "pty"}, "a": {"console": "pty"}}}"#,
            "'a' stands there twice",
        ),
        (r#"{"version": 1, "kernel": "k", "limits": {"memory.min": 1}}"#, "limits.memory.min 1 in"),
        (r#"{"version": 1, "kernel": "k", "limits": {"pids.max": true}}"#, "a limit: a text"),
        (r#"{"version": 1, "kernel": "k", "limits": {"pids.max": 1, "pids.max": 2}}"#, "limit 'pids.max' stands"),
        (r#"{"version": 1, "kernel": "k", "limits": {"pids.max": ["1", "2"]}}"#, "given already"),
        (r#"{"version": 1, "kernel": "k", "numa": -1}"#, "u32"),
        (r#"{"version": 1, "kernel": "k", "log-format": "xml"}"#, "`xml`"),
        (r#"{"version": 1, "kernel": "k", "status-file": "\u0000"}"#, "status-file"),
        (r#"{"version": 1, "kernel": "k", "cgroup-parent": "../x"}"#, "cgroup-parent ../x in"),
        (r#"{"version": 1, "kernel": "k", "uid-base": 0}"#, "uid-base 0 in"),
        (r#"{"version": 1, "kernel": "k", "uid-base": 4294967295}"#, "uid-base 4294967295 in"),
        (r#"{"version": 1, "kernel": "k", "devices": {"a": {"net": {"mac": "x"}}}}"#, "devices.a in"),
    ] {
        let file = written(text);
        let said = machine(&["--spec", file.path().to_str().unwrap()]).expect_err(text);
        assert!(said.contains(expected), "{text}: '{said}' lacks '{expected}'");
        assert!(said.contains(file.path().to_str().unwrap()), "{text}: '{said}' does not name the file");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_printed_machine_reads_back_as_the_same() {
    let spec = machine(&[
        "--kernel",
        "k",
        "--initrd",
        "i",
        "--append",
        "console=hvc0",
        "--cpus",
        "2",
        "--memory",
        "1G",
        "--no-reboot",
        "--disk",
        "path=b,,c.img,id=zeta",
        "--disk",
        "path=a.img,readonly,queues=2",
        "--net",
        "host-ip=10.0.0.1/8",
        "--net",
        "tap=tap0,mtu=9000",
        "--console",
        "socket=/run/s",
        "--name",
        "web1",
        "--limit",
        "memory.max=2048M",
        "--limit",
        "blk/zeta:io.max=8:0 rbps=1M",
        "--limit",
        "blk/zeta:io.max=8:16 wiops=5",
        "--limit",
        "core:cpu.max=50000",
        "--numa",
        "0",
        "--cgroup-parent",
        "machine.slice",
        "--uid-base",
        "100000",
        "--log-format",
        "json",
        "--status-file",
        "/run/web1.json",
    ])
    .unwrap();
    let text = serde_json::to_string_pretty(&SpecFile::from(&spec)).unwrap();
    let file = written(&text);
    let again = machine(&["--spec", file.path().to_str().unwrap()]).unwrap();
    assert_eq!(serde_json::to_string_pretty(&SpecFile::from(&again)).unwrap(), text);
    let ids: Vec<&str> = again.devices.iter().map(|device| device.id.as_str()).collect();
    assert_eq!(ids, ["zeta", "disk0", "net0", "net1", "console0"], "the order is that of the options");
    assert!(text.contains("b,c.img"));
    assert!(text.contains(r#""memory.max": "2G""#) && text.contains(r#""core:cpu.max": "50000 100000""#), "{text}");
    assert!(text.contains(r#""log-format": "json""#) && text.contains(r#""status-file": "/run/web1.json""#), "{text}");
    assert_eq!((again.limits.list.len(), again.limits.numa.map(|numa| numa.value)), (4, Some(0)));
}

#[test]
fn options_go_before_the_file() {
    let file = written(
        r#"{"version": 1, "kernel": "k", "memory": {"size": 134217728}, "devices": {
            "root": {"disk": {"path": "old.img"}}, "log": {"console": {"file": "log"}}}}"#,
    );
    let path = file.path().to_str().unwrap();
    let spec =
        machine(&["--spec", path, "--memory", "1G", "--disk", "path=new.img,id=root", "--disk", "path=more"]).unwrap();
    assert_eq!(spec.memory.value.size, 1 << 30);
    assert_eq!(spec.memory.argument, "--memory 1G");
    let ids: Vec<&str> = spec.devices.iter().map(|device| device.id.as_str()).collect();
    assert_eq!(ids, ["root", "log", "disk0"]);
    assert!(matches!(&spec.devices[0].config, DeviceConfig::Disk(disk) if disk.path.ends_with("new.img")));
}

#[test]
fn uids_have_no_end_at_sixteen_bits() {
    let with = |words: &[&str]| {
        let spec = machine(&[&["--kernel", "k"], words].concat()).unwrap();
        (spec.uid_base.as_ref().map(|first| first.value), spec.processes())
    };
    assert_eq!(with(&["--uid-base", "1"]), (Some(1), 2));
    assert_eq!(with(&["--uid-base", "65535", "--disk", "path=d"]), (Some(65535), 3));
    assert_eq!(with(&["--uid-base", "65532"]), (Some(65532), 2), "the last one is below nobody's");
    assert_eq!(with(&["--uid-base", "4294967293"]), (Some(4294967293), 2));
    assert_eq!(with(&[]), (None, 2));
}

#[test]
fn limits_of_options_go_before_those_of_the_file() {
    let file = written(
        r#"{"version": 1, "kernel": "k", "numa": 1, "limits": {"pids.max": 100, "cpu.weight": "50",
            "io.max": ["8:0 rbps=1", "8:16 rbps=1"]}}"#,
    );
    let path = file.path().to_str().unwrap();
    let limits = machine(&["--spec", path, "--limit", "pids.max=200", "--limit", "io.max=8:0 rbps=2"]).unwrap().limits;
    let values: Vec<String> = limits.list.iter().map(|limit| limit.value.clone()).collect();
    assert_eq!(values, ["200", "8:0 rbps=2", "50", "8:16 rbps=1"]);
    assert_eq!(limits.list[2].argument, format!("limits.cpu.weight 50 in {path}"));
    assert!(limits.numa.unwrap().argument.starts_with("numa 1 in "));
}

#[test]
fn a_drawn_mac_is_an_individual_local_one() {
    for _ in 0..100 {
        let mac = drawn_mac();
        assert_eq!(mac[0] & 3, 2, "{mac:?}");
    }
}
