"""What falls between the topics: several uplinks, the node as client and as backend, options, odd protocols, many flows at once."""
from world import *


def second_uplink(f, **more):
    """A router with eth1 10.9.0.10/24 beside eth0; 198.51.100.0/24 is behind it."""
    r = router()
    r['devices'].append({'name': 'eth1', 'role': 'uplink', 'mac': '02:00:00:00:00:1a', 'mtu': 1400, 'addresses': ['10.9.0.10/24', '2001:db8:9::10/64']})
    r['routes'] += [{'to': '198.51.100.0/24', 'via': '10.9.0.1', 'device': 'eth1'}, {'to': '2001:db8:beef::/48', 'via': '2001:db8:9::1', 'device': 'eth1'}]
    r['neighbors'] += [{'address': a, 'mac': '02:00:00:00:00:19', 'device': 'eth1'} for a in ('10.9.0.1', '2001:db8:9::1')]
    r['neighbors'] += [{'address': a, 'mac': '02:00:00:00:00:77', 'device': 'eth1'} for a in ('10.9.0.77', '2001:db8:9::77')]
    return {k: r[k] for k in ('devices', 'routes', 'neighbors')} | more


DEVICE_MACS['eth1'] = ('02:00:00:00:00:19', '02:00:00:00:00:1a')


def out1(p, dst_mac='02:00:00:00:00:19', **changes):
    e = out(UPLINK, p, **changes)
    e['device'] = 'eth1'
    e['packet']['eth'] = {'src': '02:00:00:00:00:1a', 'dst': dst_mac}
    return e


@both
def uplinks(f):
    own, near = ('2001:db8:9::10', '2001:db8:9::77') if f.six else ('10.9.0.10', '10.9.0.77')
    c = Case('two-uplinks-%s' % f.name, "The masquerade address is that of the device that the packet leaves by", 'DESIGN (masquerade address)', nat=True,
             router_with=second_uplink(f))
    p = packet(f.a1, f.out2, udp(40000, 53), payload='x')
    c.step((POD1, p), [out1(p, src=own, sport=dict(MASQUERADE_PORT))], 'behind the gateway of eth1')
    q = packet(f.out2, own, udp(53, '$m'), payload='y')
    c.step(('eth1', q), [out(POD1, q, dst=f.a1, dport=40000)])
    c.step((UPLINK, q), [out(POD1, q, dst=f.a1, dport=40000)], 'the answer comes by the other one')
    p = packet(f.a1, near, udp(40000, 53), payload='x')
    c.step((POD1, p), [out1(p, '02:00:00:00:00:77', src=own, sport={'range': [1024, 65535]})], 'on the link of eth1')
    p = packet(f.a1, f.out, udp(40000, 53), payload='x')
    c.step((POD1, p), [out(UPLINK, p, src=f.node, sport={'range': [1024, 65535]})], 'by eth0')
    p = packet(f.a1, f.out2, udp(40001, 53), payload={'len': 1440 - f.header}, df=True)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.too_big, quote(f.a1, f.out2, ports('udp', 40001, 53)), 1400)], 'its MTU')
    p = packet(f.out2, f.out, udp(1, 2), payload='x', ttl=1)
    c.step(('eth1', p), [{**icmp_error('eth1', f, own, f.out2, f.time_exceeded, quote(f.out2, f.out, ports('udp', 1, 2)))}], 'an error comes from the device\'s address')
    p = packet(f.out2, f.a1, udp(1, 2), payload='x')
    c.step(('eth1', p), [out(POD1, p)], 'in by eth1')
    q = packet(f.a1, f.out2, udp(2, 1), payload='x')
    c.step((POD1, q), [out1(q)], 'its reply keeps its source')
    c = Case('two-uplinks-node-port-%s' % f.name, 'A node port on either address; in by one, out by the other', 'SERVICES 22; DESIGN',
             service(f, 'web', [f.b1], node_port=30080), router_with=second_uplink(f))
    p = packet(f.out2, own, tcp(40000, 30080))
    c.step(('eth1', p), [out(UPLINK, p, src=f.node, dst=f.b1, sport=dict(MASQUERADE_PORT), dport=8080)])
    q = packet(f.b1, f.node, tcp(8080, '$m', 'SA', 7, 1001))
    c.step((UPLINK, q), [out1(q, src=own, dst=f.out2, sport=30080, dport=40000)])
    p = packet(f.out, own, tcp(40000, 30080))
    c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.b1, sport={'range': [1024, 65535]}, dport=8080)], "eth1's address, in by eth0")


