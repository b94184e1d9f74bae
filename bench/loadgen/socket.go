package main

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// A socket is a TCP connection that Go's poller does not know: who reads it waits in the kernel.
// mosquitto sends a segment for each message and each acknowledgement, and the poller would be woken
// for every one, even while nobody reads.
type socket struct {
	*os.File
	raw syscall.RawConn
}

// newSocket takes over a connection.
func newSocket(conn net.Conn) (*socket, error) {
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	var (
		fd    int
		taken error
	)
	err = raw.Control(func(theirs uintptr) {
		if fd, taken = syscall.Dup(int(theirs)); taken == nil {
			syscall.CloseOnExec(fd)
			taken = syscall.SetNonblock(fd, false)
		}
	})
	if err := errors.Join(err, taken); err != nil {
		return nil, err
	}
	s := &socket{File: os.NewFile(uintptr(fd), "socket")}
	s.raw, err = s.SyscallConn()
	return s, err
}

// dial connects to an address.
func dial(address string) (*socket, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return newSocket(conn)
}

// offer writes what the kernel takes now.
func (s *socket) offer(data []byte) (n int, err error) {
	closed := s.raw.Control(func(fd uintptr) {
		n, err = syscall.SendmsgN(int(fd), data, nil, nil, syscall.MSG_DONTWAIT)
	})
	return withoutWaiting(n, errors.Join(closed, err))
}

// glance reads what has come.
func (s *socket) glance(buffer []byte) (n int, err error) {
	closed := s.raw.Control(func(fd uintptr) {
		n, _, err = syscall.Recvfrom(int(fd), buffer, syscall.MSG_DONTWAIT)
		if n == 0 && err == nil {
			err = net.ErrClosed
		}
	})
	return withoutWaiting(n, errors.Join(closed, err))
}

func withoutWaiting(n int, err error) (int, error) {
	if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EINTR) {
		return 0, nil
	}
	return max(0, n), err
}

// Close ends reads and writes that wait, too.
func (s *socket) Close() error {
	_ = s.raw.Control(func(fd uintptr) { _ = syscall.Shutdown(int(fd), syscall.SHUT_RDWR) })
	return s.File.Close()
}

// keepLittle bounds what the kernel keeps of what nobody read yet.
func (s *socket) keepLittle() (err error) {
	closed := s.raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, waitingBytes)
	})
	return errors.Join(closed, err)
}
