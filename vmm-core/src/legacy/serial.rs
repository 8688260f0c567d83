//! COM1, for output alone: the console is a virtio device in a process of its own.
//!
//! A vCPU thread puts the bytes into a bounded ring; a thread of its own writes them to the pipe. When nobody reads
//! the pipe, what the ring cannot hold is lost and counted, and the guest is never held up.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::log::Rare;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Bytes held for a reader that is slow.
const RING: usize = 64 * 1024;

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    lost: u64,
    writing: bool,
}

/// The vCPUs' end of the ring.
#[derive(Clone, Default)]
pub struct Transmitter {
    shared: Arc<(Mutex<Ring>, Condvar)>,
}

impl Transmitter {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to `pipe` whatever the guest sends, until the pipe has no reader any more. Runs on a thread of its own.
    pub fn drain(&self, mut pipe: File) {
        let mut overflows = Rare::default();
        loop {
            let (chunk, lost) = {
                let mut ring = self.ring();
                ring.writing = false;
                self.shared.1.notify_all();
                while ring.bytes.is_empty() {
                    ring = self.shared.1.wait(ring).unwrap_or_else(PoisonError::into_inner);
                }
                ring.writing = true;
                let chunk: Vec<u8> = ring.bytes.drain(..).collect();
                (chunk, std::mem::take(&mut ring.lost))
            };
            if lost > 0
                && let Some(times) = overflows.again()
            {
                log::warn!("serial port: {lost} bytes were lost, nobody read them in time ({times} times)");
            }
            if pipe.write_all(&chunk).is_err() {
                log::warn!("serial port: nobody reads its output any more");
                return;
            }
        }
    }

    /// Waits until everything sent so far is in the pipe, but no longer than `most`.
    pub fn flush(&self, most: Duration) {
        let ring = self.ring();
        let unfinished = |ring: &mut Ring| !ring.bytes.is_empty() || ring.writing;
        drop(self.shared.1.wait_timeout_while(ring, most, unfinished));
    }
}

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut ring = self.ring();
        let room = RING.saturating_sub(ring.bytes.len()).min(bytes.len());
        ring.bytes.extend(bytes.iter().take(room));
        ring.lost += (bytes.len() - room) as u64;
        self.shared.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The 16550A's registers.
pub struct SerialPort {
    serial: Mutex<Serial<Interrupt, NoEvents, Transmitter>>,
}

impl SerialPort {
    /// A port that interrupts through `interrupt` and sends to `transmitter`.
    pub fn new(interrupt: EventFd, transmitter: Transmitter) -> Self {
        Self { serial: Mutex::new(Serial::new(Interrupt(interrupt), transmitter)) }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let ([value], Ok(offset)) = (data, u8::try_from(offset)) else { return };
        *value = self.serial.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let ([value], Ok(offset)) = (data, u8::try_from(offset)) else { return };
        // The only failure is an interrupt that cannot be raised: one is pending then already.
        let _ = self.serial.lock().unwrap_or_else(PoisonError::into_inner).write(offset, *value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn pipe() -> (File, File) {
        let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
        (reader.into(), writer.into())
    }

    #[test]
    fn what_the_guest_sends_comes_out_of_the_pipe() {
        let transmitter = Transmitter::default();
        let port = SerialPort::new(EventFd::new(0).unwrap(), transmitter.clone());
        let (mut reader, writer) = pipe();
        let draining = transmitter.clone();
        std::thread::spawn(move || draining.drain(writer));
        for byte in b"early" {
            port.write(0, &[*byte]);
        }
        let mut text = [0; 5];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"early");
    }

    #[test]
    fn a_reader_that_sleeps_costs_bytes_and_no_time() {
        let mut transmitter = Transmitter::default();
        let flood = vec![b'x'; RING + 1000];
        assert_eq!(transmitter.write(&flood).unwrap(), flood.len());
        assert_eq!(transmitter.ring().lost, 1000);
        transmitter.flush(Duration::from_millis(1));
    }

    #[test]
    fn wide_accesses_are_ignored() {
        let port = SerialPort::new(EventFd::new(0).unwrap(), Transmitter::default());
        let mut data = [0xff; 4];
        port.read(5, &mut data);
        port.write(0, &data);
        assert_eq!(data, [0xff; 4]);
    }
}
