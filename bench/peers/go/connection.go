package main

import (
	"bufio"
	"net"
	"sync"
	"time"
)

const bufferBytes = 64 * 1024

// A bufferedConn joins small reads and small writes: paho reads a packet in three pieces and writes
// every acknowledgement by itself. paho holds the lock while it writes a packet.
type bufferedConn struct {
	net.Conn
	sync.Mutex
	in     *bufio.Reader
	out    *bufio.Writer
	filled chan struct{}
	closed chan struct{}
	once   sync.Once
}

func newBufferedConn(conn net.Conn, delay time.Duration) *bufferedConn {
	c := &bufferedConn{
		Conn:   conn,
		in:     bufio.NewReaderSize(conn, bufferBytes),
		out:    bufio.NewWriterSize(conn, bufferBytes),
		filled: make(chan struct{}, 1),
		closed: make(chan struct{}),
	}
	go c.flush(delay)
	return c
}

func (c *bufferedConn) Read(to []byte) (int, error) { return c.in.Read(to) }

// Write is called with the lock held.
func (c *bufferedConn) Write(from []byte) (int, error) {
	n, err := c.out.Write(from)
	select {
	case c.filled <- struct{}{}:
	default:
	}
	return n, err
}

func (c *bufferedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	c.Lock()
	defer c.Unlock()
	_ = c.out.Flush()
	return c.Conn.Close()
}

func (c *bufferedConn) flush(delay time.Duration) {
	for {
		select {
		case <-c.closed:
			return
		case <-c.filled:
		}
		time.Sleep(delay)
		c.Lock()
		err := c.out.Flush() // an error stays in the writer and fails the next write
		c.Unlock()
		if err != nil {
			return
		}
	}
}
