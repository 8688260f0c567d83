//! What to put in a jail: the options, found valid once. What the host says to it is found out later.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use caps::{Capability, CapsHashSet};
use protocol::Fault;

use super::options::Options;
use super::rlimit::ResourceLimit;
use super::source::{self, Source};
use crate::cgroup::Setting;
use crate::runtime;
use crate::spec::limits::{self, Key, Limits};
use crate::spec::{Given, NAME, SpecError};

/// A jail for one program.
#[derive(Debug)]
pub struct JailSpec {
    /// Its name.
    pub name: String,
    /// The program's path on the host, from the root.
    pub program: PathBuf,
    /// The program's path in the jail.
    pub target: PathBuf,
    /// Who it is.
    pub uid: u32,
    /// Its only group.
    pub gid: u32,
    /// What it sees of the host.
    pub sources: Vec<Source>,
    /// The network namespace that it joins.
    pub netns: Option<PathBuf>,
    /// What is written to its control group.
    pub settings: Vec<Setting>,
    /// Where its control group is, and its NUMA node.
    pub place: Limits,
    /// The capabilities that it keeps.
    pub capabilities: CapsHashSet,
    /// Its resource limits.
    pub limits: Vec<ResourceLimit>,
    /// Its environment.
    pub environment: Vec<CString>,
    /// Its arguments, the first of which is its path in the jail.
    pub arguments: Vec<CString>,
    /// Which system calls it may not make.
    pub seccomp: Seccomp,
    /// Whether nobody waits for it.
    pub daemonize: bool,
}

/// Which system calls a program may not make.
#[derive(Debug, PartialEq, Eq)]
pub enum Seccomp {
    /// It may make any.
    None,
    /// Those of `seccomp::policy::program`.
    Default,
    /// What a file says.
    File(PathBuf),
}

/// Capabilities of whoever is not held by the jail (capabilities(7)).
pub const ESCAPES: [Capability; 11] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_MODULE,
    Capability::CAP_SYS_RAWIO,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_SYS_BOOT,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_BPF,
];

/// Reads the name alone, which is all that `--clean-resource` takes.
///
/// # Errors
/// An input fault.
pub fn name(options: &Options) -> Result<String, Fault> {
    let name = required(options.name.as_ref(), "--name NAME")?;
    if !runtime::is_name(name) {
        return Err(SpecError::new(&format!("--name {name}"), NAME).into());
    }
    Ok(name.clone())
}

/// Reads the options; paths that are relative are so to `here`. `ordinary` is who runs `ozone` without being root: much
/// cannot be had then.
///
/// # Errors
/// An input fault of one line, which names the option.
pub fn load(options: &Options, here: &Path, ordinary: Option<Caller>) -> Result<JailSpec, Fault> {
    let name = name(options)?;
    let file = required(options.exec_file.as_ref(), "--exec-file FILE")?;
    let last = file.file_name().filter(|_| !file.as_os_str().as_bytes().ends_with(b"/"));
    let Some(last) = last else {
        return Err(wrong("--exec-file", file.as_os_str(), "not the path of a file").into());
    };
    let uid = id(options, "--uid", options.uid.as_ref())?;
    let gid = id(options, "--gid", options.gid.as_ref())?;
    let mut sources = Vec::new();
    for text in &options.source {
        sources.push(Source::parse(text, here).map_err(|problem| wrong("--source", text, problem))?);
    }
    let target = Path::new("/").join(last);
    source::check_apart(&sources, &target)
        .map_err(|(argument, problem)| Fault::input(format!("{argument}: {problem}")))?;
    let mut given = Vec::new();
    for text in &options.resource_limit {
        given.push(ResourceLimit::parse(text).map_err(|problem| wrong("--resource-limit", text.as_ref(), problem))?);
    }
    let limits =
        ResourceLimit::complete(given).map_err(|problem| Fault::input(format!("--resource-limit: {problem}")))?;
    let seccomp = match options.seccomp.to_str() {
        Some("default") => Seccomp::Default,
        Some("none") => Seccomp::None,
        _ => Seccomp::File(here.join(&options.seccomp)),
    };
    let spec = JailSpec {
        name,
        program: here.join(file),
        uid,
        gid,
        sources,
        netns: options.netns.as_ref().map(|path| here.join(path)),
        settings: settings(options)?,
        place: place(options)?,
        capabilities: capabilities(&options.capability)?,
        limits,
        environment: environment(&options.env)?,
        arguments: arguments(&target, &options.arguments)?,
        target,
        seccomp,
        daemonize: options.daemonize,
    };
    ordinary.map_or(Ok(()), |caller| caller.can(&spec))?;
    Ok(spec)
}

