//! Carries out what arrives on the virtio-serial port, one command at a time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use agent::layout;
use agent::wire::{self, Channel, Exit, FromAgent, ToAgent, Window};
use anyhow::{Context, Result, bail};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;

use crate::{entropy, files};

/// Output that a background process keeps open is waited for no longer than this.
const LAST_OUTPUT: Duration = Duration::from_millis(500);

/// Serves until the port fails.
pub fn serve() -> Result<()> {
    let port = open_port()?;
    let output = Output(Arc::new(Mutex::new(port.try_clone()?)));
    output.message(&FromAgent::Ready)?;
    let mut input = Input(port);
    let mut running: Option<Running> = None;
    loop {
        let (channel, payload) = wire::read_frame(&mut input).context("read the port")?;
        match channel {
            Channel::Stdin => {
                if let Some(command) = &running {
                    let _ = command.stdin.send(Some(payload));
                }
            }
            Channel::Control => match wire::parse(&payload).context("parse a message")? {
                ToAgent::Run(command) => running = start(&command, &output)?,
                ToAgent::StdinEnd => {
                    if let Some(command) = &running {
                        let _ = command.stdin.send(None);
                    }
                }
                ToAgent::Resize(window) => {
                    if let Some(terminal) = running.as_ref().and_then(|it| it.terminal.as_ref()) {
                        let _ = rustix::termios::tcsetwinsize(terminal, window_size(window));
                    }
                }
                // Everything but process 1 and the caller.
                ToAgent::Kill => drop(kill(Pid::from_raw(-1), Signal::SIGKILL)),
                ToAgent::Wake { unix_nanoseconds, entropy } => {
                    output.answer(wake(unix_nanoseconds, &entropy))?;
                }
                ToAgent::Unpack { bytes, directory } => {
                    output.answer(files::unpack(bytes, &directory))?;
                }
                ToAgent::Fetch { path } => fetch(&path, &output)?,
            },
            other => bail!("unexpected frame on {other:?}"),
        }
    }
}

fn open_port() -> Result<File> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        for port in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
            if name.trim() == layout::PORT {
                let device = PathBuf::from("/dev").join(port.file_name());
                let open = OpenOptions::new().read(true).write(true).open(&device);
                return open.with_context(|| format!("open {}", device.display()));
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("no virtio-serial port named {}", layout::PORT)
}

/// The port answers "end of file" as long as nobody is connected outside, so that is no end.
struct Input(File);

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer)? {
                0 => thread::sleep(Duration::from_millis(2)),
                count => return Ok(count),
            }
        }
    }
}

#[derive(Clone)]
struct Output(Arc<Mutex<File>>);

impl Output {
    fn frame(&self, channel: Channel, payload: &[u8]) -> io::Result<()> {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_frame(&mut *port, channel, payload)
    }

    fn message(&self, message: &FromAgent) -> io::Result<()> {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_message(&mut *port, message)
    }

    fn answer(&self, result: Result<()>) -> io::Result<()> {
        self.message(&match result {
            Ok(()) => FromAgent::Done,
            Err(error) => FromAgent::Failed(format!("{error:#}")),
        })
    }
}

fn wake(unix_nanoseconds: u64, bytes: &[u8]) -> Result<()> {
    let now = TimeSpec::from_duration(Duration::from_nanos(unix_nanoseconds));
    clock_settime(ClockId::CLOCK_REALTIME, now).context("set the clock")?;
    entropy::add(bytes)
}

fn fetch(path: &str, output: &Output) -> Result<()> {
    match File::open(path).and_then(|file| Ok((file.metadata()?.len(), file))) {
        Err(error) => output.message(&FromAgent::Failed(format!("{path}: {error}")))?,
        Ok((length, file)) => {
            output.message(&FromAgent::FileBytes(length))?;
            let mut file = file.take(length);
            let mut block = vec![0; 64 << 10];
            let mut sent = 0;
            while sent < length {
                let count = file.read(&mut block)?;
                // A file that shrank meanwhile is padded, so that the stream stays in step.
                let count = if count == 0 { block.len().min(usize::try_from(length - sent)?) } else { count };
                output.frame(Channel::File, block.get(..count).unwrap_or_default())?;
                sent += count as u64;
            }
        }
    }
    Ok(())
}

