//! `weir-cni`: what containerd and CRI-O run for each pod. See the library.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use weir_cni::{Version, plugin};

fn main() -> ExitCode {
    // Started by hand, as `weir-cni --version`: there is nothing that it could do.
    if std::env::var_os("CNI_COMMAND").is_none() && std::env::args_os().len() > 1 {
        println!(
            "weir-cni {}: the CNI plugin of weir; speaks {}. A container runtime starts it, with CNI_COMMAND in its environment.",
            env!("CARGO_PKG_VERSION"),
            Version::ALL.map(Version::as_str).join(", ")
        );
        return ExitCode::SUCCESS;
    }
    let (value, success) = plugin::run(&|name| std::env::var_os(name), io::stdin().lock());
    if let Some(value) = value {
        let mut out = io::stdout().lock();
        if writeln!(out, "{value}").and_then(|()| out.flush()).is_err() {
            return ExitCode::FAILURE;
        }
    }
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
