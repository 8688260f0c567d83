//! QEMU's control socket, as far as saving and resuming need it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// QEMU answers within this, or it hangs.
const ANSWER: Duration = Duration::from_secs(60);

/// A connected control socket.
pub struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
}

impl Qmp {
    /// Does the handshake, and switches on what saving and resuming need.
    pub fn new(socket: UnixStream) -> Result<Self> {
        socket.set_read_timeout(Some(ANSWER))?;
        let mut qmp = Self { input: BufReader::new(socket.try_clone()?), output: socket };
        qmp.message().context("QEMU's greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        let capability = |name| json!({ "capability": name, "state": true });
        let capabilities = [capability("x-ignore-shared"), capability("events")];
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        Ok(qmp)
    }

    /// Executes a command.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<()> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.output.write_all(line.as_bytes())?;
        loop {
            let message = self.message().with_context(|| format!("answer to {command}"))?;
            if message.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
        }
    }

    /// Starts a migration by `command` and waits until it is complete.
    pub fn migrate(&mut self, command: &str, uri: &str) -> Result<()> {
        self.execute(command, json!({ "uri": uri }))?;
        loop {
            let message = self.message().with_context(|| format!("end of {command}"))?;
            if message.get("event").and_then(Value::as_str) == Some("MIGRATION") {
                match message.pointer("/data/status").and_then(Value::as_str) {
                    Some("completed") => return Ok(()),
                    Some("failed" | "cancelled") => bail!("QEMU's {command} failed"),
                    _ => {}
                }
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.input.read_line(&mut line)? {
            0 => bail!("QEMU closed its control socket"),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }
}
