package suites

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"weir.dev/lab/kubernetes/internal/cluster"
)

const (
	// A run in which everything fails would say the same again and again, and take hours for it.
	mostDiagnostics   = 25
	diagnosticTimeout = 20 * time.Second
	logBytes          = 1 << 20
	// Commands at a time: the cluster runs on the same processors.
	diagnosticsAtOnce = 3
)

// diagnose collects, into a folder of its own, what is needed to understand a failure, and returns the folder's path.
func (r *runner) diagnose(ctx context.Context, folder, name, output string, known ...pair) string {
	r.failures++
	if r.failures > mostDiagnostics {
		return ""
	}
	dir := filepath.Join(folder, fmt.Sprintf("failure-%02d-%s", r.failures, fileName(name)))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		fmt.Fprintln(r.Out, err)
		return ""
	}
	found := append(known, pairs(output)...)
	r.write(filepath.Join(dir, "failure.txt"), name+"\n\n"+output)
	Diagnose(ctx, r.Cluster, dir, found)
	return dir
}

func (r *runner) write(path, text string) {
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		fmt.Fprintln(r.Out, err)
	}
}

// Diagnose writes the state of a cluster into files of a folder: what each node's router says, the nodes' routes, the objects, the logs, and what
// the routers would do with the flows in question. What cannot be asked is said in the file.
func Diagnose(ctx context.Context, c *cluster.Cluster, dir string, found []pair) {
	type question struct {
		file, node, input string
		command           []string
	}
	var questions []question
	for _, node := range c.Nodes {
		ask := func(file, input string, command ...string) {
			questions = append(questions, question{node.Name + "-" + file, node.Name, input, command})
		}
		if c.Kind == cluster.Weir {
			weir := filepath.Join(c.Dir, "bin", "weir")
			ask("status.txt", "", weir, "status", "-c", node.Config)
			ask("conntrack.txt", "", weir, "conntrack", "list", "-c", node.Config)
			ask("services.txt", "", weir, "services", "-c", node.Config)
			ask("policy.txt", "", weir, "policy", "list", "-c", node.Config)
			ask("check.txt", "", weir, "check", "-c", node.Config)
			if len(found) > 0 {
				ask("trace.txt", flows(found), weir, "trace", "-c", node.Config, "--flows", "-", "--text")
			}
		} else {
			ask("nftables.txt", "", "nft", "list", "ruleset")
			ask("conntrack.txt", "", "cat", "/proc/net/nf_conntrack")
		}
		ask("addresses.txt", "", "ip", "-d", "address")
		ask("routes.txt", "", "sh", "-c", "for f in -4 -6; do ip $f rule; ip $f route show table all; ip $f neigh; done")
	}
	kubectl := func(file string, args ...string) {
		questions = append(questions, question{file, c.Nodes[0].Name, "", append([]string{"kubectl"}, args...)})
	}
	kubectl("objects.txt", "get", "nodes,all,endpointslices,networkpolicies", "-A", "-o", "wide")
	kubectl("objects.yaml", "get", "nodes,namespaces,pods,services,endpointslices,networkpolicies", "-A", "-o", "yaml")
	kubectl("clusternetworkpolicies.yaml", "get", "clusternetworkpolicies", "--ignore-not-found", "-o", "yaml")
	kubectl("events.txt", "get", "events", "-A", "--sort-by=.lastTimestamp", "-o", "wide")

	// Those that are asked first tell most, as they change most.
	turns := make(chan struct{}, diagnosticsAtOnce)
	var all sync.WaitGroup
	for _, q := range questions {
		turns <- struct{}{}
		all.Go(func() {
			defer func() { <-turns }()
			ctx, cancel := context.WithTimeout(ctx, diagnosticTimeout)
			defer cancel()
			cmd := c.Command(ctx, q.node, q.command[0], q.command[1:]...)
			cmd.Stdin = strings.NewReader(q.input)
			writeOutput(filepath.Join(dir, q.file), cmd)
		})
	}
	all.Wait()
	for _, node := range c.Nodes {
		copyLogs(filepath.Join(c.Dir, node.Name), dir, node.Name)
	}
}

// writeOutput runs a command and writes all that it says, and how it ended, into a file.
func writeOutput(path string, cmd *exec.Cmd) {
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		fmt.Fprintf(&output, "\n%s: %v\n", strings.Join(cmd.Args, " "), err)
	}
	// Nothing can be done about a full disk here, and the failure itself is reported anyway.
	_ = os.WriteFile(path, output.Bytes(), 0o644)
}

// copyLogs copies the ends of the logs of what runs on a node.
func copyLogs(from, to, node string) {
	paths, err := filepath.Glob(filepath.Join(from, "services", "*", "log"))
	if err != nil {
		return
	}
	for _, path := range paths {
		service := filepath.Base(filepath.Dir(path))
		_ = os.WriteFile(filepath.Join(to, node+"-"+service+".log"), []byte(endOfFile(path, logBytes)), 0o644)
	}
}

func endOfFile(path string, bytes int64) string {
	file, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil && info.Size() > bytes {
		if _, err := file.Seek(-bytes, io.SeekEnd); err != nil {
			return err.Error()
		}
	}
	text, err := io.ReadAll(file)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func lastLines(path string, count int) string {
	lines := strings.Split(strings.TrimSpace(endOfFile(path, 64<<10)), "\n")
	return strings.Join(lines[max(0, len(lines)-count):], "\n")
}

func lastBytes(text string, count int) string {
	return strings.TrimSpace(text[max(0, len(text)-count):])
}

var unfit = regexp.MustCompile(`[^A-Za-z0-9]+`)

const fileNameBytes = 80

// fileName is a short name for a file, of a test's name.
func fileName(name string) string {
	name = strings.TrimPrefix(name, "[sig-network] ")
	short := strings.Trim(unfit.ReplaceAllString(name, "-"), "-")
	return strings.Trim(short[:min(len(short), fileNameBytes)], "-")
}
