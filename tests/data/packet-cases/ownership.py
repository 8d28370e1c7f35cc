"""Who owns an address, and by which way it is reached: pods of the API server, nodes, routes; pods that are no workloads."""
from world import *
from tunnel import encapsulated, tunnelled

f4 = V4


def pod(name, node, addresses, phase='Running', **spec):
    return {'apiVersion': 'v1', 'kind': 'Pod', 'metadata': {'name': name, 'namespace': 'default', 'labels': {'app': name}},
            'spec': {'nodeName': node, 'containers': [{'name': 'main', 'image': 'example.invalid/app:1'}], **spec},
            'status': {'phase': phase, 'podIP': addresses[0], 'podIPs': [{'ip': a} for a in addresses]}}


def borrowed_addresses():
    c = Case('owner-borrowed-address', "A pod's address counts more than the node's range that it is from", 'DESIGN (who owns)',
             pod('far', 'node-c', ['10.244.2.77']), pod('near', 'node-a', ['10.244.3.88']), ipip='Always',
             router_with={'devices': router()['devices'] + [{'name': 'cali33e2d7c2d5a', 'role': 'workload', 'mac': VETH_MAC, 'mtu': 1500}]})
    p = packet(f4.a1, '10.244.2.77', udp(1, 2), payload='x')
    c.step((POD1, p), [encapsulated(p, f4.node_c)], "of node-b's range, on node-c")
    q = packet('10.244.2.77', f4.a1, udp(2, 1), payload='y')
    c.step((UPLINK, tunnelled(q, f4.node_c)), [out(POD1, q)], 'and back from node-c')
    c.step((UPLINK, tunnelled(q, f4.node_b)), [], 'but not from node-b')
    p = packet(f4.a1, '10.244.2.78', udp(1, 2), payload='x')
    c.step((POD1, p), [encapsulated(p, f4.node_b)], 'its neighbour is at node-b')

    c = Case('owner-finished-pod', 'A pod that has ended owns nothing; nor does one on the host network', 'Kubernetes: podIPs are used again',
             pod('job', 'node-b', [f4.a1, V6.a1], 'Succeeded'), pod('failed', 'node-c', [f4.a2], 'Failed'),
             pod('proxy', 'node-a', [f4.node, V6.node], hostNetwork=True), pod('proxy-b', 'node-b', [f4.node_b, V6.node_b], hostNetwork=True),
             policy('all', None, ['Ingress'], []), ipip='Always')
    for f in (V4, V6):
        p = packet(f.a1, f.node, udp(1, 2), payload='x')
        c.step((POD1, p), [out(HOST, p)], 'the node is no workload: no policy of pods applies')
        p = packet(f.a1, f.node_b, udp(1, 2), payload='x')
        c.step((POD1, p), [out(UPLINK, p)], 'another node is reached directly')
        p = packet(f.out, f.node, udp(1, 2), payload='x')
        c.step((UPLINK, p), [out(HOST, p)], 'from outside')
    p = packet(f4.a2, f4.b1, udp(1, 2), payload='x')
    c.step((POD2, p), [encapsulated(p, f4.node_b)], 'the running pods send')

    c = Case('owner-no-annotation', 'Without annotation the InternalIP is the tunnel\'s end, and the uplink\'s prefix the subnet', 'DESIGN (CrossSubnet)', ipip='CrossSubnet')
    for node in c.cluster:
        if node['kind'] == 'Node':
            node['metadata'].pop('annotations')
    p = packet(f4.a1, f4.b1, udp(1, 2), payload='x')
    c.step((POD1, p), [out(UPLINK, p)], 'in the subnet')
    p = packet(f4.a1, f4.c1, udp(1, 2), payload='x')
    c.step((POD1, p), [encapsulated(p, f4.node_c)], 'outside of it')

    c = Case('owner-kernel-route', 'A more specific route of the kernel moves no pod of a node', 'DESIGN (who owns)', ipip='Never', router_with={
        'routes': router()['routes'] + [{'to': '10.244.2.0/26', 'via': f4.lan, 'device': UPLINK}, {'to': '203.0.113.0/25', 'via': f4.lan, 'device': UPLINK}]})
    p = packet(f4.a1, f4.b1, udp(1, 2), payload='x')
    c.step((POD1, p), [out(UPLINK, p)], 'a pod')
    p = packet(f4.a1, f4.out, udp(1, 2), payload='x')
    c.step((POD1, p), [out(UPLINK, p, via=LAN_MAC)], 'the longer of two prefixes')
    p = packet(f4.a1, '203.0.113.200', udp(1, 2), payload='x')
    c.step((POD1, p), [out(UPLINK, p)], 'the default route')