struct Running {
    stdin: Sender<Option<Vec<u8>>>,
    terminal: Option<File>,
}

/// Starts a command; its output and end are reported by threads.
fn start(command: &wire::Command, output: &Output) -> Result<Option<Running>> {
    let spawned = match command.terminal {
        Some(window) => spawn_on_terminal(command, window),
        None => spawn_on_pipes(command),
    };
    let mut spawned = match spawned {
        Ok(spawned) => spawned,
        Err(error) => {
            let program = command.argv.first().map_or("", String::as_str);
            output.frame(Channel::Stderr, format!("{program}: {error:#}\n").as_bytes())?;
            output.message(&FromAgent::Exited(Exit::Code(127)))?;
            return Ok(None);
        }
    };
    let (ended, all_ended) = mpsc::channel();
    for (channel, source) in spawned.outputs {
        pump(source, channel, output.clone(), ended.clone());
    }
    drop(ended);
    let (stdin, bytes) = mpsc::channel();
    thread::spawn(move || feed(spawned.stdin, &bytes));
    let output = output.clone();
    thread::spawn(move || {
        let exit = match spawned.child.wait() {
            Ok(status) => match status.signal() {
                Some(signal) => Exit::Signal(signal),
                None => Exit::Code(status.code().unwrap_or(255)),
            },
            Err(_) => Exit::Code(255),
        };
        // Disconnected: every pump ended.
        while let Ok(()) = all_ended.recv_timeout(LAST_OUTPUT) {}
        let _ = output.message(&FromAgent::Exited(exit));
    });
    Ok(Some(Running { stdin, terminal: spawned.terminal }))
}

struct Spawned {
    child: Child,
    stdin: File,
    outputs: Vec<(Channel, File)>,
    terminal: Option<File>,
}

fn spawn_on_pipes(command: &wire::Command) -> Result<Spawned> {
    let (program, arguments) = command.argv.split_first().context("no command")?;
    let mut child = with_environment(&mut Command::new(program), command)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let stdin = OwnedFd::from(child.stdin.take().context("no pipe")?);
    let stdout = OwnedFd::from(child.stdout.take().context("no pipe")?);
    let stderr = OwnedFd::from(child.stderr.take().context("no pipe")?);
    let outputs = vec![(Channel::Stdout, stdout.into()), (Channel::Stderr, stderr.into())];
    Ok(Spawned { child, stdin: stdin.into(), outputs, terminal: None })
}

fn spawn_on_terminal(command: &wire::Command, window: Window) -> Result<Spawned> {
    let size = Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).context("open a terminal")?;
    // busybox makes the session and takes its standard input as the controlling terminal.
    let child = with_environment(&mut Command::new("/bin/busybox"), command)
        .args(["setsid", "-c"])
        .args(&command.argv)
        .stdin(pty.slave.try_clone()?)
        .stdout(pty.slave.try_clone()?)
        .stderr(pty.slave)
        .spawn()?;
    let master = File::from(pty.master);
    let outputs = vec![(Channel::Stdout, master.try_clone()?)];
    Ok(Spawned { child, stdin: master.try_clone()?, outputs, terminal: Some(master) })
}

fn with_environment<'a>(command: &'a mut Command, wanted: &wire::Command) -> &'a mut Command {
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("TERM", "linux")
        .env(layout::IN_HOST, "1")
        .envs(&wanted.env)
        .current_dir("/root")
}

fn pump(mut source: File, channel: Channel, output: Output, ended: Sender<()>) {
    thread::spawn(move || {
        let mut block = vec![0; 32 << 10];
        // A terminal whose last user is gone answers EIO.
        while let Ok(count @ 1..) = source.read(&mut block) {
            if output.frame(channel, block.get(..count).unwrap_or_default()).is_err() {
                break;
            }
        }
        drop(ended);
    });
}

fn feed(mut stdin: File, bytes: &Receiver<Option<Vec<u8>>>) {
    while let Ok(Some(block)) = bytes.recv() {
        if stdin.write_all(&block).is_err() {
            break;
        }
    }
}

fn window_size(window: Window) -> rustix::termios::Winsize {
    rustix::termios::Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 }
}
