"""Services: cluster IPs, node ports, external addresses; rejects; masquerade; who sees which backend (SERVICES.md)."""
from world import *


def conversation(c, f, client_device, client, frontend, port, backend_device, backend, target, masquerade=None, sport=40000, back_from=None):
    """A handshake, a request and an answer through a service; masquerade: the address that the backend sees."""
    seen, seen_port = (masquerade, '$m') if masquerade else (client, sport)
    bind = {'sport': dict(MASQUERADE_PORT)} if masquerade else {}
    first = {'src': seen, 'dst': backend, 'dport': target}
    p = packet(client, frontend, tcp(sport, port, 'S', 1000))
    c.step((client_device, p), [out(backend_device, p, **first, **bind)], 'SYN')
    q = packet(backend, seen, tcp(target, seen_port, 'SA', 5000, 1001))
    c.step((backend_device, q), [out(client_device, q, src=frontend, dst=client, sport=port, dport=sport)], 'SYN-ACK')
    first['sport'] = seen_port
    p = packet(client, frontend, tcp(sport, port, 'PA', 1001, 5001), payload='request')
    c.step((client_device, p), [out(backend_device, p, **first)], 'request')
    q = packet(backend, seen, tcp(target, seen_port, 'PA', 5001, 1008), payload='an odd answer')
    c.step((backend_device, q), [out(client_device, q, src=frontend, dst=client, sport=port, dport=sport)], 'answer',
           connections=[connection('tcp', (client, sport, frontend, port), (backend, target, seen, seen_port), 'established', 'ESTABLISHED')])
    return c


@both
def cluster_ip(f):
    c = Case('cluster-ip-local-%s' % f.name, 'Cluster IP, backend on this node', 'SERVICES 8', service(f, 'web', [f.a2]))
    conversation(c, f, POD1, f.a1, f.vip, 80, POD2, f.a2, 8080)
    c = Case('cluster-ip-hairpin-%s' % f.name, 'A pod behind its own service: masqueraded by a routable address of the node', 'SERVICES 16',
             service(f, 'web', [f.a1]))
    conversation(c, f, POD1, f.a1, f.vip, 80, POD1, f.a1, 8080, masquerade=f.node)
    c = Case('cluster-ip-from-outside-%s' % f.name, 'A source outside podCIDRs is masqueraded', 'SERVICES 13', service(f, 'web', [f.a1]))
    conversation(c, f, UPLINK, f.out, f.vip, 80, POD1, f.a1, 8080, masquerade=f.node)
    c = Case('cluster-ip-masquerade-all-%s' % f.name, 'masqueradeAll', 'SERVICES 13', service(f, 'web', [f.b1]),
             router_with={'masqueradeAll': True})
    conversation(c, f, POD1, f.a1, f.vip, 80, UPLINK, f.b1, 8080, masquerade=f.node)
    c = Case('cluster-ip-unknown-pod-cidrs-%s' % f.name, 'podCIDRs unknown: never masqueraded', 'SERVICES 13', service(f, 'web', [f.b1]),
             router_with={'podCIDRs': []})
    conversation(c, f, POD1, f.a1, f.vip, 80, UPLINK, f.b1, 8080)


