//! Compiles the XDP and tc programs of `bpf/` for the kernel's BPF machine, to be embedded by `attach`.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, exit},
};

const PROGRAMS: [&str; 2] = ["trunk", "uplink"];

fn main() {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for program in PROGRAMS {
        if let Err(message) = compile(program, &out) {
            eprintln!("{message}");
            exit(1);
        }
    }
}

fn compile(program: &str, out: &Path) -> Result<(), String> {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let mut command = Command::new(&clang);
    // v3 has 32-bit registers (Linux 5.1); with -g clang writes the BTF that the maps are declared by.
    command.args(["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-target", "bpf", "-mcpu=v3"]);
    // Debian keeps <asm/types.h> in a folder of the machine's architecture, which clang does not search for this
    // target.
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let headers = PathBuf::from(format!("/usr/include/{architecture}-linux-gnu"));
    if headers.is_dir() {
        command.arg("-I").arg(headers);
    }
    command.arg("-c").arg(format!("bpf/{program}.bpf.c")).arg("-o").arg(out.join(format!("{program}.bpf.o")));

    let output = command.output().map_err(|error| {
        format!("cannot run `{clang}`: {error}\nweir's kernel programs need it: apt-get install clang")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let hint = if text.contains("file not found") {
        "\nThe kernel's headers are missing: apt-get install linux-libc-dev"
    } else if text.contains("No available targets are compatible") || text.contains("unknown target triple") {
        "\nThis clang cannot compile for BPF; Debian's can: apt-get install clang"
    } else {
        ""
    };
    Err(format!("bpf/{program}.bpf.c does not compile:\n{text}{hint}"))
}
