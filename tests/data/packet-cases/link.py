"""Frames and addresses: MACs, VLANs, padding, broken headers, martians, link-local, ARP and neighbour discovery, unresolved neighbours."""
from world import *


@both
def frames(f):
    c = Case('frames-refused-%s' % f.name, 'Frames that are for somebody else, or broken', 'DESIGN (neighbours); RFC 1122 3.2.1')
    p = packet(f.out, f.a1, udp(1000, 2000), payload='x')
    c.step((UPLINK, p, {'dst': '02:00:00:00:00:77'}), [], 'another MAC')
    c.step((UPLINK, p, {'dst': 'ff:ff:ff:ff:ff:ff'}), [], 'unicast in a broadcast frame')
    c.step((UPLINK, p, {'dst': '33:33:00:00:00:01' if f.six else '01:00:5e:00:00:01'}), [], 'unicast in a multicast frame')
    q = packet(f.a1, f.a2, udp(1000, 2000), payload='x')
    c.step((POD1, q, {'dst': '02:00:00:00:00:77'}), [], 'from a pod, for another MAC')
    c.step((POD1, q, {'vlan': 5}), [], 'a VLAN tag from a pod')
    c.step((POD1, q, {'type': 0x88cc}), [], 'LLDP from a pod')
    c.step((UPLINK, p, {'vlan': 5}), [pattern(HOST, {'eth': {'vlan': 5}})], "a VLAN tag from outside is the kernel's")
    c.step((UPLINK, p, {'type': 0x88cc}), [pattern(HOST, {'eth': {'type': 0x88cc}})], 'so is LLDP')
    c.step((UPLINK, {**p, 'cut': 10}), [], 'not even a frame')
    c.step((UPLINK, {**p, 'cut': 14 + f.header - 1}), [], 'a cut header')
    c.step((UPLINK, {**p, 'cut': 14 + f.header + 5}), [], 'a cut UDP header')
    c.step((UPLINK, packet(f.out, f.a1, udp(1000, 2000), payload='x', **{'plen' if f.six else 'len': 500})), [], 'longer than the frame')
    c.step((UPLINK, packet(f.out, f.a1, udp(1000, 2000), payload='x', version=5)), [], 'version 5')
    c.step((UPLINK, packet(f.out, f.a1, udp(1000, 2000, len=200), payload='x')), any_of=[[], [pattern(POD1, {})]], note='a UDP length past the end', allow_bad=True)
    c.step((UPLINK, packet(f.out, f.a1, tcp(1000, 2000, dataofs=3))), [], 'a TCP header of 12 bytes')
    c.step((UPLINK, packet(f.out, f.a1, tcp(1000, 2000, dataofs=15))), [], 'a TCP header longer than the packet')
    if not f.six:
        c.step((UPLINK, packet(f.out, f.a1, udp(1000, 2000), payload='x', ihl=4)), [], 'a header of 16 bytes')
        c.step((UPLINK, packet(f.out, f.a1, udp(1000, 2000), payload='x', chksum='bad')), [], 'a wrong header checksum', reason='BadHeaderChecksum')
        c.step((UPLINK, packet(f.out, f.a1, udp(1000, 2000), payload='x', options='01010101')), any_of=[
            [out(POD1, packet(f.out, f.a1, udp(1000, 2000), payload='x', options='01010101'))]], note='harmless options pass')
        c.step((UPLINK, packet(f.out, f.a2, udp(1000, 2000), payload='x', options='8307040a000001' + '00')), any_of=[
            [], [icmp_error(UPLINK, f, f.node, f.out, (3, 5), quote(f.out, f.a2))], [pattern(POD2, {})]], note='a source route')
    c.step((UPLINK, {**packet(f.out, f.a1, udp(1001, 2000), payload='x'), 'pad': 100, 'padbyte': 0x5a}),
           [out(POD1, packet(f.out, f.a1, udp(1001, 2000), payload='x'))], 'padding is not sent on')
    c.step((UPLINK, p), [out(POD1, p, **({'options': ''} if not f.six else {}))], 'the plain packet')


