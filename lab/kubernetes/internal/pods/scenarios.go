package pods

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"weir.dev/lab/kubernetes/internal/build"
	"weir.dev/lab/kubernetes/internal/cluster"
	"weir.dev/lab/kubernetes/internal/rollclient"
)

const (
	firstPods    = 32
	firstTimeout = "3s"
)

// client is a pod that asks once, as the first thing it does, and ends.
func client(name, node, role, target string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {role: %[3]s}}
spec:
  nodeName: %[2]s
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: rollclient
    image: %[5]s
    imagePullPolicy: Never
    command: [/rollclient, tcp, -count, "1", -timeout, %[6]s, -target, "%[4]s"]
`, name, node, role, target, build.RollClientImage, firstTimeout)
}

// firstPolicies isolate the clients: some may reach the servers, some may not reach anybody, some may, but the servers that they ask do not admit
// them. What a pod may send is its own node's to know, and holds from its first instruction. What servers admit by pods' labels cannot
// be: their nodes learn a pod's address from its status, which the kubelet writes when it runs. So nobody is asked to be admitted at once.
const firstPolicies = `---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody}
spec: {podSelector: {matchExpressions: [{key: role, operator: Exists}]}, policyTypes: [Egress]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: out}
spec: {podSelector: {matchExpressions: [{key: role, operator: In, values: [allowed, stranger]}]}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {kind: server}}}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: in}
spec: {podSelector: {matchLabels: {app: closed}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]}
`

// firstMoment makes pods on both nodes at once, each of which asks as the first thing it does.
func firstMoment(ctx context.Context, s *suite) (problems []string, err error) {
	open, err := s.serve(ctx, "open", 4, "")
	if err != nil {
		return nil, err
	}
	closed, err := s.serve(ctx, "closed", 2, "")
	if err != nil {
		return nil, err
	}
	if err := s.apply(ctx, firstPolicies); err != nil {
		return nil, err
	}
	roles := []struct{ name, target string }{{"allowed", open}, {"denied", open}, {"allowed", open}, {"stranger", closed}}
	var text strings.Builder
	for i := range firstPods {
		role := roles[i%len(roles)]
		node := s.Cluster.Nodes[i/len(roles)%2*(len(s.Cluster.Nodes)-1)].Name
		text.WriteString(client(fmt.Sprintf("%s-%d", role.name, i), node, role.name, net.JoinHostPort(role.target, "80")))
	}
	if err := s.apply(ctx, text.String()); err != nil {
		return nil, err
	}
	clients, err := s.ended(ctx, "role", firstPods)
	if err != nil {
		return nil, err
	}
	for _, p := range clients {
		log, err := s.own(ctx, "logs", p.Metadata.Name)
		if err != nil {
			return problems, err
		}
		result, err := resultOf(log)
		if err != nil {
			return problems, fmt.Errorf("%s: %w", p.Metadata.Name, err)
		}
		if problem := judgeFirst(p.Metadata.Labels["role"] == "allowed", result); problem != "" {
			problems = append(problems, fmt.Sprintf("%s on %s: %s", p.Metadata.Name, p.Spec.NodeName, problem))
		}
	}
	return problems, nil
}

// Linux asks again for a connection after a second.
const firstRepeatMs = 1000

// judgeFirst says what is wrong with a client's only attempt.
func judgeFirst(allowed bool, result *rollclient.Result) string {
	switch {
	case allowed && result.OK != 1:
		return fmt.Sprintf("%v", result.Lost)
	case allowed && result.MaxMs >= firstRepeatMs:
		return fmt.Sprintf("an answer after %.0f ms: its first packet was lost", result.MaxMs)
	case !allowed && result.OK != 0:
		return "it got an answer"
	case !allowed && result.Lost[rollclient.TimedOut] != 1:
		return fmt.Sprintf("policy drops, and it saw %v", result.Lost)
	}
	return ""
}

// resultOf finds the client's result in what its pod said: it is the line that is a JSON object.
func resultOf(log string) (*rollclient.Result, error) {
	for line := range strings.Lines(log) {
		if strings.HasPrefix(line, "{") {
			result := &rollclient.Result{}
			return result, json.Unmarshal([]byte(line), result)
		}
	}
	return nil, fmt.Errorf("it told nothing: %q", log)
}

// ended waits until as many pods with a label have ended, and returns them.
func (s *suite) ended(ctx context.Context, label string, count int) (pods []pod, err error) {
	err = cluster.Until(ctx, settleTimeout, "pods to end", func() error {
		if pods, err = s.pods(ctx, "-n", s.namespace, "-l", label); err != nil {
			return err
		}
		over := 0
		for _, p := range pods {
			if p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed" {
				over++
			}
		}
		if over != count {
			return fmt.Errorf("%d of %d have", over, count)
		}
		return nil
	})
	return pods, err
}

const hookPods = 6

// postStartHook makes pods with a hook that connects to a service, half of them isolated but for the servers. The kubelet runs it before it
// writes the pod's status. A hook that fails ends its container.
func postStartHook(ctx context.Context, s *suite) (problems []string, err error) {
	address, err := s.serve(ctx, "open", 2, "")
	if err != nil {
		return nil, err
	}
	if err := s.apply(ctx, firstPolicies); err != nil {
		return nil, err
	}
	var text strings.Builder
	for i := range hookPods {
		label := "role: allowed"
		if i%2 == 1 {
			label = "free: yes-it-is"
		}
		fmt.Fprintf(&text, `---
