//! `weir replay`: the whole dataplane over captures instead of devices, without privileges.
//!
//! The captures' timestamps are the clock and the seed is the random source, so the same inputs give the same bytes. Each packet is a
//! burst of its own (the design, "Contract: commands", Replay).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufReader, BufWriter, Write},
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use ipnet::IpNet;
use pcap_file::{
    PcapError,
    pcap::{PcapPacket, PcapReader, PcapWriter},
};
use serde_json::Value;
use weir_cluster::{
    compile,
    text::Problems,
    translate::{Faulty, Loaded, Loader},
};
use weir_dataplane::{counters::Totals, forwarding::is_link_local};
use weir_node::{
    memory_router::{MemoryRouter, MemoryRouterError},
    report::{counters_json, counters_text},
};

use crate::{
    bench::seconds,
    common::{ConfigFile, Failed, tell_faulty},
};

/// Run the whole dataplane over packet captures instead of devices, without privileges.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
    /// A device and the capture of what it receives (classic Ethernet pcap); may be given several times.
    #[arg(long = "in", value_name = "DEVICE=FILE", required = true, value_parser = device_and_file)]
    inputs: Vec<(String, PathBuf)>,
    /// The folder for DEVICE.pcap, counters.json and conntrack.json.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed of the random source: the same inputs and seed give the same bytes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Change to another configuration, at a time after the first packet; may be given several times.
    #[arg(long, value_name = "SECONDS=FILE", value_parser = seconds_and_file)]
    config_at: Vec<(Duration, PathBuf)>,
}

fn device_and_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((device, file)) if !device.is_empty() && !file.is_empty() => Ok((device.into(), file.into())),
        _ => Err("expected DEVICE=FILE, like eth0=in.pcap".into()),
    }
}

fn seconds_and_file(text: &str) -> Result<(Duration, PathBuf), String> {
    let parsed = text.split_once('=').and_then(|(at, file)| Some((seconds(at).ok()?, file)));
    let parsed = parsed.filter(|(_, file)| !file.is_empty());
    parsed.map(|(at, file)| (at, file.into())).ok_or_else(|| "expected SECONDS=FILE, like 2.5=other.yaml".into())
}

/// Runs a replay, and says what became of the packets.
///
/// # Errors
/// Where a configuration or an input is bad, or an output cannot be written.
pub fn run(args: &Args) -> Result<ExitCode, Failed> {
    let outcome = match replay(args) {
        Err(ReplayError::Config(problems)) => return Err(Failed::config(&problems)),
        outcome => outcome?,
    };
    outcome.faulty.iter().for_each(|of_version| tell_faulty(of_version));
    eprintln!("{}; see {}", counters_text(&outcome.totals), args.out.display());
    Ok(ExitCode::SUCCESS)
}

