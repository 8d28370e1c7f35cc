// Package rolling measures what a change costs the clients of a service: pods that are rolled out, a router that is killed. It runs on a
// cluster of the lab, with clients in pods and outside, and counts every attempt that was lost.
package rolling

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"weir.dev/lab/kubernetes/internal/rollclient"
)

// Event is something that happened while clients asked.
type Event struct {
	At   time.Time `json:"at"`
	What string    `json:"what"`
}

// Bulk is how a bulk transfer went.
type Bulk struct {
	// MedianGbit is the median over the intervals, in Gbit/s, and LeastGbit the least, without the first and the last.
	MedianGbit float64 `json:"medianGbit"`
	LeastGbit  float64 `json:"leastGbit"`
	// DipMs is for how long in sum it was slower than half of the median, LongestDipMs the longest time at a stretch.
	DipMs        int `json:"dipMs"`
	LongestDipMs int `json:"longestDipMs"`
}

// Scenario is one client and what became of it.
type Scenario struct {
	Name string `json:"name"`
	// What says what was done, for a person.
	What string `json:"what"`
	// Source is the pod that asked, namespace/name, or empty: from outside. Target is what it asked, ADDRESS:PORT.
	Source   string         `json:"source,omitempty"`
	Target   string         `json:"target"`
	Protocol string         `json:"protocol"`
	Seconds  float64        `json:"seconds"`
	Attempts int            `json:"attempts"`
	OK       int            `json:"ok"`
	Lost     map[string]int `json:"lost"`
	P50Ms    float64        `json:"p50Ms"`
	P99Ms    float64        `json:"p99Ms"`
	MaxMs    float64        `json:"maxMs"`
	Bulk     *Bulk          `json:"bulk,omitempty"`
	// Pass is whether nothing was lost.
	Pass bool `json:"pass"`
	// Problems are why it did not pass.
	Problems []string `json:"problems,omitempty"`
	Notes    []string `json:"notes,omitempty"`
	Events   []Event  `json:"events,omitempty"`
	// Losses are the first of what was lost; the client's own file has more.
	Losses      []rollclient.Loss `json:"losses,omitempty"`
	Diagnostics string            `json:"diagnostics,omitempty"`
}

// LostTotal is the number of attempts that failed.
func (s *Scenario) LostTotal() (total int) {
	for _, n := range s.Lost {
		total += n
	}
	return total
}

// Why are the problems, and the first losses, as text.
func (s *Scenario) Why() string {
	lines := slices.Clone(s.Problems)
	for i, loss := range s.Losses {
		if i == 3 {
			lines = append(lines, "...")
			break
		}
		lines = append(lines, fmt.Sprintf("%s after %.0f ms, from port %d: %s%s", loss.Kind, loss.AfterMs, loss.LocalPort, loss.At.Format("15:04:05.000"), s.lastEvent(loss.At)))
	}
	return strings.Join(lines, "\n")
}

// lastEvent is what had happened last before a time.
func (s *Scenario) lastEvent(at time.Time) string {
	last := ""
	for _, e := range s.Events {
		if e.At.After(at) {
			break
		}
		last = fmt.Sprintf(", %.1f s after: %s", at.Sub(e.At).Seconds(), e.What)
	}
	return last
}

const (
	// Fewer answers than these prove nothing.
	leastAnswers = 100
	summedLosses = 20
)

// newScenario is what a client's result says, judged by the bar that nothing is lost.
func newScenario(name, what string, r *rollclient.Result, events []Event) *Scenario {
	s := &Scenario{
		Name: name, What: what, Target: r.Target, Protocol: protocol(r.Mode), Seconds: r.Seconds, Attempts: r.Attempts, OK: r.OK, Lost: r.Lost, P50Ms: r.P50Ms, P99Ms: r.P99Ms, MaxMs: r.MaxMs,
		Events: events, Losses: r.Losses[:min(len(r.Losses), summedLosses)],
	}
	if lost := s.LostTotal(); lost > 0 {
		s.problem("%d of %d lost: %s", lost, s.Attempts, kinds(s.Lost))
	}
	if r.Error != "" {
		s.problem("%s", r.Error)
	}
	if r.Mode != rollclient.Bulk && r.Mode != rollclient.Long && s.OK < leastAnswers {
		s.problem("%d answers are too few to prove anything", s.OK)
	}
	s.Pass = len(s.Problems) == 0
	return s
}

