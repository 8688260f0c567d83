//! The sleep and reset registers of hardware-reduced ACPI (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7).

use std::sync::Arc;

use protocol::Cause;

use crate::bus::BusDevice;
use crate::event::Ending;

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of soft-off, as in the `_S5` object.
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The three registers.
pub struct PowerPort {
    ending: Arc<Ending>,
}

impl PowerPort {
    /// Reports to `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending }
    }
}

impl BusDevice for PowerPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        // Sleep status: never woken from sleep. The other two read as written last, which is nothing.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        let off = SLEEP_ENABLE | (SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT);
        let mask = SLEEP_ENABLE | (SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT);
        let cause = match offset {
            SLEEP_CONTROL if value & mask == off => Cause::PowerOff,
            RESET if value == RESET_VALUE => Cause::Reset,
            _ => return,
        };
        self.ending.tell(cause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use std::sync::mpsc;

    fn ends(offset: u64, value: u8) -> Option<Cause> {
        let (events, received) = mpsc::channel();
        let port = PowerPort::new(Arc::new(Ending::new(events)));
        port.write(offset, &[value]);
        port.write(offset, &[value]);
        let first = received.try_recv().ok().map(|event| match event {
            Event::End(cause) => cause,
            other => panic!("{other:?}"),
        });
        assert!(received.try_recv().is_err(), "an end is told once");
        first
    }

    #[test]
    fn only_the_defined_values_end_the_machine() {
        assert_eq!(ends(SLEEP_CONTROL, 0x34), Some(Cause::PowerOff));
        assert_eq!(ends(SLEEP_CONTROL, 0x14), None, "without the enable bit");
        assert_eq!(ends(SLEEP_CONTROL, 0x24), None, "another sleep type");
        assert_eq!(ends(RESET, 1), Some(Cause::Reset));
        assert_eq!(ends(RESET, 0), None);
        assert_eq!(ends(SLEEP_STATUS, 0x80), None);
    }
}
