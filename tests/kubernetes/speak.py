#!/usr/bin/python3
"""What a router says to a real API server, with the role of configs/kubernetes/rbac.yaml and no more: pods' addresses, its Node, what is at fault.

usage: speak.py WEIR WEIR-CNI BINARIES. Needs root: the router and a pod are in network namespaces of their own.
"""
import json, os, shutil, subprocess, sys, tempfile, time
import yaml
from live import Node, sh
from run import Cluster

TAINT = "example.com/network-not-ready"
POD_IP, POD_IPS = "cni.projectcalico.org/podIP", "cni.projectcalico.org/podIPs"
RBAC = "apis/rbac.authorization.k8s.io/v1"

class Maker:
    """A container runtime, as far as its CNI plugin sees one."""
    def __init__(self, plugin, socket, folder):
        self.plugin, self.folder = plugin, folder
        self.configuration = json.dumps({"cniVersion": "1.1.0", "name": "weir", "type": "weir-cni", "socket": socket})
        self.made = []

    def run(self, command, name, uid, netns):
        environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": f"sandbox-{name}", "CNI_IFNAME": "eth0", "CNI_NETNS": f"/run/netns/{netns}", "CNI_PATH": "/opt/cni/bin",
                       "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={name};K8S_POD_UID={uid}"}
        begin = time.monotonic()
        ran = subprocess.run([self.plugin], input=self.configuration, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command} of {name}: {ran.stdout}{ran.stderr}"
        return json.loads(ran.stdout) if ran.stdout else None, time.monotonic() - begin

    def add(self, name, uid):
        netns = f"weirp{os.getpid()}{name}"
        sh("ip", "netns", "add", netns)
        self.made.append(netns)
        answer, took = self.run("ADD", name, uid, netns)
        return answer["ips"][0]["address"], took

    def delete(self, name, uid):
        self.run("DEL", name, uid, f"weirp{os.getpid()}{name}")

    def down(self):
        for netns in self.made:
            subprocess.run(["ip", "netns", "del", netns])

def get(cluster, path):
    code, answer = cluster.ask("GET", path)
    assert code == 200, answer
    return json.loads(answer)

def make(cluster, path, body):
    code, answer = cluster.ask("POST", path, body)
    assert code == 201, answer
    return json.loads(answer)

def patch(cluster, path, body):
    code, answer = cluster.ask("PATCH", path, body, "application/merge-patch+json")
    assert code == 200, answer

def condition(cluster, path, kind):
    found = [one for one in get(cluster, path)["status"].get("conditions") or [] if one["type"] == kind]
    return (found[0]["status"], found[0]["reason"]) if found else None

