package main

import (
	"net"
	"sync"
)

// An outbox is a connection whose Write never waits: what the other end does not read yet lies here.
// It stands towards the broker alone. mosquitto reads one packet of each connection in a turn of its
// loop, however many there are, and turns the slower the more WebSocket connections it has.
//
// The tap needs it: while publishers have something for the broker in every turn, a service's
// acknowledgements come to wait, by the million. A tap that waited with them would take nothing more
// from the service, so that updates long durable would not count. An acknowledgement is four bytes,
// so there is room for all. A publisher needs it to end when it should; maxUnacked bounds what waits.
//
// Towards a service there must be none: a service that reads no more presses back on its broker.
type outbox struct {
	net.Conn
	mutex   sync.Mutex
	some    *sync.Cond
	waiting []byte
	closed  bool
	failed  error
}

func newOutbox(to net.Conn) *outbox {
	o := &outbox{Conn: to}
	o.some = sync.NewCond(&o.mutex)
	go o.deliver()
	return o
}

// Write keeps a copy of data; the error is that of an earlier one, which could not be written.
func (o *outbox) Write(data []byte) (int, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	if o.failed != nil {
		return 0, o.failed
	}
	if o.closed {
		return 0, net.ErrClosed
	}
	o.waiting = append(o.waiting, data...)
	o.some.Signal()
	return len(data), nil
}

// Close closes the connection when all that was written before is on its way.
func (o *outbox) Close() error {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.closed = true
	o.some.Signal()
	return nil
}

func (o *outbox) deliver() {
	defer o.Conn.Close()
	var going []byte
	for {
		o.mutex.Lock()
		for len(o.waiting) == 0 && !o.closed {
			o.some.Wait()
		}
		going, o.waiting = o.waiting, going[:0]
		o.mutex.Unlock()
		if len(going) == 0 {
			return
		}
		if _, err := o.Conn.Write(going); err != nil {
			o.mutex.Lock()
			o.failed = err
			o.mutex.Unlock()
			return
		}
	}
}
