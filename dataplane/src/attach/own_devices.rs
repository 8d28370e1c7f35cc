//! The programs on devices of the kernel's own, and what both these and uplinks have where they send.

use aya::programs::TcAttachType;
use tracing::info;

use super::{AttachError, Attachment, ModeReport, classifier, existing, is_gone, pins};

const DEVICE_TAKE: &str = "device_take";
const DEVICE_TAKE_BARE: &str = "device_take_bare";
const ANSWER_SEND: &str = "answer_send";
const ANSWER_SEND_BARE: &str = "answer_send_bare";

impl Attachment {
    /// Takes from a device that is neither uplink nor workload what is for frontends on the node's addresses, and answers to it. It may have no
    /// link headers, as a VPN's. Doing so again renews the programs.
    ///
    /// # Errors
    /// Where the device is gone, or the kernel refuses the programs.
    pub fn attach_kernel_device(&mut self, index: u32, name: &str) -> Result<(), AttachError> {
        let is_ethernet = existing(name, index)?.is_ethernet;
        let (take, pin) =
            (if is_ethernet { DEVICE_TAKE } else { DEVICE_TAKE_BARE }, self.pins.kernel_device_take(index));
        pins::attach_tcx(classifier(&mut self.trunk_object, take)?, take, name, TcAttachType::Ingress, &pin)?;
        let (send, pin) =
            (if is_ethernet { ANSWER_SEND } else { ANSWER_SEND_BARE }, self.pins.kernel_device_answer(index));
        pins::attach_tcx(classifier(&mut self.trunk_object, send)?, send, name, TcAttachType::Egress, &pin)?;
        let reason = "what it receives for node ports and host ports of the node is weir's".to_owned();
        let mode = ModeReport { device: name.to_owned(), program: take, mode: "tcx", reason };
        self.kernel_devices.insert(index, mode);
        Ok(())
    }

    /// Takes them off again; the device may be gone.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    pub fn detach_kernel_device(&mut self, index: u32) -> Result<(), AttachError> {
        self.kernel_devices.remove(&index);
        pins::unpin_link(&self.pins.kernel_device_take(index))?;
        pins::unpin_link(&self.pins.kernel_device_answer(index)).map(drop)
    }

    /// Indexes of all such devices that have a link, attached by this process or left by an earlier one.
    ///
    /// # Errors
    /// Where the pin folder cannot be read.
    pub fn pinned_kernel_devices(&self) -> Result<Vec<u32>, AttachError> {
        self.pins.kernel_devices()
    }

    /// Has answers of the node's servers taken where an uplink sends them.
    pub(super) fn attach_answers(&mut self, index: u32, name: &str) -> Result<(), AttachError> {
        let program = classifier(&mut self.trunk_object, ANSWER_SEND)?;
        pins::attach_tcx(program, ANSWER_SEND, name, TcAttachType::Egress, &self.pins.uplink_answer(index))
    }

    /// Forgets what an earlier process left on devices of the kernel's own that do not exist any longer.
    pub(super) fn forget_kernel_devices(&mut self) -> Result<(), AttachError> {
        for index in self.pins.kernel_devices()?.into_iter().filter(|index| is_gone(*index)) {
            self.detach_kernel_device(index)?;
            info!(index, "forgot a device of the kernel's that is gone");
        }
        Ok(())
    }
}
