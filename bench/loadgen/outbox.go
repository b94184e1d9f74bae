package main

import (
	"net"
	"sync"
)

// An outbox is a connection whose Write never waits: what the kernel takes goes at once, what the other
// end does not read yet lies here.
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
	*socket
	mutex   sync.Mutex
	some    *sync.Cond
	waiting []byte
	going   bool // something that lay here is being written, and comes first
	closed  bool
	failed  error
}

func newOutbox(to *socket) *outbox {
	o := &outbox{socket: to}
	o.some = sync.NewCond(&o.mutex)
	go o.deliver()
	return o
}

// Write keeps a copy of what cannot go; the error may be that of an earlier one.
func (o *outbox) Write(data []byte) (int, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	if o.failed == nil && o.closed {
		return 0, net.ErrClosed
	}
	gone := 0
	if o.failed == nil && !o.going && len(o.waiting) == 0 {
		gone, o.failed = o.offer(data)
	}
	if o.failed != nil {
		return 0, o.failed
	}
	if gone < len(data) {
		o.waiting = append(o.waiting, data[gone:]...)
		o.some.Signal()
	}
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
	defer o.socket.Close()
	var data []byte
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for {
		for len(o.waiting) == 0 && !o.closed {
			o.some.Wait()
		}
		if len(o.waiting) == 0 || o.failed != nil {
			return
		}
		data, o.waiting = o.waiting, data[:0]
		o.going = true
		o.mutex.Unlock()
		_, err := o.socket.Write(data)
		o.mutex.Lock()
		o.going = false
		if err != nil {
			o.failed = err
			return
		}
	}
}
