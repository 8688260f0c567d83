//! The real `ozone-console` with its run filter, on ptys, pipes and sockets.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::{Pid, pipe};
use protocol::{ConsoleHost, ConsoleSpec, DeviceSpec, FaultKind, FromBackend, ToBackend};
use virtio_backend::testing::{
    Backend, DEADLINE, Frontend, Guest, Queue, VhostBackend, WRITE, config, connect, enable_from, negotiate,
};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_ozone-console");
const INPUT: u64 = Guest::FREE;
const OUTPUT: u64 = Guest::FREE + 0x8_0000;

/// A console, connected, with a guest that offers its buffers when asked to.
struct Console {
    backend: Backend,
    frontend: Frontend,
    guest: Guest,
    receive: Queue,
    transmit: Queue,
}

impl Console {
    fn new(host: ConsoleHost) -> Self {
        Self::with_serial(host, None)
    }

    fn with_serial(host: ConsoleHost, serial: Option<OwnedFd>) -> Self {
        let spec = ConsoleSpec { host, serial: serial.map(Into::into) };
        let (backend, mut frontend) = Backend::ready(EXECUTABLE, DeviceSpec::Console(spec), 2);
        let guest = Guest::new(4 << 20);
        let (receive, transmit) = (Queue::new(&guest, 0, 64), Queue::new(&guest, 1, 64));
        connect(&mut frontend, &guest, &[&receive, &transmit], 0);
        Self { backend, frontend, guest, receive, transmit }
    }

    /// Reads what the guest is typed, until there are `length` bytes.
    fn typed(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            self.receive.send(&self.guest, 0, &[(INPUT, 3, WRITE), (INPUT + 3, 500, WRITE)]);
            let (_, written) = self.receive.next(&self.guest);
            bytes.extend(self.guest.get(INPUT, written.try_into().unwrap()));
        }
        bytes
    }

    fn print(&mut self, bytes: &[u8]) {
        self.start_printing(bytes);
        assert_eq!(self.transmit.next(&self.guest), (0, 0));
    }

    fn start_printing(&mut self, bytes: &[u8]) {
        self.guest.put(OUTPUT, bytes);
        let (first, rest) = (1, u32::try_from(bytes.len()).unwrap() - 1);
        self.transmit.send(&self.guest, 0, &[(OUTPUT, first, 0), (OUTPUT + 1, rest, 0)]);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.backend.pid().try_into().unwrap()), signal).unwrap();
    }
}

fn wait(fd: impl AsFd, milliseconds: u64) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    virtio_backend::descriptor::wait(&mut fds, Some(Duration::from_millis(milliseconds))).unwrap() > 0
}

fn expect(mut from: impl Read + AsFd, bytes: &[u8]) {
    let mut found = Vec::new();
    while found.len() < bytes.len() {
        assert!(wait(&from, 10_000), "{:?} came, {:?} was expected", found.escape_ascii().to_string(), bytes.len());
        let mut chunk = [0; 4096];
        let length = from.read(&mut chunk).unwrap();
        found.extend(&chunk[..length]);
    }
    assert_eq!(found.escape_ascii().to_string(), bytes.escape_ascii().to_string());
}

/// A user's terminal: the side where the user is, and the side that the console is given.
fn terminal() -> (File, OwnedFd, Termios) {
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    (pty.master.into(), pty.slave, before)
}

fn on_terminal(slave: &OwnedFd) -> Console {
    Console::new(ConsoleHost::Terminal { terminal: slave.try_clone().unwrap().into() })
}

/// The flags of a terminal; PENDIN comes and goes by itself.
fn flags(termios: &Termios) -> impl PartialEq + std::fmt::Debug + use<> {
    (termios.input_flags, termios.output_flags, termios.local_flags - LocalFlags::PENDIN)
}

#[test]
fn a_terminal_is_raw_and_both_ways() {
    let (mut user, slave, before) = terminal();
    let mut console = on_terminal(&slave);
    assert_ne!(flags(&tcgetattr(&slave).unwrap()), flags(&before));
    user.write_all(b"ls\x03\r").unwrap();
    assert_eq!(console.typed(4), b"ls\x03\r");
    console.print(b"hello\r\n");
    expect(&user, b"hello\r\n");
}

