// Package suites runs tests on a cluster of the lab: Kubernetes' own end-to-end tests of the network, the conformance tests of
// ClusterNetworkPolicy, and the lab's own of roll-outs, restarts and pods. It judges them by a list of what is expected to fail, and collects what is
// needed to understand what did.
package suites

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"weir.dev/lab/kubernetes/internal/cluster"
	"weir.dev/lab/kubernetes/internal/pods"
	"weir.dev/lab/kubernetes/internal/rolling"
)

// Options are what a run consists of.
type Options struct {
	Cluster *cluster.Cluster
	// Suite is one suite, or All.
	Suite string
	// Focus is a regular expression that replaces the suite's own choice of specs; with All, each suite runs those of its specs that match.
	Focus string
	// Procs is how many specs run at a time; 0: the suite's default.
	Procs int
	// Results is the folder for reports and diagnostics, which is made.
	Results string
	// Expected is the path of the list of specs that cannot run, and of those that are expected to fail.
	Expected string
	// Rolling are the times of the suite of that name; zero: its defaults.
	Rolling rolling.Durations
	Out     io.Writer
}

// Run runs suites and says whether all was as the list expects; what was not is printed, and in Results/summary.json and Results/junit.xml. An
// error is what kept a suite from being run at all; the others run all the same.
func Run(ctx context.Context, o Options) (ok bool, err error) {
	names, err := suiteNames(o.Suite)
	if err != nil {
		return false, err
	}
	if len(o.Cluster.Nodes) == 0 {
		return false, fmt.Errorf("the cluster in %s has no nodes", o.Cluster.Dir)
	}
	list, err := ReadList(o.Expected)
	if err != nil {
		return false, err
	}
	// Commands in nodes have another working folder.
	if o.Results, err = filepath.Abs(o.Results); err != nil {
		return false, err
	}
	if err := os.MkdirAll(o.Results, 0o755); err != nil {
		return false, err
	}
	r := &runner{Options: o, list: list, on: conditionsOf(o.Cluster), node: o.Cluster.Nodes[0].Name}
	summary := &Summary{
		Began: time.Now().UTC().Truncate(time.Second), Kind: o.Cluster.Kind, Family: o.Cluster.Family, Encap: o.Cluster.Encap, Offload: o.Cluster.Offload,
		Nodes: len(o.Cluster.Nodes), OK: true,
	}
	var failures []error
	for _, name := range names {
		result, err := r.suite(ctx, name)
		if err != nil {
			failures = append(failures, err)
			summary.OK = false
			if ctx.Err() != nil {
				break
			}
			fmt.Fprintf(o.Out, "%-11s %v\n", name, err)
			continue
		}
		result.count()
		summary.Suites = append(summary.Suites, *result)
		summary.OK = summary.OK && len(result.Wrong) == 0
		// After each suite: a run of hours that is ended keeps what it found.
		if err := summary.write(filepath.Join(o.Results, "summary.json")); err != nil {
			return false, err
		}
	}
	summary.print(o.Out)
	if err := errors.Join(summary.write(filepath.Join(o.Results, "summary.json")), writeJUnit(filepath.Join(o.Results, "junit.xml"), summary.Suites)); err != nil {
		return false, err
	}
	fmt.Fprintf(o.Out, "Reports: %s\n", o.Results)
	return summary.OK, errors.Join(failures...)
}

func (r *runner) suite(ctx context.Context, name string) (*SuiteResult, error) {
	switch name {
	case CNP:
		return r.cnp(ctx)
	case Rolling:
		return r.rolling(ctx)
	case Pods:
		return r.pods(ctx)
	default:
		return r.ginkgo(ctx, ginkgoSuiteOf(name))
	}
}

const rollingPrefix = "rolling/"

func (r *runner) rolling(ctx context.Context) (*SuiteResult, error) {
	began := time.Now()
	result := &SuiteResult{Name: Rolling}
	folder := filepath.Join(r.Results, Rolling)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	scenarios, err := rolling.Run(ctx, rolling.Options{
		Cluster: r.Cluster, Focus: r.Focus, Results: folder, Durations: r.Options.Rolling, Out: r.Out,
		Failed: func(s *rolling.Scenario) {
			var known []pair
			if target, err := netip.ParseAddrPort(s.Target); err == nil && s.Source != "" {
				known = append(known, pair{Source: s.Source, Destination: target.Addr().String(), Protocol: s.Protocol, Port: int(target.Port())})
			}
			s.Diagnostics = r.diagnose(ctx, folder, rollingPrefix+s.Name, s.Why(), known...)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", Rolling, err)
	}
	known := make([]string, 0, len(scenarios))
	for _, s := range scenarios {
		spec := Spec{Name: rollingPrefix + s.Name, Outcome: Passed, Seconds: s.Seconds, Diagnostics: s.Diagnostics}
		if !s.Pass {
			spec.Outcome = Failed
			spec.Cause = s.Why()
		}
		known = append(known, spec.Name)
		result.Specs = append(result.Specs, spec)
	}
	result.Rolling = scenarios
	return r.judgeOwn(result, rollingPrefix, known, began), nil
}

const podsPrefix = "pods/"

func (r *runner) pods(ctx context.Context) (*SuiteResult, error) {
	began := time.Now()
	result := &SuiteResult{Name: Pods}
	folder := filepath.Join(r.Results, Pods)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	found := map[string]string{}
	outcomes, err := pods.Run(ctx, pods.Options{
		Cluster: r.Cluster, Focus: r.Focus, Out: r.Out,
		Failed: func(o pods.Outcome) {
			found[o.Name] = r.diagnose(ctx, folder, podsPrefix+o.Name, strings.Join(o.Problems, "\n"))
		},
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", Pods, err)
	}
	var known []string
	for _, o := range outcomes {
		spec := Spec{Name: podsPrefix + o.Name, Outcome: Passed, Seconds: o.Seconds, Diagnostics: found[o.Name]}
		if len(o.Problems) > 0 {
			spec.Outcome, spec.Cause = Failed, strings.Join(o.Problems, "\n")
		}
		known = append(known, spec.Name)
		result.Specs = append(result.Specs, spec)
	}
	return r.judgeOwn(result, podsPrefix, known, began), nil
}

// judgeOwn judges a suite of the lab's own scenarios by the list. kube-proxy's cluster is the peer: it is measured, and nobody here mends it.
func (r *runner) judgeOwn(result *SuiteResult, prefix string, known []string, began time.Time) *SuiteResult {
	if len(known) == 0 && r.Suite != All {
		result.Wrong = append(result.Wrong, fmt.Sprintf("no scenario matches the focus %q", r.Focus))
	}
	if r.Focus == "" {
		for _, name := range r.list.unknown(prefix, known) {
			result.Wrong = append(result.Wrong, "the list names a scenario that does not exist: "+name)
		}
	}
	if r.Cluster.Kind == cluster.KubeProxy {
		for i := range result.Specs {
			if spec := &result.Specs[i]; spec.Outcome == Failed {
				spec.Expected = true
				spec.Reason = "kube-proxy is measured, not judged"
			}
		}
	} else {
		result.Wrong = append(result.Wrong, r.list.judge(result.Specs, r.on)...)
	}
	result.Seconds = time.Since(began).Seconds()
	return result
}