@both
def checksums(f):
    dns = service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP', 30053)
    c = Case('checksum-bad-stays-bad-%s' % f.name, 'A wrong layer-4 checksum is never repaired', 'DESIGN (checksums)', dns, service(f, 'web', [f.b1]))
    p = packet(f.a1, f.vip2, udp(40000, 53, chksum='bad'), payload='query')
    bad = {'device': UPLINK, 'packet': {'udp': {'dport': 5353}}}
    c.step((POD1, p), any_of=[[], [bad]], allow_bad=True, note='first packet')
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='query')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)], 'the right one')
    p = packet(f.a1, f.vip2, udp(40000, 53, chksum=0x1234), payload='query')
    q = out(UPLINK, p, dst=f.b1, dport=5353)
    q['packet']['udp']['chksum'] = {'any': True}
    c.step((POD1, p), any_of=[[], [q]], allow_bad=True, note='established')
    if f.six:
        p = packet(f.a1, f.vip2, udp(40000, 53, chksum=0), payload='query')
        c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)], 'none at all is for the ends to allow (RFC 6936, 5): it stays none', allow_bad=True)
        p = packet(f.a1, f.vip2, udp(40001, 53, chksum=0), payload='query')
        c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)], 'also in a first packet', allow_bad=True)
    c = Case('checksum-zero-result-%s' % f.name, 'A UDP checksum that becomes 0 is sent as 0xffff', 'RFC 768', dns)
    # the payload is chosen so that the sum after DNAT is all ones: the runner recomputes it
    import packets
    want = packet(f.a1, f.b1, udp(40000, 5353), payload={'hex': '0000'})
    l3 = packets.build_l3(want, {})[1]
    at = f.header + 6
    checksum = int.from_bytes(l3[at:at + 2], 'big')
    fill = (checksum or 0xffff)                   # adding the checksum itself to the data brings the sum to 0
    p = packet(f.a1, f.vip2, udp(40000, 53), payload={'hex': '%04x' % fill})
    q = out(UPLINK, p, dst=f.b1, dport=5353)
    q['packet']['udp']['chksum'] = 0xffff
    c.step((POD1, p), [q])


@both
def addresses(f):
    c = Case('martians-%s' % f.name, 'Addresses that may not be on the wire', 'RFC 1812 5.3.7; RFC 4291 2.5')
    bad = ('::1', '::', 'ff02::1', f.node, f.a2) if f.six else ('127.0.0.1', '0.0.0.0', '224.0.0.5', '255.255.255.255', f.node, f.a2)
    for src in bad[:-1]:
        c.step((UPLINK, packet(src, f.a1, udp(1000, 2000), payload='x')), [], 'from outside, source ' + src)
    for src in bad + (f.b1, f.out):
        c.step((POD1, packet(src, f.a2, udp(1000, 2000), payload='x')), [], 'from a pod, source ' + src)
    for dst in ('::1', '::') if f.six else ('127.0.0.1', '0.0.0.0'):
        c.step((POD1, packet(f.a1, dst, udp(1000, 2000), payload='x')), [], 'from a pod to ' + dst)
    p = packet(f.out, f.a1, udp(1000, 2000), payload='x')
    c.step((UPLINK, p), [out(POD1, p)], 'the plain packet')
    c = Case('multicast-%s' % f.name, 'Broadcast and multicast are not forwarded', 'RFC 1812 5.3.5')
    for dst, mac in ((('ff02::fb', '33:33:00:00:00:fb'), ('ff05::1', '33:33:00:00:00:01')) if f.six else
                     (('224.0.0.251', '01:00:5e:00:00:fb'), ('255.255.255.255', 'ff:ff:ff:ff:ff:ff'), ('239.1.1.1', '01:00:5e:01:01:01'))):
        p = packet(f.a1, dst, udp(5353, 5353), payload='x', ttl=64)
        c.step((POD1, p, {'dst': mac}), [], 'from a pod to ' + dst, forbid=[{'device': UPLINK, 'packet': {}}, {'device': POD2, 'packet': {}}])
        p = packet(f.lan, dst, udp(5353, 5353), payload='x', ttl=1)
        c.step((UPLINK, p, {'dst': mac}), any_of=[[out(HOST, p)], []], note='from outside to ' + dst)
    if not f.six:
        p = packet(f.lan, '192.168.0.255', udp(138, 138), payload='x')
        c.step((UPLINK, p, {'dst': 'ff:ff:ff:ff:ff:ff'}), any_of=[[out(HOST, p)], []], note="the subnet's broadcast")
        p = packet(f.a1, '192.168.0.255', udp(138, 138), payload='x')
        c.step((POD1, p), any_of=[[out(HOST, p)], []], note="the subnet's broadcast from a pod is not sent on")
    p = packet(f.out, f.a1, udp(1000, 2000), payload='x')
    c.step((UPLINK, p), [out(POD1, p)], 'the plain packet')


