package rolling

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"weir.dev/lab/kubernetes/internal/cluster"
	"weir.dev/lab/kubernetes/internal/rollclient"
)

// Durations are how long parts of a scenario take; zero: as DefaultDurations.
type Durations struct {
	// Before is how long clients ask before something happens, After how long they go on when it is over.
	Before, After time.Duration
	// Between lies between two roll-outs, long enough for the last pods of the first to go.
	Between time.Duration
	// Rollout is how long one roll-out may take.
	Rollout time.Duration
	// Kills is how often a router is killed, Dead the least time from one kill to the next.
	Kills int
	Dead  time.Duration
}

// DefaultDurations make a scenario of about a minute.
var DefaultDurations = Durations{Before: 3 * time.Second, After: 5 * time.Second, Between: 6 * time.Second, Rollout: 60 * time.Second, Kills: 2, Dead: 8 * time.Second}

func (d *Durations) complete() {
	if *d == (Durations{}) {
		*d = DefaultDurations
	}
}

// Options are what a run of the scenarios consists of.
type Options struct {
	Cluster *cluster.Cluster
	// Focus is a regular expression for the names of scenarios; empty: all.
	Focus string
	// Results is the folder for each client's whole result.
	Results   string
	Durations Durations
	Out       io.Writer
	// Failed, if there is one, is called for a scenario that did not pass or could not be run, while its pods still run.
	Failed func(*Scenario)
}

// client is one client of a group.
type client struct {
	scenario, what string
	// pod runs it; empty: it is outside of the cluster.
	pod     string
	options rollclient.Options
	// target names what is asked, and is resolved when the services exist.
	target func(*suite) (string, error)
	// judge adds what its mode asks for.
	judge func(*suite, *Scenario, *rollclient.Result)
}

// group is a set of clients that ask while one thing happens.
type group struct {
	clients []client
	action  func(context.Context, *suite) error
	// pods of this application are watched.
	watch string
	in    string
}

const (
	shortTimeout = 5 * time.Second
	// Linux asks again for a connection after 1, 3 and 7 seconds.
	patientTimeout = 12 * time.Second
	lookupTimeout  = 2 * time.Second
	scenarioRate   = 300
)

