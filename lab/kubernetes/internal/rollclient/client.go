package rollclient

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// Modes of a client.
const (
	// TCP opens a connection for each request, one after another.
	TCP = "tcp"
	// UDP opens a socket for each request, one after another.
	UDP = "udp"
	// UDPOne sends all requests by one socket, and does not wait for the answers.
	UDPOne = "udp-one"
	// DNS asks for a name, with a socket for each query, one after another.
	DNS = "dns"
	// Long keeps a connection to each backend, and asks by all of them.
	Long = "long"
	// Bulk sends as much as it can by one connection.
	Bulk = "bulk"
)

// Options are what a client does.
type Options struct {
	Mode   string
	Target netip.AddrPort
	// Rate is how many attempts begin in a second, at most; 0: as many as can be.
	Rate int
	// Count is after how many attempts a client that asks one after another ends; 0: it goes on until it is told.
	Count int
	// Timeout is after how long an attempt is lost.
	Timeout time.Duration
	// Backends is how many different ones a long client waits for.
	Backends int
	// Name is what a DNS client asks for.
	Name string
	// Ready, if there is one, is called once, as soon as the client asks; a long client has its connections then.
	Ready func()
}

// Run asks until ctx ends.
func Run(ctx context.Context, o Options) (Result, error) {
	c := newCounters(o.Mode, o.Target.String())
	if o.Ready == nil {
		o.Ready = func() {}
	}
	if o.Mode != Long && o.Mode != Bulk {
		o.Ready()
	}
	var err error
	switch o.Mode {
	case TCP:
		each(ctx, o.Rate, o.Count, func() { once(c, func() (string, int, error) { return askTCP(o.Target, o.Timeout) }) })
	case UDP:
		sequence := 0
		each(ctx, o.Rate, o.Count, func() {
			sequence++
			once(c, func() (string, int, error) { return askUDP(o.Target, o.Timeout, token(sequence)) })
		})
	case DNS:
		id := uint16(0)
		var name dnsmessage.Name
		if name, err = dnsmessage.NewName(o.Name); err != nil {
			return c.finish(), fmt.Errorf("the name to ask for: %w", err)
		}
		each(ctx, o.Rate, o.Count, func() {
			id++
			once(c, func() (string, int, error) { return askDNS(o.Target, o.Timeout, id, name) })
		})
	case UDPOne:
		err = udpOne(ctx, c, o)
	case Long:
		err = long(ctx, c, o)
	case Bulk:
		err = bulk(ctx, c, o)
	default:
		err = fmt.Errorf("no mode %q", o.Mode)
	}
	result := c.finish()
	if err != nil {
		result.Error = err.Error()
	}
	return result, err
}

// each calls do until ctx ends or, if count is not 0, that many times; at most rate times a second. What a slow turn cost is not made up for.
func each(ctx context.Context, rate, count int, do func()) {
	var interval time.Duration
	if rate > 0 {
		interval = time.Second / time.Duration(rate)
	}
	next := time.Now()
	for turn := 0; ctx.Err() == nil && (count == 0 || turn < count); turn++ {
		if pause := time.Until(next); pause > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
		}
		do()
		next = next.Add(interval)
		if now := time.Now(); next.Before(now) {
			next = now
		}
	}
}

func once(c *counters, ask func() (backend string, localPort int, err error)) {
	began := time.Now()
	backend, port, err := ask()
	if err != nil {
		c.lose(began, port, err)
		return
	}
	c.succeed(began, backend)
}

func token(sequence int) string {
	return "rolling-" + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(sequence)
}

const mostAnswerBytes = 64 << 10

var request = []byte("GET /hostname HTTP/1.1\r\nHost: rolling\r\nConnection: close\r\n\r\n")

