//! `ozone`: launches and supervises one virtual machine.
//!
//! load spec → open resources → spawn → boot core → attach devices → supervise

use std::io::Write;
use std::process::ExitCode;

use ozone::cli::{self, Command, Options, Parsed};
use ozone::exit::Ending;
use ozone::report;
use ozone::resources::{self, Resources, terminal};
use ozone::spec::{self, VmSpec, file::SpecFile};
use ozone::supervisor::{Signals, Spawned};
use ozone::trace::Trace;
use ozone::uids::Uids;
use protocol::Fault;

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
        Command::Run(options) => end(&run(&options).unwrap_or_else(Ending::Fault)),
    }
}

/// `ozone run`: a machine from its description to its end.
fn run(options: &Options) -> Result<Ending, Fault> {
    let started = protocol::trace::now();
    let spec = spec::load(options)?;
    let trace = Trace::new(resources::trace_file(options.boot_trace.as_deref())?);
    trace.done(started, &"resolve the machine");
    let signals = Signals::take().map_err(|errno| Fault::host(format!("signalfd: {errno}")))?;
    let start = trace.now();
    let resources = Resources::open(&spec)?;
    trace.done(start, &"open resources");
    let start = trace.now();
    let uids = Uids::claim()?;
    trace.done(start, &"claim uids");
    resources.announce(&spec);
    uids.announce();
    let ending = loop {
        let ending = launch(&spec, &resources, &uids, &signals, &trace).unwrap_or_else(|ending| ending);
        match ending {
            Ending::Reset if spec.reboot => report::say("the guest reset itself: starting again"),
            ending => break ending,
        }
    };
    trace.write();
    Ok(ending)
}

/// One incarnation of the machine: at the first start and after a reset alike.
fn launch(
    spec: &VmSpec,
    resources: &Resources,
    uids: &Uids,
    signals: &Signals,
    trace: &Trace,
) -> Result<Ending, Ending> {
    let spawned = Spawned::launch(spec, resources, uids, signals, trace)?;
    let booting = spawned.boot()?;
    let running = booting.attach()?;
    Ok(running.supervise())
}

/// `ozone spec`: the machine that the options describe.
fn resolve(options: &Options) -> Result<String, Fault> {
    let spec = spec::load(options)?;
    let text = serde_json::to_string_pretty(&SpecFile::from(&spec));
    text.map(|text| text + "\n").map_err(|error| Fault::internal(format!("write the spec: {error}")))
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => end(&Ending::Fault(Fault::host(format!("standard output: {error}")))),
    }
}

/// The last line and the exit code.
fn end(ending: &Ending) -> ExitCode {
    report::say_last(&ending.to_string());
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
