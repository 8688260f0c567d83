//! The console's four host sides, both ways.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};
use ozone_tests::harness::Test;
use ozone_tests::vm::{ANSWER, BOOT, Guest, Vm, executable};

/// The tests of this file.
pub const TESTS: [Test; 8] = [
    Test::host("console::input_and_output_of_a_pipe", input_and_output_of_a_pipe),
    Test::host("console::the_end_of_input_leaves_the_guest_running", the_end_of_input_leaves_the_guest_running),
    Test::host("console::a_terminal_is_raw_and_restored_when_left", a_terminal_is_raw_and_restored_when_left),
    Test::host("console::a_terminal_is_restored_after_kill_9", a_terminal_is_restored_after_kill_9),
    Test::host("console::a_terminals_new_size_reaches_the_guest", a_terminals_new_size_reaches_the_guest),
    Test::host("console::a_pty", a_pty),
    Test::host("console::a_file", a_file),
    Test::host("console::a_unix_socket", a_unix_socket),
];

fn input_and_output_of_a_pipe() -> Result<()> {
    let mut vm = Guest::new()?.boot()?;
    ensure!(vm.guest("read -r word; echo got $word\nsomething")? == "got something\n");
    let long = "0123456789".repeat(300);
    ensure!(vm.guest(&format!("echo {long}"))?.trim() == long, "a line longer than one buffer");
    let (status, output) = vm.command("seq 1 3000", ANSWER * 2)?;
    ensure!(status == 0 && output.lines().map(str::to_owned).eq((1..=3_000).map(|n| n.to_string())), "{output}");
    vm.power_off()
}

fn the_end_of_input_leaves_the_guest_running() -> Result<()> {
    let guest = Guest::new()?;
    let disk = guest.root_disk()?;
    let mut vm = guest.disk(&disk).init("check").start()?;
    vm.close_stdin();
    vm.expect("OZONE-CHECK end", BOOT)?;
    vm.expect_exit(0, BOOT)
}

/// `ozone` on a pseudo-terminal, as a user has it.
struct Session {
    child: Child,
    master: File,
    slave: File,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Session {
    fn start() -> Result<Self> {
        let pair = openpty(None, None)?;
        let (master, slave) = (File::from(pair.master), File::from(pair.slave));
        let side = || -> Result<Stdio> { Ok(slave.try_clone()?.into()) };
        // As a shell starts it: in the foreground of its controlling terminal.
        let mut command = Command::new("setsid");
        command.arg("-c").arg(executable("ozone")).args(Guest::new()?.init("shell").arguments());
        command.stdin(side()?).stdout(side()?).stderr(Stdio::inherit());
        let child = command.spawn()?;
        let (send, output) = channel();
        let mut reader = master.try_clone()?;
        std::thread::spawn(move || {
            let mut block = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut block) {
                let _ = send.send(block[..count].to_vec());
            }
        });
        Ok(Self { child, master, slave, output, seen: String::new() })
    }