@both
def cluster_ip_datagrams(f):
    c = Case('cluster-ip-udp-%s' % f.name, 'UDP there and back, odd lengths', 'SERVICES 8', service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='a')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)], connections=[connection('udp', (f.a1, 40000, f.vip2, 53), None, 'unreplied')])
    p = packet(f.b1, f.a1, udp(5353, 40000), payload='abc')
    c.step((UPLINK, p), [out(POD1, p, src=f.vip2, sport=53)], connections=[connection('udp', (f.a1, 40000, f.vip2, 53), None, 'established')])
    c = Case('cluster-ip-sctp-%s' % f.name, 'SCTP there and back: the CRC32c is right', 'SERVICES 27; RFC 9260 6.8',
             service(f, 'sig', [f.b1], f.vip2, 3868, 13868, 'SCTP'))
    p = packet(f.a1, f.vip2, sctp(40000, 3868, 'INIT', itag=0x0a0a0a0a))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=13868)])
    p = packet(f.b1, f.a1, sctp(13868, 40000, 'INIT_ACK', vtag=0x0a0a0a0a, itag=0x0b0b0b0b))
    c.step((UPLINK, p), [out(POD1, p, src=f.vip2, sport=3868)])
    p = packet(f.a1, f.vip2, sctp(40000, 3868, 'COOKIE_ECHO', vtag=0x0b0b0b0b))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=13868)])
    p = packet(f.b1, f.a1, sctp(13868, 40000, 'COOKIE_ACK', vtag=0x0a0a0a0a))
    c.step((UPLINK, p), [out(POD1, p, src=f.vip2, sport=3868)], connections=[connection('sctp', (f.a1, 40000, f.vip2, 3868), None, 'established')])
    c = Case('node-port-sctp-%s' % f.name, 'SCTP to a node port: both ports change', 'SERVICES 14, 27',
             service(f, 'sig', [f.b1], f.vip2, 3868, 13868, 'SCTP', 30868))
    p = packet(f.out, f.node, sctp(40000, 30868, 'INIT', itag=0x0a0a0a0a))
    c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.b1, sport=dict(MASQUERADE_PORT), dport=13868)])
    p = packet(f.b1, f.node, sctp(13868, '$m', 'INIT_ACK', vtag=0x0a0a0a0a, itag=0x0b0b0b0b))
    c.step((UPLINK, p), [out(UPLINK, p, src=f.node, dst=f.out, sport=30868, dport=40000)])


@both
def node_ports(f):
    web = service(f, 'web', [f.a1], node_port=30080)
    c = Case('node-port-local-backend-%s' % f.name, 'Node port from outside, backend on this node, policy Cluster: masqueraded', 'SERVICES 14', web)
    conversation(c, f, UPLINK, f.out, f.node, 30080, POD1, f.a1, 8080, masquerade=f.node)
    c = Case('node-port-from-pod-%s' % f.name, "A pod uses its own node's node port: masqueraded too", 'SERVICES 14', web)
    conversation(c, f, POD2, f.a2, f.node, 30080, POD1, f.a1, 8080, masquerade=f.node)
    c = Case('node-port-policy-local-%s' % f.name, 'externalTrafficPolicy Local: the backend sees the client', 'SERVICES 9, 15',
             service(f, 'web', [f.a1, f.b1], node_port=30080, externalTrafficPolicy='Local'))
    conversation(c, f, UPLINK, f.out, f.node, 30080, POD1, f.a1, 8080)
    c = Case('node-port-policy-local-none-here-%s' % f.name, 'No local backend: drop for outsiders, the short cut for pods', 'SERVICES 9, 12, 15',
             service(f, 'web', [f.b1], node_port=30080, externalTrafficPolicy='Local'))
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [], 'from outside', reason='NoLocalBackend')
    p = packet(f.a1, f.node, tcp(40000, 30080))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)], 'a pod is short-cut, not masqueraded')
    c = Case('node-port-addresses-%s' % f.name, 'nodePortAddresses without this address: the port is the node\'s own', 'SERVICES 22', web,
             router_with={'nodePortAddresses': ['172.16.0.0/12', 'fd00::/8']})
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(HOST, p)])
    c = Case('node-port-of-another-node-%s' % f.name, "Another node's node port is just an address", 'SERVICES 22', web)
    p = packet(f.a1, f.node_b, tcp(40000, 30080))
    c.step((POD1, p), [out(UPLINK, p)])
    p = packet(f.out, f.node, udp(40000, 30080), payload='another protocol')
    c.step((UPLINK, p), [out(HOST, p)])
    c = Case('node-port-same-client-port-%s' % f.name, 'Two clients with one port and one backend: two masquerade ports, each gets its own reply',
             'SERVICES 14', web)
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport={'bind': 'm1', 'range': [1024, 65535]}, dport=8080)])
    p = packet(f.out2, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport={'bind': 'm2', 'not': '$m1'}, dport=8080)])
    for client, m in ((f.out2, '$m2'), (f.out, '$m1')):
        p = packet(f.a1, f.node, tcp(8080, m, 'SA', 77, 1001))
        c.step((POD1, p), [out(UPLINK, p, src=f.node, dst=client, sport=30080, dport=40000)])
    c = Case('node-port-masquerade-port-is-reused-by-nobody-%s' % f.name, 'What comes to a masquerade port from elsewhere is not the connection\'s',
             'netfilter', web)
    p = packet(f.out, f.node, tcp(40000, 30080))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080)])
    p = packet(f.out2, f.node, tcp(8080, '$m', 'A', 1, 1))
    c.step((UPLINK, p), [], forbid=[{'device': POD1, 'packet': {}}], any_of=[[out(HOST, p)], []])


