// Package pods asks of a node's network what users of other CNI plugins complain of most: addresses that leak over a reboot, a first connection
// that is lost or slips past policy, hooks that run before anybody knows the pod's address, pods that are made while the runtime is killed, clients
// of a host port that talk to a pod that is gone. It runs on a cluster of the lab.
package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"weir.dev/lab/kubernetes/internal/build"
	"weir.dev/lab/kubernetes/internal/cluster"
)

// Outcome is what became of a scenario.
type Outcome struct {
	Name, What string
	Seconds    float64
	// Problems are what was not as it should be; none: it passed.
	Problems []string
}

// Options are what a run consists of.
type Options struct {
	Cluster *cluster.Cluster
	// Focus is a regular expression for the names of scenarios; empty: all.
	Focus string
	Out   io.Writer
	// Failed, if there is one, is called for a scenario that did not pass, while its pods still are.
	Failed func(Outcome)
}

// scenario finds problems. An error is a problem too: what should have happened did not.
type scenario struct {
	name, what string
	run        func(context.Context, *suite) ([]string, error)
}

// In the order in which they run: the reboot is the last, since it takes other pods of the node with it.
var scenarios = []scenario{
	{"first-moment", "pods whose first instruction opens a connection: those that may get an answer, those that may not get none", firstMoment},
	{"post-start-hook", "hooks that connect before the pod's status has an address", postStartHook},
	{"udp-host-port", "a client with one UDP socket, of a host port whose pod is replaced", udpHostPort},
	{"runtime-restarts", "containerd and the kubelet are killed while pods are made, and while they end", runtimeRestarts},
	{"reboot", "a node loses its power: its pods come back, and no address leaks", reboot},
}

// Names are the names of all scenarios.
func Names() (names []string) {
	for _, s := range scenarios {
		names = append(names, s.name)
	}
	return names
}

// suite is a run.
type suite struct {
	Options
	// node is the one that pods are made on: the last, which has no control plane.
	node cluster.Node
	// namespace is the scenario's own.
	namespace string
}

// Run runs the scenarios, one after the other, and says what became of each.
func Run(ctx context.Context, o Options) ([]Outcome, error) {
	if len(o.Cluster.Nodes) < 2 {
		return nil, errors.New("the scenarios need two nodes")
	}
	wanted, err := regexp.Compile(o.Focus)
	if err != nil {
		return nil, fmt.Errorf("focus: %w", err)
	}
	var outcomes []Outcome
	for _, one := range scenarios {
		if !wanted.MatchString(one.name) {
			continue
		}
		if ctx.Err() != nil {
			return outcomes, ctx.Err()
		}
		outcomes = append(outcomes, o.one(ctx, one))
	}
	return outcomes, nil
}

func (o Options) one(ctx context.Context, one scenario) Outcome {
	began := time.Now()
	s := &suite{Options: o, node: o.Cluster.Nodes[len(o.Cluster.Nodes)-1], namespace: "weir-pods-" + one.name}
	outcome := Outcome{Name: one.name, What: one.what}
	s.say("%s ...", one.name)
	problems, err := s.within(ctx, one)
	if err != nil {
		problems = append(problems, err.Error())
	}
	outcome.Problems, outcome.Seconds = problems, time.Since(began).Seconds()
	verdict := "PASS"
	if len(problems) > 0 {
		verdict = "FAIL: " + strings.Join(problems, "; ")
		if o.Failed != nil {
			o.Failed(outcome)
		}
	}
	s.say("%-20s %.0f s  %s", one.name, outcome.Seconds, verdict)
	s.takeDown()
	return outcome
}

// within runs a scenario in a namespace of its own.
func (s *suite) within(ctx context.Context, one scenario) ([]string, error) {
	// What a run that was killed has left.
	if _, err := s.kubectl(ctx, "delete", "namespace", s.namespace, "--ignore-not-found", "--timeout=90s"); err != nil {
		return nil, err
	}
	if _, err := s.kubectl(ctx, "create", "namespace", s.namespace); err != nil {
		return nil, err
	}
	err := cluster.Until(ctx, 20*time.Second, "the namespace's service account", func() error {
		_, err := s.kubectl(ctx, "-n", s.namespace, "get", "serviceaccount", "default")
		return err
	})
	if err != nil {
		return nil, err
	}
	return one.run(ctx, s)
}

const takeDownTimeout = 60 * time.Second

// takeDown removes everything, also when the run was interrupted.
func (s *suite) takeDown() {
	ctx, cancel := context.WithTimeout(context.Background(), takeDownTimeout)
	defer cancel()
	if _, err := s.kubectl(ctx, "delete", "namespace", s.namespace, "--ignore-not-found", "--wait=false"); err != nil {
		s.say("%v", err)
	}
}

func (s *suite) say(format string, args ...any) {
	fmt.Fprintf(s.Out, "%-11s %s\n", "pods", fmt.Sprintf(format, args...))
}

func (s *suite) kubectl(ctx context.Context, args ...string) (string, error) {
	return s.Cluster.Kubectl(ctx, "", args...)
}

// own is kubectl in the scenario's namespace.
func (s *suite) own(ctx context.Context, args ...string) (string, error) {
	return s.kubectl(ctx, append([]string{"-n", s.namespace}, args...)...)
}

