package suites

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"weir.dev/lab/kubernetes/internal/cluster"
)

const (
	cnpPrefix = "CNP"
	// cnpResource is the definition that the tests need.
	cnpResource   = "clusternetworkpolicies.policy.networking.k8s.io"
	cnpDefinition = "cnp-crds.yaml"
	cnpTest       = "TestConformance"
)

func (r *runner) cnp(ctx context.Context) (*SuiteResult, error) {
	began := time.Now()
	result := &SuiteResult{Name: CNP}
	binary := filepath.Join(r.Cluster.Binaries, "cnp.test")
	output, err := r.Cluster.Command(ctx, r.node, binary, "-list").Output()
	if err != nil {
		return nil, fmt.Errorf("the names of ClusterNetworkPolicy's tests: %w", withOutput(err))
	}
	names := strings.Fields(string(output))
	wanted, err := regexp.Compile(r.Focus)
	if err != nil {
		return nil, fmt.Errorf("focus: %w", err)
	}
	var without []string
	total := 0
	for _, name := range names {
		// A focus is for the names of tests; their subtests are known only when they ran.
		if r.Focus != "" && !wanted.MatchString(name) {
			without = append(without, name)
		} else if reason, skip := r.list.skips(name, r.on); skip {
			without = append(without, name)
			result.Specs = append(result.Specs, Spec{Name: name, Outcome: Skipped, Reason: reason})
		} else {
			total++
		}
	}
	if total == 0 {
		if r.Suite != All {
			result.Wrong = append(result.Wrong, fmt.Sprintf("no test to run matches the focus %q", r.Focus))
		}
		return result, nil
	}
	folder := filepath.Join(r.Results, CNP)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	if err := r.applyDefinition(ctx); err != nil {
		return nil, err
	}
	// Those of a run that was interrupted may still be going.
	if left, err := r.namespaces(ctx); err != nil {
		return nil, err
	} else if len(left) > 0 {
		if _, err := r.Cluster.Command(ctx, r.node, "kubectl", append([]string{"delete", "--ignore-not-found", "--timeout=120s"}, left...)...).Output(); err != nil {
			return nil, fmt.Errorf("namespaces of an earlier run: %w", withOutput(err))
		}
	}
	before, err := r.policies(ctx)
	if err != nil {
		return nil, err
	}
	// The program cleans up after itself unless it is interrupted, and a policy of this kind that stays denies whatever comes later.
	defer r.removePolicies(before)
	log, err := os.Create(filepath.Join(folder, "cnp.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()

	fmt.Fprintf(r.Out, "%-11s %d tests, one at a time; the log is %s\n", CNP, total, log.Name())
	cmd := r.Cluster.Command(ctx, r.node, binary, "-test.v=test2json", "-test.run=^"+cnpTest+"$", "-test.timeout=2h",
		"-kubeconfig="+r.Cluster.Kubeconfig, "-without="+strings.Join(without, ","))
	inGroup(cmd)
	reader, writer := io.Pipe()
	cmd.Stdout, cmd.Stderr = writer, writer
	parsed := make(chan *goTests, 1)
	go func() {
		// The number of subtests is not known before they ran: what is counted is the tests.
		progress := newProgress(r.Out, CNP, total)
		defer progress.end()
		tests := newGoTests(cnpTest)
		tests.handle = func(spec *Spec, output string, subtest bool) {
			if spec.Outcome == Failed && subtest {
				progress.failure(spec.Name)
				spec.Diagnostics = r.diagnose(ctx, folder, spec.Name, output)
			}
			if !subtest {
				progress.spec(Passed, spec.Name)
			}
		}
		tests.log = log
		tests.read(reader)
		parsed <- tests
	}()
	ran := runInGroup(cmd)
	writer.Close()
	tests := <-parsed
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s was interrupted; what ran is in %s", CNP, folder)
	}
	if tests.outcome == "" {
		return nil, fmt.Errorf("%s ended in the middle (%v); its log ends with:\n%s", CNP, ran, lastLines(log.Name(), 20))
	}
	specs := tests.leaves()
	result.Specs = append(result.Specs, specs...)
	if tests.outcome == Failed && len(specs) == 0 {
		result.Wrong = append(result.Wrong, "failed before the first test: "+strings.Join(firstCause(tests.output[""]), "; "))
	}
	if r.Focus == "" {
		known := names
		for _, spec := range specs {
			known = append(known, spec.Name)
		}
		for _, name := range r.list.unknown(cnpPrefix, known) {
			result.Wrong = append(result.Wrong, "the list names a test that does not exist: "+name)
		}
	}
	result.Wrong = append(result.Wrong, r.list.judge(result.Specs, r.on)...)
	result.Seconds = time.Since(began).Seconds()
	result.count()
	return result, nil
}

const (
	cnpNamespaces  = "network-policy-conformance-"
	removalTimeout = time.Minute
)

// policies are the names of the ClusterNetworkPolicies that there are.
func (r *runner) policies(ctx context.Context) ([]string, error) {
	names, err := r.Cluster.Command(ctx, r.node, "kubectl", "get", cnpResource, "-o", "name").Output()
	if err != nil {
		return nil, fmt.Errorf("the policies before the tests: %w", withOutput(err))
	}
	return strings.Fields(string(names)), nil
}

// namespaces are those of the tests, as kubectl names them.
func (r *runner) namespaces(ctx context.Context) (left []string, err error) {
	names, err := r.Cluster.Command(ctx, r.node, "kubectl", "get", "namespaces", "-o", "name").Output()
	if err != nil {
		return nil, fmt.Errorf("the namespaces: %w", withOutput(err))
	}
	for name := range strings.FieldsSeq(string(names)) {
		if strings.HasPrefix(name, "namespace/"+cnpNamespaces) {
			left = append(left, name)
		}
	}
	return left, nil
}

// removePolicies removes the policies that came since, and the namespaces of the tests.
func (r *runner) removePolicies(before []string) {
	ctx, cancel := context.WithTimeout(context.Background(), removalTimeout)
	defer cancel()
	remove := []string{"delete", "--ignore-not-found", "--wait=false"}
	now, err := r.policies(ctx)
	for _, name := range now {
		if !slices.Contains(before, name) {
			remove = append(remove, name)
		}
	}
	namespaces, listed := r.namespaces(ctx)
	remove = append(remove, namespaces...)
	if err = errors.Join(err, listed); err == nil && len(remove) > 3 {
		_, err = r.Cluster.Command(ctx, r.node, "kubectl", remove...).Output()
	}
	if err != nil {
		fmt.Fprintf(r.Out, "%-11s what the tests left stays: %v\n", CNP, withOutput(err))
	}
}

// applyDefinition makes ClusterNetworkPolicy known to the API server.
func (r *runner) applyDefinition(ctx context.Context) error {
	path := filepath.Join(r.Cluster.Binaries, cnpDefinition)
	for _, args := range [][]string{
		{"apply", "--server-side", "--force-conflicts", "-f", path},
		{"wait", "--for=condition=Established", "--timeout=60s", "crd/" + cnpResource},
	} {
		if output, err := r.Cluster.Command(ctx, r.node, "kubectl", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("the definition of ClusterNetworkPolicy: kubectl %s: %w: %s", strings.Join(args, " "), err, lastBytes(string(output), 2000))
		}
	}
	if r.Cluster.Kind != cluster.Weir {
		return nil
	}
	// A router looks for groups that it does not know each minute.
	for _, node := range r.Cluster.Nodes {
		weir := filepath.Join(r.Cluster.Dir, "bin", "weir")
		if err := cluster.Until(ctx, 100*time.Second, "weir on "+node.Name+" to follow ClusterNetworkPolicies", func() error {
			output, err := r.Cluster.Command(ctx, node.Name, weir, "status", "--output", "json", "-c", node.Config).Output()
			if err == nil && !strings.Contains(string(output), "clusternetworkpolicies") {
				err = errors.New("it does not yet")
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// goTests understands what a test binary prints with -test.v=test2json, with which it tells of each subtest as it ends; with -test.v alone, it
// keeps that to itself until all of them have.
type goTests struct {
	root string
	// log gets all lines, without the marks for programs.
	log io.Writer
	// handle is told of each test below root as it ends, with what it logged.
	handle func(spec *Spec, output string, subtest bool)
	// outcome is root's, empty while it runs.
	outcome string
	order   []string
	specs   map[string]*Spec
	// output is what each test logged, root's under the empty name.
	output  map[string]string
	parents map[string]bool
	current string
}

func newGoTests(root string) *goTests {
	return &goTests{root: root, log: io.Discard, specs: map[string]*Spec{}, output: map[string]string{}, parents: map[string]bool{}, handle: func(*Spec, string, bool) {}}
}

var (
	testTurn = regexp.MustCompile(`^=== (?:RUN|CONT|NAME|PAUSE) +(\S*)$`)
	testEnd  = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (\S+) \((\d+\.\d+)s\)$`)
)

const (
	keptOutputBytes = 64 << 10
	// testMark begins a line that the test binary itself made, and no test.
	testMark = "\x16"
)

func (t *goTests) read(from io.Reader) {
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			line = strings.TrimPrefix(strings.TrimRight(line, "\r\n"), testMark)
			// What is wrong with the log is not wrong with the tests.
			_, _ = fmt.Fprintln(t.log, line)
			t.line(line)
		}
		if err != nil {
			return
		}
	}
}

func (t *goTests) line(line string) {
	if match := testTurn.FindStringSubmatch(line); match != nil {
		t.current = t.name(match[1])
		if t.current != "" {
			t.start(t.current)
		}
		return
	}
	match := testEnd.FindStringSubmatch(line)
	if match == nil {
		if kept := t.output[t.current] + line + "\n"; len(kept) <= keptOutputBytes {
			t.output[t.current] = kept
		} else {
			t.output[t.current] = kept[len(kept)-keptOutputBytes:]
		}
		return
	}
	outcome := map[string]string{"PASS": Passed, "FAIL": Failed, "SKIP": Skipped}[match[1]]
	if match[2] == t.root {
		t.outcome = outcome
		return
	}
	name := t.name(match[2])
	spec := t.start(name)
	spec.Outcome, spec.Cause = outcome, ""
	spec.Seconds, _ = strconv.ParseFloat(match[3], 64)
	output := t.output[name]
	if outcome == Failed {
		spec.Cause = strings.Join(pokeCause(output), "\n")
	}
	if outcome == Skipped {
		spec.Reason = strings.Join(firstCause(output), "; ")
	}
	t.handle(spec, output, strings.Contains(name, "/"))
}

// start makes a test known, and the one that it is part of.
func (t *goTests) start(name string) *Spec {
	if spec := t.specs[name]; spec != nil {
		return spec
	}
	if parent, _, is := strings.Cut(name, "/"); is {
		t.parents[parent] = true
	}
	spec := &Spec{Name: name, Outcome: Failed, Cause: "it did not end"}
	t.specs[name] = spec
	t.order = append(t.order, name)
	return spec
}

// name is a test's name below root, with the spaces that go test replaces.
func (t *goTests) name(full string) string {
	_, name, _ := strings.Cut(full, "/")
	return strings.ReplaceAll(name, "_", " ")
}

// leaves are the tests that are not made of others, and those that failed by themselves, outside their subtests.
func (t *goTests) leaves() []Spec {
	var specs []Spec
	for _, name := range t.order {
		if !t.parents[name] || (t.specs[name].Outcome == Failed && t.ownFailure(name)) {
			specs = append(specs, *t.specs[name])
		}
	}
	return specs
}

func (t *goTests) ownFailure(name string) bool {
	for other, spec := range t.specs {
		if strings.HasPrefix(other, name+"/") && spec.Outcome == Failed {
			return false
		}
	}
	return true
}

// pokeCause is why one of ClusterNetworkPolicy's subtests failed. Each of its checks is asked again until it is right or its
// time is over, so of many complaints the last is the one that counts.
func pokeCause(output string) []string {
	var command, complaint string
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		_, text, _ := strings.Cut(line, ": ")
		switch {
		case strings.HasPrefix(text, "FAILED Command was"):
			command = strings.TrimPrefix(text, "FAILED Command was ")
		case strings.HasPrefix(text, "Expected connection"), strings.HasPrefix(text, "FAILED to execute"):
			complaint = text
		}
	}
	var cause []string
	for _, line := range []string{command, complaint} {
		if line != "" {
			cause = append(cause, line)
		}
	}
	if cause != nil {
		return cause
	}
	return firstCause(output)
}
