//! The documents agree with the code.

use weir_packet::DropReason;

#[test]
fn every_drop_reason_has_its_row_in_counters_md() {
    let text = include_str!("../docs/COUNTERS.md");
    for reason in DropReason::ALL {
        let row = format!("| `{}` | {} |", reason.name(), reason.description());
        assert!(text.contains(&row), "docs/COUNTERS.md lacks the row\n{row}");
    }
}

#[test]
fn example_configurations_load() {
    for file in ["configs/demo/node-a.yaml", "configs/demo/node-b.yaml"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let loaded = weir_cluster::translate::load_strictly(&path)
            .unwrap_or_else(|problems| panic!("{file}:\n{}", problems.render(false)));
        weir_cluster::compile::Compilers::default().rules(&loaded).unwrap();
    }
}
