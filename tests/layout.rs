//! The layout of docs/DESIGN.md: who may know whom. An arrow never goes up or sideways.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Crates with those that they may name, in their manifests and in their texts. What is not listed may not be named.
const ARROWS: [(&str, &[&str]); 14] = [
    ("sync", &[]),
    ("packet", &[]),
    ("conntrack", &["sync", "packet"]),
    ("nat", &["sync", "packet"]),
    ("policy", &["packet"]),
    ("dataplane", &["sync", "packet", "conntrack", "nat", "policy"]),
    ("cluster", &["sync", "packet", "conntrack", "nat", "policy", "dataplane"]),
    ("kubernetes", &["cluster"]),
    ("cni", &[]),
    ("node", &["sync", "packet", "conntrack", "nat", "policy", "dataplane", "cluster", "kubernetes", "cni"]),
    ("lab", &["dataplane", "node"]),
    ("benches", &["packet", "nat", "policy", "dataplane"]),
    (
        ".",
        &[
            "sync",
            "packet",
            "conntrack",
            "nat",
            "policy",
            "dataplane",
            "cluster",
            "kubernetes",
            "node",
            "lab",
            "benches",
        ],
    ),
    ("fuzz", &["sync", "packet", "conntrack", "nat", "policy", "dataplane", "node"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Crates that a manifest depends on, for its library and programs; tests may know more.
fn dependencies(folder: &str) -> BTreeSet<String> {
    let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
    let section = manifest.split("\n[").find(|section| section.starts_with("dependencies]")).unwrap_or_default();
    let names = section.lines().filter_map(|line| line.strip_prefix("weir-"));
    names.map(|line| line.split(['.', ' ', '=']).next().unwrap_or_default().to_owned()).collect()
}

/// Crates that the texts of a crate name outside of their tests.
fn named(folder: &str) -> BTreeMap<String, PathBuf> {
    let mut names = BTreeMap::new();
    let mut folders = vec![root().join(folder).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            for piece in code.split("weir_").skip(1) {
                let Some((name, _)) = piece.split_once("::") else { continue };
                if name.chars().all(|letter| letter.is_ascii_lowercase()) {
                    names.insert(name.to_owned(), path.clone());
                }
            }
        }
    }
    names
}

#[test]
fn no_arrow_goes_up_or_sideways() {
    for (position, (folder, may)) in ARROWS.iter().enumerate() {
        let below: Vec<&str> = ARROWS[..position].iter().map(|(name, _)| *name).collect();
        assert!(may.iter().all(|name| below.contains(name)), "{folder} may name only what stands before it here");
        let wrong: Vec<String> =
            dependencies(folder).into_iter().filter(|name| !may.contains(&name.as_str())).collect();
        assert!(wrong.is_empty(), "{folder}/Cargo.toml depends on {wrong:?}, against the layout of docs/DESIGN.md");
        if *folder == "fuzz" {
            continue;
        }
        for (name, path) in named(folder) {
            // The program and the library of one folder are two crates.
            let own = *folder == name || *folder == ".";
            assert!(
                own || may.contains(&name.as_str()),
                "{} names weir_{name}, against the layout of docs/DESIGN.md",
                path.display()
            );
        }
    }
}

#[test]
fn every_crate_of_the_workspace_has_its_place() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = manifest.lines().find_map(|line| line.strip_prefix("members = ")).expect("the workspace's members");
    let members: BTreeSet<&str> =
        members.trim_matches(['[', ']']).split(", ").map(|name| name.trim_matches('"')).collect();
    let placed: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).filter(|name| *name != "fuzz").collect();
    assert_eq!(members, placed);
}

#[test]
fn the_check_sees_what_it_is_to_see() {
    assert!(dependencies("conntrack").contains("sync") && dependencies("conntrack").contains("packet"));
    assert!(named("node").contains_key("cluster") && named("dataplane").contains_key("nat"));
}
