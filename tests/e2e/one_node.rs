//! Pod to pod on one node, two workers.

use std::{fs, io::Write, process::Command, time::Instant};

use crate::{
    manifests::Manifests,
    site::{Echo, Site, bulk, connection, one_node, pattern},
};

/// Payload of the largest IPv4 UDP datagram, or ping, in a frame of 1500 bytes.
const FULL: usize = 1472;

fn two_pods() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    Site::build(&one_node(), &manifests.text(), "")
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn pods_of_a_node_reach_each_other_over_two_workers() {
    let mut site = two_pods();
    site.start_all();
    site.pings("default/client", "-c 3 10.1.1.20");
    site.pings("default/client", &format!("-c 3 -M do -s {FULL} 10.1.1.20"));

    let _echo = Echo::new(&site, "default/server", "0.0.0.0:7");
    // So many sockets that the kernel's hash, whose key is random, gives each worker ten of them.
    for _ in 0..96 {
        let socket = site.udp("default/client", "0.0.0.0:0");
        socket.connect("10.1.1.20:7").unwrap();
        for size in [0, 1, 64, 512, FULL] {
            let (mut sent, mut received) = (vec![0; size], vec![0; 2048]);
            pattern(0, &mut sent);
            socket.send(&sent).unwrap();
            let length = socket.recv(&mut received).expect("an answer");
            assert_eq!(received[..length], sent);
        }
    }
    let (near, far) = connection(&site, "default/client", "default/server", "10.1.1.20:5000");
    bulk(&near, &far, 8 << 20);
    bulk(&far, &near, 8 << 20);

    let statistics = site.lab.run_in("node-a", &["ethtool", "-S", "weir1"]).unwrap();
    for queue in 0..2 {
        let name = format!("rx_queue_{queue}_xdp_packets:");
        let packets = statistics.lines().find_map(|line| line.trim().strip_prefix(&name)?.trim().parse::<u64>().ok());
        assert!(packets.is_some_and(|n| n > 100), "worker {queue} has had little to do: {statistics}");
    }
    drop((near, far));
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn one_gibibyte_over_tcp_arrives_intact() {
    const SIZE: usize = 1 << 30;
    let mut site = two_pods();
    let folder = site.lab.folder().join("files");
    fs::create_dir(&folder).unwrap();
    let mut file = fs::File::create(folder.join("data")).unwrap();
    let mut piece = vec![0; 1 << 20];
    for at in (0..SIZE).step_by(piece.len()) {
        pattern(at, &mut piece);
        file.write_all(&piece).unwrap();
    }
    let digest_of = |output: &[u8]| String::from_utf8_lossy(output).split_whitespace().next().unwrap_or("").to_owned();
    let sent = Command::new("sha256sum").arg(folder.join("data")).output().unwrap();
    assert!(sent.status.success());
    site.serve("default/server", &[80]);
    site.start_all();

    let begin = Instant::now();
    let fetch = "curl -sS --fail --max-time 200 http://10.1.1.20/files/data | sha256sum";
    let received = site.lab.output_in("default/client", &["sh", "-c", fetch]).unwrap();
    let seconds = begin.elapsed().as_secs_f64();
    println!("1 GiB in {seconds:.1} s: {:.2} Gbit/s", SIZE as f64 * 8e-9 / seconds);
    assert_eq!(digest_of(&received.stdout), digest_of(&sent.stdout), "{}", String::from_utf8_lossy(&received.stderr));
    // The pods' offloads are as they were: weir settles checksums and segmentation on its trunk.
    let features = site.lab.run_in("default/server", &["ethtool", "-k", "eth0"]).unwrap();
    for feature in ["tcp-segmentation-offload: on", "tx-checksumming: on"] {
        assert!(features.contains(feature), "{features}");
    }
    site.finish();
}

/// The pod speaks first: its kernel tells nobody of a new address by itself.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_whose_mac_changes_is_found_again() {
    let mut site = two_pods();
    site.serve("default/client", &[8080]);
    site.serve("default/server", &[8080]);
    site.start_all();
    site.answered("default/client", "http://10.1.1.20:8080/");
    let (near, far) = connection(&site, "default/client", "default/server", "10.1.1.20:5000");
    bulk(&near, &far, 1 << 20);
    for last in 1..3 {
        site.lab.ip("default/server", &format!("link set eth0 address 02:aa:bb:cc:dd:0{last}")).unwrap();
        site.answered("default/server", "http://10.1.1.10:8080/");
        site.answered("default/client", "http://10.1.1.20:8080/");
        bulk(&near, &far, 1 << 20);
        bulk(&far, &near, 1 << 20);
    }
    drop((near, far));
    site.finish();
}
