//! `docs/seccomp.md`, made from the tables.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use crate::filter::{Check, Rule};
use crate::names;
use crate::policy::{self, CoreThread, Role, backend, blk, console, core, net, ozone, program, start};

/// The variable that has the file written instead of compared.
const WRITE: &str = "OZONE_WRITE_DOCS";

const HEAD: &str = "\
# System calls

Made from the tables in `seccomp/src/policy/`; `OZONE_WRITE_DOCS=1 cargo test -p seccomp` writes it anew.

A call that is in none of the tables in force is not made. It ends its process with SIGSYS and a report of which call it
was ([decision 10](decisions/0010-a-forbidden-call-is-reported.md)); a call of another architecture, x32 among them, ends
it without a report. Arguments are counted from 0, and their lower 32 bits are looked at. Several lines for one call are
alternatives.

## How many

Different calls that a filter lets through, with the arguments that the tables below ask for.

| process | thread | launch | set-up | run |
|---|---|---|---|---|
";

const PROGRAM: &str = "
## A program of `ozone jail`

Nothing is known of it: what these tables do not name it may call. Every alternative of `--seccomp` ends it at a call of
another architecture, x32 among them, but `--seccomp none`.
";

const OZONE: &str = "
## ozone itself

From before its first child, which inherits it: so it has the tables below and besides all of those above, but for the calls
that are answered. What files it may open is for its Landlock domain to say, and a child has its own filters on top
([decision 11](decisions/0011-ozone-confines-itself.md)).
";

fn calls(tables: &[&[Rule]]) -> usize {
    tables.iter().flat_map(|table| table.iter()).map(|rule| rule.syscall).collect::<BTreeSet<_>>().len()
}

fn check(check: &Check) -> String {
    match check {
        Check::Equals(argument, value) => format!("{argument} = {value:#x}"),
        Check::Differs(argument, value) => format!("{argument} ≠ {value:#x}"),
        Check::Masked(argument, bits, value) => format!("{argument} & {bits:#x} = {value:#x}"),
        Check::Without(argument, bits) => format!("{argument} & {bits:#x} = 0"),
    }
}

fn section(text: &mut String, title: &str, rules: &[Rule]) {
    writeln!(text, "\n### {title}\n\n| call | arguments | why |\n|---|---|---|").unwrap();
    for rule in rules {
        let name = names::name(rule.syscall).unwrap();
        let checks = rule.checks.iter().map(check).collect::<Vec<_>>().join(", ");
        writeln!(text, "| {name} | {checks} | {} |", rule.reason).unwrap();
    }
}

fn document() -> String {
    let mut text = HEAD.to_owned();
    let mut count = |process: Role, thread: &str, run: &[Rule]| {
        let setup = policy::setup(process);
        let (launch, setup, run) = (calls(&[&setup, start::EXEC]), calls(&[&setup]), calls(&[run]));
        writeln!(text, "| {process} | {thread} | {launch} | {setup} | {run} |").unwrap();
    };
    for thread in CoreThread::ALL {
        count(Role::Core, &thread.to_string(), &core::run(thread));
    }
    for role in [Role::Blk, Role::Net, Role::Console] {
        count(role, "every", &policy::run(role));
    }
    text.push_str(
        "\nLaunch is all of a process's tables, set-up all but the first, run those from when it is ready.\n",
    );

    writeln!(
        text,
        "\nThe filter of `ozone` lets {} calls through, with children that make their roots themselves {}.",
        calls(&[&ozone::allowed(false)]),
        calls(&[&ozone::allowed(true)])
    )
    .unwrap();

    text.push_str("\n## Every process\n");
    section(&mut text, "From the jailer's last step to main (launch)", start::EXEC);
    section(&mut text, "Until it is ready (set-up)", start::SETUP);
    section(&mut text, "Answered with EPERM until it is ready, and forbidden afterwards", start::ANSWERED);
    section(&mut text, "Answered with ENOSYS until it is ready, and forbidden afterwards", start::ABSENT);

    text.push_str("\n## The core\n");
    section(&mut text, "Until the vCPUs start (set-up)", core::LAUNCH);
    section(&mut text, "Every thread (run)", core::ALL);
    section(&mut text, "Main thread, besides (run)", core::MAIN);
    section(&mut text, "Control thread, besides (run, from its start)", core::CONTROL);
    section(&mut text, "Serial thread, besides (run, from its start)", core::SERIAL);
    section(&mut text, "Attendant threads, besides (run, from the first backend's attachment)", core::ATTENDANT);
    section(&mut text, "vCPU threads, besides (run, from before the first instruction)", core::VCPU);

    text.push_str("\n## Every backend\n");
    section(&mut text, "Until it is ready (set-up)", backend::LAUNCH);
    section(&mut text, "Every thread (run)", backend::RUN);
    text.push_str("\n## blk, besides\n");
    section(&mut text, "Until it is ready (set-up)", blk::LAUNCH);
    section(&mut text, "Every thread (run)", blk::RUN);
    text.push_str("\n## net, besides\n");
    section(&mut text, "Every thread (run)", net::RUN);
    text.push_str("\n## console, besides\n");
    section(&mut text, "Until it is ready (set-up)", console::LAUNCH);
    section(&mut text, "Every thread (run)", console::RUN);
    text.push_str(OZONE);
    section(&mut text, "ozone's own calls", ozone::OWN);
    section(&mut text, "A child's way through its jail", ozone::STEPS);
    section(&mut text, "Besides, with an ordinary user's children", ozone::MOUNTS);
    section(&mut text, "What a child's own filter answers", ozone::ANSWERED);
    text.push_str(PROGRAM);
    section(&mut text, "Refused with EPERM", program::DENIED);
    section(&mut text, "Answered with ENOSYS", program::ABSENT);
    section(&mut text, "Allowed to the jail's first process, and nothing else", program::INIT);
    text
}

#[test]
fn the_document_is_that_of_the_tables() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/seccomp.md");
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, document()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == document(), "docs/seccomp.md is out of date: write it with {WRITE}=1 cargo test -p seccomp");
}
