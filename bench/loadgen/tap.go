package main

import (
	"encoding/binary"
	"log"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const chunkBytes = 256 * 1024

// A tap stands between a service and the broker. It passes on every byte and measures from publish
// to PUBACK, which a service sends when the update is durable (cqlTap is for one that does not).
type tap struct {
	broker     string
	early      bool         // the service acknowledges before the write: a cqlTap counts instead
	arrivals   bool         // whether to measure from publish to subscriber, too
	durable    atomic.Int64 // updates
	held       peak         // most deliveries that a connection had unacknowledged
	subscribed func(level byte)
	onDurable  func()

	mutex     sync.Mutex
	measuring bool
	micros    []int32 // latency of each durable update
	arrived   []int32 // µs from publish to here, of each delivery
	told      [2]int  // of both, how many lately had told of
}

// A tapped is one connection: the publish time of what the service has not acknowledged, by packet id.
type tapped struct {
	*tap
	level   byte
	pending [1 << 16]atomic.Int64
	open    atomic.Int64
	done    []int32
	came    []int32
}

func (t *tap) serve(listener net.Listener) {
	for {
		service, err := listener.Accept()
		if err != nil {
			return
		}
		broker, err := net.Dial("tcp", t.broker)
		if err != nil {
			log.Printf("the tap found no broker: %v", err)
			_ = service.Close()
			continue
		}
		c := &tapped{tap: t}
		go pass(service, broker, c.fromService)
		go pass(broker, service, c.fromBroker)
	}
}

// A peak remembers the greatest number that it was shown.
type peak struct{ atomic.Int64 }

func (p *peak) raise(to int64) {
	for {
		old := p.Load()
		if to <= old || p.CompareAndSwap(old, to) {
			return
		}
	}
}

// pass copies from one side to the other, showing whole packets to see before they leave.
func pass(from, to net.Conn, see func(data []byte, now int64) (int, error)) {
	defer from.Close()
	defer to.Close()
	buffer := make([]byte, 0, chunkBytes)
	for {
		if cap(buffer)-len(buffer) < chunkBytes/4 {
			buffer = slices.Grow(buffer, chunkBytes)
		}
		n, err := from.Read(buffer[len(buffer):cap(buffer)])
		if n == 0 && err != nil {
			return
		}
		fresh := buffer[len(buffer) : len(buffer)+n]
		buffer = buffer[:len(buffer)+n]
		seen, err := see(buffer, time.Now().UnixMicro())
		if err != nil {
			log.Printf("the tap cannot read on: %v", err)
			return
		}
		if _, err := to.Write(fresh); err != nil {
			return
		}
		buffer = buffer[:copy(buffer, buffer[seen:])]
	}
}

func (c *tapped) fromBroker(data []byte, now int64) (int, error) {
	seen := 0
	c.came = c.came[:0]
	for {
		first, body, size, err := packet(data[seen:])
		if size == 0 || err != nil {
			c.deliver(c.came)
			return seen, err
		}
		seen += size
		switch first >> 4 {
		case typePublish:
			if id, ok := publishID(first, body); ok {
				sent := stamp(body)
				c.pending[id].Store(sent)
				c.held.raise(c.open.Add(1))
				if c.arrivals && sent != 0 {
					c.came = append(c.came, int32(now-sent))
				}
			}
		case typeSuback:
			c.subscribed(c.level)
		}
	}
}

func (c *tapped) fromService(data []byte, now int64) (int, error) {
	seen := 0
	c.done = c.done[:0]
	for {
		first, body, size, err := packet(data[seen:])
		if err != nil {
			return seen, err
		}
		if size == 0 {
			break
		}
		seen += size
		switch first >> 4 {
		case typeConnect:
			c.level = protocolLevel(body)
		case typePuback:
			if len(body) > 2 && body[2] >= firstFailure {
				continue
			}
			if sent := c.pending[binary.BigEndian.Uint16(body)].Swap(0); sent != 0 {
				c.open.Add(-1)
				c.done = append(c.done, int32(now-sent))
			}
		}
	}
	c.acked(c.done)
	return seen, nil
}

// acked is called for what the service acknowledged; what Cassandra answered counts instead, if
// there is a tap for it.
func (t *tap) acked(micros []int32) {
	if !t.early {
		t.confirm(micros)
	}
}

// confirm counts updates that are durable.
func (t *tap) confirm(micros []int32) {
	if len(micros) == 0 {
		return
	}
	t.mutex.Lock()
	if t.measuring {
		t.micros = append(t.micros, micros...)
	}
	t.durable.Add(int64(len(micros)))
	t.mutex.Unlock()
	t.onDurable()
}

// deliver counts what the broker delivered.
func (t *tap) deliver(micros []int32) {
	if len(micros) == 0 {
		return
	}
	t.mutex.Lock()
	if t.measuring {
		t.arrived = append(t.arrived, micros...)
	}
	t.mutex.Unlock()
}

// begin starts a measurement; end returns what it saw.
func (t *tap) begin() int64 {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.measuring, t.micros, t.arrived, t.told = true, t.micros[:0], t.arrived[:0], [2]int{}
	return t.durable.Load()
}

func (t *tap) end() (durable int64, micros, arrived []int32) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.measuring = false
	slices.Sort(t.micros)
	slices.Sort(t.arrived)
	return t.durable.Load(), t.micros, t.arrived
}

// lately returns what came since it was asked before, while a measurement lasts.
func (t *tap) lately() (durable int64, micros, arrived []int32) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if t.measuring {
		micros = slices.Clone(t.micros[t.told[0]:])
		arrived = slices.Clone(t.arrived[t.told[1]:])
		t.told = [2]int{len(t.micros), len(t.arrived)}
	}
	slices.Sort(micros)
	slices.Sort(arrived)
	return t.durable.Load(), micros, arrived
}
