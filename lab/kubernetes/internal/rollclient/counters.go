// Package rollclient is the client of the rolling suite: it asks a service again and again while the pods behind it change, and counts what
// became of every single attempt.
package rollclient

import (
	"errors"
	"io"
	"math"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Kinds of loss.
const (
	Refused     = "refused"
	Reset       = "reset"
	TimedOut    = "timed out"
	Unreachable = "unreachable"
	// NoPorts is the client's own: it has no source port left.
	NoPorts = "no ports"
	// Wrong is an answer, but not the one to the question.
	Wrong = "wrong answer"
	Other = "other"
)

var errWrong = errors.New("the answer is not the one to the question")

// kindOf is the kind of loss that an error is.
func kindOf(err error) string {
	switch {
	case errors.Is(err, errWrong):
		return Wrong
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return Reset
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return TimedOut
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return Unreachable
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.Is(err, syscall.EADDRINUSE):
		return NoPorts
	}
	return Other
}

// Loss is one attempt that failed.
type Loss struct {
	// At is when the attempt began.
	At        time.Time `json:"at"`
	LocalPort int       `json:"localPort"`
	Kind      string    `json:"kind"`
	Error     string    `json:"error"`
	// After is how long it took to fail.
	AfterMs float64 `json:"afterMs"`
}

// Connection is one long-lived connection.
type Connection struct {
	Backend   string    `json:"backend"`
	LocalPort int       `json:"localPort"`
	Opened    time.Time `json:"opened"`
	// Ended is when the last answer should have come; zero: it was open to the end.
	Ended    time.Time `json:"ended,omitzero"`
	Kind     string    `json:"kind,omitempty"`
	Requests int       `json:"requests"`
}

// Result is what a client counted.
type Result struct {
	Mode     string         `json:"mode"`
	Target   string         `json:"target"`
	Began    time.Time      `json:"began"`
	Seconds  float64        `json:"seconds"`
	Attempts int            `json:"attempts"`
	OK       int            `json:"ok"`
	Lost     map[string]int `json:"lost"`
	// Latencies are of the attempts that succeeded, from the first packet to the end of the answer, in milliseconds.
	P50Ms float64 `json:"p50Ms"`
	P99Ms float64 `json:"p99Ms"`
	MaxMs float64 `json:"maxMs"`
	// Backends is how many answers each gave.
	Backends map[string]int `json:"backends,omitempty"`
	// Switches is how often an answer came from another backend than the one before.
	Switches int `json:"switches"`
	// Losses are the first of what was lost.
	Losses      []Loss       `json:"losses,omitempty"`
	Connections []Connection `json:"connections,omitempty"`
	// IntervalBytes is what a bulk transfer had acknowledged in each interval of IntervalMs.
	IntervalBytes []int64 `json:"intervalBytes,omitempty"`
	IntervalMs    int     `json:"intervalMs,omitempty"`
	// Error is why the client gave up, if it did.
	Error string `json:"error,omitempty"`
}

// LostTotal is the number of attempts that failed.
func (r *Result) LostTotal() (total int) {
	for _, n := range r.Lost {
		total += n
	}
	return total
}

const (
	keptLosses = 500
	// Four bytes each; far more than a scenario makes.
	keptLatencies = 4 << 20
)

// counters collects a Result; it may be used by several goroutines.
type counters struct {
	mu        sync.Mutex
	result    Result
	latencies []float32
	backend   string
}

func newCounters(mode, target string) *counters {
	return &counters{result: Result{Mode: mode, Target: target, Began: time.Now(), Lost: map[string]int{}, Backends: map[string]int{}}}
}

func (c *counters) succeed(began time.Time, backend string) {
	took := time.Since(began)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.result.Attempts++
	c.result.OK++
	if len(c.latencies) < keptLatencies {
		c.latencies = append(c.latencies, float32(took.Seconds()*1000))
	}
	if backend == "" {
		return
	}
	c.result.Backends[backend]++
	if c.backend != "" && c.backend != backend {
		c.result.Switches++
	}
	c.backend = backend
}

func (c *counters) lose(began time.Time, localPort int, err error) {
	took := time.Since(began)
	c.mu.Lock()
	defer c.mu.Unlock()
	kind := kindOf(err)
	c.result.Attempts++
	c.result.Lost[kind]++
	if len(c.result.Losses) < keptLosses {
		c.result.Losses = append(c.result.Losses, Loss{At: began, LocalPort: localPort, Kind: kind, Error: err.Error(), AfterMs: took.Seconds() * 1000})
	}
}

// finish makes the result. Nothing is counted after it.
func (c *counters) finish() Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.result.Seconds = time.Since(c.result.Began).Seconds()
	slices.Sort(c.latencies)
	c.result.P50Ms = quantile(c.latencies, 0.50)
	c.result.P99Ms = quantile(c.latencies, 0.99)
	c.result.MaxMs = quantile(c.latencies, 1)
	return c.result
}

// quantile is the smallest value that at least that share of sorted values does not exceed.
func quantile(sorted []float32, share float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	index := int(math.Ceil(share*float64(len(sorted)))) - 1
	return math.Round(float64(sorted[max(index, 0)])*1000) / 1000
}
