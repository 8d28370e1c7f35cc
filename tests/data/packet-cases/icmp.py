"""ICMP errors that pass, and those that weir makes: TTL and hop limit, path MTU, translation of what they quote (RFC 5508, 1812, 4443)."""
from world import *

WEB = {'port': 80, 'target': 8080}


@both
def errors_through_dnat(f):
    c = Case('icmp-from-backend-%s' % f.name, 'Errors about a request, from the backend and from a router on the way, in whole and cut quotes',
             'RFC 5508 REQ-4, 5', service(f, 'web', [f.b1]), service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip, tcp(40000, 80, 'S', 1000))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080, save='wire')])
    inner = quote(f.a1, f.vip, {'tcp': {'sport': 40000, 'dport': 80, 'seq': 1000}})
    for note, kind, mtu in (('time exceeded', f.time_exceeded, 0), ('too big', f.too_big, 1400), ('administratively prohibited', (1, 1) if f.six else (3, 13), 0)):
        e = packet(f.gateway, f.a1, error(f, kind, {'saved': 'wire'}, mtu))
        c.step((UPLINK, e), [icmp_error(POD1, f, {'oneof': [f.vip, f.gateway]}, f.a1, kind, inner, mtu)], note + ', from a router',
               connections=[connection('tcp', (f.a1, 40000, f.vip, 80), None, 'unreplied', 'SYN_SENT')])
    e = packet(f.b1, f.a1, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((UPLINK, e), [icmp_error(POD1, f, f.vip, f.a1, f.port_unreachable, inner)], 'from the backend itself: the VIP')
    e = packet(f.b1, f.a1, error(f, f.port_unreachable, {'saved': 'wire'}, embed_len=f.header + 8))
    c.step((UPLINK, e), [icmp_error(POD1, f, f.vip, f.a1, f.port_unreachable, inner, embed_len=f.header + 8)], 'eight bytes quoted')
    e = packet(f.b1, f.a1, error(f, f.port_unreachable, {'saved': 'wire'}, embed_len=f.header + 3))
    c.step((UPLINK, e), [], 'three bytes: not even the ports')
    e = packet(f.b1, f.a1, error(f, f.port_unreachable, {'saved': 'wire'}, embed_len=f.header - 4))
    c.step((UPLINK, e), [], 'not even a header')
    e = packet(f.b1, f.a2, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((UPLINK, e), [], 'to another pod: never', forbid=[{'packet': {}}])
    e = packet(f.b1, f.a1, error(f, f.port_unreachable, packet(f.a1, f.b1, tcp(40009, 8080))))
    c.step((UPLINK, e), [], 'about an unknown connection', reason='UnrelatedIcmp')
    e = packet(f.b1, f.a1, error(f, f.port_unreachable, packet(f.a1, f.vip, tcp(40000, 80))))
    c.step((UPLINK, e), [], 'quoting what was never on the wire')

    c = Case('icmp-from-client-%s' % f.name, "A client's error about a reply reaches the backend and quotes what the backend sent", 'RFC 5508 REQ-4',
             service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='query')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)])
    p = packet(f.b1, f.a1, udp(5353, 40000), payload='answer')
    c.step((UPLINK, p), [out(POD1, p, src=f.vip2, sport=53, save='reply')])
    e = packet(f.a1, f.vip2, error(f, f.port_unreachable, {'saved': 'reply'}))
    c.step((POD1, e), [icmp_error(UPLINK, f, f.a1, f.b1, f.port_unreachable, quote(f.b1, f.a1, ports('udp', 5353, 40000)))])

    c = Case('icmp-through-node-port-%s' % f.name, 'Both directions of errors through DNAT and masquerade', 'RFC 5508 REQ-4, 5',
             service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP', 30053))
    p = packet(f.out, f.node, udp(40000, 30053), payload='query')
    c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.b1, sport=dict(MASQUERADE_PORT), dport=5353, save='wire')])
    e = packet(f.b1, f.node, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((UPLINK, e), [icmp_error(UPLINK, f, f.node, f.out, f.port_unreachable, quote(f.out, f.node, ports('udp', 40000, 30053)))],
           'the backend')
    e = packet(f.gateway, f.node, error(f, f.too_big, {'saved': 'wire'}, 1300))
    c.step((UPLINK, e), [icmp_error(UPLINK, f, {'oneof': [f.node, f.gateway]}, f.out, f.too_big,
                                    quote(f.out, f.node, ports('udp', 40000, 30053)), 1300)], 'a router on the way to the backend')
    p = packet(f.b1, f.node, udp(5353, '$m'), payload='answer')
    c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.out, sport=30053, dport=40000, save='reply')])
    e = packet(f.out, f.node, error(f, f.port_unreachable, {'saved': 'reply'}))
    c.step((UPLINK, e), [icmp_error(UPLINK, f, f.node, f.b1, f.port_unreachable, quote(f.b1, f.node, {'udp': {'sport': 5353, 'dport': '$m'}}))],
           'the client')
    e = packet(f.out2, f.node, error(f, f.time_exceeded, {'saved': 'reply'}))
    c.step((UPLINK, e), [icmp_error(UPLINK, f, {'oneof': [f.node, f.out2]}, f.b1, f.time_exceeded,
                                    quote(f.b1, f.node, {'udp': {'sport': 5353, 'dport': '$m'}}))], 'a router on the way to the client')

    c = Case('icmp-through-masquerade-%s' % f.name, 'Errors about masqueraded UDP, TCP and ping', 'RFC 5508 REQ-4', nat=True)
    for k, (proto, l4, inner) in enumerate((('udp', udp(40000, 53), ports('udp', 40000, 53)), ('tcp', tcp(40000, 80), ports('tcp', 40000, 80)),
                                            ('ping', echo(f), {f.icmp: {'type': f.echo, 'id': 77, 'seq': 1}}))):
        p = packet(f.a1, f.out, l4, payload=None if proto == 'tcp' else 'x')
        q = out(UPLINK, p, src=f.node, save='wire%d' % k)
        q['packet'][f.icmp if proto == 'ping' else proto].update({'id': {'any': True}} if proto == 'ping' else {'sport': {'any': True}})
        c.step((POD1, p), [q], proto)
        e = packet(f.out2, f.node, error(f, f.time_exceeded, {'saved': 'wire%d' % k}, embed_len=f.header + 8))
        c.step((UPLINK, e), [icmp_error(POD1, f, f.out2, f.a1, f.time_exceeded, quote(f.a1, f.out, inner), embed_len=f.header + 8)],
               'about ' + proto)
    e = packet(f.out2, f.node, error(f, f.time_exceeded, packet(f.node, f.out, udp(40999, 53))))
    c.step((UPLINK, e), [pattern(HOST, packet(f.out2, f.node, {f.icmp: {'type': f.time_exceeded[0]}}))],
           "about the node's own: its kernel's")
    e = packet(f.out2, f.node, error(f, f.time_exceeded, {'saved': 'wire0'}, chksum='bad'))
    c.step((UPLINK, e), any_of=[[], [pattern(POD1, {}, True)], [pattern(HOST, {}, True)]], note='a wrong checksum is never made right',
           allow_bad=True, forbid=[])


