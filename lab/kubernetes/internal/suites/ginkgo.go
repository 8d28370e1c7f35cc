package suites

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// runner runs suites on one cluster.
type runner struct {
	Options
	list *List
	on   Conditions
	// node is where programs run: the first, which has the control plane.
	node string
	// specs are the names in e2e.test, once they were asked for.
	specs []string
	// failures are numbered over all suites, for the names of their folders.
	failures int
}

// specNames are the names of all end-to-end tests that were built.
func (r *runner) specNames(ctx context.Context) ([]string, error) {
	if r.specs != nil {
		return r.specs, nil
	}
	cmd := r.Cluster.Command(ctx, r.node, filepath.Join(r.Cluster.Binaries, "e2e.test"), "--list-tests", "--provider=skeleton")
	output, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("the names of the end-to-end tests: %w", withOutput(err))
	}
	r.specs = listedSpecs(string(output))
	if len(r.specs) == 0 {
		return nil, fmt.Errorf("%s lists no tests", cmd)
	}
	return r.specs, nil
}

// withOutput adds what a failed command said to its error.
func withOutput(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, lastBytes(string(exit.Stderr), 2000))
	}
	return err
}

func (r *runner) ginkgo(ctx context.Context, suite *ginkgoSuite) (*SuiteResult, error) {
	began := time.Now()
	result := &SuiteResult{Name: suite.name}
	names, err := r.specNames(ctx)
	if err != nil {
		return nil, err
	}
	chosen, err := suite.choose(names, r.Focus, r.Suite == All, r.list, r.on)
	if err != nil {
		return nil, err
	}
	result.Specs = chosen.skipped
	for _, name := range r.list.unknown("[", names) {
		result.Wrong = append(result.Wrong, "the list names a spec that does not exist: "+name)
	}
	if len(chosen.run) == 0 {
		if r.Suite != All {
			result.Wrong = append(result.Wrong, fmt.Sprintf("no spec to run matches the focus %q", r.Focus))
		}
		return result, nil
	}
	folder := filepath.Join(r.Results, suite.name)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	procs := suite.procs
	if r.Procs > 0 {
		procs = r.Procs
	}
	log, err := os.Create(filepath.Join(folder, "ginkgo.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	events := filepath.Join(folder, "events.jsonl")
	// A second run into the same folder must not take the first one's results for its own.
	junit := filepath.Join(folder, "junit_01.xml")
	for _, old := range []string{events, junit} {
		if err := os.Remove(old); err != nil && !os.IsNotExist(err) {
			return nil, err
		}
	}

	fmt.Fprintf(r.Out, "%-11s %d specs, %d at a time; the log is %s\n", suite.name, len(chosen.run), procs, log.Name())
	cmd := r.Cluster.Command(ctx, r.node, filepath.Join(r.Cluster.Binaries, "ginkgo"),
		"--no-color", "-v", "--procs="+strconv.Itoa(procs), "--timeout=3h", "--grace-period=60s",
		"--focus="+chosen.focus(), filepath.Join(r.Cluster.Binaries, "e2e.test"), "--",
		"--kubeconfig="+r.Cluster.Kubeconfig, "--provider=skeleton", "--num-nodes="+strconv.Itoa(len(r.Cluster.Nodes)),
		"--report-dir="+folder, "--disable-log-dump")
	cmd.Env = append(cmd.Env, "WEIR_LAB_EVENTS="+events)
	cmd.Stdout, cmd.Stderr = log, log
	inGroup(cmd)

	progress := newProgress(r.Out, suite.name, len(chosen.run))
	defer progress.end()
	diagnostics := map[string]string{}
	told := 0
	done := make(chan struct{})
	followed := make(chan error, 1)
	go func() {
		followed <- follow(events, done, func(e event) {
			switch e.Event {
			case "start":
				if e.Specs != len(chosen.run) {
					result.Wrong = append(result.Wrong, fmt.Sprintf("%d specs were to run, and ginkgo took %d", len(chosen.run), e.Specs))
				}
			case "failing":
				diagnostics[e.Name] = r.diagnose(ctx, folder, e.Name, e.Message+"\n"+e.Output)
				if err := os.WriteFile(e.Resume, nil, 0o644); err != nil {
					fmt.Fprintln(r.Out, err)
				}
			case "spec":
				told++
				outcome := e.State
				if outcome != Passed && outcome != Skipped {
					outcome = Failed
				}
				progress.spec(outcome, e.Name)
			}
		})
	}()
	ran := runInGroup(cmd)
	close(done)
	if err := <-followed; err != nil {
		result.Wrong = append(result.Wrong, "the events of the run: "+err.Error())
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s was interrupted; what ran is in %s", suite.name, folder)
	}

	specs, trouble, err := readJUnit(junit)
	if err != nil {
		return nil, fmt.Errorf("%s ended without a report (%v: %w); its log ends with:\n%s", suite.name, ran, err, lastLines(log.Name(), 20))
	}
	result.Wrong = append(result.Wrong, trouble...)
	seen := map[string]bool{}
	for _, spec := range specs {
		spec.Diagnostics = diagnostics[spec.Name]
		result.Specs = append(result.Specs, spec)
		seen[spec.Name] = true
	}
	if told == 0 && len(specs) > 0 {
		result.Wrong = append(result.Wrong, "no spec told that it ended, so nothing was looked at when one failed: e2e.test is of other sources")
	}
	for _, name := range chosen.run {
		if !seen[name] {
			result.Wrong = append(result.Wrong, "did not run: "+name)
		}
	}
	result.Wrong = append(result.Wrong, r.list.judge(result.Specs, r.on)...)
	result.Seconds = time.Since(began).Seconds()
	result.count()
	if ran != nil && result.Failed == 0 && len(result.Wrong) == 0 {
		result.Wrong = append(result.Wrong, fmt.Sprintf("ginkgo: %v; look into %s", ran, log.Name()))
	}
	return result, nil
}
