"""Fragments: through NAT and tunnels in any order; those that no sender makes (RFC 791, 8200 4.5, 1858, 3128, 5722)."""
from world import *


def feed(c, device, pieces, expect=(), note='', **more):
    c.step([(device, p) for p in pieces], expect, note, reassemble=True, **more)


@both
def through_nat(f):
    dns = service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP', 30053)
    long = {'len': 3000}
    p = packet(f.a2, f.vip2, udp(40000, 53), payload=long)
    joined = out(POD1, p, dst=f.a1, dport=5353, id=0x7777, frags={'range': [1, 9]})
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1)):
        c = Case('fragments-order-%d%d%d-%s' % (*order, f.name), 'UDP to a service in three fragments, out of order', 'RFC 791 3.2', dns)
        pieces = fragments(p, 1480, 2960)
        feed(c, POD2, [pieces[k] for k in order], [joined], connections=[connection('udp', (f.a2, 40000, f.vip2, 53))])
        q = packet(f.a1, f.a2, udp(5353, 40000), payload=long)
        pieces = fragments(q, 1480, 2960)
        feed(c, POD1, [pieces[k] for k in order], [out(POD2, q, src=f.vip2, sport=53, id=0x7777, frags={'range': [1, 9]})], 'the answer')
    c = Case('fragments-node-port-%s' % f.name, 'Through DNAT and masquerade, and the answer back', 'RFC 3022', dns)
    p = packet(f.out, f.node, udp(40000, 30053), payload=long)
    feed(c, UPLINK, fragments(p, 1480, 2960), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=5353, id={'any': True})])
    q = packet(f.a1, f.node, udp(5353, '$m'), payload=long)
    a, b, d = fragments(q, 1480, 2960)
    feed(c, POD1, [a, b, d], [out(UPLINK, q, src=f.node, dst=f.out, sport=30053, dport=40000, id={'any': True})])
    a, b, d = fragments(q, 1480, 2960, id=0x7778)
    feed(c, POD1, [b, d, a], [out(UPLINK, q, src=f.node, dst=f.out, sport=30053, dport=40000, id={'any': True})], 'in another order')
    c = Case('fragments-node-port-reversed-%s' % f.name, 'To a node port of this node, last fragment first', 'RFC 3022', dns)
    a, b, d = fragments(p, 1480, 2960)
    feed(c, UPLINK, [d, b, a], any_of=[[out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=5353, id={'any': True})]])
    c = Case('fragments-masquerade-%s' % f.name, 'Masqueraded: a long ping and UDP', 'RFC 3022', nat=True)
    p = packet(f.a1, f.out, echo(f), payload=long)
    e = out(UPLINK, p, src=f.node)
    e['packet'][f.icmp]['id'] = {'bind': 'i'}
    e['packet'].get('ip', {})['id'] = {'any': True}
    feed(c, POD1, fragments(p, 1480, 2960), [e])
    q = packet(f.out, f.node, echo(f, ident='$i', reply=True), payload=long)
    e = out(POD1, q, dst=f.a1)
    e['packet'][f.icmp]['id'] = 77
    e['packet'].get('ip', {})['id'] = {'any': True}
    a, b, d = fragments(q, 1480, 2960)
    feed(c, UPLINK, [a, b, d], [e], 'the reply')
    a, b, d = fragments(q, 1480, 2960, id=0x4444)
    feed(c, UPLINK, [b, d, a], [e], 'the reply, out of order')
    c = Case('fragments-two-senders-%s' % f.name, 'Two pods, one identification, one destination: nothing is mixed', 'RFC 3022 4.3; RFC 6864 5.3.1', nat=True)
    p1, p2 = packet(f.a1, f.b1, udp(40000, 53), payload={'len': 2000}), packet(f.a2, f.b1, udp(40001, 53), payload={'len': 2000})
    x, y = fragments(p1, 1480), fragments(p2, 1480)
    c.step([(POD1, x[0]), (POD2, y[0]), (POD1, x[1]), (POD2, y[1])],
           [out(UPLINK, p1, id=0x7777, frags={'range': [1, 4]}), out(UPLINK, p2, id=0x7777, frags={'range': [1, 4]})], reassemble=True)