def arp():
    f = V4

    def who_has(src, src_mac, target, op=1, target_mac='00:00:00:00:00:00'):
        return {'arp': {'op': op, 'hwsrc': src_mac, 'psrc': src, 'hwdst': target_mac, 'pdst': target}}
    c = Case('arp-corners', 'ARP of a pod: the gateway answers, a claim on another address moves nothing', 'RFC 826; Calico proxy ARP')
    c.step((POD1, {**who_has('0.0.0.0', POD1_MAC, f.a1)}, {'dst': 'ff:ff:ff:ff:ff:ff'}), any_of=[[]], note='a probe for its own address (RFC 5227)')
    c.step((POD1, who_has(f.a1, POD1_MAC, f.a1), {'dst': 'ff:ff:ff:ff:ff:ff'}), any_of=[[]], note='an announcement')
    c.step((POD1, who_has(f.a2, POD1_MAC, '169.254.1.1'), {'dst': 'ff:ff:ff:ff:ff:ff'}), any_of=[[], [pattern(POD1, {'arp': {'op': 2}})]],
           note="with another pod's address")
    p = packet(f.out, f.a2, udp(1000, 2000), payload='x')
    c.step((UPLINK, p), [out(POD2, p)], 'which still gets its own')
    c.step((POD1, who_has(f.a1, POD1_MAC, '169.254.1.1', 2, VETH_MAC)), any_of=[[]], note='a reply nobody asked for')
    c.step((POD1, {**who_has(f.a1, POD1_MAC, '169.254.1.1'), 'cut': 30}, {'dst': 'ff:ff:ff:ff:ff:ff'}), [], 'a cut one')
    answer = pattern(POD1, {'arp': {'op': 2, 'hwsrc': VETH_MAC, 'psrc': '169.254.1.1', 'hwdst': POD1_MAC, 'pdst': f.a1}})
    c.step((POD1, who_has(f.a1, POD1_MAC, '169.254.1.1'), {'dst': VETH_MAC}), [answer], 'unicast (a pod checks that its gateway is alive)')
    c.step((POD1, {**who_has(f.a1, POD1_MAC, '169.254.1.1'), 'pad': 60, 'padbyte': 7}, {'dst': 'ff:ff:ff:ff:ff:ff'}), [answer], 'padded')
    c.step((UPLINK, who_has(f.lan, LAN_MAC, f.node), {'dst': 'ff:ff:ff:ff:ff:ff', 'src': LAN_MAC}), [pattern(HOST, {'arp': {'op': 1, 'pdst': f.node}})],
           "on the uplink it is the kernel's")
    c.step((UPLINK, who_has(f.gateway, GATEWAY_MAC, f.node, 2, NODE_MAC)), [pattern(HOST, {'arp': {'op': 2}})], 'replies too')
    c.step((UPLINK, who_has(f.lan, LAN_MAC, f.a1), {'dst': 'ff:ff:ff:ff:ff:ff'}), [pattern(HOST, {'arp': {}})], "also about a pod's address")

    f = V6
    c = Case('nd-corners', 'Neighbour discovery of a pod: link-local towards the gateway only', 'RFC 4861 7; DESIGN (neighbours)')
    link, gateway = 'fe80::800:ff:fe00:102', 'fe80::ecee:eeff:feee:eeee'
    solicit = packet(link, 'ff02::1:ffee:eeee', {'icmp6': {'type': 135, 'target': gateway, 'lladdr': POD1_MAC}}, ttl=255)
    answer = pattern(POD1, {'ip6': {'src': gateway, 'dst': link, 'hlim': 255}, 'icmp6': {'type': 136, 'target': gateway, 'lladdr': VETH_MAC}})
    c.step((POD1, solicit, {'dst': '33:33:ff:ee:ee:ee'}), [answer], 'multicast')
    c.step((POD1, packet(link, gateway, {'icmp6': {'type': 135, 'target': gateway, 'lladdr': POD1_MAC}}, ttl=255)), [answer], 'unicast')
    c.step((POD1, packet(f.a1, 'ff02::1:ffee:eeee', {'icmp6': {'type': 135, 'target': gateway, 'lladdr': POD1_MAC}}, ttl=255), {'dst': '33:33:ff:ee:ee:ee'}),
           [pattern(POD1, {'ip6': {'dst': f.a1, 'hlim': 255}, 'icmp6': {'type': 136, 'target': gateway}})], 'from its global address')
    c.step((POD1, packet('::', 'ff02::1:ff00:2', {'icmp6': {'type': 135, 'target': f.a1}}, ttl=255), {'dst': '33:33:ff:00:00:02'}), any_of=[[]],
           note='duplicate address detection of its own address')
    c.step((POD1, packet(link, 'ff02::1:ffee:eeee', {'icmp6': {'type': 135, 'target': gateway, 'lladdr': POD1_MAC, 'chksum': 'bad'}}, ttl=255),
            {'dst': '33:33:ff:ee:ee:ee'}), [], 'a wrong checksum')
    c.step((POD1, packet(link, 'ff02::1:ffee:eeee', {'icmp6': {'type': 135, 'code': 1, 'target': gateway, 'lladdr': POD1_MAC}}, ttl=255),
            {'dst': '33:33:ff:ee:ee:ee'}), [], 'a code')
    c.step((POD1, packet(link, 'ff02::2', {'icmp6': {'type': 133}}, ttl=255), {'dst': '33:33:00:00:00:02'}), any_of=[[], [pattern(HOST, {})]], note='a router solicitation')
    c.step((POD1, packet(link, 'fe80::800:ff:fe00:103', udp(1, 2), payload='x')), [], "to another pod's link-local address")
    c.step((POD1, packet(link, f.a2, udp(1, 2), payload='x')), [], 'a link-local source is never forwarded')
    c.step((POD1, packet(f.a1, 'fe80::1', udp(1, 2), payload='x')), [], 'a link-local destination neither')
    c.step((UPLINK, packet('fe80::1', V6.node, {'icmp6': {'type': 135, 'target': V6.node, 'lladdr': GATEWAY_MAC}}, ttl=255)), [pattern(HOST, {})],
           "on the uplink it is the kernel's")
    c.step((UPLINK, packet('fe80::1', 'ff02::1', {'icmp6': {'type': 134}}, ttl=255), {'dst': '33:33:00:00:00:01'}), [pattern(HOST, {})], 'router advertisements too')
    c.step((UPLINK, packet('fe80::1', f.a1, udp(1, 2), payload='x')), [], 'link-local from outside to a pod')