#[test]
fn the_escape_asks_to_leave() {
    let (mut user, slave, _) = terminal();
    let mut console = on_terminal(&slave);
    user.write_all(b"a\x01ab\x01\x01c").unwrap();
    assert_eq!(console.typed(5), b"a\x01b\x01c");
    assert!(!console.backend.readable(50));
    user.write_all(b"\x01").unwrap();
    user.write_all(b"x").unwrap();
    assert!(matches!(console.backend.message(), FromBackend::Leave));
}

#[test]
fn the_escape_is_seen_although_the_guest_reads_nothing() {
    let (mut user, slave, _) = terminal();
    let console = on_terminal(&slave);
    let mut left = 200_000_usize;
    while left > 0 {
        left -= user.write(&vec![b'z'; left.min(1000)]).unwrap();
    }
    user.write_all(b"\x01x").unwrap();
    assert!(matches!(console.backend.message(), FromBackend::Leave));
}

#[test]
fn the_terminal_is_restored_at_every_end() {
    type End = fn(Console) -> Console;
    let ends: [(&str, i32, End); 3] = [
        ("SIGTERM", 143, |console| {
            console.signal(Signal::SIGTERM);
            console
        }),
        ("the core closes", 0, |console| {
            let Console { backend, guest, receive, transmit, frontend } = console;
            drop(frontend);
            let (other, _) = UnixStream::pair().unwrap();
            Console { backend, frontend: Frontend::from_stream(other, 2), guest, receive, transmit }
        }),
        ("ozone closes", 0, |mut console| {
            console.backend.control = protocol::Channel::pair().unwrap().0;
            console
        }),
    ];
    for (name, code, end) in ends {
        let (_user, slave, before) = terminal();
        let mut console = end(on_terminal(&slave));
        assert_eq!(console.backend.exit().code(), Some(code), "{name}");
        assert_eq!(flags(&tcgetattr(&slave).unwrap()), flags(&before), "{name}");
    }
}

#[test]
fn what_is_no_terminal_is_refused() {
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    let spec = ConsoleSpec { host: ConsoleHost::Terminal { terminal: null.into() }, serial: None };
    let (mut backend, _socket) = Backend::start(EXECUTABLE, DeviceSpec::Console(spec));
    let FromBackend::Failed(fault) = backend.message() else { panic!("it should have failed") };
    assert_eq!(fault.kind, FaultKind::Host);
    assert_eq!(backend.exit().code(), Some(1));
}

#[test]
fn the_size_of_the_terminal_is_in_the_configuration_space() {
    let (_user, slave, _) = terminal();
    let size = libc::winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads one `struct winsize`.
    let outcome = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&slave), libc::TIOCSWINSZ, &raw const size) };
    assert_eq!(outcome, 0);
    let mut console = on_terminal(&slave);
    assert_eq!(console.frontend.get_features().unwrap() & 1, 1);
    assert_eq!(config(&mut console.frontend, 12), [132, 0, 50, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    console.backend.control.send(&ToBackend::Resize { columns: 80, rows: 24 }).unwrap();
    assert!(matches!(console.backend.message(), FromBackend::Resized));
    assert_eq!(config(&mut console.frontend, 4), [80, 0, 24, 0], "it is there when ozone hears of it");
}

#[test]
fn the_end_of_input_leaves_the_machine_running() {
    let (from_user, to_console) = pipe().unwrap();
    let (from_console, to_user) = pipe().unwrap();
    let host = ConsoleHost::Stream { input: Some(from_user.into()), output: to_user.into() };
    let mut console = Console::new(host);
    File::from(to_console).write_all(b"last").unwrap();
    assert_eq!(console.typed(4), b"last");
    console.print(b"still here");
    expect(File::from(from_console), b"still here");
    let before = console.backend.ticks();
    std::thread::sleep(Duration::from_millis(200));
    assert!(console.backend.ticks() - before < 5, "it spins at the end of input");
}

#[test]
fn input_waits_for_the_guest_and_none_is_lost() {
    let (from_user, to_console) = pipe().unwrap();
    let (_from_console, to_user) = pipe().unwrap();
    let host = ConsoleHost::Stream { input: Some(from_user.into()), output: to_user.into() };
    let mut console = Console::new(host);
    let bytes: Vec<u8> = (0..300_000_u32).map(|index| (index % 253).to_le_bytes()[0]).collect();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || File::from(to_console).write_all(&sent).unwrap());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!writer.is_finished(), "neither the pipe nor the console takes it all");
    let deadline = Instant::now() + DEADLINE;
    let mut received = Vec::new();
    while received.len() < bytes.len() {
        assert!(Instant::now() < deadline);
        received.extend(console.typed(1));
    }
    assert_eq!(received, bytes);
    writer.join().unwrap();
}

