// Package cluster brings up a Kubernetes cluster on one machine: each node has network, mount, UTS and cgroup namespaces of its own, with its
// own containerd and kubelet; the first one has the control plane too.
//
// All that belongs to a cluster is found again by two things, whatever was killed meanwhile: its folder, and a control group for each node, in which
// everything that runs on the node stays, containers included. Namespaces have no names, so they go with the last process.
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// What runs the pods' network.
const (
	Weir      = "weir"
	KubeProxy = "kube-proxy"
)

// Cluster is one cluster, as its state file tells it.
type Cluster struct {
	Name string
	// Dir is the folder with everything of the cluster.
	Dir        string
	Kubeconfig string
	Nodes      []Node
	// Binaries is the folder with what was built.
	Binaries string
	// Kind says what runs the network: "weir" or "kube-proxy".
	Kind string
	// Family is ipv4, ipv6 or dual.
	Family string
	// Encap is none, ipip or cross-subnet.
	Encap string
	// Offload is auto or off.
	Offload string
	// Outside is the process that holds the namespace of the bridge between the nodes, from where clients outside of the cluster come.
	Outside Holder
}

// Node is a node of a cluster.
type Node struct {
	Name      string
	Addresses []string
	Holder
	// Config is the path of its weir.yaml.
	Config string
}

// Holder is the process that holds a set of namespaces, and that starts what runs in them.
type Holder struct {
	PID int
	// Started is its start time as /proc/PID/stat has it: a number may be another process's by now.
	Started string
}

// Alive tells whether the holder still runs.
func (h Holder) Alive() bool {
	started, err := startTime(h.PID)
	return err == nil && h.PID > 0 && started == h.Started
}

// Folder is where a cluster with this name has everything.
func Folder(name string) string {
	return filepath.Join("/var/tmp/weir-lab", name)
}

func (c *Cluster) file() string { return filepath.Join(c.Dir, "cluster.json") }

func (c *Cluster) save() error {
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	beside := c.file() + ".new"
	if err := os.WriteFile(beside, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(beside, c.file())
}

// ErrNone says that there is no such cluster.
var ErrNone = errors.New("there is no cluster; `make cluster` brings one up")

// Load reads the state of a cluster.
func Load(name string) (*Cluster, error) {
	cluster := &Cluster{Dir: Folder(name)}
	text, err := os.ReadFile(cluster.file())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNone
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, cluster); err != nil {
		return nil, fmt.Errorf("%s: %w", cluster.file(), err)
	}
	return cluster, nil
}

// Command is a command in a node's namespaces, with what was built for the cluster in PATH, and KUBECONFIG.
func (c *Cluster) Command(ctx context.Context, node string, name string, arguments ...string) *exec.Cmd {
	for _, known := range c.Nodes {
		if known.Name == node {
			return c.inside(ctx, known.Holder, true, name, arguments)
		}
	}
	return c.inside(ctx, Holder{}, true, name, arguments)
}

// Kubectl is what kubectl in the first node says, given an input; an error has what it complained of.
func (c *Cluster) Kubectl(ctx context.Context, input string, arguments ...string) (string, error) {
	command := c.Command(ctx, c.Nodes[0].Name, "kubectl", arguments...)
	command.Stdin = strings.NewReader(input)
	return Output(command, "kubectl "+strings.Join(arguments, " "))
}

// Output is what a command writes to its standard output; an error has what it complained of.
func Output(command *exec.Cmd, what string) (string, error) {
	var stderr bytes.Buffer
	command.Stderr = &stderr
	text, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", what, err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(text)), nil
}

// Weir is a command of a node's weir, with the node's configuration.
func (c *Cluster) Weir(ctx context.Context, node Node, arguments ...string) *exec.Cmd {
	return c.Command(ctx, node.Name, filepath.Join(c.Dir, "bin", "weir"), append(arguments, "-c", node.Config)...)
}

// OutsideCommand is a command where clients outside of the cluster are.
func (c *Cluster) OutsideCommand(ctx context.Context, name string, arguments ...string) *exec.Cmd {
	return c.inside(ctx, c.Outside, false, name, arguments)
}

func (c *Cluster) inside(ctx context.Context, holder Holder, all bool, name string, arguments []string) *exec.Cmd {
	enter := []string{"-t", strconv.Itoa(holder.PID), "-n"}
	if all {
		enter = append(enter, "-m", "-u")
	}
	enter = append(append(enter, "--", name), arguments...)
	command := exec.CommandContext(ctx, "nsenter", enter...)
	command.Env = append(os.Environ(), "PATH="+c.Binaries+":"+os.Getenv("PATH"), "KUBECONFIG="+c.Kubeconfig)
	// nsenter changes to the root folder: relative paths must not depend on where this started.
	command.Dir = "/"
	if !holder.Alive() {
		command.Err = fmt.Errorf("the process that holds the namespaces of a node is gone (%d); `make cluster-down`, then `make cluster`", holder.PID)
	}
	return command
}

// Kill kills a service of a node without warning ("weir", "kube-proxy"); the node's holder starts it again. It returns when another process runs.
func (c *Cluster) Kill(ctx context.Context, node, name string) error {
	service := filepath.Join(c.services(node), name)
	before, err := runningPID(service)
	if err != nil {
		return fmt.Errorf("%s on %s: %w", name, node, err)
	}
	if err := kill(before); err != nil {
		return fmt.Errorf("%s on %s: %w", name, node, err)
	}
	return Until(ctx, 20*time.Second, name+" on "+node+" to be started again", func() error {
		now, err := runningPID(service)
		if err == nil && now == before {
			err = fmt.Errorf("the process is still %d", before)
		}
		return err
	})
}

// Until asks every 50 ms until there is no error; after the time it returns the last one.
func Until(ctx context.Context, limit time.Duration, what string, ask func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %.0f s for %s: %w", limit.Seconds(), what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
