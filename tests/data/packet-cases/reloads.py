"""More of what a reload changes: pods, pools, routes, traffic policies; and what it must leave alone (DESIGN, stamps; POLICY 9)."""
from world import *
from tunnel import encapsulated


@both
def forwarding(f):
    p, q = packet(f.a1, f.b1, udp(1, 2), payload='x'), packet(f.b1, f.a1, udp(2, 1), payload='y')
    if not f.six:
        c = Case('reload-pool-mode', 'A pool becomes tunnelled: established flows follow at their next packet', 'DESIGN (forwarding apart from policy)')
        c.reload(10, cluster=nodes() + pools('Always') + pods())
        c.step((POD1, p), [out(UPLINK, p)])
        c.step((UPLINK, q), [out(POD1, q)])
        c.step((POD1, p), [encapsulated(p, f.node_b)], 'after', at=11)
    c = Case('reload-neighbour-%s' % f.name, 'Another MAC address of a next hop', 'DESIGN (forwarding apart from policy)')
    other = [{**n, 'mac': '02:00:00:00:00:99'} if n['address'] == f.node_b else n for n in c.router['neighbors']]
    c.reload(10, router_with={'neighbors': other})
    c.step((POD1, p), [out(UPLINK, p)])
    c.step((POD1, p), [out(UPLINK, p, via='02:00:00:00:00:99')], at=11)
    c = Case('reload-pod-moves-%s' % f.name, 'A pod moves to this node: its address is reached here', 'DESIGN (who owns)')
    moved = json.loads(json.dumps(c.base))
    for m in moved:
        if m['kind'] == 'Pod' and m['metadata']['name'] == 'a2':
            m['spec']['nodeName'] = 'node-b'
    c.reload(10, cluster=moved)
    r = packet(f.a1, f.a2, udp(1, 2), payload='x')
    c.step((POD1, r), [out(POD2, r)], 'here')
    c.step((POD1, r), [out(UPLINK, r, via=NODE_B_MAC)], 'there', at=11)
    c.step((POD2, packet(f.a2, f.a1, udp(2, 1), payload='y')), [], 'who still sends here as it spoofs')
    c = Case('reload-nat-outgoing-%s' % f.name, 'natOutgoing is for new connections: an established one keeps its addresses', 'DESIGN (decide once per flow)')
    c.reload(10, cluster=nodes() + pools(nat=True) + pods())
    r = packet(f.a1, f.out, tcp(40000, 443))
    s = packet(f.out, f.a1, tcp(443, 40000, 'SA', 9, 1001))
    c.step((POD1, r), [out(UPLINK, r)])
    c.step((UPLINK, s), [out(POD1, s)])
    r = packet(f.a1, f.out, tcp(40000, 443, 'A', 1001, 10))
    c.step((POD1, r), [out(UPLINK, r)], 'the old one', at=11)
    r = packet(f.a1, f.out, tcp(40001, 443))
    c.step((POD1, r), [out(UPLINK, r, src=f.node, sport=dict(MASQUERADE_PORT))], 'a new one')


