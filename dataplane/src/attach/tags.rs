//! VLAN tags that a NIC takes off its frames: XDP sees nothing but the frame, and would take a VLAN's packets for the device's own.

use super::{error::AttachError, tools::ethtool};

/// By which a NIC takes tags off what it receives, of IEEE 802.1Q and of 802.1ad; as `ethtool -k` names them.
const FEATURES: [&str; 2] = ["rx-vlan-offload", "rx-vlan-stag-hw-parse"];

/// That a device leaves tags in its frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LeftTags {
    /// As it did before.
    Always,
    /// Since it was told so.
    Now,
}

/// Has a device leave the tags in its frames.
///
/// # Errors
/// [`AttachError::TakesTagsOff`] where it goes on taking them off.
pub(super) fn leave_in_frames(device: &str) -> Result<LeftTags, AttachError> {
    let features = taken_off(device)?;
    if features.is_empty() {
        return Ok(LeftTags::Always);
    }
    for feature in features {
        // What matters is what the device does afterwards.
        let _ = ethtool(&["-K", device, feature, "off"]);
    }
    match taken_off(device)?.first() {
        Some(feature) => Err(AttachError::TakesTagsOff { device: device.to_owned(), feature }),
        None => Ok(LeftTags::Now),
    }
}

/// The features by which it takes tags off now.
fn taken_off(device: &str) -> Result<Vec<&'static str>, AttachError> {
    let output = ethtool(&["-k", device])?;
    Ok(switched_on(&String::from_utf8_lossy(&output)))
}

/// Those of [`FEATURES`] that are on, by the output of `ethtool -k`: a line for each feature, as "name: on [fixed]".
fn switched_on(output: &str) -> Vec<&'static str> {
    let is_on = |feature: &&str| {
        let values = output.lines().filter_map(|line| line.trim().strip_prefix(feature)?.strip_prefix(':'));
        values.into_iter().any(|value| value.trim_start().starts_with("on"))
    };
    FEATURES.into_iter().filter(|feature| is_on(feature)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_read_from_what_ethtool_says() {
        for (output, expected) in [
            ("Features for eth0:\nrx-checksumming: on\nrx-vlan-offload: on\ntx-vlan-offload: on\n", &FEATURES[..1]),
            ("rx-vlan-offload: on [fixed]\nrx-vlan-stag-hw-parse: on [requested off]\n", &FEATURES[..]),
            ("rx-vlan-offload: off [requested on]\nrx-vlan-stag-hw-parse: off [fixed]\n", &[]),
            ("rx-vlan-filter: on\nrx-vlan-stag-filter: on\n", &[]),
        ] {
            assert_eq!(switched_on(output), expected, "{output}");
        }
    }
}