borrowed_addresses()


@both
def nobodys(f):
    c = Case('owner-nobody-%s' % f.name, "An address of this node's own block without a pod: host unreachable, from pods and from outside", 'DESIGN (own block)',
             service(f, 'web', [f.a9]))
    code = (1, 3) if f.six else (3, 1)
    p = packet(f.a1, f.a9, udp(1, 2), payload='x')
    c.step((POD1, p), [icmp_error(POD1, f, f.node, f.a1, code, quote(f.a1, f.a9, ports('udp', 1, 2)))], connections=[])
    p = packet(f.out, f.a9, tcp(1, 2))
    c.step((UPLINK, p), [icmp_error(UPLINK, f, f.node, f.out, code, quote(f.out, f.a9, ports('tcp', 1, 2)))], connections=[])
    p = packet(f.out, f.a9, error(f, f.port_unreachable, packet(f.a9, f.out, udp(1, 2))))
    c.step((UPLINK, p), [], 'never about an error')


@both
def from_outside_as_a_pod(f):
    c = Case('owner-pod-outside-%s' % f.name, "Nobody outside passes as a pod of this node; a remote pod's address comes by the uplink", 'RFC 3704, 2.2',
             policy('guard', 'a2', ['Ingress'], [{'from': [{'podSelector': {}}]}]), ipip='Never')
    p = packet(f.a1, f.a2, udp(1, 2), payload='x')
    c.step((UPLINK, p), [], 'not as the pod that may', connections=[])
    c.step((POD1, p), [out(POD2, p)], 'which does')
    p = packet(f.b1, f.a2, udp(3, 2), payload='y')
    c.step((UPLINK, p), [out(POD2, p)], 'a remote one')


@both
def more_services(f):
    c = Case('health-check-port-%s' % f.name, 'The health-check node port is the node\'s own', 'SERVICES 23',
             service(f, 'web', [f.a1], node_port=30080, type='LoadBalancer', externalTrafficPolicy='Local', healthCheckNodePort=32000))
    p = packet(f.out, f.node, tcp(40000, 32000))
    c.step((UPLINK, p), [out(HOST, p)])
    c = Case('two-protocols-one-port-%s' % f.name, 'TCP and UDP of one port are two frontends', 'SERVICES 24, 27', service(f, 'tcp', [f.b1], f.vip2, 53, 5353, 'TCP'))
    udp_port = {'name': 'u', 'port': 53, 'protocol': 'UDP', 'targetPort': 5354}
    c.cluster[-2]['spec']['ports'].append(udp_port)
    c.cluster[-1]['ports'].append({'name': 'u', 'port': 5354, 'protocol': 'UDP'})
    p = packet(f.a1, f.vip2, tcp(40000, 53))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5353)])
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='q')
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=5354)])
    p = packet(f.a1, f.vip2, sctp(40000, 53, itag=4))
    c.step((POD1, p), [icmp_error(POD1, f, {'oneof': [f.node, f.vip2]}, f.a1, f.port_unreachable, quote(f.a1, f.vip2, ports('sctp', 40000, 53)))], 'SCTP is none')
    c = Case('no-backend-fragmented-%s' % f.name, 'A fragmented request that is rejected: one answer', 'SERVICES 11', service(f, 'dns', [], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload={'len': 2000})
    a, b = fragments(p, 1480)
    c.step([(POD1, b), (POD1, a)], [icmp_error(POD1, f, {'oneof': [f.node, f.vip2]}, f.a1, f.port_unreachable, quote(f.a1, f.vip2))])
    c = Case('node-port-local-hairpin-%s' % f.name, 'A pod reaches itself by a node port and by an external IP', 'SERVICES 14, 16', service(
        f, 'web', [f.a1], node_port=30080, externalIPs=[f.external]))
    for frontend, port in ((f.node, 30080), (f.external, 80)):
        p = packet(f.a1, frontend, tcp(40000, port))
        c.step((POD1, p), [out(POD1, p, src=f.node, dst=f.a1, sport={'bind': 'm%d' % port, 'range': [1024, 65535]}, dport=8080)])
        q = packet(f.a1, f.node, tcp(8080, '$m%d' % port, 'SA', 9, 1001))
        c.step((POD1, q), [out(POD1, q, src=frontend, dst=f.a1, sport=port, dport=40000)])
    c = Case('external-policy-local-node-%s' % f.name, 'The node itself, policy Local: the whole cluster, masqueraded', 'SERVICES 9, 15',
             service(f, 'web', [f.b1], node_port=30080, externalTrafficPolicy='Local'))
    p = packet(f.node, f.node, tcp(40000, 30080))
    c.step((HOST, p), [out(UPLINK, p, src=f.node, dst=f.b1, sport=dict(MASQUERADE_PORT), dport=8080, ttl={'oneof': [63, 64]})])
    c = Case('headless-%s' % f.name, 'Headless services have no frontend', 'SERVICES 25', service(f, 'web', [f.b1], clusterIP='None', clusterIPs=['None']))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [], 'the address is unallocated')
    p = packet(f.a1, f.b1, tcp(40000, 8080))
    c.step((POD1, p), [out(UPLINK, p)], 'the pod is reached directly')


