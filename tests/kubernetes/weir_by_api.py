#!/usr/bin/python3
"""Stands for `weir` where conform.py calls it: writes a case's manifests into a real API server, asks weir of that, and of the files too.

$WEIR is the real one, $KUBECONFIG_JSON how the server is reached, $REPORT where each call is noted. What the API server itself refuses cannot be compared:
then the answer of the files is given, and the case is noted as refused.
"""
import http.client, json, os, ssl, subprocess, sys, time
import yaml

WEIR, REPORT = os.environ["WEIR"], os.environ["REPORT"]
with open(os.environ["KUBECONFIG_JSON"]) as file:
    SERVER = json.load(file)

CALICO = "crd.projectcalico.org"
POLICIES = ("NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy", "StagedKubernetesNetworkPolicy")
# Kind by group: path of its version, its plural, whether it is in namespaces.
KINDS = {("", "Node"): ("api/v1", "nodes", False), ("", "Namespace"): ("api/v1", "namespaces", False),
         ("", "Pod"): ("api/v1", "pods", True), ("", "Service"): ("api/v1", "services", True),
         ("", "ServiceAccount"): ("api/v1", "serviceaccounts", True),
         ("discovery.k8s.io", "EndpointSlice"): ("apis/discovery.k8s.io/v1", "endpointslices", True),
         ("networking.k8s.io", "NetworkPolicy"): ("apis/networking.k8s.io/v1", "networkpolicies", True),
         ("policy.networking.k8s.io", "ClusterNetworkPolicy"): ("apis/policy.networking.k8s.io/v1beta1", "clusternetworkpolicies", False)}
for kind, plural, namespaced in SERVER["calico"]:
    KINDS[CALICO, kind] = (f"apis/{CALICO}/v1", plural, namespaced)

class Refused(Exception):
    pass

class Api:
    def __init__(self):
        context = ssl.create_default_context(cafile=SERVER["ca"])
        context.load_cert_chain(SERVER["cert"], SERVER["key"])
        self.connection = http.client.HTTPSConnection(SERVER["host"], SERVER["port"], context=context, timeout=60)

    def ask(self, method, path, body=None, kind="application/json"):
        self.connection.request(method, "/" + path, json.dumps(body) if body is not None else None, {"Content-Type": kind})
        answer = self.connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text.startswith(b"{") else text.decode()

def path_of(group, kind, metadata):
    version, plural, namespaced = KINDS[group, kind]
    if namespaced:
        return f"{version}/namespaces/{metadata.get('namespace', 'default')}/{plural}"
    return f"{version}/{plural}"

def documents(config, folder):
    for name in config["manifests"]:
        path = os.path.join(folder, name)
        with open(path) as file:
            for document in yaml.safe_load_all(file):
                if not document:
                    continue
                yield from document.get("items", [document]) if document.get("kind", "").endswith("List") else [document]

def stored(document):
    """An object as it lies in the API server: Calico's in their older form, with their tier before the name and their labels in an annotation."""
    group = document["apiVersion"].split("/")[0] if "/" in document["apiVersion"] else ""
    metadata = document.setdefault("metadata", {})
    if group == "projectcalico.org":
        group, document["apiVersion"] = CALICO, CALICO + "/v1"
        spec = document.get("spec") or {}
        if document["kind"] in POLICIES and spec.get("tier", "default") == "default" and not metadata["name"].startswith("default."):
            metadata["name"] = "default." + metadata["name"]
        if metadata.get("labels"):
            metadata.setdefault("annotations", {})["projectcalico.org/metadata"] = json.dumps({"labels": metadata.pop("labels")})
    if group == "policy.networking.k8s.io":
        document["apiVersion"] = group + "/v1beta1"
    if document["kind"] == "Pod":
        for container in document["spec"].setdefault("containers", [{"name": "c"}]) + document["spec"].get("initContainers", []):
            container.setdefault("image", "x")
            container.setdefault("name", "c")
        document["spec"].setdefault("nodeName", "node-a") if document.get("status") else None
    return group, document

def write(api, group, document):
    kind, status = document["kind"], document.pop("status", None)
    if (group, kind) not in KINDS:
        raise Refused(f"{kind}: no API server has this kind")
    path = path_of(group, kind, document["metadata"])
    until = time.monotonic() + 10
    while True:
        code, answer = api.ask("POST", path, document)
        # An address that a case before had is free a little after its Service has gone.
        # Nor is one of a range that has only just come.
        is_soon = "already allocated" in str(answer) or "spec.clusterIP" in str(answer) or "not ready" in str(answer)
        if code < 300 or not is_soon or time.monotonic() > until:
            break
        time.sleep(0.05)
    if code == 409 and answer.get("reason") == "AlreadyExists":
        code, answer = api.ask("PATCH", f"{path}/{document['metadata']['name']}", document, "application/merge-patch+json")
    if code >= 300:
        raise Refused(f"{kind} {document['metadata'].get('name')}: {answer.get('message', answer) if isinstance(answer, dict) else answer}")
    if status and kind in ("Node", "Pod", "Service"):
        patch = {"status": status}
        code, answer = api.ask("PATCH", f"{path}/{document['metadata']['name']}/status", patch, "application/merge-patch+json")
        if code >= 300:
            raise Refused(f"status of {kind} {document['metadata'].get('name')}: {answer.get('message', answer)}")

