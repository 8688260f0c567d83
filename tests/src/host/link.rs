//! Our end of the virtio-serial port.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use agent::wire::{self, Channel, ToAgent, Window};

use super::terminal;

/// How often the terminal is asked for its size while a shell runs.
const WINDOW_INTERVAL: Duration = Duration::from_millis(500);

/// Frames to and from the agent. A thread reads, so that every wait can have a deadline.
pub struct Link {
    output: Arc<Mutex<UnixStream>>,
    frames: Receiver<(Channel, Vec<u8>)>,
}

/// Why no frame came.
#[derive(Debug)]
pub enum ReceiveError {
    /// None within the given time.
    Timeout,
    /// The other side is gone.
    Closed,
}

impl Link {
    /// Takes over a connected socket.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        let mut input = socket.try_clone()?;
        let (sender, frames) = mpsc::channel();
        thread::spawn(move || {
            while let Ok(frame) = wire::read_frame(&mut input) {
                if sender.send(frame).is_err() {
                    break;
                }
            }
        });
        Ok(Self { output: Arc::new(Mutex::new(socket)), frames })
    }

    /// Waits for a frame.
    pub fn receive(&self, deadline: Duration) -> Result<(Channel, Vec<u8>), ReceiveError> {
        self.frames.recv_timeout(deadline).map_err(|error| match error {
            RecvTimeoutError::Timeout => ReceiveError::Timeout,
            RecvTimeoutError::Disconnected => ReceiveError::Closed,
        })
    }

    /// Sends a message.
    pub fn send(&self, message: &ToAgent) -> io::Result<()> {
        send(&self.output, message)
    }

    /// From now on, this process's standard input is the command's.
    pub fn forward_stdin(&self) {
        let output = Arc::clone(&self.output);
        thread::spawn(move || -> io::Result<()> {
            let mut block = vec![0; 16 << 10];
            let mut stdin = io::stdin();
            while let Ok(count @ 1..) = stdin.read(&mut block) {
                let data = block.get(..count).unwrap_or_default();
                wire::write_frame(&mut *lock(&output), Channel::Stdin, data)?;
            }
            send(&output, &ToAgent::StdinEnd)
        });
    }

    /// From now on, changes of the terminal's size reach the command.
    pub fn forward_window(&self, mut last: Window) {
        let output = Arc::clone(&self.output);
        thread::spawn(move || -> io::Result<()> {
            loop {
                thread::sleep(WINDOW_INTERVAL);
                if let Some(window) = terminal::window().filter(|window| *window != last) {
                    send(&output, &ToAgent::Resize(window))?;
                    last = window;
                }
            }
        });
    }
}

fn send(output: &Mutex<UnixStream>, message: &ToAgent) -> io::Result<()> {
    wire::write_message(&mut *lock(output), message)
}

fn lock(output: &Mutex<UnixStream>) -> std::sync::MutexGuard<'_, UnixStream> {
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Link {
    fn drop(&mut self) {
        // Ends the threads, which hold the socket too.
        let _ = lock(&self.output).shutdown(std::net::Shutdown::Both);
    }
}