@both
def external_addresses(f):
    def external(**spec):
        return service(f, 'web', [f.a1], externalIPs=[f.external], type='LoadBalancer',
                       status={'loadBalancer': {'ingress': [{'ip': f.lb, **spec.pop('ingress', {})}]}}, **spec)
    c = Case('external-ip-%s' % f.name, 'An external IP: DNAT and masquerade', 'SERVICES 14', external())
    conversation(c, f, UPLINK, f.out, f.external, 80, POD1, f.a1, 8080, masquerade=f.node)
    c = Case('load-balancer-ip-%s' % f.name, 'A load balancer IP', 'SERVICES 14, 21', external())
    conversation(c, f, UPLINK, f.out, f.lb, 80, POD1, f.a1, 8080, masquerade=f.node)
    c = Case('load-balancer-policy-local-%s' % f.name, 'A load balancer IP, policy Local: the client is seen', 'SERVICES 15',
             external(externalTrafficPolicy='Local'))
    conversation(c, f, UPLINK, f.out, f.lb, 80, POD1, f.a1, 8080)
    c = Case('load-balancer-ip-mode-proxy-%s' % f.name, 'ipMode Proxy is not served here', 'SERVICES 21', external(ingress={'ipMode': 'Proxy'}))
    p = packet(f.a1, f.lb, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p)])
    c = Case('load-balancer-source-ranges-%s' % f.name, 'loadBalancerSourceRanges guard the load balancer IP only', 'SERVICES 18, 20',
             external(loadBalancerSourceRanges=[' 203.0.113.0/24', '2001:db8:cafe::/48 ']))
    p = packet(f.out2, f.lb, tcp(40000, 80))
    c.step((UPLINK, p), [], 'outside the ranges', reason='SourceRange')
    p = packet(f.a2, f.lb, tcp(40000, 80))
    c.step((POD2, p), [], 'no exemption for pods')
    p = packet(f.out, f.lb, tcp(40000, 80))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport=dict(MASQUERADE_PORT), dport=8080)], 'inside')
    p = packet(f.out2, f.external, tcp(40001, 80))
    c.step((UPLINK, p), [out(POD1, p, src=f.node, dst=f.a1, sport={'range': [1024, 65535]}, dport=8080)], 'the external IP is open')


