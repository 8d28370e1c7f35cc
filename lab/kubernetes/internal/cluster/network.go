package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"weir.dev/lab/kubernetes/internal/build"
)

// network starts what runs the pods' network, before any kubelet asks for it.
func (u *up) network(ctx context.Context) error {
	if u.Kind == KubeProxy {
		return u.kubeProxy(ctx)
	}
	return u.weir(ctx)
}

// encapsulation is Calico's name for how pods' packets cross between nodes.
func (c *Cluster) encapsulation() string {
	switch c.Encap {
	case "ipip":
		return "Always"
	case "cross-subnet":
		return "CrossSubnet"
	}
	return "Never"
}

// pools are the ranges of pods as Calico describes them; weir reads how to carry packets between nodes from there. Calico has IPIP for IPv4 alone.
func (c *Cluster) pools() string {
	var text strings.Builder
	for number, cidr := range byFamily(c.Family, podsV4, podsV6) {
		encapsulation := c.encapsulation()
		if strings.Contains(cidr, ":") {
			encapsulation = "Never"
		}
		fmt.Fprintf(&text, "---\napiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: pods-%d}\nspec: {cidr: \"%s\", ipipMode: %s, natOutgoing: true}\n",
			number, cidr, encapsulation)
	}
	return text.String()
}

// weirUser is who a router is in the cluster: the account of configs/kubernetes/rbac.yaml, with its rights and no more.
const weirUser = "system:serviceaccount:kube-system:weir"

func (u *up) weir(ctx context.Context) error {
	pools := filepath.Join(u.Dir, "pools.yaml")
	if err := os.WriteFile(pools, []byte(u.pools()), 0o600); err != nil {
		return err
	}
	first := u.Nodes[0].Name
	rights := filepath.Join(u.options.Source, "../../configs/kubernetes/rbac.yaml")
	if err := u.waitFor(ctx, 30*time.Second, "weir's rights", first, "kubectl", "apply", "-f", rights); err != nil {
		return err
	}
	kubeconfig, err := u.keys.kubeconfig("weir", weirUser, "", u.server)
	if err != nil {
		return err
	}
	// The files of this cluster, not whatever is built meanwhile.
	programs := filepath.Join(u.Dir, "bin")
	if err := os.MkdirAll(programs, 0o755); err != nil {
		return err
	}
	for _, program := range []string{u.options.Weir, u.options.WeirCNI} {
		if err := copyFile(program, filepath.Join(programs, filepath.Base(program))); err != nil {
			return err
		}
	}
	for number, node := range u.Nodes {
		config := fmt.Sprintf(`apiVersion: weir.dev/v1alpha1
kind: RouterConfig
nodeName: %s
kubernetes: {kubeconfig: "%s"}
manifests: ["%s"]
devices:
- {name: eth0, role: uplink}
workers: {cores: [%d]}
offload: %s
cni: {}
`, node.Name, kubeconfig, pools, number%runtime.NumCPU(), u.Offload)
		if err := os.WriteFile(node.Config, []byte(config), 0o600); err != nil {
			return err
		}
		if err := u.serve(node.Name, "weir", Service{Arguments: []string{filepath.Join(programs, "weir"), "run", "-c", node.Config}}); err != nil {
			return err
		}
		if err := u.plugin(node, "weir-cni", filepath.Join(programs, "weir-cni"), map[string]any{
			"cniVersion": "1.0.0", "name": "weir",
			"plugins": []any{map[string]any{"type": "weir-cni", "capabilities": map[string]bool{"portMappings": true}}},
		}); err != nil {
			return err
		}
		// The container runtime asks it of every network.
		if err := copyFile(filepath.Join(u.options.Plugins, "loopback"), filepath.Join(u.Dir, node.Name, "root/opt/cni/bin/loopback")); err != nil {
			return fmt.Errorf("the reference plugin loopback: %w; as root: apt-get install containernetworking-plugins", err)
		}
	}
	for _, node := range u.Nodes {
		if err := u.waitFor(ctx, 30*time.Second, "weir on "+node.Name+" (its log: "+u.log(node.Name, "weir")+")", node.Name,
			filepath.Join(programs, "weir"), "status", "-c", node.Config); err != nil {
			return err
		}
	}
	u.say("weir runs on each node")
	return nil
}