def pod(cluster, name, node):
    body = {"metadata": {"name": name}, "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}}
    return make(cluster, "api/v1/namespaces/default/pods", body)["metadata"]["uid"]

def annotations(cluster, name):
    known = get(cluster, f"api/v1/namespaces/default/pods/{name}")["metadata"].get("annotations") or {}
    return known.get(POD_IP), known.get(POD_IPS)

def events(cluster, kind, name):
    found = get(cluster, "apis/events.k8s.io/v1/events")["items"]
    return [one for one in found if (one["regarding"]["kind"], one["regarding"]["name"]) == (kind, name)]

def main():
    weir, plugin, binaries = (os.path.abspath(path) for path in sys.argv[1:])
    folder = tempfile.mkdtemp(prefix="weir-kubernetes-")
    cluster, node, maker = Cluster(binaries, folder), None, None
    try:
        server = cluster.up()
        with open(os.path.join(binaries, "cnp-crds.yaml")) as file:
            for document in filter(None, yaml.safe_load_all(file)):
                make(cluster, "apis/apiextensions.k8s.io/v1/customresourcedefinitions", document)
        policies = "apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies"
        node = Node(weir, folder, cluster.kubeconfig("kubeconfig-node", "198.18.0.1"))
        with open(node.config) as file:
            config = json.load(file)
        config["kubernetes"]["startupTaint"] = TAINT
        socket = os.path.join(folder, "cni.sock")
        config["cni"] = {"socket": socket, "state": os.path.join(folder, "pods"), "coolDown": 0}
        with open(node.config, "w") as file:
            json.dump(config, file)
        maker = Maker(plugin, socket, folder)
        own = f"api/v1/nodes/{node.name}"
        taints = [{"key": TAINT, "effect": "NoSchedule"}, {"key": "other", "effect": "NoSchedule"}]
        make(cluster, "api/v1/nodes", {"metadata": {"name": node.name}, "spec": {"podCIDR": "10.77.0.0/24", "podCIDRs": ["10.77.0.0/24"], "taints": taints}})
        patch(cluster, own + "/status", {"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}]}})
        account = {"metadata": {"name": "default"}}
        cluster.ask("POST", "api/v1/namespaces/default/serviceaccounts", account)

        # What it may not write, it says in its status; all else works.
        role = get(cluster, f"{RBAC}/clusterroles/weir")
        reading = [rule for rule in role["rules"] if rule["verbs"] == ["list", "watch"]]
        assert len(reading) < len(role["rules"])
        patch(cluster, f"{RBAC}/clusterroles/weir", {"rules": reading})
        lease_role = f"{RBAC}/namespaces/kube-system/roles/weir"
        leases = get(cluster, lease_role)["rules"]
        patch(cluster, lease_role, {"rules": []})
        spec = {"tier": "Admin", "priority": 10, "subject": {"namespaces": {}},
                "egress": [{"action": "Accept", "to": [{"domainNames": ["example.com"]}]}]}
        make(cluster, policies, {"apiVersion": "policy.networking.k8s.io/v1beta1", "kind": "ClusterNetworkPolicy", "metadata": {"name": "by-name"}, "spec": spec})
        node.start()
        def speaking():
            return ((node.status() or {}).get("kubernetes") or {}).get("speaking") or {}
        def is_forbidden(what):
            return "403" in (speaking().get(what, {}).get("problem") or "")
        node.until("without the right to write, its Node is told of as forbidden", lambda: is_forbidden("node"))
        node.until("and what is at fault", lambda: is_forbidden("faults"))
        uid = pod(cluster, "forbidden", node.name)
        _, took = maker.add("forbidden", uid)
        node.until("and a pod's addresses, but the pod is there", lambda: is_forbidden("podAddresses"))
        assert annotations(cluster, "forbidden") == (None, None)
        assert condition(cluster, own, "NetworkUnavailable")[0] == "True" and not events(cluster, "ClusterNetworkPolicy", "by-name")
        maker.delete("forbidden", uid)
        patch(cluster, f"{RBAC}/clusterroles/weir", {"rules": role["rules"]})
        patch(cluster, lease_role, {"rules": leases})
        node.process.terminate()
        node.process.wait()

        node.start()
        up = ("False", "WeirIsUp")
        node.until("the Node's network is there", lambda: condition(cluster, own, "NetworkUnavailable") == up)
        node.until("the startup taint is off", lambda: [taint["key"] for taint in get(cluster, own)["spec"]["taints"]] == ["other"])
        patch(cluster, own + "/status", {"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}]}})
        node.until("what says otherwise is set right", lambda: condition(cluster, own, "NetworkUnavailable") == up)

        uid = pod(cluster, "web", node.name)
        address, took = maker.add("web", uid)
        # The plugin's answer has waited for it.
        assert annotations(cluster, "web") == (address, address), (address, annotations(cluster, "web"))
        print(f"an ADD with the address on the pod: {took * 1000:.0f} ms, {address}", flush=True)
        maker.delete("web", uid)
        node.until("the address is taken back", lambda: annotations(cluster, "web") == ("", ""))

        # A pod of the same name that is another has nothing written on it.
        address, _ = maker.add("web2", "00000000-0000-0000-0000-000000000000")
        pod(cluster, "web2", node.name)
        assert annotations(cluster, "web2") == (None, None)

        faulty = ("False", "Faulty")
        of_policy = f"{policies}/by-name"
        node.until("a policy that is refused has an event", lambda: events(cluster, "ClusterNetworkPolicy", "by-name"))
        event = events(cluster, "ClusterNetworkPolicy", "by-name")[0]
        assert event["metadata"]["namespace"] == "default" and "domainNames" in event["note"] and event["regarding"]["uid"], event
        node.until("and a condition", lambda: condition(cluster, of_policy, "weir/Accepted") == faulty)
        service = "api/v1/namespaces/default/services/balanced"
        make(cluster, "api/v1/namespaces/default/services", {"metadata": {"name": "balanced"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}})
        patch(cluster, service + "/status", {"status": {"loadBalancer": {"ingress": [{"ip": "127.0.0.2"}]}}})
        node.until("a service at fault has a condition", lambda: condition(cluster, service, "weir/Accepted") == faulty)
        node.until("and an event", lambda: events(cluster, "Service", "balanced"))
        lease = get(cluster, "apis/coordination.k8s.io/v1/namespaces/kube-system/leases/weir")
        assert lease["spec"]["holderIdentity"] == node.name, lease
        patch(cluster, service + "/status", {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.77"}]}}})
        node.until("a fault that ends is accepted again", lambda: condition(cluster, service, "weir/Accepted") == ("True", "Accepted"))
        told = speaking()
        assert all(told[what]["problem"] is None for what in ("podAddresses", "node", "faults")), told

        # Without an API server pods are made as ever; what is to be said is said later.
        uid = pod(cluster, "later", node.name)
        node.until("the pod is known", lambda: any(kind["kind"] == "pods" and kind["objects"] >= 4 for kind in node.status()["kubernetes"]["kinds"]))
        server.kill()
        server.wait()
        address, took = maker.add("later", uid)
        print(f"an ADD without an API server: {took * 1000:.0f} ms", flush=True)
        server = cluster.api()
        node.until("the address is written when it is there again", lambda: annotations(cluster, "later") == (address, address))

        # It ends well, and gives back what it has alone.
        node.process.terminate()
        assert node.process.wait(20) == 0
        lease = get(cluster, "apis/coordination.k8s.io/v1/namespaces/kube-system/leases/weir")
        assert not lease["spec"]["holderIdentity"], lease
        node.start()
        node.until("the next run counts the event up", lambda: (events(cluster, "ClusterNetworkPolicy", "by-name")[0].get("series") or {}).get("count", 0) >= 2)
        print(json.dumps(speaking()))
    finally:
        if node:
            node.down()
        if maker:
            maker.down()
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)

main()
