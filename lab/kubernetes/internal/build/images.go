package build

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Names of images, exactly as Kubernetes' tests ask for them: then nothing is pulled.
const (
	testImages   = "registry.k8s.io/e2e-test-images/"
	PauseImage   = "registry.k8s.io/pause:3.10.2"
	AgnhostImage = testImages + "agnhost:2.66.1"
	// PolicyAgnhostImage is what the ClusterNetworkPolicy tests run.
	PolicyAgnhostImage = testImages + "agnhost:2.45"
	CoreDNSImage       = "weir.dev/lab/coredns:1.15.0"
	RollClientImage    = "weir.dev/lab/rollclient:1"
)

// basePackages are what the tests' containers call in their shells.
const basePackages = "bash,coreutils,dash,bind9-dnsutils,curl,wget,netcat-openbsd,iproute2,iperf,util-linux,socat,hostname,sed,grep,libc-bin,busybox,procps,iptables,base-files,mawk"

// withoutSCTP stands for agnhost in the ClusterNetworkPolicy tests: its SCTP servers crash where the kernel has no SCTP, and their pods never
// get ready.
const withoutSCTP = `#!/bin/sh
case "$1 $(env)" in
porter*SERVE_SCTP_PORT_*) exec sleep 1000000000 ;;
esac
exec /agnhost-all "$@"
`

// baseImage makes the root file system that the test images share, of Debian's packages. Packages are unpacked, not configured: what their
// scripts would have made is added by the layer above.
func (b *Builder) baseImage(ctx context.Context, target string) error {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return fmt.Errorf("mmdebstrap is missing; as root: apt-get install mmdebstrap")
	}
	beside := filepath.Join(filepath.Dir(target), "base.new.tar")
	defer os.Remove(beside)
	command := exec.CommandContext(ctx, "mmdebstrap", "--variant=extract", "--format=tar", "--include="+basePackages, "stable", beside)
	if suite := debianSuite(); suite != "" {
		command.Args[len(command.Args)-2] = suite
	}
	if err := quiet(command); err != nil {
		return err
	}
	return os.Rename(beside, target)
}

// debianSuite is the release of the machine, whose sources of packages are there.
func debianSuite() string {
	out, err := exec.Command("sh", "-c", ". /etc/os-release && printf %s \"$VERSION_CODENAME\"").Output()
	if err != nil {
		return ""
	}
	return string(out)
}

// file is one entry of a layer.
type file struct {
	path    string
	mode    int64
	content []byte // or
	from    string // a file of this machine
	link    string // or a symbolic link to this
}

// image is what an image's configuration says.
type image struct {
	name       string
	base       bool
	files      []file
	entrypoint []string
	command    []string
}

