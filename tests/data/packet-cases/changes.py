"""The configuration changes while packets flow (--config-at): backends, services, policies (DESIGN, stamps; POLICY 9)."""
from world import *


@both
def backends(f):
    b = f.b1
    c = Case('reload-udp-backend-gone-%s' % f.name, 'UDP leaves a backend that is gone with its next packet', 'DESIGN (UDP flows follow their service)',
             service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP')).reload(10, service(f, 'dns', [f.a2], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='q')
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=5353)])
    q = packet(f.b1, f.a1, udp(5353, 40000), payload='a')
    c.step((UPLINK, q), [out(POD1, q, src=f.vip2, sport=53)])
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=5353)], 'after the change', at=10.5)
    q = packet(f.a2, f.a1, udp(5353, 40000), payload='a')
    c.step((POD2, q), [out(POD1, q, src=f.vip2, sport=53)])
    c = Case('reload-udp-service-emptied-%s' % f.name, 'No backend left: port unreachable', 'DESIGN', service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP')) \
        .reload(10, service(f, 'dns', [], f.vip2, 53, 5353, 'UDP'))
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=5353)])
    c.step((POD1, p), [icmp_error(POD1, f, {'oneof': [f.node, f.vip2]}, f.a1, f.port_unreachable, quote(f.a1, f.vip2, ports('udp', 40000, 53)))], at=10.5,
           connections=[])
    c = Case('reload-udp-service-appears-%s' % f.name, 'A service appears where packets went unserved', 'DESIGN', router_with={'serviceCIDRs': []}) \
        .reload(10, service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP'))
    c.step((POD1, p), [out(UPLINK, p)], 'just an address')
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=5353)], 'now a service', at=10.5)
    c = Case('reload-udp-service-gone-%s' % f.name, 'A deleted service', 'DESIGN', service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP')).reload(10)
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=5353)])
    c.step((POD1, p), [], 'its address is unallocated now', at=10.5)
    c = Case('reload-tcp-backend-terminating-%s' % f.name, 'TCP stays with a backend that terminates; new connections do not', 'DESIGN',
             service(f, 'web', [f.b1])).reload(10, service(f, 'web', [(f.b1, TERMINATING), f.a2]))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=8080)])
    q = packet(f.b1, f.a1, tcp(8080, 40000, 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q, src=f.vip, sport=80)])
    p = packet(f.a1, f.vip, tcp(40000, 80, 'A', 1001, 5001))
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=8080)])
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=8080)], 'terminating', at=10.5)
    p = packet(f.a1, f.vip, tcp(40001, 80))
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)], 'a new one')
    c = Case('reload-tcp-backend-gone-%s' % f.name, 'TCP to a backend that is gone gets a RST', 'DESIGN', service(f, 'web', [f.b1])) \
        .reload(10, service(f, 'web', [f.a2]))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=8080)])
    q = packet(f.b1, f.a1, tcp(8080, 40000, 'SA', 5000, 1001))
    c.step((UPLINK, q), [out(POD1, q, src=f.vip, sport=80)])
    p = packet(f.a1, f.vip, tcp(40000, 80, 'A', 1001, 5001))
    c.step((POD1, p), [out(UPLINK, p, dst=b, dport=8080)])
    p = packet(f.a1, f.vip, tcp(40000, 80, 'PA', 1001, 5001), payload='x')
    c.step((POD1, p), [reset(POD1, f.vip, f.a1, 80, 40000, flags={'oneof': ['R', 'RA']}, seq=5001)], at=10.5)
    p = packet(f.a1, f.vip, tcp(40000, 80, 'S', 90000))
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)], 'and connects anew')


@both
def policies(f):
    deny = policy('deny', 'a1', ['Ingress'], [])
    other = policy('other', 'b2', ['Ingress'], [])
    c = Case('reload-policy-cuts-%s' % f.name, 'A policy that now denies an established connection cuts it, both ways', 'POLICY 9; DESIGN (stamps)') \
        .reload(10, deny)
    p = packet(f.a2, f.a1, udp(40000, 53), payload='q')
    q = packet(f.a1, f.a2, udp(53, 40000), payload='a')
    c.step((POD2, p), [out(POD1, p)])
    c.step((POD1, q), [out(POD2, q)])
    c.step((POD2, p), [], 'denied now', at=10.5, reason='PolicyDeniedIngress')
    q2 = packet(f.a1, f.a2, udp(54, 40000), payload='other')
    c.step((POD1, q2), [out(POD2, q2)], 'egress is free')
    c = Case('reload-policy-cuts-reply-%s' % f.name, 'Also where the next packet is a reply', 'DESIGN (judged by its original key)').reload(10, deny)
    c.step((POD2, p), [out(POD1, p)])
    c.step((POD1, q), [out(POD2, q)])
    c.step((POD1, q), [], 'a reply of a denied connection', at=10.5)
    c.step((POD2, p), [], 'the request')
    c.step((POD1, q2), [out(POD2, q2)], 'egress is free')
    c = Case('reload-unrelated-policy-%s' % f.name, 'An unrelated policy changes nothing', 'DESIGN (stamps)').reload(10, other)
    c.step((POD2, p), [out(POD1, p)])
    c.step((POD1, q), [out(POD2, q)])
    c.step((POD1, q), [out(POD2, q)], at=10.5, connections=[connection('udp', (f.a2, 40000, f.a1, 53), None, 'established')])
    c.step((POD2, p), [out(POD1, p)])
    c = Case('reload-policy-opens-%s' % f.name, 'A policy that goes away opens', 'POLICY 9', deny).reload(10)
    c.step((POD2, p), [], 'denied', connections=[])
    c.step((POD2, p), [out(POD1, p)], at=10.5)
    c = Case('reload-policy-service-tcp-%s' % f.name, 'Judged again after DNAT: TCP through a service is cut', 'POLICY 11', service(f, 'web', [f.a1])).reload(
        10, service(f, 'web', [f.a1]), deny)
    p = packet(f.a2, f.vip, tcp(40000, 80))
    c.step((POD2, p), [out(POD1, p, dst=f.a1, dport=8080)])
    q = packet(f.a1, f.a2, tcp(8080, 40000, 'SA', 5000, 1001))
    c.step((POD1, q), [out(POD2, q, src=f.vip, sport=80)])
    p = packet(f.a2, f.vip, tcp(40000, 80, 'A', 1001, 5001))
    c.step((POD2, p), [], 'cut', at=10.5, quiet=True, any_of=[[], [reset(POD2, f.vip, f.a2, 80, 40000)]])
