//! Results in the forms of the specification's versions.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::{
    CniError, Version,
    wire::{GATEWAY_V4, GATEWAY_V6, Made},
};

/// The result of an ADD (specification, section 5, "ADD Success").
pub fn render(version: Version, made: &Made, netns: &str, dns: Option<&Value>) -> Value {
    let interface = |name: &str, mac: &str, sandbox: Option<&str>| {
        let mut interface = Map::new();
        interface.insert("name".into(), name.into());
        interface.insert("mac".into(), mac.into());
        if version >= Version::V1_1_0 {
            interface.insert("mtu".into(), made.mtu.into());
        }
        if let Some(sandbox) = sandbox {
            interface.insert("sandbox".into(), sandbox.into());
        }
        Value::Object(interface)
    };
    let ips = made.addresses.iter().map(|address| {
        let (family, length) = if address.is_ipv4() { ("4", 32) } else { ("6", 128) };
        let mut ip = Map::new();
        if version < Version::V1_0_0 {
            ip.insert("version".into(), family.into());
        }
        // The second of the interfaces, which is the pod's.
        ip.insert("interface".into(), 1.into());
        ip.insert("address".into(), format!("{address}/{length}").into());
        Value::Object(ip)
    });
    let routes = made.addresses.iter().map(|address| match address {
        IpAddr::V4(_) => json!({"dst": "0.0.0.0/0", "gw": GATEWAY_V4}),
        IpAddr::V6(_) => json!({"dst": "::/0", "gw": GATEWAY_V6}),
    });
    json!({
        "cniVersion": version.as_str(),
        "interfaces": [
            interface(&made.host.name, &made.host.mac, None),
            interface(&made.pod.name, &made.pod.mac, Some(netns)),
        ],
        "ips": ips.collect::<Vec<_>>(),
        "routes": routes.collect::<Vec<_>>(),
        "dns": dns.cloned().unwrap_or_else(|| json!({})),
    })
}

/// The answer to VERSION.
pub fn versions(asked: &str) -> Value {
    json!({"cniVersion": asked, "supportedVersions": Version::ALL.map(Version::as_str)})
}

/// An error; `version` as the configuration has it.
pub fn render_error(version: &str, error: &CniError) -> Value {
    let mut value = json!({"cniVersion": version, "code": error.code, "msg": error.msg});
    if !error.details.is_empty() {
        value["details"] = error.details.clone().into();
    }
    value
}

/// Compares the result of an ADD, which a CHECK brings along, with what the router has. Other plugins of the list may have added to it.
///
/// # Errors
/// Says what is missing, or that it is no result.
pub fn compare(previous: &Value, made: &Made) -> Result<(), CniError> {
    let shape =
        |what: &str| CniError::new(CniError::INVALID_CONFIG, format!("prevResult is no result of an ADD: {what}"));
    let list = |key: &str| match &previous[key] {
        Value::Null => Ok(&[][..]),
        Value::Array(list) => Ok(list.as_slice()),
        _ => Err(shape(&format!("{key} is no list"))),
    };
    let text = |value: &Value, key: &str| match &value[key] {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        _ => Err(shape(&format!("{key} is no text"))),
    };
    if !previous.is_object() {
        return Err(shape("it is no object"));
    }
    let mut addresses = Vec::new();
    for ip in list("ips")? {
        let address = text(ip, "address")?;
        let parsed = address.split_once('/').and_then(|(address, _)| address.parse::<IpAddr>().ok());
        addresses.push(parsed.ok_or_else(|| shape(&format!("{address:?} is no address with a prefix length")))?);
    }
    let mut interfaces = Vec::new();
    for interface in list("interfaces")? {
        interfaces.push((text(interface, "name")?, text(interface, "mac")?.to_ascii_lowercase()));
    }
    let differs = |what: String| CniError::new(CniError::NOT_AS_MADE, what);
    if let Some(address) = made.addresses.iter().find(|address| !addresses.contains(address)) {
        return Err(differs(format!("the pod has {address}, which prevResult does not list")));
    }
    for device in [&made.host, &made.pod] {
        if !interfaces.contains(&(device.name.clone(), device.mac.clone())) {
            return Err(differs(format!(
                "the pod has the interface {} with {}, which prevResult does not list",
                device.name, device.mac
            )));
        }
    }
    Ok(())
}
