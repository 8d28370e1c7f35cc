package suites

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"weir.dev/lab/kubernetes/internal/rolling"
)

// Outcomes of a spec.
const (
	Passed  = "passed"
	Failed  = "failed"
	Skipped = "skipped"
)

// Spec is one test and what became of it.
type Spec struct {
	Name    string  `json:"name"`
	Outcome string  `json:"outcome"`
	Seconds float64 `json:"seconds"`
	// Cause is the first of what a failure said.
	Cause string `json:"cause,omitempty"`
	// Expected is whether the list in the tree expects the failure.
	Expected bool `json:"expected,omitempty"`
	// Reason is why it was skipped or is expected to fail.
	Reason string `json:"reason,omitempty"`
	// Diagnostics is the folder with the state of the cluster at the time of the failure.
	Diagnostics string `json:"diagnostics,omitempty"`
}

// SuiteResult is what became of one suite.
type SuiteResult struct {
	Name    string  `json:"name"`
	Passed  int     `json:"passed"`
	Failed  int     `json:"failed"`
	Skipped int     `json:"skipped"`
	Seconds float64 `json:"seconds"`
	Specs   []Spec  `json:"specs"`
	// Rolling are the measurements of the suite of that name.
	Rolling []rolling.Scenario `json:"rolling,omitempty"`
	// Wrong is everything for which the suite does not count as passed.
	Wrong []string `json:"wrong,omitempty"`
}

// Summary is a run, as summary.json has it.
type Summary struct {
	Began   time.Time     `json:"began"`
	Kind    string        `json:"kind"`
	Family  string        `json:"family"`
	Encap   string        `json:"encap"`
	Offload string        `json:"offload"`
	Nodes   int           `json:"nodes"`
	Suites  []SuiteResult `json:"suites"`
	OK      bool          `json:"ok"`
}

func (r *SuiteResult) count() {
	r.Passed, r.Failed, r.Skipped = 0, 0, 0
	for _, spec := range r.Specs {
		switch spec.Outcome {
		case Passed:
			r.Passed++
		case Failed:
			r.Failed++
		case Skipped:
			r.Skipped++
		}
	}
	slices.SortStableFunc(r.Specs, func(a, b Spec) int { return cmp.Compare(a.Name, b.Name) })
}

// print writes the run for a person: the table, then what failed, what was expected to, what was left out and why.
func (s *Summary) print(out io.Writer) {
	fmt.Fprintf(out, "\n%s, %s, encapsulation %s, offload %s, %d nodes\n\n", s.Kind, s.Family, orNone(s.Encap), orNone(s.Offload), s.Nodes)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "suite\tpassed\tfailed\tskipped\tseconds\t")
	for _, r := range s.Suites {
		verdict := ""
		if expected := r.expected(); expected > 0 {
			verdict = fmt.Sprintf("%d expected to fail", expected)
		}
		if len(r.Wrong) > 0 {
			verdict = strings.TrimPrefix(fmt.Sprintf("%s, %d wrong", verdict, len(r.Wrong)), ", ")
		}
		fmt.Fprintf(table, "%s\t%d\t%d\t%d\t%.0f\t  %s\n", r.Name, r.Passed, r.Failed, r.Skipped, r.Seconds, verdict)
	}
	table.Flush()

	for _, r := range s.Suites {
		rolling.Print(out, r.Rolling)
	}
	for _, r := range s.Suites {
		r.printSpecs(out, "failed", func(spec Spec) bool { return spec.Outcome == Failed && !spec.Expected })
	}
	for _, r := range s.Suites {
		r.printReasons(out, "failed as the list expects", func(spec Spec) bool { return spec.Outcome == Failed && spec.Expected })
	}
	for _, r := range s.Suites {
		r.printReasons(out, "skipped", func(spec Spec) bool { return spec.Outcome == Skipped })
	}
	for _, r := range s.Suites {
		for i, wrong := range r.Wrong {
			if i == 0 {
				fmt.Fprintf(out, "\n%s: wrong\n", r.Name)
			}
			fmt.Fprintf(out, "  %s\n", wrong)
		}
	}
	if s.OK {
		fmt.Fprintln(out, "\nAll is as expected.")
	} else {
		fmt.Fprintln(out, "\nNot as expected.")
	}
}

func (r *SuiteResult) expected() (n int) {
	for _, spec := range r.Specs {
		if spec.Outcome == Failed && spec.Expected {
			n++
		}
	}
	return n
}

func (r *SuiteResult) printSpecs(out io.Writer, title string, of func(Spec) bool) {
	first := true
	for _, spec := range r.Specs {
		if !of(spec) {
			continue
		}
		if first {
			fmt.Fprintf(out, "\n%s: %s\n", r.Name, title)
			first = false
		}
		fmt.Fprintf(out, "  %s\n", spec.Name)
		for line := range strings.Lines(spec.Cause) {
			fmt.Fprintf(out, "      %s\n", strings.TrimRight(line, "\n"))
		}
		if spec.Diagnostics != "" {
			fmt.Fprintf(out, "      look into %s\n", spec.Diagnostics)
		}
	}
}

// printReasons prints specs under what they have in common.
func (r *SuiteResult) printReasons(out io.Writer, title string, of func(Spec) bool) {
	var reasons []string
	names := map[string][]string{}
	for _, spec := range r.Specs {
		if of(spec) {
			if names[spec.Reason] == nil {
				reasons = append(reasons, spec.Reason)
			}
			names[spec.Reason] = append(names[spec.Reason], spec.Name)
		}
	}
	for i, reason := range reasons {
		if i == 0 {
			fmt.Fprintf(out, "\n%s: %s\n", r.Name, title)
		}
		fmt.Fprintf(out, "  %s\n", strings.ReplaceAll(reason, "\n", " "))
		for _, name := range names[reason] {
			fmt.Fprintf(out, "      %s\n", name)
		}
	}
}

func (s *Summary) write(path string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func orNone(value string) string {
	if value == "" {
		return "none"
	}
	return value
}