@both
def hops(f):
    c = Case('ttl-through-service-%s' % f.name, "Time exceeded quotes the packet as its sender sent it", 'DESIGN 10; RFC 1812 4.3.2; RFC 4443 3.3',
             service(f, 'web', [f.b1], node_port=30080))
    p = packet(f.a1, f.vip, tcp(40000, 80), ttl=1)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.time_exceeded, quote(f.a1, f.vip, ports('tcp', 40000, 80)))], 'first packet, to a VIP')
    p = packet(f.out, f.node, tcp(40000, 30080), ttl=1)
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.out, f.time_exceeded, quote(f.out, f.node, ports('tcp', 40000, 30080)))], 'to a node port')
    p = packet(f.a1, f.vip, tcp(40001, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], 'another connection')
    p = packet(f.b1, f.a1, tcp(8080, 40001, 'SA', 7, 1001), ttl=1)
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.b1, f.time_exceeded, quote(f.b1, f.a1, ports('tcp', 8080, 40001)))], 'a reply')
    p = packet(f.a1, f.vip, tcp(40001, 80, 'A', 1001, 8), ttl=2)
    c.step((POD1, p), any_of=[[out(UPLINK, p, dst=f.b1, dport=8080)], []], note='TTL 2 goes on with 1')
    p = packet(f.out, f.node, udp(1, 2), ttl=1, payload='x')
    c.step((UPLINK, p), [out(HOST, p)], 'to the node itself: not forwarded, no hop')
    p = packet(f.out, f.a1, udp(5, 6), ttl=1, payload='x')
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.out, f.time_exceeded, quote(f.out, f.a1, ports('udp', 5, 6)))], 'from outside to a pod')
    p = packet(f.a1, f.a2, udp(5, 6), ttl=1, payload='x')
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.time_exceeded, quote(f.a1, f.a2, ports('udp', 5, 6)))], 'from pod to pod')
    p = packet(f.a1, f.a2, udp(5, 6), ttl=0, payload='x')
    c.step((POD1, p), any_of=[[], [icmp_error(POD1, f, f.node, f.a1, f.time_exceeded, quote(f.a1, f.a2, ports('udp', 5, 6)))]], note='TTL 0')
    p = packet(f.a1, f.b1, error(f, f.time_exceeded, packet(f.b1, f.a1, udp(1, 2))), ttl=1)
    c.step((POD1, p), [], 'an error about an error: never')
    p = packet(f.a1, f.b1, udp(5, 6), payload={'len': 100}, ttl=1)
    first, last = fragments(p, 64)
    c.step((POD1, first), [icmp_error(POD1, f, f.node, f.a1, f.time_exceeded, quote(f.a1, f.b1))], 'a first fragment is answered')
    c.step((POD1, last), [], 'a later one is not')
    p = packet(f.a1, f.b1, tcp(40007, 81), ttl=1, payload={'len': 1000})
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.time_exceeded, quote(f.a1, f.b1, ports('tcp', 40007, 81)),
                                  embed_len={'range': [28, 1232 if f.six else 548]})], 'as much as fits into 576 or 1280 bytes')


