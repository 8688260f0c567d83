//! The report of a forbidden system call: one line on the log, written by the signal handler that ends the process.
//!
//! A filter answers such a call with SECCOMP_RET_TRAP: the call is not made, and its thread gets SIGSYS (seccomp(2)). The
//! handler writes which call it was and then makes another forbidden one. SIGSYS is blocked while its handler runs, and a
//! blocked SIGSYS that a filter raises ends the process by its default action: so the process has died of SIGSYS, by the
//! kernel's word, whatever it wrote before. Where there is no handler yet that is so at the first call.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

use crate::names;

/// What a report begins with, in the form of the process's other log lines.
const PREFIX: &str = "error forbidden system call ";

/// The call that the handler ends with: harmless, and in no table.
pub(crate) const LAST: i64 = libc::SYS_getppid;

/// `si_code` of a filter's SIGSYS (Linux `include/uapi/asm-generic/siginfo.h`).
const SYS_SECCOMP: libc::c_int = 1;

/// The exit status where no filter is in force.
const WITHOUT_FILTER: libc::c_int = 128 + libc::SIGSYS;

/// A system call as a report names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call(i64);

impl Call {
    /// The call that a line of a process's log reports, if it reports one.
    ///
    /// The process wrote it: only if it then died of SIGSYS has it made a forbidden call, and even then which one is no
    /// more than what it says.
    pub fn reported_by(line: &str) -> Option<Self> {
        let (number, _) = line.strip_prefix(PREFIX)?.split_once(' ')?;
        number.parse().ok().map(Self)
    }
}

impl Call {
    /// Its number on this architecture.
    pub fn number(self) -> i64 {
        self.0
    }

    /// Its name, if there is a call of that number.
    pub fn name(self) -> Option<&'static str> {
        names::name(self.0)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = names::name(self.0).unwrap_or("without a name");
        write!(formatter, "{name} ({})", self.0)
    }
}

/// Has forbidden calls reported from now on, by every thread of this process. The set-up filter lets nobody change it.
///
/// # Errors
/// What sigaction(2) answers.
pub fn report() -> io::Result<()> {
    install(handle)
}

/// The same for `ozone`, whose standard error is its user's: its lines begin with its name, and if nobody reads them the
/// report is left out rather than waited with.
///
/// # Errors
/// What sigaction(2) answers.
pub fn report_of_ozone() -> io::Result<()> {
    install(handle_of_ozone)
}

type Handler = extern "C" fn(libc::c_int, *const Raised, *const libc::c_void);

fn install(handler: Handler) -> io::Result<()> {
    let mut action: libc::sigaction = {
        // SAFETY: numbers and an optional function, of which zero is a value.
        unsafe { MaybeUninit::zeroed().assume_init() }
    };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the set is ours. The handler makes a few system calls and touches nothing but its own stack and constants,
    // which is safe at any moment of any thread (signal-safety(7)), and its signature is that of SA_SIGINFO.
    let result = unsafe {
        libc::sigfillset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &raw const action, null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `siginfo_t` of SIGSYS on a 64-bit host (sigaction(2); Linux `include/uapi/asm-generic/siginfo.h`, `_sigsys`), which the
/// libc crate leaves opaque.
#[repr(C)]
struct Raised {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    _padding: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    architecture: libc::c_uint,
}

extern "C" fn handle(_: libc::c_int, raised: *const Raised, _: *const libc::c_void) {
    tell_and_end(raised, b"", false);
}

extern "C" fn handle_of_ozone(_: libc::c_int, raised: *const Raised, _: *const libc::c_void) {
    tell_and_end(raised, b"ozone: ", true);
}

/// Writes the report, if `polite` only if there is room for it, and ends the process.
fn tell_and_end(raised: *const Raised, begin: &[u8], polite: bool) {
    // SAFETY: the kernel hands over a siginfo_t, of which this is the form for SIGSYS; whoever else sent the signal leaves
    // another form of the same size, whose numbers are not used.
    let (code, call, architecture) = unsafe { ((*raised).code, (*raised).call, (*raised).architecture) };
    if code == SYS_SECCOMP && (!polite || has_room()) {
        let mut line = Line::new();
        line.push(begin);
        line.report(call.into(), architecture);
        let text = line.text();
        // SAFETY: the pointer and the length are those of a slice. A log pipe that is full takes nothing, and no thread
        // waits for it.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    }
    // SAFETY: neither call takes a pointer. The second is reached where no filter is in force.
    unsafe {
        libc::syscall(LAST);
        libc::_exit(WITHOUT_FILTER);
    }
}

/// Whether standard error takes a line at once.
fn has_room() -> bool {
    let mut stderr = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one structure, which lives across the call.
    unsafe { libc::poll(&raw mut stderr, 1, 0) > 0 }
}

/// A line that is made without the heap, cut at its length.
struct Line {
    bytes: [u8; 128],
    length: usize,
}

impl Line {
    const fn new() -> Self {
        Self { bytes: [0; 128], length: 0 }
    }

    /// `PREFIX`, the number, the name, the architecture as AUDIT_ARCH_* (Linux `include/uapi/linux/audit.h`).
    fn report(&mut self, call: i64, architecture: u32) {
        self.push(PREFIX.as_bytes());
        self.number(call.unsigned_abs(), 10);
        self.push(b" (");
        self.push(names::name(call).unwrap_or("without a name").as_bytes());
        self.push(b"), architecture 0x");
        self.number(architecture.into(), 16);
        self.push(b"\n");
    }

    fn number(&mut self, mut number: u64, base: u64) {
        let mut digits = [0; 20];
        let mut first = digits.len();
        for place in digits.iter_mut().rev() {
            *place = b"0123456789abcdef".get((number % base) as usize).copied().unwrap_or(b'?');
            first -= 1;
            number /= base;
            if number == 0 {
                break;
            }
        }
        self.push(digits.get(first..).unwrap_or_default());
    }

    fn push(&mut self, text: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(self.length).zip(text) {
            *place = *byte;
            self.length += 1;
        }
    }

    fn text(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(call: i64) -> String {
        let mut line = Line::new();
        line.report(call, 0xc000_003e);
        String::from_utf8(line.text().to_vec()).unwrap()
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let text = line(libc::SYS_socket);
        assert_eq!(text, "error forbidden system call 41 (socket), architecture 0xc000003e\n");
        assert_eq!(Call::reported_by(&text).unwrap().to_string(), "socket (41)");
        assert_eq!(Call::reported_by(&line(9999)).unwrap().to_string(), "without a name (9999)");
        assert_eq!(line(0).split(' ').nth(4), Some("0"));
    }

    #[test]
    fn other_lines_report_nothing() {
        for line in ["", "error forbidden system call ", "error forbidden system call x y", "info socket (41)"] {
            assert_eq!(Call::reported_by(line), None, "{line}");
        }
    }

    #[test]
    fn a_form_of_siginfo_is_no_larger_than_the_kernels() {
        assert!(size_of::<Raised>() <= size_of::<libc::siginfo_t>());
        assert_eq!(std::mem::offset_of!(Raised, call), 24);
    }
}
