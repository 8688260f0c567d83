//! The keyboard controller: a keyboard that never types, and the reset line.
//!
//! Guests probe the controller with commands and wait half a second for each missing answer, so the answers are here.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::Cause;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::event::Ending;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

const CONTROL_INTERRUPT: u8 = 1;
const CONTROL_SYSTEM: u8 = 1 << 2;
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
const CONTROL_AUX_OFF: u8 = 1 << 5;

const KEYBOARD_ACK: u8 = 0xfa;
/// More than any exchange of the protocol leaves unread.
const MOST_UNREAD: usize = 16;

struct State {
    control: u8,
    /// The command that waits for its data byte.
    pending: Option<u8>,
    last_was_command: bool,
    output: VecDeque<u8>,
}

/// The controller and its keyboard.
pub struct I8042 {
    state: Mutex<State>,
    interrupt: EventFd,
    ending: Arc<Ending>,
}

impl I8042 {
    /// Interrupts through `interrupt`, reports a reset to `ending`.
    pub fn new(interrupt: EventFd, ending: Arc<Ending>) -> Self {
        let control = CONTROL_SYSTEM | CONTROL_AUX_OFF;
        let state = State { control, pending: None, last_was_command: false, output: VecDeque::new() };
        Self { state: Mutex::new(state), interrupt, ending }
    }

    fn answer(&self, state: &mut State, bytes: &[u8], from_keyboard: bool) {
        if state.output.len() + bytes.len() <= MOST_UNREAD {
            state.output.extend(bytes);
        }
        if from_keyboard && state.control & CONTROL_INTERRUPT != 0 {
            let _ = self.interrupt.write(1);
        }
    }

    fn command(&self, state: &mut State, command: u8) {
        match command {
            // Read the control byte; self test, auxiliary port test (absent: clock line stuck), keyboard port test.
            0x20 => self.answer(state, &[state.control], false),
            0xaa => self.answer(state, &[0x55], false),
            0xa9 => self.answer(state, &[0x01], false),
            0xab => self.answer(state, &[0x00], false),
            // The output port: reset line high, A20 open.
            0xd0 => self.answer(state, &[0x03], false),
            0xa7 | 0xa8 => {}
            0xad => state.control |= CONTROL_KEYBOARD_OFF,
            0xae => state.control &= !CONTROL_KEYBOARD_OFF,
            // Commands with a data byte: control byte, output port, loop-backs, to the auxiliary device.
            0x60 | 0xd1..=0xd4 => state.pending = Some(command),
            // Pulse output lines; bit 0 low is the reset line.
            0xf0..=0xff if command & 1 == 0 => self.reset(),
            _ => {}
        }
    }

    fn data(&self, state: &mut State, value: u8) {
        match state.pending.take() {
            Some(0x60) => state.control = value | CONTROL_AUX_OFF,
            Some(0xd1) if value & 1 == 0 => self.reset(),
            Some(0xd2) => self.answer(state, &[value], true),
            Some(_) => {}
            // To the keyboard: reset with self test, identify, anything else acknowledged.
            None => match value {
                0xff => self.answer(state, &[KEYBOARD_ACK, 0xaa], true),
                0xf2 => self.answer(state, &[KEYBOARD_ACK, 0xab, 0x83], true),
                _ => self.answer(state, &[KEYBOARD_ACK], true),
            },
        }
    }

    fn reset(&self) {
        self.ending.tell(Cause::Reset);
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [value] = data else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            DATA => {
                *value = state.output.pop_front().unwrap_or(0);
                if !state.output.is_empty() && state.control & CONTROL_INTERRUPT != 0 {
                    let _ = self.interrupt.write(1);
                }
            }
            COMMAND => {
                *value = STATUS_SYSTEM | STATUS_UNLOCKED;
                if !state.output.is_empty() {
                    *value |= STATUS_OUTPUT_FULL;
                }
                if state.last_was_command {
                    *value |= STATUS_COMMAND;
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            DATA => {
                state.last_was_command = false;
                self.data(&mut state, value);
            }
            COMMAND => {
                state.last_was_command = true;
                state.pending = None;
                self.command(&mut state, value);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use std::sync::mpsc::{self, Receiver};

    fn controller() -> (I8042, Receiver<Event>) {
        let (events, received) = mpsc::channel();
        (
            I8042::new(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap(), Arc::new(Ending::new(events))),
            received,
        )
    }

    fn read(controller: &I8042, offset: u64) -> u8 {
        let mut value = [0xff];
        controller.read(offset, &mut value);
        value[0]
    }

    #[test]
    fn the_reset_command_resets() {
        let (controller, events) = controller();
        controller.write(COMMAND, &[0xfe]);
        assert!(matches!(events.try_recv(), Ok(Event::End(Cause::Reset))));
    }

    #[test]
    fn a_driver_that_probes_gets_its_answers() {
        let (controller, events) = controller();
        assert_eq!(read(&controller, COMMAND) & STATUS_OUTPUT_FULL, 0);
        controller.write(COMMAND, &[0xaa]);
        assert_eq!(read(&controller, COMMAND) & STATUS_OUTPUT_FULL, 1);
        assert_eq!(read(&controller, DATA), 0x55);
        controller.write(COMMAND, &[0x60]);
        controller.write(DATA, &[CONTROL_INTERRUPT]);
        controller.write(COMMAND, &[0x20]);
        assert_eq!(read(&controller, DATA), CONTROL_INTERRUPT | CONTROL_AUX_OFF);
        controller.write(DATA, &[0xf2]);
        assert_eq!([(); 3].map(|()| read(&controller, DATA)), [0xfa, 0xab, 0x83]);
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn a_guest_that_never_reads_fills_no_memory() {
        let (controller, _events) = controller();
        for _ in 0..1000 {
            controller.write(DATA, &[0xff]);
        }
        assert!(controller.state.lock().unwrap().output.len() <= MOST_UNREAD);
    }
}