#[test]
fn output_to_a_slow_stream_waits_in_the_ring_and_none_is_lost() {
    let (from_console, to_user) = pipe().unwrap();
    let mut console = Console::new(ConsoleHost::Stream { input: None, output: to_user.into() });
    let bytes: Vec<u8> = (0..300_000_u32).map(|index| (index % 251).to_le_bytes()[0]).collect();
    console.start_printing(&bytes);
    std::thread::sleep(Duration::from_millis(50));
    assert!(console.transmit.poll(&console.guest).is_none(), "the guest waits");
    expect(File::from(from_console), &bytes);
    assert_eq!(console.transmit.next(&console.guest), (0, 0));
}

#[test]
fn a_closed_stream_does_not_hold_the_guest() {
    let (from_console, to_user) = pipe().unwrap();
    let mut console = Console::new(ConsoleHost::Stream { input: None, output: to_user.into() });
    drop(from_console);
    console.print(&[b'x'; 200_000]);
}

#[test]
fn the_last_words_come_out() {
    let (from_console, to_user) = pipe().unwrap();
    let (serial, mut port) = pipe().map(|(reader, writer)| (reader, File::from(writer))).unwrap();
    let host = ConsoleHost::Stream { input: None, output: to_user.into() };
    let mut console = Console::with_serial(host, Some(serial));
    console.print(b"reboot: ");
    port.write_all(b"Power down").unwrap();
    let Console { mut backend, frontend, .. } = console;
    drop(frontend);
    assert_eq!(backend.exit().code(), Some(0));
    let mut text = String::new();
    File::from(from_console).read_to_string(&mut text).unwrap();
    assert!(text.contains("reboot: ") && text.contains("Power down"), "{text}");
}

#[test]
fn the_serial_ports_output_goes_the_same_way() {
    let (mut user, slave, _) = terminal();
    let (serial, port) = pipe().unwrap();
    let host = ConsoleHost::Terminal { terminal: slave.try_clone().unwrap().into() };
    let mut console = Console::with_serial(host, Some(serial));
    let mut port = File::from(port);
    port.write_all(b"early\r\n").unwrap();
    expect(&user, b"early\r\n");
    drop(port);
    console.print(b"late\r\n");
    expect(&user, b"late\r\n");
    user.write_all(b"k").unwrap();
    assert_eq!(console.typed(1), b"k");
}

/// The two sides of a pseudo-terminal console: the console, and the slave that users open.
fn on_pty() -> (Console, OwnedFd) {
    let pty = openpty(None, None).unwrap();
    (Console::new(ConsoleHost::Pty { master: pty.master.into() }), pty.slave)
}

fn reopen(slave: &OwnedFd) -> File {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(slave));
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_pty_goes_both_ways_and_echoes_nothing() {
    let (mut console, slave) = on_pty();
    let mut user = File::from(slave);
    console.print(b"login: ");
    expect(&user, b"login: ");
    user.write_all(b"root\r").unwrap();
    assert_eq!(console.typed(5), b"root\r");
}

