//! Round trips over TCP between a guest and its host: the guest's program asks, the host answers.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

const PATIENCE: Duration = Duration::from_secs(30);

/// One measurement.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The address and port of the host.
    #[arg(long)]
    pub to: SocketAddr,
    /// For how many milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub milliseconds: u64,
}

/// What a measurement found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Round trips of one byte.
    pub count: u64,
    /// In which time.
    pub seconds: f64,
}

/// The guest's side.
///
/// # Errors
/// A host that does not answer.
pub fn run(arguments: &Arguments) -> Result<Found> {
    let mut stream = prepared(TcpStream::connect_timeout(&arguments.to, PATIENCE).context("connect")?)?;
    let (start, time) = (Instant::now(), Duration::from_millis(arguments.milliseconds));
    let mut count = 0;
    while start.elapsed() < time {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        count += 1;
    }
    Ok(Found { count, seconds: start.elapsed().as_secs_f64() })
}

/// The host's side: serves one guest after the other on a thread of its own, for as long as this process lives.
///
/// # Errors
/// An address that is taken.
pub fn serve() -> Result<u16> {
    let listener = TcpListener::bind(("0.0.0.0", 0))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A guest that goes away in the middle has noticed it itself.
            let _ = serve_one(stream);
        }
    });
    Ok(port)
}

fn serve_one(stream: TcpStream) -> Result<()> {
    let mut stream = prepared(stream)?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
}

fn prepared(stream: TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back() {
        let to = SocketAddr::from(([127, 0, 0, 1], serve().unwrap()));
        assert!(run(&Arguments { to, milliseconds: 20 }).unwrap().count > 0);
    }
}