// groups are all scenarios, for a cluster whose first node has the control plane.
func groups(c *cluster.Cluster) []group {
	first, last := c.Nodes[0], c.Nodes[len(c.Nodes)-1]
	short := func(rate int, timeout time.Duration) rollclient.Options {
		return rollclient.Options{Mode: rollclient.TCP, Rate: rate, Timeout: timeout}
	}
	datagrams := rollclient.Options{Mode: rollclient.UDP, Rate: scenarioRate, Timeout: lookupTimeout}
	all := []group{
		{watch: plain, in: namespace, action: rollOut(namespace, "deployment/"+plain), clients: []client{{
			scenario: "tcp", what: "short connections to a cluster IP, one after another", pod: clientOne,
			options: short(scenarioRate, shortTimeout), target: service(plain, webPort),
		}}},
		{watch: plain, in: namespace, action: rollOut(namespace, "deployment/"+plain), clients: []client{{
			scenario: "tcp-few-ports", what: fmt.Sprintf("short connections as fast as they go, from %d source ports", fewPorts), pod: clientFew,
			options: short(0, shortTimeout), target: service(plain, webPort),
		}}},
		{watch: plain, in: namespace, action: rollOut(namespace, "deployment/"+plain), clients: []client{
			{
				scenario: "node-port-outside", what: "short connections to a node port, from outside of the cluster", options: short(scenarioRate/3, shortTimeout),
				target: nodePort(last),
			}, {
				scenario: "node-port-pod", what: "short connections to another node's node port, from a pod", pod: clientOne, options: short(scenarioRate/3, shortTimeout),
				target: nodePort(last),
			}, {
				scenario: "affinity", what: "short connections to a service with ClientIP affinity", pod: clientTwo, options: short(scenarioRate/3, shortTimeout),
				target: service(affine, webPort),
				judge: func(s *suite, scenario *Scenario, r *rollclient.Result) {
					scenario.judgeAffinity(r, len(s.deletions()))
				},
			},
		}},
		{watch: plain, in: namespace, action: rollOut(namespace, "deployment/"+plain), clients: []client{
			{
				scenario: "udp", what: "UDP echoes, a socket for each", pod: clientOne, options: datagrams, target: service(plain, udpPort),
			}, {
				scenario: "udp-one-socket", what: "UDP echoes by one socket, at an even pace", pod: clientTwo,
				options: rollclient.Options{Mode: rollclient.UDPOne, Rate: scenarioRate / 3, Timeout: lookupTimeout}, target: service(plain, udpPort),
			}, {
				scenario: "long-lived", what: "a connection to each backend, which lives until its pod ends it", pod: clientTwo,
				options: rollclient.Options{Mode: rollclient.Long, Backends: replicas, Timeout: shortTimeout}, target: service(plain, webPort),
				judge: func(s *suite, scenario *Scenario, r *rollclient.Result) {
					scenario.judgeLong(r, s.deletions(), preStop)
				},
			},
		}},
		{watch: "kube-dns", in: dnsNamespace, action: rollOut(dnsNamespace, ""), clients: []client{{
			scenario: "dns", what: "DNS lookups by UDP, a socket for each, while CoreDNS is rolled out", pod: clientOne,
			options: rollclient.Options{Mode: rollclient.DNS, Rate: scenarioRate, Timeout: lookupTimeout, Name: "kubernetes.default.svc.cluster.local."},
			target:  dnsService,
		}}},
	}
	for _, node := range []cluster.Node{first, last} {
		all = append(all, group{action: killOn(node), clients: []client{
			{
				scenario: "kill-" + node.Name + "-tcp", what: "short connections, which may wait, while " + c.Kind + " on " + node.Name + " is killed", pod: clientOne,
				options: short(scenarioRate, patientTimeout), target: service(plain, webPort),
			}, {
				scenario: "kill-" + node.Name + "-bulk", what: "one connection with all that goes through, while " + c.Kind + " on " + node.Name + " is killed", pod: clientOne,
				options: rollclient.Options{Mode: rollclient.Bulk, Timeout: patientTimeout}, target: service(sinkOf, sinkPort),
				judge: func(_ *suite, scenario *Scenario, r *rollclient.Result) { scenario.judgeBulk(r) },
			},
		}})
	}
	return all
}

// Names are the names of all scenarios, in the order in which they run.
func Names(c *cluster.Cluster) (names []string) {
	for _, g := range groups(c) {
		for _, one := range g.clients {
			names = append(names, one.scenario)
		}
	}
	return names
}

// suite is a run.
type suite struct {
	Options
	mu     sync.Mutex
	events []Event
	// deleted is when each watched pod was.
	deleted map[string]time.Time
}

// Run runs the scenarios, each group after the other, and says what became of each. An error is what kept them from being run.
func Run(ctx context.Context, o Options) ([]Scenario, error) {
	if len(o.Cluster.Nodes) < 2 {
		return nil, errors.New("the scenarios need two nodes")
	}
	o.Durations.complete()
	wanted, err := regexp.Compile(o.Focus)
	if err != nil {
		return nil, fmt.Errorf("focus: %w", err)
	}
	s := &suite{Options: o}
	var chosen []group
	for _, g := range groups(o.Cluster) {
		g.clients = slices.DeleteFunc(g.clients, func(c client) bool { return !wanted.MatchString(c.scenario) })
		if len(g.clients) > 0 {
			chosen = append(chosen, g)
		}
	}
	if len(chosen) == 0 {
		return nil, nil
	}
	defer s.takeDown()
	if err := s.setUp(ctx); err != nil {
		return nil, s.broken("set-up", err)
	}
	var scenarios []Scenario
	for _, g := range chosen {
		results, err := s.group(ctx, g)
		if err != nil {
			return scenarios, s.broken(g.clients[0].scenario, err)
		}
		for _, one := range results {
			if !one.Pass && o.Failed != nil {
				o.Failed(one)
			}
			scenarios = append(scenarios, *one)
		}
	}
	return scenarios, nil
}

