package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"weir.dev/lab/kubernetes/internal/build"
)

// Options are what `make cluster` is told.
type Options struct {
	Name string
	// Nodes is how many.
	Nodes int
	// Kind, Family, Encap and Offload are as in Cluster.
	Kind, Family, Encap, Offload string
	// Source is the folder of this module, beside which the configurations that weir ships are.
	Source string
	// Binaries is the folder with what was built for the cluster.
	Binaries string
	// Weir and WeirCNI are the programs under test.
	Weir, WeirCNI string
	// Plugins is the folder with the reference CNI plugins, for a cluster with kube-proxy.
	Plugins string
	Out     io.Writer
}

func oneOf(variable, value string, allowed ...string) error {
	for _, one := range allowed {
		if value == one {
			return nil
		}
	}
	return fmt.Errorf("%s=%s: it is one of %s", variable, value, strings.Join(allowed, ", "))
}

func (o *Options) check() error {
	if o.Nodes < 1 || o.Nodes > 9 {
		return fmt.Errorf("NODES=%d: it is a number from 1 to 9", o.Nodes)
	}
	return errors.Join(
		oneOf("WITH", o.Kind, Weir, KubeProxy),
		oneOf("FAMILY", o.Family, "ipv4", "ipv6", "dual"),
		oneOf("ENCAP", o.Encap, "none", "ipip", "cross-subnet"),
		oneOf("OFFLOAD", o.Offload, "auto", "off"),
	)
}

// Ranges of the cluster. Nodes have 192.0.2.11 and up, and 2001:db8::11 and up; the bridge between them .1.
const (
	servicesV4, servicesV6 = "10.96.0.0/16", "fd00:96::/112"
	podsV4, podsV6         = "10.244.0.0/16", "fd00:244::/56"
	dnsV4, dnsV6           = "10.96.0.10", "fd00:96::a"
	firstV4, firstV6       = "10.96.0.1", "fd00:96::1"
	bridgeV4, bridgeV6     = "192.0.2.1", "2001:db8::1"
	apiPort                = "6443"
)

// byFamily picks what a family of addresses asks for, IPv4 first.
func byFamily(family, v4, v6 string) []string {
	switch family {
	case "ipv4":
		return []string{v4}
	case "ipv6":
		return []string{v6}
	}
	return []string{v4, v6}
}

func commas(words []string) string { return strings.Join(words, ",") }

// up holds what bringing up needs beside the cluster itself.
type up struct {
	*Cluster
	options Options
	keys    *authority
	server  string
	begin   time.Time
}

