//! One run of the plugin: from what the runtime says to what it gets.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde_json::Value;

use crate::{
    CniError, Version,
    client::{self, PATIENCE, SHORT_PATIENCE},
    config::{Config, MAX_CONFIG_BYTES, Raw},
    invocation::{Environment, Invocation},
    queue::Queue,
    result,
    wire::{Answer, Attachment, Command, DEFAULT_SOCKET, Made, OTHER_PROTOCOL, PodName},
};

/// Does what the environment and `input` say. What is to be printed, if anything, and whether it went well.
pub fn run(environment: &Environment<'_>, input: impl Read) -> (Option<Value>, bool) {
    let mut version = Version::NEWEST.to_string();
    match answer(environment, input, &mut version) {
        Ok(value) => (value, true),
        Err(error) => (Some(result::render_error(&version, &error)), false),
    }
}

fn answer(environment: &Environment<'_>, input: impl Read, version: &mut String) -> Result<Option<Value>, CniError> {
    let invocation = Invocation::read(environment)?;
    let mut bytes = Vec::new();
    input
        .take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| CniError::new(CniError::IO, "standard input cannot be read").with(error))?;
    if invocation == Invocation::Version && bytes.trim_ascii().is_empty() {
        return Ok(Some(result::versions(version)));
    }
    let raw = Raw::decode(&bytes)?;
    if !raw.version.is_empty() {
        raw.version.chars().take(64).collect::<String>().clone_into(version);
    }
    if invocation == Invocation::Version {
        return Ok(Some(result::versions(version)));
    }
    if let Invocation::Del { attachment, pod } = invocation {
        // A pod goes, whatever has become of the configuration since it came.
        let socket = raw.socket().unwrap_or_else(|_| DEFAULT_SOCKET.into());
        return delete(&socket, attachment, pod).map(|()| None);
    }
    let config = raw.read()?;
    match invocation {
        Invocation::Add { attachment, netns, pod } => {
            if config.previous.is_some() {
                return Err(CniError::new(
                    CniError::INVALID_CONFIG,
                    "weir-cni makes the pod's interface, so it must be the first plugin of the list; prevResult is from another",
                ));
            }
            let made = in_namespace(&config, &netns, Command::Add { attachment, pod, network: config.name.clone() })?;
            Ok(Some(result::render(config.version, &made, &netns.display().to_string(), config.dns.as_ref())))
        }
        Invocation::Check { attachment, netns } => {
            since(&config, Version::V0_4_0, "CHECK")?;
            let previous = config.previous.as_ref().ok_or_else(|| {
                CniError::new(CniError::INVALID_CONFIG, "a CHECK needs the result of the ADD in prevResult")
            })?;
            let made = in_namespace(&config, &netns, Command::Check { attachment })?;
            result::compare(previous, &made)?;
            Ok(None)
        }
        Invocation::Status => {
            since(&config, Version::V1_1_0, "STATUS")?;
            match client::ask(&config.socket, Command::Status, None, SHORT_PATIENCE) {
                Ok(answer) => done(answer).map(|()| None),
                Err(error) => Err(absent(CniError::UNAVAILABLE, &config.socket, &error)),
            }
        }
        Invocation::Gc => {
            since(&config, Version::V1_1_0, "GC")?;
            let valid = config.valid.clone().ok_or_else(|| {
                CniError::new(
                    CniError::INVALID_CONFIG,
                    "a GC needs cni.dev/valid-attachments: without that list every pod would be taken away",
                )
            })?;
            done(ask(&config, Command::Gc { valid, network: config.name.clone() }, None)?).map(|()| None)
        }
        // Done above.
        Invocation::Del { .. } | Invocation::Version => Ok(None),
    }
}

/// Asks for something that needs the pod's namespace.
fn in_namespace(config: &Config, netns: &Path, command: Command) -> Result<Made, CniError> {
    let namespace = client::open_namespace(netns).map_err(|error| {
        CniError::new(
            CniError::INVALID_ENVIRONMENT,
            format!("CNI_NETNS: {} cannot be opened; is the sandbox still there?", netns.display()),
        )
        .with(error)
    })?;
    match ask(config, command, Some(&namespace))? {
        Answer::Made(made) => Ok(made),
        Answer::Failed(error) => Err(of_runtimes(error)),
        Answer::Done => {
            Err(CniError::new(CniError::TRY_AGAIN, "the router answered something else; is it of this version?"))
        }
    }
}

/// A pod that is to go must not wait for a router that does not run: its DEL is kept.
fn delete(socket: &Path, attachment: Attachment, pod: Option<PodName>) -> Result<(), CniError> {
    let command = Command::Del { attachment: attachment.clone(), pod };
    let error = match client::ask(socket, command, None, PATIENCE) {
        // Once the two are of one version again, it finds it.
        Ok(Answer::Failed(error)) if error.code == OTHER_PROTOCOL => io::Error::other(error),
        Ok(answer) => return done(answer),
        Err(error) => error,
    };
    let queue = Queue::beside(socket);
    queue.push(&attachment).map_err(|full| {
        absent(CniError::TRY_AGAIN, socket, &error).with(format!("{error}; nor can the DEL be kept: {full}"))
    })?;
    // A router may have started, and emptied the queue, before the entry was there. One that does not answer will find it.
    let _ = client::ask(socket, Command::Drain, None, SHORT_PATIENCE);
    Ok(())
}

fn ask(config: &Config, command: Command, namespace: Option<&File>) -> Result<Answer, CniError> {
    client::ask(&config.socket, command, namespace, PATIENCE)
        .map_err(|error| absent(CniError::TRY_AGAIN, &config.socket, &error))
}

fn done(answer: Answer) -> Result<(), CniError> {
    match answer {
        Answer::Failed(error) => Err(of_runtimes(error)),
        Answer::Done | Answer::Made(_) => Ok(()),
    }
}

/// What a runtime is told for it.
fn of_runtimes(error: CniError) -> CniError {
    match error.code {
        OTHER_PROTOCOL => CniError { code: CniError::TRY_AGAIN, ..error },
        _ => error,
    }
}

fn absent(code: u32, socket: &Path, error: &io::Error) -> CniError {
    CniError::new(code, format!("weir does not answer at {}; is `weir run` running on this node?", socket.display()))
        .with(error)
}

fn since(config: &Config, version: Version, command: &str) -> Result<(), CniError> {
    if config.version >= version {
        return Ok(());
    }
    Err(CniError::new(
        CniError::INCOMPATIBLE_VERSION,
        format!("cniVersion {} has no {command}; it came with {version}", config.version),
    ))
}