// plugin installs a CNI plugin, and a configuration that names it.
func (u *up) plugin(node Node, name, program string, configuration map[string]any) error {
	root := filepath.Join(u.Dir, node.Name, "root")
	if err := os.MkdirAll(filepath.Join(root, "opt/cni/bin"), 0o755); err != nil {
		return err
	}
	if program != "" {
		if err := copyFile(program, filepath.Join(root, "opt/cni/bin", name)); err != nil {
			return err
		}
	}
	text, err := json.MarshalIndent(configuration, "", "  ")
	if err != nil {
		return err
	}
	folder := filepath.Join(root, "etc/cni/net.d")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	beside := filepath.Join(folder, ".new")
	if err := os.WriteFile(beside, text, 0o644); err != nil {
		return err
	}
	return os.Rename(beside, filepath.Join(folder, "10-"+configuration["name"].(string)+".conflist"))
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	beside := to + ".new"
	if err := os.WriteFile(beside, content, 0o755); err != nil {
		return err
	}
	return os.Rename(beside, to)
}

// proxyRole is what kube-proxy needs of the API server.
const proxyRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: lab-proxy}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:node-proxier"}
subjects: [{kind: User, name: "system:kube-proxy"}]
`

// kubeProxy is the peer: kube-proxy in its nftables mode, the reference plugins, a route to each other node's pods.
func (u *up) kubeProxy(ctx context.Context) error {
	if u.Encap != "none" {
		return errors.New("with WITH=kube-proxy there is no tunnel: ENCAP=none")
	}
	for _, plugin := range []string{"ptp", "host-local", "portmap"} {
		if _, err := os.Stat(filepath.Join(u.options.Plugins, plugin)); err != nil {
			return fmt.Errorf("the reference plugin %s: %w; as root: apt-get install containernetworking-plugins", plugin, err)
		}
	}
	if err := u.apply(ctx, proxyRole); err != nil {
		return err
	}
	for _, node := range u.Nodes {
		config := fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: "%s"
hostnameOverride: %s
clientConnection: {kubeconfig: "%s"}
conntrack: {maxPerCore: 0}
`, commas(byFamily(u.Family, podsV4, podsV6)), node.Name, u.keys.path("proxy.kubeconfig"))
		path := filepath.Join(u.Dir, node.Name, "kube-proxy.yaml")
		if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
			return err
		}
		if err := u.serve(node.Name, "kube-proxy", Service{Arguments: []string{u.binary("kube-proxy"), "--config=" + path}}); err != nil {
			return err
		}
	}
	// Nodes get their ranges once they have registered, so this goes on beside the start of the kubelets.
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return u.serve(u.Nodes[0].Name, "ranges", Service{Arguments: []string{self, "ranges", u.Name, u.options.Plugins}})
}

// FollowRanges waits for each node's range of pods, then gives it its plugins and the others a route. It runs in the first node.
func FollowRanges(ctx context.Context, name, plugins string) error {
	cluster, err := Load(name)
	if err != nil {
		return err
	}
	u := &up{Cluster: cluster, options: Options{Plugins: plugins}}
	done := map[string]bool{}
	for len(done) < len(cluster.Nodes) {
		for _, node := range cluster.Nodes {
			if done[node.Name] {
				continue
			}
			out, err := cluster.Command(ctx, cluster.Nodes[0].Name, "kubectl", "get", "node", node.Name, "-o", "jsonpath={.spec.podCIDRs[*]}").Output()
			ranges := strings.Fields(string(out))
			if err != nil || len(ranges) < len(byFamily(cluster.Family, "", "")) {
				continue
			}
			if err := u.referencePlugins(node, ranges); err != nil {
				return err
			}
			done[node.Name] = true
		}
		time.Sleep(200 * time.Millisecond)
	}
	// The holder would start an ended program again.
	<-ctx.Done()
	return nil
}

