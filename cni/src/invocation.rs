//! What a runtime says in environment variables (specification, section 2, "Parameters").

use std::{ffi::OsString, path::PathBuf};

use crate::{
    CniError,
    wire::{Attachment, PodName},
};

/// Looks an environment variable up.
pub type Environment<'e> = dyn Fn(&str) -> Option<OsString> + 'e;

/// What to do, with the parameters that it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Make an interface.
    Add {
        /// Which.
        attachment: Attachment,
        /// In which namespace.
        netns: PathBuf,
        /// Of which pod.
        pod: PodName,
    },
    /// Take one away.
    Del {
        /// Which.
        attachment: Attachment,
        /// Of which pod, where it is said.
        pod: Option<PodName>,
    },
    /// Look whether one is as it was made.
    Check {
        /// Which.
        attachment: Attachment,
        /// In which namespace.
        netns: PathBuf,
    },
    /// Whether interfaces can be made.
    Status,
    /// Take away what the runtime does not list.
    Gc,
    /// Which versions the plugin speaks.
    Version,
}

impl Invocation {
    /// Reads it from the environment.
    ///
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read(environment: &Environment<'_>) -> Result<Self, CniError> {
        match required(environment, "CNI_COMMAND")?.as_str() {
            "ADD" => Ok(Self::Add {
                attachment: attachment(environment)?,
                netns: required(environment, "CNI_NETNS")?.into(),
                pod: pod(environment)?.ok_or_else(|| {
                    invalid("CNI_ARGS must have K8S_POD_NAMESPACE and K8S_POD_NAME: weir makes Kubernetes' pods")
                })?,
            }),
            // CNI_NETNS may be missing or gone: what is in it goes with its other end.
            "DEL" => Ok(Self::Del { attachment: attachment(environment)?, pod: pod(environment).unwrap_or(None) }),
            "CHECK" => Ok(Self::Check {
                attachment: attachment(environment)?,
                netns: required(environment, "CNI_NETNS")?.into(),
            }),
            "STATUS" => Ok(Self::Status),
            "GC" => Ok(Self::Gc),
            "VERSION" => Ok(Self::Version),
            _ => Err(invalid("CNI_COMMAND must be ADD, DEL, CHECK, STATUS, GC or VERSION")),
        }
    }
}

fn attachment(environment: &Environment<'_>) -> Result<Attachment, CniError> {
    let (sandbox, interface) = (required(environment, "CNI_CONTAINERID")?, required(environment, "CNI_IFNAME")?);
    Attachment::new(&sandbox, &interface).map_err(|what| invalid(&what))
}

/// The pod, from `KEY=VALUE;...`; keys that weir does not know are the runtime's.
fn pod(environment: &Environment<'_>) -> Result<Option<PodName>, CniError> {
    let Some(arguments) = optional(environment, "CNI_ARGS")? else {
        return Ok(None);
    };
    let value = |key: &str| {
        let pair = arguments.split(';').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == key);
        pair.map(|(_, value)| value.to_owned()).filter(|value| !value.is_empty())
    };
    let (Some(namespace), Some(name)) = (value("K8S_POD_NAMESPACE"), value("K8S_POD_NAME")) else {
        return Ok(None);
    };
    let pod = PodName { namespace, name, uid: value("K8S_POD_UID") };
    if pod.is_valid() {
        return Ok(Some(pod));
    }
    Err(invalid("CNI_ARGS: K8S_POD_NAMESPACE, K8S_POD_NAME or K8S_POD_UID is no name that Kubernetes gives"))
}

fn required(environment: &Environment<'_>, name: &str) -> Result<String, CniError> {
    optional(environment, name)?.ok_or_else(|| invalid(&format!("{name} is missing")))
}

/// An empty variable is as good as none.
fn optional(environment: &Environment<'_>, name: &str) -> Result<Option<String>, CniError> {
    let Some(value) = environment(name) else { return Ok(None) };
    let text = value.into_string().map_err(|_| invalid(&format!("{name} is no UTF-8")))?;
    Ok(Some(text).filter(|text| !text.is_empty()))
}

fn invalid(what: &str) -> CniError {
    CniError::new(CniError::INVALID_ENVIRONMENT, what)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Invocation, CniError> {
        Invocation::read(&|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
    }

    const ADD: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "0123abcd"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/var/run/netns/cni-1"),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=x",
        ),
    ];

    fn changed(key: &str, value: &str) -> Result<Invocation, CniError> {
        read(&ADD.map(|(k, v)| if k == key { (k, value) } else { (k, v) }))
    }

    #[test]
    fn what_containerd_says_is_read() {
        let attachment = Attachment { sandbox: "0123abcd".into(), interface: "eth0".into() };
        let pod = PodName { namespace: "default".into(), name: "web-0".into(), uid: Some("u-1".into()) };
        let netns = PathBuf::from("/var/run/netns/cni-1");
        let expected = Invocation::Add { attachment: attachment.clone(), netns: netns.clone(), pod: pod.clone() };
        assert_eq!(read(&ADD), Ok(expected));
        let expected = Invocation::Del { attachment: attachment.clone(), pod: Some(pod) };
        assert_eq!(changed("CNI_COMMAND", "DEL"), Ok(expected));
        assert_eq!(changed("CNI_COMMAND", "CHECK"), Ok(Invocation::Check { attachment: attachment.clone(), netns }));
        // A DEL needs neither the namespace nor the pod.
        let bare = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "0123abcd"), ("CNI_IFNAME", "eth0")];
        assert_eq!(read(&bare), Ok(Invocation::Del { attachment, pod: None }));
        for (name, expected) in
            [("STATUS", Invocation::Status), ("GC", Invocation::Gc), ("VERSION", Invocation::Version)]
        {
            assert_eq!(read(&[("CNI_COMMAND", name)]), Ok(expected));
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        let long = "x".repeat(300);
        let cases = [
            ("CNI_COMMAND", ""),
            ("CNI_COMMAND", "add"),
            ("CNI_CONTAINERID", ""),
            ("CNI_CONTAINERID", "../../etc/passwd"),
            ("CNI_CONTAINERID", ".hidden"),
            ("CNI_CONTAINERID", "a@b"),
            ("CNI_CONTAINERID", &long),
            ("CNI_IFNAME", ""),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "a:b"),
            ("CNI_IFNAME", "a b"),
            ("CNI_IFNAME", "sixteen-letters-"),
            ("CNI_NETNS", ""),
            ("CNI_ARGS", ""),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=default"),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=../x"),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=UPPER;K8S_POD_NAME=x"),
            ("CNI_ARGS", ";;=;K8S_POD_NAME;K8S_POD_NAMESPACE=="),
        ];
        for (key, value) in cases {
            let error = changed(key, value).expect_err(value);
            assert_eq!(error.code, CniError::INVALID_ENVIRONMENT, "{key}={value}");
            assert!(error.msg.contains(key), "{key}={value}: {error}");
        }
        let bytes = |name: &str| (name == "CNI_COMMAND").then(|| OsString::from_vec(vec![0xff, 0xfe]));
        assert_eq!(Invocation::read(&bytes).unwrap_err().code, CniError::INVALID_ENVIRONMENT);
        // Of a DEL, what names the pod may be anything: what was made must go.
        assert!(
            read(&[
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", "a"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_ARGS", "K8S_POD_NAME=/;K8S_POD_NAMESPACE=/")
            ])
            .is_ok()
        );
    }
}
