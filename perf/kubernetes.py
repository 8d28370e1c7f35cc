#!/usr/bin/python3
"""How weir follows a large cluster: a real kube-apiserver and etcd are filled, and one router follows them.

usage: kubernetes.py WEIR BINARIES [NODES PODS SERVICES ENDPOINTS POLICIES]   (1000 50000 10000 100000 5000)
BINARIES: the folder with kube-apiserver and etcd (`make cluster-build`). Needs root: the router runs in a network namespace of its own.

It says how long it takes from the router's start to everything in force, what memory that needs, how long a changed EndpointSlice takes to be in
force while 50 a second change, and what the router costs while 50 pods a second change elsewhere in the cluster.
"""
import http.client, json, multiprocessing, os, shutil, socket, ssl, sys, tempfile, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../tests/kubernetes"))
from live import Node
from run import Cluster

WRITERS = 8
MERGE = "application/merge-patch+json"

class Api:
    def __init__(self, folder, port):
        context = ssl.create_default_context(cafile=os.path.join(folder, "ca.crt"))
        context.load_cert_chain(os.path.join(folder, "admin.crt"), os.path.join(folder, "admin.key"))
        self.connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=120)

    def ask(self, method, path, body, content="application/json"):
        self.connection.request(method, "/" + path, json.dumps(body), {"Content-Type": content})
        answer = self.connection.getresponse()
        text = answer.read()
        assert answer.status < 300, f"{method} {path}: {answer.status} {text[:300]}"

def address(number):
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"

# What a kubelet and a controller write besides what weir reads: objects of a real cluster are some 4 to 6 KB.
PADDING = [{"name": f"VARIABLE_{n}", "value": "v" * 60} for n in range(24)]

def node(n):
    name = f"node-{n}"
    yield "POST", "api/v1/nodes", {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": f"zone-{n % 3}"}},
                                   "spec": {"podCIDR": address(1 << 20 | n << 8) + "/24", "podCIDRs": [address(1 << 20 | n << 8) + "/24"]}}, None
    yield "PATCH", f"api/v1/nodes/{name}/status", {"status": {
        "addresses": [{"type": "InternalIP", "address": f"172.{16 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"}, {"type": "Hostname", "address": name}],
        "images": [{"names": [f"registry.example/image-{i}@sha256:{'0' * 64}"], "sizeBytes": 1 << 20} for i in range(20)]}}, MERGE

