//! `ozone`: launches and supervises one virtual machine.
//!
//! load spec → open resources → spawn → boot core → attach devices → supervise

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use ozone::audit;
use ozone::cgroup::Cgroups;
use ozone::cli::{self, Command, Options, Parsed};
use ozone::confine;
use ozone::control::client;
use ozone::control::message::{Answer, Request};
use ozone::control::server::Server;
use ozone::exit::{self, Ending};
use ozone::gc;
use ozone::jail::Ground;
use ozone::jailer;
use ozone::journal::Journal;
use ozone::notify::Notify;
use ozone::record::Recorder;
use ozone::report::{self, Level};
use ozone::resources::{self, Resources, status_file::StatusFile, terminal};
use ozone::runtime::{self, Home};
use ozone::spec::{self, VmSpec, file::SpecFile, policy};
use ozone::supervisor::{Backoff, Setting, Signals, Spawned, Tallies};
use ozone::trace::Trace;
use ozone::uids::Uids;
use protocol::Fault;
use serde::Serialize;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(panicked));
    let command = match cli::parse(std::env::args_os()) {
        Parsed::Command(command) => command,
        Parsed::Text(text) => return print(&text),
        Parsed::Wrong(line) => return end(&Ending::Fault(Fault::input(line))),
    };
    match *command {
        Command::Spec(options) => match resolve(&options) {
            Ok(text) => print(&text),
            Err(fault) => end(&Ending::Fault(fault)),
        },
        Command::Jail(options) => match jailer::run(&options) {
            Ok(outcome) => jailed(outcome),
            Err(fault) => end(&Ending::Fault(fault)),
        },
        Command::Run(options) => end(&recorded(&options)),
        Command::Restart { name, devices, all: _ } => {
            ask(client::devices(&devices).and_then(|devices| client::ask(&name, &Request::Restart { devices })))
        }
        Command::Pause { name } => ask(client::ask(&name, &Request::Pause)),
        Command::Resume { name } => ask(client::ask(&name, &Request::Resume)),
        Command::Status { name, json } => match client::ask(&name, &Request::Status) {
            Ok(Answer::Status(status)) if json => print_json(&status),
            Ok(Answer::Status(status)) => print(&client::table(&status)),
            other => ask(other),
        },
        Command::Audit { name, all, json } => match audit::examine(&name) {
            Ok(report) => {
                let printed = if json { print_json(&report) } else { print(&report.table(all)) };
                if report.holds || printed != ExitCode::SUCCESS { printed } else { ExitCode::from(exit::BROKEN) }
            }
            Err(fault) => end(&Ending::Fault(fault)),
        },
        Command::Gc { names, json } => match gc::collect(&names) {
            Ok(report) => {
                report.tell(json);
                let printed = if json { print_json(&report) } else { print(&report.lines()) };
                match report.refusal(&names) {
                    // What is removed all the same has been told.
                    Some(fault) => end(&Ending::Fault(fault)),
                    None if report.is_clean() || printed != ExitCode::SUCCESS => printed,
                    None => ExitCode::from(exit::BROKEN),
                }
            }
            Err(fault) => end(&Ending::Fault(fault)),
        },
        Command::Stat { name, json } => match client::ask(&name, &Request::Usage) {
            Ok(Answer::Usage(usage)) if json => print_json(&usage),
            Ok(Answer::Usage(usage)) => print(&client::usage_table(&name, &usage)),
            other => ask(other),
        },
    }
}

/// `ozone run`: a machine from its description to its end, of which a record is left.
fn recorded(options: &Options) -> Ending {
    let mut recorder = Recorder::begin();
    // What is wrong with the description is said in the form that was asked for, too.
    report::begin(options.log_format.as_deref().and_then(|word| policy::word(word).ok()).unwrap_or_default());
    // Its name is the machine's until the record is in its place: the next of that name comes after it.
    let mut home = None;
    let outcome = described(options, &mut recorder).and_then(|spec| run(options, &spec, &mut home, &mut recorder));
    let ending = outcome.unwrap_or_else(Ending::Fault);
    recorder.end(&ending);
    ending
}

