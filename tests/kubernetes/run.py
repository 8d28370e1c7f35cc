#!/usr/bin/python3
"""The conformance cases of tests/cases by way of a real kube-apiserver and etcd: the same verdicts as from files.

usage: run.py WEIR BINARIES [SUITE...]
BINARIES: the folder with kube-apiserver and etcd (`make cluster-build`). Neither root nor a network is needed.
"""
import http.client, json, os, shutil, signal, socket, ssl, subprocess, sys, tempfile, time
from collections import Counter
import yaml

HERE = os.path.dirname(os.path.abspath(__file__))
CALICO = [("IPPool", "ippools", False), ("GlobalNetworkPolicy", "globalnetworkpolicies", False), ("NetworkPolicy", "networkpolicies", True),
          ("Tier", "tiers", False), ("GlobalNetworkSet", "globalnetworksets", False), ("NetworkSet", "networksets", True),
          ("HostEndpoint", "hostendpoints", False), ("Profile", "profiles", False), ("FelixConfiguration", "felixconfigurations", False)]

# Cluster IPs that cases have outside of the server's own range.
RANGES = ["10.0.0.0/9", "10.254.0.0/16", "172.16.0.0/12", "2001:db8:85a3::/64", "2001:db8:96::/64", "fd00:172:30::/64", "fd00:10:96::/64"]

def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

