//! Lines on ozone's standard error. Nothing here ever waits for whoever reads them.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{OutputFlags, tcgetattr};

/// Lines that nobody took.
static LOST: AtomicU64 = AtomicU64::new(0);

/// How long the last line may wait for its reader.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// The longest text of others in a line of ours, in bytes.
const FOREIGN: usize = 1024;

/// Prints one line, if whoever reads standard error has room for it.
pub fn say(line: &str) {
    if !ready(Duration::ZERO) {
        LOST.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let lost = LOST.swap(0, Ordering::Relaxed);
    if lost > 0 {
        write(&format!("{lost} lines were lost: standard error was not read"));
    }
    write(line);
}

/// Prints the line that says how it ended.
pub fn say_last(line: &str) {
    if ready(LAST_PATIENCE) {
        write(line);
    }
}

fn ready(patience: Duration) -> bool {
    let stderr = std::io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
    poll(&mut fds, timeout).is_ok_and(|count| count > 0)
}

fn write(line: &str) {
    let mut stderr = std::io::stderr();
    // A console has made the terminal raw: line breaks are not completed by it.
    let raw = stderr.is_terminal()
        && tcgetattr(&stderr).is_ok_and(|settings| !settings.output_flags.contains(OutputFlags::OPOST));
    let end = if raw { "\r\n" } else { "\n" };
    // One write(2), so that it cannot be mixed with another program's and fits the room that poll(2) promised.
    let _ = stderr.write_all(format!("ozone: {line}{end}").as_bytes());
}

/// Text of another process, made harmless: one line, of bounded length, without control characters.
pub fn harmless(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(FOREIGN));
    for character in text.chars() {
        if line.len() >= FOREIGN {
            line.push('…');
            break;
        }
        // Control characters, and those that change the direction or looks of what stands around them.
        if character.is_control()
            || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_break_out_of_its_line() {
        assert_eq!(harmless("a\nozone: fine\u{1b}[2J\r"), "a\\nozone: fine\\u{1b}[2J\\r");
        assert_eq!(harmless("\u{202e}x"), "\\u{202e}x");
        assert!(harmless(&"x".repeat(1 << 20)).len() < FOREIGN + 8);
    }
}