/// The machine that the options describe, once it is known how its lines look.
fn described(options: &Options, recorder: &mut Recorder) -> Result<VmSpec, Fault> {
    let spec = spec::load(options).inspect_err(|_| {
        // A description that cannot be used has an end as well, unless a machine of its name is still to have one.
        let free = spec::name_of(options).is_ok_and(|name| name.is_none_or(|name| runtime::is_free(&name)));
        let file = spec::status_file_of(options)
            .filter(|_| free)
            .and_then(|path| StatusFile::open(&path, &Journal::none()).ok());
        recorder.keep(options.name.as_deref(), file);
    })?;
    report::begin(spec.log_format);
    report::name(spec.name.as_deref());
    Ok(spec)
}

/// The machine, from the claim of its name until nothing of it is left but its own directory.
fn run(options: &Options, spec: &VmSpec, home: &mut Option<Home>, recorder: &mut Recorder) -> Result<Ending, Fault> {
    let resolved = protocol::trace::now();
    let signals = Signals::take().map_err(|errno| Fault::host(format!("signalfd: {errno}")))?;
    *home = claim(spec)?;
    let home = home.as_ref();
    let journal = home.map_or_else(Journal::none, Home::journal);
    // The files of a machine are its own only from here on: until then they can be those of one that runs.
    let file = spec.status_file.as_ref().map(|path| StatusFile::open(path, &journal)).transpose()?;
    recorder.keep(spec.name.as_deref(), file);
    let trace = Trace::new(resources::trace_file(options.boot_trace.as_deref())?);
    trace.resolved(recorder.started(), resolved);
    let notify = Notify::from_environment()?;
    let server = home.filter(|_| spec.name.is_some()).map(Server::open).transpose()?;
    let start = trace.now();
    let resources = Resources::open(spec, &journal)?;
    trace.done(start, &"open resources");
    let start = trace.now();
    let uids = Uids::claim(spec, &journal)?;
    resources.refuse_executables_of(&uids)?;
    trace.done(start, &"claim uids");
    let start = trace.now();
    let cgroups = Cgroups::make(spec, &journal)?;
    trace.done(start, &"make cgroups");
    let start = trace.now();
    let ground = Ground::make(uids.identity(0))?;
    trace.done(start, &"make empty root");
    if home.is_none() {
        report::warn(
            "XDG_RUNTIME_DIR is not set: no command finds this machine, and 'ozone gc' not what a kill -9 leaves",
        );
    }
    resources.announce(spec);
    uids.announce();
    ground.announce();
    let start = trace.now();
    confine::confine(ground.layers().landlock, |domain| {
        ground.allow(domain)?;
        resources.allow(domain)?;
        recorder.allow(domain)?;
        uids.allow(domain)?;
        cgroups.allow(domain)?;
        home.map_or(Ok(()), |home| home.allow(domain))
    })?;
    trace.done(start, &"confine ozone");
    let tallies = Tallies::new(spec.devices.len());
    let mut setting = Setting {
        again: false,
        spec,
        resources: &resources,
        uids: &uids,
        ground: &ground,
        cgroups: &cgroups,
        signals: &signals,
        server: server.as_ref(),
        notify: &notify,
        tallies: &tallies,
        trace: &trace,
    };
    let mut failures = Backoff::default();
    let ending = loop {
        match launch(setting, recorder) {
            Ok(Ending::Reset) | Err(Ending::Reset) if spec.reboot => {
                report::say("the guest reset itself: starting again");
                notify.status("the guest reset itself: starting again");
                recorder.reset();
                setting.again = true;
                failures = Backoff::default();
            }
            // A device that may be lost under a running guest may be lost on the way to one that has run.
            Err(Ending::BackendDied { process, how, .. })
                if setting.again && setting.outlives(&process) && cgroups.oom_kill().is_none() =>
            {
                report::warn(&format!("{process} died before the machine ran again: {how}; starting once more"));
                if let Some(signal) = rest(&signals, &notify, failures.after(None)) {
                    break Ending::Signal(signal);
                }
            }
            Ok(ending) | Err(ending) => break ending,
        }
    };
    let ending = ending.with_oom_kill(cgroups.oom_kill());
    recorder.gather(spec, &tallies, &cgroups);
    notify.status(&ending.to_string());
    notify.stopping();
    trace.write();
    Ok(ending)
}