@both
def services(f):
    c = Case('reload-node-port-gone-%s' % f.name, "A node port that is given back is the node's own", 'SERVICES 22',
             service(f, 'web', [f.a1], node_port=30080)).reload(10, service(f, 'web', [f.a1]))
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080)])
    p = packet(f.out2, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(HOST, p)], 'another client', at=11)
    c = Case('reload-backends-grow-%s' % f.name, 'A backend more: established flows stay where they are, UDP too', 'DESIGN (stamps)',
             service(f, 'dns', [f.a2], f.vip2, 53, 5353, 'UDP')).reload(10, service(f, 'dns', [f.a2, f.b1, f.b2], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='q')
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=5353)])
    q = packet(f.a2, f.a1, udp(5353, 40000), payload='a')
    c.step((POD2, q), [out(POD1, q, src=f.vip2, sport=53)])
    for k in range(3):
        c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=5353)], 'stays', at=11 + k)
    c.step((POD2, q), [out(POD1, q, src=f.vip2, sport=53)], 'and its reply')
    c = Case('reload-backend-gone-reply-%s' % f.name, 'What a backend that is gone still answers', 'DESIGN (UDP flows follow their service)',
             service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP')).reload(10, service(f, 'dns', [f.a2], f.vip2, 53, 5353, 'UDP'))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)])
    q = packet(f.b1, f.a1, udp(5353, 40000), payload='late')
    wrong = {'device': POD1, 'packet': {'ip6' if f.six else 'ip': {'src': f.b1}}}
    c.step((UPLINK, q), any_of=[[out(POD1, q, src=f.vip2, sport=53)], []], note='from the VIP or not at all', at=11, forbid=[wrong])
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=5353)], 'the next request')
    c = Case('reload-udp-unready-%s' % f.name, 'UDP leaves a backend that is not ready any more', 'DESIGN (UDP flows follow their service)',
             service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP')).reload(10, service(f, 'dns', [(f.b1, UNREADY), f.a2], f.vip2, 53, 5353, 'UDP'))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)])
    c.step((POD1, p), any_of=[[out(POD2, p, dst=f.a2, dport=5353)], [out(UPLINK, p, dst=f.b1, dport=5353)]], note='kube-proxy clears such flows', at=11)
    c = Case('reload-fragments-%s' % f.name, 'A policy comes between two fragments: the packet is not completed', 'DESIGN (fragments)').reload(
        10, policy('deny', 'a1', ['Ingress'], []))
    p = packet(f.a2, f.a1, udp(40000, 53), payload={'len': 2000})
    a, b = fragments(p, 1480)
    c.step((POD2, a), [pattern(POD1, {})])
    c.step((POD2, b), [pattern(POD1, {})], 'the rest')
    a, b = fragments(p, 1480, id=9)
    c.step((POD2, a), [pattern(POD1, {})], at=10)
    c.step((POD2, b), [], 'the rest, denied', at=10.02, reason='Policy')


@both
def policies(f):
    def labelled(app):
        cluster = json.loads(json.dumps(nodes() + pools() + pods()))
        for m in cluster:
            if m['kind'] == 'Pod' and m['metadata']['name'] == 'a2':
                m['metadata']['labels']['app'] = app
        return cluster + [policy('p', 'a1', ['Ingress'], [{'from': [{'podSelector': {'matchLabels': {'app': 'a2'}}}]}])]
    c = Case('reload-peer-label-%s' % f.name, "A peer's label goes: its connections are cut, and come back with it", 'POLICY 9')
    c.cluster = labelled('a2')
    c.reload(10, cluster=labelled('other')).reload(20, cluster=labelled('a2'))
    p, q = packet(f.a2, f.a1, udp(1, 2), payload='x'), packet(f.a1, f.a2, udp(2, 1), payload='y')
    c.step((POD2, p), [out(POD1, p)])
    c.step((POD1, q), [out(POD2, q)])
    c.step((POD2, p), [], 'cut', at=11, reason='PolicyDeniedIngress')
    c.step((POD1, q), [], 'and its replies')
    c.step((POD2, p), [out(POD1, p)], 'allowed again', at=21)
    c = Case('reload-egress-%s' % f.name, 'Egress of the source is judged again, with the backend after DNAT', 'POLICY 2, 11', service(f, 'web', [f.b1])).reload(
        10, service(f, 'web', [f.b1]), policy('p', 'a1', ['Egress'], egress=[{'to': [{'ipBlock': {'cidr': f.vip + ('/128' if f.six else '/32')}}]}]))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    q = packet(f.b1, f.a1, tcp(8080, 40000, 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q, src=f.vip, sport=80)])
    p = packet(f.a1, f.vip, tcp(40000, 80, 'A', 1001, 5001))
    c.step((POD1, p), [], 'the address of the frontend does not help', at=11, reason='PolicyDeniedEgress')
    c.step((UPLINK, packet(f.b1, f.a1, tcp(8080, 40000, 'PA', 5001, 1001), payload='x')), [], 'nor do replies pass')


