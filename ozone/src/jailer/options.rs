//! The command line of `ozone jail`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

/// What follows the help of `ozone jail`.
pub const HELP: &str = "\
Example: ozone jail --name web1 --exec-file /usr/sbin/httpd --uid 100001 --gid 100001 --source /srv/www -- -f

The program is the only process in its jail but the first, which waits for it: namespaces, root, descriptors, environment and
seccomp filter are its own; see docs/jail.md. 'ozone jail' ends when it does, and removes what it made. SIGTERM, SIGINT,
SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2 and SIGWINCH are passed on to it.

Exit codes: that of the program; 128+n if signal n ended it. If ozone stood in the way, which its last line says:
  2      what you asked for cannot be: an option, a file
  3      the host lacks something or refused it
  4      a defect of ozone";

/// What to put in a jail, and what it may see. Strings are as the user wrote them; [`super::spec`] reads them.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// The jail's name: no other of this user has it while it runs. Example: --name web1
    #[arg(long, alias = "id", value_name = "NAME", allow_hyphen_values = true)]
    pub name: Option<String>,
    /// The program. It is in the jail's root by its last name, and nobody can write it. Example: --exec-file /usr/sbin/httpd
    #[arg(long, value_name = "FILE")]
    pub exec_file: Option<PathBuf>,
    /// The user that it runs as, a number. Example: --uid 100001
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub uid: Option<String>,
    /// The group that it runs as, and no other; a number. Example: --gid 100001
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub gid: Option<String>,
    /// Let it run as uid 0 or gid 0, to which files and processes of the host belong. Example: --allow-root --uid 0
    #[arg(long)]
    pub allow_root: bool,
    /// A directory, file or device that it sees, under the same path or TARGET: read-only, without set-uid programs, devices or
    /// programs to execute, but for KEYS: rw, dev, exec. A colon in a path is written \:
    /// Example: --source /srv/www --source /etc/web1.conf:/etc/httpd.conf --source /dev/kvm:dev,rw
    #[arg(long, value_name = "PATH[:TARGET][:KEYS]")]
    pub source: Vec<OsString>,
    /// A network namespace to join; without one it has its own, which is empty. Example: --netns /run/netns/web1
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// A file of its cgroup (cgroup v2) and what is written to it. Example: --cgroup memory.max=256M --cgroup pids.max=64
    #[arg(long, value_name = "FILE=VALUE")]
    pub cgroup: Vec<String>,
    /// The cgroup to make its cgroup in, below /sys/fs/cgroup. Example: --cgroup-parent machine.slice
    #[arg(long, alias = "parent-cgroup", value_name = "PATH")]
    pub cgroup_parent: Option<String>,
    /// The NUMA node whose processors and memory it gets. Example: --numa 0
    #[arg(long, value_name = "NODE", allow_hyphen_values = true)]
    pub numa: Option<String>,
    /// Capabilities of the host's that it keeps, of which there are none otherwise. Example: --capability
    /// CAP_NET_BIND_SERVICE,CAP_NET_RAW
    #[arg(long, value_name = "NAMES")]
    pub capability: Vec<String>,
    /// A resource limit (setrlimit(2)), soft and hard; fsize, no-file and so on. Example: --resource-limit no-file=1024 --resource-limit
    /// as=1G:2G
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub resource_limit: Vec<String>,
    /// A variable of its environment, which is empty otherwise. Example: --env LANG=C.UTF-8
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<OsString>,
    /// The system calls that it may not make: default, none, or a file of seccompiler's JSON instead. Example: --seccomp
    /// web1.json
    #[arg(long, value_name = "default|none|FILE", default_value = "default")]
    pub seccomp: PathBuf,
    /// Return when it runs, and print the process id of its jail; its descriptors 0 to 2 are /dev/null. Example: --daemonize
    #[arg(long)]
    pub daemonize: bool,
    /// Remove what a killed 'ozone jail' of this name left, and do nothing else; only --name is needed. Example: --clean-resource --name
    /// web1
    #[arg(long)]
    pub clean_resource: bool,
    /// What it is told. Example: -- -f
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<OsString>,
}
