//! The network interface's backend alone, between a driver without a guest and a tap in a network namespace of the
//! bench's own: beside the kernel's vhost-net where there is one, and beside reads and writes on the tap, which are the
//! limit.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use load::net::Found;
use ozone_tests::tool;

use super::{Context, Row};
use crate::bench::{Contender, Figure};

/// How long one run takes, in milliseconds.
const MILLISECONDS: u64 = 500;

/// Frames: the least, what fills an MTU of 1500, and what TCP gives to a device that divides: 45 segments.
const FRAMES: [(usize, &str); 3] = [(64, "64 B"), (1514, "1514 B"), (65_214, "64 KiB, undivided")];

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let load = super::load_program()?;
    let has_vhost = Path::new("/dev/vhost-net").exists();
    if !has_vhost {
        context.lacks("the kernel's vhost-net: there is no /dev/vhost-net here; the suite net-native-host has it");
    }
    let mut rows = Vec::new();
    for (way, words) in [("transmit", "from the driver"), ("receive", "to the driver")] {
        for (bytes, size) in FRAMES {
            let contender = |by: &'static str, name: &str| {
                let mut command = Command::new(&load);
                command.args(["net", "--by", by, "--way", way, "--bytes", &bytes.to_string()]);
                command.args(["--milliseconds", &MILLISECONDS.to_string()]);
                Contender::new(format!("{words}, {size}: {name}"), move || {
                    figures(bytes, &serde_json::from_str(&tool::output(&mut command)?)?)
                })
            };
            let mut contenders = vec![contender("ozone", "ozone"), contender("raw", "the tap itself")];
            if has_vhost {
                contenders.insert(1, contender("vhost-net", "vhost-net"));
            }
            rows.extend(context.compare(contenders)?);
        }
    }
    Ok(rows)
}

fn figures(bytes: usize, found: &Found) -> Result<Vec<Figure>> {
    ensure!(found.frames > 0, "no frame arrived");
    let frames = found.frames as f64;
    Ok(vec![
        Figure::new("frames", "1/s", frames / found.seconds),
        Figure::new("bytes", "MB/s", frames * bytes as f64 / found.seconds / 1e6),
        Figure::new("processor, device", "µs/frame", found.backend_cpu as f64 / frames / 1e3),
        Figure::new("processor, driver and kernel's side", "µs/frame", found.driver_cpu as f64 / frames / 1e3),
        Figure::new("lost", "1/frame", found.lost as f64 / frames),
        Figure::new("kicks", "1/frame", found.kicks as f64 / frames),
    ])
}