@both
def rejects(f):
    c = Case('no-backend-udp-%s' % f.name, 'No backend: port unreachable that quotes the packet', 'SERVICES 11; RFC 1122 3.2.2',
             service(f, 'dns', [], f.vip2, 53, 5353, 'UDP', 30053), service(f, 'web', [(f.a1, UNREADY)], f.vip))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='query')
    source = {'oneof': [f.node, f.vip2]}
    c.step((POD1, p), [icmp_error(POD1, f, source, f.a1, f.port_unreachable, quote(f.a1, f.vip2, ports('udp', 40000, 53)))], connections=[])
    p = packet(f.out, f.node, udp(40000, 30053), payload='query')
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.out, f.port_unreachable, quote(f.out, f.node, ports('udp', 40000, 30053)))],
           'to the node port, from outside')
    p = packet(f.node, f.vip2, udp(40000, 53), payload='query')
    c.step((HOST, p), [icmp_error(HOST, f, source, f.node, f.port_unreachable, quote(f.node, f.vip2, ports('udp', 40000, 53)))],
           'from the node itself')
    p = packet(f.a1, f.vip, tcp(40000, 80, 'S', 99))
    c.step((POD1, p), [reset(POD1, f.vip, f.a1, 80, 40000, flags='RA', seq=0, ack=100)], 'TCP: an unready backend is none')
    p = packet(f.a1, f.vip, tcp(40000, 80, 'A', 99, 5))
    c.step((POD1, p), [], 'what opens no connection is not answered', reason='Invalid')
    p = packet(f.a1, f.vip, tcp(40000, 80, 'SA', 99, 5))
    c.step((POD1, p), [], 'nor is a SYN-ACK')
    p = packet(f.a1, f.vip2, udp(40000, 53, chksum='bad'), payload='query')
    c.step((POD1, p), [], 'nor a broken packet')

    c = Case('unpublished-port-%s' % f.name, 'A port that the cluster IP does not publish, and an address that nobody has', 'SERVICES 24',
             service(f, 'web', [f.a1]))
    p = packet(f.a2, f.vip, tcp(40000, 81, 'S', 99))
    c.step((POD2, p), [reset(POD2, f.vip, f.a2, 81, 40000, flags='RA', seq=0, ack=100)], 'TCP')
    p = packet(f.a2, f.vip, udp(40000, 80), payload='x')
    c.step((POD2, p), [icmp_error(POD2, f, {'oneof': [f.node, f.vip]}, f.a2, f.port_unreachable, quote(f.a2, f.vip, ports('udp', 40000, 80)))],
           'another protocol')
    p = packet(f.a2, f.vip, echo(f), payload='ping')
    c.step((POD2, p), [icmp_error(POD2, f, {'oneof': [f.node, f.vip]}, f.a2, f.port_unreachable, quote(f.a2, f.vip, {f.icmp: {'type': f.echo}}))],
           'a ping of the cluster IP', connections=[])
    p = packet(f.a2, f.vip_free, tcp(40000, 80))
    c.step((POD2, p), [], 'an unallocated address')
    p = packet(f.a2, f.vip_free, echo(f), payload='ping')
    c.step((POD2, p), [], 'a ping of it')
    p = packet(f.a2, f.vip, tcp(40000, 80))
    c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=8080)], 'the published one')
    p = packet(f.a2, f.vip, udp(40000, 9999), payload={'len': 900})
    c.step((POD2, p), [icmp_error(POD2, f, {'oneof': [f.node, f.vip]}, f.a2, f.port_unreachable, quote(f.a2, f.vip, ports('udp', 40000, 9999)),
                                  embed_len={'range': [28, 1232 if f.six else 548]})],
           'a long packet: the error stays within 576 or 1280 bytes')

    c = Case('reject-mid-path-%s' % f.name, 'A reject of a node port by RST, from outside; and behind policy Local', 'SERVICES 11',
             service(f, 'web', [], node_port=30080, externalTrafficPolicy='Local'))
    p = packet(f.out, f.node, tcp(40000, 30080, 'S', 4294967295))
    c.step((UPLINK, p), [reset(UPLINK, f.node, f.out, 30080, 40000, flags='RA', seq=0, ack=0)], 'none in the whole cluster: reject, not drop')
    c.step((HOST, packet(f.node, f.vip, tcp(40000, 80, 'S', 7))), [reset(HOST, f.vip, f.node, 80, 40000, flags='RA', seq=0, ack=8)],
           'from the node')