// askTCP opens a connection, asks agnhost's netexec for its name, and closes.
func askTCP(target netip.AddrPort, timeout time.Duration) (backend string, localPort int, err error) {
	deadline := time.Now().Add(timeout)
	conn, localPort, err := connect(target, deadline)
	if err != nil {
		return "", localPort, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return "", localPort, err
	}
	if _, err := conn.Write(request); err != nil {
		return "", localPort, err
	}
	// The server closes first, so the client's port is free at once, as with many servers.
	answer, err := io.ReadAll(io.LimitReader(conn, mostAnswerBytes))
	if err != nil {
		return "", localPort, err
	}
	if len(answer) == 0 {
		return "", localPort, io.ErrUnexpectedEOF
	}
	head, body, complete := bytes.Cut(answer, []byte("\r\n\r\n"))
	if !complete {
		return "", localPort, io.ErrUnexpectedEOF
	}
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
		return "", localPort, fmt.Errorf("%w: %q", errWrong, firstLine(head))
	}
	return strings.TrimSpace(string(body)), localPort, nil
}

func firstLine(text []byte) []byte {
	line, _, _ := bytes.Cut(text, []byte("\r\n"))
	return line
}

// connect opens a TCP connection. Unlike net.Dial it knows the local port of one that failed, since it asks for it while the
// answer is still out; the port is the kernel's choice, as for any client that does not bind.
func connect(target netip.AddrPort, deadline time.Time) (conn net.Conn, localPort int, err error) {
	family := unix.AF_INET6
	var to unix.Sockaddr = &unix.SockaddrInet6{Port: int(target.Port()), Addr: target.Addr().As16()}
	if target.Addr().Is4() {
		family = unix.AF_INET
		to = &unix.SockaddrInet4{Port: int(target.Port()), Addr: target.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("socket: %w", err)
	}
	// It owns fd from here on.
	file := os.NewFile(uintptr(fd), "tcp")
	defer file.Close()
	connected := unix.Connect(fd, to)
	localPort = boundPort(fd)
	if errors.Is(connected, unix.EINPROGRESS) {
		connected = waitConnected(fd, deadline)
	}
	if connected != nil {
		return nil, localPort, fmt.Errorf("connect: %w", connected)
	}
	conn, err = net.FileConn(file)
	return conn, localPort, err
}

func boundPort(fd int) int {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0
	}
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return name.Port
	case *unix.SockaddrInet6:
		return name.Port
	}
	return 0
}

func waitConnected(fd int, deadline time.Time) error {
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		// Rounded up, so that the last turn does not spin.
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left.Milliseconds())+1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if ready == 0 {
			continue
		}
		number, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			return err
		}
		if number != 0 {
			return unix.Errno(number)
		}
		return nil
	}
}

// askUDP sends one datagram by a socket of its own and waits for its echo.
func askUDP(target netip.AddrPort, timeout time.Duration, token string) (backend string, localPort int, err error) {
	answer, localPort, err := exchange(target, timeout, []byte("echo "+token), func(answer []byte) bool { return string(answer) == token })
	if err != nil {
		return "", localPort, err
	}
	if string(answer) != token {
		return "", localPort, errWrong
	}
	return "", localPort, nil
}

// exchange sends a question by a socket of its own and returns the answer, the first one that is for it.
func exchange(target netip.AddrPort, timeout time.Duration, question []byte, is func([]byte) bool) (answer []byte, localPort int, err error) {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(target))
	if err != nil {
		return nil, 0, err
	}
	defer conn.Close()
	localPort = conn.LocalAddr().(*net.UDPAddr).Port
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return nil, localPort, err
	}
	if _, err := conn.Write(question); err != nil {
		return nil, localPort, err
	}
	buffer := make([]byte, 4096)
	for {
		length, err := conn.Read(buffer)
		if err != nil {
			return nil, localPort, err
		}
		// An old answer to a port that is used again is no answer.
		if is(buffer[:length]) {
			return buffer[:length], localPort, nil
		}
	}
}

// askDNS asks for an address and takes any that comes.
func askDNS(target netip.AddrPort, timeout time.Duration, id uint16, name dnsmessage.Name) (backend string, localPort int, err error) {
	kind := dnsmessage.TypeA
	if target.Addr().Is6() {
		kind = dnsmessage.TypeAAAA
	}
	query := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: name, Type: kind, Class: dnsmessage.ClassINET}},
	}
	packed, err := query.Pack()
	if err != nil {
		return "", 0, err
	}
	var parsed dnsmessage.Message
	_, localPort, err = exchange(target, timeout, packed, func(answer []byte) bool {
		parsed = dnsmessage.Message{}
		return parsed.Unpack(answer) == nil && parsed.Header.Response && parsed.Header.ID == id
	})
	if err != nil {
		return "", localPort, err
	}
	if parsed.Header.RCode != dnsmessage.RCodeSuccess || len(parsed.Answers) == 0 {
		return "", localPort, fmt.Errorf("%w: %s, %d answers", errWrong, parsed.Header.RCode, len(parsed.Answers))
	}
	return "", localPort, nil
}