def ranges(api, method):
    """Makes cluster IPs of cases such that the server gives them, or no more: weir drops what goes to a range of cluster IPs and to no service, and cases
    have pods in the same ranges."""
    for number, one in enumerate(SERVER["ranges"]):
        path = "apis/networking.k8s.io/v1/servicecidrs"
        if method == "POST":
            body = {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": f"more-{number}"}, "spec": {"cidrs": [one]}}
            code, answer = api.ask("POST", path, body)
            assert code in (201, 409), answer
        else:
            code, answer = api.ask("DELETE", f"{path}/more-{number}")
            assert code in (200, 404), answer

def clear(api):
    """Takes away what a case before has written."""
    own = {"default", "kube-system", "kube-public", "kube-node-lease"}
    for (group, kind), (version, plural, _) in sorted(KINDS.items(), key=lambda entry: entry[0][1] == "Namespace"):
        _, listed = api.ask("GET", f"{version}/{plural}")
        for item in listed.get("items") or []:
            metadata = item["metadata"]
            name = metadata["name"]
            if kind == "Namespace":
                if name in own:
                    api.ask("PATCH", f"api/v1/namespaces/{name}", {"metadata": {"labels": None, "annotations": None}}, "application/merge-patch+json")
                    continue
                api.ask("DELETE", f"api/v1/namespaces/{name}")
                # Nobody runs who would do that.
                item["spec"] = {"finalizers": []}
                api.ask("PUT", f"api/v1/namespaces/{name}/finalize", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}, "spec": {"finalizers": []}})
            elif (metadata.get("namespace"), name) != ("default", "kubernetes"):
                api.ask("DELETE", f"{path_of(group, kind, metadata)}/{name}", {"gracePeriodSeconds": 0, "propagationPolicy": "Background"})

def main():
    arguments = sys.argv[1:]
    plain = subprocess.run([WEIR] + arguments, capture_output=True, text=True)
    config_path = arguments[arguments.index("-c") + 1]
    folder = os.path.dirname(config_path)
    with open(config_path) as file:
        config = yaml.safe_load(file)
    note = {"call": arguments[0], "outcome": "same"}
    answer = plain
    try:
        objects = [stored(document) for document in documents(config, folder)]
        api = Api()
        # Before what a case before has left is taken away, too: an address is given back to the range that it is of.
        ranges(api, "POST")
        time.sleep(0.2)
        clear(api)
        order = ["Namespace", "Node", "ServiceAccount", "Tier"]
        objects.sort(key=lambda entry: order.index(entry[1]["kind"]) if entry[1]["kind"] in order else len(order))
        namespaces = {document["metadata"].get("namespace", "default") for group, document in objects if KINDS.get((group, document["kind"]), ("", "", False))[2]}
        given = {document["metadata"]["name"] for _, document in objects if document["kind"] == "Namespace"}
        for namespace in sorted(namespaces - given - {"default"}):
            write(api, "", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        try:
            for group, document in objects:
                write(api, group, document)
        finally:
            ranges(api, "DELETE")
        by_api = subprocess.run([WEIR, arguments[0], "--kubernetes=" + SERVER["kubeconfig"]] + arguments[1:], capture_output=True, text=True)
        answer = by_api
        if arguments[0] == "check":
            # Who calls looks for the file's name, and how many objects there are is not the same.
            by_api.stderr, plain.stdout = plain.stderr + by_api.stderr, by_api.stdout
        if (plain.stdout, plain.returncode) != (by_api.stdout, by_api.returncode):
            note = {"call": arguments[0], "outcome": "differs", "files": plain.stdout + plain.stderr[-600:], "cluster": by_api.stdout + by_api.stderr[-600:]}
    except Refused as why:
        note = {"call": arguments[0], "outcome": "refused", "why": str(why)}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as why:
        note = {"call": arguments[0], "outcome": "refused", "why": "no API server would take it: " + repr(why)}
    with open(REPORT, "a") as report:
        report.write(json.dumps(note) + "\n")
    sys.stdout.write(answer.stdout)
    sys.stderr.write(answer.stderr)
    sys.exit(answer.returncode)

main()
