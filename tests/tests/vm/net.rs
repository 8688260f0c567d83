//! Frames reach the host's tap and come back. Every test has a network namespace of its own.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use ozone_tests::harness::Test;
use ozone_tests::tool;
use ozone_tests::vm::{ANSWER, Guest, Vm};
use sha2::{Digest, Sha256};

/// The tests of this file.
pub const TESTS: [Test; 4] = [
    Test::host("net::the_guest_and_the_host_ping_each_other", the_guest_and_the_host_ping_each_other),
    Test::host("net::transfers_of_64_mib_keep_their_checksum", transfers_of_64_mib_keep_their_checksum),
    Test::host("net::a_named_tap_and_its_options_are_used", a_named_tap_and_its_options_are_used),
    Test::host("net::two_queue_pairs_carry_many_flows", two_queue_pairs_carry_many_flows),
];

/// The host's address.
pub const HOST: &str = "192.0.2.1";
/// The guest's address.
pub const GUEST: &str = "192.0.2.2";
/// The longest that a transfer takes.
pub const TRANSFER: Duration = Duration::from_secs(120);

/// Gives this process a network namespace of its own.
pub fn own_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace for the test")?;
    ip(&["link", "set", "lo", "up"])
}

fn ip(arguments: &[&str]) -> Result<()> {
    tool::output(Command::new("ip").args(arguments)).map(drop)
}

/// Gives the guest its address.
pub fn up(vm: &mut Vm) -> Result<()> {
    vm.guest(&format!("ip link set eth0 up && ip addr add {GUEST}/24 dev eth0")).map(drop)
}

fn the_guest_and_the_host_ping_each_other() -> Result<()> {
    own_namespace()?;
    let mut vm = Guest::new()?.option("--net", format!("host-ip={HOST}/24")).boot()?;
    up(&mut vm)?;
    vm.guest(&format!("ping -c 3 -W 5 {HOST}"))?;
    tool::output(Command::new("ping").args(["-c", "3", "-W", "5", GUEST]))?;
    vm.power_off()?;
    let links = std::fs::read_dir("/sys/class/net")?.count();
    let links_here = tool::output(Command::new("ip").args(["-o", "link"]))?;
    ensure!(links_here.lines().count() == 1, "a tap was left behind ({links} links in /sys):\n{links_here}");
    Ok(())
}

/// Bytes whose sequence does not repeat at a power of two: a lost or swapped segment shows.
pub fn sample(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state >> 16).to_le_bytes()[..5]);
    }
    bytes.truncate(length);
    bytes
}

/// The SHA-256 sum as the guest's program shows it.
pub fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Connects to a listener of the guest, whose interface may be away: the kernel says that there is no route when nobody has
/// answered its requests for an address for three seconds.
pub fn connect(address: &str, port: u16) -> Result<TcpStream> {
    let address = format!("{address}:{port}").parse()?;
    let deadline = Instant::now() + ANSWER;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                stream.set_write_timeout(Some(TRANSFER))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::HostUnreachable && Instant::now() < deadline => {}
            Err(error) => return Err(error).with_context(|| format!("connect to the guest within {ANSWER:?}")),
        }
    }
}

/// Starts a listener in the guest that keeps what it receives in `file`.
pub fn listen(vm: &mut Vm, port: u16, file: &str) -> Result<()> {
    vm.guest(&format!("nc -l -p {port} > {file} & until netstat -ltn | grep -q :{port}; do usleep 10000; done"))
        .map(drop)
}

/// Both ways: the host sends and the guest sums up, then the guest sends it back.
fn transfers_of_64_mib_keep_their_checksum() -> Result<()> {
    own_namespace()?;
    let mut vm = Guest::new()?.option("--net", format!("host-ip={HOST}/24")).option("--memory", "512M").boot()?;
    up(&mut vm)?;
    let data = sample(64 << 20);
    let sum = hex(&data);
    listen(&mut vm, 5001, "/received")?;
    let mut stream = connect(GUEST, 5001)?;
    stream.write_all(&data)?;
    drop(stream);
    let (status, output) = vm.command("wait; sha256sum < /received", TRANSFER)?;
    ensure!(status == 0 && output.contains(&sum), "the guest received something else: {output}");

    let listener = TcpListener::bind((HOST, 5002))?;
    let receive = std::thread::spawn(move || -> Result<Vec<u8>> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(TRANSFER))?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    let (status, output) = vm.command(&format!("nc {HOST} 5002 < /received"), TRANSFER)?;
    ensure!(status == 0, "nc: {output}");
    let received = receive.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    ensure!(hex(&received) == sum, "{} bytes of something else came back", received.len());
    vm.power_off()
}

fn a_named_tap_and_its_options_are_used() -> Result<()> {
    own_namespace()?;
    // One that outlives every process, as an operator makes it.
    tool::output(Command::new("tunctl").args(["-t", "given0"]))?;
    ip(&["addr", "add", &format!("{HOST}/24"), "dev", "given0"])?;
    ip(&["link", "set", "given0", "mtu", "1400", "up"])?;
    let mut vm = Guest::new()?.option("--net", "tap=given0,mac=52:54:00:12:34:56,mtu=1400").boot()?;
    ensure!(vm.guest("cat /sys/class/net/eth0/address")?.trim() == "52:54:00:12:34:56");
    ensure!(vm.guest("cat /sys/class/net/eth0/mtu")?.trim() == "1400");
    up(&mut vm)?;
    vm.guest(&format!("ping -c 2 -W 5 -s 1372 {HOST}"))?;
    vm.power_off()?;
    ip(&["link", "show", "given0"]).context("the user's tap is gone")?;
    tool::output(Command::new("tunctl").args(["-d", "given0"])).map(drop)
}

fn two_queue_pairs_carry_many_flows() -> Result<()> {
    own_namespace()?;
    let mut vm = Guest::new()?.option("--cpus", "2").option("--net", format!("host-ip={HOST}/24,queues=2")).boot()?;
    up(&mut vm)?;
    ensure!(vm.guest("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?.trim() == "2");
    let data = sample(100_000);
    for flow in 0..8 {
        listen(&mut vm, 6000 + flow, "/part")?;
        connect(GUEST, 6000 + flow)?.write_all(&data)?;
        let (_, output) = vm.command("wait; sha256sum < /part", TRANSFER)?;
        ensure!(output.contains(&hex(&data)), "flow {flow}: {output}");
    }
    vm.power_off()
}
