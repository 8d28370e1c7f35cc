"""IPIP: outer headers, congestion marks, who may send what, path MTU, services across it (RFC 2003, 6040)."""
from world import *

f = V4
OUTER = {'proto': 4, 'options': '', 'ttl': {'range': [16, 255]}, 'src': f.node}


def encapsulated(p, node=f.node_c, outer=None, via=None, **changes):
    inner = out(UPLINK, p, eth=False, **changes)['packet']
    return {'device': UPLINK, 'packet': {'ip': {**OUTER, 'dst': node, **(outer or {})}, 'inner': inner,
                                         'eth': {'src': NODE_MAC, 'dst': via or mac_towards(node)}}}


def tunnelled(p, node=f.node_c, **outer):
    return packet(node, outer.pop('dst', f.node), {'inner': p}, **outer)


def encapsulation():
    c = Case('ipip-tos', 'DSCP and ECN of the outer header', 'RFC 2003 3.1; RFC 6040 4.1', ipip='Always')
    for tos in (0, 1, 2, 3, 0xb8, 0xb9, 0xba, 0xbb, 0x2e):
        p = packet(f.a1, f.c1, udp(5000, 6000), payload='x', tos=tos)
        # an outer CE says nothing that the inner one does not: RFC 6040's normal mode copies
        c.step((POD1, p), [encapsulated(p, outer={'tos': {'oneof': [tos, tos & 3]}})], 'TOS %#x' % tos)
    c = Case('ipip-decap-ecn', 'ECN after decapsulation', 'RFC 6040 4.2', ipip='Always')
    for inner in range(4):
        for outer in range(4):
            p = packet(f.c1, f.a1, udp(5000, 6000), payload='x', tos=0xb8 | inner)
            want = [[3, None], [3, 3], [3, 3], [3, 3]]
            result = {(0, 0): 0, (0, 1): 0, (0, 2): 0, (0, 3): None, (1, 0): 1, (1, 1): 1, (1, 2): 1, (1, 3): 3,
                      (2, 0): 2, (2, 1): 1, (2, 2): 2, (2, 3): 3, (3, 0): 3, (3, 1): 3, (3, 2): 3, (3, 3): 3}[inner, outer]
            note = 'inner %d, outer %d' % (inner, outer)
            both_say = [[out(POD1, p, tos=0xb8 | result)]] if result is not None else [[]]
            if (inner, outer) == (2, 1):                # ECT(0) inside, ECT(1) outside: RFC 6040 gives ECT(1), older decapsulators keep ECT(0)
                both_say.append([out(POD1, p)])
            c.step((UPLINK, tunnelled(p, tos=outer)), any_of=both_say, note=note)
    c = Case('ipip-cross-subnet', 'CrossSubnet: the neighbour directly, the other through the tunnel', 'Calico ipipMode', ipip='CrossSubnet')
    p = packet(f.a1, f.b1, udp(5000, 6000), payload='x')
    c.step((POD1, p), [out(UPLINK, p)])
    p = packet(f.a1, f.c1, udp(5000, 6000), payload='x')
    c.step((POD1, p), [encapsulated(p)])
    p = packet(f.c1, f.a1, udp(6000, 5000), payload='y')
    c.step((UPLINK, tunnelled(p)), [out(POD1, p)])
    p = packet(f.b1, f.a1, udp(6000, 5000), payload='y')
    c.step((UPLINK, p), [out(POD1, p)])
    c.step((UPLINK, tunnelled(p, f.node_b)), any_of=[[out(POD1, p)], []], note='one that tunnels all the same')
    c = Case('ipip-padding', 'Ethernet padding does not get into the tunnel, nor out of it', 'RFC 894', ipip='Always')
    p = packet(f.a1, f.c1, udp(5000, 6000), payload='x')
    c.step((POD1, {**p, 'pad': 60, 'padbyte': 0xaa}), [encapsulated(p, outer={'len': 49})])
    p = packet(f.c1, f.a1, udp(6000, 5000), payload='y')
    c.step((UPLINK, {**tunnelled(p), 'pad': 70, 'padbyte': 0xaa}), [out(POD1, p)])
    c = Case('ipip-to-unknown', 'A pool address that no node owns', 'DESIGN 10', ipip='Always')
    p = packet(f.a1, '10.244.9.9', udp(5000, 6000), payload='x')
    c.step((POD1, p), any_of=[[], [icmp_error(POD1, f, f.node, f.a1, (3, 1), quote(f.a1, '10.244.9.9'))], [icmp_error(POD1, f, f.node, f.a1, (3, 0), quote(f.a1, '10.244.9.9'))],
                              [out(UPLINK, p)]])
    p = packet(f.a1, '10.244.3.99', udp(5000, 6000), payload='x')
    c.step((POD1, p), [encapsulated(p)], "unknown pod of a known node's block: that node's matter")


