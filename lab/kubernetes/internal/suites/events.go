package suites

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// event is what the end-to-end program says while it runs: see e2e/events_test.go.
type event struct {
	Event   string  `json:"event"`
	Specs   int     `json:"specs"`
	Name    string  `json:"name"`
	State   string  `json:"state"`
	Seconds float64 `json:"seconds"`
	Message string  `json:"message"`
	Output  string  `json:"output"`
	Resume  string  `json:"resume"`
}

const followInterval = 200 * time.Millisecond

// follow gives each event of a file that grows to handle, in order, until done is closed and the file is read to its end.
func follow(path string, done <-chan struct{}, handle func(event)) error {
	file, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	reader := bufio.NewReader(file)
	var line []byte
	for over := false; ; {
		part, err := reader.ReadBytes('\n')
		line = append(line, part...)
		if err == nil {
			e := event{}
			if err := json.Unmarshal(line, &e); err != nil {
				return fmt.Errorf("%s: %w in %q", path, err, line)
			}
			handle(e)
			line = line[:0]
			continue
		}
		if !errors.Is(err, io.EOF) {
			return err
		}
		if over {
			return nil
		}
		select {
		case <-done:
			// What was written before that is still to be read.
			over = true
		case <-time.After(followInterval):
		}
	}
}

// progress prints how far a suite is: at each failure, and now and then.
type progress struct {
	out   io.Writer
	suite string
	began time.Time
	total int

	mu     sync.Mutex
	done   int
	failed int
	last   time.Time
	over   chan struct{}
}

const (
	// At least this long lies between two lines without a failure, and at most that long.
	progressInterval = 10 * time.Second
	silenceInterval  = time.Minute
)

func newProgress(out io.Writer, suite string, total int) *progress {
	p := &progress{out: out, suite: suite, began: time.Now(), total: total, last: time.Now(), over: make(chan struct{})}
	go func() {
		ticker := time.NewTicker(progressInterval)
		defer ticker.Stop()
		for {
			select {
			case <-p.over:
				return
			case <-ticker.C:
				p.mu.Lock()
				if time.Since(p.last) >= silenceInterval {
					p.line("")
				}
				p.mu.Unlock()
			}
		}
	}()
	return p
}

// end stops the lines.
func (p *progress) end() { close(p.over) }

// spec counts one that ended.
func (p *progress) spec(outcome, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done++
	switch {
	case outcome == Failed:
		p.failed++
		p.line("failed: " + name)
	case time.Since(p.last) >= progressInterval || p.done == p.total:
		p.line("")
	}
}

// failure counts a part of one that goes on.
func (p *progress) failure(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failed++
	p.line("failed: " + name)
}

func (p *progress) line(what string) {
	p.last = time.Now()
	took := time.Since(p.began).Round(time.Second)
	fmt.Fprintf(p.out, "%-11s %3d of %d, %d failed, %d:%02d  %s\n", p.suite, p.done, p.total, p.failed, int(took.Minutes()), int(took.Seconds())%60, what)
}
