package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"sync"
)

// A cqlTap stands between Cassandra and a service that acknowledges before it has written. What is
// durable is then what Cassandra has answered: a write counts, and its latency ends, when the
// response to the request passes that held its leaf /volume, of which every update has one.
type cqlTap struct {
	*tap
	cassandra string
}

const (
	cqlHeaderBytes = 9
	cqlResult      = 0x08
	cqlExecute     = 0x0a
	cqlBatch       = 0x0d
	hourMicros     = 3_600_000_000
)

var (
	cqlMarker = []byte("/volume")
	cqlBigint = []byte{0, 0, 0, 8} // length of a bound bigint, which our write times are
)

// A cqlTapped is one connection: the publish times in each request that has no response yet.
type cqlTapped struct {
	*cqlTap
	guard   sync.Mutex
	pending map[uint16][]int64
	done    []int32
}

func (t *cqlTap) serve(listener net.Listener) {
	bridge(listener, t.cassandra, func(service, server *socket) {
		c := &cqlTapped{cqlTap: t, pending: map[uint16][]int64{}}
		go pass(service, server, 0, c.fromService)
		go pass(server, service, 0, c.fromCassandra)
	})
}

// frame splits off the first frame of data; size is 0 while it is not whole.
func frame(data []byte) (stream uint16, opcode byte, body []byte, size int, err error) {
	if len(data) < cqlHeaderBytes {
		return 0, 0, nil, 0, nil
	}
	if version := data[0] & 0x7f; version > 4 {
		return 0, 0, nil, 0, fmt.Errorf("CQL protocol %d, 4 at most is understood", version)
	}
	size = cqlHeaderBytes + int(binary.BigEndian.Uint32(data[5:]))
	if size > len(data) {
		return 0, 0, nil, 0, nil
	}
	return binary.BigEndian.Uint16(data[2:]), data[4], data[cqlHeaderBytes:size], size, nil
}

func (c *cqlTapped) fromService(data []byte, now int64) (int, error) {
	for seen := 0; ; {
		stream, opcode, body, size, err := frame(data[seen:])
		if size == 0 || err != nil {
			return seen, err
		}
		seen += size
		if opcode == cqlExecute || opcode == cqlBatch {
			if times := publishTimes(body, now); len(times) > 0 {
				c.guard.Lock()
				c.pending[stream] = times
				c.guard.Unlock()
			}
		}
	}
}

func (c *cqlTapped) fromCassandra(data []byte, now int64) (int, error) {
	seen := 0
	c.done = c.done[:0]
	for {
		stream, opcode, _, size, err := frame(data[seen:])
		if err != nil {
			return seen, err
		}
		if size == 0 {
			break
		}
		seen += size
		c.guard.Lock()
		times := c.pending[stream]
		delete(c.pending, stream)
		c.guard.Unlock()
		if opcode != cqlResult {
			continue // an error: the service tries again
		}
		for _, sent := range times {
			c.done = append(c.done, int32(now-sent))
		}
	}
	c.confirm(c.done)
	return seen, nil
}

// publishTimes returns, for every marker, the write time bound in the same statement before it.
func publishTimes(body []byte, now int64) (times []int64) {
	for {
		at := bytes.Index(body, cqlMarker)
		if at < 0 {
			return times
		}
		if sent := lastTime(body[:at], now); sent != 0 {
			times = append(times, sent)
		}
		body = body[at+len(cqlMarker):]
	}
}

func lastTime(body []byte, now int64) int64 {
	for {
		at := bytes.LastIndex(body, cqlBigint)
		if at < 0 {
			return 0
		}
		if len(body) >= at+12 {
			value := int64(binary.BigEndian.Uint64(body[at+4:]))
			if value > now-hourMicros && value < now+hourMicros {
				return value
			}
		}
		body = body[:at]
	}
}

// listenFor starts the tap and returns its address.
func (t *cqlTap) listenFor() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go t.serve(listener)
	return listener.Addr().String(), nil
}
