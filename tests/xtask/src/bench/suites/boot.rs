//! A Linux guest from the exec of its VMM to its init and back to the VMM's end: same kernel, initial ramdisk and memory
//! under every VMM of `vmms.txt`.
//!
//! The suite runs twice: by the clock, and in a test host whose clock counts executed instructions, of host and guest
//! together, where figures repeat whatever else the machine does.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ozone_tests::artifacts::GuestFiles;
use ozone_tests::vm::Vm;

use crate::bench::first_entry::FirstEntry;
use crate::bench::noise::processors;
use crate::bench::{Contender, Context, Figure, Row, partners, processor_time};

const VMMS: &str = include_str!("vmms.txt");

const MEMORY: &str = "256";
/// The last word but one keeps the kernel from looking for a PC's clock, which QEMU's microvm lacks: it spins for a second
/// before it gives up.
const APPEND: &str = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off audit=0 initcall_blacklist=cmos_init \
                      ozone.init=poweroff";

/// A guest takes seconds on a slow and busy machine; where instructions are counted, nothing else makes it slow.
const PATIENCE: Duration = Duration::from_secs(120);
const COUNTED_PATIENCE: Duration = Duration::from_secs(15);

/// One line of `vmms.txt`.
#[derive(Debug, PartialEq, Eq)]
struct Vmm<'a> {
    name: &'a str,
    init: &'a str,
    command: Vec<&'a str>,
}

/// What a kernel is loaded from.
const FORMS: [&str; 2] = ["bzImage", "ELF"];

/// The names of all that is measured.
pub fn contenders() -> Result<Vec<String>> {
    let names = |vmm: Vmm<'_>| FORMS.map(|form| name(&vmm, form));
    Ok(vmms(VMMS)?.into_iter().flat_map(names).collect())
}

fn name(vmm: &Vmm<'_>, form: &str) -> String {
    format!("{}, {form}", vmm.name)
}

/// Measures.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let files = GuestFiles::here()?;
    let kernels = FORMS.into_iter().zip([files.bzimage_6_1(), files.vmlinux_6_1()]).collect::<Vec<_>>();
    let entry = FirstEntry::new().map_err(|error| context.lacks(format!("first guest instruction: {error:#}"))).ok();
    let mut contenders = Vec::new();
    for vmm in vmms(VMMS)? {
        let program = vmm.command.first().copied().unwrap_or_default();
        let Some(program) = partners::find(program, context.partners.as_deref()) else {
            context.lacks(format!("{}: no program {program}", vmm.name));
            continue;
        };
        for (form, kernel) in &kernels {
            let arguments: Vec<String> =
                vmm.command.iter().skip(1).map(|word| fill(word, kernel, &files.initramfs_6_1())).collect();
            let (program, init, entry) = (program.clone(), vmm.init.to_owned(), entry.as_ref());
            let measure = move || boot(Command::new(&program).args(&arguments), &init, entry);
            contenders.push(Contender::new(name(&vmm, form), measure));
        }
    }
    context.compare(contenders)
}

fn vmms(text: &str) -> Result<Vec<Vmm<'_>>> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    lines
        .map(|line| match line.split('|').map(str::trim).collect::<Vec<_>>().as_slice() {
            [name, init, command] => Ok(Vmm { name, init, command: command.split_whitespace().collect() }),
            _ => bail!("not NAME | INIT | COMMAND: {line}"),
        })
        .collect()
}

fn fill(word: &str, kernel: &Path, initrd: &Path) -> String {
    let path = |path: &Path| path.to_string_lossy().into_owned();
    word.replace("{kernel}", &path(kernel))
        .replace("{initrd}", &path(initrd))
        .replace("{append}", APPEND)
        .replace("{memory}", MEMORY)
}

/// One guest, from nothing to nothing.
fn boot(command: &mut Command, init: &str, entry: Option<&FirstEntry>) -> Result<Vec<Figure>> {
    let patience = if is_counted() { COUNTED_PATIENCE } else { PATIENCE };
    entry.map(FirstEntry::arm).transpose()?;
    let before = processor_time::of_children()?;
    let begin = processor_time::clock();
    let start = Instant::now();
    let mut vm = Vm::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))
        .with_context(|| format!("start {}", command.get_program().display()))?;
    vm.expect(init, patience)?;
    let to_init = start.elapsed();
    let status = vm.wait(patience)?;
    let to_end = start.elapsed();
    ensure!(status.success(), "{status}\n{}", vm.error_text());
    let busy = processor_time::of_children()? - before;
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let mut figures = Vec::new();
    if let Some(first) = entry.map(FirstEntry::at).transpose()?.flatten() {
        figures.push(Figure::new("to the first guest instruction", "ms", milliseconds(first.saturating_sub(begin))));
    }
    figures.push(Figure::new("to init", "ms", milliseconds(to_init)));
    figures.push(Figure::new("to the VMM's end", "ms", milliseconds(to_end)));
    figures.push(Figure::new("processor time of the VMM, guest included", "ms", milliseconds(busy)));
    // What is left is the host's kernel's threads, the bench, and nothing to do.
    if is_counted() {
        figures.push(Figure::new("other time", "ms", milliseconds(to_end) - milliseconds(busy)));
    }
    Ok(figures)
}

/// Hosts that count instructions have one processor, others have two.
fn is_counted() -> bool {
    processors() == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_vmm() {
        let vmms = vmms(VMMS).unwrap();
        assert_eq!(vmms[0].name, "ozone");
        assert!(vmms.iter().all(|vmm| vmm.command.contains(&"{kernel}") && vmm.command.contains(&"{append}")));
        assert!(super::vmms("a | b").is_err());
    }

    #[test]
    fn a_value_with_blanks_stays_one_argument() {
        assert!(fill("{append}", Path::new("k"), Path::new("i")).contains(' '));
        assert_eq!(fill("{kernel}", Path::new("/a b"), Path::new("i")), "/a b");
    }
}
