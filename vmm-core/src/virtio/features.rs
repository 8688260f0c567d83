//! The names of features, for messages.

use protocol::DeviceKind;

/// The name of the feature with number `bit`, or the number if it has none that a backend of `kind` could know.
pub fn name(kind: DeviceKind, bit: u32) -> String {
    common(bit).or_else(|| of_kind(kind, bit)).map_or_else(|| format!("feature bit {bit}"), str::to_owned)
}

/// Of every device (virtio 1.2, section 6).
fn common(bit: u32) -> Option<&'static str> {
    Some(match bit {
        28 => "VIRTIO_F_INDIRECT_DESC",
        29 => "VIRTIO_F_EVENT_IDX",
        32 => "VIRTIO_F_VERSION_1",
        33 => "VIRTIO_F_ACCESS_PLATFORM",
        34 => "VIRTIO_F_RING_PACKED",
        35 => "VIRTIO_F_IN_ORDER",
        36 => "VIRTIO_F_ORDER_PLATFORM",
        38 => "VIRTIO_F_NOTIFICATION_DATA",
        40 => "VIRTIO_F_RING_RESET",
        _ => return None,
    })
}

/// Of one kind (virtio 1.2, sections 5.2.3, 5.1.3 and 5.3.3).
fn of_kind(kind: DeviceKind, bit: u32) -> Option<&'static str> {
    Some(match (kind, bit) {
        (DeviceKind::Blk, 1) => "VIRTIO_BLK_F_SIZE_MAX",
        (DeviceKind::Blk, 2) => "VIRTIO_BLK_F_SEG_MAX",
        (DeviceKind::Blk, 4) => "VIRTIO_BLK_F_GEOMETRY",
        (DeviceKind::Blk, 5) => "VIRTIO_BLK_F_RO",
        (DeviceKind::Blk, 6) => "VIRTIO_BLK_F_BLK_SIZE",
        (DeviceKind::Blk, 9) => "VIRTIO_BLK_F_FLUSH",
        (DeviceKind::Blk, 10) => "VIRTIO_BLK_F_TOPOLOGY",
        (DeviceKind::Blk, 11) => "VIRTIO_BLK_F_CONFIG_WCE",
        (DeviceKind::Blk, 12) => "VIRTIO_BLK_F_MQ",
        (DeviceKind::Blk, 13) => "VIRTIO_BLK_F_DISCARD",
        (DeviceKind::Blk, 14) => "VIRTIO_BLK_F_WRITE_ZEROES",
        (DeviceKind::Net, 0) => "VIRTIO_NET_F_CSUM",
        (DeviceKind::Net, 1) => "VIRTIO_NET_F_GUEST_CSUM",
        (DeviceKind::Net, 3) => "VIRTIO_NET_F_MTU",
        (DeviceKind::Net, 5) => "VIRTIO_NET_F_MAC",
        (DeviceKind::Net, 7) => "VIRTIO_NET_F_GUEST_TSO4",
        (DeviceKind::Net, 8) => "VIRTIO_NET_F_GUEST_TSO6",
        (DeviceKind::Net, 9) => "VIRTIO_NET_F_GUEST_ECN",
        (DeviceKind::Net, 10) => "VIRTIO_NET_F_GUEST_UFO",
        (DeviceKind::Net, 11) => "VIRTIO_NET_F_HOST_TSO4",
        (DeviceKind::Net, 12) => "VIRTIO_NET_F_HOST_TSO6",
        (DeviceKind::Net, 13) => "VIRTIO_NET_F_HOST_ECN",
        (DeviceKind::Net, 14) => "VIRTIO_NET_F_HOST_UFO",
        (DeviceKind::Net, 15) => "VIRTIO_NET_F_MRG_RXBUF",
        (DeviceKind::Net, 16) => "VIRTIO_NET_F_STATUS",
        (DeviceKind::Net, 17) => "VIRTIO_NET_F_CTRL_VQ",
        (DeviceKind::Net, 18) => "VIRTIO_NET_F_CTRL_RX",
        (DeviceKind::Net, 22) => "VIRTIO_NET_F_MQ",
        (DeviceKind::Net, 23) => "VIRTIO_NET_F_CTRL_MAC_ADDR",
        (DeviceKind::Console, 0) => "VIRTIO_CONSOLE_F_SIZE",
        (DeviceKind::Console, 1) => "VIRTIO_CONSOLE_F_MULTIPORT",
        (DeviceKind::Console, 2) => "VIRTIO_CONSOLE_F_EMERG_WRITE",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_has_the_name_that_its_device_gives_it() {
        assert_eq!(name(DeviceKind::Blk, 9), "VIRTIO_BLK_F_FLUSH");
        assert_eq!(name(DeviceKind::Net, 9), "VIRTIO_NET_F_GUEST_ECN");
        assert_eq!(name(DeviceKind::Console, 29), "VIRTIO_F_EVENT_IDX");
        assert_eq!(name(DeviceKind::Console, 62), "feature bit 62");
    }
}
