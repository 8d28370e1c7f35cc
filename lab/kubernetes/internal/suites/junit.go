package suites

import (
	"encoding/xml"
	"fmt"
	"os"
	"regexp"
	"strings"
)

// The parts of JUnit's format that ginkgo writes and other tools read.
type junitSuites struct {
	XMLName xml.Name     `xml:"testsuites"`
	Suites  []junitSuite `xml:"testsuite"`
}

type junitSuite struct {
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Skipped  int         `xml:"skipped,attr"`
	Failures int         `xml:"failures,attr"`
	Errors   int         `xml:"errors,attr"`
	Time     float64     `xml:"time,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Name    string        `xml:"name,attr"`
	Class   string        `xml:"classname,attr"`
	Status  string        `xml:"status,attr,omitempty"`
	Time    float64       `xml:"time,attr"`
	Skipped *junitMessage `xml:"skipped,omitempty"`
	Failure *junitMessage `xml:"failure,omitempty"`
	Error   *junitMessage `xml:"error,omitempty"`
	Output  string        `xml:"system-err,omitempty"`
}

type junitMessage struct {
	Message string `xml:"message,attr,omitempty"`
	Type    string `xml:"type,attr,omitempty"`
	Text    string `xml:",chardata"`
}

const itPrefix = "[It] "

// readJUnit reads what Kubernetes' end-to-end tests wrote: the specs that ran, and what failed beside specs.
func readJUnit(path string) (specs []Spec, trouble []string, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	report := junitSuites{}
	if err := xml.Unmarshal(text, &report); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, suite := range report.Suites {
		for _, c := range suite.Cases {
			name, spec := strings.CutPrefix(c.Name, itPrefix)
			failure := c.Failure
			if failure == nil {
				failure = c.Error
			}
			if !spec {
				// Nodes of the whole suite, as [SynchronizedBeforeSuite].
				if failure != nil {
					trouble = append(trouble, c.Name+": "+strings.Join(firstCause(failure.Message+"\n"+failure.Text), "; "))
				}
				continue
			}
			switch {
			case failure != nil:
				specs = append(specs, Spec{Name: name, Outcome: Failed, Seconds: c.Time, Cause: strings.Join(firstCause(failure.Message+"\n"+failure.Text), "\n")})
			case c.Skipped != nil:
				reason := skipReason(c.Skipped.Message)
				// Those outside the focus are in the report as well, without a word.
				if reason != "" {
					specs = append(specs, Spec{Name: name, Outcome: Skipped, Seconds: c.Time, Reason: reason})
				}
			default:
				specs = append(specs, Spec{Name: name, Outcome: Passed, Seconds: c.Time})
			}
		}
	}
	return specs, trouble, nil
}

// skipReason is what a spec that skipped itself said; nothing for one that the focus left out.
func skipReason(message string) string {
	message = strings.TrimSpace(message)
	if message == "skipped" || message == "pending" {
		return ""
	}
	return strings.TrimSpace(strings.TrimPrefix(message, "skipped - "))
}

const (
	causeLines     = 4
	causeLineBytes = 300
)

var (
	// Where a failure happened, Go structures printed whole, and the like say nothing to a first look.
	noise = regexp.MustCompile(`^(In \[|There were additional failures|Full Stack Trace|goroutine |occurred$|to be true$|\{$|\}$|Error Trace:|Test:|<[*\w.]+ ?\|? ?[^>]*>:?\s*[{(]?$|\.\.\.$)|^(msg|Err|ErrStatus|s|error|details|Status|Code|TypeMeta|ListMeta):|^0x[0-9a-f]+`)
	stamp = regexp.MustCompile(`^(I|W|E|F)\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\] `)
	// ginkgo marks what kind of failure it was, and Gomega how the value was typed.
	mark = regexp.MustCompile(`^\[(FAILED|PANICKED|TIMEDOUT|INTERRUPTED|ABORTED)\] ?|^(FAIL|Unexpected error): ?`)
)

// firstCause are the first lines of a failure's text that say what went wrong.
func firstCause(text string) []string {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(stamp.ReplaceAllString(strings.TrimSpace(line), ""))
		line = strings.TrimSpace(mark.ReplaceAllString(line, ""))
		if line == "" || noise.MatchString(line) {
			continue
		}
		if len(line) > causeLineBytes {
			line = strings.ToValidUTF8(line[:causeLineBytes], "") + "…"
		}
		if len(lines) > 0 && lines[len(lines)-1] == line {
			continue
		}
		lines = append(lines, line)
		if len(lines) == causeLines {
			break
		}
	}
	return lines
}

// writeJUnit writes all suites as one report. What was expected to fail counts as skipped there, so that a reader's total of
// failures is this run's.
func writeJUnit(path string, results []SuiteResult) error {
	report := junitSuites{}
	for _, result := range results {
		suite := junitSuite{Name: result.Name, Tests: len(result.Specs), Time: result.Seconds}
		for _, spec := range result.Specs {
			c := junitCase{Name: spec.Name, Class: result.Name, Time: spec.Seconds, Status: spec.Outcome}
			switch {
			case spec.Outcome == Skipped:
				c.Skipped = &junitMessage{Message: spec.Reason}
				suite.Skipped++
			case spec.Outcome == Failed && spec.Expected:
				c.Skipped = &junitMessage{Message: "expected to fail: " + spec.Reason, Text: spec.Cause}
				suite.Skipped++
			case spec.Outcome == Failed:
				c.Failure = &junitMessage{Type: "failed", Text: spec.Cause}
				suite.Failures++
			}
			suite.Cases = append(suite.Cases, c)
		}
		for _, trouble := range result.Wrong {
			// What is wrong with a spec stands there already.
			if strings.HasPrefix(trouble, "failed: ") || strings.HasPrefix(trouble, "failed otherwise") {
				continue
			}
			suite.Cases = append(suite.Cases, junitCase{Name: trouble, Class: result.Name, Error: &junitMessage{Text: trouble}})
			suite.Errors++
			suite.Tests++
		}
		report.Suites = append(report.Suites, suite)
	}
	text, err := xml.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append([]byte(xml.Header), text...), 0o644)
}