/// An ordinary user.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Its effective uid.
    pub uid: u32,
    /// Its effective gid.
    pub gid: u32,
}

impl Caller {
    /// Refuses what takes root.
    fn can(self, spec: &JailSpec) -> Result<(), Fault> {
        let Self { uid, gid } = self;
        let refused =
            |argument: String, reason: String| Err(Fault::host(format!("{argument}: {reason}; run ozone as root")));
        if spec.uid != uid {
            return refused(format!("--uid {}", spec.uid), format!("an ordinary user has its own uid only, {uid}"));
        }
        if spec.gid != gid {
            return refused(format!("--gid {}", spec.gid), format!("an ordinary user has its own gid only, {gid}"));
        }
        if let Some(path) = &spec.netns {
            let path = path.display();
            return refused(
                format!("--netns {path}"),
                "an ordinary user joins no network namespace of the host".to_owned(),
            );
        }
        if let Some(capability) = spec.capabilities.iter().next() {
            return refused(
                format!("--capability {capability}"),
                "an ordinary user has no capabilities to keep".to_owned(),
            );
        }
        Ok(())
    }
}

fn wrong(option: &str, value: &std::ffi::OsStr, problem: impl Into<String>) -> SpecError {
    SpecError::new(&format!("{option} {}", value.to_string_lossy()), problem)
}

fn required<'a, T>(value: Option<&'a T>, option: &str) -> Result<&'a T, Fault> {
    value.ok_or_else(|| Fault::input(format!("{option} is missing; 'ozone jail --help' has an example")))
}

/// A uid or gid. Every one that the kernel knows can be had; -1 means "leave it as it is" to it (setresuid(2)).
fn id(options: &Options, option: &'static str, text: Option<&String>) -> Result<u32, Fault> {
    let text = required(text, &format!("{option} NUMBER"))?;
    let problem = match text.parse::<u32>() {
        Ok(0) if !options.allow_root => {
            "files and processes of the host belong to 0; give another number, or --allow-root if that is meant"
        }
        Ok(u32::MAX) => "no user or group has the number 4294967295",
        Ok(id) if text.bytes().all(|digit| digit.is_ascii_digit()) => return Ok(id),
        _ => "not a number from 1 to 4294967294; names are not looked up",
    };
    Err(SpecError::new(&format!("{option} {text}"), problem).into())
}

fn settings(options: &Options) -> Result<Vec<Setting>, Fault> {
    let mut settings: Vec<Setting> = Vec::new();
    for text in &options.cgroup {
        let setting = setting(text).map_err(|problem| wrong("--cgroup", text.as_ref(), problem))?;
        // io.max and its like have a line for each device.
        let lines = |setting: &Setting| setting.controller() == "io";
        if settings.iter().any(|other| other.file == setting.file && !lines(other)) {
            return Err(Fault::input(format!("--cgroup {}: it is given twice", text.escape_debug())));
        }
        settings.push(setting);
    }
    let cpuset = settings.iter().find(|setting| setting.controller() == "cpuset");
    if let (Some(node), Some(setting)) = (&options.numa, cpuset) {
        let other = setting.argument.as_deref().unwrap_or_default();
        let problem = format!("it sets cpuset.cpus and cpuset.mems, and so does {other}");
        return Err(SpecError::new(&format!("--numa {node}"), problem).into());
    }
    Ok(settings)
}

