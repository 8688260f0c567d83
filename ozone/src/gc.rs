//! `ozone gc`: undoes what killed machines, and jails of `ozone jail`, have left. A start with the same name does so for its own.

use std::fmt::Write as _;
use std::path::Path;

use protocol::Fault;
use serde::Serialize;

use crate::directory::Directory;
use crate::jailer::record::{self, State};
use crate::journal::{Leftover, Undone};
use crate::report::{self, harmless};
use crate::runtime::{self, Base, Home, RuntimeError};
use crate::uids;

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The machines that were found.
    pub machines: Vec<Found>,
    /// The jails that were found.
    pub jails: Vec<Found>,
    /// What was of no machine and is removed.
    pub removed: Vec<String>,
}

/// What came of one machine or jail.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Found {
    /// Its name; of a machine without one an underscore and its process id.
    pub name: String,
    /// Whether it runs, and nothing was touched.
    pub running: bool,
    /// What is removed.
    pub removed: Vec<String>,
    /// What has taken the place of something that was to be removed, and stays.
    pub stays: Vec<String>,
    /// What could not be removed.
    pub left: Vec<Left>,
}

/// Something that could not be removed.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Left {
    /// What.
    pub object: String,
    /// Why.
    pub reason: String,
}

/// Undoes what killed machines and jails of this user have left: those of these names, or all.
///
/// # Errors
/// An input fault for a name that is none; a host fault if nothing can be read.
pub fn collect(names: &[String]) -> Result<Report, Fault> {
    let Some(base) = runtime::directory() else {
        return Err(Fault::input("XDG_RUNTIME_DIR is not set, so no machine and no jail can be found"));
    };
    if let Some(name) = names.iter().find(|name| !runtime::is_directory_name(name)) {
        return Err(Fault::input(format!("machine '{}': no machine can have this name", name.escape_debug())));
    }
    Ok(collect_below(&base, names)?)
}

/// The same for the machines and jails below `base`.
///
/// # Errors
/// [`RuntimeError`].
pub fn collect_below(base: &Path, names: &[String]) -> Result<Report, RuntimeError> {
    let mut report = Report::default();
    let Some(opened) = Base::open(base)? else { return Ok(report) };
    let (machines, found) = match opened.machines()? {
        Some((machines, found)) => (Some(machines), found),
        None => (None, Vec::new()),
    };
    for name in found {
        let name = name.to_string_lossy().into_owned();
        if names.is_empty() || names.contains(&name) {
            report.machines.push(machine(base, machines.as_ref(), name));
        }
    }
    for name in opened.jails()? {
        let name = name.to_string_lossy().into_owned();
        if names.is_empty() || names.contains(&name) {
            report.jails.push(jail(base, name));
        }
    }
    if uids::sweep(&opened)? {
        report.removed.push(format!("file {}", opened.directory().path_of(uids::FILE).display()));
    }
    // As far as nothing else is in it.
    opened.remove();
    Ok(report)
}

fn machine(base: &Path, machines: Option<&Directory>, name: String) -> Found {
    let mut machine = Found { name, ..Found::default() };
    let path = runtime::machine_path(base, &machine.name).display().to_string();
    if !runtime::is_directory_name(&machine.name) {
        machine.leave(format!("file {path}"), "no machine can have this name: it is not ozone's".to_owned());
        return machine;
    }
    let leave =
        |machine: &mut Found, error: RuntimeError| machine.leave(format!("directory {path}"), error.to_string());
    match Home::leftover(base, &machine.name) {
        Ok(Some((home, leftovers))) => {
            machine.undo(&home, leftovers);
            match home.close() {
                Ok(true) => machine.removed.push(format!("directory {path}")),
                Ok(false) => {}
                Err(error) => leave(&mut machine, error),
            }
        }
        // Gone meanwhile, if it is not there.
        Ok(None) => machine.running = machines.is_some_and(|machines| machines.look(&machine.name).is_ok()),
        Err(error) => leave(&mut machine, error),
    }
    machine
}

fn jail(base: &Path, name: String) -> Found {
    let mut jail = Found { name, ..Found::default() };
    let path = base.join(runtime::JAILS).join(&jail.name).display().to_string();
    if !runtime::is_name(&jail.name) {
        jail.leave(format!("file {path}"), "no jail can have this name: it is not ozone's".to_owned());
        return jail;
    }
    match record::undo(base, &jail.name) {
        Ok(State::Running) => jail.running = true,
        Ok(State::Gone) => {}
        Ok(State::Removed(removed)) => jail.removed = removed.iter().map(|object| harmless(object)).collect(),
        Err(error) => jail.leave(format!("directory {path}"), error.to_string()),
    }
    jail
}

/// Undoes what a killed machine of the same name has left, at a start. What cannot be undone stays in the journal.
pub fn undo_before_start(home: &Home, leftovers: Vec<Leftover>) {
    let mut machine = Found::default();
    machine.undo(home, leftovers);
    if !machine.removed.is_empty() {
        let count = machine.removed.len();
        report::say(&format!("a machine of this name was killed: removed what it left, {count} in number"));
    }
    for what in &machine.stays {
        report::say(&format!("of a machine of this name that was killed: {what}; it stays"));
    }
    for Left { object, reason } in &machine.left {
        report::say(&format!("of a machine of this name that was killed {object} stays: {reason}"));
    }
}