arp()


@both
def neighbours(f):
    c = Case('neighbour-learned-%s' % f.name, "A pod without an entry in neighbors: its MAC is learned from what it sends; what waited comes", 'DESIGN (replay)',
             neighbours_without=(V4.a1, V6.a1))
    p = packet(f.a2, f.a1, udp(1000, 2000), payload='waits')
    c.step((POD2, p), [], 'held', quiet=True)
    q = packet(f.a1, f.b1, udp(1, 2), payload='hello')
    c.step((POD1, q), [out(UPLINK, q), out(POD1, p)], 'it speaks')
    c.step((POD2, p), [out(POD1, p)], 'now at once')
    c = Case('neighbour-never-%s' % f.name, 'What waits in vain is dropped in the end', 'DESIGN (replay)', neighbours_without=(V4.a1, V6.a1))
    p = packet(f.a2, f.a1, udp(1000, 2000), payload='waits')
    c.step((POD2, p), [], 'held, and dropped at the end', reason='NeighborUnresolved')
    q = packet(f.a2, f.b1, udp(1, 2), payload='hello')
    c.step((POD2, q), [out(UPLINK, q)], 'a minute later', after=60, reason='NeighborUnresolved')
    q = packet(f.a1, f.b1, udp(1, 2), payload='hello')
    c.step((POD1, q), [out(UPLINK, q)], 'too late for what waited')
    c = Case('neighbour-burst-%s' % f.name, 'Several wait; they come in order', 'DESIGN (replay)', neighbours_without=(V4.a1, V6.a1))
    waiting = [packet(f.a2, f.a1, udp(1000, 2000), payload='waits %d' % k) for k in range(3)]
    c.step([(POD2, p) for p in waiting], [], 'held', quiet=True)
    q = packet(f.a1, f.b1, udp(1, 2), payload='hello')
    c.step((POD1, q), [out(UPLINK, q)] + [out(POD1, p) for p in waiting])
    c = Case('neighbour-gateway-missing-%s' % f.name, 'No MAC of the gateway: nothing is sent', 'DESIGN (replay)', neighbours_without=(f.gateway,))
    p = packet(f.a1, f.out, udp(1000, 2000), payload='x')
    c.step((POD1, p), [], quiet=True)
    p = packet(f.a1, f.b1, udp(1000, 2000), payload='x')
    c.step((POD1, p), [out(UPLINK, p)], 'node-b is known')