/// One file of a control group. Those that `ozone` knows take what `--limit` takes; of others the kernel says what they take.
fn setting(text: &str) -> Result<Setting, String> {
    let (file, value) = text.split_once('=').ok_or("write it as FILE=VALUE, for example memory.max=256M")?;
    let argument = format!("--cgroup {}", text.escape_debug());
    if let Some(key) = Key::ALL.into_iter().find(|key| key.file() == file) {
        let limit = limits::parse(file, value, argument.clone()).map_err(|error| match error {
            SpecError::Value { problem, .. } => problem,
            other => other.to_string(),
        })?;
        return Ok(Setting { file: key.file().into(), value: limit.value, argument: Some(argument) });
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_');
    let named = file.split_once('.').is_some_and(|(controller, rest)| !controller.is_empty() && !rest.is_empty());
    if !named || !file.chars().all(allowed) {
        return Err(format!("'{}' is not a file of a cgroup, as memory.max", file.escape_debug()));
    }
    if file.starts_with("cgroup.") {
        return Err(format!("{file} is ozone's own to write; files of controllers can be, as memory.max"));
    }
    if value.is_empty() || value.contains(char::is_control) {
        return Err("the value is one line".to_owned());
    }
    Ok(Setting { file: file.to_owned().into(), value: value.to_owned(), argument: Some(argument) })
}

fn place(options: &Options) -> Result<Limits, Fault> {
    let numa = options.numa.as_ref().map(|node| {
        let argument = format!("--numa {}", node.escape_debug());
        match node.parse() {
            Ok(value) if node.bytes().all(|digit| digit.is_ascii_digit()) => Ok(Given { value, argument }),
            _ => Err(SpecError::new(&format!("--numa {node}"), "not a number of a node")),
        }
    });
    let parent = options.cgroup_parent.as_ref().map(|path| {
        let argument = format!("--cgroup-parent {path}");
        let value = limits::parent(path).map_err(|problem| SpecError::new(&argument, problem))?;
        Ok(Given { value, argument })
    });
    let parent: Option<Result<_, SpecError>> = parent;
    Ok(Limits { list: Vec::new(), numa: numa.transpose()?, parent: parent.transpose()? })
}

fn capabilities(texts: &[String]) -> Result<CapsHashSet, Fault> {
    let mut set = CapsHashSet::new();
    for text in texts {
        for name in text.split(',') {
            let upper = name.to_ascii_uppercase();
            let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
            let Ok(capability) = Capability::from_str(&full) else {
                let problem = format!("there is no '{}'; names are those of capabilities(7)", name.escape_debug());
                return Err(SpecError::new(&format!("--capability {text}"), problem).into());
            };
            set.insert(capability);
        }
    }
    Ok(set)
}

fn environment(texts: &[OsString]) -> Result<Vec<CString>, Fault> {
    let mut variables: Vec<CString> = Vec::new();
    for text in texts {
        let bytes = text.as_bytes();
        let name = bytes.split(|byte| *byte == b'=').next().unwrap_or_default();
        if name.is_empty() || name.len() == bytes.len() {
            return Err(wrong("--env", text, "write it as NAME=VALUE, for example LANG=C.UTF-8").into());
        }
        let rival =
            |other: &CString| other.as_bytes().starts_with(name) && other.as_bytes().get(name.len()) == Some(&b'=');
        if variables.iter().any(rival) {
            return Err(wrong("--env", text, "the variable is given twice").into());
        }
        variables.push(terminated("--env", text)?);
    }
    Ok(variables)
}

fn arguments(target: &Path, rest: &[OsString]) -> Result<Vec<CString>, Fault> {
    let program = terminated("--exec-file", target.as_os_str())?;
    let rest = rest.iter().map(|text| terminated("argument", text));
    std::iter::once(Ok(program)).chain(rest).collect()
}

fn terminated(option: &str, text: &std::ffi::OsStr) -> Result<CString, Fault> {
    let bytes = text.to_owned().into_vec();
    CString::new(bytes).map_err(|_| wrong(option, text, "a NUL is in it").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Command, Parsed};

    fn load_as(words: &[&str], root: Option<Caller>) -> Result<JailSpec, String> {
        let line = ["ozone", "jail"].iter().chain(words).map(OsString::from);
        let Parsed::Command(command) = cli::parse(line) else { return Err("no command".into()) };
        let Command::Jail(options) = *command else { return Err("not a jail".into()) };
        load(&options, Path::new("/here"), root).map_err(|fault| fault.message)
    }

    fn with(words: &[&str]) -> Result<JailSpec, String> {
        let all = [&["--name", "web1", "--exec-file", "/bin/x", "--uid", "100001", "--gid", "100002"], words].concat();
        load_as(&all, None)
    }

    #[test]
    fn the_least_that_is_said_is_the_closest_jail() {
        let spec = with(&["--", "-f", "--name"]).unwrap();
        assert_eq!((spec.uid, spec.gid, spec.daemonize), (100_001, 100_002, false));
        assert_eq!(spec.target, Path::new("/x"));
        let words: Vec<&str> = spec.arguments.iter().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(words, ["/x", "-f", "--name"]);
        assert!(spec.environment.is_empty() && spec.sources.is_empty() && spec.capabilities.is_empty());
        assert_eq!(spec.seccomp, Seccomp::Default);
    }

    #[test]
    fn names_that_would_be_paths_are_refused_in_one_line() {
        let long = "a".repeat(65);
        let longer = "a".repeat(256);
        for name in ["", "a/b", "..", "../a", ".", "/", "a\0b", "a\nb", "a\u{7f}", " ", "-a", &long, &longer] {
            let all = ["--name", name, "--exec-file", "/bin/x", "--uid", "1", "--gid", "1"];
            let wrong = load_as(&all, None).expect_err(name);
            assert!(wrong.contains("a name is 1 to 64") && wrong.lines().count() == 1, "{name:?}: {wrong}");
        }
        assert!(load_as(&["--name", &"a".repeat(64), "--exec-file", "/x", "--uid", "1", "--gid", "1"], None).is_ok());
    }

    #[test]
    fn every_id_of_the_kernels_can_be_had_and_root_if_it_is_meant() {
        let ids = |uid: &str, gid: &str, more: &[&str]| {
            let all = [&["--name", "a", "--exec-file", "/x", "--uid", uid, "--gid", gid], more].concat();
            load_as(&all, None).map(|spec| (spec.uid, spec.gid))
        };
        assert_eq!(ids("65536", "4294967294", &[]), Ok((65_536, u32::MAX - 1)));
        for (uid, gid, problem) in [
            ("0", "1", "--uid 0: files and processes of the host belong to 0"),
            ("1", "0", "--gid 0: files and processes of the host belong to 0"),
            ("4294967295", "1", "no user or group"),
            ("1", "4294967296", "not a number"),
            ("-1", "1", "not a number"),
            ("+1", "1", "not a number"),
            ("root", "1", "names are not looked up"),
        ] {
            let wrong = ids(uid, gid, &[]).unwrap_err();
            assert!(wrong.contains(problem) && wrong.lines().count() == 1, "{wrong}");
        }
        assert_eq!(ids("0", "0", &["--allow-root"]), Ok((0, 0)));
    }

    #[test]
    fn files_of_cgroups_have_their_exact_names() {
        let settings = |words: &[&str]| {
            let spec = with(words)?;
            Ok::<_, String>(spec.settings.iter().map(|it| format!("{}={}", it.file, it.value)).collect::<Vec<_>>())
        };
        let words = ["--cgroup", "memory.max=64M", "--cgroup", "cpu.max=50000", "--cgroup", "hugetlb.2MB.max=0"];
        assert_eq!(settings(&words).unwrap(), ["memory.max=64M", "cpu.max=50000 100000", "hugetlb.2MB.max=0"]);
        let two = ["--cgroup", "io.weight=8:0 50", "--cgroup", "io.weight=8:16 60"];
        assert_eq!(settings(&two).unwrap().len(), 2);
        for (text, problem) in [
            ("memory", "FILE=VALUE"),
            ("memory=1", "is not a file of a cgroup"),
            ("memory.=1", "is not a file of a cgroup"),
            ("../memory.max=1", "is not a file of a cgroup"),
            ("memory.max/x=1", "is not a file of a cgroup"),
            ("cgroup.procs=1", "ozone's own"),
            ("memory.low=1\n2", "one line"),
            ("memory.max=x", "size"),
        ] {
            let wrong = with(&["--cgroup", text]).expect_err(text);
            assert!(wrong.contains(problem) && wrong.lines().count() == 1, "{text}: {wrong}");
        }
        assert!(with(&["--cgroup", "pids.max=1", "--cgroup", "pids.max=2"]).unwrap_err().contains("twice"));
        assert!(with(&["--numa", "0", "--cgroup", "cpuset.cpus=0"]).unwrap_err().contains("so does"));
    }

    #[test]
    fn capabilities_have_their_names_in_any_writing() {
        let spec = with(&["--capability", "CAP_NET_RAW,chown", "--capability", "cap_kill"]).unwrap();
        let expected = [Capability::CAP_NET_RAW, Capability::CAP_CHOWN, Capability::CAP_KILL];
        assert_eq!(spec.capabilities, CapsHashSet::from(expected));
        assert!(with(&["--capability", "CAP_ALL"]).unwrap_err().contains("there is no 'CAP_ALL'"));
    }

    #[test]
    fn the_environment_is_what_is_said() {
        let spec = with(&["--env", "A=b=c", "--env", "B="]).unwrap();
        let text: Vec<&str> = spec.environment.iter().map(|it| it.to_str().unwrap()).collect();
        assert_eq!(text, ["A=b=c", "B="]);
        for wrong in [&["--env", "A"][..], &["--env", "=a"], &["--env", "A=1", "--env", "A=2"]] {
            assert!(with(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_an_ordinary_user_cannot_have_is_refused_with_the_reason() {
        let caller = Some(Caller { uid: 1000, gid: 1000 });
        let all = |uid: &'static str, more: &[&'static str]| {
            load_as(&[&["--name", "a", "--exec-file", "/x", "--uid", uid, "--gid", "1000"], more].concat(), caller)
        };
        assert!(all("1000", &[]).is_ok());
        for (uid, more, problem) in [
            ("1001", &[][..], "its own uid only, 1000"),
            ("1000", &["--netns", "/n"], "joins no network namespace"),
            ("1000", &["--capability", "kill"], "no capabilities to keep"),
        ] {
            let wrong = all(uid, more).unwrap_err();
            assert!(wrong.contains(problem) && wrong.ends_with("run ozone as root"), "{wrong}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(load_as(&[], None).unwrap_err().contains("--name NAME is missing"));
        assert!(load_as(&["--name", "a"], None).unwrap_err().contains("--exec-file FILE is missing"));
        let words = ["--name", "a", "--exec-file", "/x"];
        assert!(load_as(&words, None).unwrap_err().contains("--uid NUMBER is missing"));
        for file in ["/", "a/..", "", "/bin/"] {
            assert!(
                load_as(&["--name", "a", "--exec-file", file, "--uid", "1", "--gid", "1"], None).is_err(),
                "{file}"
            );
        }
    }
}