/// Waits before the next start, or for a signal that ends the run. The service manager goes on hearing of `ozone`.
fn rest(signals: &Signals, notify: &Notify, patience: Duration) -> Option<Signal> {
    let deadline = Instant::now() + patience;
    loop {
        let now = Instant::now();
        notify.tick(now);
        let until = notify.deadline().map_or(deadline, |next| next.min(deadline));
        if let Some(signal) = signals.wait(until.saturating_duration_since(now)) {
            return Some(signal);
        }
        if Instant::now() >= deadline {
            return None;
        }
    }
}

/// One incarnation of the machine: at the first start and after a reset alike.
fn launch(setting: Setting<'_>, recorder: &mut Recorder) -> Result<Ending, Ending> {
    setting.notify.tick(Instant::now());
    let spawned = Spawned::launch(setting)?;
    let booting = spawned.boot()?;
    let running = booting.attach().inspect_err(|ending| recorder.ended(ending))?;
    recorder.ran();
    setting.cgroups.enter();
    Ok(running.supervise())
}

/// The machine's own directory, if its user has a place for that. What a killed machine of the same name left is undone.
fn claim(spec: &VmSpec) -> Result<Option<Home>, Fault> {
    let Some(base) = runtime::directory() else { return Ok(None) };
    let (home, leftovers) = Home::claim(&base, spec.name.as_deref())?;
    gc::undo_before_start(&home, leftovers);
    Ok(Some(home))
}

/// What comes of a command to a machine.
fn ask(outcome: Result<Answer, Fault>) -> ExitCode {
    match outcome {
        Ok(_) => ExitCode::SUCCESS,
        Err(fault) => end(&Ending::Fault(fault)),
    }
}

/// `ozone spec`: the machine that the options describe.
fn resolve(options: &Options) -> Result<String, Fault> {
    let spec = spec::load(options)?;
    let text = serde_json::to_string_pretty(&SpecFile::from(&spec));
    text.map(|text| text + "\n").map_err(|error| Fault::internal(format!("write the spec: {error}")))
}

fn print_json(answer: &impl Serialize) -> ExitCode {
    match serde_json::to_string_pretty(answer) {
        Ok(text) => print(&(text + "\n")),
        Err(error) => end(&Ending::Fault(Fault::internal(format!("write the answer: {error}")))),
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => end(&Ending::Fault(Fault::host(format!("standard output: {error}")))),
    }
}

/// What comes of a program in a jail: its own exit code.
fn jailed(outcome: jailer::Outcome) -> ExitCode {
    if let Some(line) = outcome.line {
        report::say_last(if outcome.code == 0 { Level::Info } else { Level::Error }, &line);
    }
    match print(&outcome.output) {
        ExitCode::SUCCESS => ExitCode::from(outcome.code),
        failed => failed,
    }
}

/// The last line and the exit code.
fn end(ending: &Ending) -> ExitCode {
    report::say_last(ending.level(), &ending.to_string());
    ExitCode::from(ending.code())
}

/// A defect of ozone itself. The children end with it, by their parent-death signal.
fn panicked(panic: &std::panic::PanicHookInfo<'_>) {
    terminal::restore();
    let fault = Fault::internal(format!("internal error, please report it: {panic}").replace('\n', " "));
    let ending = Ending::Fault(fault);
    end(&ending);
    std::process::exit(ending.code().into());
}
