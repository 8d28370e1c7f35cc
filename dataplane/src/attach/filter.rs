//! A workload's program as a classic tc filter: there at once, where a link costs an RCU grace period.

use std::io;

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType, TcError,
    links::Link as _,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
};
use nix::{errno::Errno, net::if_::if_nameindex};

use super::error::{AttachError, chain};

/// The first priority there is, so that no other filter comes before it.
const PRIORITY: u16 = 1;
/// By which weir knows its own among filters of that priority: "weir".
const HANDLE: TcHandle = TcHandle::new(0x7765, 0x6972);

/// Puts the program on what the device receives, in a `clsact` qdisc that is made where there is none. It stays on the device,
/// whatever becomes of this process. One that an earlier process left is replaced, without a packet between them.
pub(super) fn add(program: &mut SchedClassifier, name: &'static str, device: &str) -> Result<(), AttachError> {
    attach(program, device).map_err(|source| AttachError::Attach {
        program: name,
        device: device.to_owned(),
        source: Box::new(source),
    })
}

fn attach(program: &mut SchedClassifier, device: &str) -> Result<(), ProgramError> {
    match qdisc_add_clsact(device) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(Errno::EEXIST as i32) => {}
        other => other?,
    }
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let attached = program.attach_with_options(device, TcAttachType::Ingress, TcAttachOptions::Netlink(options));
    let id = match attached {
        Err(ProgramError::TcError(TcError::NetlinkError(error)))
            if error.raw_os_error() == Some(Errno::EEXIST as i32) =>
        {
            program.attach_to_link(own(device).map_err(TcError::IoError)?)?
        }
        other => other?,
    };
    // Dropped, it would take the filter along.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Takes it off again, if it is there. The qdisc stays: others may use it by now, and to remove it stops the device for a moment.
pub(super) fn remove(device: &str) -> Result<(), AttachError> {
    // Else the device is gone.
    let Ok(filter) = own(device) else { return Ok(()) };
    let Err(error) = filter.detach() else { return Ok(()) };
    match &error {
        ProgramError::NetlinkError(error)
            // No device, no qdisc, no such filter.
            if matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENODEV | Errno::EINVAL | Errno::ENOENT)) =>
        {
            Ok(())
        }
        _ => Err(AttachError::Filter { device: device.to_owned(), source: io::Error::other(chain(&error)) }),
    }
}

/// Takes it off every device of the calling thread's network namespace.
pub(super) fn remove_all() -> Result<(), AttachError> {
    let failed = |errno: Errno| AttachError::Filter { device: "all devices".to_owned(), source: errno.into() };
    let devices = if_nameindex().map_err(failed)?;
    devices.iter().try_for_each(|device| remove(&device.name().to_string_lossy()))
}

fn own(device: &str) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(device, TcAttachType::Ingress, PRIORITY, HANDLE, None)
}