@both
def more_errors(f):
    c = Case('icmp-other-errors-%s' % f.name, 'Parameter problem, source quench; a redirect goes nowhere', 'RFC 5508; RFC 1812 5.2.7.2',
             service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='q')
    e = out(UPLINK, p, dst=f.b1, dport=5353)
    e['packet']['save'] = 'wire'
    c.step((POD1, p), [e])
    inner = quote(f.a1, f.vip2, ports('udp', 40000, 53))
    kinds = [(4, 0)] if f.six else [(12, 0), (4, 0)]
    for kind in kinds:
        q = packet(f.gateway, f.a1, error(f, kind, {'saved': 'wire'}))
        c.step((UPLINK, q), any_of=[[icmp_error(POD1, f, {'oneof': [f.gateway, f.vip2]}, f.a1, kind, inner)], []] if kind == (4, 0) and not f.six else
               [[icmp_error(POD1, f, {'oneof': [f.gateway, f.vip2]}, f.a1, kind, inner)]], note='type %d' % kind[0])
    if not f.six:
        q = packet(f.gateway, f.a1, error(f, (5, 1), {'saved': 'wire'}))
        c.step((UPLINK, q), [], 'a redirect')
    c = Case('icmp-error-from-pod-%s' % f.name, "A local backend's error towards a client outside; a pod tells nothing about others' packets", 'RFC 5508',
             service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP', 30053))
    p = packet(f.out, f.node, udp(40000, 30053), payload='q')
    e = out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=5353)
    e['packet']['save'] = 'wire'
    c.step((UPLINK, p), [e])
    q = packet(f.a2, f.node, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((POD2, q), [], "from a pod that it was not for", forbid=[{'device': UPLINK, 'packet': {}}])
    q = packet(f.a1, f.node, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((POD1, q), [icmp_error(UPLINK, f, f.node, f.out, f.port_unreachable, quote(f.out, f.node, ports('udp', 40000, 30053)))], 'from the right one')
    p = packet(f.out, f.a2, udp(7, 8), payload='x')
    e = out(POD2, p)
    e['packet']['save'] = 'plain'
    c.step((UPLINK, p), [e], 'without a service')
    q = packet(f.a2, f.out, error(f, f.port_unreachable, {'saved': 'plain'}))
    c.step((POD2, q), [icmp_error(UPLINK, f, f.a2, f.out, f.port_unreachable, quote(f.out, f.a2, ports('udp', 7, 8)))])


@both
def faulty_objects(f):
    good = policy('p', 'a1', ['Ingress'], [{'ports': [{'protocol': 'UDP', 'port': 53}]}])
    bad = policy('p', 'a1', ['Ingress'], [{'ports': [{'protocol': 'UDPX', 'port': 54}]}])
    new = policy('q', 'a2', ['Ingress'], [{'from': [{'ipBlock': {'cidr': 'nonsense'}}]}])
    c = Case('reload-faulty-object-%s' % f.name, 'A faulty object keeps its last good version, a new one denies what it selects; the rest proceeds', 'DESIGN (fail closed)',
             good).reload(10, bad, new, service(f, 'web', [f.b1]))
    allowed, denied = packet(f.out, f.a1, udp(1, 53), payload='x'), packet(f.out, f.a1, udp(1, 54), payload='x')
    other = packet(f.a1, f.a2, udp(1, 53), payload='x')
    c.step((UPLINK, allowed), [out(POD1, allowed)])
    c.step((UPLINK, denied), [])
    c.step((POD1, other), [out(POD2, other)], 'no policy yet')
    c.step((UPLINK, allowed), [out(POD1, allowed)], 'the last good version', at=11)
    c.step((UPLINK, denied), [])
    other = packet(f.a1, f.a2, udp(2, 53), payload='x')
    c.step((POD1, other), [], 'the new faulty one', reason='PolicyDeniedIngress')
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], 'the service is there')