const defaultRate = 100

// udpOne sends at an even pace by one socket, whatever comes back. A datagram whose echo is not there after the timeout is lost.
func udpOne(ctx context.Context, c *counters, o Options) error {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(o.Target))
	if err != nil {
		return err
	}
	defer conn.Close()
	port := conn.LocalAddr().(*net.UDPAddr).Port
	type sent struct {
		at time.Time
		// refused is that an ICMP error came meanwhile: whichever datagram it was for, this one had no answer.
		err error
	}
	var mu sync.Mutex
	waiting := map[string]*sent{}
	var received sync.WaitGroup
	received.Go(func() {
		buffer := make([]byte, 4096)
		for {
			length, err := conn.Read(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			mu.Lock()
			if err != nil {
				for _, s := range waiting {
					if s.err == nil {
						s.err = err
					}
				}
			} else if s := waiting[string(buffer[:length])]; s != nil {
				delete(waiting, string(buffer[:length]))
				c.succeed(s.at, "")
			}
			mu.Unlock()
		}
	})
	expire := func(before time.Time) {
		mu.Lock()
		defer mu.Unlock()
		for token, s := range waiting {
			if s.at.After(before) {
				continue
			}
			delete(waiting, token)
			err := s.err
			if err == nil {
				err = os.ErrDeadlineExceeded
			}
			c.lose(s.at, port, err)
		}
	}
	if o.Rate == 0 {
		o.Rate = defaultRate
	}
	sequence := 0
	each(ctx, o.Rate, o.Count, func() {
		sequence++
		name := token(sequence)
		began := time.Now()
		mu.Lock()
		waiting[name] = &sent{at: began}
		mu.Unlock()
		if _, err := conn.Write([]byte("echo " + name)); err != nil {
			// The error may be an ICMP error for an earlier datagram, and then nothing was sent: once more.
			if _, err := conn.Write([]byte("echo " + name)); err != nil {
				mu.Lock()
				if s := waiting[name]; s != nil {
					s.err = err
				}
				mu.Unlock()
			}
		}
		expire(began.Add(-o.Timeout))
	})
	// The last ones have their time too.
	for end := time.Now().Add(o.Timeout); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		mu.Lock()
		left := len(waiting)
		mu.Unlock()
		if left == 0 {
			break
		}
	}
	expire(time.Now())
	conn.Close()
	received.Wait()
	return nil
}

const (
	keepAliveRequest = "GET /hostname HTTP/1.1\r\nHost: rolling\r\n\r\n"
	longInterval     = 100 * time.Millisecond
	// To get a connection to each of six backends, chosen at random, takes 15 on average; 200 miss one of them once in 10^15.
	mostTries = 200
)

// kept is a connection that stays open.
type kept struct {
	Connection
	conn   net.Conn
	reader *bufio.Reader
}

// long keeps one connection to each backend and asks by it until it ends, or ctx does.
func long(ctx context.Context, c *counters, o Options) error {
	var all []*kept
	defer func() {
		for _, one := range all {
			one.conn.Close()
		}
	}()
	for try := 0; len(all) < o.Backends && try < mostTries && ctx.Err() == nil; try++ {
		one, err := keep(o)
		if err != nil {
			return fmt.Errorf("the connections to begin with: %w", err)
		}
		if slices.ContainsFunc(all, func(other *kept) bool { return other.Backend == one.Backend }) {
			one.conn.Close()
			continue
		}
		all = append(all, one)
		c.succeed(one.Opened, one.Backend)
	}
	if len(all) < o.Backends {
		return fmt.Errorf("of %d backends, %d connections reached %d", o.Backends, mostTries, len(all))
	}
	o.Ready()
	var asking sync.WaitGroup
	for _, one := range all {
		asking.Go(func() {
			ctx, end := context.WithCancel(ctx)
			defer end()
			each(ctx, int(time.Second/longInterval), 0, func() {
				began := time.Now()
				name, err := ask(one.conn, one.reader, o.Timeout)
				if err == nil && name != one.Backend {
					err = fmt.Errorf("%w: it came from %s", errWrong, name)
				}
				if err != nil {
					one.Ended, one.Kind = began, kindOf(err)
					end()
					return
				}
				one.Requests++
				c.succeed(began, "")
			})
		})
	}
	asking.Wait()
	for _, one := range all {
		c.result.Connections = append(c.result.Connections, one.Connection)
	}
	return nil
}