func (u *up) referencePlugins(node Node, ranges []string) error {
	var sets []any
	routes := []any{}
	for i, cidr := range ranges {
		sets = append(sets, []any{map[string]string{"subnet": cidr}})
		everything := "0.0.0.0/0"
		if strings.Contains(cidr, ":") {
			everything = "::/0"
		}
		routes = append(routes, map[string]string{"dst": everything})
		for _, other := range u.Nodes {
			if other.Name == node.Name {
				continue
			}
			if err := u.ip(other.Holder, "route replace "+cidr+" via "+node.Addresses[i]); err != nil {
				return err
			}
		}
		if err := u.ip(u.Outside, "route replace "+cidr+" via "+node.Addresses[i]); err != nil {
			return err
		}
	}
	for _, plugin := range []string{"ptp", "host-local", "portmap", "loopback"} {
		target := filepath.Join(u.Dir, node.Name, "root/opt/cni/bin", plugin)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := copyFile(filepath.Join(u.options.Plugins, plugin), target); err != nil {
			return err
		}
	}
	return u.plugin(node, "", "", map[string]any{
		"cniVersion": "1.0.0", "name": "reference",
		"plugins": []any{
			map[string]any{"type": "ptp", "ipMasq": false, "ipam": map[string]any{"type": "host-local", "ranges": sets, "routes": routes}},
			map[string]any{"type": "portmap", "snat": true, "capabilities": map[string]bool{"portMappings": true}},
		},
	})
}

// dnsManifest is CoreDNS as installers set it up, two of it.
func (u *up) dnsManifest() string {
	var addresses []string
	for _, address := range byFamily(u.Family, dnsV4, dnsV6) {
		addresses = append(addresses, `"`+address+`"`)
	}
	policy := "SingleStack"
	if u.Family == "dual" {
		policy = "RequireDualStack"
	}
	return fmt.Sprintf(dnsTemplate, build.CoreDNSImage, policy, addresses[0], strings.Join(addresses, ", "))
}

const dnsTemplate = `apiVersion: v1
kind: ServiceAccount
metadata: {name: coredns, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "system:coredns"}
rules:
- {apiGroups: [""], resources: [endpoints, services, pods, namespaces], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "system:coredns"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:coredns"}
subjects: [{kind: ServiceAccount, name: coredns, namespace: kube-system}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns, namespace: kube-system}
data:
  Corefile: |
    cluster.local in-addr.arpa ip6.arpa {
        errors
        health {
            lameduck 5s
        }
        ready
        kubernetes cluster.local in-addr.arpa ip6.arpa {
            pods insecure
            ttl 30
        }
        cache 30
        reload
    }
    . {
        errors
        template ANY ANY {
            rcode NXDOMAIN
        }
    }
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  replicas: 2
  strategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 1}}
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      serviceAccountName: coredns
      priorityClassName: system-cluster-critical
      dnsPolicy: Default
      affinity:
        podAntiAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
          - weight: 100
            podAffinityTerm: {topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {k8s-app: kube-dns}}}
      containers:
      - name: coredns
        image: %s
        imagePullPolicy: Never
        args: ["-conf", "/etc/coredns/Corefile"]
        ports:
        - {containerPort: 53, name: dns, protocol: UDP}
        - {containerPort: 53, name: dns-tcp, protocol: TCP}
        readinessProbe: {httpGet: {path: /ready, port: 8181}, periodSeconds: 2}
        livenessProbe: {httpGet: {path: /health, port: 8080}, initialDelaySeconds: 60, timeoutSeconds: 5}
        volumeMounts: [{name: config, mountPath: /etc/coredns, readOnly: true}]
      volumes: [{name: config, configMap: {name: coredns}}]
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system, labels: {k8s-app: kube-dns, kubernetes.io/cluster-service: "true"}}
spec:
  ipFamilyPolicy: %s
  clusterIP: %s
  clusterIPs: [%s]
  selector: {k8s-app: kube-dns}
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, protocol: TCP}
`