// Up brings a cluster up; what it began is taken down again where that fails.
func Up(ctx context.Context, options Options) (*Cluster, error) {
	if err := options.check(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a cluster needs root: for namespaces, mounts and control groups")
	}
	if _, err := Load(options.Name); !errors.Is(err, ErrNone) {
		return nil, errors.New("there is a cluster already; `make cluster-status` shows it, `make cluster-down` takes it away")
	}
	cluster := &Cluster{
		Name: options.Name, Dir: Folder(options.Name), Binaries: options.Binaries, Kind: options.Kind, Family: options.Family,
		Encap: options.Encap, Offload: options.Offload,
	}
	// Before anything else, so that whatever is begun is found again.
	if err := os.MkdirAll(cluster.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := cluster.save(); err != nil {
		return nil, err
	}
	u := &up{Cluster: cluster, options: options, begin: time.Now()}
	if err := u.run(ctx); err != nil {
		if os.Getenv("KEEP") != "" {
			return nil, fmt.Errorf("%w (kept, as KEEP is set; `make cluster-down` removes it)", err)
		}
		return nil, errors.Join(err, Down(options.Name, io.Discard))
	}
	return cluster, nil
}

func (u *up) say(format string, arguments ...any) {
	fmt.Fprintf(u.options.Out, "%5.1f s  %s\n", time.Since(u.begin).Seconds(), fmt.Sprintf(format, arguments...))
}

func (u *up) run(ctx context.Context) error {
	if err := u.namespaces(); err != nil {
		return err
	}
	u.say("%d nodes: namespaces, links, mounts", len(u.Nodes))
	if err := u.certificates(); err != nil {
		return err
	}
	// Images are unpacked beside the control plane's start: both take seconds.
	imported := make(chan error, len(u.Nodes))
	for _, node := range u.Nodes {
		if err := u.containerd(node); err != nil {
			return err
		}
		go func() { imported <- u.importImages(ctx, node) }()
	}
	if err := u.controlPlane(ctx); err != nil {
		return err
	}
	u.say("control plane answers at %s", u.server)
	if err := u.network(ctx); err != nil {
		return err
	}
	for range u.Nodes {
		if err := <-imported; err != nil {
			return err
		}
	}
	u.say("images are there")
	for _, node := range u.Nodes {
		if err := u.kubelet(node); err != nil {
			return err
		}
	}
	if err := u.apply(ctx, u.dnsManifest()); err != nil {
		return err
	}
	if err := u.ready(ctx); err != nil {
		return err
	}
	u.say("%d nodes are Ready, and DNS answers", len(u.Nodes))
	return nil
}

// ip runs ip(8) in a namespace.
func (c *Cluster) ip(holder Holder, line string) error {
	out, err := c.inside(context.Background(), holder, false, "ip", strings.Fields(line)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", line, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// setting writes a file below /proc/sys, as a namespace has it.
func (c *Cluster) setting(holder Holder, settings ...string) error {
	out, err := c.inside(context.Background(), holder, false, "sysctl", append([]string{"-q", "-w"}, settings...)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("sysctl %s: %w: %s", settings, err, out)
	}
	return nil
}

// namespaces makes the bridge's namespace and the nodes'.
func (u *up) namespaces() error {
	outside, err := startHolder(HolderSpec{Cluster: u.Name, Node: "outside", Services: filepath.Join(u.Dir, "outside", "services")},
		filepath.Join(u.Dir, "outside.log"))
	if err != nil {
		return err
	}
	u.Outside = outside
	if err := u.save(); err != nil {
		return err
	}
	steps := []string{"link add br0 type bridge", "link set br0 up",
		"address add " + bridgeV4 + "/24 dev br0", "address add " + bridgeV6 + "/64 dev br0 nodad"}
	for _, step := range steps {
		if err := u.ip(outside, step); err != nil {
			return err
		}
	}
	for i := range u.options.Nodes {
		if err := u.node(i); err != nil {
			return err
		}
	}
	return nil
}

func (u *up) node(number int) error {
	name := "node-" + string(rune('a'+number))
	folder := filepath.Join(u.Dir, name)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	holder, err := u.hold(name)
	if err != nil {
		return err
	}
	v4, v6 := nodeAddresses(number)
	u.Nodes = append(u.Nodes, Node{
		Name: name, Addresses: byFamily(u.Family, v4, v6), Holder: holder, Config: filepath.Join(folder, "weir.yaml"),
	})
	if err := u.save(); err != nil {
		return err
	}
	return u.connect(number)
}

func nodeAddresses(number int) (v4, v6 string) {
	return fmt.Sprintf("192.0.2.%d", 11+number), fmt.Sprintf("2001:db8::%d", 11+number)
}

// hold makes a node's namespaces, with its files.
func (c *Cluster) hold(name string) (Holder, error) {
	folder := filepath.Join(c.Dir, name)
	spec := HolderSpec{Cluster: c.Name, Node: name, Services: c.services(name)}
	for _, path := range []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/lib/weir", "/etc/cni", "/opt/cni",
		"/var/log/pods", "/var/log/containers", "/etc/kubernetes"} {
		spec.Bindings = append(spec.Bindings, Binding{From: filepath.Join(folder, "root", path), To: path})
	}
	return startHolder(spec, filepath.Join(folder, "holder.log"))
}

// services is the folder that names what runs on a node.
func (c *Cluster) services(node string) string { return filepath.Join(c.Dir, node, "services") }

// portOf is the bridge's end of a node's link.
func portOf(number int) string { return fmt.Sprintf("port%d", number) }

// connect links a node to the bridge, and gives it its addresses.
func (c *Cluster) connect(number int) error {
	holder, port := c.Nodes[number].Holder, portOf(number)
	v4, v6 := nodeAddresses(number)
	steps := []struct {
		holder Holder
		line   string
	}{
		{c.Outside, fmt.Sprintf("link add %s type veth peer name eth0 netns %d", port, holder.PID)},
		{c.Outside, "link set " + port + " master br0 up"},
		{holder, "link set eth0 up"},
		{holder, "address add " + v4 + "/24 dev eth0"},
		{holder, "address add " + v6 + "/64 dev eth0 nodad"},
		{holder, "route add default via " + bridgeV4},
		{holder, "route add default via " + bridgeV6},
	}
	for _, step := range steps {
		if err := c.ip(step.holder, step.line); err != nil {
			return err
		}
	}
	if c.Offload == "off" {
		// The router's XDP program is on the link then, and sees what a wire would carry: whole checksums, no segments put together.
		out, err := c.inside(context.Background(), c.Outside, false, "ethtool", []string{"-K", port, "tx", "off"}).CombinedOutput()
		if err != nil {
			return fmt.Errorf("ethtool -K %s tx off: %w: %s", port, err, out)
		}
	}
	return c.setting(holder, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=0")
}

func (u *up) certificates() error {
	keys, err := newAuthority(filepath.Join(u.Dir, "keys"))
	if err != nil {
		return err
	}
	u.keys = keys
	first := u.Nodes[0]
	u.server = "https://" + net.JoinHostPort(first.Addresses[0], apiPort)
	names := []string{"localhost", "127.0.0.1", "::1", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.cluster.local", firstV4, firstV6}
	if err := keys.issue("apiserver", "kube-apiserver", "", append(names, first.Addresses...)...); err != nil {
		return err
	}
	// A group that may do everything: what the API server asks of kubelets, and the operator.
	if err := keys.issue("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"); err != nil {
		return err
	}
	if err := keys.issue("front-proxy", "front-proxy-client", ""); err != nil {
		return err
	}
	if err := keys.issue("service-accounts", "service-accounts", ""); err != nil {
		return err
	}
	if u.Kubeconfig, err = keys.kubeconfig("admin", "kubernetes-admin", "system:masters", u.server); err != nil {
		return err
	}
	for name, user := range map[string]string{"controller-manager": "system:kube-controller-manager", "scheduler": "system:kube-scheduler",
		"proxy": "system:kube-proxy"} {
		if _, err := keys.kubeconfig(name, user, "", u.server); err != nil {
			return err
		}
	}
	for _, node := range u.Nodes {
		if err := keys.issue(node.Name+"-serving", "system:node:"+node.Name, "system:nodes", append([]string{node.Name}, node.Addresses...)...); err != nil {
			return err
		}
		if _, err := keys.kubeconfig(node.Name, "system:node:"+node.Name, "system:nodes", u.server); err != nil {
			return err
		}
	}
	return u.save()
}

func (u *up) binary(name string) string { return filepath.Join(u.Binaries, name) }

func (u *up) controlPlane(ctx context.Context) error {
	first := u.Nodes[0]
	address, name := first.Addresses[0], first.Name
	services := commas(byFamily(u.Family, servicesV4, servicesV6))
	pods := commas(byFamily(u.Family, podsV4, podsV6))
	etcd := Service{Arguments: []string{u.binary("etcd"), "--data-dir", filepath.Join(u.Dir, name, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380", "--log-level", "warn"}}
	if err := u.serve(name, "etcd", etcd); err != nil {
		return err
	}
	key := u.keys.path
	apiserver := Service{Arguments: []string{u.binary("kube-apiserver"),
		"--advertise-address=" + address, "--secure-port=" + apiPort, "--etcd-servers=http://127.0.0.1:2379",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--client-ca-file=" + key("ca.crt"), "--tls-cert-file=" + key("apiserver.crt"), "--tls-private-key-file=" + key("apiserver.key"),
		"--kubelet-client-certificate=" + key("kubelet-client.crt"), "--kubelet-client-key=" + key("kubelet-client.key"),
		"--kubelet-certificate-authority=" + key("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + key("service-accounts.key"), "--service-account-signing-key-file=" + key("service-accounts.key"),
		"--requestheader-client-ca-file=" + key("ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User", "--proxy-client-cert-file=" + key("front-proxy.crt"),
		"--proxy-client-key-file=" + key("front-proxy.key"), "--service-cluster-ip-range=" + services,
	}}
	if err := u.serve(name, "kube-apiserver", apiserver); err != nil {
		return err
	}
	kubectl := func(what string, arguments ...string) error {
		return u.waitFor(ctx, 60*time.Second, what, name, "kubectl", arguments...)
	}
	// Those two end where the roles that the API server makes at its start are not there yet.
	if err := kubectl("the API server's roles (its log: "+u.log(name, "kube-apiserver")+")",
		"get", "clusterrole", "system:kube-scheduler", "system:kube-controller-manager", "-o", "name"); err != nil {
		return err
	}
	if err := kubectl("the API server's role bindings", "get", "rolebinding", "-n", "kube-system", "system::extension-apiserver-authentication-reader",
		"system::leader-locking-kube-scheduler"); err != nil {
		return err
	}
	manager := Service{Arguments: []string{u.binary("kube-controller-manager"),
		"--kubeconfig=" + key("controller-manager.kubeconfig"), "--authentication-kubeconfig=" + key("controller-manager.kubeconfig"),
		"--authorization-kubeconfig=" + key("controller-manager.kubeconfig"), "--bind-address=127.0.0.1",
		"--service-account-private-key-file=" + key("service-accounts.key"), "--root-ca-file=" + key("ca.crt"),
		"--cluster-signing-cert-file=" + key("ca.crt"), "--cluster-signing-key-file=" + key("ca.key"),
		"--use-service-account-credentials=true", "--allocate-node-cidrs=true", "--cluster-cidr=" + pods,
		"--service-cluster-ip-range=" + services, "--leader-elect=false", "--controllers=*",
	}}
	if err := u.serve(name, "kube-controller-manager", manager); err != nil {
		return err
	}
	return u.serve(name, "kube-scheduler", Service{Arguments: []string{u.binary("kube-scheduler"),
		"--kubeconfig=" + key("scheduler.kubeconfig"), "--authentication-kubeconfig=" + key("scheduler.kubeconfig"),
		"--authorization-kubeconfig=" + key("scheduler.kubeconfig"), "--bind-address=127.0.0.1", "--leader-elect=false",
	}})
}

const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + build.PauseImage + `"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
`

func (u *up) containerd(node Node) error {
	path := filepath.Join(u.Dir, node.Name, "containerd.toml")
	if err := os.WriteFile(path, []byte(containerdConfig), 0o600); err != nil {
		return err
	}
	return u.serve(node.Name, "containerd", Service{Arguments: []string{"/usr/bin/containerd", "--config", path}})
}

func (u *up) importImages(ctx context.Context, node Node) error {
	if err := u.waitFor(ctx, 30*time.Second, "containerd on "+node.Name, node.Name, "ctr", "-a", "/run/containerd/containerd.sock", "version"); err != nil {
		return err
	}
	out, err := u.Command(ctx, node.Name, "ctr", "-a", "/run/containerd/containerd.sock", "-n", "k8s.io", "images", "import", u.binary("images.tar")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("images on %s: %w: %s", node.Name, err, out)
	}
	return nil
}

func (u *up) kubelet(node Node) error {
	folder := filepath.Join(u.Dir, node.Name)
	dns := byFamily(u.Family, dnsV4, dnsV6)[0]
	resolv := filepath.Join(folder, "resolv.conf")
	// Nobody listens there: names outside of the cluster fail at once instead of in seconds.
	if err := os.WriteFile(resolv, []byte("nameserver "+byFamily(u.Family, bridgeV4, bridgeV6)[0]+"\n"), 0o644); err != nil {
		return err
	}
	// The kubelet's own rule (KUBE-FIREWALL) drops what goes from another address to 127.0.0.1, unless the kernel's own NAT made it so:
	// hostPort on a loopback address needs it, and the router keeps everybody else out.
	config := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: "%s"}}
authorization: {mode: Webhook}
tlsCertFile: "%s"
tlsPrivateKeyFile: "%s"
clusterDomain: cluster.local
clusterDNS: ["%s"]
resolvConf: "%s"
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi}
registerNode: true
maxPods: 250
serializeImagePulls: false
makeIPTablesUtilChains: %t
`, u.keys.path("ca.crt"), u.keys.path(node.Name+"-serving.crt"), u.keys.path(node.Name+"-serving.key"), dns, resolv, u.Kind == KubeProxy)
	path := filepath.Join(folder, "kubelet.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return err
	}
	return u.serve(node.Name, "kubelet", Service{Arguments: []string{u.binary("kubelet"), "--config=" + path,
		"--kubeconfig=" + u.keys.path(node.Name+".kubeconfig"), "--hostname-override=" + node.Name,
		"--node-ip=" + commas(node.Addresses), "--root-dir=/var/lib/kubelet", "--cert-dir=/var/lib/kubelet/pki"}})
}

func (u *up) apply(ctx context.Context, manifest string) error {
	_, err := u.Kubectl(ctx, manifest, "apply", "-f", "-")
	return err
}

// ready waits until the nodes are Ready and a name is resolved by the service's address.
func (u *up) ready(ctx context.Context) error {
	first := u.Nodes[0].Name
	for _, node := range u.Nodes {
		if err := u.waitFor(ctx, 90*time.Second, node.Name+" to register", first, "kubectl", "get", "node", node.Name); err != nil {
			return err
		}
	}
	for _, wait := range [][]string{
		{"wait", "node", "--all", "--for=condition=Ready", "--timeout=90s"},
		{"-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s"},
	} {
		if out, err := u.Command(ctx, first, "kubectl", wait...).CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %s: %w: %s", strings.Join(wait, " "), err, out)
		}
	}
	_, err := exec.LookPath("dig")
	if err != nil {
		return errors.New("dig is missing; as root: apt-get install bind9-dnsutils")
	}
	kinds := byFamily(u.Family, "A", "AAAA")
	expected := byFamily(u.Family, firstV4, firstV6)
	for i, server := range byFamily(u.Family, dnsV4, dnsV6) {
		for _, node := range u.Nodes {
			err := Until(ctx, 30*time.Second, "DNS at "+server+" from "+node.Name, func() error {
				// The default service has one family alone: the first.
				out, err := u.Command(ctx, node.Name, "dig", "+short", "+time=1", "+tries=1", "@"+server, "kubernetes.default.svc.cluster.local", kinds[0]).CombinedOutput()
				if answer := strings.TrimSpace(string(out)); err == nil && answer != expected[0] {
					err = fmt.Errorf("query %d: the answer is %q instead of %s", i, answer, expected[0])
				}
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
