package main

import (
	"encoding/binary"
	"io"
	"log"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	chunkBytes = 256 * 1024
	// The kernel's share of what waits between broker and service: more would only hide a queue.
	waitingBytes = 256 * 1024
	// A read that brought so much is followed by the next at once, however long the tap rests.
	muchBytes = 16 * 1024
)

// A tap stands between a service and the broker. It passes on every byte and measures from publish
// to PUBACK, which a service sends when the update is durable (cqlTap is for one that does not).
// What a service says is taken from it at once, however slowly the broker reads it: see outbox.
type tap struct {
	broker     string
	early      bool          // the service acknowledges before the write: a cqlTap counts instead
	arrivals   bool          // whether to measure from publish to subscriber, too
	durable    atomic.Int64  // updates
	connected  atomic.Int64  // connections of services, all there ever were
	again      atomic.Int64  // updates that were acknowledged before, and came again
	own        []byte        // how topics of the load generator begin
	rest       time.Duration // after a small read from the broker, so that messages come together
	held       peak          // most deliveries that a connection had unacknowledged
	subscribed func(level byte)
	onDurable  func()

	mutex     sync.Mutex
	measuring bool
	micros    []int32 // latency of each durable update
	arrived   []int32 // µs from publish to here, of each delivery
	told      [2]int  // of both, how many lately had told of
	known     set     // what is durable
}

// A delivery is an update on its way to the service.
type delivery struct {
	sent int64 // when it was published, µs; 0: it is not ours
	name uint64
}

// A tapped is one connection: what the service has not acknowledged, by packet id. A broker that heeds
// no Receive Maximum gives an id again that is still in use, so an id has several; the service
// acknowledges them in turn.
type tapped struct {
	*tap
	level   byte
	guard   sync.Mutex
	pending [1 << 16][]delivery
	open    int64
	done    []delivery
	came    []int32
}

func (t *tap) serve(listener net.Listener) {
	bridge(listener, t.broker, func(service, broker *socket) {
		t.connected.Add(1)
		c := &tapped{tap: t}
		_ = broker.keepLittle()
		patient := newOutbox(broker)
		go pass(service, patient, 0, c.fromService)
		go pass(patient, service, t.rest, c.fromBroker)
	})
}

// bridge connects to an address for everyone who connects here.
func bridge(listener net.Listener, address string, join func(here, there *socket)) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		here, err := newSocket(conn)
		if err != nil {
			log.Printf("the tap cannot take a connection: %v", err)
			continue
		}
		there, err := dial(address)
		if err != nil {
			log.Printf("the tap reaches nobody at %s: %v", address, err)
			_ = here.Close()
			continue
		}
		join(here, there)
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
func pass(from, to io.ReadWriteCloser, rest time.Duration, see func(data []byte, now int64) (int, error)) {
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
		if rest > 0 && n < muchBytes {
			time.Sleep(rest)
		}
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
				c.held.raise(c.opened(id, delivery{sent, nameOf(body, c.own)}))
				if c.arrivals && sent != 0 && first&dupFlag == 0 {
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
			if len(body) < 2 {
				return seen, errShort
			}
			one := c.closed(binary.BigEndian.Uint16(body))
			refused := len(body) > 2 && body[2] >= firstFailure
			if one.sent != 0 && !refused {
				c.done = append(c.done, one)
			}
		}
	}
	c.acked(c.done, now)
	return seen, nil
}

// opened notes a delivery, and returns how many have no acknowledgement.
func (c *tapped) opened(id uint16, one delivery) int64 {
	c.guard.Lock()
	defer c.guard.Unlock()
	c.pending[id] = append(c.pending[id], one)
	c.open++
	return c.open
}

// closed returns what is acknowledged; nothing of ours if nothing is open.
func (c *tapped) closed(id uint16) (one delivery) {
	c.guard.Lock()
	defer c.guard.Unlock()
	waiting := c.pending[id]
	if len(waiting) == 0 {
		return one
	}
	one = waiting[0]
	c.open--
	c.pending[id] = slices.Delete(waiting, 0, 1)
	return one
}

// acked counts what the service acknowledged, unless there is a tap for what Cassandra answered.
// After a lost connection the broker delivers again what it has no acknowledgement of; an update is
// durable once.
func (t *tap) acked(done []delivery, now int64) {
	if t.early {
		return
	}
	micros := make([]int32, 0, len(done))
	t.mutex.Lock()
	for _, one := range done {
		if t.known.add(one.name) {
			micros = append(micros, int32(now-one.sent))
		}
	}
	t.mutex.Unlock()
	t.again.Add(int64(len(done) - len(micros)))
	t.confirm(micros)
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
