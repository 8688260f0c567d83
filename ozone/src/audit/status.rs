//! `/proc/PID/status` and `/proc/PID/task/TID/status`, of which every thread has its own (proc(5)).

/// The names of the five capability sets, in the order of [`Status::capabilities`].
pub const CAPABILITY_SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

/// What the audit reads of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The thread's name.
    pub name: String,
    /// One letter: `Z` and `X` have ended.
    pub state: char,
    /// The parent's process id.
    pub parent: i32,
    /// Real, effective, saved and file system uid.
    pub uids: [u32; 4],
    /// The same of gids.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The file mode creation mask (umask(2)); a thread that ends gives it up before it is seen to have ended.
    pub umask: Option<u32>,
    /// Its id in each pid namespace, from the reader's to its own.
    pub ids: Vec<i32>,
    /// The sets that [`CAPABILITY_SETS`] names, as bits (capabilities(7)).
    pub capabilities: [u64; 5],
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// 0 for none, 1 for strict, 2 for filters (seccomp(2)).
    pub seccomp: u32,
    /// How many filters there are.
    pub filters: u32,
}

impl Status {
    /// Reads the file's text.
    ///
    /// # Errors
    /// The name of the line that is missing or makes no sense.
    pub fn parse(text: &str) -> Result<Self, String> {
        let line = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).ok_or_else(|| format!("no line {name}"))
        };
        let words = |name: &str| line(name).map(str::split_whitespace);
        let wrong = |name: &str| format!("the line {name} makes no sense");
        let number = |name: &str, radix| u32::from_str_radix(line(name)?, radix).map_err(|_| wrong(name));
        let numbers = |name: &str| -> Result<Vec<u32>, String> {
            words(name)?.map(|word| word.parse().map_err(|_| wrong(name))).collect()
        };
        let four = |name: &str| <[u32; 4]>::try_from(numbers(name)?).map_err(|_| wrong(name));
        let mut capabilities = [0; 5];
        for (set, name) in capabilities.iter_mut().zip(CAPABILITY_SETS) {
            *set = u64::from_str_radix(line(name)?, 16).map_err(|_| wrong(name))?;
        }
        Ok(Self {
            name: line("Name")?.to_owned(),
            state: line("State")?.chars().next().ok_or_else(|| wrong("State"))?,
            parent: line("PPid")?.parse().map_err(|_| wrong("PPid"))?,
            uids: four("Uid")?,
            gids: four("Gid")?,
            groups: numbers("Groups")?,
            umask: line("Umask").is_ok().then(|| number("Umask", 8)).transpose()?,
            ids: words("NSpid")?.map(|word| word.parse().map_err(|_| wrong("NSpid"))).collect::<Result<_, _>>()?,
            capabilities,
            no_new_privs: number("NoNewPrivs", 10)? == 1,
            seccomp: number("Seccomp", 10)?,
            filters: number("Seccomp_filters", 10)?,
        })
    }

    /// Whether it has ended, or does so without a way back.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X') || self.umask.is_none()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A jailed thread's, as Linux 6.1 writes it.
    pub const JAILED: &str = "\
Name:	core
Umask:	0077
State:	S (sleeping)
Tgid:	99
Ngid:	0
Pid:	99
PPid:	97
TracerPid:	0
Uid:	1879048192	1879048192	1879048192	1879048192
Gid:	1879048192	1879048192	1879048192	1879048192
FDSize:	64
Groups:	 
NStgid:	99	1
NSpid:	99	1
NSpgid:	99	1
NSsid:	99	1
Threads:	9
CapInh:	0000000000000000
CapPrm:	0000000000000000
CapEff:	0000000000000000
CapBnd:	0000000000000000
CapAmb:	0000000000000000
NoNewPrivs:	1
Seccomp:	2
Seccomp_filters:	5
";

    #[test]
    fn a_jailed_threads_status_is_read() {
        let status = Status::parse(JAILED).unwrap();
        assert_eq!((status.name.as_str(), status.state, status.parent), ("core", 'S', 97));
        assert_eq!(status.uids, [1_879_048_192; 4]);
        assert!(status.groups.is_empty());
        assert_eq!(status.umask, Some(0o077));
        assert_eq!(status.ids, [99, 1]);
        assert_eq!(status.capabilities, [0; 5]);
        assert!(status.no_new_privs && !status.has_ended());
        assert_eq!((status.seccomp, status.filters), (2, 5));
    }

    #[test]
    fn what_is_not_zero_is_read_as_well() {
        let text = JAILED.replace("Groups:	 ", "Groups:	4 27 ");
        let text = text.replace("CapBnd:	0000000000000000", "CapBnd:	000001ffffffffff");
        let status = Status::parse(&text.replace("State:	S (sleeping)", "State:	Z (zombie)")).unwrap();
        assert_eq!(status.groups, [4, 27]);
        assert_eq!(status.capabilities, [0, 0, 0, 0x1ff_ffff_ffff, 0]);
        assert!(status.has_ended());
    }

    #[test]
    fn a_thread_without_an_umask_is_about_to_end() {
        assert!(Status::parse(&JAILED.replace("Umask:	0077\n", "")).unwrap().has_ended());
    }

    #[test]
    fn a_missing_or_mangled_line_is_named() {
        let error = |text: String| Status::parse(&text).unwrap_err();
        assert_eq!(error(JAILED.replace("Seccomp:", "Secret:")), "no line Seccomp");
        assert_eq!(error(JAILED.replace("Umask:	0077", "Umask:	99")), "the line Umask makes no sense");
    }

    #[test]
    fn this_process_has_a_status() {
        Status::parse(&std::fs::read_to_string("/proc/self/status").unwrap()).unwrap();
    }
}
