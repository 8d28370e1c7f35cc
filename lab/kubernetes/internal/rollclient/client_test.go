package rollclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

func addressOf(t *testing.T, address net.Addr) netip.AddrPort {
	t.Helper()
	parsed, err := netip.ParseAddrPort(address.String())
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

func runFor(t *testing.T, d time.Duration, o Options) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	result, err := Run(ctx, o)
	if err != nil {
		t.Fatalf("%s: %v", o.Mode, err)
	}
	return result
}

// consistent is what holds for every result.
func consistent(t *testing.T, r Result) {
	t.Helper()
	if r.Attempts != r.OK+r.LostTotal() {
		t.Errorf("%d attempts are not %d and %v", r.Attempts, r.OK, r.Lost)
	}
	if r.P50Ms > r.P99Ms || r.P99Ms > r.MaxMs {
		t.Errorf("p50 %v, p99 %v, longest %v", r.P50Ms, r.P99Ms, r.MaxMs)
	}
}

// nameServer answers as agnhost's netexec; what names returns is the backend's name.
func nameServer(t *testing.T, names func() string) *httptest.Server {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/hostname" {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, names())
	}))
	t.Cleanup(server.Close)
	return server
}

func TestTCPCountsAnswers(t *testing.T) {
	var count atomic.Int64
	server := nameServer(t, func() string { return fmt.Sprintf("pod-%d\n", count.Add(1)%2) })
	result := runFor(t, 300*time.Millisecond, Options{Mode: TCP, Target: addressOf(t, server.Listener.Addr()), Timeout: time.Second})
	consistent(t, result)
	if result.OK < 10 || result.LostTotal() != 0 {
		t.Errorf("%d answers, lost %v", result.OK, result.Lost)
	}
	if len(result.Backends) != 2 || result.Switches != result.OK-1 {
		t.Errorf("backends %v, %d switches of %d answers", result.Backends, result.Switches, result.OK)
	}
}

func TestTCPKeepsItsRate(t *testing.T) {
	server := nameServer(t, func() string { return "pod" })
	result := runFor(t, 500*time.Millisecond, Options{Mode: TCP, Target: addressOf(t, server.Listener.Addr()), Timeout: time.Second, Rate: 50})
	if result.Attempts > 26 {
		t.Errorf("%d attempts in half a second at 50 a second", result.Attempts)
	}
}

func TestTCPTellsLossesApart(t *testing.T) {
	answer := func(do func(net.Conn)) net.Listener {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				do(conn)
			}
		}()
		return listener
	}
	closed := answer(func(net.Conn) {})
	closed.Close()
	cases := map[string]net.Listener{
		Refused:  closed,
		TimedOut: answer(func(conn net.Conn) { t.Cleanup(func() { conn.Close() }) }),
		Wrong: answer(func(conn net.Conn) {
			fmt.Fprint(conn, "HTTP/1.1 503 Unavailable\r\n\r\n")
			conn.(*net.TCPConn).CloseWrite()
		}),
		Reset: answer(func(conn net.Conn) {
			conn.(*net.TCPConn).SetLinger(0)
			conn.Read(make([]byte, 10))
			conn.Close()
		}),
	}
	for kind, listener := range cases {
		result := runFor(t, 150*time.Millisecond, Options{Mode: TCP, Target: addressOf(t, listener.Addr()), Timeout: 40 * time.Millisecond, Rate: 100})
		consistent(t, result)
		if result.Lost[kind] == 0 || result.Lost[kind] != result.Attempts {
			t.Errorf("%s: %v of %d", kind, result.Lost, result.Attempts)
		}
		if len(result.Losses) != result.Attempts {
			t.Fatalf("%s: %d losses are told of %d", kind, len(result.Losses), result.Attempts)
		}
		if loss := result.Losses[0]; loss.LocalPort == 0 || loss.Kind != kind || loss.At.IsZero() || loss.Error == "" {
			t.Errorf("%s: %+v", kind, loss)
		}
	}
}

