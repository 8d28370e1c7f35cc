"""NetworkPolicy as packets show it: after DNAT, before SNAT; replies and related errors; other protocols (POLICY.md)."""
from world import *


def ingress_from(cidr, *ports_):
    return {'from': [{'ipBlock': {'cidr': cidr}}], **({'ports': [{'protocol': p, 'port': n} for p, n in ports_]} if ports_ else {})}


@both
def judged(f):
    host = '/128' if f.six else '/32'
    everything = '::/0' if f.six else '0.0.0.0/0'
    c = Case('policy-after-dnat-%s' % f.name, 'Policy sees the backend\'s port, not the frontend\'s', 'POLICY 11',
             service(f, 'web', [f.a1]), service(f, 'two', [f.a1], f.vip2, 8080, 80), policy('p', 'a1', ['Ingress'], [{'ports': [{'port': 8080}]}]))
    p = packet(f.a2, f.vip, tcp(40000, 80))
    c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=8080)], '80 is translated to 8080')
    p = packet(f.a2, f.vip2, tcp(40000, 8080))
    c.step((POD2, p), [], '8080 to 80', reason='PolicyDeniedIngress')
    c = Case('policy-before-snat-%s' % f.name, 'Policy sees the client, not the masquerade address', 'POLICY 11; DESIGN 7',
             service(f, 'web', [f.a1], node_port=30080), policy('p', 'a1', ['Ingress'], [ingress_from(f.out + host)]))
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080)], 'the allowed client')
    p = packet(f.out2, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [], 'another', reason='PolicyDeniedIngress', connections={'count': 1})
    c = Case('policy-egress-%s' % f.name, 'Egress to a service is judged by its backend', 'POLICY 2, 11', service(f, 'web', [f.b1]), service(f, 'two', [f.b2], f.vip2),
             policy('p', 'a1', ['Egress'], egress=[{'to': [{'podSelector': {'matchLabels': {'app': 'b1'}}}]}]))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    p = packet(f.a1, f.vip2, tcp(40000, 80))
    c.step((POD1, p), [], reason='PolicyDeniedEgress')
    p = packet(f.a1, f.b1, echo(f), payload='x')
    c.step((POD1, p), [out(UPLINK, p)], 'any protocol')
    p = packet(f.a1, f.node, tcp(40000, 22))
    c.step((POD1, p), [], 'not to the node either')
    c = Case('policy-related-%s' % f.name, 'Errors about an allowed connection pass an isolated pod; pings do not', 'POLICY 10',
             policy('p', 'a1', ['Ingress', 'Egress'], [], [{'to': [{'ipBlock': {'cidr': f.b1 + host}}]}]))
    p = packet(f.a1, f.b1, udp(40000, 53), payload='q')
    e = out(UPLINK, p)
    e['packet']['save'] = 'wire'
    c.step((POD1, p), [e])
    q = packet(f.gateway, f.a1, error(f, f.time_exceeded, {'saved': 'wire'}))
    c.step((UPLINK, q), [icmp_error(POD1, f, f.gateway, f.a1, f.time_exceeded, quote(f.a1, f.b1, ports('udp', 40000, 53)))])
    q = packet(f.b1, f.a1, echo(f), payload='x')
    c.step((UPLINK, q), [], 'a ping opens a connection')
    q = packet(f.node, f.a1, tcp(40000, 8080))
    c.step((HOST, q), [out(POD1, q, **{'ttl': {'oneof': [63, 64]}})], "the node's own processes always reach its pods")
    q = packet(f.a1, f.node, tcp(8080, 40000, 'SA', 1, 1001))
    c.step((POD1, q), [out(HOST, q, ttl={'oneof': [63, 64]})], 'and get their replies')
    c = Case('policy-protocols-%s' % f.name, 'A port opens one protocol', 'POLICY 7', policy('p', 'a1', ['Ingress'], [{'ports': [{'protocol': 'UDP', 'port': 53}]}]))
    for l4, ok in ((udp(40000, 53), True), (tcp(40000, 53), False), (udp(40000, 54), False), (sctp(40000, 53), False), (echo(f), False)):
        p = packet(f.a2, f.a1, l4, payload='x' if 'udp' in l4 else None)
        c.step((POD2, p), [out(POD1, p)] if ok else [])
    c = Case('policy-except-%s' % f.name, 'ipBlock with except', 'POLICY 6',
             policy('p', 'a1', ['Ingress'], [{'from': [{'ipBlock': {'cidr': everything, 'except': [f.out2 + host, f.a2 + host]}}]}]))
    p = packet(f.out, f.a1, tcp(40000, 80))
    c.step((UPLINK, p), [out(POD1, p)])
    p = packet(f.out2, f.a1, tcp(40000, 80))
    c.step((UPLINK, p), [])
    p = packet(f.a2, f.a1, tcp(40000, 80))
    c.step((POD2, p), [])
    c = Case('policy-hairpin-%s' % f.name, 'A pod may always talk to itself, also through its service', 'POLICY (loopback)', service(f, 'web', [f.a1]),
             policy('p', 'a1', ['Ingress', 'Egress'], [], []))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080)])
    p = packet(f.a1, f.a2, tcp(40000, 80))
    c.step((POD1, p), [], 'but not to others')
    c = Case('policy-host-to-service-%s' % f.name, 'The node through a service to its own isolated pod', 'POLICY 12', service(f, 'web', [f.a1]), policy('p', 'a1', ['Ingress'], []))
    p = packet(f.node, f.vip, tcp(40000, 80))
    c.step((HOST, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080, ttl={'oneof': [63, 64]})])
    p = packet(f.node_b, f.a1, tcp(40000, 80))
    c.step((UPLINK, p), [], 'another node is no exception')


