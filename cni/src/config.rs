//! The network configuration that a runtime gives on standard input (specification, section 1).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{
    CniError, Version,
    wire::{Attachment, DEFAULT_SOCKET},
};

/// Most bytes of a configuration that are read.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// A Unix socket's address holds this many bytes (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// What weir takes from a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// In which form it is, and the result has to be.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// Where the router listens.
    pub socket: PathBuf,
    /// The result of the ADD, for CHECK.
    pub previous: Option<Value>,
    /// `cni.dev/valid-attachments`, for GC.
    pub valid: Option<Vec<Attachment>>,
    /// Handed through into the result.
    pub dns: Option<Value>,
}

/// A configuration that is JSON and an object, and the version that it says it has.
#[derive(Clone, Debug)]
pub struct Raw {
    fields: Map<String, Value>,
    /// `cniVersion` as it stands there.
    pub version: String,
}

impl Raw {
    /// Decodes it.
    ///
    /// # Errors
    /// Where it is no JSON object or its version is no text.
    pub fn decode(bytes: &[u8]) -> Result<Self, CniError> {
        let fault = |what: &str| CniError::new(CniError::DECODE, format!("the network configuration {what}"));
        if bytes.len() as u64 > MAX_CONFIG_BYTES {
            return Err(fault(&format!("is longer than {MAX_CONFIG_BYTES} bytes")));
        }
        let value: Value =
            serde_json::from_slice(bytes).map_err(|error| fault("on standard input is no JSON").with(error))?;
        let Value::Object(fields) = value else {
            return Err(fault("is no JSON object"));
        };
        let version = match fields.get("cniVersion") {
            Some(Value::String(version)) => version.clone(),
            // The specification's first version had no such field (libcni takes it so too).
            None | Some(Value::Null) => "0.1.0".into(),
            Some(_) => return Err(fault("has a cniVersion that is no text")),
        };
        Ok(Self { fields, version })
    }

    /// Reads what weir needs of it.
    ///
    /// # Errors
    /// Where weir does not speak its version, or it says something that cannot be.
    pub fn read(&self) -> Result<Config, CniError> {
        let version = Version::of(&self.version).ok_or_else(|| {
            CniError::new(
                CniError::INCOMPATIBLE_VERSION,
                format!("weir-cni does not speak cniVersion {:?}", self.version),
            )
            .with(format!("it speaks {}", Version::ALL.map(Version::as_str).join(", ")))
        })?;
        let name = match self.text("name")? {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => return Err(invalid("the network configuration has no name")),
        };
        // Weir gives addresses by itself, and masquerades as IPPools say: what else is asked for would silently not happen. What a pod's object
        // says too, host ports first of all, is taken from there: runtimeConfig is not looked at.
        for (field, nothing) in [("ipam", Value::Object(Map::new())), ("ipMasq", Value::Bool(false))] {
            if let Some(value) = self.fields.get(field).filter(|value| !value.is_null() && **value != nothing) {
                let value: String = value.to_string().chars().take(200).collect();
                return Err(CniError::new(
                    CniError::UNSUPPORTED_FIELD,
                    format!("weir-cni does not take the field {field}: {value}"),
                )
                .with("weir.yaml says where addresses come from, IPPools what is masqueraded"));
            }
        }
        let socket = self.socket()?;
        let dns = self.fields.get("dns").filter(|value| !value.is_null());
        if dns.is_some_and(|value| !value.is_object()) {
            return Err(invalid("dns must be an object"));
        }
        Ok(Config {
            version,
            name,
            socket,
            previous: self.fields.get("prevResult").filter(|value| !value.is_null()).cloned(),
            valid: self.valid()?,
            dns: dns.cloned(),
        })
    }

    /// Where the router listens.
    ///
    /// # Errors
    /// Where that is no path of a socket.
    pub fn socket(&self) -> Result<PathBuf, CniError> {
        let socket = self.text("socket")?.unwrap_or(DEFAULT_SOCKET);
        if !Path::new(socket).is_absolute() || socket.contains('\0') || socket.len() > MAX_SOCKET_PATH {
            return Err(invalid(&format!("socket must be an absolute path of at most {MAX_SOCKET_PATH} bytes")));
        }
        Ok(socket.into())
    }

