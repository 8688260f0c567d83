//! The machine's end: a listening socket in a directory of its name, and the clients of the moment.

use std::cell::{Cell, Ref, RefCell};
use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen, socket,
};
use nix::unistd::geteuid;
use protocol::{Channel, Fault, LinkError};

use super::message::{Answer, Request};
use crate::landlock::Domain;
use crate::runtime::{self, RuntimeError};

/// The most clients at a time that have said nothing.
const SILENT: usize = 8;

/// The most clients at a time; more wait in the socket's backlog.
const WAITING: usize = 64;

/// How long nobody is let in when the host has no descriptor left.
const REST: Duration = Duration::from_secs(1);

/// How long the last machine of the same name may take to let go.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a machine cannot be reached by its name.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Its directory cannot be had.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// There is one of that name.
    #[error("--name {0}: a machine of this name is running; give this one another name")]
    Taken(String),
    /// The socket cannot be made.
    #[error("{}: {errno}", .path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
}

impl From<ServerError> for Fault {
    fn from(error: ServerError) -> Self {
        match error {
            ServerError::Taken(_) => Fault::input(error.to_string()),
            other => Fault::host(other.to_string()),
        }
    }
}

/// The path of the socket of machine `name` below `directory`.
pub fn socket_path(directory: &Path, name: &str) -> PathBuf {
    directory.join("machines").join(name).join("control")
}

/// Names a client for as long as it is there.
pub type ClientId = u64;

/// One client.
#[derive(Debug)]
pub struct Client {
    id: ClientId,
    channel: Channel<Answer, Request>,
    /// Whether it has sent its request.
    asked: bool,
}

/// What comes of looking at a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Its request.
    Request(Request),
    /// Nothing yet.
    Nothing,
    /// It is gone.
    End,
}

impl Client {
    /// Its name.
    pub fn id(&self) -> ClientId {
        self.id
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// The listening socket of a machine. Dropping it removes all that was made for it.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    socket: OwnedFd,
    /// Locked for as long as the machine runs, however it ends.
    _directory: File,
    clients: RefCell<Vec<Client>>,
    next: Cell<ClientId>,
    rests: Cell<Option<Instant>>,
}

impl Server {
    /// Listens for the machine `name` of this user, below `directory`.
    ///
    /// # Errors
    /// [`ServerError`]; nothing is left behind.
    pub fn open(directory: &Path, name: &str) -> Result<Self, ServerError> {
        let path = socket_path(directory, name);
        let held = hold(directory, &path, name)?;
        // Whoever made one that is still there has ended without removing it: the lock is ours.
        let _ = fs::remove_file(&path);
        let socket = listen_on(&path).map_err(|errno| ServerError::Socket { path: path.clone(), errno })?;
        Ok(Self {
            path,
            socket,
            _directory: held,
            clients: RefCell::default(),
            next: Cell::default(),
            rests: Cell::default(),
        })
    }

    /// The socket is removed at the end, with the directories that nobody else uses.
    ///
    /// # Errors
    /// See [`Domain::allow`].
    pub fn allow(&self, domain: &mut Domain) -> Result<(), Errno> {
        self.path.ancestors().nth(3).map_or(Ok(()), |base| domain.allow_to_remove(base))
    }

    /// What to watch for new clients; nothing while there is no room for one.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        let rests = self.rests.get().is_some_and(|until| Instant::now() < until);
        (!rests && self.clients.borrow().len() < WAITING).then(|| self.socket.as_fd())
    }

