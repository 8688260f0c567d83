//! `--resource-limit`: setrlimit(2) by name.

use nix::sys::resource::{RLIM_INFINITY, Resource};

use crate::spec::size;

/// One limit of a jailed program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceLimit {
    /// Which.
    pub resource: Resource,
    /// Its name, for messages.
    pub name: &'static str,
    /// What holds, in the resource's unit.
    pub soft: u64,
    /// How far the program may raise that.
    pub hard: u64,
    /// Whether it was asked for: a default is never more than `ozone` itself has.
    pub given: bool,
}

/// How many descriptors a program has if nobody says otherwise, as in Firecracker's jailer.
const DESCRIPTORS: u64 = 2048;

/// Every resource, with its name: that of the constant, in small letters. Firecracker's `no-file` is another one for `nofile`.
const NAMES: [(&str, Resource); 16] = [
    ("as", Resource::RLIMIT_AS),
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("rttime", Resource::RLIMIT_RTTIME),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

impl ResourceLimit {
    /// Reads `NAME=SOFT[:HARD]`; values are numbers, sizes with a unit, or `unlimited`.
    ///
    /// # Errors
    /// What is wrong, as a clause.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("write it as NAME=VALUE, for example no-file=1024")?;
        let plain = if name == "no-file" { "nofile" } else { name };
        let Some((name, resource)) = NAMES.into_iter().find(|(known, _)| *known == plain) else {
            let known = NAMES.map(|(name, _)| name).join(", ");
            return Err(format!("unknown resource '{}'; they are {known}", name.escape_debug()));
        };
        let (soft, hard) = value.split_once(':').unwrap_or((value, value));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(
                "the first value, which holds, cannot be above the second, up to which it may be raised".to_owned()
            );
        }
        Ok(Self { resource, name, soft, hard, given: true })
    }

    /// The limits of a program for which `given` were asked.
    ///
    /// # Errors
    /// What is wrong, as a clause, when one is given twice.
    pub fn complete(given: Vec<Self>) -> Result<Vec<Self>, String> {
        for (index, limit) in given.iter().enumerate() {
            if given.iter().take(index).any(|other| other.resource == limit.resource) {
                return Err(format!("{} is given twice", limit.name));
            }
        }
        let default = |name, resource, value| Self { resource, name, soft: value, hard: value, given: false };
        let mut limits =
            vec![default("core", Resource::RLIMIT_CORE, 0), default("nofile", Resource::RLIMIT_NOFILE, DESCRIPTORS)];
        limits.retain(|limit| given.iter().all(|other| other.resource != limit.resource));
        limits.extend(given);
        Ok(limits)
    }
}

fn number(text: &str) -> Result<u64, String> {
    if text == "unlimited" {
        return Ok(RLIM_INFINITY);
    }
    size::parse(text).map_err(|_| {
        format!("'{}' is not a value; it is a number, perhaps with K, M, G or T, or unlimited", text.escape_debug())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_setrlimit_and_of_firecracker() {
        for (text, name, soft, hard) in [
            ("no-file=1024", "nofile", 1024, 1024),
            ("nofile=10:20", "nofile", 10, 20),
            ("fsize=250000000", "fsize", 250_000_000, 250_000_000),
            ("as=1G:unlimited", "as", 1 << 30, RLIM_INFINITY),
            ("core=0", "core", 0, 0),
        ] {
            let limit = ResourceLimit::parse(text).unwrap();
            assert_eq!((limit.name, limit.soft, limit.hard), (name, soft, hard), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_said_in_a_clause() {
        for text in ["nofile", "files=1", "nofile=", "nofile=x", "nofile=2:1", "nofile=-1", "nofile=1:"] {
            let wrong = ResourceLimit::parse(text).expect_err(text);
            assert_eq!(wrong.lines().count(), 1, "{wrong}");
        }
        let twice = ["nofile=1", "no-file=2"].map(|text| ResourceLimit::parse(text).unwrap());
        assert!(ResourceLimit::complete(twice.into()).is_err());
    }

    #[test]
    fn no_core_dumps_unless_asked_for() {
        let core = |given: &[&str]| {
            let given = given.iter().map(|text| ResourceLimit::parse(text).unwrap()).collect();
            let limits = ResourceLimit::complete(given).unwrap();
            let found: Vec<u64> = limits.iter().filter(|limit| limit.name == "core").map(|limit| limit.hard).collect();
            found
        };
        assert_eq!(core(&[]), [0]);
        assert_eq!(core(&["core=5"]), [5]);
    }
}