def certificates(folder):
    """An authority, a server's and an operator's certificate, a key for service accounts."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test", "-days", "2")
    for name, subject, more in (("server", "/CN=kube-apiserver", "subjectAltName=IP:127.0.0.1,IP:198.18.0.1,DNS:localhost,DNS:kubernetes.default.svc"),
                                ("admin", "/O=system:masters/CN=admin", "extendedKeyUsage=clientAuth"),
                                # As weir is in a cluster, with no more rights than that.
                                ("weir", "/CN=system:serviceaccount:kube-system:weir", "extendedKeyUsage=clientAuth")):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        with open(os.path.join(folder, f"{name}.ext"), "w") as file:
            file.write(more + "\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.crt", "-days", "2", "-extfile", f"{name}.ext")
    openssl("genrsa", "-out", "accounts.key", "2048")

class Cluster:
    def __init__(self, binaries, folder):
        self.binaries, self.folder, self.started = binaries, folder, []
        certificates(folder)
        self.port, self.etcd, self.peer = free_port(), free_port(), free_port()
        at = lambda name: os.path.join(folder, name)
        self.kubeconfig("kubeconfig", "127.0.0.1")
        with open(at("server.json"), "w") as file:
            json.dump({"host": "127.0.0.1", "port": self.port, "ca": at("ca.crt"), "cert": at("admin.crt"), "key": at("admin.key"),
                       "kubeconfig": at("kubeconfig"), "calico": CALICO, "ranges": RANGES}, file)

    def kubeconfig(self, name, host):
        at = lambda name: os.path.join(self.folder, name)
        kubeconfig = {"apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                      "clusters": [{"name": "c", "cluster": {"server": f"https://{host}:{self.port}", "certificate-authority": at("ca.crt")}}],
                      "users": [{"name": "u", "user": {"client-certificate": at("weir.crt"), "client-key": at("weir.key")}}]}
        with open(at(name), "w") as file:
            json.dump(kubeconfig, file)
        return at(name)

    def start(self, name, *arguments):
        log = open(os.path.join(self.folder, name + ".log"), "ab")
        process = subprocess.Popen([os.path.join(self.binaries, name), *arguments], stdout=log, stderr=log, cwd=self.folder)
        self.started.append(process)
        return process

    def up(self, *more):
        self.start("etcd", "--data-dir", os.path.join(self.folder, "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
                   "--listen-client-urls", f"http://127.0.0.1:{self.etcd}", "--advertise-client-urls", f"http://127.0.0.1:{self.etcd}",
                   "--listen-peer-urls", f"http://127.0.0.1:{self.peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{self.peer}",
                   "--initial-cluster", f"default=http://127.0.0.1:{self.peer}")
        server = self.api(*more)
        with open(os.path.join(HERE, "../../configs/kubernetes/rbac.yaml")) as file:
            for document in yaml.safe_load_all(file):
                version, namespace = document["apiVersion"], document["metadata"].get("namespace")
                path = f"{'apis' if '/' in version else 'api'}/{version}/{f'namespaces/{namespace}/' if namespace else ''}{document['kind'].lower()}s"
                code, answer = self.ask("POST", path, document)
                assert code == 201, answer
        return server

    def api(self, *more):
        server = self.start("kube-apiserver", "--bind-address=0.0.0.0", "--advertise-address=192.0.2.1", f"--secure-port={self.port}",
                   f"--etcd-servers=http://127.0.0.1:{self.etcd}", "--authorization-mode=RBAC", "--allow-privileged=true",
                   "--disable-admission-plugins=ServiceAccount", "--client-ca-file=ca.crt", "--tls-cert-file=server.crt", "--tls-private-key-file=server.key",
                   "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=accounts.key",
                   "--service-account-signing-key-file=accounts.key", "--service-cluster-ip-range=10.255.0.0/16,fd00:255::/112", "--service-node-port-range=1-65535",
                   "--endpoint-reconciler-type=none", *more)
        until = time.monotonic() + 120
        while True:
            try:
                if self.ask("GET", "readyz")[0] == 200 and self.ask("GET", "api/v1/namespaces/default")[0] == 200:
                    return server
            except OSError:
                pass
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the API server does not come up; its log: {self.log('kube-apiserver')}")
            time.sleep(0.2)

    def compact(self):
        """All versions but the last are gone."""
        def etcd(path, body):
            connection = http.client.HTTPConnection("127.0.0.1", self.etcd, timeout=30)
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        revision = etcd("/v3/kv/range", {"key": "AA=="})["header"]["revision"]
        etcd("/v3/kv/compaction", {"revision": revision, "physical": True})

    def log(self, name):
        with open(os.path.join(self.folder, name + ".log")) as file:
            return file.read()[-3000:]

    def ask(self, method, path, body=None, content="application/json"):
        context = ssl.create_default_context(cafile=os.path.join(self.folder, "ca.crt"))
        context.load_cert_chain(os.path.join(self.folder, "admin.crt"), os.path.join(self.folder, "admin.key"))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=30)
        connection.request(method, "/" + path, json.dumps(body) if body is not None else None, {"Content-Type": content})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def define(self, group, version, kind, plural, namespaced):
        body = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": f"{plural}.{group}"},
                "spec": {"group": group, "scope": "Namespaced" if namespaced else "Cluster",
                         "names": {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": kind + "List"},
                         "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": {
                             "type": "object", "x-kubernetes-preserve-unknown-fields": True}}}]}}
        if group == "policy.networking.k8s.io":
            # The group is Kubernetes' own, and asks for that.
            body["metadata"]["annotations"] = {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/network-policy-api/pull/300"}
        code, answer = self.ask("POST", "apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)
        assert code == 201, answer
        until = time.monotonic() + 60
        while self.ask("GET", f"apis/{group}/{version}/{plural}")[0] != 200:
            assert time.monotonic() < until, f"{plural} is not served"
            time.sleep(0.1)

    def down(self):
        for process in reversed(self.started):
            process.kill()
            process.wait()

def main():
    weir, binaries, suites = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]), sys.argv[3:] or ["kubeproxy", "netpol", "calicopol", "cnp", "selector"]
    folder = tempfile.mkdtemp(prefix="weir-kubernetes-")
    cluster = Cluster(binaries, folder)
    failed = False
    try:
        cluster.up()
        for kind, plural, namespaced in CALICO:
            cluster.define("crd.projectcalico.org", "v1", kind, plural, namespaced)
        cluster.define("policy.networking.k8s.io", "v1beta1", "ClusterNetworkPolicy", "clusternetworkpolicies", False)
        for suite in suites:
            report = os.path.join(folder, suite + ".jsonl")
            environment = dict(os.environ, WEIR=weir, REPORT=report, KUBECONFIG_JSON=os.path.join(folder, "server.json"))
            begin = time.monotonic()
            ran = subprocess.run([sys.executable, os.path.join(HERE, "../cases/conform.py"), suite, os.path.join(HERE, "weir_by_api.py")], env=environment)
            with open(report) as file:
                notes = [json.loads(line) for line in file]
            outcomes = Counter(note["outcome"] for note in notes)
            print(f"{suite}: {outcomes['same']} calls the same as from files, {outcomes['differs']} differ, {outcomes['refused']} that the API server refuses, in {time.monotonic() - begin:.0f} s", flush=True)
            for why, count in Counter(note["why"].split(": ", 1)[-1][:150] for note in notes if note["outcome"] == "refused").most_common(8):
                print(f"  {count} x refused: {why}")
            for note in [note for note in notes if note["outcome"] == "differs"][:3]:
                print("  differs:\n  files:   " + note["files"][:1500] + "\n  cluster: " + note["cluster"][:1500])
            failed |= ran.returncode != 0 or outcomes["differs"] > 0 or outcomes["same"] == 0
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if failed else 0)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