apiVersion: v1
kind: Pod
metadata: {name: hook-%d, labels: {hook: is-there, %s}}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 1
  containers:
  - name: hook
    image: %s
    imagePullPolicy: Never
    command: [/rollclient, wait]
    lifecycle: {postStart: {exec: {command: [/rollclient, tcp, -count, "1", -timeout, %s, -target, "%s"]}}}
`, i, label, s.node.Name, build.RollClientImage, firstTimeout, net.JoinHostPort(address, "80"))
	}
	if err := s.apply(ctx, text.String()); err != nil {
		return nil, err
	}
	if _, err := s.own(ctx, "wait", "pod", "-l", "hook", "--for=condition=Ready", "--timeout=60s"); err != nil {
		return nil, err
	}
	pods, err := s.pods(ctx, "-n", s.namespace, "-l", "hook")
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		if n := p.Status.ContainerStatuses[0].RestartCount; n > 0 {
			events, _ := s.own(ctx, "get", "events", "--field-selector", "involvedObject.name="+p.Metadata.Name, "-o", "jsonpath={range .items[*]}{.message}{'\\n'}{end}")
			problems = append(problems, fmt.Sprintf("%s was restarted %d times: %s", p.Metadata.Name, n, events))
		}
	}
	return problems, nil
}

const (
	hostPort = 30999
	// The pods of a host port are made one after another, since two cannot have it at once.
	hostPortTurns = 3
	hostPortReady = "60s"
	// A pod that is ready has this long until it must get every datagram, and then as long as that in which none may be lost.
	hostPortGrace = time.Second
	hostPortHolds = 4 * time.Second
	udpTimeout    = 2 * time.Second
	udpRate       = 20
)

// window is a time in which nothing may be lost.
type window struct {
	pod         string
	begin, over time.Time
}

// udpHostPort asks by one socket, from outside, while the pod behind the port is replaced: what is sent while there is none is lost, of course, but as
// soon as the new one is there it gets all of it.
func udpHostPort(ctx context.Context, s *suite) (problems []string, err error) {
	target := net.JoinHostPort(s.node.Addresses[0], strconv.Itoa(hostPort))
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := s.Cluster.OutsideCommand(ctx, filepath.Join(s.Cluster.Binaries, "rollclient"), "udp-one", "-rate", strconv.Itoa(udpRate),
		"-timeout", udpTimeout.String(), "-target", target)
	input, err := client.StdinPipe()
	if err != nil {
		return nil, err
	}
	var output bytes.Buffer
	client.Stdout = &output
	if err := client.Start(); err != nil {
		return nil, err
	}
	var windows []window
	for turn := range hostPortTurns {
		w := window{pod: fmt.Sprintf("host-port-%d", turn)}
		if err := s.hostPortPod(ctx, w.pod); err != nil {
			return nil, err
		}
		w.begin = time.Now().Add(hostPortGrace)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(hostPortGrace + hostPortHolds):
		}
		w.over = time.Now()
		windows = append(windows, w)
		// The client goes on asking while nobody is there: its flow lives.
		if _, err := s.own(ctx, "delete", "pod", w.pod, "--timeout=60s"); err != nil {
			return nil, err
		}
	}
	input.Close()
	if err := client.Wait(); err != nil {
		return nil, fmt.Errorf("the client: %w", err)
	}
	result, err := resultOf(output.String())
	if err != nil {
		return nil, err
	}
	return judgeWindows(result, windows), nil
}

// judgeWindows finds what was lost in a window.
func judgeWindows(result *rollclient.Result, windows []window) (problems []string) {
	for _, w := range windows {
		lost := 0
		for _, loss := range result.Losses {
			if !loss.At.Before(w.begin) && loss.At.Before(w.over) {
				lost++
			}
		}
		if lost > 0 {
			problems = append(problems, fmt.Sprintf("%d datagrams to %s are lost, of those that were sent in %.1f s while it was there", lost, w.pod, w.over.Sub(w.begin).Seconds()))
		}
	}
	if least := int(udpRate * hostPortHolds.Seconds() * float64(len(windows)) / 2); result.OK < least {
		problems = append(problems, fmt.Sprintf("%d answers in all; there should be %d at least", result.OK, least))
	}
	return problems
}

func (s *suite) hostPortPod(ctx context.Context, name string) error {
	err := s.apply(ctx, fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 1
  containers:
  - name: netexec
    image: %s
    imagePullPolicy: IfNotPresent
    args: [netexec, --http-port=8080, --udp-port=8081]
    ports: [{containerPort: 8081, hostPort: %d, protocol: UDP}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`, name, s.node.Name, build.AgnhostImage, hostPort))
	if err != nil {
		return err
	}
	_, err = s.own(ctx, "wait", "pod/"+name, "--for=condition=Ready", "--timeout="+hostPortReady)
	return err
}