@both
def refused(f):
    c = Case('fragments-policy-%s' % f.name, 'Policy judges the first; the later ones of a denied packet go nowhere', 'POLICY 10',
             policy('deny', 'a1', ['Ingress'], [{'ports': [{'protocol': 'UDP', 'port': 53}]}]))
    p = packet(f.a2, f.a1, udp(40000, 54), payload={'len': 2000})
    a, b = fragments(p, 1480)
    c.step([(POD2, a), (POD2, b)], [], 'denied', after=0.1)
    a, b = fragments(p, 1480, id=0x100)
    c.step([(POD2, b), (POD2, a)], [], 'denied, reversed', after=0.1)
    p = packet(f.a2, f.a1, udp(40000, 53), payload={'len': 2000})
    a, b = fragments(p, 1480, id=0x101)
    c.step([(POD2, b), (POD2, a)], [out(POD1, p, id=0x101, frags={'range': [1, 3]})], 'allowed', reassemble=True)
    c = Case('fragments-spoofed-%s' % f.name, 'A later fragment cannot come from another device', 'DESIGN 2')
    p = packet(f.a1, f.b1, udp(40000, 53), payload={'len': 2000})
    a, b = fragments(p, 1480)
    c.step((POD1, a), [pattern(UPLINK, {'ip6' if f.six else 'ip': {'src': f.a1, 'mf': True}})])
    c.step((POD2, b), [], 'from another pod')
    c.step((UPLINK, b), [], 'from outside')
    c = Case('fragments-overlap-%s' % f.name, 'An overlapping fragment never comes out joined', 'RFC 5722; RFC 1858',
             service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a2, f.vip2, udp(40000, 53), payload={'len': 3000})
    a, b, d = fragments(p, 1480, 2960)
    evil = packet(f.a2, f.vip2, udp(40000, 53), payload={'len': 3000})
    evil = fragments(evil, 1480, 2960)[1]
    evil['frag'] = {**evil['frag'], 'from': 1400, 'fill': 0x41}
    clean = {'device': POD1, 'packet': {'udp': {'dport': 5353}}}
    c.step([(POD2, a), (POD2, evil), (POD2, b), (POD2, d)], [], 'between the others', quiet=True,
           any_of=[[pattern(POD1, {}, True)] * 4], allow_bad=True)
    okay = packet(f.a2, f.vip2, udp(40000, 53), payload='fine')
    c.step((POD2, okay), [out(POD1, okay, dst=f.a1, dport=5353)], 'others pass')
    c = Case('fragments-late-%s' % f.name, 'What waits for its first fragment does not wait for ever', 'DESIGN (fragments)')
    p = packet(f.a2, f.a1, udp(40000, 53), payload={'len': 2000})
    a, b = fragments(p, 1480)
    c.step((POD2, b), [], 'later one first', quiet=True)
    okay = packet(f.a2, f.a1, udp(40000, 53), payload='fine')
    c.step((POD2, okay), [out(POD1, okay)], 'a minute later', after=60)
    c.step((POD2, a), any_of=[[pattern(POD1, {})], []], note='the first, far too late', reassemble=False)
    if not f.six:
        c = Case('fragments-tiny', 'TCP: a first fragment without the flags, and one at offset 8', 'RFC 1858; RFC 3128')
        p = packet(f.a2, f.a1, tcp(40000, 80), payload={'len': 100})
        a, b = fragments(p, 8)
        c.step((POD2, a), [], 'eight bytes of TCP')
        c.step((POD2, b), [], 'the rest')
        a, b = fragments(p, 24, id=5)
        b['frag']['from'] = 8
        c.step([(POD2, a)], [pattern(POD1, {'tcp': {'dport': 80}})], 'a whole header is enough')
        c.step([(POD2, b)], [], 'but never overwritten')
        c = Case('fragments-ping-of-death', 'Past 65535 bytes', 'RFC 791')
        a = packet(f.a2, f.a1, echo(f), payload={'len': 100})
        a['ip']['frag'] = 65528
        c.step((POD2, a), [], 'offset 65528 with 108 bytes')
        okay = packet(f.a2, f.a1, udp(40000, 53), payload='fine')
        c.step((POD2, okay), [out(POD1, okay)])
        c = Case('fragments-df', 'DF in a fragment that fits is kept', 'RFC 6864', mtu={POD1: 1400})
        p = packet(f.a2, f.a1, udp(40000, 53), payload={'len': 2000}, df=True)
        a, b = fragments(p, 1200)
        c.step([(POD2, a), (POD2, b)], [out(POD1, p, id=0x7777, df=None, frags=2)], reassemble=True)
        a, b = fragments(p, 1480, id=0x7778)
        c.step([(POD2, a)], [icmp_error(POD2, f, f.node, f.a2, (3, 4), quote(f.a2, f.a1), 1400)], 'one that does not fit: the MTU')
    else:
        c = Case('fragments-atomic-v6', 'An atomic fragment is a whole packet', 'RFC 6946', service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP'))
        p = packet(f.a2, f.vip2, udp(40000, 53), payload='atomic')
        a = fragments(p)[0]
        c.step((POD2, a), [out(POD1, p, dst=f.a1, dport=5353)], reassemble=True)
        c = Case('extension-headers-v6', 'Hop-by-hop and destination options in front of what is translated', 'RFC 8200 4',
                 service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP'))
        p = packet(f.a2, f.vip2, udp(40000, 53), payload='options', ext=[[60, '00010400000000']])
        c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=5353)], 'destination options')
        p = packet(f.a2, f.vip2, udp(40000, 53), payload='options', ext=[[0, '00010400000000']])
        c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=5353)], 'hop-by-hop options')
        p = packet(f.a2, f.a1, udp(40000, 53), payload='routed', ext=[[43, '00000000000000']])
        c.step((POD2, p), any_of=[[], [out(POD1, p)]], note='a type 0 routing header with no segments left')
        p = packet(f.a2, f.a1, udp(40000, 53), payload='cut', ext=[[60, 'ff010400000000']])
        c.step((POD2, p), [], 'an extension header longer than the packet')