// keep opens a connection and learns by a first request where it leads to.
func keep(o Options) (*kept, error) {
	began := time.Now()
	conn, port, err := connect(o.Target, began.Add(o.Timeout))
	if err != nil {
		return nil, err
	}
	one := &kept{conn: conn, reader: bufio.NewReader(conn)}
	backend, err := ask(conn, one.reader, o.Timeout)
	if err != nil {
		conn.Close()
		return nil, err
	}
	one.Connection = Connection{Backend: backend, LocalPort: port, Opened: began, Requests: 1}
	return one, nil
}

// ask sends a request by a connection that stays open, and reads the answer.
func ask(conn net.Conn, reader *bufio.Reader, timeout time.Duration) (backend string, err error) {
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, keepAliveRequest); err != nil {
		return "", err
	}
	length := -1
	for first := true; ; first = false {
		line, err := reader.ReadString('\n')
		if err != nil {
			return "", err
		}
		line = strings.TrimRight(line, "\r\n")
		if first && !strings.HasPrefix(line, "HTTP/1.1 200 ") {
			return "", fmt.Errorf("%w: %q", errWrong, line)
		}
		if name, value, is := strings.Cut(line, ":"); is && strings.EqualFold(name, "Content-Length") {
			if length, err = strconv.Atoi(strings.TrimSpace(value)); err != nil || length < 0 || length > mostAnswerBytes {
				return "", fmt.Errorf("%w: %q", errWrong, line)
			}
		}
		if line == "" {
			break
		}
	}
	if length < 0 {
		return "", fmt.Errorf("%w: it has no length", errWrong)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(reader, body); err != nil {
		return "", err
	}
	return strings.TrimSpace(string(body)), nil
}

// BulkInterval is the time for which a bulk client adds up what was acknowledged.
const BulkInterval = 100 * time.Millisecond

// bulk sends by one connection, as much as it takes.
func bulk(ctx context.Context, c *counters, o Options) error {
	began := time.Now()
	conn, port, err := connect(o.Target, began.Add(o.Timeout))
	if err != nil {
		c.lose(began, port, err)
		return err
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	acknowledged := func() (bytes uint64, err error) {
		controlled := raw.Control(func(fd uintptr) {
			var info *unix.TCPInfo
			if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
				bytes = info.Bytes_acked
			}
		})
		return bytes, errors.Join(err, controlled)
	}
	failed := make(chan error, 1)
	go func() {
		chunk := make([]byte, 256<<10)
		for {
			if _, err := conn.Write(chunk); err != nil {
				failed <- err
				return
			}
		}
	}()
	ticker := time.NewTicker(BulkInterval)
	defer ticker.Stop()
	last, err := acknowledged()
	if err != nil {
		return err
	}
	o.Ready()
	c.result.IntervalMs = int(BulkInterval.Milliseconds())
	for {
		select {
		case <-ctx.Done():
			c.succeed(began, "")
			return nil
		case err := <-failed:
			c.lose(began, port, err)
			return fmt.Errorf("the bulk connection ended: %w", err)
		case <-ticker.C:
			now, err := acknowledged()
			if err != nil {
				return err
			}
			c.result.IntervalBytes = append(c.result.IntervalBytes, int64(now-last))
			last = now
		}
	}
}

// Sink accepts connections and throws away what comes, until ctx ends.
func Sink(ctx context.Context, address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	for {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go func() {
			defer conn.Close()
			// How it ends is the client's to count.
			_, _ = io.Copy(io.Discard, conn)
		}()
	}
}
