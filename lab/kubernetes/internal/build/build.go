// Package build makes the programs and images of the cluster once, into a folder that is named by their version.
package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Kubernetes is the version that is built and tested.
const Kubernetes = "1.37.2"

// Builder builds from the sources in Source (lab/kubernetes) into Folder.
type Builder struct {
	Source string
	Folder string
	Out    io.Writer
}

// CacheFolder is where binaries and images are kept: $WEIR_LAB_CACHE, else the user's cache folder.
func CacheFolder() (string, error) {
	base := os.Getenv("WEIR_LAB_CACHE")
	if base == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("where to keep what is built: %w; set WEIR_LAB_CACHE", err)
		}
		base = filepath.Join(cache, "weir-lab")
	}
	return filepath.Join(base, "kubernetes-"+Kubernetes), nil
}

// step is one thing to build.
type step struct {
	name string
	// inputs are files and folders below Source whose content decides whether what lies in the folder is still right.
	inputs []string
	build  func(ctx context.Context, target string) error
}

// All builds what is missing or was made from other sources. Progress goes to Out; the compiler's own words go to it where it fails.
func (b *Builder) All(ctx context.Context) error {
	if err := os.MkdirAll(b.Folder, 0o755); err != nil {
		return err
	}
	steps := b.steps()
	begin := time.Now()
	built := 0
	for number, step := range steps {
		target := filepath.Join(b.Folder, step.name)
		stamp, err := b.stamp(step)
		if err != nil {
			return err
		}
		stampFile := filepath.Join(b.Folder, "."+step.name+".stamp")
		if was, err := os.ReadFile(stampFile); err == nil && string(was) == stamp && exists(target) {
			continue
		}
		fmt.Fprintf(b.Out, "[%2d/%d] building %s ...", number+1, len(steps), step.name)
		since := time.Now()
		if err := step.build(ctx, target); err != nil {
			fmt.Fprintln(b.Out, " failed")
			return fmt.Errorf("building %s: %w", step.name, err)
		}
		if err := os.WriteFile(stampFile, []byte(stamp), 0o644); err != nil {
			return err
		}
		built++
		fmt.Fprintf(b.Out, " %.0f s\n", time.Since(since).Seconds())
	}
	if built > 0 {
		fmt.Fprintf(b.Out, "built %d of %d in %.0f s, into %s\n", built, len(steps), time.Since(begin).Seconds(), b.Folder)
	}
	return nil
}

func (b *Builder) steps() []step {
	modules := []string{"go.mod", "go.sum"}
	var steps []step
	program := func(name, module, packagePath, ldflags string, inputs ...string) {
		steps = append(steps, step{name, append(inputs, filepath.Join(module, "go.mod"), filepath.Join(module, "go.sum")),
			func(ctx context.Context, target string) error {
				return b.goTool(ctx, module, "build", "-trimpath", "-ldflags", ldflags, "-o", target, packagePath)
			}})
	}
	test := func(name, module, packagePath, ldflags string, inputs ...string) {
		steps = append(steps, step{name, append(inputs, filepath.Join(module, "go.mod"), filepath.Join(module, "go.sum")),
			func(ctx context.Context, target string) error {
				return b.goTool(ctx, module, "test", "-c", "-trimpath", "-ldflags", ldflags, "-o", target, packagePath)
			}})
	}
	// The end-to-end framework compares versions: they must not be empty.
	version := strings.SplitN(Kubernetes, ".", 3)
	const variables = "-X k8s.io/component-base/version."
	versions := "-s -w " + variables + "gitVersion=v" + Kubernetes + " " + variables + "gitMajor=" + version[0] + " " + variables + "gitMinor=" + version[1]
	for _, name := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl", "kube-proxy"} {
		program(name, ".", "k8s.io/kubernetes/cmd/"+name, versions)
	}
	program("agnhost", ".", "k8s.io/kubernetes/test/images/agnhost", "-s -w")
	program("regression-issue-74839", ".", "k8s.io/kubernetes/test/images/regression-issue-74839", "-s -w")
	program("ginkgo", ".", "github.com/onsi/ginkgo/v2/ginkgo", "-s -w")
	test("e2e.test", ".", "./e2e", versions, "e2e")
	program("etcd", "etcd", ".", "-s -w", "etcd")
	program("coredns", "coredns", ".", "-s -w", "coredns")
	test("cnp.test", "cnp", ".", "-s -w", "cnp")
	program("pause", ".", "./cmd/pause", "-s -w", "cmd/pause")
	program("rollclient", ".", "./cmd/rollclient", "-s -w", "cmd/rollclient", "internal/rollclient")
	steps = append(steps,
		step{"cnp-crds.yaml", append([]string{"cnp/go.mod"}, modules...), b.policyKinds},
		step{"base.tar", nil, b.baseImage},
		step{"images.tar", append([]string{"internal/build", "cmd/pause", "cmd/rollclient", "internal/rollclient", "coredns"}, modules...), b.images})
	return steps
}

// stamp is a hash over what a step is made from.
func (b *Builder) stamp(step step) (string, error) {
	hash := sha256.New()
	fmt.Fprintln(hash, Kubernetes, step.name)
	for _, input := range step.inputs {
		err := filepath.WalkDir(filepath.Join(b.Source, input), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			content, err := os.ReadFile(path)
			fmt.Fprintf(hash, "%s %d\n", path, len(content))
			hash.Write(content)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// goTool runs the go command in a module below Source, without cgo, so that what it makes runs on any root file system.
func (b *Builder) goTool(ctx context.Context, module string, arguments ...string) error {
	command := exec.CommandContext(ctx, "go", arguments...)
	command.Dir = filepath.Join(b.Source, module)
	command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly -buildvcs=false")
	return quiet(command)
}

// policyKinds writes the kinds of the ClusterNetworkPolicy API, experimental fields included, as its module has them.
func (b *Builder) policyKinds(ctx context.Context, target string) error {
	folder, err := b.moduleFolder(ctx, "cnp", "sigs.k8s.io/network-policy-api")
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(folder, "config", "crd", "experimental", "policy.networking.k8s.io_*.yaml"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("no kinds below %s/config/crd/experimental (%v)", folder, err)
	}
	var all []byte
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		all = append(append(all, "---\n"...), content...)
	}
	return os.WriteFile(target, all, 0o644)
}

func (b *Builder) moduleFolder(ctx context.Context, module, name string) (string, error) {
	command := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", name)
	command.Dir = filepath.Join(b.Source, module)
	command.Env = append(os.Environ(), "GOFLAGS=-mod=mod")
	out, err := command.Output()
	if folder := strings.TrimSpace(string(out)); err == nil && folder != "" {
		return folder, nil
	}
	return "", fmt.Errorf("where the sources of %s are: %w", name, err)
}

// quiet runs a command, and says what it said only where it fails.
func quiet(command *exec.Cmd) error {
	out, err := command.CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if len(lines) > 30 {
			lines = lines[len(lines)-30:]
		}
		return fmt.Errorf("%s: %w\n%s", strings.Join(command.Args, " "), err, strings.Join(lines, "\n"))
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
