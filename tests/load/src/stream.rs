//! Load on TCP between a guest and its host: the guest's program asks, the host serves.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// What goes with one call, in bytes.
const BLOCK: usize = 128 << 10;

const PATIENCE: Duration = Duration::from_secs(30);

/// Which way, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// From the guest.
    Send,
    /// To the guest.
    Receive,
    /// One byte back and forth.
    Echo,
}

/// One measurement.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The address and port of the host.
    #[arg(long)]
    pub to: SocketAddr,
    /// Which way.
    #[arg(long, default_value = "send")]
    pub way: Way,
    /// For how many milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub milliseconds: u64,
}

/// What a measurement found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Bytes that arrived, as the receiving side counts them; of an echo the round trips.
    pub count: u64,
    /// In which time.
    pub seconds: f64,
}

/// The guest's side.
///
/// # Errors
/// A host that does not answer, or counts other than was sent.
pub fn run(arguments: &Arguments) -> Result<Found> {
    let mut stream = TcpStream::connect_timeout(&arguments.to, PATIENCE).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[arguments.way as u8])?;
    let mut block = vec![0; BLOCK];
    let (start, time) = (Instant::now(), Duration::from_millis(arguments.milliseconds));
    let mut count = 0_u64;
    while start.elapsed() < time {
        count += match arguments.way {
            Way::Send => stream.write(&block)? as u64,
            Way::Receive => stream.read(&mut block)? as u64,
            Way::Echo => {
                stream.write_all(&[1])?;
                stream.read_exact(&mut block[..1])?;
                1
            }
        };
    }
    if arguments.way == Way::Send {
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).context("the host's count")?;
        let counted = u64::from_le_bytes(answer);
        ensure!(counted == count, "{count} bytes were sent, {counted} arrived");
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

fn serve_one(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut block = vec![0; BLOCK];
    stream.read_exact(&mut block[..1])?;
    let mut count = 0_u64;
    match block[0] {
        way if way == Way::Send as u8 => {
            loop {
                match stream.read(&mut block)? {
                    0 => break,
                    more => count += more as u64,
                }
            }
            stream.write_all(&count.to_le_bytes())?;
        }
        way if way == Way::Receive as u8 => loop {
            stream.write_all(&block)?;
        },
        _ => loop {
            stream.read_exact(&mut block[..1])?;
            stream.write_all(&block[..1])?;
        },
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_moves_something() {
        let port = serve().unwrap();
        for way in [Way::Send, Way::Receive, Way::Echo] {
            let to = SocketAddr::from(([127, 0, 0, 1], port));
            let found = run(&Arguments { to, way, milliseconds: 20 }).unwrap();
            assert!(found.count > 0, "{way:?}");
        }
    }
}