def hops_and_sizes():
    c = Case('ipip-ttl', 'TTL: one hop for the inner packet', 'RFC 2003 3.1; RFC 1812', ipip='Always')
    p = packet(f.a1, f.c1, udp(5000, 6000), payload='x', ttl=1)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, (11, 0), quote(f.a1, f.c1, ports('udp', 5000, 6000)))], 'runs out before')
    p = packet(f.a1, f.c1, udp(5000, 6000), payload='x', ttl=2)
    c.step((POD1, p), [encapsulated(p, outer={'ttl': {'range': [16, 255]}})])
    p = packet(f.c1, f.a1, udp(5000, 6001), payload='x', ttl=1)
    c.step((UPLINK, tunnelled(p)), [{'device': UPLINK, 'packet': {'ip': {**OUTER, 'dst': f.node_c}, 'inner': packet(
        f.node, f.c1, {'icmp': {'type': 11, 'code': 0, 'embed': quote(f.c1, f.a1, ports('udp', 5000, 6001))}})}}], 'runs out after: the answer goes through the tunnel')
    p = packet(f.c1, f.a1, udp(5000, 6001), payload='x', ttl=9)
    c.step((UPLINK, tunnelled(p, ttl=1)), [out(POD1, p)], 'the outer TTL has arrived')
    c = Case('ipip-mtu', 'What does not fit into the tunnel', 'RFC 2003 3.1, 5.1', service(f, 'dns', [f.c1], f.vip2, 53, 5353, 'UDP', 30053), ipip='Always')
    p = packet(f.a1, f.vip2, udp(40000, 53), payload={'len': 1460}, df=True)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, (3, 4), quote(f.a1, f.vip2, ports('udp', 40000, 53)), 1480)], 'through a service')
    p = packet(f.a1, f.vip2, udp(40000, 53), payload={'len': 1452}, df=True)
    c.step((POD1, p), [encapsulated(p, dst=f.c1, dport=5353, outer={'df': True, 'len': 1500})], '1480 bytes fit')
    p = packet(f.a1, f.vip2, udp(40000, 53), payload={'len': 1470})
    c.step((POD1, p), [{**encapsulated(p, dst=f.c1, dport=5353), 'packet': {**encapsulated(p, dst=f.c1, dport=5353)['packet'], 'frags': 2}}], 'fragmented before', reassemble=True)
    p = packet(f.out, f.node, udp(40000, 30053), payload={'len': 1460}, df=True)
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.out, (3, 4), quote(f.out, f.node, ports('udp', 40000, 30053)), 1480)], 'a node port')
    c = Case('ipip-mtu-error-inside', 'An error of a router in the tunnel becomes one about what it carried', 'RFC 2003 4, 5.1', ipip='Always')
    p = packet(f.a1, f.c1, udp(40000, 53), payload={'len': 1400}, df=True)
    e = encapsulated(p)
    e['packet']['save'] = 'wire'
    c.step((POD1, p), [e])
    q = packet(f.gateway, f.node, error(f, (3, 4), {'saved': 'wire'}, 1400))
    c.step((UPLINK, q), any_of=[[icmp_error(POD1, f, {'oneof': [f.gateway, f.node]}, f.a1, (3, 4), quote(f.a1, f.c1, ports('udp', 40000, 53)), 1380)],
                                [pattern(HOST, {'ip': {'src': f.gateway}})]])


def who_may():
    c = Case('ipip-refused', 'Tunnel packets that are not what they should be', 'DESIGN 3', ipip='Always')
    inner = packet(f.c1, f.a1, udp(5000, 6000), payload='x')
    c.step((UPLINK, tunnelled(inner, '203.0.113.9')), [], 'from a stranger')
    c.step((UPLINK, tunnelled(inner, f.node_b)), [], 'node-b says it is of node-c')
    c.step((UPLINK, tunnelled(packet(f.out, f.a1, udp(5000, 6000), payload='x'))), [], 'inner source from outside the cluster')
    c.step((UPLINK, tunnelled(packet(f.a2, f.a1, udp(5000, 6000), payload='x'))), [], 'inner source a pod of this node')
    c.step((UPLINK, tunnelled(packet(f.node, f.a1, udp(5000, 6000), payload='x'))), [], 'inner source this node')
    c.step((UPLINK, tunnelled(tunnelled(inner))), [], 'a tunnel in the tunnel')
    c.step((UPLINK, tunnelled(inner, chksum='bad')), [], 'outer header checksum')
    c.step((UPLINK, tunnelled(packet(f.c1, f.a1, udp(5000, 6000), payload='x', chksum='bad'))), [], 'inner header checksum')
    c.step((UPLINK, tunnelled(packet(f.c1, f.a1, udp(5000, 6000), payload='x', len=999))), [], 'inner length')
    c.step((UPLINK, tunnelled(packet(f.c1, f.a1, udp(5000, 6000), payload='x', version=6))), [], 'not IPv4 inside')
    c.step((UPLINK, {**tunnelled(inner), 'cut': 14 + 30}), [], 'cut')
    c.step((POD1, packet(f.a1, f.node, {'inner': packet(f.c1, f.a2, udp(1, 2), payload='x')})), [], 'made by a pod')
    c.step((POD1, packet(f.a1, f.node_c, {'inner': packet(f.a1, f.c1, udp(1, 2), payload='x')})), [], 'made by a pod, to another node')
    c.step((POD1, packet(f.a1, f.node_b, udp(40000, 4789), payload={'len': 60})), [], 'VXLAN made by a pod')
    c.step((UPLINK, tunnelled(inner)), [out(POD1, inner)], 'the right one')
    c = Case('ipip-to-node', 'The tunnel carries what is for the node itself', 'DESIGN 3', ipip='Always', tunnel_addresses={'node-a': '10.244.1.1', 'node-c': '10.244.3.1'})
    p = packet(f.c1, f.node, udp(5000, 6000), payload='x')
    c.step((UPLINK, tunnelled(p)), [out(HOST, p, ttl={'oneof': [63, 64]})], 'its address')
    p = packet('10.244.3.1', f.a1, udp(5000, 6000), payload='x')
    c.step((UPLINK, tunnelled(p)), [out(POD1, p)], "from the other node's tunnel address")
    p = packet(f.c1, '10.244.1.1', udp(5000, 6000), payload='x')
    c.step((UPLINK, tunnelled(p)), [out(HOST, p, ttl={'oneof': [63, 64]})], "this node's tunnel address")