@both
def quoted_extensions(f):
    if not f.six:
        return
    c = Case('icmp-quotes-extensions-v6', 'An error that quotes a packet with extension headers', 'RFC 4443 2.4', service(f, 'dns', [f.b1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a1, f.vip2, udp(40000, 53), payload='q', ext=[[60, '00010400000000']])
    e = out(UPLINK, p, dst=f.b1, dport=5353)
    e['packet']['save'] = 'wire'
    c.step((POD1, p), [e])
    q = packet(f.b1, f.a1, error(f, f.port_unreachable, {'saved': 'wire'}))
    c.step((UPLINK, q), [icmp_error(POD1, f, f.vip2, f.a1, f.port_unreachable, quote(f.a1, f.vip2, ports('udp', 40000, 53)))])
    c = Case('fragments-behind-extensions-v6', 'Options in front of the fragment header', 'RFC 8200 4.5', service(f, 'dns', [f.a1], f.vip2, 53, 5353, 'UDP'))
    p = packet(f.a2, f.vip2, udp(40000, 53), payload={'len': 2000})
    pieces = fragments(p, 1400)
    for x in pieces:
        x['ip6']['ext'] = [[60, '00010400000000']]
    c.step([(POD2, x) for x in pieces], [pattern(POD1, {'ip6': {'dst': f.a1, 'mf': True}}), pattern(POD1, {'ip6': {'dst': f.a1, 'mf': False}})])


@both
def affinity(f):
    client = {'sessionAffinity': 'ClientIP', 'sessionAffinityConfig': {'clientIP': {'timeoutSeconds': 100}}}
    backends = [f.a2, f.b1, f.b2, f.c1]

    def toward(c, src, device, frontend, port, sport, note, at=None, stays=True, name='b', **more):
        """The backend of src is the one before (bound to `name`): whatever comes out has its address, the port 8080."""
        p = packet(src, frontend, tcp(sport, port))
        want = {'ip6' if f.six else 'ip': {'dst': {'bind': name} if stays else {'any': True}}, 'tcp': {'dport': 8080}}
        c.step((device, p), any_of=[[pattern(UPLINK, want)], [pattern(POD2, want)]], note=note, at=at, **more)
    c = Case('affinity-%s' % f.name, "A client keeps its backend, by every frontend of the port, whatever its source port", 'SERVICES 26',
             service(f, 'web', backends, node_port=30080, externalIPs=[f.external], **client))
    for k in range(8):
        toward(c, f.a1, POD1, f.vip, 80, 40000 + k, 'cluster IP')
    toward(c, f.a1, POD1, f.node, 30080, 41000, 'node port')
    toward(c, f.a1, POD1, f.external, 80, 41001, 'external IP')
    for k in range(6):
        toward(c, f.out, UPLINK, f.node, 30080, 40000 + k, 'another client', name='o')
    c = Case('affinity-timeout-%s' % f.name, 'Each new connection begins the time anew', 'SERVICES 26', service(f, 'web', backends, **client))
    t = 0.01
    for k in range(8):
        toward(c, f.a1, POD1, f.vip, 80, 40000 + k, '90 s later', at=t)
        t += 90
    c = Case('affinity-backend-gone-%s' % f.name, 'A backend that is gone is forgotten', 'SERVICES 26', service(f, 'web', [f.b1], **client)).reload(
        10, service(f, 'web', [f.a2], **client)).reload(20, service(f, 'web', [f.a2, f.b1, f.b2], **client))
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(UPLINK, p, dst=f.b1, dport=8080)])
    p = packet(f.a1, f.vip, tcp(40001, 80))
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)], 'the only one', at=11)
    for k in range(4):
        p = packet(f.a1, f.vip, tcp(40002 + k, 80))
        c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)], 'and stays', at=21 + k)