@both
def node_as_backend(f):
    NODE_OF.setdefault(f.node, 'node-a')
    NODE_OF.setdefault(f.node_b, 'node-b')
    c = Case('host-network-backend-%s' % f.name, 'Backends that are nodes: this one and another', 'SERVICES; DESIGN (loopback source)',
             service(f, 'api', [f.node], target=6443, node_port=30443), service(f, 'far', [f.node_b], f.vip2, target=6443))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(HOST, p, dst=f.node, dport=6443, ttl={'oneof': [63, 64]})], 'this node')
    q = packet(f.node, f.a1, tcp(6443, 40000, 'SA', 5000, 1001))
    c.step((HOST, q), [out(POD1, q, src=f.vip, sport=80, ttl={'oneof': [63, 64]})])
    p = packet(f.a1, f.vip2, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.node_b, dport=6443)], 'another node')
    q = packet(f.node_b, f.a1, tcp(6443, 40000, 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q, src=f.vip2, sport=80)])
    p = packet(f.out, f.node, tcp(40000, 30443))
    c.step((UPLINK, p), [out(HOST, p, src={'bind': 's'}, dst=f.node, sport={'bind': 'sp'}, dport=6443, ttl={'oneof': [63, 64]})], 'a node port of it')
    q = packet(f.node, '$s', tcp(6443, '$sp', 'SA', 5000, 1001))
    q = {('ip6' if f.six else 'ip'): {'src': f.node, 'dst': '$s'}, **tcp(6443, '$sp', 'SA', 5000, 1001)}
    c.step((HOST, q), [pattern(UPLINK, packet(f.node, f.out, {'tcp': {'sport': 30443, 'dport': 40000, 'flags': 'SA'}}))], 'its answer')
    p = packet(f.node, f.vip, tcp(41000, 80))
    c.step((HOST, p), [out(HOST, p, src={'bind': 'n'}, dst=f.node, sport={'bind': 'np'}, dport=6443, ttl={'oneof': [63, 64]})], 'the node to itself')
    q = {('ip6' if f.six else 'ip'): {'src': f.node, 'dst': '$n'}, **tcp(6443, '$np', 'SA', 5000, 1001)}
    c.step((HOST, q), [pattern(HOST, packet(f.vip, f.node, {'tcp': {'sport': 80, 'dport': 41000, 'flags': 'SA'}}))], 'and its answer to itself')
    c = Case('node-port-from-node-%s' % f.name, "The node uses its own node port", 'SERVICES 9, 14', service(f, 'web', [f.a1], node_port=30080))
    p = packet(f.node, f.node, tcp(41000, 30080))
    c.step((HOST, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080, ttl={'oneof': [63, 64]})])
    q = packet(f.a1, f.node, tcp(8080, '$m', 'SA', 5000, 1001))
    c.step((POD1, q), [out(HOST, q, src=f.node, dst=f.node, sport=30080, dport=41000, ttl={'oneof': [63, 64]})])
    c = Case('backend-outside-%s' % f.name, 'A backend outside the cluster: natOutgoing judges where the packet goes', 'DESIGN 8', nat=True)
    c.cluster += service(f, 'web', [f.out])
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, src=f.node, dst=f.out, sport=dict(MASQUERADE_PORT), dport=8080)])
    q = packet(f.out, f.node, tcp(8080, '$m', 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q, src=f.vip, dst=f.a1, sport=80, dport=40000)])