@both
def path_mtu(f):
    size = 1500 - f.header - 8
    c = Case('mtu-through-node-port-%s' % f.name, 'Too big behind DNAT and masquerade: the client learns it about its own packet', 'RFC 1191; RFC 8201',
             service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP', 30053), mtu={POD1: 1400})
    p = packet(f.out, f.node, udp(40000, 30053), payload={'len': size}, df=True)
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.out, f.too_big, quote(f.out, f.node, ports('udp', 40000, 30053)), 1400)])
    p = packet(f.out, f.node, udp(40000, 30053), payload={'len': size - 100}, df=True)
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=5353)], 'this one fits')
    c = Case('mtu-of-reply-%s' % f.name, 'A reply too big for the way back: the backend learns it about its own packet', 'RFC 1191; RFC 8201',
             service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP'), mtu={POD2: 1400})
    p = packet(f.a2, f.vip2, udp(40000, 53), payload='q')
    c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=5353)])
    p = packet(f.a1, f.a2, udp(5353, 40000), payload={'len': size}, df=True)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.too_big, quote(f.a1, f.a2, ports('udp', 5353, 40000)), 1400)])
    c = Case('mtu-masquerade-%s' % f.name, 'Too big for the uplink, masqueraded: quoted with the pod\'s address', 'RFC 1191; RFC 8201', nat=True,
             mtu={UPLINK: 1300})
    p = packet(f.a1, f.out, udp(40000, 53), payload={'len': size}, df=True)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.too_big, quote(f.a1, f.out, ports('udp', 40000, 53)), 1300)])
    p = packet(f.a1, f.out, echo(f), payload={'len': size}, df=True)
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, f.too_big, quote(f.a1, f.out, {f.icmp: {'type': f.echo, 'id': 77}}), 1300)], 'a ping')
    if not f.six:
        p = packet(f.a1, f.out, udp(40000, 53), payload={'len': size}, id=4321)
        c.step((POD1, p), [out(UPLINK, p, src=f.node, sport={'range': [1024, 65535]}, frags={'range': [2, 3]})],
               'without DF it is fragmented', reassemble=True)
        p = packet(f.a1, f.out, udp(40000, 53), payload={'len': size - 200}, id=4322)
        c.step((POD1, p), [out(UPLINK, p, src=f.node, sport={'range': [1024, 65535]}, frags=1)], 'just fits', reassemble=True)


def fragmented_by_the_router():
    f = V4
    c = Case('fragment-on-the-way-out', 'Without DF: fragments of the next MTU, options and DF clear, joined they are the packet', 'RFC 791 3.2',
             mtu={POD1: 576})
    p = packet(f.out, f.a1, udp(40000, 53), payload={'len': 1472}, id=999)
    c.step((UPLINK, p), [out(POD1, p, frags={'range': [3, 4]})], reassemble=True)
    first, second = fragments(p, 1000)
    c.step([(UPLINK, first), (UPLINK, second)], [out(POD1, p, id=0x7777, frags={'range': [3, 6]})], 'fragments are fragmented further', reassemble=True)
    p = packet(f.out, f.a1, udp(40000, 53), payload={'len': 1472}, df=True)
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.out, (3, 4), quote(f.out, f.a1, ports('udp', 40000, 53)), 576)])


fragmented_by_the_router()