// broken lets what kept a scenario from being run be looked at.
func (s *suite) broken(name string, err error) error {
	if s.Failed != nil {
		s.Failed(&Scenario{Name: name, Problems: []string{err.Error()}})
	}
	return err
}

func (s *suite) say(format string, args ...any) {
	fmt.Fprintf(s.Out, "%-11s %s\n", "rolling", fmt.Sprintf(format, args...))
}

func (s *suite) happened(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, Event{At: time.Now(), What: fmt.Sprintf(format, args...)})
}

func (s *suite) deletions() map[string]time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.deleted)
}

func (s *suite) kubectl(ctx context.Context, args ...string) *exec.Cmd {
	return s.Cluster.Command(ctx, s.Cluster.Nodes[0].Name, "kubectl", args...)
}

// run is kubectl's output.
func (s *suite) run(ctx context.Context, args ...string) (string, error) {
	return s.Cluster.Kubectl(ctx, "", args...)
}

func (s *suite) setUp(ctx context.Context) error {
	began := time.Now()
	s.say("setting up ...")
	// What a run that was killed has left.
	if _, err := s.run(ctx, "delete", "namespace", namespace, "--ignore-not-found", "--timeout=90s"); err != nil {
		return err
	}
	nodes := s.Cluster.Nodes
	if _, err := s.Cluster.Kubectl(ctx, manifest(nodes[0].Name, nodes[len(nodes)-1].Name), "apply", "-f", "-"); err != nil {
		return err
	}
	if _, err := s.run(ctx, "-n", namespace, "rollout", "status", "deployment/"+plain, "--timeout=120s"); err != nil {
		return err
	}
	for _, pod := range []string{clientOne, clientTwo, clientFew, sinkOf} {
		if _, err := s.run(ctx, "-n", namespace, "wait", "--for=condition=Ready", "pod/"+pod, "--timeout=60s"); err != nil {
			return err
		}
	}
	s.say("%d servers and 4 other pods are there after %.0f s", replicas, time.Since(began).Seconds())
	return nil
}

const takeDownTimeout = 60 * time.Second

// takeDown removes everything, also when the run was interrupted.
func (s *suite) takeDown() {
	ctx, cancel := context.WithTimeout(context.Background(), takeDownTimeout)
	defer cancel()
	if _, err := s.run(ctx, "delete", "namespace", namespace, "--ignore-not-found", "--wait=false"); err != nil {
		s.say("%v", err)
	}
}

// asking is a client that runs.
type asking struct {
	client
	cmd    *exec.Cmd
	stdin  io.Closer
	stdout bytes.Buffer
	stderr bytes.Buffer
	ready  chan struct{}
	ended  chan error
}

