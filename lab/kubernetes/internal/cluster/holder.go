package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchies are the control groups (version 1) that container runtimes ask for.
var hierarchies = []string{"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd"}

const cgroupRoot = "/sys/fs/cgroup"

// groupName is the control group of a node, below the root of each hierarchy.
func groupName(cluster, node string) string { return filepath.Join("weir-lab", cluster, node) }

// Binding makes a folder of the node appear at a path of the node.
type Binding struct{ From, To string }

// HolderSpec is what a holder is told, as JSON on its standard input.
type HolderSpec struct {
	Cluster, Node string
	// Services is the folder with a folder for each thing that is to run: `spec.json` (Service); the holder adds `pid` and `log`.
	Services string
	// Bindings are the node's own folders; none where only a network namespace is held.
	Bindings []Binding
}

// Service is a program that a holder runs, and starts again when it ends.
type Service struct {
	Arguments   []string
	Environment []string
}

// startHolder starts a holder, in new namespaces, and waits until it says that they are made.
func startHolder(spec HolderSpec, log string) (Holder, error) {
	self, err := os.Executable()
	if err != nil {
		return Holder{}, err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return Holder{}, err
	}
	logFile, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return Holder{}, err
	}
	defer logFile.Close()
	command := exec.Command(self, "holder")
	command.Stdin = strings.NewReader(string(text))
	command.Stderr = logFile
	command.Dir = "/"
	// A session of its own: Ctrl-C is for the command that brings the cluster up.
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := command.StdoutPipe()
	if err != nil {
		return Holder{}, err
	}
	if err := command.Start(); err != nil {
		return Holder{}, err
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if strings.TrimSpace(line) != "ready" {
		_ = command.Process.Kill()
		_ = command.Wait()
		said, _ := os.ReadFile(log)
		return Holder{}, fmt.Errorf("the namespaces of %s cannot be made: %s", spec.Node, strings.TrimSpace(string(said)))
	}
	started, err := startTime(command.Process.Pid)
	return Holder{PID: command.Process.Pid, Started: started}, err
}

// RunHolder is the holder's life: namespaces, mounts, then the services of its folder until it is killed.
func RunHolder() error {
	var spec HolderSpec
	if err := json.NewDecoder(os.Stdin).Decode(&spec); err != nil {
		return err
	}
	whole := len(spec.Bindings) > 0
	if err := joinGroup(groupName(spec.Cluster, spec.Node)); err != nil {
		return err
	}
	// Namespaces are a thread's. All that is started later must come from a thread that is in them: so this thread starts
	// everything, and never leaves this function.
	runtime.LockOSThread()
	flags := unix.CLONE_NEWNET
	if whole {
		flags |= unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
	}
	if os.Getenv("WEIR_LAB_INSIDE") == "" {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("new namespaces: %w", err)
		}
		return insideAgain(spec)
	}
	if whole {
		if err := mounts(spec); err != nil {
			return err
		}
		if err := unix.Sethostname([]byte(spec.Node)); err != nil {
			return err
		}
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("loopback: %w: %s", err, out)
	}
	// What a dead parent leaves behind (containers' shims) stays below this process, where `status` counts it.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)
	fmt.Println("ready")
	os.Stdout.Close()
	return superviseForever(spec.Services)
}

// insideAgain runs this program anew from the thread that has the namespaces: exec makes that thread the whole process.
func insideAgain(spec HolderSpec) error {
	text, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		return err
	}
	// A pipe holds 64 KiB, far more than a spec.
	if _, err := writer.Write(text); err != nil {
		return err
	}
	writer.Close()
	if err := unix.Dup2(int(reader.Fd()), 0); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return syscall.Exec(self, []string{self, "holder"}, append(os.Environ(), "WEIR_LAB_INSIDE=1"))
}

// joinGroup puts this process into a control group of every hierarchy.
func joinGroup(name string) error {
	for _, hierarchy := range hierarchies {
		root := filepath.Join(cgroupRoot, hierarchy)
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			return fmt.Errorf("the control group hierarchy %s (version 1) is not mounted: %w", root, err)
		}
		folder := root
		for _, part := range strings.Split(name, "/") {
			above := folder
			folder = filepath.Join(folder, part)
			if err := os.Mkdir(folder, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
			if hierarchy != "cpuset" {
				continue
			}
			// A new one has no CPUs and no memory, and takes no process.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				allowed, err := os.ReadFile(filepath.Join(above, file))
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(folder, file), allowed, 0o644); err != nil {
					return err
				}
			}
		}
		if err := os.WriteFile(filepath.Join(folder, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
			return fmt.Errorf("joining %s: %w", folder, err)
		}
	}
	return nil
}

