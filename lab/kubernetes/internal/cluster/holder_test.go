package cluster

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A holder is this program, called with one word.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "holder" {
		if err := RunHolder(); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// bare is a cluster of nodes in which nothing runs yet.
func bare(t *testing.T, nodes int) *up {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes namespaces: it needs root")
	}
	name := "test-" + strconv.Itoa(os.Getpid()) + "-" + strings.ToLower(t.Name())
	cluster := &Cluster{Name: name, Dir: Folder(name), Family: "dual", Encap: "none"}
	t.Cleanup(func() { _ = Down(name, io.Discard) })
	if err := os.MkdirAll(cluster.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	u := &up{Cluster: cluster, options: Options{Nodes: nodes, Out: io.Discard}}
	if err := u.namespaces(); err != nil {
		t.Fatal(err)
	}
	return u
}

func (u *up) output(t *testing.T, node string, words ...string) string {
	t.Helper()
	out, err := u.Command(context.Background(), node, words[0], words[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v in %s: %v: %s", words, node, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestNodesAreApartAndReachEachOther(t *testing.T) {
	u := bare(t, 2)
	if name := u.output(t, "node-b", "hostname"); name != "node-b" {
		t.Errorf("the second node's name is %q", name)
	}
	for _, address := range []string{"192.0.2.12", "2001:db8::12", "192.0.2.1"} {
		u.output(t, "node-a", "ping", "-c1", "-W2", address)
	}
	for _, folder := range []string{"/var/lib/kubelet", "/opt/cni", "/run"} {
		u.output(t, "node-a", "touch", folder+"/of-node-a")
		if listed := u.output(t, "node-b", "ls", folder); strings.Contains(listed, "of-node-a") {
			t.Errorf("%s of node-a is seen in node-b", folder)
		}
		if _, err := os.Stat(folder + "/of-node-a"); err == nil {
			t.Errorf("%s of node-a is the machine's", folder)
		}
	}
	// What runs in a node sees its own groups as all there are.
	if group := u.output(t, "node-a", "sh", "-c", "ls -d /sys/fs/cgroup/pids/cgroup.procs /sys/fs/bpf"); !strings.Contains(group, "cgroup.procs") {
		t.Errorf("control groups: %q", group)
	}
}

func TestServicesRunAndAreStartedAgain(t *testing.T) {
	u := bare(t, 1)
	if err := u.serve("node-a", "sleeper", Service{Arguments: []string{"/bin/sh", "-c", "echo begun; exec sleep 1000"}}); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(u.Dir, "node-a", "services", "sleeper")
	var first int
	if err := Until(context.Background(), 10*time.Second, "the service", func() (err error) {
		first, err = runningPID(folder)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := kill(first); err != nil {
		t.Fatal(err)
	}
	if err := Until(context.Background(), 10*time.Second, "another process of it", func() error {
		again, err := runningPID(folder)
		if err == nil && again == first {
			err = errors.New("still the first")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// Down finds everything, whatever was killed before, and ends nothing else.
func TestDownLeavesNothingAlsoAfterKills(t *testing.T) {
	u := bare(t, 2)
	// One that left its session and its parent, as containers' shims do.
	u.output(t, "node-a", "true")
	orphan := Service{Arguments: []string{"/bin/sh", "-c", "setsid sleep 1000 & setsid sleep 1001 & exec sleep 1002"}}
	for _, node := range []string{"node-a", "node-b"} {
		if err := u.serve(node, "orphans", orphan); err != nil {
			t.Fatal(err)
		}
	}
	if err := Until(context.Background(), 10*time.Second, "nine processes", func() error {
		if n := len(members(u.Name)); n < 9 {
			return errors.New(strconv.Itoa(n))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	before := members(u.Name)
	// Half of it dies without a word: a holder, and some of what ran.
	if err := kill(u.Nodes[0].PID); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(before); i += 2 {
		_ = kill(before[i])
	}
	if err := Down(u.Name, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, pid := range before {
		if _, err := startTime(pid); err == nil {
			t.Errorf("process %d lives on", pid)
		}
	}
	if left := groups(u.Name); len(left) > 0 {
		t.Errorf("control groups are left: %v", left)
	}
	if _, err := os.Stat(u.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), u.Dir) {
		t.Errorf("mounts are left (%v)", err)
	}
	if err := Down(u.Name, io.Discard); !errors.Is(err, ErrNone) {
		t.Errorf("a second time: %v", err)
	}
}
