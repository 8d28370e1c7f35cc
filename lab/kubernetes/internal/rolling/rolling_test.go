package rolling

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"weir.dev/lab/kubernetes/internal/cluster"
	"weir.dev/lab/kubernetes/internal/rollclient"
)

var noon = time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)

func TestBarIsThatNothingIsLost(t *testing.T) {
	for name, c := range map[string]struct {
		result rollclient.Result
		pass   bool
	}{
		"all answered":  {rollclient.Result{Attempts: 1000, OK: 1000}, true},
		"one lost":      {rollclient.Result{Attempts: 1000, OK: 999, Lost: map[string]int{rollclient.Refused: 1}}, false},
		"nothing asked": {rollclient.Result{}, false},
		"too few":       {rollclient.Result{Attempts: 5, OK: 5}, false},
		"gave up":       {rollclient.Result{Attempts: 1000, OK: 1000, Error: "no"}, false},
	} {
		if s := newScenario("x", "", &c.result, nil); s.Pass != c.pass || (len(s.Problems) == 0) != c.pass {
			t.Errorf("%s: %v, %q", name, s.Pass, s.Problems)
		}
	}
}

func TestWhyTellsWhatHappenedBefore(t *testing.T) {
	s := newScenario("x", "", &rollclient.Result{Attempts: 200, OK: 199, Lost: map[string]int{rollclient.Refused: 1},
		Losses: []rollclient.Loss{{At: noon.Add(3 * time.Second), LocalPort: 40123, Kind: rollclient.Refused, AfterMs: 2}}},
		[]Event{{noon, "roll-out 1 began"}, {noon.Add(time.Second), "web-1 is to end"}, {noon.Add(5 * time.Second), "web-1 is gone"}})
	if got := s.Why(); got != "1 of 200 lost: 1 refused\nrefused after 2 ms, from port 40123: 12:00:03.000, 2.0 s after: web-1 is to end" {
		t.Error(got)
	}
}

func TestLongLivedConnectionsEndWithTheirPods(t *testing.T) {
	deleted := map[string]time.Time{"a": noon, "b": noon, "c": noon}
	at := func(backend string, seconds float64, kind string) rollclient.Connection {
		return rollclient.Connection{Backend: backend, Kind: kind, Ended: noon.Add(time.Duration(seconds * float64(time.Second))), Requests: 10}
	}
	for name, c := range map[string]struct {
		connection rollclient.Connection
		lost       string
	}{
		"open":                      {rollclient.Connection{Backend: "z"}, ""},
		"ended by its pod":          {at("a", 4.2, rollclient.Reset), ""},
		"ended when its pod got it": {at("a", 0.5, rollclient.Reset), endedEarly},
		"its pod is there":          {at("z", 4.2, rollclient.Reset), endedEarly},
		"silent":                    {at("b", 4.2, rollclient.TimedOut), rollclient.TimedOut},
		"wrong":                     {at("c", 5, rollclient.Wrong), rollclient.Wrong},
	} {
		r := &rollclient.Result{Mode: rollclient.Long, Attempts: 5000, OK: 5000, Connections: []rollclient.Connection{{Backend: "z"}, c.connection}}
		s := newScenario("long-lived", "", r, nil)
		s.judgeLong(r, deleted, 4*time.Second)
		if s.Pass != (c.lost == "") || s.Attempts != 2 || s.OK+s.LostTotal() != 2 || (c.lost != "" && s.Lost[c.lost] != 1) {
			t.Errorf("%s: %+v", name, s)
		}
		if len(s.Losses) != s.LostTotal() {
			t.Errorf("%s: %d losses are told", name, len(s.Losses))
		}
	}
	s := newScenario("long-lived", "", &rollclient.Result{Mode: rollclient.Long}, nil)
	if s.judgeLong(&rollclient.Result{}, deleted, time.Second); s.Pass {
		t.Error("no connection proves nothing")
	}
}

func TestBulk(t *testing.T) {
	steady := slices.Repeat([]int64{125_000_000}, 50)
	judge := func(intervals []int64) *Scenario {
		r := &rollclient.Result{Mode: rollclient.Bulk, Attempts: 1, OK: 1, IntervalMs: 100, IntervalBytes: intervals}
		s := newScenario("bulk", "", r, nil)
		s.judgeBulk(r)
		return s
	}
	if s := judge(steady); !s.Pass || s.Bulk.MedianGbit != 10 || s.Bulk.LeastGbit != 10 || s.Bulk.DipMs != 0 {
		t.Errorf("%+v %+v", s, s.Bulk)
	}
	dip := slices.Clone(steady)
	dip[10], dip[11], dip[20] = 0, 60_000_000, 1
	dip[0], dip[49] = 0, 0
	if s := judge(dip); !s.Pass || s.Bulk.DipMs != 300 || s.Bulk.LongestDipMs != 200 || s.Bulk.LeastGbit != 0 {
		t.Errorf("%+v %+v", s, s.Bulk)
	}
	dead := slices.Clone(steady)
	for i := 35; i < 50; i++ {
		dead[i] = 0
	}
	if s := judge(dead); s.Pass {
		t.Error("it did not come back")
	}
	if s := judge(make([]int64, 50)); s.Pass {
		t.Error("nothing went through")
	}
	if s := judge(steady[:5]); s.Pass {
		t.Error("half a second proves nothing")
	}
}