// mounts gives the node its own view of files. Nothing of it is seen outside, and all of it goes with the node's last process.
func mounts(spec HolderSpec) error {
	mount := func(source, target, kind string, flags uintptr, data string) error {
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			return fmt.Errorf("mounting %s on %s: %w", source, target, err)
		}
		return nil
	}
	if err := mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// /sys shows the devices of the network namespace of who mounts it. The new one has no control groups.
	if err := mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", cgroupRoot, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, hierarchy := range hierarchies {
		folder := filepath.Join(cgroupRoot, hierarchy)
		if err := os.Mkdir(folder, 0o755); err != nil {
			return err
		}
		options := hierarchy
		if hierarchy == "systemd" {
			options = "none,name=systemd"
		}
		if err := mount("cgroup", folder, "cgroup", 0, options); err != nil {
			return err
		}
	}
	if err := mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=700"); err != nil {
		return err
	}
	if err := mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, binding := range spec.Bindings {
		for _, folder := range []string{binding.From, binding.To} {
			if err := os.MkdirAll(folder, 0o755); err != nil {
				return err
			}
		}
		if err := mount(binding.From, binding.To, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	// Containers' mounts must spread to the kubelet's volumes and back.
	return mount("none", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// running is a service as the holder has it.
type running struct {
	command *exec.Cmd
	since   time.Time
	// due is when it is started, if it does not run.
	due time.Time
}

// superviseForever runs what the folder names: what is new there is started, what ended is started again, what was removed is ended.
func superviseForever(folder string) error {
	services := map[string]*running{}
	byPID := map[int]string{}
	for {
		// Orphans and services alike are collected here, so no service is waited for by its command.
		for {
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if pid <= 0 || err != nil {
				break
			}
			if name, ours := byPID[pid]; ours {
				delete(byPID, pid)
				service := services[name]
				wait := 200 * time.Millisecond
				if time.Since(service.since) < 2*time.Second {
					wait = time.Second
				}
				fmt.Fprintf(os.Stderr, "%s %s ended (%s)\n", time.Now().Format(time.RFC3339Nano), name, describe(status))
				service.command, service.due = nil, time.Now().Add(wait)
			}
		}
		names, _ := filepath.Glob(filepath.Join(folder, "*", "spec.json"))
		sort.Strings(names)
		wanted := map[string]bool{}
		for _, path := range names {
			name := filepath.Base(filepath.Dir(path))
			wanted[name] = true
			service := services[name]
			if service == nil {
				service = &running{}
				services[name] = service
			}
			if service.command == nil && time.Now().After(service.due) {
				command, err := startService(filepath.Dir(path))
				if err != nil {
					fmt.Fprintf(os.Stderr, "%s %s cannot be started: %v\n", time.Now().Format(time.RFC3339Nano), name, err)
					service.due = time.Now().Add(time.Second)
					continue
				}
				service.command, service.since = command, time.Now()
				byPID[command.Process.Pid] = name
			}
		}
		for name, service := range services {
			if !wanted[name] {
				if service.command != nil {
					_ = service.command.Process.Signal(syscall.SIGTERM)
					delete(byPID, service.command.Process.Pid)
				}
				delete(services, name)
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func describe(status unix.WaitStatus) string {
	if status.Signaled() {
		return "signal " + status.Signal().String()
	}
	return "status " + strconv.Itoa(status.ExitStatus())
}

func startService(folder string) (*exec.Cmd, error) {
	text, err := os.ReadFile(filepath.Join(folder, "spec.json"))
	if err != nil {
		return nil, err
	}
	var service Service
	if err := json.Unmarshal(text, &service); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(folder, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	command := exec.Command(service.Arguments[0], service.Arguments[1:]...)
	command.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}, service.Environment...)
	command.Stdout, command.Stderr = log, log
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := command.Start(); err != nil {
		return nil, err
	}
	return command, os.WriteFile(filepath.Join(folder, "pid"), []byte(strconv.Itoa(command.Process.Pid)), 0o644)
}

// serve has a node's holder run a program.
func (c *Cluster) serve(node, name string, service Service) error {
	folder := filepath.Join(c.services(node), name)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	text, err := json.Marshal(service)
	if err != nil {
		return err
	}
	beside := filepath.Join(folder, "spec.json.new")
	if err := os.WriteFile(beside, text, 0o600); err != nil {
		return err
	}
	return os.Rename(beside, filepath.Join(folder, "spec.json"))
}

// log is the path of what a service said.
func (c *Cluster) log(node, name string) string {
	return filepath.Join(c.services(node), name, "log")
}

// runningPID is the process of a service, if it runs.
func runningPID(folder string) (int, error) {
	text, err := os.ReadFile(filepath.Join(folder, "pid"))
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		return 0, err
	}
	_, err = startTime(pid)
	return pid, err
}

func kill(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }

// startTime is field 22 of /proc/PID/stat; an error where the process is gone or a zombie.
func startTime(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return "", fmt.Errorf("process %d has ended", pid)
	}
	return fields[19], nil
}

// waitFor waits until a command in a node succeeds.
func (c *Cluster) waitFor(ctx context.Context, limit time.Duration, what, node, name string, arguments ...string) error {
	return Until(ctx, limit, what, func() error {
		if out, err := c.Command(ctx, node, name, arguments...).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
		}
		return nil
	})
}
