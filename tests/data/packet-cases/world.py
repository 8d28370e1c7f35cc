"""The little cluster in which the cases of this folder play, and the words to write them with.

node-a (where weir runs): uplink eth0 192.168.0.10/24, pods a1 and a2.  node-b is a neighbour in the same subnet (pods b1, b2), node-c lives
in another one behind the gateway (pod c1).  Everything exists in IPv4 and IPv6: `Family` holds one family's addresses, so that a
case written once runs for both.
"""
import copy, json, os

POD1, POD2, UPLINK, HOST = 'cali5cce677186e', 'calif932eb697ec', 'eth0', 'host'
GATEWAY_MAC, NODE_MAC, NODE_B_MAC, LAN_MAC = '02:00:00:00:00:01', '02:00:00:00:00:0a', '02:00:00:00:00:0b', '02:00:00:00:00:63'
POD1_MAC, POD2_MAC, VETH_MAC, HOST_MAC = '0a:00:00:00:01:02', '0a:00:00:00:01:03', 'ee:ee:ee:ee:ee:ee', '02:00:00:00:01:00'
DEVICE_MACS = {POD1: (POD1_MAC, VETH_MAC), POD2: (POD2_MAC, VETH_MAC), UPLINK: (GATEWAY_MAC, NODE_MAC), HOST: ('02:00:00:00:00:fe', HOST_MAC)}


class Family:
    def __init__(self, six):
        self.six = six
        self.name = 'v6' if six else 'v4'
        f = (lambda v4, v6: v6) if six else (lambda v4, v6: v4)
        self.a1, self.a2 = f('10.244.1.2', '2001:db8:244:1::2'), f('10.244.1.3', '2001:db8:244:1::3')
        self.a9 = f('10.244.1.9', '2001:db8:244:1::9')          # of node-a's block, nobody's
        self.b1, self.b2 = f('10.244.2.2', '2001:db8:244:2::2'), f('10.244.2.3', '2001:db8:244:2::3')
        self.c1 = f('10.244.3.2', '2001:db8:244:3::2')
        self.node, self.node_b = f('192.168.0.10', '2001:db8:192::10'), f('192.168.0.11', '2001:db8:192::11')
        self.node_c = f('192.168.1.12', '2001:db8:192::12')
        self.gateway, self.lan = f('192.168.0.1', '2001:db8:192::1'), f('192.168.0.99', '2001:db8:192::99')
        self.out, self.out2 = f('203.0.113.7', '2001:db8:cafe::7'), f('198.51.100.9', '2001:db8:beef::9')
        self.vip, self.vip2 = f('10.96.0.10', '2001:db8:96::10'), f('10.96.0.53', '2001:db8:96::53')
        self.vip_free = f('10.96.77.7', '2001:db8:96::7777')     # of the service range, nobody's
        self.lb, self.external = f('198.18.0.5', '2001:db8:1b::5'), f('198.18.0.6', '2001:db8:1b::6')
        self.icmp = 'icmp6' if six else 'icmp'
        self.echo, self.echo_reply = f(8, 128), f(0, 129)
        self.port_unreachable = f((3, 3), (1, 4))
        self.time_exceeded, self.too_big = f((11, 0), (3, 0)), f((3, 4), (2, 0))
        self.header = f(20, 40)


V4, V6 = Family(False), Family(True)

# ---------------------------------------------------------------- packets


def tcp(sport, dport, flags='S', seq=1000, ack=0, win=64240, **more):
    return {'tcp': {'sport': sport, 'dport': dport, 'flags': flags, 'seq': seq, 'ack': ack, 'win': win, **more}}


def udp(sport, dport, **more):
    return {'udp': {'sport': sport, 'dport': dport, **more}}


def sctp(sport, dport, chunk='INIT', vtag=0, **more):
    return {'sctp': {'sport': sport, 'dport': dport, 'chunk': chunk, 'vtag': vtag, **more}}


def echo(f, ident=77, seq=1, reply=False, **more):
    return {f.icmp: {'type': f.echo_reply if reply else f.echo, 'id': ident, 'seq': seq, **more}}