func TestAffinity(t *testing.T) {
	for switches, pass := range map[int]bool{0: true, 12: true, 13: false} {
		s := &Scenario{Pass: true}
		if s.judgeAffinity(&rollclient.Result{Switches: switches}, 12); s.Pass != pass {
			t.Errorf("%d switches: %v", switches, s.Pass)
		}
	}
}

func TestWatch(t *testing.T) {
	s := &suite{deleted: map[string]time.Time{}}
	s.readWatch(strings.NewReader(`{"type":"ADDED","object":{"metadata":{"name":"web-1"}}}
{"type":"MODIFIED","object":{"metadata":{"name":"web-1"}}}
{"type":"MODIFIED","object":{"metadata":{"name":"web-1","deletionTimestamp":"2026-11-30T12:00:00Z"}}}
{"type":"MODIFIED","object":{"metadata":{"name":"web-1","deletionTimestamp":"2026-11-30T12:00:00Z"}}}
{"type":"DELETED","object":{"metadata":{"name":"web-1","deletionTimestamp":"2026-11-30T12:00:00Z"}}}
{"type":"ADDED","obj`))
	var what []string
	for _, e := range s.events {
		what = append(what, e.What)
	}
	if !slices.Equal(what, []string{"web-1 is there", "web-1 is to end", "web-1 is gone"}) || len(s.deleted) != 1 {
		t.Errorf("%q %v", what, s.deleted)
	}
}

func TestManifest(t *testing.T) {
	kinds := map[string]int{}
	for _, document := range strings.Split(manifest("node-a", "node-b"), "---\n") {
		var kind struct{ Kind string }
		if err := yaml.Unmarshal([]byte(document), &kind); err != nil {
			t.Fatalf("%v:\n%s", err, document)
		}
		kinds[kind.Kind]++
		var object any
		switch kind.Kind {
		case "Deployment":
			object = &appsv1.Deployment{}
		case "Pod":
			object = &corev1.Pod{}
		case "Service":
			object = &corev1.Service{}
		case "Namespace":
			object = &corev1.Namespace{}
		}
		if err := yaml.UnmarshalStrict([]byte(document), object); err != nil {
			t.Errorf("%v:\n%s", err, document)
		}
		if d, is := object.(*appsv1.Deployment); is {
			if c := d.Spec.Template.Spec.Containers[0]; *d.Spec.Replicas != 6 || c.Lifecycle.PreStop.Sleep.Seconds != 4 || c.ReadinessProbe == nil {
				t.Errorf("%+v", d.Spec)
			}
		}
		if p, is := object.(*corev1.Pod); is && p.Name == clientFew && p.Spec.SecurityContext.Sysctls[0].Value != "40000 42047" {
			t.Errorf("%+v", p.Spec.SecurityContext)
		}
	}
	if kinds["Service"] != 4 || kinds["Pod"] != 4 || kinds["Deployment"] != 1 || kinds["Namespace"] != 1 {
		t.Error(kinds)
	}
}

func TestNamesAreUnique(t *testing.T) {
	names := Names(&cluster.Cluster{Kind: cluster.Weir, Nodes: []cluster.Node{{Name: "node-a"}, {Name: "node-b"}}})
	if slices.Sort(names); len(slices.Compact(slices.Clone(names))) != len(names) || len(names) < 12 {
		t.Errorf("%q", names)
	}
}

func TestFocusThatMatchesNothingTouchesNothing(t *testing.T) {
	c := &cluster.Cluster{Kind: cluster.Weir, Nodes: []cluster.Node{{Name: "node-a"}, {Name: "node-b"}}}
	if scenarios, err := Run(t.Context(), Options{Cluster: c, Focus: "no such scenario", Out: &bytes.Buffer{}}); err != nil || scenarios != nil {
		t.Error(scenarios, err)
	}
	if _, err := Run(t.Context(), Options{Cluster: c, Focus: "("}); err == nil {
		t.Error("that is no expression")
	}
	c.Nodes = c.Nodes[:1]
	if _, err := Run(t.Context(), Options{Cluster: c}); err == nil {
		t.Error("one node is not two")
	}
}

func TestPrintAndCompare(t *testing.T) {
	a := []Scenario{{Name: "tcp", Attempts: 100, OK: 98, Lost: map[string]int{rollclient.Refused: 2}, P50Ms: 1.5, Notes: []string{"a note"}}, {Name: "dns", Attempts: 10, OK: 10, Pass: true}}
	b := []Scenario{{Name: "tcp", Attempts: 1000, OK: 995, Lost: map[string]int{rollclient.TimedOut: 5}}, {Name: "udp", Attempts: 7}}
	var out strings.Builder
	Print(&out, a)
	for _, want := range []string{"FAIL 2 refused", "PASS", "tcp: a note"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	out.Reset()
	Compare(&out, a, b)
	text := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{"tcp 100 1000 2 5 1.50 0.00 0.00 0.00 A loses more", "dns 10 - 0 - ", "udp - 7 - 0"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	if strings.Count(text, "tcp") != 1 {
		t.Error("once is enough")
	}
}
