//! Lets tests that need root be ignored, and counted so, where WEIR_SKIP_E2E=1 is set.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=WEIR_SKIP_E2E");
    println!("cargo::rustc-check-cfg=cfg(skip_e2e)");
    if std::env::var_os("WEIR_SKIP_E2E").is_some_and(|value| value == "1") {
        println!("cargo::rustc-cfg=skip_e2e");
    }
}