func (s *suite) apply(ctx context.Context, manifest string) error {
	_, err := s.Cluster.Kubectl(ctx, manifest, "-n", s.namespace, "apply", "-f", "-")
	return err
}

// servers is a deployment of agnhost's netexec with a service of the same name, ports 80 (TCP) and 81 (UDP). Each is spread over the nodes, or stays
// on one of them.
func servers(name string, replicas int, node string) string {
	where := fmt.Sprintf("topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: %s}}}]", name)
	if node != "" {
		where = "nodeName: " + node
	}
	return fmt.Sprintf(`---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s, kind: server}}
    spec:
      terminationGracePeriodSeconds: 2
      %[4]s
      containers:
      - name: netexec
        image: %[3]s
        imagePullPolicy: IfNotPresent
        args: [netexec, --http-port=8080, --udp-port=8081]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec:
  selector: {app: %[1]s}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: udp, port: 81, targetPort: 8081, protocol: UDP}
`, name, replicas, build.AgnhostImage, where)
}

// serve makes servers, waits until they are ready and returns the address of their service.
func (s *suite) serve(ctx context.Context, name string, replicas int, node string) (string, error) {
	if err := s.apply(ctx, servers(name, replicas, node)); err != nil {
		return "", err
	}
	if _, err := s.own(ctx, "rollout", "status", "deployment/"+name, "--timeout=120s"); err != nil {
		return "", err
	}
	return s.own(ctx, "get", "service", name, "-o", "jsonpath={.spec.clusterIP}")
}

// pod is what the scenarios read of a pod.
type pod struct {
	Metadata struct {
		Name              string            `json:"name"`
		Namespace         string            `json:"namespace"`
		Labels            map[string]string `json:"labels"`
		DeletionTimestamp string            `json:"deletionTimestamp"`
	} `json:"metadata"`
	Spec struct {
		NodeName    string `json:"nodeName"`
		HostNetwork bool   `json:"hostNetwork"`
	} `json:"spec"`
	Status struct {
		Phase             string `json:"phase"`
		PodIP             string `json:"podIP"`
		ContainerStatuses []struct {
			RestartCount int  `json:"restartCount"`
			Ready        bool `json:"ready"`
		} `json:"containerStatuses"`
	} `json:"status"`
}

func (p *pod) name() string { return p.Metadata.Namespace + "/" + p.Metadata.Name }

func (p *pod) ready() bool {
	return len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].Ready && p.Metadata.DeletionTimestamp == ""
}

func (s *suite) pods(ctx context.Context, args ...string) ([]pod, error) {
	text, err := s.kubectl(ctx, append([]string{"get", "pods", "-o", "json"}, args...)...)
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []pod `json:"items"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, fmt.Errorf("kubectl get pods: %w", err)
	}
	return list.Items, nil
}

const settleTimeout = 120 * time.Second

// addressesFit compares, on each node, the pods that have an address for weir with those that the API has, and asks weir for leaks. It waits,
// since pods that end go one after another.
func (s *suite) addressesFit(ctx context.Context) error {
	if s.Cluster.Kind != cluster.Weir {
		return nil
	}
	for _, node := range s.Cluster.Nodes {
		err := cluster.Until(ctx, settleTimeout, "addresses on "+node.Name, func() error {
			all, err := s.pods(ctx, "-A", "--field-selector", "spec.nodeName="+node.Name)
			if err != nil {
				return err
			}
			text, err := cluster.Output(s.Cluster.Weir(ctx, node, "ipam", "show", "--output", "json"), "weir ipam show")
			if err != nil {
				return err
			}
			have, err := owners(text)
			if err != nil {
				return err
			}
			if err := sameOwners(have, all); err != nil {
				return err
			}
			_, err = cluster.Output(s.Cluster.Weir(ctx, node, "ipam", "check"), "weir ipam check")
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// owners are the pods that have an address, by what `weir ipam show --output json` says.
func owners(text string) ([]string, error) {
	var shown struct {
		Addresses []struct {
			State, Pod string
		}
	}
	if err := json.Unmarshal([]byte(text), &shown); err != nil {
		return nil, fmt.Errorf("weir ipam show: %w", err)
	}
	var names []string
	for _, address := range shown.Addresses {
		if address.State == "inUse" && !slices.Contains(names, address.Pod) {
			names = append(names, address.Pod)
		}
	}
	slices.Sort(names)
	return names, nil
}

// sameOwners says which pods should have an address and have none, and the other way round.
func sameOwners(have []string, all []pod) error {
	var should []string
	for _, p := range all {
		if !p.Spec.HostNetwork && p.Status.Phase != "Succeeded" && p.Status.Phase != "Failed" {
			should = append(should, p.name())
		}
	}
	var wrong []string
	for _, name := range have {
		if !slices.Contains(should, name) {
			wrong = append(wrong, name+" has an address, and is no pod of this node that runs")
		}
	}
	for _, name := range should {
		if !slices.Contains(have, name) {
			wrong = append(wrong, name+" runs, and has no address")
		}
	}
	if len(wrong) > 0 {
		return errors.New(strings.Join(wrong, "; "))
	}
	return nil
}