def pod(p, nodes, namespaces):
    n, name, namespace = p % nodes, f"pod-{p}", f"ns-{p // 10 % namespaces}"
    app = p % 10
    yield "POST", f"api/v1/namespaces/{namespace}/pods", {
        "metadata": {"name": name, "labels": {"app": f"app-{app}", "tier": f"tier-{p % 3}", "pod-template-hash": f"{p // 10 % namespaces:x}{app}"},
                     "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"app-{app}", "uid": f"00000000-0000-0000-0000-{p:012}", "controller": True}]},
        "spec": {"nodeName": f"node-{n}", "terminationGracePeriodSeconds": 30,
                 "containers": [{"name": "main", "image": "registry.example/app:1", "env": PADDING, "ports": [{"name": "web", "containerPort": 8080}]}]}}, None
    yield "PATCH", f"api/v1/namespaces/{namespace}/pods/{name}/status", {"status": {
        "phase": "Running", "podIP": address(1 << 20 | n << 8 | 10 + p // nodes), "podIPs": [{"ip": address(1 << 20 | n << 8 | 10 + p // nodes)}],
        "conditions": [{"type": t, "status": "True"} for t in ("Initialized", "Ready", "ContainersReady", "PodScheduled")]}}, MERGE

def slice_body(s, per_service, pods, nodes, changed=0):
    endpoints = []
    for e in range(per_service):
        p = (s * per_service + e) % pods
        endpoints.append({"addresses": [address(1 << 20 | p % nodes << 8 | 10 + p // nodes)], "nodeName": f"node-{p % nodes}", "zone": f"zone-{p % nodes % 3}",
                          "conditions": {"ready": True, "serving": True, "terminating": False}, "targetRef": {"kind": "Pod", "name": f"pod-{p}", "namespace": "x"}})
    if not changed:
        return {"endpoints": endpoints}
    endpoints[0]["addresses"] = [address(2 << 20 | changed)]
    now = time.time_ns()
    seen = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9:09}Z"
    return {"endpoints": endpoints, "metadata": {"annotations": {"endpoints.kubernetes.io/last-change-trigger-time": seen}}}

def service(s, per_service, pods, nodes, namespaces):
    name, namespace = f"service-{s}", f"ns-{s % namespaces}"
    yield "POST", f"api/v1/namespaces/{namespace}/services", {"metadata": {"name": name}, "spec": {"selector": {"app": f"app-{s % 10}"}, "ports": [{"name": "web", "port": 80, "targetPort": 8080}]}}, None
    yield "POST", f"apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices", {
        "metadata": {"name": name + "-x", "labels": {"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}},
        "addressType": "IPv4", "ports": [{"name": "web", "port": 8080}]} | slice_body(s, per_service, pods, nodes), None

def policy(q, namespaces):
    namespace, app = f"ns-{q % namespaces}", q // namespaces % 10
    yield "POST", f"apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies", {
        "metadata": {"name": f"policy-{q}"},
        "spec": {"podSelector": {"matchLabels": {"app": f"app-{app}"}}, "policyTypes": ["Ingress"], "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"tier": f"tier-{q % 3}"}}}, {"namespaceSelector": {"matchLabels": {"team": f"team-{q % 20}"}}},
                      {"ipBlock": {"cidr": "192.168.0.0/16", "except": [f"192.168.{q % 250}.0/24"]}}], "ports": [{"port": "web"}, {"port": 9000 + q % 10}]}]}}, None

def write(arguments):
    folder, port, kind, numbers, more = arguments
    api = Api(folder, port)
    for number in numbers:
        for method, path, body, content in kind(number, *more):
            api.ask(method, path, body, content or "application/json")

def namespace(n):
    yield "POST", "api/v1/namespaces", {"metadata": {"name": f"ns-{n}", "labels": {"team": f"team-{n % 20}"}}}, None

def fill(cluster, kind, count, *more):
    begin = time.monotonic()
    with multiprocessing.Pool(WRITERS) as pool:
        shares = [(cluster.folder, cluster.port, kind, range(first, count, WRITERS * 8), more) for first in range(WRITERS * 8)]
        for _ in pool.imap_unordered(write, shares):
            pass
    print(f"  {kind.__name__}: {count} in {time.monotonic() - begin:.0f} s", flush=True)

def memory(pid):
    with open(f"/proc/{pid}/status") as file:
        return {line.split(":")[0]: int(line.split()[1]) / 1000 for line in file if line.startswith(("VmRSS", "VmHWM"))}

def cpu(pid):
    """Seconds that its threads ran, to the nanosecond: ticks of 10 ms would be too coarse."""
    spent = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                spent += int(file.read().split()[0])
        except FileNotFoundError:
            pass
    return spent / 1e9

def backends(name, which):
    """Asks the router for one service, as `weir services` does: it answers from what is in force."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(f"/run/weir/{name}.sock")
        stream.sendall((json.dumps({"services": {"of": which}}) + "\n").encode())
        text = b""
        while part := stream.recv(1 << 16):
            text += part
    return text.decode()

def changes(cluster, router, sizes, per_service, namespaces, rate=50, seconds=60, looked_at=10):
    nodes, pods, services = sizes
    api, took, lock = Api(cluster.folder, cluster.port), [], threading.Lock()
    begin, number, watchers = time.monotonic(), 0, []
    def watch(service, wanted, written):
        until = time.monotonic() + 10
        while f"{wanted}:" not in backends(router.name, service):
            if time.monotonic() > until:
                raise SystemExit(f"{service}: {wanted} is not in force after 10 s")
            time.sleep(0.001)
        with lock:
            took.append(time.monotonic() - written)
    while time.monotonic() - begin < seconds:
        number += 1
        s = number * 7919 % services
        path = f"apis/discovery.k8s.io/v1/namespaces/ns-{s % namespaces}/endpointslices/service-{s}-x"
        written = time.monotonic()
        if number % looked_at == 0:
            watchers.append(threading.Thread(target=watch, args=(f"ns-{s % namespaces}/service-{s}", address(2 << 20 | number), written)))
            watchers[-1].start()
        api.ask("PATCH", path, slice_body(s, per_service, pods, nodes, number), MERGE)
        time.sleep(max(0, begin + number / rate - time.monotonic()))
    for watcher in watchers:
        watcher.join()
    if len(took) < len(watchers):
        raise SystemExit(f"{len(watchers) - len(took)} of {len(watchers)} changes never came into force")
    took.sort()
    at = lambda part: took[min(len(took) - 1, int(len(took) * part))] * 1000
    print(f"a changed slice in force, {number / seconds:.0f} changes a second: p50 {at(.5):.0f} ms, p99 {at(.99):.0f} ms, most {at(1):.0f} ms ({len(took)} of {number} looked at)", flush=True)
    print(f"  by the router's own measure, from what the slices say: {json.dumps(router.status().get('networkProgramming'))}", flush=True)

def elsewhere(cluster, router, pods, namespaces, rate=50, seconds=30):
    api = Api(cluster.folder, cluster.port)
    before, begin = cpu(router.process.pid), time.monotonic()
    for number in range(rate * seconds):
        p = number * 7919 % pods
        api.ask("PATCH", f"api/v1/namespaces/ns-{p // 10 % namespaces}/pods/pod-{p}", {"metadata": {"labels": {"version": f"v{number}"}}}, MERGE)
        time.sleep(max(0, begin + (number + 1) / rate - time.monotonic()))
    spent, passed = cpu(router.process.pid) - before, time.monotonic() - begin
    print(f"{rate * seconds / passed:.0f} pod changes a second elsewhere: {spent / passed:.3f} CPU", flush=True)

def beats(cluster, router, nodes, rate=50, seconds=20):
    """Heartbeats of nodes, which change nothing that weir reads."""
    api = Api(cluster.folder, cluster.port)
    before, begin = cpu(router.process.pid), time.monotonic()
    count = rate * seconds
    for number in range(count):
        api.ask("PATCH", f"api/v1/nodes/node-{number % nodes}/status", {"status": {"conditions": [{"type": "Ready", "status": "True", "reason": f"r{number}"}]}}, MERGE)
        time.sleep(max(0, begin + (number + 1) / rate - time.monotonic()))
    spent, passed = cpu(router.process.pid) - before, time.monotonic() - begin
    idle_before, idle_begin = cpu(router.process.pid), time.monotonic()
    time.sleep(10)
    idle = (cpu(router.process.pid) - idle_before) / (time.monotonic() - idle_begin)
    print(f"a heartbeat of a node, TLS and JSON included: {(spent - idle * passed) / count * 1e6:.0f} us (idle: {idle:.4f} CPU)", flush=True)

def main():
    weir, binaries = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    nodes, pods, services, endpoints, policies = [int(n) for n in sys.argv[3:8]] or [1000, 50_000, 10_000, 100_000, 5000]
    namespaces, per_service = max(1, pods // 100), max(1, endpoints // services)
    folder = tempfile.mkdtemp(prefix="weir-large-")
    cluster, router = Cluster(binaries, folder), None
    try:
        # One client writes faster than a server allows by default.
        cluster.up("--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000")
        print(f"{nodes} nodes, {pods} pods, {services} services, {endpoints} endpoints, {policies} policies:", flush=True)
        fill(cluster, namespace, namespaces)
        fill(cluster, node, nodes)
        fill(cluster, pod, pods, nodes, namespaces)
        fill(cluster, service, services, per_service, pods, nodes, namespaces)
        fill(cluster, policy, policies, namespaces)
        router = Node(weir, folder, cluster.kubeconfig("kubeconfig-node", "198.18.0.1"))
        begin = time.monotonic()
        router.start()
        router.until("first list in force (goal 20 s)", lambda: (router.status() or {}).get("generation") is not None, 600)
        pid = router.process.pid
        time.sleep(20)
        print(f"memory: {memory(pid)['VmRSS']:.0f} MB after 20 s, {memory(pid)['VmHWM']:.0f} MB at most (goal 400)", flush=True)
        changes(cluster, router, (nodes, pods, services), per_service, namespaces)
        elsewhere(cluster, router, pods, namespaces)
        beats(cluster, router, nodes)
        print(f"memory: {memory(pid)['VmRSS']:.0f} MB at the end; load {os.getloadavg()[0]:.1f}", flush=True)
        print(router.ask("verify"), end="", flush=True)
    finally:
        if router:
            router.down()
        cluster.down()
        shutil.rmtree(folder)

if __name__ == "__main__":
    main()
