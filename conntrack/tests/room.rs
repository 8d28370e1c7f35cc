//! Tables on file systems that are too small, or that others fill: never a SIGBUS, and no connection is lost that can be kept.
//!
//! Needs root, for mounts in a namespace of its own; WEIR_SKIP_E2E=1 skips it.
#![cfg(not(loom))]

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    net::Ipv4Addr,
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use weir_conntrack::{
    Attributes, Insert, NewConn, Observed, Table, TableConfig, TcpSettings, Timeouts,
    file::{NoRoom, Restored},
};
use weir_packet::{FlowKey, Ports, Protocol, Tick};
use weir_sync::{Arc, Domain};

const ENTRIES: u32 = 20_000;

/// Runs a test in a tmpfs of that many bytes; it is gone with the thread, whatever happens.
fn on_tmpfs(bytes: u64, test: impl FnOnce(&Path) + Send) {
    if env::var_os("WEIR_SKIP_E2E").is_some_and(|value| value == "1") {
        eprintln!("skipped: WEIR_SKIP_E2E=1");
        return;
    }
    assert!(nix::unistd::geteuid().is_root(), "needs root (WEIR_SKIP_E2E=1 skips it)");
    let folder = tempfile::tempdir().unwrap();
    let work = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("root may make a namespace");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let options = format!("size={bytes},mode=0700");
        mount(Some("weir"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(&*options)).unwrap();
        test(folder.path());
    };
    let result = std::thread::scope(|scope| scope.spawn(work).join());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn config() -> TableConfig {
    TableConfig { max_entries: ENTRIES, seed: [1, 7], timeouts: Timeouts::default(), tcp: TcpSettings::default() }
}

/// A table with what its users join.
struct Opened {
    table: Table<Ipv4Addr>,
    domain: Arc<Domain>,
    restored: Restored,
}

fn open_with(config: TableConfig, path: &Path) -> Opened {
    let domain = Domain::new();
    let (table, restored) = Table::in_file(config, domain.clone(), path, Tick(1)).unwrap();
    Opened { table, domain, restored }
}

fn open(path: &Path) -> Opened {
    open_with(config(), path)
}

fn table_bytes() -> u64 {
    Table::<Ipv4Addr>::new(config(), Domain::new()).memory_bytes() as u64
}

/// Opens so many connections, each of which is another.
fn fill(Opened { table, domain, .. }: &Opened, count: u32) {
    let mut participant = domain.join();
    let turn = participant.enter();
    let mut handle = table.handle();
    for number in 0..count {
        let original = FlowKey {
            src: Ipv4Addr::from_bits(0x0a00_0000 + number),
            dst: Ipv4Addr::new(10, 96, 0, 1),
            ports: Ports::new(1000, 53),
            protocol: Protocol::TCP,
        };
        let attributes = Attributes::default();
        let new = NewConn { original, reply: original.invert(), attributes, first: Observed::default() };
        assert!(matches!(table.insert(&mut handle, new, Tick(1), &turn), Insert::Inserted(_)), "{number}");
    }
}

/// Takes all room that there is.
fn take_the_rest(folder: &Path) {
    let mut file = File::create(folder.join("others")).unwrap();
    let refused = loop {
        if let Err(error) = file.write_all(&[1; 4096]) {
            break error;
        }
    };
    assert_eq!(refused.kind(), ErrorKind::StorageFull);
}

fn kept(connections: u32) -> Restored {
    Restored { connections: connections as usize, ..Restored::default() }
}

#[test]
fn with_room_for_two_a_table_is_copied_beside_the_old_one() {
    on_tmpfs(3 * table_bytes(), |folder| {
        let path = folder.join("ipv4");
        let opened = open(&path);
        assert_eq!(opened.restored, Restored::default());
        let file = fs::metadata(&path).unwrap();
        assert_eq!((file.len(), file.blocks() * 512), (table_bytes(), table_bytes()), "all of it is reserved");
        fill(&opened, ENTRIES);
        drop(opened);
        assert_eq!(open(&path).restored, kept(ENTRIES));
    });
}

#[test]
fn what_others_take_afterwards_harms_no_table() {
    on_tmpfs(table_bytes() * 3 / 2, |folder| {
        let path = folder.join("ipv4");
        let opened = open(&path);
        take_the_rest(folder);
        fill(&opened, ENTRIES);
        assert_eq!(opened.table.len(), ENTRIES as usize);
        drop(opened);
        // There is room for the old one only, which makes way.
        let Opened { table, restored, domain: _ } = open(&path);
        assert_eq!((restored, table.len()), (kept(ENTRIES), ENTRIES as usize));
        drop(table);
        assert_eq!(open(&path).restored, kept(ENTRIES), "and so it goes on");
        let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files.len(), 2, "{files:?}");
    });
}

#[test]
fn a_table_without_room_is_in_memory_and_says_what_is_missing() {
    let needed_bytes = table_bytes();
    on_tmpfs(needed_bytes / 4096 / 2 * 4096, |folder| {
        let path = folder.join("ipv4");
        let missing_bytes = needed_bytes - needed_bytes / 4096 / 2 * 4096;
        let no_room = Some(NoRoom { needed_bytes, missing_bytes });
        for _ in 0..2 {
            let opened = open(&path);
            assert_eq!(opened.restored, Restored { no_room, ..Restored::default() });
            fill(&opened, ENTRIES);
            assert_eq!(fs::read_dir(folder).unwrap().count(), 0, "nothing is left there");
        }
    });
}

#[test]
fn connections_survive_a_restart_with_a_table_that_has_become_too_large() {
    on_tmpfs(table_bytes() * 3 / 2, |folder| {
        let path = folder.join("ipv4");
        fill(&open(&path), 1000);
        let larger = TableConfig { max_entries: 2 * ENTRIES, ..config() };
        let Opened { table, restored, .. } = open_with(larger, &path);
        assert!(restored.no_room.is_some_and(|no_room| no_room.missing_bytes > 4096), "{restored:?}");
        assert_eq!((restored.connections, table.len()), (1000, 1000));
        assert!(!path.exists(), "a later start must not find connections of now");
    });
}

/// As a table of an earlier release is, whose pages were provided when they were first used.
#[test]
fn an_old_table_with_holes_is_read_on_a_full_tmpfs() {
    on_tmpfs(table_bytes() * 3 / 2, |folder| {
        let path = folder.join("ipv4");
        fill(&open(&path), 1000);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        // The end of the connections' TCP lines, and the links.
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let half = table_bytes() as i64 / 2 / 4096 * 4096;
        fallocate(&file, flags, half + half / 2, half / 2).unwrap();
        drop(file);
        let before = fs::metadata(&path).unwrap().blocks();
        assert!(before * 512 < table_bytes());
        take_the_rest(folder);
        let opened = open(&path);
        assert_eq!((opened.restored.connections, opened.table.len()), (1000, 1000), "{:?}", opened.restored);
        assert!(opened.restored.no_room.is_some(), "others have the room of the holes");
    });
}
