//! The host side of the console: its threads.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use protocol::{ConsoleHost, Descriptor, Fault};
use virtio_backend::{Outbox, threads};

use crate::buffer::Buffer;
use crate::output::{self, Client, Output};
use crate::{input, terminal};

/// The host side, as far as the rest has to know it.
pub struct Host {
    /// Columns and rows, for a terminal.
    pub size: Option<(u16, u16)>,
}

/// Opens the host side: from now on its threads fill `to_guest` and empty `to_host`.
///
/// # Errors
/// What is no terminal, and a host without threads or descriptors.
pub fn open(host: ConsoleHost, to_guest: &Arc<Buffer>, to_host: &Arc<Buffer>, outbox: &Outbox) -> Result<Host, Fault> {
    let to_guest = Arc::clone(to_guest);
    let mut size = None;
    let output = match host {
        ConsoleHost::Terminal { terminal: fd } => {
            let fd = Arc::new(fd.into_fd());
            size = Some(terminal::size(fd.as_fd()));
            terminal::take(fd.as_fd()).map_err(|errno| Fault::host(format!("make the terminal raw: {errno}")))?;
            let (source, outbox) = (Arc::clone(&fd), outbox.clone());
            threads::start("host-in", move || input::terminal(source.as_fd(), &to_guest, &outbox))?;
            Output::Patient(fd)
        }
        ConsoleHost::Stream { input, output } => {
            if let Some(source) = input.map(Descriptor::into_fd) {
                threads::start("host-in", move || input::stream(source.as_fd(), &to_guest))?;
            }
            Output::Patient(Arc::new(output.into_fd()))
        }
        ConsoleHost::Pty { master } => {
            let master = Arc::new(master.into_fd());
            let edges = prepare_pty(&master).map_err(|errno| Fault::host(format!("prepare the pty: {errno}")))?;
            let source = Arc::clone(&master);
            threads::start("host-in", move || input::pty(source.as_fd(), &edges, &to_guest))?;
            Output::Impatient(master)
        }
        ConsoleHost::Socket { listener } => {
            let (listener, client) = (listener.into_fd(), Client::default());
            let current = Arc::clone(&client);
            threads::start("host-in", move || input::socket(listener.as_fd(), &current, &to_guest))?;
            Output::Client(client)
        }
    };
    let to_host = Arc::clone(to_host);
    threads::start("host-out", move || output::run(&to_host, &output))?;
    Ok(Host { size })
}

/// Makes the pseudo-terminal raw, or its slave would echo the guest's output back as input; and non-blocking, or it
/// would hold the output while nobody reads.
fn prepare_pty(master: &OwnedFd) -> nix::Result<Epoll> {
    terminal::make_raw(master.as_fd())?;
    let flags = OFlag::from_bits_retain(fcntl(master, FcntlArg::F_GETFL)?);
    fcntl(master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let edges = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    edges.add(master, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
    Ok(edges)
}