func (s *suite) group(ctx context.Context, g group) ([]*Scenario, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.mu.Lock()
	s.events, s.deleted = nil, map[string]time.Time{}
	s.mu.Unlock()
	if g.watch != "" {
		if err := s.watch(ctx, g.in, g.watch); err != nil {
			return nil, err
		}
	}
	var names []string
	var clients []*asking
	defer func() {
		for _, one := range clients {
			one.stdin.Close()
		}
	}()
	for _, c := range g.clients {
		one, err := s.start(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.scenario, err)
		}
		clients = append(clients, one)
		names = append(names, c.scenario)
	}
	s.say("%s ...", strings.Join(names, ", "))
	for _, one := range clients {
		if err := one.waitReady(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", one.scenario, err)
		}
	}
	if err := pause(ctx, s.Durations.Before); err != nil {
		return nil, err
	}
	if err := g.action(ctx, s); err != nil {
		return nil, fmt.Errorf("%s: %w", strings.Join(names, ", "), err)
	}
	if err := pause(ctx, s.Durations.After); err != nil {
		return nil, err
	}
	for _, one := range clients {
		one.stdin.Close()
	}
	var scenarios []*Scenario
	for _, one := range clients {
		result, err := one.wait()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", one.scenario, err)
		}
		s.mu.Lock()
		scenario := newScenario(one.scenario, one.what, result, slices.Clone(s.events))
		s.mu.Unlock()
		if one.pod != "" {
			scenario.Source = namespace + "/" + one.pod
		}
		if one.judge != nil {
			one.judge(s, scenario, result)
		}
		if err := s.keep(one.scenario, result); err != nil {
			return nil, err
		}
		verdict := "PASS"
		if !scenario.Pass {
			verdict = "FAIL: " + strings.Join(scenario.Problems, "; ")
		}
		s.say("%-20s %6d attempts in %.0f s, %d lost  %s", scenario.Name, scenario.Attempts, scenario.Seconds, scenario.LostTotal(), verdict)
		scenarios = append(scenarios, scenario)
	}
	return scenarios, nil
}

// keep writes a client's whole result.
func (s *suite) keep(name string, result *rollclient.Result) error {
	text, err := json.MarshalIndent(result, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.Results, name+".json"), append(text, '\n'), 0o644)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (s *suite) start(ctx context.Context, c client) (*asking, error) {
	target, err := c.target(s)
	if err != nil {
		return nil, err
	}
	o := c.options
	args := []string{o.Mode, "-target", target, "-rate", strconv.Itoa(o.Rate), "-timeout", o.Timeout.String()}
	if o.Backends > 0 {
		args = append(args, "-backends", strconv.Itoa(o.Backends))
	}
	if o.Name != "" {
		args = append(args, "-name", o.Name)
	}
	one := &asking{client: c, ready: make(chan struct{}), ended: make(chan error, 1)}
	if c.pod == "" {
		one.cmd = s.Cluster.OutsideCommand(ctx, filepath.Join(s.Cluster.Binaries, "rollclient"), args...)
	} else {
		one.cmd = s.kubectl(ctx, append([]string{"-n", namespace, "exec", "-i", c.pod, "--", "/rollclient"}, args...)...)
	}
	stdin, err := one.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	one.stdin = stdin
	stderr, err := one.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	one.cmd.Stdout = &one.stdout
	// Ctrl-C at a terminal must not reach it before this does: closing its input is how it ends.
	one.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := one.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			if lines.Text() == "ready" {
				close(one.ready)
				continue
			}
			fmt.Fprintln(&one.stderr, lines.Text())
		}
		one.ended <- one.cmd.Wait()
	}()
	return one, nil
}

const (
	readyTimeout = 30 * time.Second
	// A client ends its last attempt first.
	endTimeout = 20 * time.Second
)

func (a *asking) waitReady(ctx context.Context) error {
	select {
	case <-a.ready:
		return nil
	case err := <-a.ended:
		return fmt.Errorf("the client ended before it began: %w: %s%s", err, a.stdout.String(), a.stderr.String())
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(readyTimeout):
		return fmt.Errorf("the client did not begin within %s", readyTimeout)
	}
}

func (a *asking) wait() (*rollclient.Result, error) {
	select {
	case failed := <-a.ended:
		result := &rollclient.Result{}
		// A client that failed has told what it counted all the same.
		if err := json.Unmarshal(a.stdout.Bytes(), result); err != nil {
			return nil, fmt.Errorf("the client told nothing (%w, %v): %s", err, failed, a.stderr.String())
		}
		return result, nil
	case <-time.After(endTimeout):
		return nil, fmt.Errorf("the client did not end within %s: %s", endTimeout, a.stderr.String())
	}
}

// service is a service's cluster IP.
func service(name string, port int) func(*suite) (string, error) {
	return func(s *suite) (string, error) { return s.clusterIP(namespace, name, port) }
}

const (
	dnsNamespace = "kube-system"
	dnsPort      = 53
)