    fn text(&self, field: &str) -> Result<Option<&str>, CniError> {
        match self.fields.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(&format!("{field} must be a text"))),
        }
    }

    fn valid(&self) -> Result<Option<Vec<Attachment>>, CniError> {
        const FIELD: &str = "cni.dev/valid-attachments";
        let list = match self.fields.get(FIELD) {
            None => return Ok(None),
            // How libcni writes an empty list.
            Some(Value::Null) => return Ok(Some(Vec::new())),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(invalid(&format!("{FIELD} must be a list"))),
        };
        let mut valid = Vec::new();
        for (index, entry) in list.iter().enumerate() {
            let (Some(sandbox), Some(interface)) = (entry["containerID"].as_str(), entry["ifname"].as_str()) else {
                return Err(invalid(&format!("{FIELD}[{index}] must have containerID and ifname")));
            };
            // What could not be added needs no keeping; an error here would keep all else from being cleaned up.
            valid.extend(Attachment::new(sandbox, interface).ok());
        }
        Ok(Some(valid))
    }
}

fn invalid(what: &str) -> CniError {
    CniError::new(CniError::INVALID_CONFIG, what)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Config, CniError> {
        Raw::decode(value.to_string().as_bytes())?.read()
    }

    #[test]
    fn a_plain_configuration_is_read() {
        let config = read(&json!({
            "cniVersion": "1.0.0", "name": "weir", "type": "weir-cni", "dns": {"nameservers": ["10.96.0.10"]},
            "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "localhost"}]},
        }))
        .unwrap();
        assert_eq!(
            config,
            Config {
                version: Version::V1_0_0,
                name: "weir".into(),
                socket: "/run/weir/cni.sock".into(),
                previous: None,
                valid: None,
                dns: Some(json!({"nameservers": ["10.96.0.10"]})),
            }
        );
    }

    #[test]
    fn each_fault_has_its_code() {
        let with = |field: &str, value: Value| {
            let mut config = json!({"cniVersion": "1.1.0", "name": "weir"});
            config[field] = value;
            config
        };
        let cases = [
            (with("cniVersion", json!("2.0.0")), CniError::INCOMPATIBLE_VERSION),
            (with("cniVersion", json!("")), CniError::INCOMPATIBLE_VERSION),
            (with("cniVersion", json!(null)), CniError::INCOMPATIBLE_VERSION),
            (with("cniVersion", json!(1.1)), CniError::DECODE),
            (json!([1]), CniError::DECODE),
            (with("name", json!("")), CniError::INVALID_CONFIG),
            (with("name", json!(7)), CniError::INVALID_CONFIG),
            (with("ipam", json!({"type": "host-local"})), CniError::UNSUPPORTED_FIELD),
            (with("ipMasq", json!(true)), CniError::UNSUPPORTED_FIELD),
            (with("socket", json!("run/cni.sock")), CniError::INVALID_CONFIG),
            (with("socket", json!("/run/\0cni.sock")), CniError::INVALID_CONFIG),
            (with("socket", json!(format!("/{}", "x".repeat(200)))), CniError::INVALID_CONFIG),
            (with("socket", json!({})), CniError::INVALID_CONFIG),
            (with("dns", json!("10.96.0.10")), CniError::INVALID_CONFIG),
            (with("runtimeConfig", json!([])), 0),
            (with("runtimeConfig", json!({"portMappings": [7]})), 0),
            (with("cni.dev/valid-attachments", json!("all")), CniError::INVALID_CONFIG),
            (with("cni.dev/valid-attachments", json!([{"containerID": 7}])), CniError::INVALID_CONFIG),
            (with("ipam", json!({})), 0),
            (with("ipMasq", json!(false)), 0),
        ];
        for (config, code) in cases {
            assert_eq!(read(&config).map_or_else(|error| error.code, |_| 0), code, "{config}");
        }
        assert_eq!(Raw::decode(b"{\"cniVersion\":").unwrap_err().code, CniError::DECODE);
        assert_eq!(Raw::decode(b"").unwrap_err().code, CniError::DECODE);
        let deep = "[".repeat(100_000);
        assert_eq!(Raw::decode(deep.as_bytes()).unwrap_err().code, CniError::DECODE);
        let long = vec![b' '; MAX_CONFIG_BYTES as usize + 1];
        assert_eq!(Raw::decode(&long).unwrap_err().code, CniError::DECODE);
    }
}