/// Why a replay failed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The configuration is bad; the problems are for the user to read.
    #[error("the configuration has errors")]
    Config(Box<Problems>),
    /// It is too large.
    #[error(transparent)]
    Router(#[from] MemoryRouterError),
    /// An input names a device that weir.yaml does not have.
    #[error("--in {0}=...: weir.yaml has no device {0}; its devices are: {1}")]
    UnknownDevice(String, String),
    /// A capture cannot be read.
    #[error("{path}: {message}; captures are classic Ethernet pcap files")]
    Capture {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An input is where an output would be.
    #[error("{0} is an input, and what the device sends would be written over it; give another folder to --out")]
    Overwrites(PathBuf),
    /// An output cannot be written.
    #[error("{path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A packet of the inputs.
struct Input {
    at: Duration,
    device: usize,
    bytes: Vec<u8>,
}

/// What a replay came to.
#[derive(Debug)]
pub struct Outcome {
    /// The counters at its end.
    pub totals: Totals,
    /// What is at fault in each of the configurations, in their order; the rest was in force, as in a running router.
    pub faulty: Vec<Vec<Faulty>>,
}

/// Runs a replay.
///
/// # Errors
/// Where a configuration or an input is bad, or an output cannot be written.
fn replay(args: &Args) -> Result<Outcome, ReplayError> {
    let refused = |problems| ReplayError::Config(Box::new(problems));
    let mut loader = Loader::new(&args.config.config);
    let mut versions = vec![(Duration::ZERO, loader.load().map_err(refused)?.0)];
    let mut reloads: Vec<_> = args.config_at.iter().collect();
    reloads.sort_by_key(|(at, _)| *at);
    for (at, path) in reloads {
        let (_, previous) = versions.last().expect("the first one");
        loader.set_path(path);
        let (next, _) = loader.reload(&previous.objects).map_err(refused)?;
        versions.push((*at, next));
    }
    let faulty = versions.iter().map(|(_, loaded)| loaded.faulty.clone()).collect();
    versions.iter_mut().for_each(|(_, loaded)| add_own_addresses(loaded));
    let mut versions = versions.into_iter();
    let (_, loaded) = versions.next().expect("the first one");
    let mut reloads = versions.peekable();

    let links = compile::links_of(&loaded.config);
    let mut router = MemoryRouter::new(loaded, links, args.seed)?;
    let mut devices = Vec::new();
    for (name, _) in &args.inputs {
        let device = router.devices().iter().position(|d| d.name == *name).ok_or_else(|| {
            let known: Vec<&str> = router.devices().iter().map(|d| d.name.as_str()).collect();
            ReplayError::UnknownDevice(name.clone(), known.join(", "))
        })?;
        devices.push(device);
    }
    let inputs = read_inputs(&args.inputs, &devices)?;
    let names: Vec<&str> = router.devices().iter().map(|d| d.name.as_str()).collect();
    let mut outputs = Outputs::new(args, &names)?;

    let start = inputs.first().map(|i| i.at).unwrap_or_default();
    for input in inputs {
        let now = input.at - start;
        while let Some((_, next)) = reloads.next_if(|(at, _)| *at <= now) {
            router.reload(next)?;
        }
        router.packet(input.device, &input.bytes, now)?;
        let mut written = Ok(());
        router.drain_sent(|device, bytes| {
            if written.is_ok() {
                written = outputs.write(device, input.at, bytes);
            }
        });
        written?;
    }
    let totals = router.finish();
    outputs.finish(&totals, router.connections())?;
    Ok(Outcome { totals, faulty })
}

/// Puts the devices' addresses among the node's own, as a running router does.
fn add_own_addresses(loaded: &mut Loaded) {
    let devices = loaded.config.devices.iter().flat_map(|device| &device.addresses);
    let own: Vec<IpAddr> = devices.map(IpNet::addr).filter(|address| !is_link_local(*address)).collect();
    loaded.add_local_addresses(&own);
}

fn read_inputs(inputs: &[(String, PathBuf)], devices: &[usize]) -> Result<Vec<Input>, ReplayError> {
    let mut packets = Vec::new();
    for ((_, path), device) in inputs.iter().zip(devices) {
        let bad = |message: String| ReplayError::Capture { path: path.clone(), message };
        let file = File::open(path).map_err(|e| bad(e.to_string()))?;
        let mut reader = PcapReader::new(BufReader::new(file)).map_err(|error| match error {
            PcapError::IoError(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                bad("it is too short for a capture".into())
            }
            PcapError::IncompleteBuffer => bad("it is too short for a capture".into()),
            error => bad(format!("{error} (a pcapng file? editcap -F pcap converts it)")),
        })?;
        if reader.header().datalink != pcap_file::DataLink::ETHERNET {
            return Err(bad(format!("its link type is {:?}", reader.header().datalink)));
        }
        let mut number = 0_u64;
        while let Some(packet) = reader.next_packet() {
            number += 1;
            let packet = packet.map_err(|error| match error {
                PcapError::IoError(_) | PcapError::IncompleteBuffer => {
                    bad(format!("packet {number} is cut short: the file is not complete"))
                }
                error => bad(format!("packet {number}: {error}")),
            })?;
            packets.push(Input { at: packet.timestamp, device: *device, bytes: packet.data.into_owned() });
        }
    }
    // Stable: packets of one instant keep the order of the inputs.
    packets.sort_by_key(|p| p.at);
    Ok(packets)
}

/// The files that a replay writes.
struct Outputs {
    folder: PathBuf,
    captures: BTreeMap<String, PcapWriter<BufWriter<File>>>,
}

impl Outputs {
    /// Makes the folder. What an earlier replay left of `devices` there is removed: a file says that its device sent something.
    fn new(args: &Args, devices: &[&str]) -> Result<Self, ReplayError> {
        let folder = &args.out;
        fs::create_dir_all(folder).map_err(|source| ReplayError::Write { path: folder.into(), source })?;
        let inputs: Vec<PathBuf> = args.inputs.iter().filter_map(|(_, path)| fs::canonicalize(path).ok()).collect();
        for device in devices {
            let path = folder.join(format!("{device}.pcap"));
            if fs::canonicalize(&path).is_ok_and(|path| inputs.contains(&path)) {
                return Err(ReplayError::Overwrites(path));
            }
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(ReplayError::Write { path, source });
                }
                _ => {}
            }
        }
        Ok(Self { folder: folder.into(), captures: BTreeMap::new() })
    }

    fn write(&mut self, device: &str, at: Duration, bytes: &[u8]) -> Result<(), ReplayError> {
        let path = self.folder.join(format!("{device}.pcap"));
        let fail = |e: pcap_file::PcapError| ReplayError::Write { path: path.clone(), source: io::Error::other(e) };
        if !self.captures.contains_key(device) {
            let file = File::create(&path).map_err(|source| ReplayError::Write { path: path.clone(), source })?;
            self.captures.insert(device.into(), PcapWriter::new(BufWriter::new(file)).map_err(fail)?);
        }
        let capture = self.captures.get_mut(device).expect("just made");
        capture.write_packet(&PcapPacket::new(at, bytes.len() as u32, bytes)).map_err(fail)?;
        Ok(())
    }

    fn finish(self, totals: &Totals, connections: Vec<Value>) -> Result<(), ReplayError> {
        for (device, capture) in self.captures {
            let path = self.folder.join(format!("{device}.pcap"));
            capture.into_writer().flush().map_err(|source| ReplayError::Write { path, source })?;
        }
        for (name, value) in [("counters.json", counters_json(totals)), ("conntrack.json", Value::Array(connections))] {
            let path = self.folder.join(name);
            fs::write(&path, format!("{value:#}\n")).map_err(|source| ReplayError::Write { path, source })?;
        }
        Ok(())
    }
}
