package rollclient

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"
)

func TestEchoAnswersWhatItHasBeforeItEnds(t *testing.T) {
	probe, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := probe.LocalAddr().String()
	probe.Close()
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Echo(ctx, address) }()
	client, err := net.Dial("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	buffer := make([]byte, 100)
	ask := func(question string) string {
		t.Helper()
		_, _ = client.Write([]byte(question))
		_ = client.SetReadDeadline(time.Now().Add(time.Second))
		length, err := client.Read(buffer)
		if err != nil {
			return ""
		}
		return string(buffer[:length])
	}
	for ask("echo first") != "first" {
	}
	// What is no question has no answer: the next one's comes first.
	_, _ = client.Write([]byte("other"))
	if got := ask("echo second"); got != "second" {
		t.Errorf("%q", got)
	}
	for number := range 100 {
		_, _ = client.Write(fmt.Appendf(nil, "echo %d", number))
	}
	end()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for number := range 100 {
		_ = client.SetReadDeadline(time.Now().Add(10 * time.Second))
		length, err := client.Read(buffer)
		if err != nil || string(buffer[:length]) != fmt.Sprint(number) {
			t.Fatalf("%d: %q, %v", number, buffer[:length], err)
		}
	}
}
