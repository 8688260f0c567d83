//! The suites, one file each.

mod blk_native;
mod boot;
mod exits;
mod guest_io;
mod launch;
mod memory;
mod net_native;

use std::path::PathBuf;

use anyhow::Result;
use ozone_tests::host::{DEFAULT_MEMORY, Put};
use ozone_tests::{build, vm};

use super::{Context, Row, partners};

/// Where a suite runs.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// On this machine: what needs no guest, or one of a few instructions.
    Here,
    /// In the test host.
    TestHost {
        /// The host's memory in bytes.
        memory: u64,
    },
    /// In test hosts whose time is the number of executed instructions, one for each contender and run.
    Counted {
        /// Each host's memory in bytes.
        memory: u64,
        /// The contenders' names.
        contenders: fn() -> Result<Vec<String>>,
    },
}

/// One suite.
pub struct Suite {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it measures, in one line.
    pub about: &'static str,
    /// Where it runs.
    pub place: Place,
    /// What it needs in the test host beside the product.
    pub puts: fn() -> Result<Vec<Put>>,
    /// Measures.
    pub run: fn(&Context) -> Result<Vec<Row>>,
}

fn nothing() -> Result<Vec<Put>> {
    Ok(Vec::new())
}

/// The load generator for the test host.
fn load() -> Result<Vec<Put>> {
    Ok(vec![Put::executable(load_program()?)])
}

/// The load generator, which is built here and put into the test host.
fn load_program() -> Result<PathBuf> {
    if std::env::var_os(agent::layout::IN_HOST).is_none() {
        build::cargo(["build", "--quiet", "--release", "--package", "load"])?;
    }
    Ok(vm::executable("load"))
}

/// Every suite there is.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "exits",
        about: "an access to a port and to a register, answered by the core",
        place: Place::Here,
        puts: nothing,
        run: exits::run,
    },
    Suite {
        name: "launch",
        about: "from the exec of ozone to the first instruction of a guest, step by step",
        place: Place::Here,
        puts: nothing,
        run: launch::run,
    },
    Suite {
        name: "boot",
        about: "a Linux guest from the exec of its VMM to its init and its end, beside QEMU",
        place: Place::TestHost { memory: DEFAULT_MEMORY },
        puts: partners::qemu,
        run: boot::run,
    },
    Suite {
        name: "boot-counted",
        about: "the same, where every executed instruction of host and guest is a nanosecond",
        place: Place::Counted { memory: DEFAULT_MEMORY, contenders: boot::contenders },
        puts: partners::qemu,
        run: boot::run,
    },
    Suite {
        name: "memory",
        about: "what the Nth machine costs, per process and to the host",
        place: Place::TestHost { memory: DEFAULT_MEMORY },
        puts: nothing,
        run: memory::run,
    },
    Suite {
        name: "blk-native",
        about: "the disk's backend alone, beside qemu-storage-daemon and fio on the file",
        place: Place::Here,
        puts: nothing,
        run: blk_native::run,
    },
    Suite {
        name: "net-native",
        about: "the network interface's backend alone, beside vhost-net and reads and writes on the tap",
        place: Place::Here,
        puts: nothing,
        run: net_native::run,
    },
    Suite {
        name: "net-native-host",
        about: "the same in the test host, which has the kernel's vhost-net",
        place: Place::TestHost { memory: DEFAULT_MEMORY },
        puts: load,
        run: net_native::run,
    },
    Suite {
        name: "guest-io",
        about: "disk and network as a guest's programs see them, beside QEMU",
        place: Place::TestHost { memory: DEFAULT_MEMORY },
        puts: guest_io::puts,
        run: guest_io::run,
    },
];
