// Package cnp is the conformance program of ClusterNetworkPolicy: every test of sigs.k8s.io/network-policy-api at the
// version of go.mod, the experimental ones too, against the cluster that -kubeconfig names.
//
// Beside what that project's own program does, it lists the names of its tests, leaves tests out by name before their
// policies are applied, and keeps the pods of the tests when asked to, so that a failure can be looked at.
package cnp

import (
	"flag"
	"os"
	"strings"
	"testing"

	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/config"

	api "sigs.k8s.io/network-policy-api/apis/v1beta1"
	"sigs.k8s.io/network-policy-api/conformance/tests"
	"sigs.k8s.io/network-policy-api/conformance/utils/suite"
)

var (
	without = flag.String("without", "", "Names of tests to leave out, separated by commas")
	keep    = flag.Bool("keep", false, "Leave the namespaces and pods of the tests when they are over")
	list    = flag.Bool("list", false, "Print the names of the tests, and end")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if *list {
		for _, test := range tests.ConformanceTests {
			os.Stdout.WriteString(test.ShortName + "\n")
		}
		return
	}
	os.Exit(m.Run())
}

func TestConformance(t *testing.T) {
	leaveOut := map[string]bool{}
	for name := range strings.SplitSeq(*without, ",") {
		leaveOut[name] = name != ""
	}
	var chosen []suite.ConformanceTest
	for _, test := range tests.ConformanceTests {
		if !leaveOut[test.ShortName] {
			chosen = append(chosen, test)
		}
	}

	cfg, err := config.GetConfig()
	if err != nil {
		t.Fatalf("no cluster: %v; name its kubeconfig with -kubeconfig", err)
	}
	c, err := client.New(cfg, client.Options{})
	if err != nil {
		t.Fatalf("no client for %s: %v", cfg.Host, err)
	}
	clientSet, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatalf("no client for %s: %v", cfg.Host, err)
	}
	if err := api.Install(c.Scheme()); err != nil {
		t.Fatal(err)
	}

	conformance := suite.New(suite.Options{
		Client:                     c,
		ClientSet:                  clientSet,
		KubeConfig:                 *cfg,
		CleanupBaseResources:       !*keep,
		EnableAllSupportedFeatures: true,
	})
	conformance.Setup(t)
	conformance.Run(t, chosen)
}