def services_across():
    dns = service(f, 'dns', [f.c1], f.vip2, 53, 5353, 'UDP', 30053)
    for name, address, tunnels in (('tunnel-address', '10.244.1.1', {'node-a': '10.244.1.1'}), ('internal-ip', f.node, None)):
        c = Case('ipip-masquerade-' + name, 'Masquerade into a tunnel', 'DESIGN (masquerade)', dns, ipip='Always', tunnel_addresses=tunnels)
        p = packet(f.out, f.node, udp(40000, 30053), payload='q')
        c.step((UPLINK, p), [encapsulated(p, src=address, dst=f.c1, sport=dict(MASQUERADE_PORT), dport=5353)])
        p = packet(f.c1, address, udp(5353, '$m'), payload='a')
        c.step((UPLINK, tunnelled(p)), [out(UPLINK, p, src=f.node, dst=f.out, sport=30053, dport=40000)], 'the answer comes through it')
        e = packet(f.c1, address, error(f, (3, 3), packet(address, f.c1, udp('$m', 5353), payload='q')))
        c.step((UPLINK, tunnelled(e)), [icmp_error(UPLINK, f, f.node, f.out, (3, 3), quote(f.out, f.node, ports('udp', 40000, 30053)))], 'an error too')
        p = packet(f.a1, f.vip2, udp(40000, 53), payload='q')
        c.step((POD1, p), [encapsulated(p, dst=f.c1, dport=5353)], 'a pod is not masqueraded')
    c = Case('ipip-to-service-backend', "Another node's masqueraded client comes out of the tunnel", 'DESIGN 3', ipip='Always', tunnel_addresses={'node-c': '10.244.3.1'})
    p = packet('10.244.3.1', f.a1, tcp(21000, 8080))
    c.step((UPLINK, tunnelled(p)), [out(POD1, p)])
    p = packet(f.a1, '10.244.3.1', tcp(8080, 21000, 'SA', 9, 1001))
    c.step((POD1, p), [encapsulated(p)])
    p = packet(f.node_c, f.a1, tcp(21000, 8080))
    c.step((UPLINK, tunnelled(p)), [out(POD1, p)], "or by its address")
    c = Case('ipip-fragments-in', 'Fragments inside the tunnel', 'RFC 2003', ipip='Always')
    p = packet(f.c1, f.a1, udp(5000, 6000), payload={'len': 2000})
    a, b = fragments(p, 1400)
    c.step([(UPLINK, tunnelled(a)), (UPLINK, tunnelled(b))], [out(POD1, p, id=0x7777, frags={'range': [1, 3]})], reassemble=True)
    a, b = fragments(p, 1400, id=9)
    c.step([(UPLINK, tunnelled(b)), (UPLINK, tunnelled(a))], [out(POD1, p, id=9, frags={'range': [1, 3]})], 'reversed', reassemble=True)
    c = Case('ipip-node-to-pod', "The node's own packets go through the tunnel", 'DESIGN (role host)', ipip='Always')
    p = packet(f.node, f.c1, tcp(40000, 80))
    c.step((HOST, p), [{**encapsulated(p), 'packet': {**encapsulated(p)['packet'], 'inner': packet({'any': True}, f.c1, ports('tcp', 40000, 80))}}] if False else
           [{'device': UPLINK, 'packet': {'ip': {**OUTER, 'dst': f.node_c}, 'inner': packet(f.node, f.c1, {'tcp': {'dport': 80}})}}])


encapsulation(), hops_and_sizes(), who_may(), services_across()