func protocol(mode string) string {
	switch mode {
	case rollclient.UDP, rollclient.UDPOne, rollclient.DNS:
		return "udp"
	}
	return "tcp"
}

func (s *Scenario) problem(format string, args ...any) {
	s.Problems = append(s.Problems, fmt.Sprintf(format, args...))
	s.Pass = false
}

func (s *Scenario) note(format string, args ...any) {
	s.Notes = append(s.Notes, fmt.Sprintf(format, args...))
}

func kinds(lost map[string]int) string {
	var parts []string
	for kind, n := range lost {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, kind))
		}
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

const (
	// endedEarly is a connection that ended before its pod did.
	endedEarly = "ended early"
	// Between what a watch of the API shows and what a client sees lies some time.
	watchSlack = 700 * time.Millisecond
)

// judgeLong replaces the count of requests by that of connections: each has to live until its pod ends it. A pod goes on for grace after
// it was deleted.
func (s *Scenario) judgeLong(r *rollclient.Result, deleted map[string]time.Time, grace time.Duration) {
	s.Attempts, s.OK, s.Lost = len(r.Connections), 0, map[string]int{}
	s.Problems, s.Losses = nil, nil
	if r.Error != "" {
		s.problem("%s", r.Error)
	}
	open, requests := 0, 0
	for _, c := range r.Connections {
		requests += c.Requests
		at, gone := deleted[c.Backend]
		loss := rollclient.Loss{At: c.Ended, LocalPort: c.LocalPort, Error: "connection to " + c.Backend}
		switch {
		case c.Kind == "":
			s.OK++
			open++
			continue
		case !gone:
			loss.Kind = endedEarly
			loss.Error += ", whose pod was not deleted"
		case c.Ended.Before(at.Add(grace - watchSlack)):
			loss.Kind = endedEarly
			loss.Error += fmt.Sprintf(", %.1f s after its pod was deleted, which went on for %.0f s", c.Ended.Sub(at).Seconds(), grace.Seconds())
		case c.Kind != rollclient.Reset:
			// The pod's end closes its connections; who hears nothing waits for nothing.
			loss.Kind = c.Kind
		default:
			s.OK++
			continue
		}
		s.Lost[loss.Kind]++
		s.Losses = append(s.Losses, loss)
	}
	if s.Attempts == 0 && r.Error == "" {
		s.problem("there were no connections")
	}
	if lost := s.LostTotal(); lost > 0 {
		s.problem("%d of %d connections lost: %s", lost, s.Attempts, kinds(s.Lost))
	}
	s.note("%d requests by %d connections, %d of which are still open", requests, s.Attempts, open)
	s.Pass = len(s.Problems) == 0
}

// judgeBulk says how a transfer went: it has to survive, and to come back to its speed.
func (s *Scenario) judgeBulk(r *rollclient.Result) {
	// The first is the slow start, the last is cut off.
	if len(r.IntervalBytes) < 20 || r.IntervalMs == 0 {
		s.problem("%d intervals are too few to prove anything", len(r.IntervalBytes))
		return
	}
	intervals := r.IntervalBytes[1 : len(r.IntervalBytes)-1]
	sorted := slices.Sorted(slices.Values(intervals))
	median := sorted[len(sorted)/2]
	gbit := func(bytes int64) float64 { return float64(bytes) * 8 / float64(r.IntervalMs) / 1e6 }
	b := &Bulk{MedianGbit: gbit(median), LeastGbit: gbit(sorted[0])}
	stretch := 0
	for _, bytes := range intervals {
		if bytes >= median/2 {
			stretch = 0
			continue
		}
		stretch += r.IntervalMs
		b.DipMs += r.IntervalMs
		b.LongestDipMs = max(b.LongestDipMs, stretch)
	}
	s.Bulk = b
	s.note("%.2f Gbit/s, least %.2f; slower than half for %.1f s in sum, %.1f s at a stretch", b.MedianGbit, b.LeastGbit, float64(b.DipMs)/1000, float64(b.LongestDipMs)/1000)
	last := slices.Sorted(slices.Values(intervals[len(intervals)-10:]))
	if end := last[len(last)/2]; median == 0 || end < median/2 {
		s.problem("the transfer did not come back to its speed: %.2f Gbit/s at the end", gbit(end))
	}
}

