//! The pvpanic device (QEMU docs/specs/pvpanic.rst): a guest kernel's last word before it halts.

use std::sync::Arc;

use protocol::Cause;

use crate::bus::BusDevice;
use crate::event::Ending;

/// Bit 0: the guest panicked. It is also the one event that this device says it supports.
const PANICKED: u8 = 1;

/// The one-byte port.
pub struct PanicPort {
    ending: Arc<Ending>,
}

impl PanicPort {
    /// Reports to `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending }
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
            self.ending.tell(Cause::Panic);
        }
    }
}
