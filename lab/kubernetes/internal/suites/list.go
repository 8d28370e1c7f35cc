package suites

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"weir.dev/lab/kubernetes/internal/cluster"
)

// List says of specs, by their names, that they cannot run or are expected to fail, and why.
type List struct {
	// Skip are those that nothing on this machine could pass: they are not run.
	Skip []Entry `json:"skip"`
	// Fail are those that run and fail.
	Fail []Entry `json:"fail"`
}

// Entry is one reason and the specs that it holds for.
type Entry struct {
	Reason string `json:"reason"`
	// When restricts the entry to some clusters.
	When Conditions `json:"when"`
	// Cause is an expression that the cause of the failure must match, so that a spec that fails for another reason is noticed.
	Cause string   `json:"cause"`
	Specs []string `json:"specs"`

	cause *regexp.Regexp
}

// Conditions are properties of clusters; of an entry, each names the values that it holds for, and nothing means any.
type Conditions struct {
	Kind    []string `json:"kind,omitempty"`
	Family  []string `json:"family,omitempty"`
	Encap   []string `json:"encap,omitempty"`
	Offload []string `json:"offload,omitempty"`
}

// conditionsOf are the properties of a cluster.
func conditionsOf(c *cluster.Cluster) Conditions {
	return Conditions{Kind: []string{c.Kind}, Family: []string{c.Family}, Encap: []string{c.Encap}, Offload: []string{c.Offload}}
}

func (c Conditions) hold(on Conditions) bool {
	one := func(wanted, have []string) bool {
		return len(wanted) == 0 || len(have) == 1 && slices.Contains(wanted, have[0])
	}
	return one(c.Kind, on.Kind) && one(c.Family, on.Family) && one(c.Encap, on.Encap) && one(c.Offload, on.Offload)
}

var conditionValues = map[string][]string{
	"kind":    {cluster.Weir, cluster.KubeProxy},
	"family":  {"ipv4", "ipv6", "dual"},
	"encap":   {"none", "ipip", "cross-subnet"},
	"offload": {"auto", "off"},
}

func (c Conditions) check() error {
	for name, values := range map[string][]string{"kind": c.Kind, "family": c.Family, "encap": c.Encap, "offload": c.Offload} {
		for _, value := range values {
			if !slices.Contains(conditionValues[name], value) {
				return fmt.Errorf("when: no %s %q; there are %s", name, value, strings.Join(conditionValues[name], ", "))
			}
		}
	}
	return nil
}

// ReadList reads a list from a file.
func ReadList(path string) (*List, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := parseList(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return list, nil
}

func parseList(text []byte) (*List, error) {
	list := &List{}
	if err := yaml.UnmarshalStrict(text, list); err != nil {
		return nil, err
	}
	for part, entries := range map[string][]Entry{"skip": list.Skip, "fail": list.Fail} {
		for i := range entries {
			e := &entries[i]
			where := fmt.Sprintf("%s %d", part, i+1)
			if strings.TrimSpace(e.Reason) == "" {
				return nil, fmt.Errorf("%s: every entry needs a reason", where)
			}
			where += " (" + e.Reason + ")"
			if len(e.Specs) == 0 {
				return nil, fmt.Errorf("%s: names no specs", where)
			}
			if part == "skip" && e.Cause != "" {
				return nil, fmt.Errorf("%s: what does not run has no cause", where)
			}
			if err := e.When.check(); err != nil {
				return nil, fmt.Errorf("%s: %w", where, err)
			}
			cause, err := regexp.Compile(e.Cause)
			if err != nil {
				return nil, fmt.Errorf("%s: cause: %w", where, err)
			}
			e.cause = cause
		}
	}
	return list, nil
}

func (l *List) skips(name string, on Conditions) (reason string, skip bool) {
	for _, e := range l.Skip {
		if e.When.hold(on) && slices.Contains(e.Specs, name) {
			return e.Reason, true
		}
	}
	return "", false
}

// expects is the entry by which a spec is expected to fail, nil if it is to pass.
func (l *List) expects(name string, on Conditions) *Entry {
	for i := range l.Fail {
		if e := &l.Fail[i]; e.When.hold(on) && slices.Contains(e.Specs, name) {
			return e
		}
	}
	return nil
}

// unknown are names in the list that begin with prefix and are no specs, as after a new version of the tests.
func (l *List) unknown(prefix string, specs []string) []string {
	var missing []string
	for _, entries := range [][]Entry{l.Skip, l.Fail} {
		for _, e := range entries {
			for _, name := range e.Specs {
				if strings.HasPrefix(name, prefix) && !slices.Contains(specs, name) && !slices.Contains(missing, name) {
					missing = append(missing, name)
				}
			}
		}
	}
	return missing
}

// judge says of each spec that failed whether it was expected to, and returns what the list does not agree with.
func (l *List) judge(specs []Spec, on Conditions) (wrong []string) {
	for i := range specs {
		spec := &specs[i]
		e := l.expects(spec.Name, on)
		switch {
		case spec.Outcome == Failed && e == nil:
			wrong = append(wrong, "failed: "+spec.Name)
		case spec.Outcome == Failed && !e.cause.MatchString(spec.Cause):
			spec.Reason = e.Reason
			wrong = append(wrong, fmt.Sprintf("failed otherwise than the list expects (%s): %s", e.Reason, spec.Name))
		case spec.Outcome == Failed:
			spec.Expected = true
			spec.Reason = e.Reason
		case spec.Outcome == Passed && e != nil:
			wrong = append(wrong, fmt.Sprintf("passed, and the list expects it to fail (%s): %s", e.Reason, spec.Name))
		}
	}
	return wrong
}
