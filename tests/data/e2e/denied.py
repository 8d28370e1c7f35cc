#!/usr/bin/env python3
"""Sends datagrams in every shape that a kernel reads, the same for the same seed.

    denied.py DEVICE COUNT SEED DESTINATION-MAC SHAPES PAYLOAD SOURCE,... ADDRESS/PORT...

SHAPES: "all"; "tagged" for whole datagrams behind one to four priority tags; or "tunnelled:DESTINATION,SOURCE,..." for all of it in IPIP with these
outer addresses, IPv4 only. SOURCE: addresses that senders claim to have. ADDRESS/PORT: whom
they are for. Each is a whole UDP datagram with a right checksum, whatever lies before it, from no failsafe port. Needs root and nothing but Python's own library.
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


def datagram(rng, source, target, port, payload):
    length = 8 + len(payload)
    header = struct.pack("!HHHH", rng.choice([40000, 22, 5353]), port, length, 0)
    if source.version == 4:
        pseudo = source.packed + target.packed + struct.pack("!BBH", 0, 17, length)
    else:
        pseudo = source.packed + target.packed + struct.pack("!IHBB", length, 0, 0, 17)
    value = checksum(pseudo + header + payload) or 0xFFFF
    return header[:6] + struct.pack("!H", value) + payload


def pieces(rng, data):
    """The data in fragments: offset, bytes, whether more follow. Cut at multiples of eight, in any order."""
    cuts = sorted(rng.sample(range(8, len(data), 8), rng.choice([1, 1, 2, 3])))
    ends = [0] + cuts + [len(data)]
    made = [(at, data[at:end], end < len(data)) for at, end in zip(ends, ends[1:])]
    if rng.random() < 0.5:
        rng.shuffle(made)
    return made


def ipv4(rng, source, target, data, shapes):
    whole = shapes == "tagged" or rng.random() < 0.5
    options = b"\x01" * (0 if shapes == "tagged" else rng.choice([0, 0, 4, 40]))
    name = rng.getrandbits(16)
    for offset, part, more in [(0, data, False)] if whole else pieces(rng, data):
        flags = (0x2000 if more else 0) | offset // 8
        yield ipv4_packet(source, target, 17, part, name, flags, options)


def ipv4_packet(source, target, protocol, data, name=0, flags=0, options=b""):
    header = struct.pack("!BBHHHBBH", 0x45 + len(options) // 4, 0, 20 + len(options) + len(data), name, flags, 64,
                         protocol, 0) + source.packed + target.packed + options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + data


def chain(rng, following, data, count):
    """Puts extension headers before data: hop-by-hop options first, destination options and spent routing headers, of one option each."""
    for nth in reversed(range(count)):
        kind = rng.choice([0, 60]) if nth == 0 else rng.choice([60, 60, 60, 43])
        units = rng.choice([0, 0, 1, 9, 20])
        if kind == 43:
            # Of a type that nobody knows, with no segments left: skipped (RFC 8200, 4.4).
            body = bytes([253, 0]) + bytes(4 + units * 8)
        else:
            # An option to be skipped by whom does not know it.
            body = bytes([0x1E, 4 + units * 8]) + bytes(4 + units * 8)
        data = bytes([following, units]) + body[:6 + units * 8] + data
        following = kind
    return following, data


def ipv6(rng, source, target, data, shapes):
    kind = 0 if shapes == "tagged" else rng.randrange(4)
    count = rng.choice([1, 2, 4, 5, 8, 9, 12]) if kind else 0
    name = rng.getrandbits(32)
    if kind <= 1:
        parts = [chain(rng, 17, data, count)]
    elif kind == 2:
        # Fragments, with headers before them.
        parts = []
        for offset, part, more in pieces(rng, data):
            parts.append(chain(rng, 44, struct.pack("!BBHI", 17, 0, offset | more, name) + part, rng.choice([0, count])))
    else:
        # Fragments of the headers and the datagram together; or all of it in one.
        following, whole = chain(rng, 17, data, count)
        cut = pieces(rng, whole) if rng.random() < 0.7 else [(0, whole, False)]
        parts = [(44, struct.pack("!BBHI", following, 0, offset | more, name) + part) for offset, part, more in cut]
    for following, part in parts:
        yield struct.pack("!IHBB", 6 << 28, len(part), following, 64) + source.packed + target.packed + part


def tags(rng, shapes):
    if shapes == "tagged":
        count = rng.randrange(1, 5)
    else:
        count = rng.choice([0, 0, 0, 1, 1, 2, 3, 4, 5, 8])
    made = [(rng.choice([0x8100, 0x88A8]), rng.randrange(16) << 12) for _ in range(count)]
    if shapes != "tagged" and count and rng.random() < 0.1:
        # Of a VLAN that nobody has.
        made[rng.randrange(count)] = (0x8100, 5)
    return made


def main():
    device, count, seed, mac = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4].replace(":", ""))
    shapes, payload = sys.argv[5], sys.argv[6].encode()
    sources = [ipaddress.ip_address(a) for a in sys.argv[7].split(",")]
    targets = [(ipaddress.ip_address(a), int(port)) for a, port in (target.rsplit("/", 1) for target in sys.argv[8:])]
    outer = [ipaddress.ip_address(a) for a in shapes.removeprefix("tunnelled:").split(",")] if shapes.startswith("tunnelled:") else []
    rng = random.Random(seed)
    sent = refused = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        own = raw.getsockname()[4]
        for nth in range(count):
            target, port = rng.choice(targets)
            source = rng.choice([a for a in sources if a.version == target.version])
            data = datagram(rng, source, target, port, payload + b" %d " % nth + bytes(rng.choice([40, 100, 300])))
            packets = (ipv4 if target.version == 4 else ipv6)(rng, source, target, data, shapes)
            link = mac + own + b"".join(struct.pack("!HH", *tag) for tag in tags(rng, shapes))
            ethertype = 0x0800 if target.version == 4 else 0x86DD
            for packet in packets:
                if outer:
                    packet = ipv4_packet(rng.choice(outer[1:]), outer[0], 4, packet)
                try:
                    raw.send(link + struct.pack("!H", ethertype) + packet)
                    sent += 1
                except OSError:
                    refused += 1
    print("sent", sent, "refused", refused)


if __name__ == "__main__":
    main()
