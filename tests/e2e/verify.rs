//! What is in force by mistake is found, named and mended.

use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use weir_lab::wait_until;
use weir_node::run::pin_folder;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, Site, two_nodes},
};

const VIP: [u8; 4] = [10, 96, 0, 10];

/// The prefixes that a node's programs take from its kernel, by a handle beside the router's.
fn prefixes(site: &Site, node: &str) -> LpmTrie<MapData, [u8; 4], u32> {
    let folder = pin_folder(&site.lab.node_name(node));
    Map::LpmTrie(MapData::from_pin(folder.join("prefixes_v4")).unwrap()).try_into().unwrap()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_map_that_lost_an_entry_and_got_another_is_told_so_and_mended() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &["10.96.0.10"],
        ports: &[("http", "TCP", 80, 8080, 0)],
        backends: &[("10.1.1.20", "node-a")],
        ..ServiceSpec::default()
    });
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    site.start_all();
    let (code, said) = site.verify("node-a");
    assert!(code == Some(0) && said.contains("is what it should be"), "{said}");
    let (lost, added) = (Key::new(32, VIP), Key::new(24, [203, 0, 113, 0]));
    let mut map = prefixes(&site, "node-a");
    // Soon after its start a router may tell its programs more by itself, which mends them before two looks in a row find it.
    let said = wait_until("a verification that finds it", 6 * DEADLINE, || {
        let _ = map.remove(&lost);
        map.insert(&added, 1, 0).unwrap();
        let (code, said) = site.verify("node-a");
        assert!(matches!(code, Some(0 | 1)), "{said}");
        (code == Some(1)).then_some(said)
    });
    let said = said.unwrap();
    for line in ["prefixes_v4: 10.96.0.10/32 (mended)", "prefixes_v4: 203.0.113.0/24 (mended)"] {
        assert!(said.contains(line), "{said}");
    }
    assert!(map.get(&lost, 0).is_ok() && map.get(&added, 0).is_err());
    let verify = &site.status("node-a")["verify"];
    assert_eq!((&verify["differences"], &verify["mended"]), (&2.into(), &2.into()), "{verify}");
    site.finish();
}
