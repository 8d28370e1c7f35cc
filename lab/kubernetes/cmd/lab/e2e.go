package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"weir.dev/lab/kubernetes/internal/cluster"
	"weir.dev/lab/kubernetes/internal/suites"
)

var errNotAsExpected = errors.New("the suites are not as the list of expected failures has them")

// e2e runs suites on a cluster that is up.
func e2e(ctx context.Context, name string) error {
	folder, err := source()
	if err != nil {
		return err
	}
	running, err := cluster.Load(name)
	if err != nil {
		return err
	}
	procs, err := strconv.Atoi(variable("PROCS", "0"))
	if err != nil || procs < 0 {
		return usageError("PROCS is a number: how many specs run at a time")
	}
	suite := variable("SUITE", suites.Conformance)
	what := strings.Join([]string{running.Kind, running.Family, running.Encap, running.Offload, suite, time.Now().Format("0102-150405")}, "-")
	ok, err := suites.Run(ctx, suites.Options{
		Cluster: running, Suite: suite, Focus: os.Getenv("FOCUS"), Procs: procs,
		Results:  variable("RESULTS", filepath.Join(folder, "..", "..", "target", "cluster-e2e", what)),
		Expected: filepath.Join(folder, "expected-failures.yaml"), Out: os.Stdout,
	})
	if err == nil && !ok {
		err = errNotAsExpected
	}
	return err
}

// compare shows two results side by side.
func compare(arguments []string) error {
	if len(arguments) != 2 {
		return usageError(fmt.Sprintf("lab compare A B: two folders of results, or their summary.json; there are %d arguments", len(arguments)))
	}
	return suites.Compare(arguments[0], arguments[1], os.Stdout)
}