// A connection that is closed without an answer must not count as one.
func TestTCPEmptyAnswerIsALoss(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 1000))
			conn.Close()
		}
	}()
	result := runFor(t, 100*time.Millisecond, Options{Mode: TCP, Target: addressOf(t, listener.Addr()), Timeout: time.Second})
	if result.OK != 0 || result.Lost[Reset] == 0 {
		t.Errorf("%d answers, lost %v", result.OK, result.Lost)
	}
}

// echoServer echoes as netexec does, what answer lets through.
func echoServer(t *testing.T, answer func(n int) bool) *net.UDPConn {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buffer := make([]byte, 2048)
		for n := 0; ; n++ {
			length, from, err := conn.ReadFromUDP(buffer)
			if err != nil {
				return
			}
			if text, is := strings.CutPrefix(string(buffer[:length]), "echo "); is && answer(n) {
				conn.WriteToUDP([]byte("late answer to another"), from)
				conn.WriteToUDP([]byte(text), from)
			}
		}
	}()
	return conn
}

func TestUDPCountsEveryDatagram(t *testing.T) {
	for _, mode := range []string{UDP, UDPOne} {
		server := echoServer(t, func(n int) bool { return n%4 != 3 })
		result := runFor(t, 600*time.Millisecond, Options{Mode: mode, Target: addressOf(t, server.LocalAddr()), Timeout: 50 * time.Millisecond, Rate: 200})
		consistent(t, result)
		lost := result.Lost[TimedOut]
		if result.OK < 5 || lost == 0 || lost != result.LostTotal() || lost < result.Attempts/4-1 || lost > result.Attempts/4+1 {
			t.Errorf("%s: %d attempts, %d answers, lost %v, and every fourth has no answer", mode, result.Attempts, result.OK, result.Lost)
		}
	}
}

func TestUDPRefused(t *testing.T) {
	for _, mode := range []string{UDP, UDPOne} {
		server := echoServer(t, func(int) bool { return true })
		target := addressOf(t, server.LocalAddr())
		server.Close()
		result := runFor(t, 200*time.Millisecond, Options{Mode: mode, Target: target, Timeout: 50 * time.Millisecond, Rate: 50})
		consistent(t, result)
		if result.OK != 0 || result.Lost[Refused] == 0 {
			t.Errorf("%s: %d answers, lost %v", mode, result.OK, result.Lost)
		}
	}
}

func TestDNS(t *testing.T) {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		buffer := make([]byte, 2048)
		for n := 0; ; n++ {
			length, from, err := conn.ReadFromUDP(buffer)
			if err != nil {
				return
			}
			var message dnsmessage.Message
			if message.Unpack(buffer[:length]) != nil {
				continue
			}
			message.Response = true
			name := message.Questions[0].Name
			answer := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}, Body: &dnsmessage.AResource{A: [4]byte{10, 96, 0, 1}}}
			switch n % 3 {
			case 0:
				message.Answers = append(message.Answers, answer)
			case 1:
				message.RCode = dnsmessage.RCodeServerFailure
			case 2:
				// Another question's answer.
				message.ID++
				message.Answers = append(message.Answers, answer)
			}
			packed, _ := message.Pack()
			conn.WriteToUDP(packed, from)
		}
	}()
	result := runFor(t, 400*time.Millisecond, Options{Mode: DNS, Target: addressOf(t, conn.LocalAddr()), Timeout: 30 * time.Millisecond, Name: "kubernetes.default.svc.cluster.local."})
	consistent(t, result)
	if result.OK == 0 || result.Lost[Wrong] == 0 || result.Lost[TimedOut] == 0 {
		t.Errorf("%d answers, lost %v", result.OK, result.Lost)
	}
	if most := result.Attempts/3 + 1; result.OK > most || result.Lost[Wrong] > most || result.Lost[TimedOut] > most {
		t.Errorf("of %d attempts %d answers, lost %v: each should be a third", result.Attempts, result.OK, result.Lost)
	}
}