@both
def outgoing(f):
    c = Case('nat-outgoing-%s' % f.name, 'natOutgoing: out of the pools only', 'DESIGN 8; Calico natOutgoing', nat=True)
    p = packet(f.a1, f.out, tcp(40000, 443))
    c.step((POD1, p), [out(UPLINK, p, src=f.node, sport=dict(MASQUERADE_PORT))], 'out')
    q = packet(f.out, f.node, tcp(443, '$m', 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q, dst=f.a1, dport=40000)], 'and back')
    p = packet(f.a1, f.b1, tcp(40000, 443))
    c.step((POD1, p), [out(UPLINK, p)], 'a remote pod')
    p = packet(f.a1, f.a2, tcp(40000, 443))
    c.step((POD1, p), [out(POD2, p)], 'a local one')
    p = packet(f.a1, f.node, tcp(40000, 443))
    c.step((POD1, p), [out(HOST, p)], 'the node itself')
    p = packet(f.a1, f.node_b, tcp(40000, 443))
    c.step((POD1, p), [out(UPLINK, p, src=f.node, sport={'range': [1024, 65535]})], 'another node is outside the pools')
    p = packet(f.out, f.a1, tcp(40000, 443))
    c.step((UPLINK, p), [out(POD1, p)], 'from outside to a pod')
    p = packet(f.a1, f.out, tcp(443, 40000, 'SA', 1, 1001))
    c.step((POD1, p), [out(UPLINK, p)], 'its replies keep their source')
    p = packet(f.a1, f.out, sctp(40000, 3868, itag=7))
    c.step((POD1, p), [out(UPLINK, p, src=f.node, sport={'range': [1024, 65535]})], 'SCTP')
    p = packet(f.a1, f.out, payload='raw protocol', **({'nh': 47} if f.six else {'proto': 47}))
    q = out(UPLINK, p, src=f.node)
    c.step((POD1, p), [q], 'GRE')
    q = packet(f.out, f.node, payload='raw reply', **({'nh': 47} if f.six else {'proto': 47}))
    c.step((UPLINK, q), [out(POD1, q, dst=f.a1)], 'its answer')
    c = Case('snat-exhausted-%s' % f.name, 'No port left, and all in use: dropped, never sent untranslated', 'DESIGN 8', nat=True,
             router_with={'snat': {'portRange': '20000-20001'}})
    for k, sport in enumerate((20000, 20001)):
        p = packet(f.a1, f.out, tcp(sport, 443))
        c.step((POD1, p), [out(UPLINK, p, src=f.node, sport={'bind': 'm%d' % k, 'range': [1024, 65535]})])
        q = packet(f.out, f.node, tcp(443, '$m%d' % k, 'SA', 5000, 1001))
        c.step((UPLINK, q), [out(POD1, q, dst=f.a1, dport=sport)])
        p = packet(f.a1, f.out, tcp(sport, 443, 'A', 1001, 5001))
        c.step((POD1, p), [out(UPLINK, p, src=f.node, sport='$m%d' % k)])
    for sport in (20000, 20001, 20002):
        p = packet(f.a2, f.out, tcp(sport, 443))
        c.step((POD2, p), [], reason='SnatExhausted')
    p = packet(f.a2, f.out2, tcp(20000, 443))
    c.step((POD2, p), [out(UPLINK, p, src=f.node, sport={'range': [1024, 65535]})], 'another destination has its own')
    c = Case('snat-displaced-%s' % f.name, 'A port that only an unanswered connection has goes to one that needs it', 'STYLE (table full)', nat=True,
             router_with={'snat': {'portRange': '20000-20001'}})
    for sport in (20000, 20001):
        p = packet(f.a1, f.out, udp(sport, 53), payload='x')
        c.step((POD1, p), [out(UPLINK, p, src=f.node, sport={'range': [20000, 20001]})])
    p = packet(f.a2, f.out, udp(20002, 53), payload='x')
    c.step((POD2, p), any_of=[[out(UPLINK, p, src=f.node, sport={'range': [20000, 20001]})], []])


@both
def table(f):
    c = Case('table-full-%s' % f.name, 'A full table evicts what was never answered; the established survives', 'STYLE (table full)',
             router_with={'conntrack': {'maxEntries': 16}})
    p = packet(f.a1, f.b1, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p)])
    q = packet(f.b1, f.a1, tcp(80, 40000, 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q)])
    p = packet(f.a1, f.b1, tcp(40000, 80, 'A', 1001, 5001))
    c.step((POD1, p), [out(UPLINK, p)])
    base = frame(POD1, packet(f.a1, f.b2, udp(1, 53), payload='x'))
    c.t = 0.2
    c.steps['steps'].append({'note': 'a hundred unanswered', 't': 0.2, 'device': POD1, 'bulk': {'packet': base, 'vary': [{'path': 'udp.sport', 'range': [41000, 41100]}]},
                             'expect': [], 'any_of': [[pattern(UPLINK, {}, True) for _ in range(100)]],
                             'conntrack': {'contains': [connection('tcp', (f.a1, 40000, f.b1, 80), None, 'established')]}})
    p = packet(f.a1, f.b1, tcp(40000, 80, 'PA', 1001, 5001), payload='x')
    c.step((POD1, p), [out(UPLINK, p)], 'still alive', at=1.0)
