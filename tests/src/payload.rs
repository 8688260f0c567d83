//! Guests of a few instructions: they run on any KVM, also on one that emulates every instruction.

/// Where a payload is loaded and entered.
const LOAD: u64 = 0x10_0000;

/// 64-bit machine code, put together by hand.
#[derive(Clone, Debug, Default)]
pub struct Code(Vec<u8>);

impl Code {
    /// Writes a byte to a port.
    #[must_use]
    pub fn out(mut self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high, 0xb0, value, 0xee]);
        self
    }

    /// Prints on the serial port.
    #[must_use]
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3f8, byte))
    }

    /// Prints the four bytes at `address`.
    #[must_use]
    pub fn print_word_at(mut self, address: u64) -> Self {
        self.0.push(0xa1);
        self.0.extend(address.to_le_bytes());
        self.0.extend([0x66, 0xba, 0xf8, 0x03]);
        for _ in 0..4 {
            self.0.extend([0xee, 0xc1, 0xe8, 0x08]);
        }
        self
    }

    /// Reads a port `count` times.
    #[must_use]
    pub fn read_port(mut self, port: u16, count: u32) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high]);
        self.times(count, &[0xec])
    }

    /// Reads the 32 bits at `address` `count` times.
    #[must_use]
    pub fn read_memory(mut self, address: u64, count: u32) -> Self {
        self.0.extend([0x48, 0xbb]);
        self.0.extend(address.to_le_bytes());
        self.times(count, &[0x8b, 0x03])
    }

    /// Repeats an instruction that leaves ecx alone.
    #[must_use]
    pub fn times(mut self, count: u32, instruction: &[u8]) -> Self {
        self.0.push(0xb9);
        self.0.extend(count.to_le_bytes());
        self.0.extend(instruction);
        self.0.extend([0xff, 0xc9]);
        let back = i8::try_from(instruction.len() + 4).unwrap_or(0).wrapping_neg();
        self.0.extend([0x75, back.to_le_bytes()[0]]);
        self
    }

    /// Switches the machine off.
    #[must_use]
    pub fn power_off(self) -> Self {
        self.out(0x600, 0x34).halt()
    }

    /// Bytes as they are.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Halts for ever.
    #[must_use]
    pub fn halt(self) -> Self {
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// An ELF executable that is loaded and entered at 1 MiB.
    #[must_use]
    pub fn elf(&self) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 2;
        elf[18] = 62;
        elf[24..32].copy_from_slice(&LOAD.to_le_bytes());
        elf[32] = 64;
        elf[52] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 1;
        elf[68] = 5;
        elf[72..80].copy_from_slice(&120u64.to_le_bytes());
        elf[80..88].copy_from_slice(&LOAD.to_le_bytes());
        elf[88..96].copy_from_slice(&LOAD.to_le_bytes());
        elf[96..104].copy_from_slice(&(self.0.len() as u64).to_le_bytes());
        elf[104..112].copy_from_slice(&(self.0.len() as u64).to_le_bytes());
        elf.extend(&self.0);
        elf
    }
}
