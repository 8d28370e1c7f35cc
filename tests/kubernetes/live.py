#!/usr/bin/python3
"""A router that follows a real API server: changes come into force, and go on doing so through kill -9, compaction, and a day without anybody.

usage: live.py WEIR BINARIES. Needs root: the router runs in a network namespace of its own.
"""
import json, os, shutil, subprocess, sys, tempfile, time
from run import Cluster

PATIENCE = 90

def sh(*arguments):
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

class Node:
    """A namespace with an uplink to the API server."""
    def __init__(self, weir, folder, kubeconfig):
        self.weir, self.name, self.process = weir, f"weirk{os.getpid()}", None
        self.config = os.path.join(folder, "weir.yaml")
        sh("ip", "netns", "add", self.name)
        sh("ip", "link", "add", f"wk{os.getpid()}", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        sh("ip", "addr", "add", "198.18.0.1/24", "dev", f"wk{os.getpid()}")
        sh("ip", "link", "set", f"wk{os.getpid()}", "up")
        sh("ip", "-n", self.name, "addr", "add", "198.18.0.2/24", "dev", "eth0")
        sh("ip", "-n", self.name, "link", "set", "eth0", "up")
        sh("ip", "-n", self.name, "link", "set", "lo", "up")
        with open(self.config, "w") as file:
            json.dump({"nodeName": self.name, "kubernetes": {"kubeconfig": kubeconfig}, "state": os.path.join(folder, "state"),
                       "devices": [{"name": "eth0", "role": "uplink"}], "workers": {"cores": [0]}}, file)
        self.log = open(os.path.join(folder, "weir.log"), "ab")

    def start(self):
        self.process = subprocess.Popen(["nsenter", f"--net=/run/netns/{self.name}", self.weir, "run", "-c", self.config], stdout=self.log, stderr=self.log)

    def ask(self, *arguments):
        ran = subprocess.run(["nsenter", f"--net=/run/netns/{self.name}", self.weir, *arguments, "-c", self.config], capture_output=True, text=True)
        return ran.stdout if ran.returncode == 0 else ""

    def status(self):
        text = self.ask("status", "--output", "json")
        return json.loads(text) if text else None

    def services(self):
        return self.ask("services")

    def until(self, what, holds, patience=PATIENCE):
        begin = time.monotonic()
        while not holds():
            if self.process.poll() is not None or time.monotonic() - begin > patience:
                self.log.flush()
                with open(self.log.name) as file:
                    raise SystemExit(f"{what}: not so within {patience} s\n{json.dumps((self.status() or {}).get('kubernetes'), indent=1)}\n{file.read()[-3000:]}")
            time.sleep(0.02)
        took = time.monotonic() - begin
        print(f"{what}: after {took:.2f} s", flush=True)
        return took

    def down(self):
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        subprocess.run(["nsenter", f"--net=/run/netns/{self.name}", self.weir, "detach", "-c", self.config], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name])

def service(cluster, name):
    code, answer = cluster.ask("POST", "api/v1/namespaces/default/services", {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}})
    assert code == 201, answer

def main():
    weir, binaries = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    folder = tempfile.mkdtemp(prefix="weir-kubernetes-")
    cluster, node = Cluster(binaries, folder), None
    try:
        server = cluster.up("--etcd-compaction-interval=0")
        kubeconfig = cluster.kubeconfig("kubeconfig-node", "198.18.0.1")
        node = Node(weir, folder, kubeconfig)
        assert cluster.ask("POST", "api/v1/nodes", {"metadata": {"name": node.name}})[0] == 201
        service(cluster, "first")
        node.start()
        node.until("the router runs with what the API server has", lambda: "default/first" in node.services())
        for number in range(5):
            service(cluster, f"more-{number}")
            node.until(f"service {number} is in force", lambda: f"default/more-{number}" in node.services())

        server.kill()
        server.wait()
        node.until("it is told that the API server is gone", lambda: any(kind["problem"] for kind in node.status()["kubernetes"]["kinds"]))
        assert "default/first" in node.services() and node.status()["kubernetes"]["inForce"]
        server = cluster.api("--etcd-compaction-interval=0")
        service(cluster, "after-kill")
        node.until("after kill -9 of the API server changes come again", lambda: "default/after-kill" in node.services())

        # What the watches would go on from is gone when the server is back.
        server.kill()
        server.wait()
        cluster.compact()
        server = cluster.api("--etcd-compaction-interval=0")
        assert cluster.ask("DELETE", "api/v1/namespaces/default/services/more-0")[0] == 200
        cluster.compact()
        node.until("after compaction what was deleted is gone", lambda: "default/more-0" not in node.services() and "default/first" in node.services())

        # A server without streaming lists.
        server.kill()
        server.wait()
        server = cluster.api("--etcd-compaction-interval=0", "--feature-gates=WatchList=false")
        node.process.terminate()
        node.process.wait()
        node.start()
        node.until("a start from a server without streaming lists", lambda: "default/after-kill" in node.services())
        service(cluster, "paged")
        node.until("its changes are in force", lambda: "default/paged" in node.services())

        # A node that starts while nobody answers.
        server.kill()
        server.wait()
        time.sleep(2)
        node.process.terminate()
        node.process.wait()
        node.start()
        node.until("a start without an API server, from what was kept", lambda: "default/paged" in node.services())
        assert node.status()["kubernetes"]["staleSinceUnixSeconds"]
        server = cluster.api("--etcd-compaction-interval=0", "--feature-gates=WatchList=false")
        node.until("it is told that it is not stale any more", lambda: node.status()["kubernetes"]["staleSinceUnixSeconds"] is None)

        # Kinds that come later.
        for kind, plural, namespaced in (("GlobalNetworkPolicy", "globalnetworkpolicies", False), ("Tier", "tiers", False)):
            cluster.define("crd.projectcalico.org", "v1", kind, plural, namespaced)
        node.until("a group that came later is followed", lambda: any("globalnetworkpolicies" in kind["kind"] for kind in node.status()["kubernetes"]["kinds"]), 100)
        print(json.dumps(node.status()["kubernetes"]))
    finally:
        if node:
            node.down()
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)

if __name__ == "__main__":
    main()
