//! The escape of a terminal: Ctrl-A x leaves the machine, Ctrl-A a (or Ctrl-A twice) sends a Ctrl-A.

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// Where in an escape the input is.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Appends to `guest` what of `input` is for the guest; whether the user asked to leave.
    pub fn filter(&mut self, input: &[u8], guest: &mut Vec<u8>) -> bool {
        let mut leave = false;
        for &byte in input {
            match (std::mem::take(&mut self.pending), byte) {
                (false, ESCAPE) => self.pending = true,
                (false, byte) => guest.push(byte),
                (true, b'x' | b'X') => leave = true,
                (true, b'a' | ESCAPE) => guest.push(ESCAPE),
                // Not an escape of ours: the user meant the guest, a screen(1) in it perhaps.
                (true, byte) => guest.extend([ESCAPE, byte]),
            }
        }
        leave
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(inputs: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut escape, mut guest) = (Escape::default(), Vec::new());
        let leave = inputs.iter().fold(false, |leave, input| escape.filter(input, &mut guest) | leave);
        (guest, leave)
    }

    #[test]
    fn plain_input_passes() {
        assert_eq!(filter(&[b"ls\r\x03x"]), (b"ls\r\x03x".to_vec(), false));
    }

    #[test]
    fn the_escape_leaves_even_when_divided() {
        assert_eq!(filter(&[b"a\x01", b"xb"]), (b"ab".to_vec(), true));
    }

    #[test]
    fn a_ctrl_a_can_be_sent() {
        assert_eq!(filter(&[b"\x01\x01", b"\x01a"]), (vec![1, 1], false));
        assert_eq!(filter(&[b"\x01\x01x"]), (vec![1, b'x'], false));
        assert_eq!(filter(&[b"\x01c"]), (vec![1, b'c'], false));
    }
}
