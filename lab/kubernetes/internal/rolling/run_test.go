package rolling

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"weir.dev/lab/kubernetes/internal/cluster"
	"weir.dev/lab/kubernetes/internal/rollclient"
)

// fakeKubectl answers as kubectl does to what the scenarios ask; a client "in a pod" is one on this machine.
const fakeKubectl = `#!/bin/sh
echo "$*" >>"%[1]s/calls"
case "$*" in
*" exec -i "*) while [ "$1" != -- ]; do shift; done; shift 2; exec "%[1]s/rollclient" "$@" ;;
*"get service "*nodePort*) echo %[3]d ;;
*"get service "*) echo %[2]s ;;
*"get pods "*--watch*) echo '{"type":"ADDED","object":{"metadata":{"name":"web-1"}}}'; exec sleep 1000 ;;
"apply -f -") cat >/dev/null ;;
*"rollout status"*) sleep 0.3 ;;
esac
`

// self holds the namespaces of the one "node": this process's own.
func self(t *testing.T) cluster.Holder {
	t.Helper()
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	return cluster.Holder{PID: os.Getpid(), Started: strings.Fields(rest)[19]}
}

// keepRunning is a supervised process, whose number is in services/weir/pid of a node.
func keepRunning(t *testing.T, folder string) {
	t.Helper()
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	started := make(chan error, 1)
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			cmd := exec.CommandContext(ctx, "sleep", "1000")
			err := cmd.Start()
			if err == nil {
				err = os.WriteFile(filepath.Join(folder, "pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644)
			}
			select {
			case started <- err:
			default:
			}
			if err != nil {
				return
			}
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
}

// Everything but the cluster is real here: processes, their input and output, sockets, signals.
func TestRunWithoutACluster(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("entering namespaces needs root, even one's own")
	}
	folder := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", filepath.Join(folder, "rollclient"), "weir.dev/lab/kubernetes/cmd/rollclient").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// An address of loopback that nobody else has: the ports are fixed.
	address := fmt.Sprintf("127.77.%d.%d", os.Getpid()>>8&0xff, os.Getpid()&0xff|1)
	var connections atomic.Int64
	type backend struct{}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "web-%d", r.Context().Value(backend{}))
		}),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, backend{}, connections.Add(1)%replicas)
		},
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(webPort)))
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	sink, cancelSink := context.WithCancel(context.Background())
	t.Cleanup(cancelSink)
	go rollclient.Sink(sink, net.JoinHostPort(address, strconv.Itoa(sinkPort)))
	if err := os.WriteFile(filepath.Join(folder, "kubectl"), fmt.Appendf(nil, fakeKubectl, folder, address, 9), 0o755); err != nil {
		t.Fatal(err)
	}
	keepRunning(t, filepath.Join(folder, "node-b", "services", "weir"))

	holder := self(t)
	c := &cluster.Cluster{Dir: folder, Binaries: folder, Kind: cluster.Weir, Outside: holder, Nodes: []cluster.Node{
		{Name: "node-a", Addresses: []string{address}, Holder: holder}, {Name: "node-b", Addresses: []string{address}, Holder: holder},
	}}
	failed := map[string]string{}
	var out strings.Builder
	scenarios, err := Run(t.Context(), Options{
		Cluster: c, Focus: "^(tcp|node-port-outside|long-lived|kill-node-b-tcp|kill-node-b-bulk)$", Results: folder, Out: io.MultiWriter(&out, t.Output()),
		Durations: Durations{Before: 500 * time.Millisecond, After: 500 * time.Millisecond, Between: 200 * time.Millisecond, Rollout: time.Minute, Kills: 2, Dead: time.Second},
		Failed:    func(s *Scenario) { failed[s.Name] = s.Why() },
	})
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]Scenario{}
	for _, s := range scenarios {
		byName[s.Name] = s
		if _, err := os.Stat(filepath.Join(folder, s.Name+".json")); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"tcp", "long-lived", "kill-node-b-tcp", "kill-node-b-bulk"} {
		if s, is := byName[name]; !is || !s.Pass {
			t.Errorf("%s: %+v", name, s)
		}
	}
	// Nobody listens at the node port.
	if s := byName["node-port-outside"]; s.Pass || s.Lost[rollclient.Refused] != s.Attempts || s.Attempts == 0 {
		t.Errorf("%+v", s)
	}
	if len(failed) != 1 || !strings.Contains(failed["node-port-outside"], "refused") {
		t.Errorf("%q", failed)
	}
	if s := byName["tcp"]; s.Source != namespace+"/"+clientOne || s.Target != address+":80" || s.Protocol != "tcp" {
		t.Errorf("%s asked %s by %s", s.Source, s.Target, s.Protocol)
	}
	if s := byName["tcp"]; len(s.Events) != 5 || s.Seconds < 1.5 || s.Seconds > 10 {
		t.Errorf("%.1f s, events %+v", s.Seconds, s.Events)
	}
	if s := byName["kill-node-b-bulk"]; s.Bulk == nil || s.Bulk.MedianGbit == 0 || len(s.Events) != 4 {
		t.Errorf("%+v", s)
	}
	calls, err := os.ReadFile(filepath.Join(folder, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	if deletions := strings.Count(string(calls), "delete namespace "+namespace); deletions != 2 {
		t.Errorf("the namespace was removed %d times, before and after:\n%s", deletions, calls)
	}
}
