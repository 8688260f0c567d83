//! The console as the driver sees it (virtio 1.2, sections 5.3.3 and 5.3.4).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use protocol::{DeviceSpec, Fault, FromBackend, ToBackend};
use virtio_backend::descriptor::wait;
use virtio_backend::{Device, Opened, Outbox, threads};

use crate::buffer::{Buffer, LAST_WORDS};
use crate::queues::{Receive, Transmit};
use crate::{host, input, terminal};

/// Columns and rows are in the configuration space (section 5.3.3).
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;

/// The console itself.
pub struct ConsoleDevice {
    has_size: bool,
    /// Columns in the lower half, rows in the upper: they change together.
    size: AtomicU32,
    to_host: Arc<Buffer>,
    serial: Option<Arc<OwnedFd>>,
    outbox: Outbox,
}

/// Opens the console that `spec` describes.
///
/// # Errors
/// See [`host::open`].
pub fn open(spec: DeviceSpec, outbox: &Outbox) -> Result<Opened<ConsoleDevice>, Fault> {
    let DeviceSpec::Console(spec) = spec else {
        return Err(Fault::internal("ozone-console was started for a device that is not a console"));
    };
    terminal::end_on_sigterm().map_err(|errno| Fault::host(format!("handle SIGTERM: {errno}")))?;
    let buffer = || Buffer::new().map(Arc::new).map_err(|errno| Fault::host(format!("make an eventfd: {errno}")));
    let (to_guest, to_host) = (buffer()?, buffer()?);
    let outcome = host::open(spec.host, &to_guest, &to_host, outbox).and_then(|host| {
        let serial = spec.serial.map(|serial| Arc::new(serial.into_fd()));
        if let Some(serial) = &serial {
            let (source, target) = (Arc::clone(serial), Arc::clone(&to_host));
            threads::start("serial", move || input::stream(source.as_fd(), &target))?;
        }
        Ok((host, serial))
    });
    // From a failure on nobody else would do it.
    let (host, serial) = outcome.inspect_err(|_| terminal::restore())?;
    let (columns, rows) = host.size.unwrap_or_default();
    let device = ConsoleDevice {
        has_size: host.size.is_some(),
        size: AtomicU32::new(pack(columns, rows)),
        to_host: Arc::clone(&to_host),
        serial,
        outbox: outbox.clone(),
    };
    let queues = vec![Box::new(Receive::new(to_guest)) as _, Box::new(Transmit::new(to_host)) as _];
    Ok(Opened { device, queues })
}

fn pack(columns: u16, rows: u16) -> u32 {
    u32::from(columns) | u32::from(rows) << 16
}

impl Device for ConsoleDevice {
    fn features(&self) -> u64 {
        if self.has_size { 1 << VIRTIO_CONSOLE_F_SIZE } else { 0 }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.size.load(Ordering::Relaxed).to_le_bytes().to_vec();
        config.extend(1_u32.to_le_bytes()); // max_nr_ports, without VIRTIO_CONSOLE_F_MULTIPORT of no meaning
        config.extend(0_u32.to_le_bytes()); // emerg_wr, not offered
        config
    }

    fn message(&self, message: &ToBackend) -> bool {
        let ToBackend::Resize { columns, rows } = message else { return false };
        self.size.store(pack(*columns, *rows), Ordering::Relaxed);
        // Whoever hears of this finds the size in the configuration space.
        self.outbox.send(FromBackend::Resized);
        true
    }

    /// Lets the guest's last words out, then restores the terminal.
    fn close(&self) {
        let deadline = Instant::now() + LAST_WORDS;
        while let Some(serial) = &self.serial {
            let mut more = [PollFd::new(serial.as_fd(), PollFlags::POLLIN)];
            let waiting = matches!(wait(&mut more, Some(Duration::ZERO)), Ok(1))
                && more.iter().any(|fd| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLIN)));
            if !waiting || Instant::now() >= deadline {
                break;
            }
            std::thread::yield_now();
        }
        if !self.to_host.settle(deadline) {
            log::warn!("the console's last output was not taken in time");
        }
        terminal::restore();
    }
}