const (
	manyPods = 24
	// Kills follow each other while pods are made.
	killInterval = 1500 * time.Millisecond
)

// runtimeRestarts kills the runtime, the kubelet and the router while pods are made on a node and again while they end.
func runtimeRestarts(ctx context.Context, s *suite) (problems []string, err error) {
	if err := s.apply(ctx, servers("many", manyPods, s.node.Name)); err != nil {
		return nil, err
	}
	if err := s.disturb(ctx); err != nil {
		return nil, err
	}
	if _, err := s.own(ctx, "rollout", "status", "deployment/many", "--timeout=180s"); err != nil {
		return nil, err
	}
	pods, err := s.pods(ctx, "-n", s.namespace)
	if err != nil {
		return nil, err
	}
	addresses := map[string]string{}
	for _, p := range pods {
		if !p.ready() {
			continue
		}
		if other, twice := addresses[p.Status.PodIP]; twice {
			problems = append(problems, fmt.Sprintf("%s and %s both have %s", other, p.Metadata.Name, p.Status.PodIP))
		}
		addresses[p.Status.PodIP] = p.Metadata.Name
		// From the other node: by the uplink, the pod's device and its routes.
		answer, err := s.ask(ctx, net.JoinHostPort(p.Status.PodIP, "8080"))
		switch {
		case err != nil:
			problems = append(problems, fmt.Sprintf("%s (%s): %v", p.Metadata.Name, p.Status.PodIP, err))
		case answer != p.Metadata.Name:
			problems = append(problems, fmt.Sprintf("%s answers at the address of %s (%s)", answer, p.Metadata.Name, p.Status.PodIP))
		}
	}
	if len(addresses) != manyPods {
		problems = append(problems, fmt.Sprintf("%d of %d pods are ready", len(addresses), manyPods))
	}
	if err := s.addressesFit(ctx); err != nil {
		return problems, err
	}
	if _, err := s.own(ctx, "scale", "deployment/many", "--replicas=0"); err != nil {
		return problems, err
	}
	if err := s.disturb(ctx); err != nil {
		return problems, err
	}
	err = cluster.Until(ctx, settleTimeout, "pods to go", func() error {
		pods, err := s.pods(ctx, "-n", s.namespace)
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("%d are left", len(pods))
		}
		return err
	})
	if err != nil {
		return problems, err
	}
	return problems, s.addressesFit(ctx)
}

