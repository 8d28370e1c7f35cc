package rollclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

var echoPrefix = []byte("echo ")

// Echo answers datagrams as agnhost's netexec does: to "echo WORD" with the word, to others not at all. When ctx ends, it answers what its socket
// still holds, and ends.
func Echo(ctx context.Context, address string) error {
	listened, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	conn := listened.(*net.UDPConn)
	defer conn.Close()
	context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	buffer := make([]byte, 4096)
	for {
		length, from, err := conn.ReadFromUDPAddrPort(buffer)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return answerRest(conn)
		case err != nil:
			return err
		}
		if word, is := bytes.CutPrefix(buffer[:length], echoPrefix); is {
			// Whether it can be sent is the client's to notice.
			_, _ = conn.WriteToUDPAddrPort(word, from)
		}
	}
}

// answerRest reads past Go's deadline, which is over.
func answerRest(conn *net.UDPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		buffer := make([]byte, 4096)
		for {
			length, from, err := unix.Recvfrom(int(fd), buffer, unix.MSG_DONTWAIT)
			switch {
			case errors.Is(err, unix.EAGAIN):
				return
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil:
				failed = fmt.Errorf("what is left: %w", err)
				return
			}
			if word, is := bytes.CutPrefix(buffer[:length], echoPrefix); is {
				_ = unix.Sendto(int(fd), word, unix.MSG_DONTWAIT, from)
			}
		}
	})
	return errors.Join(err, failed)
}