@both
def node_and_pods(f):
    c = Case('node-answers-pod-%s' % f.name, "The node's kernel answers its pod: RST, port unreachable, too big", 'DESIGN (role host)',
             policy('p', 'a1', ['Ingress'], []))
    p = packet(f.a1, f.node, udp(40000, 9), payload='x')
    e = out(HOST, p)
    e['packet']['save'] = 'wire'
    c.step((POD1, p), [e])
    q = packet(f.node, f.a1, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((HOST, q), [pattern(POD1, packet(f.node, f.a1, {f.icmp: {'type': f.port_unreachable[0], 'code': f.port_unreachable[1],
                                                                    'embed': quote(f.a1, f.node, ports('udp', 40000, 9))}}))])
    p = packet(f.a1, f.node, tcp(40000, 9))
    c.step((POD1, p), [out(HOST, p)])
    q = packet(f.node, f.a1, tcp(9, 40000, 'RA', 0, 1001))
    c.step((HOST, q), [out(POD1, q, ttl={'oneof': [63, 64]})], 'a RST')
    p = packet(f.a1, f.node, echo(f), payload='x')
    c.step((POD1, p), [out(HOST, p)], 'a ping')
    q = packet(f.node, f.a1, echo(f, reply=True), payload='x')
    c.step((HOST, q), [out(POD1, q, ttl={'oneof': [63, 64]})])
    c = Case('hairpin-error-%s' % f.name, 'A hairpin connection\'s error', 'RFC 5508', service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='q')
    e = out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=5353)
    e['packet']['save'] = 'wire'
    c.step((POD1, p), [e])
    q = packet(f.a1, f.node, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((POD1, q), [icmp_error(POD1, f, f.vip2, f.a1, f.port_unreachable, quote(f.a1, f.vip2, ports('udp', 40000, 53)))])
    c = Case('error-keeps-zero-checksum-%s' % f.name, 'What an error quotes keeps its UDP checksum of 0; SCTP is quoted by eight bytes', 'RFC 5508',
             service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP'), service(f, 'sig', [f.b1], f.vip, 3868, 13868, 'SCTP'))
    if not f.six:
        p = packet(f.a1, f.vip2, udp(40000, 53, chksum=0), payload='q')
        e = out(UPLINK, p, dst=f.b1, dport=5353)
        e['packet']['save'] = 'wire'
        c.step((POD1, p), [e])
        q = packet(f.b1, f.a1, error(f, f.port_unreachable, {'saved': 'wire'}))
        c.step((UPLINK, q), [icmp_error(POD1, f, f.vip2, f.a1, f.port_unreachable, quote(f.a1, f.vip2, {'udp': {'sport': 40000, 'dport': 53, 'chksum': 0}}))])
    p = packet(f.a1, f.vip, sctp(40000, 3868, 'INIT', itag=5))
    e = out(UPLINK, p, dst=f.b1, dport=13868)
    e['packet']['save'] = 'swire'
    c.step((POD1, p), [e])
    q = packet(f.b1, f.a1, error(f, f.port_unreachable, {'saved': 'swire'}, embed_len=f.header + 8))
    c.step((UPLINK, q), [icmp_error(POD1, f, f.vip, f.a1, f.port_unreachable, quote(f.a1, f.vip, ports('sctp', 40000, 3868)))])


@both
def no_further(f):
    c = Case('no-entry-for-what-stays-%s' % f.name, 'A first packet that gets no further opens no connection', 'netfilter confirms what leaves',
             service(f, 'web', [f.b1]), mtu={UPLINK: 1400})
    p = packet(f.a1, f.vip, tcp(40000, 80), ttl=1)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.time_exceeded, quote(f.a1, f.vip, ports('tcp', 40000, 80)))], connections=[])
    p = packet(f.a1, f.b1, udp(40000, 53), payload={'len': 1420}, df=True)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.too_big, quote(f.a1, f.b1, ports('udp', 40000, 53)), 1400)], connections=[])
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], connections=[connection('tcp', (f.a1, 40000, f.vip, 80))])
    c = Case('no-route-%s' % f.name, 'No route: network unreachable', 'RFC 1812 5.2.7.1; RFC 4443 3.1', router_with={'routes': []})
    p = packet(f.a1, f.out, udp(40000, 53), payload='x')
    code = (1, 0) if f.six else (3, 0)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, code, quote(f.a1, f.out, ports('udp', 40000, 53)))], connections=[])
    p = packet(f.a1, f.lan, udp(40000, 53), payload='x')
    c.step((POD1, p), [out(UPLINK, p)], 'a neighbour is on the link')


@both
def protocols(f):
    number = lambda n: {'nh' if f.six else 'proto': n}
    c = Case('other-protocols-%s' % f.name, 'Protocols without ports: forwarded by address, both ways; never through a service', 'DESIGN; SERVICES 24',
             service(f, 'web', [f.b1]))
    for n in (50, 47, 132 + 1, 255):
        p = packet(f.a1, f.a2, payload={'len': 64}, **number(n))
        c.step((POD1, p), [out(POD2, p)], 'protocol %d' % n)
        p = packet(f.a2, f.a1, payload={'len': 32}, **number(n))
        c.step((POD2, p), [out(POD1, p)], 'and back')
    p = packet(f.a1, f.vip, payload={'len': 32}, **number(47))
    c.step((POD1, p), any_of=[[icmp_error(POD1, f, {'oneof': [f.node, f.vip]}, f.a1, f.port_unreachable, quote(f.a1, f.vip))],
                              [icmp_error(POD1, f, {'oneof': [f.node, f.vip]}, f.a1, (1, 3) if f.six else (3, 2), quote(f.a1, f.vip))]],
           note='GRE to a cluster IP is rejected', connections={'absent': [{'original': {'dst': f.vip}}]})
    p = packet(f.out, f.node, payload={'len': 32}, **number(50))
    c.step((UPLINK, p), [out(HOST, p)], "ESP to the node is its kernel's")


