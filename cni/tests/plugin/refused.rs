//! Whatever a caller says, it gets an error of the specification.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream, process::CommandExt},
    time::Duration,
};

use serde_json::json;
use weir_cni::wire::{Answer, Command, PROTOCOL, Request, read_message, write_message};

use crate::node::{Cni, Node, Sandbox, V4};

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn hostile_input_gets_an_error_of_the_specification() {
    let node = Node::new(&[V4]);
    let pod = Sandbox::new("web-0");
    let good = node.config().to_string();
    let huge = format!("{{\"cniVersion\":\"1.1.0\",\"name\":\"{}\"}}", "x".repeat(2 << 20));
    let deep = "[".repeat(1 << 20);
    let inputs: [(&[u8], u64); 8] = [
        (b"", 6),
        (b"nonsense", 6),
        (b"\xff\xfe\x00", 6),
        (huge.as_bytes(), 6),
        (deep.as_bytes(), 6),
        (b"{\"cniVersion\":\"9.9.9\",\"name\":\"weir\"}", 1),
        (b"{\"cniVersion\":\"1.1.0\"}", 7),
        (b"{\"cniVersion\":\"1.1.0\",\"name\":\"weir\",\"ipam\":{\"type\":\"host-local\"}}", 2),
    ];
    for (input, code) in inputs {
        let answer = pod.command("ADD").run_bytes(input);
        assert_eq!(answer.code(), code, "{}", answer.output);
        assert!(answer.output["cniVersion"].is_string() && answer.output["msg"].is_string());
    }
    let long = "x".repeat(100_000);
    let variables = [
        ("CNI_COMMAND", "EXPLODE"),
        ("CNI_COMMAND", long.as_str()),
        ("CNI_CONTAINERID", "../../../etc"),
        ("CNI_CONTAINERID", long.as_str()),
        ("CNI_IFNAME", "averyveryverylongname"),
        ("CNI_IFNAME", "../eth0"),
        ("CNI_IFNAME", "."),
        ("CNI_NETNS", ""),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=../..;K8S_POD_NAME=x"),
        ("CNI_ARGS", long.as_str()),
    ];
    for (name, value) in variables {
        let answer = pod.command("ADD").set(name, value).run_bytes(good.as_bytes());
        assert_eq!(answer.code(), 4, "{name}: {}", answer.output);
        assert!(answer.message().contains(name), "{name}: {}", answer.message());
        assert!(answer.output.to_string().len() < 1000, "what it says is short");
    }
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"] {
        let answer = pod.command("ADD").without(name).run_bytes(good.as_bytes());
        assert_eq!(answer.code(), 4, "{name}");
    }
    let mut chained = node.config();
    chained["prevResult"] = json!({"cniVersion": "1.1.0", "interfaces": [], "ips": []});
    assert_eq!(pod.command("ADD").run(&chained).code(), 7);
    node.assert_empty();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn only_root_is_served() {
    let node = Node::new(&[V4]);
    let socket = &node.settings.socket;
    assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    // Even where somebody opens the doors.
    for path in [node.folder.path(), &node.folder.path().join("run"), socket] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let pod = Sandbox::new("web-0");
    let program = node.folder.path().join("weir-cni");
    // By another process: a thread that forks while this one had it open for writing would keep it from being run (ETXTBSY).
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_weir-cni")).arg(&program).status().unwrap();
    assert!(copied.success());
    let mut process = std::process::Command::new(&program);
    process
        .envs(pod.command("STATUS").process().get_envs().filter_map(|(k, v)| v.map(|v| (k.to_owned(), v.to_owned()))));
    let mut child = process
        .uid(65_534)
        .gid(65_534)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(node.config().to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["code"], 50, "{answer}");
    assert!(Cni::new("STATUS").run(&node.config()).success, "root is");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn the_socket_bears_nonsense() {
    let node = Node::new(&[V4]);
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&node.settings.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut length = [0; 4];
        match stream.read_exact(&mut length) {
            Ok(()) => read_message::<Answer>(&mut stream, length).ok(),
            Err(_) => None,
        }
    };
    let message = |request: &Request| {
        let mut bytes = Vec::new();
        write_message(&mut bytes, request).unwrap();
        bytes
    };
    let failed = |answer: Option<Answer>| match answer {
        Some(Answer::Failed(error)) => error,
        other => panic!("{other:?}"),
    };
    for nonsense in
        [&b""[..], b"\0", b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x04nope", b"\0\0\0\xffshort", b"\0\0\0\x02{}"]
    {
        failed(ask(nonsense));
    }
    let other = message(&Request { protocol: PROTOCOL + 1, command: Command::Status });
    assert!(failed(ask(&other)).msg.contains("protocol"));
    // Also where this one cannot read what it asks.
    let mut bytes = Vec::new();
    write_message(&mut bytes, &json!({"protocol": PROTOCOL + 1, "command": {"begin": {}}})).unwrap();
    assert!(failed(ask(&bytes)).msg.contains("protocol"));
    // Names that would lead out of the state folder.
    for command in ["del", "check", "add"] {
        let hostile = json!({"protocol": PROTOCOL, "command": {command: {
            "attachment": {"sandbox": "../../etc", "interface": "eth0"},
            "pod": {"namespace": "default", "name": "web-0"},
        }}});
        let mut bytes = Vec::new();
        write_message(&mut bytes, &hostile).unwrap();
        assert!(failed(ask(&bytes)).msg.contains("CNI_CONTAINERID"), "{hostile}");
    }
    // What needs a namespace does not do without.
    let attachment = weir_cni::wire::Attachment { sandbox: "a".into(), interface: "eth0".into() };
    let without = message(&Request { protocol: PROTOCOL, command: Command::Check { attachment } });
    assert_eq!(failed(ask(&without)).code, 4);
    let status = message(&Request { protocol: PROTOCOL, command: Command::Status });
    assert_eq!(ask(&status), Some(Answer::Done));
    // Byte by byte it is the same request.
    let mut slow = UnixStream::connect(&node.settings.socket).unwrap();
    for byte in &status {
        slow.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut length = [0; 4];
    slow.read_exact(&mut length).unwrap();
    assert_eq!(read_message::<Answer>(&mut slow, length).unwrap(), Answer::Done);
}