func dnsService(s *suite) (string, error) { return s.clusterIP(dnsNamespace, "kube-dns", dnsPort) }

func (s *suite) clusterIP(namespace, name string, port int) (string, error) {
	address, err := s.run(context.Background(), "-n", namespace, "get", "service", name, "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(address, strconv.Itoa(port)), nil
}

func nodePort(node cluster.Node) func(*suite) (string, error) {
	return func(s *suite) (string, error) {
		port, err := s.run(context.Background(), "-n", namespace, "get", "service", nodePorts, "-o", `jsonpath={.spec.ports[?(@.name=="http")].nodePort}`)
		if err != nil {
			return "", err
		}
		return net.JoinHostPort(node.Addresses[0], port), nil
	}
}

// rollOut restarts a deployment twice, and waits for each. Without a name, it is CoreDNS, whatever it is called.
func rollOut(namespace, deployment string) func(context.Context, *suite) error {
	return func(ctx context.Context, s *suite) error {
		name := deployment
		if name == "" {
			var err error
			if name, err = s.run(ctx, "-n", namespace, "get", "deployments", "-l", "k8s-app=kube-dns", "-o", "name"); err != nil {
				return err
			}
		}
		for turn := 1; turn <= 2; turn++ {
			if _, err := s.run(ctx, "-n", namespace, "rollout", "restart", name); err != nil {
				return err
			}
			s.happened("roll-out %d began", turn)
			if _, err := s.run(ctx, "-n", namespace, "rollout", "status", name, "--timeout="+s.Durations.Rollout.String()); err != nil {
				return err
			}
			s.happened("roll-out %d: every new pod is ready", turn)
			if err := pause(ctx, s.Durations.Between); err != nil {
				return err
			}
		}
		return nil
	}
}

// killOn kills a node's router, or kube-proxy; the node starts it again.
func killOn(node cluster.Node) func(context.Context, *suite) error {
	return func(ctx context.Context, s *suite) error {
		for range s.Durations.Kills {
			next := time.Now().Add(s.Durations.Dead)
			s.happened("%s on %s was killed", s.Cluster.Kind, node.Name)
			if err := s.Cluster.Kill(ctx, node.Name, s.Cluster.Kind); err != nil {
				return err
			}
			s.happened("%s on %s runs again", s.Cluster.Kind, node.Name)
			if err := pause(ctx, time.Until(next)); err != nil {
				return err
			}
		}
		return nil
	}
}

// watched is one line of `kubectl get --watch --output-watch-events`.
type watched struct {
	Type   string `json:"type"`
	Object struct {
		Metadata struct {
			Name              string `json:"name"`
			DeletionTimestamp string `json:"deletionTimestamp"`
		} `json:"metadata"`
	} `json:"object"`
}

// watch records when pods of an application are deleted, until ctx ends.
func (s *suite) watch(ctx context.Context, namespace, application string) error {
	label := "app=" + application
	if namespace == dnsNamespace {
		label = "k8s-app=" + application
	}
	cmd := s.kubectl(ctx, "-n", namespace, "get", "pods", "-l", label, "--watch", "--output-watch-events", "-o", "json")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		s.readWatch(stdout)
		// It ends with the group; what it said before is what counts.
		_ = cmd.Wait()
	}()
	return nil
}

func (s *suite) readWatch(from io.Reader) {
	decoder := json.NewDecoder(from)
	for {
		w := watched{}
		if decoder.Decode(&w) != nil {
			return
		}
		name := w.Object.Metadata.Name
		s.mu.Lock()
		_, known := s.deleted[name]
		first := w.Object.Metadata.DeletionTimestamp != "" && !known
		if first {
			s.deleted[name] = time.Now()
		}
		s.mu.Unlock()
		switch {
		case w.Type == "DELETED":
			s.happened("%s is gone", name)
		case first:
			s.happened("%s is to end", name)
		case w.Type == "ADDED":
			s.happened("%s is there", name)
		}
	}
}