// images writes all images as one docker-archive, which shares the base.
func (b *Builder) images(ctx context.Context, target string) error {
	kubernetes, err := b.moduleFolder(ctx, ".", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	binary := func(name string) string { return filepath.Join(b.Folder, name) }
	porter := filepath.Join(kubernetes, "test", "images", "agnhost", "porter")
	agnhost := []file{
		{path: "agnhost", mode: 0o755, from: binary("agnhost")},
		{path: "agnhost-2", mode: 0o755, link: "/agnhost"},
		{path: "uploads/.keep", mode: 0o644},
		{path: "localhost.crt", mode: 0o644, from: filepath.Join(porter, "localhost.crt")},
		{path: "localhost.key", mode: 0o644, from: filepath.Join(porter, "localhost.key")},
		{path: "coredns", mode: 0o755, from: binary("coredns")},
	}
	policyAgnhost := append([]file{
		{path: "agnhost-all", mode: 0o755, from: binary("agnhost")},
		{path: "agnhost", mode: 0o755, content: []byte(withoutSCTP)},
	}, agnhost[2:5]...)
	shell := []string{"/bin/sh"}
	images := []image{
		{name: PauseImage, files: []file{{path: "pause", mode: 0o755, from: binary("pause")}}, entrypoint: []string{"/pause"}},
		{name: AgnhostImage, base: true, files: agnhost, entrypoint: []string{"/agnhost"}, command: []string{"pause"}},
		{name: testImages + "agnhost:2.55", base: true, files: agnhost, entrypoint: []string{"/agnhost"}, command: []string{"pause"}},
		{name: PolicyAgnhostImage, base: true, files: policyAgnhost, entrypoint: []string{"/agnhost"}, command: []string{"pause"}},
		{name: testImages + "regression-issue-74839:1.5", files: []file{{path: "regression-issue-74839", mode: 0o755, from: binary("regression-issue-74839")}}, entrypoint: []string{"/regression-issue-74839"}},
		{name: testImages + "glibc-dns-testing:2.1.1", base: true, command: shell},
		{name: testImages + "busybox:1.37.0-2", base: true, command: shell},
		{name: testImages + "nginx:1.27.0-2", base: true, command: []string{"sleep", "infinity"}},
		{name: testImages + "nginx:1.28.0-2", base: true, command: []string{"sleep", "infinity"}},
		{name: CoreDNSImage, files: []file{{path: "coredns", mode: 0o755, from: binary("coredns")}}, entrypoint: []string{"/coredns"}},
		{name: RollClientImage, base: true, files: []file{{path: "rollclient", mode: 0o755, from: binary("rollclient")}}, entrypoint: []string{"/rollclient"}},
	}
	beside := target + ".new"
	out, err := os.Create(beside)
	if err != nil {
		return err
	}
	defer os.Remove(beside)
	defer out.Close()
	archive := &archive{writer: tar.NewWriter(out), known: map[string]bool{}}
	if err := archive.write(images, binary("base.tar")); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Rename(beside, target)
}

// setUp is what packages' scripts would have done.
var setUp = []file{
	{path: "etc/passwd", mode: 0o644, content: []byte("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
	{path: "etc/group", mode: 0o644, content: []byte("root:x:0:\nnogroup:x:65534:\n")},
	{path: "etc/nsswitch.conf", mode: 0o644, content: []byte("hosts: files dns\n")},
	{path: "usr/bin/nc", mode: 0o777, link: "/bin/nc.openbsd"},
	{path: "usr/bin/awk", mode: 0o777, link: "/usr/bin/mawk"},
	{path: "usr/sbin/iptables", mode: 0o777, link: "/usr/sbin/iptables-nft"},
	{path: "usr/sbin/ip6tables", mode: 0o777, link: "/usr/sbin/ip6tables-nft"},
}

// archive is a docker-archive: configurations and layers named by their hashes, and manifest.json, which lists images.
type archive struct {
	writer *tar.Writer
	known  map[string]bool
}

type entry struct {
	Config   string   `json:"Config"`
	RepoTags []string `json:"RepoTags"`
	Layers   []string `json:"Layers"`
}

func (a *archive) write(images []image, base string) error {
	baseLayer, err := a.copyLayer(base)
	if err != nil {
		return err
	}
	var entries []entry
	for _, image := range images {
		var layers []string
		files := image.files
		if image.base {
			layers = append(layers, baseLayer)
			files = append(append([]file{}, setUp...), files...)
		}
		layer, err := a.layer(files)
		if err != nil {
			return fmt.Errorf("%s: %w", image.name, err)
		}
		layers = append(layers, layer)
		config, err := a.config(image, layers)
		if err != nil {
			return err
		}
		entry := entry{Config: config, RepoTags: []string{image.name}}
		for _, layer := range layers {
			entry.Layers = append(entry.Layers, layer+".tar")
		}
		entries = append(entries, entry)
	}
	manifest, err := json.Marshal(entries)
	if err != nil {
		return err
	}
	if err := a.add("manifest.json", int64(len(manifest)), nil, manifest); err != nil {
		return err
	}
	return a.writer.Close()
}

func (a *archive) add(name string, size int64, reader io.Reader, content []byte) error {
	if a.known[name] {
		return nil
	}
	a.known[name] = true
	if err := a.writer.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	if reader != nil {
		_, err := io.Copy(a.writer, reader)
		return err
	}
	_, err := a.writer.Write(content)
	return err
}

// copyLayer takes a finished tar file as a layer; its name is its hash.
func (a *archive) copyLayer(path string) (string, error) {
	layer, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer layer.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, layer)
	if err != nil {
		return "", err
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	name := hex.EncodeToString(hash.Sum(nil))
	return name, a.add(name+".tar", size, layer, nil)
}

func (a *archive) layer(files []file) (string, error) {
	temporary, err := os.CreateTemp("", "weir-lab-layer-")
	if err != nil {
		return "", err
	}
	defer os.Remove(temporary.Name())
	defer temporary.Close()
	writer := tar.NewWriter(temporary)
	for _, file := range files {
		if err := addFile(writer, file); err != nil {
			return "", fmt.Errorf("%s: %w", file.path, err)
		}
	}
	if err := writer.Close(); err != nil {
		return "", err
	}
	return a.copyLayer(temporary.Name())
}

// epoch is the time of every file, so that the same files make the same layer.
var epoch = time.Unix(0, 0)

func addFile(writer *tar.Writer, file file) error {
	header := &tar.Header{Name: file.path, Mode: file.mode, ModTime: epoch, Typeflag: tar.TypeReg, Format: tar.FormatPAX}
	if file.link != "" {
		header.Typeflag, header.Linkname = tar.TypeSymlink, file.link
		return writer.WriteHeader(header)
	}
	content := file.content
	if file.from != "" {
		read, err := os.ReadFile(file.from)
		if err != nil {
			return err
		}
		content = read
	}
	header.Size = int64(len(content))
	if err := writer.WriteHeader(header); err != nil {
		return err
	}
	_, err := writer.Write(content)
	return err
}

func (a *archive) config(image image, layers []string) (string, error) {
	type process struct {
		Env        []string `json:"Env"`
		Entrypoint []string `json:"Entrypoint,omitempty"`
		Cmd        []string `json:"Cmd,omitempty"`
	}
	type rootfs struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	ids := make([]string, len(layers))
	for i, layer := range layers {
		ids[i] = "sha256:" + layer
	}
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "created": epoch.UTC().Format(time.RFC3339),
		"config": process{
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Entrypoint: image.entrypoint, Cmd: image.command,
		},
		"rootfs": rootfs{"layers", ids},
	})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(config)
	name := hex.EncodeToString(sum[:]) + ".json"
	return name, a.add(name, int64(len(config)), nil, config)
}
