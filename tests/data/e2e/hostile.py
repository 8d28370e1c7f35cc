#!/usr/bin/env python3
"""Throws frames at a device: broken ones of every kind, the same for the same seed.

    hostile.py DEVICE COUNT SEED DESTINATION-MAC SOURCE-IPV4 SOURCE-IPV6 TARGET...

TARGET: addresses that the packets are for. Needs root and nothing but Python's own library.
"""
import ipaddress
import random
import socket
import struct
import sys


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def layer4(rng):
    """A protocol number and a packet of it, usually a whole one."""
    ports = struct.pack("!HH", rng.choice([40000, 0, 22, 80, 53, 65535]), rng.choice([0, 22, 53, 80, 8080, 4789, 31380]))
    payload = rng.randbytes(rng.choice([0, 1, 7, 64, 500, 1400]))
    kind = rng.randrange(9)
    if kind < 3:
        offset = rng.choice([5, 5, 5, 6, 15, 0, 4])
        options = rng.choice([b"", rng.randbytes(max(0, offset * 4 - 20)), b"\x02\x04", b"\x03\0\0\0"])
        header = struct.pack("!IIBBHHH", rng.getrandbits(32), rng.getrandbits(32), offset << 4, rng.randrange(256),
                             rng.getrandbits(16), rng.getrandbits(16), 0)
        return 6, ports + header + options + payload
    if kind < 5:
        length = rng.choice([8 + len(payload), 0, 7, 8, 65535])
        return 17, ports + struct.pack("!HH", length, rng.getrandbits(16)) + payload
    if kind == 5:
        quote = rng.randbytes(rng.choice([0, 8, 27, 28, 60]))
        if rng.random() < 0.5:
            quote = b"\x45" + quote
        return rng.choice([1, 58]), struct.pack("!BBHI", rng.randrange(256), rng.randrange(16), 0, rng.getrandbits(32)) + quote
    if kind == 6:
        return 132, ports + rng.randbytes(rng.choice([0, 8, 40]))
    if kind == 7:
        return 4, rng.choice([b"", b"\x45", rng.randbytes(20), rng.randbytes(60)])
    return rng.randrange(256), payload


def ipv4(rng, source, targets, inner=None):
    protocol, data = inner or layer4(rng)
    words = rng.choice([5, 5, 5, 5, 6, 15, 0, 4])
    options = rng.randbytes(max(0, words * 4 - 20))
    total = rng.choice([20 + len(options) + len(data)] * 6 + [0, 19, 20, 65535, 20 + len(data) // 2])
    fragment = rng.choice([0x4000] * 4 + [0, 0x2000, 0x2001, 0x00B9, 0x1FFF, 0x8000])
    header = struct.pack("!BBHHHBBH", (rng.choice([4] * 8 + [0, 5, 6, 15]) << 4) | words, rng.randrange(256), total & 0xFFFF,
                         rng.getrandbits(16), fragment, rng.choice([64, 64, 64, 1, 0, 255]), protocol, 0)
    sources = [source] * 4 + [ipaddress.IPv4Address(a) for a in
                              ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "10.1.1.77", "192.168.10.1")]
    header += rng.choice(sources).packed + rng.choice(targets).packed + options
    if rng.random() < 0.9:
        value = checksum(header)
        header = header[:10] + struct.pack("!H", value) + header[12:]
    return 0x0800, header + data


def ipv6(rng, source, targets):
    following, data = layer4(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 2, 9])):
        extension = rng.choice([0, 43, 44, 60, 51, 135])
        data = struct.pack("!BB", following, rng.choice([0, 1, 255])) + rng.randbytes(6) + data
        following = extension
    length = rng.choice([len(data)] * 5 + [0, 1, 65535, len(data) // 2])
    header = struct.pack("!IHBB", (rng.choice([6] * 8 + [0, 4, 15]) << 28) | rng.getrandbits(28), length & 0xFFFF, following,
                         rng.choice([64, 64, 1, 0, 255]))
    sources = [source] * 4 + [ipaddress.IPv6Address(a) for a in ("::", "::1", "ff02::1", "fe80::1", "fd00:1:1::77")]
    return 0x86DD, header + rng.choice(sources).packed + rng.choice(targets).packed + data


def frame(rng, own, mac, source4, source6, targets4, targets6):
    kind = rng.randrange(12)
    if kind == 0:
        ethertype, data = rng.choice([0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8, 0, 0xFFFF]), rng.randbytes(rng.randrange(1500))
    elif kind == 1:
        fixed = struct.pack("!HHBBH", rng.choice([1, 0, 6]), rng.choice([0x0800, 0x86DD]), rng.choice([6, 0, 255]),
                            rng.choice([4, 0, 16]), rng.choice([1, 2, 0, 9]))
        ethertype, data = 0x0806, fixed + own + rng.choice([source4, targets4[0]]).packed + bytes(6) + rng.choice(targets4).packed
    elif kind == 2:
        # A packet in a packet in a packet.
        ethertype, data = ipv4(rng, source4, targets4)
        for _ in range(rng.randrange(1, 4)):
            ethertype, data = ipv4(rng, source4, targets4, (4, data[:1400]))
    elif kind < 8 or not targets6:
        ethertype, data = ipv4(rng, source4, targets4)
    else:
        ethertype, data = ipv6(rng, source6, targets6)
    destination = rng.choice([mac] * 8 + [b"\xff" * 6, b"\x01\0\x5e\0\0\1", b"\x33\x33\0\0\0\1", bytes(6), rng.randbytes(6)])
    made = destination + rng.choice([own] * 6 + [b"\xff" * 6, rng.randbytes(6)]) + struct.pack("!H", ethertype) + data
    if rng.random() < 0.2:
        made = made[:rng.randrange(14, len(made) + 1)]
    if rng.random() < 0.2 and len(made) > 14:
        at = rng.randrange(12, len(made))
        made = made[:at] + bytes([made[at] ^ 1 << rng.randrange(8)]) + made[at + 1:]
    return made


def main():
    device, count, seed, mac = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4].replace(":", ""))
    source4, source6 = ipaddress.IPv4Address(sys.argv[5]), ipaddress.IPv6Address(sys.argv[6])
    targets = [ipaddress.ip_address(a) for a in sys.argv[7:]]
    targets4 = [a for a in targets if a.version == 4]
    targets6 = [a for a in targets if a.version == 6]
    rng = random.Random(seed)
    sent = refused = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        own = raw.getsockname()[4]
        for _ in range(count):
            try:
                raw.send(frame(rng, own, mac, source4, source6, targets4, targets6))
                sent += 1
            except OSError:
                # Too long for this device, or too short for any: the kernel keeps it.
                refused += 1
    print("sent", sent, "refused", refused)


if __name__ == "__main__":
    main()