impl Found {
    /// Undoes in the reverse order of making.
    fn undo(&mut self, home: &Home, leftovers: Vec<Leftover>) {
        for leftover in leftovers.into_iter().rev() {
            let name = harmless(&leftover.name());
            match leftover.undo(home.directory()) {
                Ok(Undone::Removed) => self.removed.push(name),
                Ok(Undone::Gone) => {}
                Ok(Undone::Replaced(what)) => self.stays.push(harmless(&what)),
                Err(error) => self.leave(name, error.to_string()),
            }
        }
        let unknown = home.journal().unknown();
        if unknown > 0 {
            let reason = "a later version of ozone has written them; use that one".to_owned();
            self.leave(format!("{unknown} lines of its journal"), reason);
        }
    }

    fn leave(&mut self, object: String, reason: String) {
        self.left.push(Left { object: harmless(&object), reason: harmless(&reason) });
    }
}

impl Report {
    /// All that was found, each with what it is.
    fn all(&self) -> impl Iterator<Item = (&'static str, &Found)> {
        let machines = self.machines.iter().map(|machine| ("machine", machine));
        machines.chain(self.jails.iter().map(|jail| ("jail", jail)))
    }

    /// All that was found, each as it is called in a line: a machine by its name alone.
    fn called(&self) -> impl Iterator<Item = (String, &Found)> {
        self.all().map(|(kind, found)| {
            let name = harmless(&found.name);
            (if kind == "jail" { format!("jail {name}") } else { name }, found)
        })
    }

    /// An input fault if one of these names is that of a machine or jail that runs.
    pub fn refusal(&self, names: &[String]) -> Option<Fault> {
        let (kind, found) = self.all().find(|(_, found)| found.running && names.contains(&found.name))?;
        Some(Fault::input(format!("{kind} '{}': it is running; end it first", found.name)))
    }

    /// Whether nothing is left that should not be.
    pub fn is_clean(&self) -> bool {
        self.all().all(|(_, found)| found.left.is_empty())
    }

    /// What was removed and what stays, a line each.
    pub fn lines(&self) -> String {
        let mut text = String::new();
        for (name, found) in self.called() {
            for object in &found.removed {
                let _ = writeln!(text, "{name}: removed {object}");
            }
            for what in &found.stays {
                let _ = writeln!(text, "{name}: {what}; it stays");
            }
        }
        for object in &self.removed {
            let _ = writeln!(text, "removed {object}");
        }
        text
    }

    /// Says what could not be removed; in JSON it is in the report.
    pub fn tell(&self, is_json: bool) {
        for (name, found) in self.called().filter(|_| !is_json) {
            for Left { object, reason } in &found.left {
                report::say(&format!("{name}: {object} is not removed: {reason}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::server::Server;
    use crate::journal::Object;
    use crate::runtime::tests::base;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_running_machine_is_left_alone() {
        let (_parent, base) = base();
        let (home, _) = Home::claim(&base, Some("web1")).unwrap();
        let _server = Server::open(&home).unwrap();
        let report = collect_below(&base, &[]).unwrap();
        assert!(report.machines[0].running && report.is_clean() && report.lines().is_empty());
        assert!(runtime::machine_path(&base, "web1").join("control").exists());
    }

    #[test]
    fn what_is_no_machines_is_told_and_stays() {
        let (parent, base) = base();
        let (home, _) = Home::claim(&base, Some("web1")).unwrap();
        let machines = base.join("machines");
        fs::write(parent.path().join("kept"), "kept").unwrap();
        symlink(parent.path(), machines.join("link")).unwrap();
        fs::write(machines.join("file"), "").unwrap();
        fs::create_dir(machines.join("open")).unwrap();
        fs::create_dir(machines.join("odd name")).unwrap();
        drop(home);
        for _ in 0..2 {
            let report = collect_below(&base, &[]).unwrap();
            let left: Vec<_> =
                report.machines.iter().map(|machine| (machine.name.as_str(), machine.left.len())).collect();
            assert_eq!(left, [("file", 1), ("link", 1), ("odd name", 1), ("open", 1)], "{report:?}");
            assert!(!report.is_clean());
        }
        assert_eq!(fs::read_to_string(parent.path().join("kept")).unwrap(), "kept");
        let report = collect_below(&base, &["web1".to_owned()]).unwrap();
        assert!(report.machines.is_empty());
    }

    #[test]
    fn a_journal_is_undone_from_its_end_and_once() {
        let (parent, base) = base();
        let (home, _) = Home::claim(&base, Some("web1")).unwrap();
        let socket = parent.path().canonicalize().unwrap().join("socket");
        let directory = Directory::at(socket.parent().unwrap()).unwrap();
        let (listening, id) = crate::socket::listen_at(
            &directory,
            "socket".as_ref(),
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::empty(),
            1,
        )
        .unwrap();
        drop(listening);
        let object = Object::Socket {
            directory: directory.path().to_owned(),
            id: directory.id().unwrap(),
            name: "socket".to_owned(),
        };
        let control = home.journal().record(Object::Control).unwrap();
        let entry = home.journal().record(object).unwrap();
        entry.made(crate::journal::Identity::File(id));
        drop((control, entry, home));
        std::os::unix::net::UnixListener::bind(runtime::machine_path(&base, "web1").join("control")).unwrap();
        let report = collect_below(&base, &[]).unwrap();
        let own = runtime::machine_path(&base, "web1").display().to_string();
        let expected =
            [format!("socket {}", socket.display()), "its control socket".to_owned(), format!("directory {own}")];
        assert_eq!(report.machines[0].removed, expected);
        assert!(report.is_clean() && !base.exists() && !socket.exists());
        assert_eq!(collect_below(&base, &[]).unwrap(), Report::default());
    }
}