def options():
    f = V4
    web = service(f, 'web', [f.b1], node_port=30080)
    c = Case('options-dnat', 'IPv4 options (router alert, timestamps) in front of translated ports', 'RFC 791 3.1', web)
    for o in ('94040000', '01010100', '440c05000000000000000000'):
        p = packet(f.a1, f.vip, tcp(40000, 80), options=o)
        want = {'options': o} if o != '440c05000000000000000000' else {'options': {'any': True}}
        c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080, **want)], o)
    p = packet(f.out, f.node, tcp(40000, 30080), options='94040000')
    c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.b1, sport=dict(MASQUERADE_PORT), dport=8080)], 'masqueraded')
    c = Case('options-fragmented', 'Options of a packet that is fragmented: copied only where they say so', 'RFC 791 3.1', mtu={POD1: 600})
    p = packet(f.out, f.a1, udp(1, 2), payload={'len': 1400}, options='94040000')
    c.step((UPLINK, p), [out(POD1, p, frags={'range': [3, 4]})], reassemble=True)
    p = packet(f.out, f.a1, udp(1, 2), payload={'len': 1400}, options='440c0500000000000000000001010101')
    c.step((UPLINK, p), [out(POD1, p, frags={'range': [3, 4]}, options={'any': True})], reassemble=True)
    c = Case('options-quoted', 'An error that quotes a packet with options', 'RFC 1812 4.3.2.3', web)
    p = packet(f.a1, f.vip, tcp(40000, 80), options='94040000')
    e = out(UPLINK, p, dst=f.b1, dport=8080)
    e['packet']['save'] = 'wire'
    c.step((POD1, p), [e])
    q = packet(f.b1, f.a1, error(f, (3, 1), {'saved': 'wire'}, embed_len=32))
    c.step((UPLINK, q), [icmp_error(POD1, f, f.vip, f.a1, (3, 1), quote(f.a1, f.vip, ports('tcp', 40000, 80)), embed_len=32)])


options()


@both
def tcp_details(f):
    c = Case('tcp-options-untouched-%s' % f.name, 'Options, ECN flags, urgent pointer and window pass through DNAT as they are', 'RFC 3022', service(f, 'web', [f.b1]))
    opts = [['MSS', 1460], ['SACKOK'], ['TS', 1, 0], ['NOP'], ['WS', 7]]
    p = packet(f.a1, f.vip, tcp(40000, 80, 'SEC', 1000, options=opts))
    e = out(UPLINK, p, dst=f.b1, dport=8080)
    e['packet']['tcp']['options'] = '020405b4' + '0402' + '080a0000000100000000' + '01' + '030307'
    c.step((POD1, p), [e])
    p = packet(f.b1, f.a1, tcp(8080, 40000, 'SAE', 5000, 1001, options=opts))
    c.step((UPLINK, p), [out(POD1, p, src=f.vip, sport=80)])
    p = packet(f.a1, f.vip, tcp(40000, 80, 'APUC', 1001, 5001, win=502, urg=3, options=[['NOP'], ['NOP'], ['TS', 2, 1]]), payload='urgent')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    p = packet(f.b1, f.a1, tcp(8080, 40000, 'A', 5001, 1007, options='0101050a000003eb000003ef'))
    c.step((UPLINK, p), [out(POD1, p, src=f.vip, sport=80)], 'a selective acknowledgement')
    c = Case('tcp-fast-open-%s' % f.name, 'Data in a SYN', 'RFC 7413', service(f, 'web', [f.b1]))
    p = packet(f.a1, f.vip, tcp(40000, 80, 'S', 1000, options='220a0102030405060708' + '0101'), payload='early')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    p = packet(f.b1, f.a1, tcp(8080, 40000, 'SA', 5000, 1006))
    c.step((UPLINK, p), [out(POD1, p, src=f.vip, sport=80)])
    p = packet(f.a1, f.vip, tcp(40000, 80, 'PA', 1006, 5001), payload='more')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    c = Case('tcp-reuse-of-masqueraded-port-%s' % f.name, 'A client reconnects from the same port after TIME_WAIT and after a RST', 'STYLE (SYN on a closing entry)',
             service(f, 'web', [f.b1], node_port=30080))

    def between(flags, seq, ack, m, first=False):
        p = packet(f.out, f.node, tcp(40000, 30080, flags, seq, ack))
        c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.b1, sport={'bind': m, 'range': [1024, 65535]} if first else '$' + m, dport=8080)], '> ' + flags)

    def back(flags, seq, ack, m):
        p = packet(f.b1, f.node, tcp(8080, '$' + m, flags, seq, ack))
        c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.out, sport=30080, dport=40000)], '< ' + flags)
    between('S', 1000, 0, 'm', True), back('SA', 5000, 1001, 'm'), between('A', 1001, 5001, 'm')
    between('FA', 1001, 5001, 'm'), back('FA', 5001, 1002, 'm'), between('A', 1002, 5002, 'm')
    between('S', 99000, 0, 'n', True), back('SA', 777, 99001, 'n'), between('A', 99001, 778, 'n'), back('R', 778, 0, 'n')
    between('S', 300, 0, 'o', True), back('SA', 1, 301, 'o')


