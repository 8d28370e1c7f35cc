//! Flows that workers hand over to the kernel's programs.

use std::time::Instant;

use weir::lab::wait_until;

use crate::{
    manifests::Manifests,
    site::{DEADLINE, Site, bulk, connection, offload_mode, one_node},
};

/// A number of `weir status`'s part on the offload.
fn offload(site: &Site, what: &str) -> u64 {
    site.status("node-a")["offload"][what].as_u64().unwrap()
}

/// A counter of the kernel's programs.
fn program(site: &Site, what: &str) -> u64 {
    site.status("node-a")["programs"][what].as_u64().unwrap()
}

fn is_off() -> bool {
    offload_mode() != "auto"
}

fn two_pods() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20", "fd00:1:1::20"]);
    Site::build(&one_node(), &manifests.text(), "")
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn established_flows_pass_in_the_kernel() {
    if is_off() {
        return;
    }
    let mut site = two_pods();
    site.start_all();
    for address in ["10.1.1.20:5000", "[fd00:1:1::20]:5001"] {
        let before = offload(&site, "handedOver");
        let (near, far) = connection(&site, "default/client", "default/server", address);
        bulk(&near, &far, 1 << 20);
        bulk(&far, &near, 1 << 20);
        wait_until("the flow in the kernel", DEADLINE, || (offload(&site, "handedOver") > before).then_some(()))
            .unwrap();
        let (by_workers, in_kernel) = (program(&site, "TrunkTaken"), program(&site, "Offloaded"));
        let begin = Instant::now();
        bulk(&near, &far, 256 << 20);
        println!("{:.2} Gbit/s", 256.0 * 8.0 * 1.048_576e-3 / begin.elapsed().as_secs_f64());
        bulk(&far, &near, 64 << 20);
        let (by_workers, in_kernel) =
            (program(&site, "TrunkTaken") - by_workers, program(&site, "Offloaded") - in_kernel);
        // A frame of 64 KiB at most each; what the workers may get is a packet now and then that is no plain data.
        assert!(in_kernel > (320 << 20) / 65536, "{in_kernel} in the kernel, {by_workers} by workers");
        assert!(by_workers < in_kernel / 10, "{in_kernel} in the kernel, {by_workers} by workers");
    }
    site.finish();
}