@both
def the_node_itself(f):
    c = Case('node-to-local-pod-service-%s' % f.name, 'The node uses a cluster IP with a backend on itself', 'SERVICES 13', service(f, 'web', [f.a1]))
    conversation(c, f, HOST, f.node, f.vip, 80, POD1, f.a1, 8080, masquerade=f.node)
    for s in c.steps['steps']:                       # the node's own packets may have passed its stack, or not
        for e in s['expect']:
            h = e['packet']['ip6' if f.six else 'ip']
            h['hlim' if f.six else 'ttl'] = {'oneof': [63, 64]}
    c = Case('node-to-pod-%s' % f.name, 'The node talks to pods without a service: untranslated', 'DESIGN, role host')
    p = packet(f.node, f.a1, tcp(40000, 8080))
    c.step((HOST, p), [out(POD1, p, ttl={'oneof': [63, 64]})])
    p = packet(f.a1, f.node, tcp(8080, 40000, 'SA', 9, 1001))
    c.step((POD1, p), [out(HOST, p, ttl={'oneof': [63, 64]})])
    p = packet(f.node, f.b1, echo(f), payload='x')
    c.step((HOST, p), [out(UPLINK, p, ttl={'oneof': [63, 64]})])
    p = packet(f.b1, f.node, echo(f, reply=True), payload='x')
    c.step((UPLINK, p), [out(HOST, p, ttl={'oneof': [63, 64]})])


@both
def choice(f):
    c = Case('choice-is-spread-%s' % f.name, 'Backends are picked at random, all of them, each once per connection', 'SERVICES 28',
             service(f, 'web', [f.b1, f.b2, f.c1, f.a2]))
    base = frame(POD1, packet(f.a1, f.vip, tcp(1, 80)))
    c.t = 0.1
    c.steps['steps'].append({'note': '64 connections, four backends', 't': 0.1, 'device': POD1,
                             'bulk': {'packet': base, 'vary': [{'path': 'tcp.sport', 'range': [41000, 41064]}]}, 'expect': [],
                             'forbid': [], 'any_of': [[pattern(d, {}, True) for d in [UPLINK, POD2] for _ in range(64)]],
                             'conntrack': {'count': 64, 'contains': [{'reply': {'src': b}} for b in (f.b1, f.b2, f.c1, f.a2)]}})
    c = Case('terminating-backends-%s' % f.name, 'With none ready, serving and terminating ones are used', 'SERVICES 4, 5',
             service(f, 'web', [(f.a1, TERMINATING), (f.b1, UNREADY)]), service(f, 'two', [(f.a1, TERMINATING), f.b1], f.vip2))
    for sport in (40000, 40001):
        p = packet(f.a2, f.vip, tcp(sport, 80))
        c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=8080)])
        p = packet(f.a2, f.vip2, tcp(sport, 80))
        c.step((POD2, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    c = Case('internal-policy-local-%s' % f.name, 'internalTrafficPolicy Local: only here; none here is a drop', 'SERVICES 8, 12, 17',
             service(f, 'web', [f.a1, f.b1], internalTrafficPolicy='Local'), service(f, 'two', [f.b1], f.vip2, internalTrafficPolicy='Local'))
    for sport in (40000, 40001, 40002, 40003):
        p = packet(f.a2, f.vip, tcp(sport, 80))
        c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=8080)])
    p = packet(f.a2, f.vip2, tcp(40000, 80))
    c.step((POD2, p), [], reason='NoLocalBackend')
    c = Case('same-tuple-two-frontends-%s' % f.name, 'Two frontends, one backend, one client port, TCP: two flows on the wire', 'netfilter',
             service(f, 'web', [f.b1]), service(f, 'two', [f.b1], f.vip2))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, sport=40000, dport=8080)])
    p = packet(f.a1, f.vip2, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, sport={'bind': 'm', 'not': 40000}, dport=8080)])
    p = packet(f.b1, f.a1, tcp(8080, '$m', 'SA', 1, 1001))
    c.step((UPLINK, p), [out(POD1, p, src=f.vip2, sport=80, dport=40000)])
    p = packet(f.a1, f.b1, tcp(40000, 8080))
    c.step((POD1, p), [out(UPLINK, p, sport={'not': 40000})], 'and the backend itself, by its own address')