def to_the_node():
    f = V4
    for f in (V4, V6):
        c = Case('fragments-to-the-node-%s' % f.name, "Fragments for the node itself are its kernel's", 'DESIGN (XDP)')
        p = packet(f.out, f.node, udp(4000, 4001), payload={'len': 2000})
        a, b = fragments(p, 1480)
        c.step([(UPLINK, a), (UPLINK, b)], [pattern(HOST, {}), pattern(HOST, {})], 'in order')
        a, b = fragments(p, 1480, id=77)
        c.step([(UPLINK, b), (UPLINK, a)], [pattern(HOST, {}), pattern(HOST, {})], 'reversed')
        c = Case('fragments-tcp-service-%s' % f.name, 'TCP in fragments, through a service: window and states follow',
                 'netfilter', service(f, 'web', [f.a1]))
        p = packet(f.a2, f.vip, tcp(40000, 80))
        c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=8080)])
        p = packet(f.a1, f.a2, tcp(8080, 40000, 'SA', 5000, 1001))
        c.step((POD1, p), [out(POD2, p, src=f.vip, sport=80)])
        p = packet(f.a2, f.vip, tcp(40000, 80, 'PA', 1001, 5001), payload={'len': 2000})
        c.step([(POD2, x) for x in fragments(p, 1000)], [out(POD1, p, dst=f.a1, dport=8080, id=0x7777, frags={'range': [1, 3]})], reassemble=True)
        p = packet(f.a1, f.a2, tcp(8080, 40000, 'A', 5001, 3001))
        c.step((POD1, p), [out(POD2, p, src=f.vip, sport=80)], 'all of it is acknowledged')


to_the_node()