// judgeAffinity says whether a client kept its backend: it may change it only when one goes, and deleted pods went.
func (s *Scenario) judgeAffinity(r *rollclient.Result, deleted int) {
	s.note("%d answers came from another backend than the one before", r.Switches)
	if r.Switches > deleted {
		s.problem("affinity was not kept: the backend changed %d times, and %d pods went", r.Switches, deleted)
	}
}

// Print writes scenarios as a table.
func Print(out io.Writer, scenarios []Scenario) {
	if len(scenarios) == 0 {
		return
	}
	fmt.Fprintln(out)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "scenario\tattempts\tok\tlost\tp50 ms\tp99 ms\tlongest\t")
	for _, s := range scenarios {
		verdict := "PASS"
		if !s.Pass {
			verdict = "FAIL " + kinds(s.Lost)
		}
		fmt.Fprintf(table, "%s\t%d\t%d\t%d\t%.2f\t%.2f\t%.1f\t  %s\n", s.Name, s.Attempts, s.OK, s.LostTotal(), s.P50Ms, s.P99Ms, s.MaxMs, verdict)
	}
	table.Flush()
	for _, s := range scenarios {
		for _, note := range s.Notes {
			fmt.Fprintf(out, "  %s: %s\n", s.Name, note)
		}
	}
}

// Compare prints the scenarios of two runs side by side.
func Compare(out io.Writer, a, b []Scenario) {
	byName := func(list []Scenario) map[string]*Scenario {
		m := map[string]*Scenario{}
		for i := range list {
			m[list[i].Name] = &list[i]
		}
		return m
	}
	left, right := byName(a), byName(b)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "scenario\tattempts A\tB\tlost A\tB\tp50 ms A\tB\tp99 ms A\tB\t")
	for _, list := range [][]Scenario{a, b} {
		for _, s := range list {
			l, r := left[s.Name], right[s.Name]
			if l == nil && r == nil {
				continue
			}
			column := func(of func(*Scenario) string) string {
				text := []string{"-", "-"}
				for i, one := range []*Scenario{l, r} {
					if one != nil {
						text[i] = of(one)
					}
				}
				return strings.Join(text, "\t")
			}
			verdict := ""
			if l != nil && r != nil {
				// The rates differ, so shares are compared and not numbers.
				switch cmp.Compare(l.share(), r.share()) {
				case 1:
					verdict = "A loses more"
				case -1:
					verdict = "B loses more"
				}
			}
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t  %s\n", s.Name,
				column(func(s *Scenario) string { return fmt.Sprint(s.Attempts) }), column(func(s *Scenario) string { return fmt.Sprint(s.LostTotal()) }),
				column(func(s *Scenario) string { return fmt.Sprintf("%.2f", s.P50Ms) }), column(func(s *Scenario) string { return fmt.Sprintf("%.2f", s.P99Ms) }), verdict)
			delete(left, s.Name)
			delete(right, s.Name)
		}
	}
	table.Flush()
	for i, list := range [][]Scenario{a, b} {
		for _, s := range list {
			if s.Bulk != nil {
				fmt.Fprintf(out, "  %c %s: %s\n", 'A'+i, s.Name, strings.Join(s.Notes, "; "))
			}
		}
	}
}

func (s *Scenario) share() float64 {
	if s.Attempts == 0 {
		return 0
	}
	return float64(s.LostTotal()) / float64(s.Attempts)
}