func TestLongTellsWhichConnectionsEnded(t *testing.T) {
	// Each accepted connection is another backend; one of them ends.
	var ends atomic.Pointer[net.Conn]
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for n := 0; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if n == 1 {
				ends.Store(&conn)
			}
			go func() {
				buffer := make([]byte, 2048)
				for {
					if _, err := conn.Read(buffer); err != nil {
						return
					}
					body := fmt.Sprintf("pod-%d", n)
					fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				}
			}()
		}
	}()
	time.AfterFunc(200*time.Millisecond, func() { (*ends.Load()).Close() })
	result := runFor(t, 500*time.Millisecond, Options{Mode: Long, Target: addressOf(t, listener.Addr()), Timeout: time.Second, Backends: 3})
	if len(result.Connections) != 3 {
		t.Fatalf("%d connections", len(result.Connections))
	}
	for _, connection := range result.Connections {
		ended := connection.Kind != ""
		if ended != (connection.Backend == "pod-1") || ended == connection.Ended.IsZero() {
			t.Errorf("%+v", connection)
		}
		if ended && connection.Kind != Reset {
			t.Errorf("it ended by %q", connection.Kind)
		}
		if connection.Requests < 2 {
			t.Errorf("%d requests by %s", connection.Requests, connection.Backend)
		}
	}
}

func TestLongWantsEveryBackend(t *testing.T) {
	server := nameServer(t, func() string { return "the-same" })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := Run(ctx, Options{Mode: Long, Target: addressOf(t, server.Listener.Addr()), Timeout: time.Second, Backends: 2}); err == nil {
		t.Error("one backend is not two")
	}
}

func TestBulkCountsWhatArrives(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr()
	listener.Close()
	sink := make(chan error, 1)
	go func() { sink <- Sink(ctx, address.String()) }()
	for {
		conn, err := net.Dial("tcp", address.String())
		if err == nil {
			conn.Close()
			break
		}
		time.Sleep(time.Millisecond)
	}
	result := runFor(t, 550*time.Millisecond, Options{Mode: Bulk, Target: addressOf(t, address), Timeout: time.Second})
	if len(result.IntervalBytes) < 4 || result.IntervalBytes[1] == 0 || result.OK != 1 {
		t.Errorf("%+v", result)
	}
	cancel()
	if err := <-sink; err != nil {
		t.Error(err)
	}
}

func TestQuantiles(t *testing.T) {
	hundred := make([]float32, 100)
	for i := range hundred {
		hundred[i] = float32(i + 1)
	}
	for share, want := range map[float64]float64{0: 1, 0.5: 50, 0.99: 99, 1: 100} {
		if got := quantile(hundred, share); got != want {
			t.Errorf("%v of 1 to 100 is %v", share, got)
		}
	}
	if quantile(nil, 0.5) != 0 {
		t.Error("nothing has no quantile")
	}
}

func TestKinds(t *testing.T) {
	for kind, err := range map[string]error{
		Refused:     fmt.Errorf("connect: %w", syscall.ECONNREFUSED),
		Reset:       &net.OpError{Err: syscall.ECONNRESET},
		TimedOut:    syscall.ETIMEDOUT,
		Unreachable: syscall.EHOSTUNREACH,
		NoPorts:     syscall.EADDRNOTAVAIL,
		Other:       errors.New("something else"),
	} {
		if got := kindOf(err); got != kind {
			t.Errorf("%v is %q", err, got)
		}
	}
}

func TestUnknownMode(t *testing.T) {
	if _, err := Run(t.Context(), Options{Mode: "icmp"}); err == nil {
		t.Error("there is no such mode")
	}
}

func TestCountEndsAClient(t *testing.T) {
	turns := 0
	each(t.Context(), 0, 3, func() { turns++ })
	if turns != 3 {
		t.Errorf("%d turns", turns)
	}
}