    /// The clients of the moment.
    pub fn clients(&self) -> Ref<'_, Vec<Client>> {
        self.clients.borrow()
    }

    /// Takes a client that has connected, if it is of the same user, or root. One that has said nothing for longest gives way
    /// when there are many such.
    pub fn accept(&self) {
        let fd = match accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => fd,
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => return,
            Err(_) => {
                // For want of descriptors the client stays in the backlog, and would be seen there all the time.
                self.rests.set(Some(Instant::now() + REST));
                return;
            }
        };
        let socket = owned(fd);
        let Ok(peer) = getsockopt(&socket, PeerCredentials) else { return };
        if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
            return;
        }
        if let Ok(channel) = Channel::connected(socket) {
            let id = self.next.get().wrapping_add(1);
            self.next.set(id);
            let mut clients = self.clients.borrow_mut();
            if clients.iter().filter(|client| !client.asked).count() >= SILENT
                && let Some(oldest) = clients.iter().position(|client| !client.asked)
            {
                clients.remove(oldest);
            }
            clients.push(Client { id, channel, asked: false });
        }
    }

    /// What a client has sent. One that sends anything but its one request is let go.
    pub fn receive(&self, id: ClientId) -> Heard {
        let mut clients = self.clients.borrow_mut();
        let Some(client) = clients.iter_mut().find(|client| client.id == id) else { return Heard::Nothing };
        match client.channel.try_receive() {
            Ok(request) if !client.asked => {
                client.asked = true;
                Heard::Request(request)
            }
            Err(LinkError::WouldBlock) => Heard::Nothing,
            Ok(_) | Err(_) => {
                clients.retain(|client| client.id != id);
                Heard::End
            }
        }
    }

    /// Answers a client and lets it go. Nobody waits for one that does not read.
    pub fn answer(&self, id: ClientId, answer: &Answer) {
        let mut clients = self.clients.borrow_mut();
        if let Some(client) = clients.iter().find(|client| client.id == id) {
            let _ = client.channel.try_send(answer);
        }
        clients.retain(|client| client.id != id);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // The machine's directory, that of all machines and ozone's: each as long as nothing else is in it.
        for directory in self.path.ancestors().skip(1).take(3) {
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
}

/// Makes the directory of a machine and takes its lock (flock(2)), which ends with `ozone`, however that ends.
fn hold(base: &Path, path: &Path, name: &str) -> Result<File, ServerError> {
    let directory = path.parent().unwrap_or(base);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut parts = [base, directory.parent().unwrap_or(base), directory].into_iter();
        match parts.try_for_each(runtime::make) {
            Ok(()) => {}
            // Another machine has removed a directory that it was the last to use.
            Err(RuntimeError::File { error, .. })
                if error.kind() == ErrorKind::NotFound && Instant::now() < deadline =>
            {
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let opened = File::options().read(true).custom_flags(flags).open(directory);
        if let Ok(held) = opened
            && held.try_lock().is_ok()
            // The last one may have removed it between the open and the lock.
            && runtime::is_current(&held, directory)
        {
            return Ok(held);
        }
        if Instant::now() >= deadline {
            return Err(ServerError::Taken(name.to_owned()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn listen_on(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Nobody else gets as far as the socket: its directory is closed to them.
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(|_| Errno::EPERM)?;
    listen(&socket, Backlog::new(8)?)?;
    Ok(socket)
}

#[allow(unsafe_code)]
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: accept4 has just made this descriptor, and nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::client;

    #[test]
    fn a_name_is_taken_once_and_everything_goes_with_its_machine() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        let first = Server::open(&base, "web1").unwrap();
        assert!(matches!(Server::open(&base, "web1"), Err(ServerError::Taken(_))));
        let other = Server::open(&base, "web2").unwrap();
        drop(first);
        assert!(base.join("machines/web2/control").exists());
        drop(other);
        assert!(!base.exists());
    }

    #[test]
    fn what_a_killed_machine_left_is_taken_over() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        let path = socket_path(&base, "web1");
        for part in path.parent().unwrap().ancestors().take(3).collect::<Vec<_>>().into_iter().rev() {
            runtime::make(part).unwrap();
        }
        drop(listen_on(&path).unwrap());
        let server = Server::open(&base, "web1").unwrap();
        drop(server);
        assert!(!base.exists());
    }

    #[test]
    fn a_request_is_answered_once() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        let server = Server::open(&base, "web1").unwrap();
        let channel = client::connect(&base, "web1").unwrap();
        channel.send(&Request::Pause).unwrap();
        server.accept();
        let id = server.clients()[0].id();
        assert_eq!(server.receive(id), Heard::Request(Request::Pause));
        assert_eq!(server.receive(id), Heard::Nothing);
        server.answer(id, &Answer::Done);
        assert_eq!(channel.receive().unwrap(), Answer::Done);
        assert!(matches!(channel.receive(), Err(LinkError::Closed)));
        assert!(server.clients().is_empty());
    }

    #[test]
    fn silent_clients_give_way_and_talkative_ones_go() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        let server = Server::open(&base, "web1").unwrap();
        let silent: Vec<_> = (0..SILENT).map(|_| client::connect(&base, "web1").unwrap()).collect();
        silent.iter().for_each(|_| server.accept());
        let speaker = client::connect(&base, "web1").unwrap();
        server.accept();
        assert_eq!(server.clients().len(), SILENT, "the first has given way");
        let id = server.clients().last().unwrap().id();
        speaker.send(&Request::Status).unwrap();
        speaker.send(&Request::Status).unwrap();
        assert_eq!(server.receive(id), Heard::Request(Request::Status));
        assert_eq!(server.receive(id), Heard::End);
        drop(silent);
        let left = server.clients()[0].id();
        assert_eq!(server.receive(left), Heard::End);
    }

    #[test]
    fn machines_that_come_and_go_do_not_disturb_each_other() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        let churn = |name: &'static str| {
            let base = base.clone();
            std::thread::spawn(move || (0..300).for_each(|_| drop(Server::open(&base, name).unwrap())))
        };
        for thread in [churn("web1"), churn("web2")] {
            thread.join().unwrap();
        }
        assert!(!base.exists());
    }
}
