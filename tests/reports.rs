//! Public bug reports of other systems, as cases: tests/cases/reports has a folder for each, whose run.sh says what the fault is and what is
//! right, and exits with 0 where weir is right.

use std::{path::Path, process::Command};

fn run(folder: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/reports").join(folder).join("run.sh");
    let output = Command::new("bash").arg(&script).arg(env!("CARGO_BIN_EXE_weir")).output().expect("there is bash");
    let [said, complaint] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{} exits with {}:\n{said}{complaint}", script.display(), output.status);
    assert!(
        said.lines().any(|line| line.starts_with("ok ")),
        "{} has checked nothing:\n{said}{complaint}",
        script.display()
    );
}

/// A test for each folder.
macro_rules! reports {
    ($($(#[$attribute:meta])* $name:ident: $folder:literal;)+) => {
        $($(#[$attribute])* #[test] fn $name() { run($folder); })+

        #[test]
        fn every_folder_is_run() {
            let mut named = vec![$($folder),+];
            named.sort_unstable();
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/reports");
            let mut there = Vec::new();
            for kind in ["policy", "services"] {
                for entry in std::fs::read_dir(root.join(kind)).expect("the folder is there") {
                    let entry = entry.expect("the folder can be read");
                    if entry.path().join("run.sh").is_file() {
                        there.push(format!("{kind}/{}", entry.file_name().to_string_lossy()));
                    }
                }
            }
            there.sort_unstable();
            assert_eq!(named, there);
        }
    };
}

reports! {
    felix_default_action: "policy/felix-default-action";
    group_typo: "policy/group-typo";
    lb_ip_inside: "policy/lb-ip-inside";
    named_port_twice: "policy/named-port-twice";
    order_wins: "policy/order-wins";
    pass_last_tier: "policy/pass-last-tier";
    quiet_dumps: "policy/quiet-dumps";
    tier_default: "policy/tier-default";
    toplevel_list: "policy/toplevel-list";
    untracked_failsafe: "policy/untracked-failsafe";
    yaml11_octal: "policy/yaml11-octal";
    antrea_280_forwarded_skips_policy: "services/antrea-280-forwarded-skips-policy";
    antrea_4973_service_proxy_name: "services/antrea-4973-service-proxy-name";
    calico_13925_rst_acknowledges: "services/calico-13925-rst-acknowledges";
    calico_4661_tw_reuse: "services/calico-4661-tw-reuse";
    calico_6522_host_port: "services/calico-6522-host-port";
    cilium_40548_ipv6_fragments: "services/cilium-40548-ipv6-fragments";
    felix_2690_service_ip_loop: "services/felix-2690-service-ip-loop";
    k8s_124914_publish_not_ready: "services/k8s-124914-publish-not-ready";
    k8s_131765_etp_local_from_pods: "services/k8s-131765-etp-local-from-pods";
    k8s_135266_ghost_with_the_same_ip: "services/k8s-135266-ghost-with-the-same-ip";
    k8s_81775_port_reuse_after_the_backend_went: "services/k8s-81775-port-reuse-after-the-backend-went";
}
