//! What an access to a port or a register costs that the core answers: from a guest of a few instructions, whose empty
//! loop is measured beside it and taken off.

use std::cell::Cell;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ozone_tests::payload::Code;
use ozone_tests::vm::Vm;
use tempfile::NamedTempFile;

use crate::bench::{Contender, Context, Figure, Row};

/// Enough that the way of a byte over the serial port, some 100 µs, does not count.
const COUNT: u32 = 20_000;

/// The keyboard controller's status: the plainest device there is.
const PORT: u16 = 0x64;

/// The interrupt status register of the first virtio device: what a guest reads at each of its interrupts.
const REGISTER: u64 = 0xd000_0060;

const PATIENCE: Duration = Duration::from_secs(60);

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let nothing = Cell::new(f64::NAN);
    let loop_alone = || {
        let each = microseconds(Code::default().print("B").times(COUNT, &[0x90]))?;
        nothing.set(each);
        Ok(vec![Figure::new("each turn", "µs", each)])
    };
    let exit = |code: Code| {
        let nothing = &nothing;
        move || Ok(vec![Figure::new("each exit", "µs", microseconds(code.clone())? - nothing.get())])
    };
    context.compare(vec![
        Contender::new("empty loop", loop_alone),
        Contender::new("read of a port", exit(Code::default().print("B").read_port(PORT, COUNT))),
        Contender::new("read of a register", exit(Code::default().print("B").read_memory(REGISTER, COUNT))),
    ])
}

/// Time of each turn of the loop that `code` ends with, between the `B` that it has printed and what is printed after it.
fn microseconds(code: Code) -> Result<f64> {
    let mut kernel = NamedTempFile::new()?;
    kernel.write_all(&code.print("E\n").power_off().elf())?;
    let mut vm = Vm::start([
        "run".as_ref(),
        "--kernel".as_ref(),
        kernel.path().as_os_str(),
        "--memory".as_ref(),
        "64M".as_ref(),
        "--console".as_ref(),
        "stdio".as_ref(),
    ])?;
    vm.expect("B", PATIENCE)?;
    let start = Instant::now();
    let rest = vm.expect("E\n", PATIENCE)?;
    let taken = start.elapsed();
    ensure!(rest.is_empty(), "the payload printed '{rest}'");
    vm.expect_exit(0, PATIENCE)?;
    Ok(taken.as_secs_f64() * 1e6 / f64::from(COUNT))
}
