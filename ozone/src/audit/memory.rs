//! `/proc/PID/smaps`: what a process has mapped, and how (proc(5)).

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses, as the kernel writes them.
    pub range: String,
    /// Whether the process can write there.
    pub write: bool,
    /// Whether it can execute what is there.
    pub execute: bool,
    /// Device and inode of the file, as the kernel writes them; inode `0` without one.
    pub file: (String, u64),
    /// The file's path, or what else the kernel calls it.
    pub name: String,
    /// Whether it is left out of core dumps (madvise(2), MADV_DONTDUMP): the flag `dd`.
    pub undumped: bool,
}

impl Mapping {
    /// Whether it is memory that memfd_create(2) made.
    pub fn is_memfd(&self) -> bool {
        self.name.starts_with("/memfd:")
    }
}

/// Reads the file's text.
///
/// # Errors
/// What makes no sense; a mapping without flags (a kernel without CONFIG_PROC_PAGE_MONITOR has none).
pub fn parse(text: &str) -> Result<Vec<Mapping>, String> {
    let mut mappings: Vec<Mapping> = Vec::new();
    let mut flags = 0;
    for line in text.lines() {
        if let Some(words) = line.strip_prefix("VmFlags:") {
            if let Some(mapping) = mappings.last_mut() {
                mapping.undumped = words.split_whitespace().any(|word| word == "dd");
                flags += 1;
            }
        } else if let Some(mapping) = heading(line) {
            mappings.push(mapping);
        }
    }
    if flags == mappings.len() && flags > 0 { Ok(mappings) } else { Err("smaps has mappings without flags".to_owned()) }
}

/// The first line of a mapping; every other line begins with a word and a colon.
fn heading(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (range, access, _offset) = (words.next()?, words.next()?, words.next()?);
    let (device, inode) = (words.next()?, words.next()?.parse().ok()?);
    let (start, end) = range.split_once('-')?;
    u64::from_str_radix(start, 16).ok().zip(u64::from_str_radix(end, 16).ok())?;
    Some(Mapping {
        range: range.to_owned(),
        write: access.contains('w'),
        execute: access.contains('x'),
        file: (device.to_owned(), inode),
        name: words.collect::<Vec<_>>().join(" "),
        undumped: false,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Of a core, as Linux 6.1 writes it, shortened.
    pub const CORE: &str = "\
7f2a73400000-7f2a73600000 rw-p 00000000 00:00 0 
Size:               2048 kB
VmFlags: rd wr mr mw me ac sd 
7f2a73600000-7f2a83600000 rw-s 00000000 00:01 2                          /memfd:guest-memory-0 (deleted)
Size:             262144 kB
Rss:              126536 kB
VmFlags: rd wr sh mr mw me ms nr dd sd hg 
7f2a8383d000-7f2a8397b000 r-xp 00070000 00:14 347                        /usr/local/bin/vmm-core
Size:               1272 kB
VmFlags: rd ex mr mw me sd 
";

    #[test]
    fn mappings_are_read_with_their_flags() {
        let mappings = parse(CORE).unwrap();
        let [heap, guest, text] = mappings.as_slice() else { panic!("{mappings:?}") };
        assert!(heap.write && !heap.execute && !heap.undumped && !heap.is_memfd());
        assert!(guest.is_memfd() && guest.undumped);
        assert_eq!(guest.file, ("00:01".to_owned(), 2));
        assert!(text.execute && !text.write);
        assert_eq!(text.name, "/usr/local/bin/vmm-core");
    }

    #[test]
    fn a_mapping_without_flags_is_an_error() {
        assert!(parse(&CORE.replace("VmFlags: rd ex mr mw me sd", "")).is_err());
        assert!(parse("").is_err());
    }
}
