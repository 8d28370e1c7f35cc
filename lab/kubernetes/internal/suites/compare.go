package suites

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"weir.dev/lab/kubernetes/internal/rolling"
)

// ReadSummary reads a run's summary; path is its file, or the folder of its results.
func ReadSummary(path string) (*Summary, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, "summary.json")
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s := &Summary{}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// Compare prints two runs side by side: their suites, the specs that fared differently, and the measurements of roll-outs. Each of a and b is a
// summary.json or the folder that it is in.
func Compare(a, b string, out io.Writer) error {
	left, err := ReadSummary(a)
	if err != nil {
		return err
	}
	right, err := ReadSummary(b)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "A: %s (%s)\nB: %s (%s)\n\n", left.what(), a, right.what(), b)

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "suite\tpassed A\tB\tfailed A\tB\tskipped A\tB\tseconds A\tB\t")
	names := both(left.Suites, right.Suites, func(r SuiteResult) string { return r.Name })
	for _, name := range names {
		l, r := left.suite(name), right.suite(name)
		column := func(of func(*SuiteResult) string) string {
			return orDash(l, of) + "\t" + orDash(r, of)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t\n", name,
			column(func(r *SuiteResult) string { return fmt.Sprint(r.Passed) }), column(func(r *SuiteResult) string { return fmt.Sprint(r.Failed) }),
			column(func(r *SuiteResult) string { return fmt.Sprint(r.Skipped) }), column(func(r *SuiteResult) string { return fmt.Sprintf("%.0f", r.Seconds) }))
	}
	table.Flush()

	for _, name := range names {
		l, r := left.suite(name), right.suite(name)
		if l == nil || r == nil {
			continue
		}
		l.printDifferent(out, r)
		if len(l.Rolling) > 0 || len(r.Rolling) > 0 {
			fmt.Fprintln(out)
			rolling.Compare(out, l.Rolling, r.Rolling)
		}
	}
	return nil
}

func (s *Summary) what() string {
	return fmt.Sprintf("%s, %s, encapsulation %s, offload %s, %s", s.Kind, s.Family, orNone(s.Encap), orNone(s.Offload), s.Began.Format("2006-01-02 15:04"))
}

func (s *Summary) suite(name string) *SuiteResult {
	for i := range s.Suites {
		if s.Suites[i].Name == name {
			return &s.Suites[i]
		}
	}
	return nil
}

func (r *SuiteResult) printDifferent(out io.Writer, other *SuiteResult) {
	specs := both(r.Specs, other.Specs, func(s Spec) string { return s.Name })
	first := true
	for _, name := range specs {
		a, b := r.outcome(name), other.outcome(name)
		if a == b {
			continue
		}
		if first {
			fmt.Fprintf(out, "\n%s: different\n", r.Name)
			first = false
		}
		fmt.Fprintf(out, "  A %-7s  B %-7s  %s\n", a, b, name)
	}
}

func (r *SuiteResult) outcome(name string) string {
	for _, spec := range r.Specs {
		if spec.Name == name {
			return spec.Outcome
		}
	}
	return "-"
}

// both are the names in a and then those in b alone, each in its order.
func both[T any](a, b []T, name func(T) string) []string {
	var names []string
	for _, list := range [][]T{a, b} {
		for _, one := range list {
			if n := name(one); !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	return names
}

func orDash(r *SuiteResult, of func(*SuiteResult) string) string {
	if r == nil {
		return "-"
	}
	return strings.TrimSpace(of(r))
}
