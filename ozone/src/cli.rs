//! The command line.

use std::ffi::OsString;

use clap::{Args, Parser, Subcommand, error::ErrorKind};

use crate::exit;
use crate::jailer;

/// Runs a virtual machine with every device in a jailed process of its own.
#[derive(Debug, Parser)]
#[command(name = "ozone", version, after_help = exit::CODES, max_term_width = 100)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

/// What `ozone` is asked to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine until it ends
    #[command(after_help = exit::CODES)]
    Run(Options),
    /// Print the machine that the same options describe as JSON, for --spec
    Spec(Options),
    /// Replace processes of a running machine's devices by new ones; its guest notices nothing. Returns when they serve
    Restart {
        /// The machine, as --name calls it
        name: String,
        /// Its devices, as id= calls them or 'ozone status' does
        #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "DEVICE")]
        devices: Vec<String>,
        /// Every device
        #[arg(long)]
        all: bool,
    },
    /// Stop a running machine's processors and queues. Returns when nothing moves
    Pause {
        /// The machine, as --name calls it
        name: String,
    },
    /// Let a paused machine go on. Returns when its processors run
    Resume {
        /// The machine, as --name calls it
        name: String,
    },
    /// Show how a running machine and its devices are, and how often each was started again
    Status {
        /// The machine, as --name calls it
        name: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what each process of a running machine uses: processor time, threads, reads and writes; and its memory
    Stat {
        /// The machine, as --name calls it
        name: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Undo what killed machines and jails have left on this host: cgroups, sockets, directories. What runs is left alone
    #[command(after_help = GC)]
    Gc {
        /// Machines and jails, as --name calls them; every one of this user if none is given
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Run any program in a jail, as a machine's processes are
    #[command(after_help = jailer::options::HELP)]
    Jail(jailer::Options),
    /// Show which promises about a running machine's processes hold, as the kernel and not the configuration has it
    #[command(after_help = AUDIT)]
    Audit {
        /// The machine, as --name calls it
        name: String,
        /// Every promise, not only those that do not hold
        #[arg(long)]
        all: bool,
        /// As JSON, with every promise, descriptor and limit
        #[arg(long)]
        json: bool,
    },
}

/// What follows the help of `ozone audit`.
const AUDIT: &str = "\
Example: ozone audit web1 --all

The exit code is 0 if every promise holds that can be seen from outside, 1 if one does not, 2 if there is no such machine and
3 if it cannot be read.";

/// What follows the help of `ozone gc`.
const GC: &str = "\
Example: ozone gc web1 --json

Each thing that is removed is a line on standard output, each that is not one on standard error with the reason. What has
taken the place of something, a file of yours at the path of a socket, stays. The exit code is 0 if nothing is left, 1 if
something could not be removed, 2 if a machine or jail that is named runs, and 3 if the directory of the machines or of the jails
cannot be read. It may be run at any time and again; 'ozone run' and 'ozone jail' do the same for one of their own name.";

/// The machine, as options. What an option says goes before what the file of --spec says.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// The kernel: a bzImage or an ELF vmlinux. Example: --kernel vmlinuz
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// The initial ramdisk. Example: --initrd initrd.img
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<String>,
    /// The kernel's command line. Example: --append "console=hvc0 root=/dev/vda"
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// The number of virtual processors, 1 if not given. Example: --cpus 2
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub cpus: Option<String>,
    /// The guest's memory, 256M if not given; K, M, G and T are powers of 1024. Example: --memory 1G
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory: Option<String>,
    /// A disk, from a raw image or a block device; a comma in the path is written twice.
    /// Example: --disk path=root.img,readonly,id=root,queues=2
    /// 'direct' passes the host's page cache by. Every device has restart=always, on-failure or never: when a process of it
    /// that was lost is started again; and on-fail=wait, needs-reset or stop-vm: what a loss means for the guest
    #[arg(long, value_name = "KEYS")]
    pub disk: Vec<String>,
    /// A network interface, on the tap of that name or else on one made for the run.
    /// Example: --net host-ip=192.168.100.1/24,mac=52:54:00:12:34:56,mtu=1500,id=lan
    /// or --net tap=tap0,queues=2
    #[arg(long, value_name = "KEYS")]
    pub net: Vec<String>,
    /// A console: stdio (if none is given), pty, file=PATH or socket=PATH; on a terminal, Ctrl-A x leaves.
    /// Example: --console socket=/tmp/vm.console
    #[arg(long, value_name = "WHERE")]
    pub console: Vec<String>,
    /// The machine's name, by which 'ozone restart', 'pause', 'resume', 'status', 'stat' and 'audit' find it. Example: --name
    /// web1
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// What the machine may use of the host, or one kind of its processes, or one of them; may be given again and again.
    /// Example: --limit memory.max=2G --limit cpu.max="150000 100000" --limit blk:pids.max=64
    /// --limit blk/disk0:io.max="8:0 rbps=10M". Keys and values are those of the kernel's cgroup v2
    #[arg(long, value_name = "KEY=VALUE")]
    pub limit: Vec<String>,
    /// The NUMA node whose processors and memory the machine gets: sets cpuset.cpus and cpuset.mems. Example: --numa 0
    #[arg(long, value_name = "NODE", allow_hyphen_values = true)]
    pub numa: Option<String>,
    /// The cgroup to make the machine's cgroups in, below /sys/fs/cgroup. Example: --cgroup-parent machine.slice
    #[arg(long, value_name = "PATH")]
    pub cgroup_parent: Option<String>,
    /// The first uid of the machine's processes, and their gids: the core has this one and each device the next, in their order.
    /// Without it the machine gets uids that no other machine has. Only for root. Example: --uid-base 100000
    #[arg(long, value_name = "UID", allow_hyphen_values = true)]
    pub uid_base: Option<String>,
    /// The machine as JSON, as printed by `ozone spec`; other options go before it. Example: --spec vm.json
    #[arg(long, value_name = "FILE")]
    pub spec: Option<String>,
    /// End instead of starting again when the guest resets itself. Example: --no-reboot
    #[arg(long)]
    pub no_reboot: bool,
    /// The form of ozone's lines on standard error: text (if not given), or json: each line an object with time, vm, role, pid,
    /// level and message. Example: --log-format json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Write how the run ended as JSON: cause, exit code, times, restarts, memory. It takes the place of what has that name.
    /// Example: --status-file /var/lib/ozone/web1.status.json
    #[arg(long, value_name = "FILE")]
    pub status_file: Option<String>,
    /// Write when every process did what until the guest's drivers were ready, for https://ui.perfetto.dev, at the end of the
    /// run. Example: --boot-trace boot.json
    #[arg(long, value_name = "FILE")]
    pub boot_trace: Option<String>,
}

/// What the command line comes to.
#[derive(Debug)]
pub enum Parsed {
    /// Something to do.
    Command(Box<Command>),
    /// A text the user asked for: help or version.
    Text(String),
    /// One line saying what is wrong.
    Wrong(String),
}

/// Reads the command line.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Parsed {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let is_jail = arguments.get(1).is_some_and(|word| word == "jail");
    let error = match Line::try_parse_from(arguments) {
        Ok(line) => return Parsed::Command(Box::new(line.command)),
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Parsed::Text(error.to_string()),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => Parsed::Wrong(
            "no command is given: 'ozone run' runs a machine, 'ozone --help' explains the rest".to_owned(),
        ),
        _ => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            let first = first.strip_prefix("error: ").unwrap_or(first);
            let command = if is_jail { "jail" } else { "run" };
            Parsed::Wrong(format!("{first}; 'ozone {command} --help' lists the options"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn line(words: &[&str]) -> Parsed {
        parse(["ozone"].iter().chain(words).map(OsString::from))
    }

    #[test]
    fn the_definition_is_sound() {
        Line::command().debug_assert();
    }

    #[test]
    fn wrong_lines_come_to_one_line_that_names_the_argument() {
        for (words, named) in [
            (&["run", "--kernell", "x"][..], "'--kernell'"),
            (&["run", "--memory"], "'--memory <SIZE>'"),
            (&["rum"], "'rum'"),
            (&["run", "--kernel", "a", "--kernel", "b"], "'--kernel <FILE>'"),
            (&["run", "stray"], "'stray'"),
            (&[], "no command"),
        ] {
            let Parsed::Wrong(text) = line(words) else { panic!("{words:?} is accepted") };
            assert!(text.contains(named), "{words:?}: {text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[test]
    fn what_follows_the_help_has_an_example() {
        for command in ["audit", "gc"] {
            let Parsed::Text(help) = line(&[command, "--help"]) else { panic!("no help") };
            assert!(help.contains(&format!("Example: ozone {command}")) && help.contains("exit code"), "{help}");
        }
    }

    #[test]
    fn every_option_of_run_and_jail_has_an_example_and_the_codes_follow() {
        let Parsed::Text(help) = line(&["run", "--help"]) else { panic!("no help") };
        let line = Line::command();
        let options = |command: &str| line.find_subcommand(command).unwrap().get_arguments();
        for option in options("run").chain(options("jail")).filter(|option| option.get_id() != "help") {
            let text = option.get_help().unwrap().to_string();
            let name = option.get_long().map_or_else(|| "-- ".to_owned(), |name| format!("--{name}"));
            assert!(text.contains("Example:") && text.contains(&name), "{name}: {text}");
        }
        assert!(help.contains("Exit codes:"));
    }
}
