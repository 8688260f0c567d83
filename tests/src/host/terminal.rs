//! This process's own terminal.

use std::io::{self, IsTerminal};

use agent::wire::Window;
use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// True if a person sits at both ends: standard input and output are terminals.
#[must_use]
pub fn is_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// The size of the terminal, if standard output is one.
#[must_use]
pub fn window() -> Option<Window> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    Some(Window { rows: size.ws_row, columns: size.ws_col })
}

/// Standard input's terminal in raw mode, so that every key reaches the host; restored on drop.
pub struct Raw(Option<Termios>);

impl Raw {
    /// Enters raw mode; does nothing if standard input is no terminal.
    pub fn enter() -> Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(&stdin).context("read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw).context("set the terminal's mode")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Flush, before);
        }
    }
}