#[test]
fn a_pty_without_a_reader_drops_and_neither_spins_nor_holds_the_guest() {
    let (mut console, slave) = on_pty();
    let path = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&slave))).unwrap();
    drop(slave);
    let start = Instant::now();
    (0..5).for_each(|_| console.print(&[b'x'; 100_000]));
    assert!(start.elapsed() < Duration::from_secs(10));
    let before = console.backend.ticks();
    std::thread::sleep(Duration::from_millis(300));
    assert!(console.backend.ticks() - before < 5, "it spins without a reader");
    let mut user = File::options().read(true).write(true).open(path).unwrap();
    user.write_all(b"back").unwrap();
    assert_eq!(console.typed(4), b"back");
    let again = reopen(&OwnedFd::from(user.try_clone().unwrap()));
    drop(again);
}

fn on_socket() -> (Console, std::path::PathBuf, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
    (Console::new(ConsoleHost::Socket { listener: listener.into() }), path, directory)
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let (mut console, path, _directory) = on_socket();
    console.print(b"to nobody");
    for round in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"hello").unwrap();
        assert_eq!(console.typed(5), b"hello", "round {round}");
        console.print(b"world");
        // What was for nobody may still have been in the console's buffer when the first client came.
        let mut found = Vec::new();
        while !found.ends_with(b"world") {
            assert!(wait(&client, 10_000), "round {round}: {}", found.escape_ascii());
            let mut chunk = [0; 64];
            let length = client.read(&mut chunk).unwrap();
            found.extend(&chunk[..length]);
        }
        assert!(round == 0 || found == b"world", "round {round}: {}", found.escape_ascii());
    }
}

#[test]
fn a_client_that_leaves_while_the_guest_reads_nothing_is_noticed() {
    let (mut console, path, _directory) = on_socket();
    let client = UnixStream::connect(&path).unwrap();
    client.set_nonblocking(true).unwrap();
    // Enough to fill the console's buffer; what the socket holds goes with the client.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(300) {
        let _ = (&client).write(&[b'x'; 4096]);
    }
    drop(client);
    let next = UnixStream::connect(&path).unwrap();
    let deadline = Instant::now() + DEADLINE;
    while !wait(&next, 1) {
        console.print(b"!");
        assert!(Instant::now() < deadline, "the next client is not served");
    }
}

#[test]
fn a_client_that_reads_nothing_does_not_hold_the_guest_for_ever() {
    let (mut console, path, _directory) = on_socket();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    assert_eq!(console.typed(1), b"x");
    (0..5).for_each(|_| console.print(&[b'y'; 400_000]));
}

#[test]
fn an_unexpected_message_ends_it() {
    let (_user, slave, before) = terminal();
    let mut console = on_terminal(&slave);
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    let spec = ConsoleSpec { host: ConsoleHost::Stream { input: None, output: null.into() }, serial: None };
    let socket = OwnedFd::from(UnixStream::pair().unwrap().0).into();
    console
        .backend
        .control
        .send(&ToBackend::Start(protocol::Start { socket, spec: DeviceSpec::Console(spec), trace: false }))
        .unwrap();
    assert!(matches!(console.backend.message(), FromBackend::Failed(fault) if fault.kind == FaultKind::Internal));
    assert_eq!(console.backend.exit().code(), Some(1));
    assert_eq!(flags(&tcgetattr(&slave).unwrap()), flags(&before));
}

#[test]
fn a_successor_takes_what_was_not_handed_back() {
    let (reader, writer) = pipe().unwrap();
    let stream = || ConsoleHost::Stream { input: None, output: writer.try_clone().unwrap().into() };
    let mut console = Console::new(stream());
    let mut pipe = File::from(reader);
    console.print(b"first ");
    // What has been handed back is on its way to the host, and a kill would end that.
    expect(&mut pipe, b"first ");
    console.backend.kill();
    console.backend.ended();
    // Made available while nobody serves.
    console.start_printing(b"second ");
    let spec = ConsoleSpec { host: stream(), serial: None };
    let (_successor, mut frontend) = Backend::ready(EXECUTABLE, DeviceSpec::Console(spec), 2);
    negotiate(&mut frontend, &console.guest, 0);
    for queue in [&console.receive, &console.transmit] {
        enable_from(&mut frontend, queue, queue.used_index(&console.guest)).unwrap();
    }
    expect(&mut pipe, b"second ");
    assert_eq!(console.transmit.next(&console.guest), (0, 0));
    console.print(b"third");
    expect(&mut pipe, b"third");
}
