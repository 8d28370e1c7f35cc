package suites

import (
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"weir.dev/lab/kubernetes/internal/cluster"
	"weir.dev/lab/kubernetes/internal/rolling"
)

const listText = `
skip:
- reason: no SCTP
  specs: ["[sig-network] Services should serve SCTP"]
- reason: only one family
  when: {family: [ipv4, ipv6]}
  specs: ["[sig-network] [Feature:IPv6DualStack] should work"]
fail:
- reason: no proxy
  when: {kind: [weir]}
  cause: "10249"
  specs: ["[sig-network] Networking should check kube-proxy urls", "[sig-network] Gone"]
`

var (
	onWeir  = Conditions{Kind: []string{"weir"}, Family: []string{"ipv4"}, Encap: []string{"none"}, Offload: []string{"auto"}}
	onProxy = Conditions{Kind: []string{"kube-proxy"}, Family: []string{"dual"}, Encap: []string{"none"}, Offload: []string{"auto"}}
)

func list(t *testing.T, text string) *List {
	t.Helper()
	l, err := parseList([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestListJudges(t *testing.T) {
	const proxy = "[sig-network] Networking should check kube-proxy urls"
	cases := map[string]struct {
		spec     Spec
		on       Conditions
		wrong    string
		expected bool
	}{
		"passes, not listed":       {Spec{Name: "other", Outcome: Passed}, onWeir, "", false},
		"fails, not listed":        {Spec{Name: "other", Outcome: Failed}, onWeir, "failed: other", false},
		"fails, listed":            {Spec{Name: proxy, Outcome: Failed, Cause: "no answer at :10249"}, onWeir, "", true},
		"fails otherwise, listed":  {Spec{Name: proxy, Outcome: Failed, Cause: "no pod"}, onWeir, "failed otherwise than the list expects (no proxy): " + proxy, false},
		"passes, listed":           {Spec{Name: proxy, Outcome: Passed}, onWeir, "passed, and the list expects it to fail (no proxy): " + proxy, false},
		"skipped, listed":          {Spec{Name: proxy, Outcome: Skipped}, onWeir, "", false},
		"passes, listed elsewhere": {Spec{Name: proxy, Outcome: Passed}, onProxy, "", false},
		"fails, listed elsewhere":  {Spec{Name: proxy, Outcome: Failed, Cause: "no answer at :10249"}, onProxy, "failed: " + proxy, false},
	}
	for name, c := range cases {
		specs := []Spec{c.spec}
		wrong := list(t, listText).judge(specs, c.on)
		if strings.Join(wrong, "|") != c.wrong {
			t.Errorf("%s: %q, not %q", name, wrong, c.wrong)
		}
		if specs[0].Expected != c.expected {
			t.Errorf("%s: expected is %v", name, specs[0].Expected)
		}
		if c.expected && specs[0].Reason != "no proxy" {
			t.Errorf("%s: the reason is %q", name, specs[0].Reason)
		}
	}
}

func TestListSkipsByConditions(t *testing.T) {
	l := list(t, listText)
	dual := "[sig-network] [Feature:IPv6DualStack] should work"
	if reason, skip := l.skips(dual, onWeir); !skip || reason != "only one family" {
		t.Errorf("%v, %q", skip, reason)
	}
	if _, skip := l.skips(dual, onProxy); skip {
		t.Error("a dual-stack cluster can run it")
	}
	if _, skip := l.skips("[sig-network] Services should serve SCTP", onProxy); !skip {
		t.Error("SCTP is nowhere")
	}
}

func TestListKnowsStaleNames(t *testing.T) {
	l := list(t, listText)
	specs := []string{"[sig-network] Services should serve SCTP", "[sig-network] [Feature:IPv6DualStack] should work", "[sig-network] Networking should check kube-proxy urls"}
	if missing := l.unknown("[", specs); !reflect.DeepEqual(missing, []string{"[sig-network] Gone"}) {
		t.Errorf("%q", missing)
	}
	if missing := l.unknown(cnpPrefix, nil); missing != nil {
		t.Errorf("other suites' names are not this one's: %q", missing)
	}
}

func TestListRefusesMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"fail: [{specs: [a]}]": "reason",
		"fail: [{reason: b}]":  "names no specs",
		"fail: [{reason: b, specs: [a], when: {kind: [calico]}}]":       "calico",
		"fail: [{reason: b, specs: [a], when: {family: [4]}}]":          "",
		"fail: [{reason: b, specs: [a], cause: '('}]":                   "cause",
		"skip: [{reason: b, specs: [a], cause: c}]":                     "no cause",
		"fails: [{reason: b, specs: [a]}]":                              "fails",
		"fail: [{reason: b, specs: [a], when: {nodes: [3]}}]":           "nodes",
		"fail: [{reason: b, specs: [a], when: {offload: [sometimes]}}]": "sometimes",
	} {
		if _, err := parseList([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// The list in the tree is read as a run reads it.
func TestListOfTheTree(t *testing.T) {
	l, err := ReadList(filepath.Join("..", "..", "expected-failures.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, e := range l.Skip {
		for _, name := range e.Specs {
			if seen[name] && len(e.When.Family) == 0 {
				t.Errorf("twice: %s", name)
			}
			seen[name] = true
		}
	}
}

func TestJUnit(t *testing.T) {
	specs, trouble, err := readJUnit(filepath.Join("testdata", "junit_01.xml"))
	if err != nil {
		t.Fatal(err)
	}
	want := []Spec{
		{Name: "[sig-network] Services should be rejected when no endpoints exist", Outcome: Passed, Seconds: 12.5},
		{Name: "[sig-network] HostPort validates hostPort [Conformance]", Outcome: Failed, Seconds: 60.25,
			Cause: "Failed to connect to exposed host ports\ntimed out waiting for the condition"},
		{Name: "[sig-network] DNS should provide DNS for the cluster [Provider:GCE]", Outcome: Skipped, Seconds: 0.1, Reason: "Only supported for providers [gce] (not skeleton)"},
		{Name: "[sig-network] Proxy panics", Outcome: Failed, Seconds: 1, Cause: "Test Panicked\nindex out of range [3] with length 3"},
	}
	if !reflect.DeepEqual(specs, want) {
		t.Errorf("%+v\nnot\n%+v", specs, want)
	}
	if len(trouble) != 1 || !strings.Contains(trouble[0], "[SynchronizedBeforeSuite]: 2 nodes are not ready") {
		t.Errorf("%q", trouble)
	}
	if _, _, err := readJUnit(filepath.Join("testdata", "none.xml")); !os.IsNotExist(err) {
		t.Error(err)
	}
	broken := filepath.Join(t.TempDir(), "broken.xml")
	os.WriteFile(broken, []byte("<testsuites><testsuite>"), 0o644)
	if _, _, err := readJUnit(broken); err == nil {
		t.Error("half a report is none")
	}
}

func TestFirstCause(t *testing.T) {
	long := strings.Repeat("ä", causeLineBytes)
	for text, want := range map[string]string{
		"": "",
		"[FAILED] \n\nUnable to reach the service\nIn [It] at: service.go:12 @ 11/30/26 08:00:00\n":                                           "Unable to reach the service",
		"I1130 08:00:01.123456 12345 service.go:88] Unexpected error: \n    <*errors.errorString | 0xc000>: \n    no\n    {\n s: \"no\",\n }": "no",
		"a\na\nb\nc\nd\ne\n": "a\nb\nc\nd",
		long:                 strings.Repeat("ä", causeLineBytes/2) + "…",
	} {
		if got := strings.Join(firstCause(text), "\n"); got != want {
			t.Errorf("of %q: %q, not %q", text, got, want)
		}
	}
}

func TestWrittenJUnitCountsTheUnexpected(t *testing.T) {
	path := filepath.Join(t.TempDir(), "junit.xml")
	err := writeJUnit(path, []SuiteResult{{Name: "services", Seconds: 3, Specs: []Spec{
		{Name: "good", Outcome: Passed}, {Name: "bad", Outcome: Failed, Cause: "because <&>"}, {Name: "known", Outcome: Failed, Expected: true, Reason: "why"},
		{Name: "not here", Outcome: Skipped, Reason: "no SCTP"},
	}, Wrong: []string{"failed: bad", "did not run: lost"}}})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	report := junitSuites{}
	if err := xml.Unmarshal(text, &report); err != nil {
		t.Fatal(err)
	}
	s := report.Suites[0]
	if s.Tests != 5 || s.Failures != 1 || s.Errors != 1 || s.Skipped != 2 || len(s.Cases) != 5 {
		t.Errorf("%+v", s)
	}
	if s.Cases[1].Failure == nil || s.Cases[1].Failure.Text != "because <&>" || s.Cases[2].Skipped.Message != "expected to fail: why" {
		t.Errorf("%+v", s.Cases)
	}
}

var someSpecs = []string{
	"[sig-network] DNS should provide DNS [Conformance]",
	"[sig-network] HostPort [LinuxOnly] [Conformance]",
	"[sig-network] Netpol NetworkPolicy between server and client should allow",
	"[sig-network] NetworkPolicy API should support",
	"[sig-network] Netpol [Feature:SCTPConnectivity] should deny",
	"[sig-network] Services should serve (all) of it",
	"[sig-network] Services should serve (all) of it twice",
	"[sig-network] Services should work after restarting kube-proxy [Disruptive]",
	"[sig-storage] CSI should mount [Conformance]",
}

const skipSCTP = `skip: [{reason: no SCTP, specs: ["[sig-network] Netpol [Feature:SCTPConnectivity] should deny"]},
  {reason: by name, specs: ["[sig-network] Services should serve (all) of it"]}]`

// takes is what ginkgo does with a focus.
func takes(t *testing.T, chosen *selection, name string) bool {
	t.Helper()
	text := "Kubernetes e2e suite " + name
	return regexp.MustCompile(chosen.focus()).MatchString(text)
}

func TestSelection(t *testing.T) {
	l := list(t, skipSCTP)
	cases := []struct {
		suite, focus string
		narrow       bool
		run, skipped []int
	}{
		{Conformance, "", false, []int{0, 1}, nil},
		{Netpol, "", false, []int{2, 3}, []int{4}},
		{Services, "", false, []int{6, 7}, []int{5}},
		{Services, "HostPort|mount", false, []int{1, 8}, nil},
		{Services, "HostPort|serve", true, []int{6}, []int{5}},
		{Netpol, "Disruptive", false, []int{7}, nil},
		{Netpol, "nothing like that", false, nil, nil},
	}
	for _, c := range cases {
		chosen, err := ginkgoSuiteOf(c.suite).choose(someSpecs, c.focus, c.narrow, l, onWeir)
		if err != nil {
			t.Fatal(err)
		}
		var run, skipped []string
		for _, i := range c.run {
			run = append(run, someSpecs[i])
		}
		for _, i := range c.skipped {
			skipped = append(skipped, someSpecs[i])
		}
		if !slices.Equal(chosen.run, run) {
			t.Errorf("%s %q: runs %q", c.suite, c.focus, chosen.run)
		}
		var left []string
		for _, spec := range chosen.skipped {
			if spec.Outcome != Skipped || spec.Reason == "" {
				t.Errorf("%+v", spec)
			}
			left = append(left, spec.Name)
		}
		if !slices.Equal(left, skipped) {
			t.Errorf("%s %q: skips %q", c.suite, c.focus, left)
		}
		if len(run) == 0 {
			continue
		}
		// What is said to run is what ginkgo takes.
		for _, name := range someSpecs {
			if takes(t, chosen, name) != slices.Contains(run, name) {
				t.Errorf("%s %q: ginkgo takes %s: %v (focus %s)", c.suite, c.focus, name, takes(t, chosen, name), chosen.focus())
			}
		}
	}
	if _, err := ginkgoSuiteOf(Netpol).choose(someSpecs, "(", false, l, onWeir); err == nil {
		t.Error("that is no expression")
	}
}

func TestListedSpecs(t *testing.T) {
	got := listedSpecs("The following spec names can be used with 'ginkgo run --focus/skip':\n    ../../test/e2e/network/dns.go:55: [sig-network] DNS should: provide\n\n  other\n")
	if !slices.Equal(got, []string{"[sig-network] DNS should: provide"}) {
		t.Errorf("%q", got)
	}
}

func TestSuiteNames(t *testing.T) {
	if names, err := suiteNames(All); err != nil || len(names) != 6 {
		t.Error(names, err)
	}
	if names, err := suiteNames(CNP); err != nil || !slices.Equal(names, []string{CNP}) {
		t.Error(names, err)
	}
	if _, err := suiteNames("everything"); err == nil {
		t.Error("there is no such suite")
	}
}

// As the program prints it: marks before its own lines, each end as it comes.
const goOutput = `#=== RUN   TestConformance
    suite.go:150: Test Setup: Applying base manifests
#=== RUN   TestConformance/CNPAdminTierGress
#=== NAME  TestConformance
    apply.go:10: applied
#=== RUN   TestConformance/CNPAdminTierGress/Should_support_an_'allow-gress'_policy
    helper.go:98: FAILED Command was [/agnhost connect --timeout=3s --protocol=tcp 10.244.1.9:80]
    helper.go:99: Expected connection to succeed from ns-a/pod-0 to 10.244.1.9, but instead it miserably failed. stderr: TIMEOUT
    helper.go:98: FAILED Command was [/agnhost connect --timeout=3s --protocol=sctp 10.244.1.9:9003]
    helper.go:99: Expected connection to succeed from ns-a/pod-0 to 10.244.1.9, but instead it miserably failed. stderr: OTHER: protocol not supported
    helper.go:73: 
        	Error Trace:	helper.go:73
        	Error:      	Condition never satisfied
#--- FAIL: TestConformance/CNPAdminTierGress/Should_support_an_'allow-gress'_policy (20.50s)
#=== NAME  TestConformance/CNPAdminTierGress
#=== RUN   TestConformance/CNPAdminTierGress/Should_deny
#--- PASS: TestConformance/CNPAdminTierGress/Should_deny (12.50s)
#=== NAME  TestConformance/CNPAdminTierGress
#--- FAIL: TestConformance/CNPAdminTierGress (33.00s)
#=== NAME  TestConformance
#=== RUN   TestConformance/CNPSkipped
#--- SKIP: TestConformance/CNPSkipped (0.00s)
#=== RUN   TestConformance/CNPBroken
#--- FAIL: TestConformance/CNPBroken (1.00s)
#=== NAME  TestConformance
#--- FAIL: TestConformance (100.00s)
#=== NAME  
#FAIL
`

func TestGoTests(t *testing.T) {
	var log strings.Builder
	tests := newGoTests(cnpTest)
	tests.log = &log
	var handled []string
	tests.handle = func(spec *Spec, output string, subtest bool) {
		handled = append(handled, spec.Name)
		if spec.Name == "CNPAdminTierGress/Should support an 'allow-gress' policy" && (!subtest || !strings.Contains(output, "10.244.1.9:9003")) {
			t.Errorf("subtest %v, output %q", subtest, output)
		}
	}
	tests.read(strings.NewReader(strings.ReplaceAll(goOutput, "#", testMark)))
	if tests.outcome != Failed || len(handled) != 5 || handled[0] != "CNPAdminTierGress/Should support an 'allow-gress' policy" {
		t.Errorf("%s, %q", tests.outcome, handled)
	}
	if log.String() != strings.ReplaceAll(goOutput, "#", "") {
		t.Errorf("the log has\n%s", log.String())
	}
	want := []Spec{
		{Name: "CNPAdminTierGress/Should support an 'allow-gress' policy", Outcome: Failed, Seconds: 20.5,
			Cause: "[/agnhost connect --timeout=3s --protocol=sctp 10.244.1.9:9003]\nExpected connection to succeed from ns-a/pod-0 to 10.244.1.9, but instead it miserably failed. stderr: OTHER: protocol not supported"},
		{Name: "CNPAdminTierGress/Should deny", Outcome: Passed, Seconds: 12.5},
		{Name: "CNPSkipped", Outcome: Skipped},
		{Name: "CNPBroken", Outcome: Failed, Seconds: 1},
	}
	if got := tests.leaves(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

func TestGoTestsThatNeverEnd(t *testing.T) {
	tests := newGoTests(cnpTest)
	tests.read(strings.NewReader("=== RUN   TestConformance\n=== RUN   TestConformance/A\n=== RUN   TestConformance/A/b\npanic: test timed out"))
	if tests.outcome != "" {
		t.Error(tests.outcome)
	}
	if got := tests.leaves(); len(got) != 1 || got[0].Outcome != Failed || got[0].Name != "A/b" {
		t.Errorf("%+v", got)
	}
}

func TestPairs(t *testing.T) {
	got := pairs(`INFO: Running '/bin/kubectl --server=https://192.0.2.11:6443 --namespace=services-1 exec execpod-a -- /bin/sh -x -c echo hostName | nc -v -t -w 2 10.96.3.4 80'
Running '/bin/kubectl --kubeconfig=x --namespace=services-1 exec execpod-a -- /bin/sh -x -c echo hostName | nc -v -u -w 2 10.96.3.4 90'
Running '/bin/kubectl --kubeconfig=x --namespace=services-1 exec execpod-a -- /bin/sh -x -c curl -q -s --connect-timeout 2 http://192.0.2.12:30123/hostname'
Running '/bin/kubectl --kubeconfig=x --namespace=services-1 exec execpod-a -- /bin/sh -x -c curl -q -s http://192.0.2.12:30123/hostname'
I1130 09:38:03.161207   24898 exec_util.go:58] Exec {Command:[/agnhost connect --protocol=udp --timeout=3s [fd00:244::5]:80] Namespace:netpol-x PodName:a ContainerName:c Stdin:<nil>}
    helper.go:98: FAILED Command was [/agnhost connect --timeout=3s --protocol=sctp 10.244.1.9:9003]
    helper.go:99: Expected connection to succeed from ns-a/pod-0 to 10.244.1.9, but instead it miserably failed. stderr: x
nothing to see in http://10.0.0.1:80/ alone
`)
	want := []pair{
		{"services-1/execpod-a", "10.96.3.4", "tcp", 80},
		{"services-1/execpod-a", "10.96.3.4", "udp", 90},
		{"services-1/execpod-a", "192.0.2.12", "tcp", 30123},
		{"netpol-x/a", "fd00:244::5", "udp", 80},
		{"ns-a/pod-0", "10.244.1.9", "sctp", 9003},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if text := flows(want[:1]); text != `{"src":"services-1/execpod-a","dst":"10.96.3.4","proto":"tcp","dport":80}`+"\n" {
		t.Error(text)
	}
}

func TestFollowReadsWhatGrows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.jsonl")
	done := make(chan struct{})
	var names []string
	followed := make(chan error, 1)
	go func() {
		followed <- follow(path, done, func(e event) { names = append(names, e.Event+" "+e.Name) })
	}()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	io.WriteString(file, `{"event":"start","specs":2}`+"\n"+`{"event":"spec","na`)
	time.Sleep(2 * followInterval)
	io.WriteString(file, `me":"one"}`+"\n")
	io.WriteString(file, `{"event":"spec","name":"two"}`+"\n")
	close(done)
	if err := <-followed; err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(names, []string{"start ", "spec one", "spec two"}) {
		t.Errorf("%q", names)
	}
}

func TestFollowRefusesNonsense(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.jsonl")
	os.WriteFile(path, []byte("nonsense\n"), 0o644)
	done := make(chan struct{})
	close(done)
	if err := follow(path, done, func(event) {}); err == nil {
		t.Error("that is no event")
	}
}

func TestCompare(t *testing.T) {
	folder := t.TempDir()
	write := func(name string, s *Summary) string {
		path := filepath.Join(folder, name)
		os.MkdirAll(path, 0o755)
		if err := s.write(filepath.Join(path, "summary.json")); err != nil {
			t.Fatal(err)
		}
		return path
	}
	a := write("a", &Summary{Kind: cluster.Weir, Family: "ipv4", Suites: []SuiteResult{
		{Name: Conformance, Passed: 46, Failed: 1, Seconds: 139.4, Specs: []Spec{{Name: "same", Outcome: Passed}, {Name: "HostPort", Outcome: Failed}}},
		{Name: Rolling, Rolling: []rolling.Scenario{{Name: "tcp", Attempts: 19560, Lost: map[string]int{"refused": 2276}}, {Name: "dns", Attempts: 10}}},
	}})
	b := write("b", &Summary{Kind: cluster.KubeProxy, Family: "ipv4", Suites: []SuiteResult{
		{Name: Conformance, Passed: 47, Seconds: 84, Specs: []Spec{{Name: "same", Outcome: Passed}, {Name: "HostPort", Outcome: Passed}}},
		{Name: Rolling, Rolling: []rolling.Scenario{{Name: "tcp", Attempts: 21570}}},
		{Name: Netpol},
	}})
	var out strings.Builder
	if err := Compare(a, filepath.Join(b, "summary.json"), &out); err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{"A: weir, ipv4", "B: kube-proxy, ipv4", "conformance 46 47 1 0 0 0 139 84", "netpol - 0 - 0", "A failed B passed HostPort", "tcp 19560 21570 2276 0 0.00 0.00 0.00 0.00 A loses more", "dns 10 - 0 -"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in:\n%s", want, out.String())
		}
	}
	if strings.Contains(text, "passed same") {
		t.Error("what is equal is not different")
	}
	if err := Compare(a, filepath.Join(folder, "c"), &out); err == nil {
		t.Error("there is no c")
	}
}

func TestSummaryPrints(t *testing.T) {
	r := SuiteResult{Name: Services, Seconds: 12.6, Specs: []Spec{
		{Name: "b", Outcome: Failed, Cause: "why\nand how", Diagnostics: "/results/b"}, {Name: "a", Outcome: Passed},
		{Name: "c", Outcome: Failed, Expected: true, Reason: "known"}, {Name: "d", Outcome: Skipped, Reason: "no SCTP"}, {Name: "e", Outcome: Skipped, Reason: "no SCTP"},
	}, Wrong: []string{"failed: b"}}
	r.count()
	var out strings.Builder
	(&Summary{Kind: "weir", Suites: []SuiteResult{r}}).print(&out)
	text := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{"services 1 2 2 13 1 expected to fail, 1 wrong", "services: failed b why and how look into /results/b", "failed as the list expects known c", "services: skipped no SCTP d e", "Not as expected."} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in:\n%s", want, out.String())
		}
	}
}

func TestFileName(t *testing.T) {
	if got := fileName("[sig-network] Services [LinuxOnly] should: work! " + strings.Repeat("x", 100)); len(got) > fileNameBytes || !strings.HasPrefix(got, "Services-LinuxOnly-should-work-xxx") {
		t.Error(got)
	}
}
