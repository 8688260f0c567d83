//! The machine's end: a listening socket in a directory of its name, and the clients of the moment.

use std::cell::{Cell, Ref, RefCell};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{SockFlag, SockType, accept4, getsockopt};
use nix::unistd::geteuid;
use protocol::{Channel, Fault, LinkError};

use super::message::{Answer, Request};
use crate::directory::Directory;
use crate::journal::{Entry, Identity, JournalError, Object};
use crate::runtime::{self, Home};
use crate::socket;

/// The most clients at a time that have said nothing.
const SILENT: usize = 8;

/// The most clients at a time; more wait in the socket's backlog.
const WAITING: usize = 64;

/// How long nobody is let in when the host has no descriptor left.
const REST: Duration = Duration::from_secs(1);

/// The socket's name in the machine's directory.
pub const NAME: &str = "control";

/// Why a machine cannot be reached by its name.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It cannot be written down that the socket is about to be made.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The socket cannot be made.
    #[error("{}: {}", .path.display(), .errno.desc())]
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
            ServerError::Journal(error) => error.into(),
            other => Fault::host(other.to_string()),
        }
    }
}

/// The path of the socket of machine `name` below `base`.
pub fn socket_path(base: &Path, name: &str) -> PathBuf {
    runtime::machine_path(base, name).join(NAME)
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

/// The listening socket of a machine. Dropping it removes it.
#[derive(Debug)]
pub struct Server {
    directory: Directory,
    socket: OwnedFd,
    noted: Option<Entry>,
    clients: RefCell<Vec<Client>>,
    next: Cell<ClientId>,
    rests: Cell<Option<Instant>>,
}

impl Server {
    /// Listens for the machine that has this directory.
    ///
    /// # Errors
    /// [`ServerError`]; nothing is left behind.
    pub fn open(home: &Home) -> Result<Self, ServerError> {
        let directory = home.directory();
        let copy =
            directory.try_clone().map_err(|errno| ServerError::Socket { path: directory.path_of(NAME), errno })?;
        let (socket, entry) = home.journal().make(Object::Control, || {
            // Nobody else gets as far as the socket: its directory is closed to them.
            let listening =
                socket::listen_at(directory, NAME.as_ref(), SockType::SeqPacket, SockFlag::SOCK_NONBLOCK, 8);
            let (socket, id) =
                listening.map_err(|errno| ServerError::Socket { path: directory.path_of(NAME), errno })?;
            Ok::<_, ServerError>((socket, Some(Identity::File(id))))
        })?;
        Ok(Self {
            directory: copy,
            socket,
            noted: Some(entry),
            clients: RefCell::default(),
            next: Cell::default(),
            rests: Cell::default(),
        })
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
        if socket::remove(&self.directory, NAME.as_ref(), None).is_ok() {
            self.noted.take().into_iter().for_each(Entry::undone);
        }
    }
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
    use std::os::unix::fs::PermissionsExt;

    fn home(base: &Path) -> Home {
        Home::claim(base, Some("web1")).unwrap().0
    }

    #[test]
    fn the_socket_is_private_and_goes_with_its_machine() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        let home = home(&base);
        let server = Server::open(&home).unwrap();
        let mode = std::fs::symlink_metadata(socket_path(&base, "web1")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(server);
        assert!(!socket_path(&base, "web1").exists());
        drop(home);
        assert!(!base.exists());
    }

    #[test]
    fn a_request_is_answered_once() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("ozone");
        let home = home(&base);
        let server = Server::open(&home).unwrap();
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
        let home = home(&base);
        let server = Server::open(&home).unwrap();
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
}
