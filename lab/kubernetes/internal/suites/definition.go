package suites

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
)

// Names of suites. All runs every one of them.
const (
	Conformance = "conformance"
	Netpol      = "netpol"
	Services    = "services"
	CNP         = "cnp"
	Pods        = "pods"
	Rolling     = "rolling"
	All         = "all"
)

// ginkgoSuite is a part of Kubernetes' end-to-end tests, told by their names.
type ginkgoSuite struct {
	name    string
	focus   string
	without string
	procs   int
}

const networkPolicySpecs = `\[sig-network\] (Netpol|NetworkPolicy)`

// Together they are every spec of sig-network: what cannot run is left out by its name alone, so that a new one is not missed.
var ginkgoSuites = []ginkgoSuite{
	{name: Conformance, focus: `\[sig-network\].*\[Conformance\]`, procs: 4},
	{name: Netpol, focus: networkPolicySpecs, without: `\[Conformance\]`, procs: 3},
	{name: Services, focus: `\[sig-network\]`, without: `\[Conformance\]|` + networkPolicySpecs, procs: 4},
}

// suiteNames are those that a suite's name stands for, in the order in which they run.
func suiteNames(name string) ([]string, error) {
	every := []string{Conformance, Netpol, Services, CNP, Rolling, Pods}
	if name == All {
		return every, nil
	}
	for _, known := range every {
		if name == known {
			return []string{name}, nil
		}
	}
	return nil, fmt.Errorf("no suite %q; there are %s, and %s", name, strings.Join(every, ", "), All)
}

func ginkgoSuiteOf(name string) *ginkgoSuite {
	for i := range ginkgoSuites {
		if ginkgoSuites[i].name == name {
			return &ginkgoSuites[i]
		}
	}
	return nil
}

// selection is what a run of a ginkgo suite consists of.
type selection struct {
	// run are the names of the specs that ginkgo is to take.
	run []string
	// skipped are those of the suite that the list in the tree leaves out.
	skipped []Spec
}

// choose says which of the program's specs a suite takes. A focus replaces the suite's own, or, where narrow is set, is asked
// for beside it.
func (s *ginkgoSuite) choose(specs []string, focus string, narrow bool, list *List, on Conditions) (*selection, error) {
	own, err := regexp.Compile(s.focus)
	if err != nil {
		return nil, err
	}
	without, err := regexp.Compile(cmp.Or(s.without, nothing))
	if err != nil {
		return nil, err
	}
	wanted, err := regexp.Compile(focus)
	if err != nil {
		return nil, fmt.Errorf("focus: %w", err)
	}
	replaced := focus != "" && !narrow
	chosen := &selection{}
	for _, name := range specs {
		if !wanted.MatchString(name) || (!replaced && (!own.MatchString(name) || without.MatchString(name))) {
			continue
		}
		if reason, skip := list.skips(name, on); skip {
			chosen.skipped = append(chosen.skipped, Spec{Name: name, Outcome: Skipped, Reason: reason})
		} else {
			chosen.run = append(chosen.run, name)
		}
	}
	return chosen, nil
}

// nothing is an expression that no name matches.
const nothing = `^$`

// focus is the expression that makes ginkgo take exactly what was chosen: all names, since Go's expressions have no "and not".
func (s *selection) focus() string {
	names := make([]string, len(s.run))
	for i, name := range s.run {
		names[i] = exactly(name)
	}
	return strings.Join(names, "|")
}

// exactly is an expression for one spec's name: ginkgo writes the suite's description before it.
func exactly(name string) string {
	return " " + regexp.QuoteMeta(name) + "$"
}

// Paths and lines stand before the names that `e2e.test --list-tests` prints.
var listedSpec = regexp.MustCompile(`^\s+\S+\.go:\d+: (.+)$`)

// listedSpecs are the names in what `e2e.test --list-tests` printed.
func listedSpecs(output string) []string {
	var names []string
	for line := range strings.Lines(output) {
		if match := listedSpec.FindStringSubmatch(strings.TrimRight(line, "\r\n")); match != nil {
			names = append(names, match[1])
		}
	}
	return names
}
