//! What the documents say of the tests.

use anyhow::{Result, ensure};
use ozone_tests::harness::Test;

/// The tests of this file.
pub const TESTS: [Test; 1] = [Test::local("documents::the_threat_model_names_tests_that_are_there", named_tests_exist)];

const THREAT_MODEL: &str = include_str!("../../../THREAT-MODEL.md");

/// Names in backticks that look like a test of this executable's, or like a group of them.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| {
        name.contains("::") && name.chars().all(|c| c.is_ascii_lowercase() || "_:0123456789".contains(c))
    })
}

fn named_tests_exist() -> Result<()> {
    let tests = crate::tests();
    let names: Vec<&str> = named(THREAT_MODEL).collect();
    ensure!(names.len() > 10, "the threat model names only {names:?}");
    for name in names {
        let exists =
            tests.iter().any(|test| test.name() == name || name.ends_with("::") && test.name().starts_with(name));
        ensure!(exists, "there is no test '{name}'");
    }
    Ok(())
}