    fn expect(&mut self, text: &str, most: Duration) -> Result<()> {
        let deadline = Instant::now() + most;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return Ok(());
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => bail!("awaited '{text}' on the terminal for {most:?}; seen: {}", self.seen),
            }
        }
    }

    fn is_raw(&self) -> Result<bool> {
        Ok(!tcgetattr(&self.slave)?.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO))
    }

    fn expect_raw(&self, raw: bool) -> Result<()> {
        let what = if raw { "raw" } else { "restored" };
        until(|| Ok((self.is_raw()? == raw).then_some(())), &format!("the terminal to be {what}"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Polls: neither a terminal's mode nor a path's appearance can be waited for.
fn until<T>(mut look: impl FnMut() -> Result<Option<T>>, what: &str) -> Result<T> {
    let deadline = Instant::now() + ANSWER;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "awaited {what} for {ANSWER:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn end(child: &mut Child) -> Result<ExitStatus> {
    until(|| Ok(child.try_wait()?), "the end of ozone")
}

fn a_terminal_is_raw_and_restored_when_left() -> Result<()> {
    let mut session = Session::start()?;
    session.expect("# ", BOOT)?;
    session.expect_raw(true)?;
    // Ctrl-C goes to the guest: it ends the sleep there, and not ozone.
    session.master.write_all(b"echo asleep $((40 + 2)); sleep 1000\r")?;
    session.expect("asleep 42", ANSWER)?;
    session.master.write_all(b"\x03")?;
    session.expect("# ", ANSWER)?;
    session.master.write_all(b"echo still $((40 + 2))\r")?;
    session.expect("still 42", ANSWER)?;
    session.master.write_all(b"\x01x")?;
    let status = end(&mut session.child)?;
    ensure!(status.code() == Some(0), "{status}");
    session.expect_raw(false)
}

fn a_terminals_new_size_reaches_the_guest() -> Result<()> {
    let mut session = Session::start()?;
    session.expect("# ", BOOT)?;
    for (columns, rows) in [(132, 43), (90, 31)] {
        resize(&session.master, columns, rows)?;
        let sized = format!(r#"[ "$(stty size)" = "{rows} {columns}" ]"#);
        let poll = format!("tries=0; until {sized} || [ $tries = 100 ]; do usleep 50000; tries=$((tries + 1)); done");
        session.master.write_all(format!("{poll}; echo size: $(stty size).\r").as_bytes())?;
        session.expect(&format!("size: {rows} {columns}."), ANSWER)?;
    }
    session.master.write_all(b"\x01x")?;
    let status = end(&mut session.child)?;
    ensure!(status.code() == Some(0), "{status}");
    Ok(())
}

#[allow(unsafe_code)]
fn resize(master: &File, columns: u16, rows: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads one `struct winsize`.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, std::ptr::from_ref(&size)) })?;
    Ok(())
}

fn a_terminal_is_restored_after_kill_9() -> Result<()> {
    let mut session = Session::start()?;
    session.expect("# ", BOOT)?;
    session.expect_raw(true)?;
    session.child.kill()?;
    end(&mut session.child)?;
    session.expect_raw(false)
}

/// The arguments of a guest that takes commands on this console.
fn arguments_with(guest: &Guest, console: &str) -> Result<Vec<OsString>> {
    let mut arguments = guest.arguments();
    let at = arguments.iter().position(|word| word == "--console").context("no --console")?;
    *arguments.get_mut(at + 1).context("no console")? = console.into();
    Ok(arguments)
}

/// Talks to a guest that takes commands, through any stream, until it powers off.
fn converse(mut stream: impl Read + Write + AsFd) -> Result<()> {
    stream.write_all(b"echo got $((40 + 2))\n")?;
    let mut seen = String::new();
    let mut block = [0; 1024];
    let deadline = Instant::now() + BOOT;
    while !seen.contains("got 42") {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))?;
        ensure!(ready > 0, "awaited 'got 42' for {BOOT:?}; seen: {seen:?}");
        let count = stream.read(&mut block).context("read")?;
        ensure!(count > 0, "the console closed; seen: {seen}");
        seen.push_str(&String::from_utf8_lossy(&block[..count]));
    }
    Ok(stream.write_all(b"poweroff -f\n")?)
}

fn a_pty() -> Result<()> {
    let mut vm = Vm::start(arguments_with(&Guest::new()?, "pty")?)?;
    vm.expect_error("/dev/pts/", ANSWER)?;
    let rest = vm.expect_error("\n", ANSWER)?;
    let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
    converse(File::options().read(true).write(true).open(format!("/dev/pts/{number}"))?)?;
    vm.expect_exit(0, BOOT)
}

fn a_file() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("console.log");
    let mut vm = Vm::start(arguments_with(&Guest::new()?.init("poweroff"), &format!("file={}", path.display()))?)?;
    vm.expect_exit(0, BOOT)?;
    let text = fs::read_to_string(&path)?;
    ensure!(text.contains("ozone-guest: init"), "{text}");
    Ok(())
}

fn a_unix_socket() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("console.sock");
    let mut vm = Vm::start(arguments_with(&Guest::new()?, &format!("socket={}", path.display()))?)?;
    let stream = until(|| Ok(UnixStream::connect(&path).ok()), "the console's socket")?;
    stream.set_read_timeout(Some(BOOT))?;
    converse(stream)?;
    vm.expect_exit(0, BOOT)?;
    ensure!(!path.exists(), "the socket is left behind");
    Ok(())
}
