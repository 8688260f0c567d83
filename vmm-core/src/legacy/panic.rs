//! The pvpanic device (QEMU docs/specs/pvpanic.rst): a guest kernel's last word before it halts.

use protocol::Cause;

use crate::bus::BusDevice;
use crate::event::{Event, Events};

/// Bit 0: the guest panicked. It is also the one event that this device says it supports.
const PANICKED: u8 = 1;

/// The one-byte port.
pub struct PanicPort {
    events: Events,
}

impl PanicPort {
    /// Reports to `events`.
    pub fn new(events: Events) -> Self {
        Self { events }
    }
}

impl BusDevice for PanicPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED;
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.first().is_some_and(|value| value & PANICKED != 0) {
            let _ = self.events.send(Event::End(Cause::Panic));
        }
    }
}
