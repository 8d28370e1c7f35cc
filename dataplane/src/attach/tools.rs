//! The few settings of devices that are left to iproute2 and ethtool.

use std::process::Command;

use super::error::AttachError;

/// Runs `ip` in the calling thread's network namespace; its output.
pub(super) fn ip(arguments: &[&str]) -> Result<Vec<u8>, AttachError> {
    run("ip", "iproute2", arguments)
}

/// Runs `ethtool` in the calling thread's network namespace; its output.
pub(super) fn ethtool(arguments: &[&str]) -> Result<Vec<u8>, AttachError> {
    run("ethtool", "ethtool", arguments)
}

fn run(tool: &'static str, package: &'static str, arguments: &[&str]) -> Result<Vec<u8>, AttachError> {
    let output =
        Command::new(tool).args(arguments).output().map_err(|source| AttachError::Tool { tool, package, source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let message = if text.trim().is_empty() { output.status.to_string() } else { text.trim().to_owned() };
    Err(failed(tool, arguments, message))
}

/// The error for a command whose output is not what it should be.
pub(super) fn failed(tool: &'static str, arguments: &[&str], message: String) -> AttachError {
    AttachError::ToolFailed { command: format!("{tool} {}", arguments.join(" ")), message }
}