def error(f, type_code, embed, mtu=0, **more):
    return {f.icmp: {'type': type_code[0], 'code': type_code[1], 'mtu': mtu, 'embed': embed, **more}}


def packet(src, dst, *layers, payload=None, frag=None, ext=None, **header):
    """A network-layer packet; header: ttl, tos, id, df, ... by their IPv4 names (hlim, tc for IPv6 follow from ttl, tos)."""
    p = {}
    if ':' in (src if isinstance(src, str) else dst):
        names = {'ttl': 'hlim', 'tos': 'tc'}
        p['ip6'] = {'src': src, 'dst': dst, **{names.get(k, k): v for k, v in header.items() if k not in ('df', 'id')}}
        if ext:
            p['ip6']['ext'] = ext
    else:
        p['ip'] = {'src': src, 'dst': dst, **header}
    for layer in layers:
        p.update(layer)
    if payload is not None:
        p['payload'] = payload
    if frag:
        p['frag'] = frag
    return p


def fragments(p, *cuts, id=0x7777):
    """The fragments of p that begin at 0 and at each of cuts (bytes of the layer-4 packet); the last goes to the end."""
    out = []
    if 'ip6' in p:                                # their header is 28 bytes longer
        cuts = [cut - cut // 1480 * 40 for cut in cuts]
    edges = [0, *cuts, 65535]
    for begin, end in zip(edges, edges[1:]):
        q = copy.deepcopy(p)
        last = end == 65535
        q['frag'] = {'from': begin, 'to': end, 'mf': not last}
        if 'ip6' in q:
            q['frag']['id'] = id
        else:
            q['ip']['id'] = id
        out.append(q)
    return out


def frame(device, p, **eth):
    """p as it comes in on device."""
    src, dst = DEVICE_MACS[device]
    q = copy.deepcopy(p)
    q['eth'] = {'src': src, 'dst': dst, **eth}
    return q


def mac_towards(address):
    if address.startswith(('10.244.2.', '2001:db8:244:2:')) or address in (V4.node_b, V6.node_b):
        return NODE_B_MAC
    if address in (V4.lan, V6.lan):
        return LAN_MAC
    return GATEWAY_MAC


def out(device, p, via=None, optional=False, eth=True, **changes):
    """Expects p on device, one hop further, with `changes` (src, dst, sport, dport, id, ttl, ...); all else as it was."""
    q = copy.deepcopy(p)
    for k in ('frag', 'eth', 'pad', 'padbyte', 'cut'):
        q.pop(k, None)
    six = 'ip6' in q
    if six:
        changes = {k: v for k, v in changes.items() if k not in ('id', 'df')}
    h = q['ip6' if six else 'ip']
    hop = 'hlim' if six else 'ttl'
    h[hop] = h.get(hop, 64) - (0 if device == HOST else 1)
    if six:
        h.setdefault('tc', 0)
        h.setdefault('fl', 0)
        h.pop('ext', None)
    else:
        for k, v in (('tos', 0), ('id', 0x1234), ('df', False), ('mf', False), ('frag', 0)):
            h.setdefault(k, v)
        h.setdefault('options', '')
        h.pop('chksum', None)
    for layer in ('tcp', 'udp', 'sctp', 'icmp', 'icmp6'):
        l4 = q.get(layer)
        if not l4:
            continue
        for k in ('sport', 'dport', 'id', 'seq', 'embed', 'embed_len', 'mtu', 'type', 'code', 'flags', 'win', 'ack'):
            if k in changes and (k != 'id' or layer.startswith('icmp')):
                l4[k] = changes.pop(k)
        if layer == 'tcp':
            l4.pop('options', None)
            l4.pop('chksum', None)
        if layer == 'udp' and 'chksum' not in l4:
            l4['chksum'] = {'not': 0}
        if layer == 'sctp':
            l4.pop('itag', None)
        if l4.get('chksum') == 'bad':
            l4.pop('chksum')
    for k, v in changes.items():
        if k in ('payload', 'frags', 'save', 'same_as', 'payload_len', 'inner'):
            q[k] = v
        else:
            h[{'ttl': 'hlim', 'tos': 'tc'}.get(k, k) if six else k] = v
    for k in [k for k, v in h.items() if v is None]:
        del h[k]
    if device != HOST and eth:
        src = VETH_MAC if device in (POD1, POD2) else NODE_MAC
        dst = {POD1: POD1_MAC, POD2: POD2_MAC}.get(device) or via or mac_towards(h['dst'])
        q['eth'] = {'src': src, 'dst': dst}
    e = {'device': device, 'packet': q}
    if optional:
        e['optional'] = True
    return e


def pattern(device, p, optional=False):
    """Expects what p says and nothing more."""
    return {'device': device, 'packet': p, **({'optional': True} if optional else {})}


def reset(device, src, dst, sport, dport, **fields):
    """A RST that weir makes."""
    return pattern(device, packet(src, dst, {'tcp': {'sport': sport, 'dport': dport, **fields}}))


def icmp_error(device, f, src, dst, type_code, quoted, mtu=None, **more):
    """An ICMP error; quoted: a pattern of the packet inside."""
    e = {'type': type_code[0], 'code': type_code[1], 'embed': quoted, **more}
    if mtu is not None:
        e['mtu'] = mtu
    return pattern(device, packet(src, dst, {f.icmp: e}))


def quote(src, dst, *layers):
    return packet(src, dst, *layers)


def ports(protocol, sport, dport):
    return {protocol: {'sport': sport, 'dport': dport}}


def connection(proto, original, reply=None, state=None, tcp=None):
    """An entry of conntrack.json; original and reply: (src, sport, dst, dport), None where anything goes."""
    def direction(x):
        return {k: v for k, v in zip(('src', 'sport', 'dst', 'dport'), x) if v is not None}
    e = {'proto': proto, 'original': direction(original)}
    if reply:
        e['reply'] = direction(reply)
    if state:
        e['state'] = state
    if tcp:
        e['tcpState'] = tcp
    return e


MASQUERADE_PORT = {'bind': 'm', 'range': [1024, 65535]}

# ---------------------------------------------------------------- manifests

READY = {'ready': True, 'serving': True, 'terminating': False}
TERMINATING = {'ready': False, 'serving': True, 'terminating': True}
UNREADY = {'ready': False, 'serving': False, 'terminating': False}
NODE_OF = {}
for _f in (V4, V6):
    NODE_OF.update({_f.a1: 'node-a', _f.a2: 'node-a', _f.b1: 'node-b', _f.b2: 'node-b', _f.c1: 'node-c'})


def nodes(tunnels=False, tunnel_addresses=None):
    out = []
    for i, letter in enumerate('abc'):
        name = 'node-' + letter
        v4 = (V4.node, V4.node_b, V4.node_c)[i]
        notes = {'projectcalico.org/IPv4Address': v4 + '/24'}
        if tunnel_addresses and name in tunnel_addresses:
            notes['projectcalico.org/IPv4IPIPTunnelAddr'] = tunnel_addresses[name]
        out.append({'apiVersion': 'v1', 'kind': 'Node', 'metadata': {'name': name, 'annotations': notes},
                    'spec': {'podCIDR': '10.244.%d.0/24' % (i + 1), 'podCIDRs': ['10.244.%d.0/24' % (i + 1), '2001:db8:244:%d::/64' % (i + 1)]},
                    'status': {'addresses': [{'type': 'InternalIP', 'address': v4},
                                             {'type': 'InternalIP', 'address': (V6.node, V6.node_b, V6.node_c)[i]}]}})
    return out


def pools(ipip='Never', nat=False):
    return [{'apiVersion': 'projectcalico.org/v3', 'kind': 'IPPool', 'metadata': {'name': name},
             'spec': {'cidr': cidr, 'blockSize': size, 'ipipMode': mode, 'vxlanMode': 'Never', 'natOutgoing': nat, 'nodeSelector': 'all()'}}
            for name, cidr, size, mode in (('pool4', '10.244.0.0/16', 26, ipip), ('pool6', '2001:db8:244::/48', 122, 'Never'))]


def pods(without=()):
    out = [{'apiVersion': 'v1', 'kind': 'Namespace', 'metadata': {'name': 'default', 'labels': {'kubernetes.io/metadata.name': 'default'}}}]
    for name in ('a1', 'a2', 'b1', 'b2', 'c1'):
        if name in without:
            continue
        v4, v6 = getattr(V4, name), getattr(V6, name)
        out.append({'apiVersion': 'v1', 'kind': 'Pod', 'metadata': {'name': name, 'namespace': 'default', 'labels': {'app': name}},
                    'spec': {'nodeName': NODE_OF[v4], 'containers': [{'name': 'main', 'image': 'example.invalid/app:1'}]},
                    'status': {'phase': 'Running', 'podIP': v4, 'podIPs': [{'ip': v4}, {'ip': v6}]}})
    return out


def service(f, name, backends, address=None, port=80, target=8080, protocol='TCP', node_port=None, **spec):
    """A Service and its slice; backends: addresses, or (address, conditions)."""
    address = address or f.vip
    p = {'name': 'p', 'port': port, 'protocol': protocol, 'targetPort': target}
    if node_port:
        p['nodePort'] = node_port
    status = spec.pop('status', None)
    s = {'apiVersion': 'v1', 'kind': 'Service', 'metadata': {'name': name, 'namespace': 'default'},
         'spec': {'type': 'NodePort' if node_port else 'ClusterIP', 'clusterIP': address, 'clusterIPs': [address],
                  'ipFamilies': ['IPv6' if f.six else 'IPv4'], 'ipFamilyPolicy': 'SingleStack', 'ports': [p], **spec}}
    if status:
        s['status'] = status
    return [s, slice_of(f, name, backends, target, protocol)]


def slice_of(f, name, backends, target=8080, protocol='TCP'):
    ends = []
    for b in backends:
        b, conditions = b if isinstance(b, tuple) else (b, READY)
        ends.append({'addresses': [b], 'conditions': conditions, **({'nodeName': NODE_OF[b]} if b in NODE_OF else {})})
    return {'apiVersion': 'discovery.k8s.io/v1', 'kind': 'EndpointSlice',
            'metadata': {'name': name + '-0', 'namespace': 'default', 'labels': {'kubernetes.io/service-name': name}},
            'addressType': 'IPv6' if f.six else 'IPv4', 'ports': [{'name': 'p', 'port': target, 'protocol': protocol}], 'endpoints': ends}


def policy(name, app, types, ingress=None, egress=None):
    return {'apiVersion': 'networking.k8s.io/v1', 'kind': 'NetworkPolicy', 'metadata': {'name': name, 'namespace': 'default'},
            'spec': {'podSelector': {'matchLabels': {'app': app}} if app else {}, 'policyTypes': types,
                     **({'ingress': ingress} if ingress is not None else {}), **({'egress': egress} if egress is not None else {})}}


def router(mtu=None, neighbours_without=(), **changes):
    """weir.yaml; mtu: {device: bytes}; changes replace or add top-level keys."""
    mtus = {UPLINK: 1500, POD1: 1500, POD2: 1500, HOST: 1500, **(mtu or {})}
    link = ['fe80::ecee:eeff:feee:eeee/64']
    neighbours = []
    for f in (V4, V6):
        neighbours += [(f.gateway, GATEWAY_MAC, UPLINK), (f.node_b, NODE_B_MAC, UPLINK), (f.lan, LAN_MAC, UPLINK),
                       (f.a1, POD1_MAC, POD1), (f.a2, POD2_MAC, POD2)]
    neighbours.append((V6.node_c, GATEWAY_MAC, UPLINK))
    return {'apiVersion': 'weir.dev/v1alpha1', 'kind': 'RouterConfig', 'nodeName': 'node-a', 'manifests': ['cluster.yaml'],
            'podCIDRs': ['10.244.0.0/16', '2001:db8:244::/48'], 'serviceCIDRs': ['10.96.0.0/16', '2001:db8:96::/112'],
            'devices': [{'name': UPLINK, 'role': 'uplink', 'mac': NODE_MAC, 'mtu': mtus[UPLINK],
                         'addresses': [V4.node + '/24', V6.node + '/64']},
                        {'name': POD1, 'role': 'workload', 'mac': VETH_MAC, 'mtu': mtus[POD1], 'addresses': link},
                        {'name': POD2, 'role': 'workload', 'mac': VETH_MAC, 'mtu': mtus[POD2], 'addresses': link},
                        {'name': HOST, 'role': 'host', 'mac': HOST_MAC, 'mtu': mtus[HOST]}],
            'routes': [{'to': '0.0.0.0/0', 'via': V4.gateway, 'device': UPLINK}, {'to': '::/0', 'via': V6.gateway, 'device': UPLINK}],
            'neighbors': [{'address': a, 'mac': m, 'device': d} for a, m, d in neighbours if a not in neighbours_without], **changes}


# ---------------------------------------------------------------- cases

CASES = {}


class Case:
    """One behaviour: a cluster, a router, and steps.  Time goes on by itself, 10 ms a step."""

    def __init__(self, name, doc, basis, *extra, ipip='Never', nat=False, mtu=None, without_pods=(), router_with=None, neighbours_without=(),
                 tunnel_addresses=None):
        assert name not in CASES, name
        CASES[name] = self
        self.name, self.t = name, 0.0
        self.base = nodes(tunnel_addresses=tunnel_addresses) + pools(ipip, nat) + pods(without_pods)
        self.cluster = self.base + flat(extra)
        self.router = router(mtu, neighbours_without, **(router_with or {}))
        mtus = {UPLINK: 1500, POD1: 1500, POD2: 1500, **(mtu or {})}
        self.reloads = []                        # (seconds, router, cluster)
        self.steps = {'doc': doc, 'basis': basis, 'mtus': mtus, 'steps': []}

    def step(self, inputs, expect=(), note='', at=None, after=0.01, any_of=None, connections=None, **more):
        """inputs: (device, packet), or (device, packet, eth), or a list of them; expect: what comes out; nothing: a counted drop."""
        self.t = round(at if at is not None else self.t + after, 6)
        inputs = inputs if isinstance(inputs, list) else [inputs]
        s = {'note': note, 't': self.t,
             'packets': [{'device': i[0], 'packet': frame(i[0], i[1], **(i[2] if len(i) > 2 else {}))} for i in inputs]}
        if any_of is not None:
            s['any_of'] = [list(x) for x in any_of]
        else:
            s['expect'] = list(expect)
            if not s['expect'] and not more.pop('quiet', False):
                s['drop'] = True
        if connections is not None:
            s['conntrack'] = connections if isinstance(connections, dict) else {'contains': list(connections), 'count': len(connections)}
        s.update(more)
        self.steps['steps'].append(s)
        return self

    def reload(self, seconds, *extra, router_with=None, cluster=None):
        """The configuration from `seconds` after the first packet on."""
        self.reloads.append((seconds, {**self.router, **(router_with or {})}, cluster if cluster is not None else self.base + flat(extra)))
        return self

    def write(self, folder):
        """Writes the case in the format of tests/cases/packets; what `weir replay` needs besides, for reloads, is given back."""
        os.makedirs(folder)

        def dump(name, value):
            with open(os.path.join(folder, name), 'w') as f:
                f.write(value if isinstance(value, str) else json.dumps(value, indent=1))
        dump('weir.yaml', self.router)
        dump('cluster.yaml', '\n---\n'.join(json.dumps(x, indent=1) for x in self.cluster))
        arguments = []
        for n, (seconds, router_n, cluster) in enumerate(self.reloads, 1):
            dump('weir-%d.yaml' % n, {**router_n, 'manifests': ['cluster-%d.yaml' % n]})
            dump('cluster-%d.yaml' % n, '\n---\n'.join(json.dumps(x, indent=1) for x in cluster))
            arguments += ['--config-at', '%s=%s' % (seconds, os.path.join(folder, 'weir-%d.yaml' % n))]
        dump('steps.json', self.steps)
        return arguments


def flat(x):
    out = []
    for y in x:
        out += flat(y) if isinstance(y, (list, tuple)) else [y]
    return out


def both(function):
    """Runs a function that makes cases for each address family."""
    for f in (V4, V6):
        function(f)
    return function
