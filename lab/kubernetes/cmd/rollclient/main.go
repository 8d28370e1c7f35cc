// Command rollclient is the client of the rolling suite, as it runs in a pod: see internal/rollclient.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"weir.dev/lab/kubernetes/internal/rollclient"
)

const usage = `rollclient MODE [flags]: asks a service, and counts what became of every attempt.

  tcp, udp, udp-one, dns, long, bulk   ask until standard input ends, or after -seconds; then print a JSON object. With -count tcp, udp and
                                       dns end after so many attempts, and exit with status 1 if one of them is lost
  echo                                 answer the datagrams "echo ..." that come to -listen; when a signal comes, answer what is there, and end
  sink                                 accept connections at -listen, and throw away what comes
  wait                                 do nothing, until a signal comes

`

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "rollclient:", err)
		os.Exit(1)
	}
}

func run() error {
	flags := flag.NewFlagSet("rollclient", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprint(os.Stderr, usage)
		flags.PrintDefaults()
	}
	target := flags.String("target", "", "ADDRESS:PORT to ask")
	rate := flags.Int("rate", 0, "attempts a second, at most; 0: as many as can be")
	timeout := flags.Duration("timeout", 5*time.Second, "after how long an attempt is lost")
	seconds := flags.Int("seconds", 600, "ends by itself after this long")
	count := flags.Int("count", 0, "tcp, udp, dns: how many attempts; 0: until the end")
	backends := flags.Int("backends", 6, "long: how many backends to keep a connection to")
	name := flags.String("name", "kubernetes.default.svc.cluster.local.", "dns: the name to ask for")
	listen := flags.String("listen", ":5001", "echo, sink: the address to listen at")
	if len(os.Args) < 2 {
		flags.Usage()
		os.Exit(2)
	}
	mode := os.Args[1]
	if err := flags.Parse(os.Args[2:]); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch mode {
	case "wait":
		<-ctx.Done()
		return nil
	case "echo":
		return rollclient.Echo(ctx, *listen)
	case "sink":
		return rollclient.Sink(ctx, *listen)
	}
	to, err := netip.ParseAddrPort(*target)
	if err != nil {
		return fmt.Errorf("-target: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(*seconds)*time.Second)
	defer cancel()
	// Whoever started it through `kubectl exec -i` ends it by closing its input; a broken exec does so, too.
	if *count == 0 {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
	}
	result, failed := rollclient.Run(ctx, rollclient.Options{
		Mode: mode, Target: to, Rate: *rate, Count: *count, Timeout: *timeout, Backends: *backends, Name: *name,
		Ready: func() { fmt.Fprintln(os.Stderr, "ready") },
	})
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		return err
	}
	if failed == nil && *count > 0 && result.OK < *count {
		failed = fmt.Errorf("%d of %d attempts are lost", *count-result.OK, *count)
	}
	return failed
}
