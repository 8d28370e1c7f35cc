// Lab brings up a real Kubernetes cluster on this machine with weir as its network, and judges it by Kubernetes' own tests. `make cluster` and
// its siblings call it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"weir.dev/lab/kubernetes/internal/build"
	"weir.dev/lab/kubernetes/internal/cluster"
)

const usage = `lab: a real Kubernetes cluster on this machine, with weir as its network

  lab build      builds Kubernetes and the images once, into a cache folder (WEIR_LAB_CACHE)
  lab up         brings a cluster up           (NODES, FAMILY, ENCAP, OFFLOAD, WITH)
  lab status     shows it
  lab shell      a shell in a node             (NODE=a)
  lab down       takes it away, whatever is left of it
  lab e2e        runs Kubernetes' own tests    (SUITE, FOCUS, PROCS)
  lab compare A B   two results of lab e2e side by side

Variables, with their defaults: NODES=2, FAMILY=ipv4|ipv6|dual, ENCAP=none|ipip|cross-subnet, OFFLOAD=auto|off,
WITH=weir|kube-proxy, NAME=lab, KEEP= (keeps what a failed start has left).
`

func main() {
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, flag.Arg(0), flag.Args()[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		stop()
		var usage usageError
		if errors.As(err, &usage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// usageError is the caller's mistake.
type usageError string

func (u usageError) Error() string { return string(u) }

func variable(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

func run(ctx context.Context, command string, arguments []string) error {
	name := variable("NAME", "lab")
	switch command {
	case "build":
		builder, err := builder()
		if err != nil {
			return err
		}
		return builder.All(ctx)
	case "up":
		return up(ctx, name)
	case "down":
		return cluster.Down(name, os.Stdout)
	case "status":
		return cluster.Status(name, os.Stdout)
	case "shell":
		return shell(ctx, name, arguments)
	case "e2e":
		return e2e(ctx, name)
	case "compare":
		return compare(arguments)
	// What holders run.
	case "holder":
		return cluster.RunHolder()
	case "ranges":
		if len(arguments) != 2 {
			return usageError("lab ranges NAME PLUGINS")
		}
		return cluster.FollowRanges(ctx, arguments[0], arguments[1])
	}
	return usageError("unknown command " + command + "\n" + usage)
}

// source is lab/kubernetes: the folder with this module.
func source() (string, error) {
	folder := os.Getenv("WEIR_LAB_SOURCE")
	if folder == "" {
		return "", usageError("WEIR_LAB_SOURCE must name the folder lab/kubernetes; `make cluster` sets it")
	}
	return filepath.Abs(folder)
}

func builder() (*build.Builder, error) {
	folder, err := build.CacheFolder()
	if err != nil {
		return nil, err
	}
	source, err := source()
	return &build.Builder{Source: source, Folder: folder, Out: os.Stdout}, err
}

func up(ctx context.Context, name string) error {
	builder, err := builder()
	if err != nil {
		return err
	}
	if err := builder.All(ctx); err != nil {
		return err
	}
	nodes, err := strconv.Atoi(variable("NODES", "2"))
	if err != nil {
		return usageError("NODES is a number")
	}
	made, err := cluster.Up(ctx, cluster.Options{
		Name: name, Nodes: nodes, Kind: variable("WITH", cluster.Weir), Family: variable("FAMILY", "ipv4"),
		Encap: variable("ENCAP", "none"), Offload: variable("OFFLOAD", "auto"), Source: builder.Source, Binaries: builder.Folder,
		Weir: os.Getenv("WEIR"), WeirCNI: os.Getenv("WEIR_CNI"), Plugins: variable("CNI_PLUGINS", "/usr/lib/cni"), Out: os.Stdout,
	})
	if err != nil {
		return err
	}
	fmt.Printf("\nKUBECONFIG=%s (the API server is reached from within the nodes: make cluster-shell NODE=a)\n", made.Kubeconfig)
	return nil
}

func shell(ctx context.Context, name string, arguments []string) error {
	running, err := cluster.Load(name)
	if err != nil {
		return err
	}
	node := "node-" + strings.TrimPrefix(variable("NODE", "a"), "node-")
	known := false
	for _, one := range running.Nodes {
		known = known || one.Name == node
	}
	if !known && node != "node-outside" {
		return usageError(fmt.Sprintf("NODE=%s: there are the nodes a to %c, and outside", os.Getenv("NODE"), 'a'+rune(len(running.Nodes)-1)))
	}
	if len(arguments) == 0 {
		arguments = []string{variable("SHELL", "/bin/bash"), "-i"}
	}
	var inside *exec.Cmd
	if node == "node-outside" {
		inside = running.OutsideCommand(ctx, arguments[0], arguments[1:]...)
	} else {
		inside = running.Command(ctx, node, arguments[0], arguments[1:]...)
	}
	inside.Stdin, inside.Stdout, inside.Stderr = os.Stdin, os.Stdout, os.Stderr
	inside.Env = append(inside.Env, "PS1=["+node+"] # ")
	return inside.Run()
}
