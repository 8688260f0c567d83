//! The host's NUMA nodes (Documentation/ABI/stable/sysfs-devices-node).

use std::fs;
use std::path::Path;

/// Where the host says which there are.
pub const NODES: &str = "/sys/devices/system/node";

/// The processors of a node, as a list.
///
/// # Errors
/// Why the node cannot be had, as a clause.
pub fn processors(nodes: &Path, node: u32) -> Result<String, String> {
    let Ok(online) = fs::read_to_string(nodes.join("online")) else {
        return Err(format!("this host has no NUMA nodes ({} is missing)", nodes.display()));
    };
    let Ok(list) = fs::read_to_string(nodes.join(format!("node{node}")).join("cpulist")) else {
        return Err(format!("this host has no such NUMA node; it has {}", online.trim()));
    };
    match list.trim() {
        "" => Err(format!("NUMA node {node} has memory only; write --limit cpuset.mems={node} for that")),
        list => Ok(list.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_its_processors_or_a_reason() {
        let nodes = tempfile::tempdir().unwrap();
        assert!(processors(nodes.path(), 0).unwrap_err().contains("no NUMA nodes"));
        fs::write(nodes.path().join("online"), "0-1\n").unwrap();
        for (node, list) in [(0, "0-3,8\n"), (1, "\n")] {
            let directory = nodes.path().join(format!("node{node}"));
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("cpulist"), list).unwrap();
        }
        assert_eq!(processors(nodes.path(), 0), Ok("0-3,8".to_owned()));
        assert!(processors(nodes.path(), 1).unwrap_err().contains("memory only"));
        assert!(processors(nodes.path(), 2).unwrap_err().ends_with("it has 0-1"));
    }
}
