package pods

import (
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"weir.dev/lab/kubernetes/internal/rollclient"
)

const shown = `{"nodeName": "node-b", "addresses": [
  {"address": "10.244.1.1", "state": "inUse", "pod": "a/one"}, {"address": "fd00::1", "state": "inUse", "pod": "a/one"},
  {"address": "10.244.1.2", "state": "cooling", "pod": "a/gone"}, {"address": "10.244.1.3", "state": "inUse", "pod": "a/two"}]}`

func podNamed(name, phase string, hostNetwork bool) pod {
	p := pod{}
	p.Metadata.Namespace, p.Metadata.Name, _ = strings.Cut(name, "/")
	p.Status.Phase, p.Spec.HostNetwork = phase, hostNetwork
	return p
}

func TestOwnersAreThePodsWithAnAddressInUse(t *testing.T) {
	have, err := owners(shown)
	if err != nil || !slices.Equal(have, []string{"a/one", "a/two"}) {
		t.Errorf("%q, %v", have, err)
	}
	if _, err := owners("no"); err == nil {
		t.Error("what is no JSON is no list without owners")
	}
}

func TestLeaksAndPodsWithoutAddressAreTold(t *testing.T) {
	for name, c := range map[string]struct {
		have  []string
		pods  []pod
		wrong string
	}{
		"all fit":            {[]string{"a/one"}, []pod{podNamed("a/one", "Running", false), podNamed("a/node", "Running", true), podNamed("a/job", "Succeeded", false)}, ""},
		"a leak":             {[]string{"a/one", "a/old"}, []pod{podNamed("a/one", "Running", false)}, "a/old has an address"},
		"a pod that is over": {[]string{"a/job"}, []pod{podNamed("a/job", "Failed", false)}, "a/job has an address"},
		"no address":         {nil, []pod{podNamed("a/one", "Pending", false)}, "a/one runs, and has no address"},
	} {
		err := sameOwners(c.have, c.pods)
		if (err == nil) != (c.wrong == "") || err != nil && !strings.Contains(err.Error(), c.wrong) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyWhatIsLostWhileThePodIsThereCounts(t *testing.T) {
	noon := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	at := func(seconds float64) rollclient.Loss {
		return rollclient.Loss{At: noon.Add(time.Duration(seconds * float64(time.Second)))}
	}
	windows := []window{{"one", noon, noon.Add(4 * time.Second)}, {"two", noon.Add(10 * time.Second), noon.Add(14 * time.Second)}}
	for name, c := range map[string]struct {
		result rollclient.Result
		count  int
	}{
		"lost between":    {rollclient.Result{OK: 160, Losses: []rollclient.Loss{at(-1), at(4), at(9.9), at(14)}}, 0},
		"lost in both":    {rollclient.Result{OK: 160, Losses: []rollclient.Loss{at(0), at(3.9), at(12)}}, 2},
		"hardly anything": {rollclient.Result{OK: 3}, 1},
	} {
		if problems := judgeWindows(&c.result, windows); len(problems) != c.count {
			t.Errorf("%s: %q", name, problems)
		}
	}
}

func TestResultIsFoundAmongOtherLines(t *testing.T) {
	result, err := resultOf("ready\n{\"attempts\": 1, \"ok\": 1}\nrollclient: bye\n")
	if err != nil || result.OK != 1 {
		t.Errorf("%+v, %v", result, err)
	}
	if _, err := resultOf("ready\n"); err == nil {
		t.Error("a client that told nothing has no result")
	}
}

func TestManifestsAreYAML(t *testing.T) {
	text := servers("many", 3, "node-b") + servers("server", 4, "") + client("c", "node-a", "allowed", "10.96.1.1:80") + firstPolicies
	for _, one := range strings.Split(text, "---\n") {
		var object map[string]any
		if err := yaml.UnmarshalStrict([]byte(one), &object); err != nil {
			t.Errorf("%v in:\n%s", err, one)
		}
	}
}

func TestFirstAttemptIsJudgedByWhoMay(t *testing.T) {
	answered, late := rollclient.Result{OK: 1, MaxMs: 3}, rollclient.Result{OK: 1, MaxMs: 1004}
	refused := rollclient.Result{Lost: map[string]int{rollclient.Refused: 1}}
	silent := rollclient.Result{Lost: map[string]int{rollclient.TimedOut: 1}}
	for name, c := range map[string]struct {
		allowed bool
		result  rollclient.Result
		right   bool
	}{
		"an answer at once":      {true, answered, true},
		"a lost first packet":    {true, late, false},
		"no answer":              {true, silent, false},
		"an answer to the wrong": {false, answered, false},
		"told that it may not":   {false, refused, false},
		"silence":                {false, silent, true},
	} {
		if problem := judgeFirst(c.allowed, &c.result); (problem == "") != c.right {
			t.Errorf("%s: %q", name, problem)
		}
	}
}
