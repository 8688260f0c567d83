//! `--source`: what of the host a jailed program sees.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// One directory, file or device of the host in the jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its path on the host, from the root. The operator's symbolic links in it are followed ([`crate::directory::walk`]).
    pub path: PathBuf,
    /// Its path in the jail, from the root: plain names.
    pub target: PathBuf,
    /// What it may be used for.
    pub uses: Uses,
    /// The option as the user wrote it, for messages.
    pub argument: String,
}

/// What a source may be used for beyond reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// `rw`: it may be written.
    pub write: bool,
    /// `dev`: devices in it may be opened.
    pub devices: bool,
    /// `exec`: programs and libraries in it may be executed.
    pub execute: bool,
}

impl Source {
    /// Reads `PATH[:TARGET][:KEYS]`; a path that is relative is so to `here`.
    ///
    /// # Errors
    /// What is wrong, as a clause.
    pub fn parse(text: &OsString, here: &Path) -> Result<Self, String> {
        let mut fields = fields(text.as_bytes()).into_iter();
        let path = PathBuf::from(OsString::from_vec(fields.next().unwrap_or_default()));
        let second = fields.next();
        let (target, keys) = match second {
            Some(field) if field.first() == Some(&b'/') => (Some(field), fields.next()),
            other => (None, other),
        };
        if fields.next().is_some() || path.as_os_str().is_empty() {
            return Err("write it as PATH, PATH:TARGET, PATH:KEYS or PATH:TARGET:KEYS".to_owned());
        }
        if text.as_bytes().contains(&0) {
            return Err("no path has a NUL in it".to_owned());
        }
        let uses = keys.map_or(Ok(Uses::default()), |keys| uses(&String::from_utf8_lossy(&keys)))?;
        let path = here.join(path);
        let given = target.is_some();
        let target = target.map_or_else(|| path.clone(), |target| PathBuf::from(OsString::from_vec(target)));
        // From plain names alone: "." and slashes too many are gone.
        let plain: PathBuf = target.components().collect();
        let is_plain = |component: Component<'_>| matches!(component, Component::RootDir | Component::Normal(_));
        if !plain.components().all(is_plain) {
            let remedy = if given { "" } else { "; say where in the jail it is: PATH:TARGET" };
            return Err(format!("'..' in the path of the jail{remedy}"));
        }
        if plain == Path::new("/") {
            return Err("the root is the jail's own; say where in it this is: PATH:TARGET".to_owned());
        }
        Ok(Self { path, target: plain, uses, argument: format!("--source {}", text.to_string_lossy().escape_debug()) })
    }
}

/// The parts between colons that no backslash stands before.
fn fields(text: &[u8]) -> Vec<Vec<u8>> {
    let mut fields = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let escaped = byte == b'\\' && bytes.peek() == Some(&b':');
        match (byte, fields.last_mut()) {
            (b':', _) => fields.push(Vec::new()),
            (_, Some(field)) => field.push(if escaped { bytes.next().unwrap_or(byte) } else { byte }),
            (_, None) => {}
        }
    }
    fields
}

fn uses(keys: &str) -> Result<Uses, String> {
    let mut uses = Uses::default();
    for key in keys.split(',') {
        let flag = match key {
            "rw" => &mut uses.write,
            "dev" => &mut uses.devices,
            "exec" => &mut uses.execute,
            other => {
                let hint = if other.starts_with('/') { "" } else { "; a path in the jail begins with /" };
                return Err(format!("unknown key '{}'; the keys are rw, dev, exec{hint}", other.escape_debug()));
            }
        };
        if std::mem::replace(flag, true) {
            return Err(format!("the key '{key}' is given twice"));
        }
    }
    Ok(uses)
}

/// Whether no source is where another is, or inside of it. A place in a source would have to be made in it, on the host.
///
/// # Errors
/// The argument of one, and what is wrong with it as a clause.
pub fn check_apart(sources: &[Source], executable: &Path) -> Result<(), (String, String)> {
    for (index, source) in sources.iter().enumerate() {
        if source.target.starts_with(executable) {
            let problem = format!("{} is where the program is; give another target", executable.display());
            return Err((source.argument.clone(), problem));
        }
        if executable.starts_with(&source.target) {
            let problem = format!("the program is in it, as {}; give another target", executable.display());
            return Err((source.argument.clone(), problem));
        }
        for other in sources.iter().take(index) {
            if source.target.starts_with(&other.target) || other.target.starts_with(&source.target) {
                let problem = format!(
                    "{} and {} of '{}' are one in the other; give another target",
                    source.target.display(),
                    other.target.display(),
                    other.argument
                );
                return Err((source.argument.clone(), problem));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(String, String, String), String> {
        Source::parse(&text.into(), Path::new("/here")).map(|source| {
            let Uses { write, devices, execute } = source.uses;
            let keys = [(write, 'w'), (devices, 'd'), (execute, 'x')];
            let text = |path: &Path| path.to_str().unwrap().to_owned();
            let keys = keys.iter().filter(|(is, _)| *is).map(|(_, key)| key).collect();
            (text(&source.path), text(&source.target), keys)
        })
    }

    #[test]
    fn a_source_is_read_only_unless_said_otherwise() {
        for (text, path, target, keys) in [
            ("/srv/www", "/srv/www", "/srv/www", ""),
            ("/srv/www:/www", "/srv/www", "/www", ""),
            ("/srv/www:rw", "/srv/www", "/srv/www", "w"),
            ("/srv/www:/www:rw,exec", "/srv/www", "/www", "wx"),
            ("/dev/kvm:dev,rw", "/dev/kvm", "/dev/kvm", "wd"),
            ("data", "/here/data", "/here/data", ""),
            ("./a//b/", "/here/./a//b/", "/here/a/b", ""),
            ("../x:/x", "/here/../x", "/x", ""),
            (r"/a\:b:/c", "/a:b", "/c", ""),
            (r"/a\b", r"/a\b", r"/a\b", ""),
        ] {
            assert_eq!(parse(text), Ok((path.to_owned(), target.to_owned(), keys.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_said_in_a_clause() {
        for (text, problem) in [
            ("", "write it as"),
            (":/x", "write it as"),
            ("/a:/b:rw:x", "write it as"),
            ("/a:ro", "the keys are rw, dev, exec"),
            ("/a:b/c", "begins with /"),
            ("/a:rw,rw", "given twice"),
            ("/a:", "unknown key ''"),
            ("../a", "PATH:TARGET"),
            ("/a:/b/../../c", "'..'"),
            ("/", "the root is the jail's own"),
            ("/a:/.", "the root is the jail's own"),
        ] {
            let wrong = parse(text).expect_err(text);
            assert!(wrong.contains(problem) && wrong.lines().count() == 1, "{text}: {wrong}");
        }
    }

    #[test]
    fn no_source_is_in_another_or_over_the_program() {
        let check = |texts: &[&str]| {
            let sources: Vec<Source> =
                texts.iter().map(|text| Source::parse(&text.into(), Path::new("/")).unwrap()).collect();
            check_apart(&sources, Path::new("/program"))
        };
        assert_eq!(check(&["/a", "/ab", "/b/a", "/b/c"]), Ok(()));
        for wrong in [&["/a", "/a"][..], &["/a", "/a/b"], &["/a/b", "/a"], &["/x:/program"], &["/x:/program/y"]] {
            assert!(check(wrong).is_err(), "{wrong:?}");
        }
    }
}
