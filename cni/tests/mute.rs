//! A router that does not answer, in each way of not answering, costs no more than the time that it is given.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use weir_cni::{
    client::ask,
    wire::{Answer, Command, write_message},
};

const PATIENCE: Duration = Duration::from_millis(300);

/// Asks a router that does with each connection what `serve` does.
fn asked(serve: impl Fn(UnixStream) + Send + 'static) -> (io::Result<Answer>, Duration) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cni.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || listener.incoming().for_each(|stream| serve(stream.unwrap())));
    timed(&path)
}

fn timed(path: &Path) -> (io::Result<Answer>, Duration) {
    let begin = Instant::now();
    (ask(path, Command::Status, None, PATIENCE), begin.elapsed())
}

fn in_time((answer, took): (io::Result<Answer>, Duration)) {
    let error = answer.expect_err("there is no answer");
    assert!(took >= PATIENCE.mul_f32(0.9) && took < Duration::from_secs(10), "{error}: {took:?}");
}

#[test]
fn one_that_says_nothing() {
    in_time(asked(|stream| {
        thread::sleep(Duration::from_secs(60));
        drop(stream);
    }));
}

#[test]
fn one_that_says_a_byte_now_and_then() {
    in_time(asked(|mut stream| {
        let mut message = Vec::new();
        write_message(&mut message, &Answer::Done).unwrap();
        for byte in message {
            thread::sleep(PATIENCE / 3);
            let _ = stream.write_all(&[byte]);
        }
    }));
}

#[test]
fn one_that_takes_no_connections() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cni.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    // Those that wait to be accepted fill its queue; the one after them has to wait to wait.
    let mut waiting = Vec::new();
    loop {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
        use std::os::fd::AsRawFd;
        let one = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
        match connect(one.as_raw_fd(), &UnixAddr::new(&path).unwrap()) {
            Ok(()) => waiting.push(one),
            Err(nix::errno::Errno::EAGAIN) => break,
            Err(errno) => panic!("{errno}"),
        }
    }
    in_time(timed(&path));
}

#[test]
fn one_that_goes_away_is_noticed_at_once() {
    let (answer, took) = asked(|mut stream| drop(stream.read(&mut [0; 1])));
    assert!(answer.is_err() && took < PATIENCE, "{answer:?} after {took:?}");
    let folder = tempfile::tempdir().unwrap();
    let (answer, took) = timed(&folder.path().join("nobody.sock"));
    assert!(answer.is_err() && took < PATIENCE, "{answer:?} after {took:?}");
}

#[test]
fn one_that_answers_too_much() {
    let (answer, _) = asked(|mut stream| {
        let _ = stream.write_all(&[0xff; 64]);
        thread::sleep(Duration::from_secs(60));
    });
    assert!(answer.unwrap_err().to_string().contains("announced"));
}