@both
def roll_outs(f):
    script = [(True, 'S', 1000, 0), (False, 'SA', 5000, 1001), (True, 'A', 1001, 5001), (True, 'FA', 1001, 5001), (False, 'FA', 5001, 1002),
              (True, 'A', 1002, 5002)]
    aborted = script[:3] + [(True, 'R', 1001, 0)]
    states = [('unanswered', 'SYN_SENT', script[:1]), ('half-open', 'SYN_RECV', script[:2]), ('established', 'ESTABLISHED', script[:3]),
              ('closing', 'FIN_WAIT', script[:4]), ('last-ack', 'LAST_ACK', script[:5]), ('time-wait', 'TIME_WAIT', script),
              ('close', 'CLOSE', aborted)]
    for name, state, segments in states:
        for again, seq in (('newer', 900000), ('same', 1000)):
            c = Case('reload-syn-%s-%s-%s' % (name, again, f.name), 'A SYN on a connection in %s whose backend is gone opens anew' % state,
                     'SERVICES 27b; DESIGN (opens anew)', service(f, 'web', [f.b1])).reload(5, service(f, 'web', [f.a2]))
            for forth, flags, at, ack in segments:
                if forth:
                    p = packet(f.a1, f.vip, tcp(40000, 80, flags, at, ack))
                    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
                else:
                    p = packet(f.b1, f.a1, tcp(8080, 40000, flags, at, ack))
                    c.step((UPLINK, p), [out(POD1, p, src=f.vip, sport=80)])
            p = packet(f.a1, f.vip, tcp(40000, 80, 'S', seq))
            new = connection('tcp', (f.a1, 40000, f.vip, 80), (f.a2, 8080, f.a1, 40000), 'unreplied', 'SYN_SENT')
            c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)], 'to a backend of now', at=5.5, connections=[new])
            late = packet(f.b1, f.a1, tcp(8080, 40000, 'FA', 5001, 1002))
            c.step((UPLINK, late), [], 'what the old one still sends is nobody\'s', connections=[new])
            p = packet(f.a2, f.a1, tcp(8080, 40000, 'SA', 7000, seq + 1))
            c.step((POD2, p), [out(POD1, p, src=f.vip, sport=80)])
            p = packet(f.a1, f.vip, tcp(40000, 80, 'A', seq + 1, 7001))
            c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)], 'established', connections=[
                connection('tcp', (f.a1, 40000, f.vip, 80), (f.a2, 8080, f.a1, 40000), 'established', 'ESTABLISHED')])
    c = Case('reload-syn-node-port-%s' % f.name, 'The same by a node port, masqueraded', 'SERVICES 27b', service(f, 'web', [f.b1], node_port=30080)) \
        .reload(10, service(f, 'web', [f.a1], node_port=30080))
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.b1, sport=dict(MASQUERADE_PORT), dport=8080)])
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport={'range': [1024, 65535]}, dport=8080)], 'sent again', at=11)
    c = Case('reload-syn-emptied-%s' % f.name, 'A SYN sent again to a service without backends is refused', 'SERVICES 11, 27b', service(f, 'web', [f.b1])) \
        .reload(10, service(f, 'web', []))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    c.step((POD1, p), [reset(POD1, f.vip, f.a1, 80, 40000, ack=1001)], at=11, connections=[], reason='NoBackend')
    c = Case('reload-syn-service-appears-%s' % f.name, 'A SYN sent again where a service appeared', 'SERVICES 27b', router_with={'serviceCIDRs': []}) \
        .reload(10, service(f, 'web', [f.b1]))
    c.step((POD1, p), [out(UPLINK, p)], 'just an address')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], 'now a service', at=10.5)
    c = Case('reload-syn-policy-%s' % f.name, 'A policy denies the old backend, and the service has another that it does not', 'SERVICES 27b; POLICY 9',
             service(f, 'web', [f.a2])).reload(10, service(f, 'web', [(f.a2, TERMINATING), f.b1]), policy('deny', 'a2', ['Ingress'], []))
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)])
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], 'sent again', at=11)
    c = Case('reload-frontend-gone-%s' % f.name, 'TCP goes on where only the frontend is gone that it came by', 'DESIGN (in any slice)',
             service(f, 'web', [f.a1], node_port=30080)).reload(10, service(f, 'web', [f.a1]))
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080)])
    q = packet(f.a1, f.node, tcp(8080, '$m', 'SA', 5000, 1001))
    c.step((POD1, q), [out(UPLINK, q, src=f.node, dst=f.out, sport=30080, dport=40000)])
    p = packet(f.out, f.node, tcp(40000, 30080, 'A', 1001, 5001))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport='$m', dport=8080)], 'goes on', at=11)
    p = packet(f.out2, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(HOST, p)], 'a new one does not')
    c = Case('reload-slices-left-%s' % f.name, 'The service is deleted and its slices are not yet: TCP goes on, a SYN on what is over does not',
             'DESIGN (in any slice)', service(f, 'web', [f.b1])).reload(10, slice_of(f, 'web', [f.b1]))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    q = packet(f.b1, f.a1, tcp(8080, 40000, 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q, src=f.vip, sport=80)])
    p = packet(f.a1, f.vip, tcp(40000, 80, 'A', 1001, 5001))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], 'goes on', at=11)
    p = packet(f.a1, f.vip, tcp(40000, 80, 'R', 1001))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], 'is over')
    c.step((POD1, packet(f.a1, f.vip, tcp(40000, 80, 'S', 900000))), [], 'nothing is there to open', connections=[], reason='UnallocatedServiceIp')