@both
def many(f):
    c = Case('masquerade-many-%s' % f.name, '2000 connections from two pods to one place: no two look alike, each answer finds its own', 'RFC 4787 REQ-1; netfilter', nat=True)

    def bulk(device, src, note, t):
        c.steps['steps'].append({'note': note, 't': t, 'device': device,
                                 'bulk': {'packet': frame(device, packet(src, f.out, udp(1, 53), payload='x')), 'vary': [{'path': 'udp.sport', 'range': [20000, 21000]}]},
                                 'expect_bulk': {'device': UPLINK, 'count': 1000, 'packet': {'ip6' if f.six else 'ip': {'src': f.node, 'dst': f.out}}, 'distinct': ['udp.sport'],
                                                 'save': {'name': src, 'fields': {'port': 'udp.sport'}}}})
    bulk(POD1, f.a1, 'pod 1', 0.1)
    bulk(POD2, f.a2, 'pod 2, the same ports', 0.2)
    for t, device, src in ((0.3, POD1, f.a1), (0.4, POD2, f.a2)):
        c.steps['steps'].append({'note': 'answers', 't': t, 'device': UPLINK,
                                 'bulk': {'packet': frame(UPLINK, packet(f.out, f.node, udp(53, '$port'), payload='y')), 'from': src},
                                 'expect_bulk': {'device': device, 'count': 1000, 'packet': {'ip6' if f.six else 'ip': {'dst': src}}, 'distinct': ['udp.dport'], 'ordered': 'udp.dport'},
                                 'conntrack': {'count': 2000}})
    c = Case('table-full-exactly-%s' % f.name, 'maxEntries counts connections: so many are there, and the next takes the place of one never answered', 'DESIGN (maxEntries)',
             router_with={'conntrack': {'maxEntries': 64}})
    base = frame(POD1, packet(f.a1, f.b2, udp(1, 53), payload='x'))
    c.steps['steps'].append({'note': '64 connections', 't': 0.1, 'device': POD1, 'bulk': {'packet': base, 'vary': [{'path': 'udp.sport', 'range': [41000, 41064]}]},
                             'expect_bulk': {'device': UPLINK, 'count': 64, 'packet': {}}, 'conntrack': {'count': 64}})
    c.steps['steps'].append({'note': 'and more', 't': 0.2, 'device': POD1, 'bulk': {'packet': base, 'vary': [{'path': 'udp.sport', 'range': [42000, 42064]}]},
                             'expect_bulk': {'device': UPLINK, 'count': 64, 'packet': {}}, 'conntrack': {'count': 64, 'contains': [connection('udp', (f.a1, 42063, f.b2, 53))]}})
    p = packet(f.node, f.a1, tcp(40000, 8080))
    c.step((HOST, p), [out(POD1, p, ttl={'oneof': [63, 64]})], "the node's own gets in", at=1.0, connections={'contains': [connection('tcp', (f.node, 40000, f.a1, 8080))]})

