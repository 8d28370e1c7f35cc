package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
)

// Who runs the suites follows them by a file of events, one JSON object a line, which WEIR_LAB_EVENTS names. All parallel
// processes append to it, each line in one write.
type event struct {
	// Event is "start", "failing" (before the spec's own cleanup) or "spec" (after it).
	Event string `json:"event"`
	// Specs is how many specs will run, of "start".
	Specs   int     `json:"specs,omitempty"`
	Name    string  `json:"name,omitempty"`
	State   string  `json:"state,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	Message string  `json:"message,omitempty"`
	// Output is the end of what the spec logged, of "failing".
	Output string `json:"output,omitempty"`
	// Resume is the file for whose appearance the failing spec waits before it takes away what it made.
	Resume string `json:"resume,omitempty"`
}

const (
	eventsVariable = "WEIR_LAB_EVENTS"
	outputBytes    = 32 << 10
	// What the runner collects of a failure takes some seconds; it may have several failures to look at.
	resumeTimeout = 90 * time.Second
)

var failures atomic.Int32

func emit(e event) error {
	path := os.Getenv(eventsVariable)
	if path == "" {
		return nil
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.Write(append(line, '\n'))
	return err
}

func warn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "events:", err)
	}
}

// emitEvents makes the suite tell its events. It is called after the flags were read, when ginkgo has been asked for a preview of the specs: a
// preview forgets nodes of the top level that were there before it.
func emitEvents() {
	ginkgo.ReportBeforeSuite(func(report ginkgo.Report) {
		warn(emit(event{Event: "start", Specs: report.PreRunStats.SpecsThatWillRun}))
	})
	// It runs before the AfterEach nodes and deferred cleanups: the pods of the failed spec are still there.
	ginkgo.JustAfterEach(func() {
		if spec := ginkgo.CurrentSpecReport(); spec.Failed() {
			awaitResume(spec)
		}
	})
	ginkgo.ReportAfterEach(func(spec ginkgo.SpecReport) {
		// Those that the focus leaves out are reported too.
		if spec.NumAttempts == 0 || spec.State.Is(types.SpecStatePending) {
			return
		}
		warn(emit(event{Event: "spec", Name: spec.FullText(), State: spec.State.String(), Seconds: spec.RunTime.Seconds(), Message: spec.FailureMessage()}))
	})
}

// awaitResume tells of a failure and waits until the runner has looked at it, or for a while.
func awaitResume(spec ginkgo.SpecReport) {
	path := os.Getenv(eventsVariable)
	if path == "" {
		return
	}
	output := spec.CapturedGinkgoWriterOutput
	if len(output) > outputBytes {
		output = output[len(output)-outputBytes:]
	}
	resume := filepath.Join(filepath.Dir(path), fmt.Sprintf("resume-%d-%d", os.Getpid(), failures.Add(1)))
	if err := emit(event{Event: "failing", Name: spec.FullText(), Message: spec.FailureMessage(), Output: output, Resume: resume}); err != nil {
		warn(err)
		return
	}
	for deadline := time.Now().Add(resumeTimeout); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if os.Remove(resume) == nil {
			return
		}
	}
}
