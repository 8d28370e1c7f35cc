package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
)

// members are the processes in a cluster's control groups: all that ever was started in it.
func members(name string) []int {
	seen := map[int]bool{}
	for _, hierarchy := range hierarchies {
		root := filepath.Join(cgroupRoot, hierarchy, "weir-lab", name)
		_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.IsDir() {
				return nil
			}
			text, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			for _, line := range bytes.Fields(text) {
				if pid, err := strconv.Atoi(string(line)); err == nil && pid > 0 {
					seen[pid] = true
				}
			}
			return nil
		})
	}
	var pids []int
	for pid := range seen {
		pids = append(pids, pid)
	}
	sort.Ints(pids)
	return pids
}

// Down takes a cluster away, whatever is left of it: its processes by their control groups, with them its namespaces, mounts and devices, then the
// groups and the folder.
func Down(name string, out io.Writer) error {
	folder := Folder(name)
	_, statErr := os.Stat(folder)
	if statErr != nil && len(members(name)) == 0 && len(groups(name)) == 0 {
		return ErrNone
	}
	ended := map[int]bool{}
	// Holders first, or they would start again what ends.
	if cluster, err := Load(name); err == nil {
		for _, node := range cluster.Nodes {
			if node.Alive() {
				_ = kill(node.PID)
				ended[node.PID] = true
			}
		}
		if cluster.Outside.Alive() {
			_ = kill(cluster.Outside.PID)
			ended[cluster.Outside.PID] = true
		}
	}
	removed, err := end(context.Background(), name, func(pid int) { ended[pid] = true })
	if err != nil {
		return err
	}
	for _, hierarchy := range hierarchies {
		// The group of all clusters, if this was the last.
		_ = os.Remove(filepath.Join(cgroupRoot, hierarchy, "weir-lab"))
	}
	// The last process's mounts are taken down by the kernel a moment after it.
	err = Until(context.Background(), 20*time.Second, folder+" to be removed", func() error { return os.RemoveAll(folder) })
	if err != nil {
		return err
	}
	_ = os.Remove(filepath.Dir(folder)) // If it was the last cluster.
	fmt.Fprintf(out, "ended %d processes, removed %d control groups and %s\n", len(ended), removed, folder)
	return nil
}

// end ends all processes in the control groups of a cluster, or of a node (CLUSTER/NODE), says which, and removes the groups.
func end(ctx context.Context, name string, ended func(pid int)) (removed int, err error) {
	err = Until(ctx, 20*time.Second, "the processes of "+name+" to end", func() error {
		left := members(name)
		for _, pid := range left {
			_ = kill(pid)
			ended(pid)
		}
		if len(left) > 0 {
			return fmt.Errorf("%d are left: %v", len(left), left)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	err = Until(ctx, 10*time.Second, "the control groups of "+name+" to be removed", func() error {
		var failure error
		for _, group := range groups(name) {
			if err := os.Remove(group); err != nil {
				failure = err
			} else {
				removed++
			}
		}
		return failure
	})
	return removed, err
}

// groups are a cluster's control groups, the deepest first.
func groups(name string) []string {
	var all []string
	for _, hierarchy := range hierarchies {
		root := filepath.Join(cgroupRoot, hierarchy, "weir-lab", name)
		_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				all = append(all, path)
			}
			return nil
		})
	}
	sort.Slice(all, func(i, j int) bool { return strings.Count(all[i], "/") > strings.Count(all[j], "/") })
	return all
}

// process is a line of the status.
type process struct {
	name     string
	pid      int
	memoryKB int
}

// Status shows what runs, and how much memory it takes.
func Status(name string, out io.Writer) error {
	cluster, err := Load(name)
	if err != nil {
		if errors.Is(err, ErrNone) && len(members(name)) > 0 {
			return fmt.Errorf("%w, but %d processes of one are left; `make cluster-down` ends them", err, len(members(name)))
		}
		return err
	}
	fmt.Fprintf(out, "network %s, family %s, encapsulation %s, offload %s\nKUBECONFIG=%s\n", cluster.Kind, cluster.Family, cluster.Encap, cluster.Offload, cluster.Kubeconfig)
	whole := true
	total := 0
	for _, node := range cluster.Nodes {
		state := "runs"
		if !node.Alive() {
			state, whole = "ITS HOLDER IS GONE", false
		}
		fmt.Fprintf(out, "%s  %s  %s  (holder %d)\n", node.Name, strings.Join(node.Addresses, ", "), state, node.PID)
		folders, _ := filepath.Glob(filepath.Join(cluster.services(node.Name), "*"))
		for _, folder := range folders {
			service := process{name: filepath.Base(folder)}
			if service.pid, err = runningPID(folder); err != nil {
				fmt.Fprintf(out, "  %-26s does not run; its log: %s\n", service.name, filepath.Join(folder, "log"))
				whole = false
				continue
			}
			service.memoryKB = residentKB(service.pid)
			total += service.memoryKB
			fmt.Fprintf(out, "  %-26s pid %-7d %5d MB\n", service.name, service.pid, service.memoryKB/1024)
		}
	}
	fmt.Fprintf(out, "%d processes, services %d MB\n", len(members(name)), total/1024)
	if !whole {
		return errors.New("the cluster is not whole; `make cluster-down`, then `make cluster`")
	}
	command := cluster.Command(context.Background(), cluster.Nodes[0].Name, "kubectl", "get", "nodes,pods", "-A", "-o", "wide")
	command.Stdout, command.Stderr = out, out
	return command.Run()
}

func residentKB(pid int) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for _, line := range strings.Split(string(text), "\n") {
		if value, found := strings.CutPrefix(line, "VmRSS:"); found {
			kb, _ := strconv.Atoi(strings.Fields(value)[0])
			return kb
		}
	}
	return 0
}