// disturb kills what makes pods, one after another.
func (s *suite) disturb(ctx context.Context) error {
	for _, service := range []string{"containerd", s.Cluster.Kind, "kubelet", "containerd"} {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(killInterval):
		}
		if err := s.Cluster.Kill(ctx, s.node.Name, service); err != nil {
			return err
		}
	}
	return nil
}

// ask asks a server for its name, from the first node.
func (s *suite) ask(ctx context.Context, target string) (string, error) {
	command := s.Cluster.Command(ctx, s.Cluster.Nodes[0].Name, filepath.Join(s.Cluster.Binaries, "rollclient"), "tcp", "-count", "1", "-timeout", "5s", "-target", target)
	text, err := cluster.Output(command, "asking "+target)
	if err != nil {
		return "", err
	}
	result, err := resultOf(text)
	if err != nil {
		return "", err
	}
	for backend := range result.Backends {
		return backend, nil
	}
	return "", fmt.Errorf("nobody answered: %v", result.Lost)
}

const rebootedPods = 8

// reboot takes a node's power away while pods of it come and go, and looks at what the new one has.
func reboot(ctx context.Context, s *suite) (problems []string, err error) {
	if _, err := s.serve(ctx, "many", rebootedPods, s.node.Name); err != nil {
		return nil, err
	}
	// Some are on their way at that moment, some go while the node is away: no DEL ever comes for those.
	if _, err := s.own(ctx, "scale", "deployment/many", fmt.Sprintf("--replicas=%d", 2*rebootedPods)); err != nil {
		return nil, err
	}
	if err := s.Cluster.Reboot(ctx, s.node.Name); err != nil {
		return nil, err
	}
	if _, err := s.own(ctx, "scale", "deployment/many", fmt.Sprintf("--replicas=%d", rebootedPods)); err != nil {
		return nil, err
	}
	err = cluster.Until(ctx, settleTimeout, "the pods to be ready again", func() error {
		all, err := s.pods(ctx, "-A", "--field-selector", "spec.nodeName="+s.node.Name)
		if err != nil {
			return err
		}
		own := 0
		for _, p := range all {
			if !p.ready() {
				return fmt.Errorf("%s is not (%s)", p.name(), p.Status.Phase)
			}
			if p.Metadata.Namespace == s.namespace {
				own++
			}
		}
		if own != rebootedPods {
			return fmt.Errorf("there are %d of %d", own, rebootedPods)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	pods, err := s.pods(ctx, "-n", s.namespace)
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		// The node's status says Ready of containers from before the reboot until the kubelet has looked; so each may take a moment.
		err := cluster.Until(ctx, 30*time.Second, p.Metadata.Name, func() error {
			now, err := s.own(ctx, "get", "pod", p.Metadata.Name, "-o", "jsonpath={.status.podIP}")
			if err != nil {
				return err
			}
			answer, err := s.ask(ctx, net.JoinHostPort(now, "8080"))
			if err == nil && answer != p.Metadata.Name {
				err = fmt.Errorf("%s answers at its address %s", answer, now)
			}
			return err
		})
		if err != nil {
			problems = append(problems, err.Error())
		}
	}
	return problems, s.addressesFit(ctx)
}
