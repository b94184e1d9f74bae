package main

import (
	"encoding/binary"
	"io"
	"math/rand"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"
)

const (
	waitLimit = 60 * time.Second
	testTopic = "things/device-00001/shadow/update"
)

// A stage is a tap between two ends that a test plays: it is both the service and the broker.
type stage struct {
	tap             *tap
	service, broker net.Conn
	subacks         chan byte
}

// staged starts a tap, and connects through it as a service of MQTT 5 does.
func staged(t *testing.T) *stage {
	t.Helper()
	behind, front := listen(t), listen(t)
	s := &stage{subacks: make(chan byte, 1<<16)}
	s.tap = &tap{
		broker:     behind.Addr().String(),
		arrivals:   true,
		own:        []byte("things/device-"),
		subscribed: func(level byte) { s.subacks <- level },
		onDurable:  func() {},
	}
	go s.tap.serve(front)
	service, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	broker, err := behind.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.service, s.broker = service, broker
	for _, each := range []net.Conn{service, broker} {
		t.Cleanup(func() { _ = each.Close() })
		if err := each.SetDeadline(time.Now().Add(waitLimit)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := service.Write(appendConnect(nil, "service")); err != nil {
		t.Fatal(err)
	}
	s.tap.begin()
	return s
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener
}

// update appends what a broker sends: update number sequence of ours, just published.
func update(to []byte, id uint16, sequence int) []byte {
	payload := []byte(`{"state":{"reported":{"volume":`)
	payload = strconv.AppendInt(payload, int64(sequence), 10)
	payload = append(payload, `}},"timestamp":`...)
	payload = strconv.AppendInt(payload, time.Now().UnixMicro(), 10)
	return appendPublish(to, []byte(testTopic), id, append(payload, '}'))
}

func puback(to []byte, id uint16) []byte {
	return binary.BigEndian.AppendUint16(append(to, typePuback<<4, 2), id)
}

// reached waits until so many updates count as durable.
func (s *stage) reached(t *testing.T, wanted int64) {
	t.Helper()
	for limit := time.Now().Add(waitLimit); s.tap.durable.Load() < wanted; {
		if time.Now().After(limit) {
			t.Fatalf("%d of %d updates count as durable", s.tap.durable.Load(), wanted)
		}
		time.Sleep(time.Millisecond)
	}
	if durable := s.tap.durable.Load(); durable != wanted {
		t.Fatalf("%d updates count as durable, %d are", durable, wanted)
	}
}

// serve plays the service: it acknowledges what it reads, and writes whatever follows each PUBACK.
func (s *stage) serve(extra func(to []byte) []byte) error {
	buffer, out := make([]byte, 0, 1<<20), []byte{}
	for {
		n, err := s.service.Read(buffer[len(buffer):cap(buffer)])
		if err != nil {
			return err
		}
		buffer = buffer[:len(buffer)+n]
		seen := 0
		for {
			first, body, size, err := packet(buffer[seen:])
			if err != nil {
				return err
			}
			if size == 0 {
				break
			}
			seen += size
			if id, ok := publishID(first, body); ok && first>>4 == typePublish {
				out = extra(puback(out, id))
			}
		}
		buffer = buffer[:copy(buffer, buffer[seen:])]
		if _, err := s.service.Write(out); err != nil {
			return err
		}
		out = out[:0]
	}
}

// A broker may read a connection slowly and yet send: mosquitto reads one packet of each connection in
// a turn of its loop, and heeds no Receive Maximum once it has a queue.
func TestAnAcknowledgementCountsThoughTheBrokerDoesNotReadIt(t *testing.T) {
	const updates = 2_500_000
	s := staged(t)
	go s.serve(func(to []byte) []byte { return to })
	out := []byte{}
	for i := range updates {
		if out = update(out, uint16(i%65_535+1), i); len(out) > 1<<18 || i == updates-1 {
			if _, err := s.broker.Write(out); err != nil {
				t.Fatalf("after %d updates, of which %d count: %v", i, s.tap.durable.Load(), err)
			}
			out = out[:0]
		}
	}
	s.reached(t, updates)
	if _, micros, arrived := s.tap.end(); len(micros) != updates || len(arrived) != updates {
		t.Fatalf("%d and %d latencies", len(micros), len(arrived))
	}
}

func TestWhateverIsBetweenAcknowledgementsAndHoweverTheyAreSplitAllCount(t *testing.T) {
	const updates = 2_200_000
	s := staged(t)
	random := rand.New(rand.NewSource(1))
	subscribe := appendHeader(nil, 8<<4|2, 2+1+2+len(testTopic)+1)
	subscribe = append(binary.BigEndian.AppendUint16(subscribe, 7), 0)
	subscribe = append(appendString(subscribe, testTopic), 1)
	long := appendHeader(nil, typePuback<<4, 300) // three bytes of fixed header
	others := [][]byte{subscribe, {12 << 4, 0}, {13 << 4, 0}, append(long, make([]byte, 300)...)}
	var sending sync.WaitGroup
	sending.Add(1)
	go s.serve(func(to []byte) []byte {
		if random.Intn(50) == 0 {
			to = append(to, others[random.Intn(len(others))]...)
		}
		return to
	})
	go func() {
		defer sending.Done()
		_, _ = io.CopyN(io.Discard, s.broker, 4*updates)
	}()
	suback := []byte{typeSuback << 4, 4, 0, 7, 0, 1}
	out, subacks := []byte{}, 0
	for i := range updates {
		out = update(out, uint16(i%65_535+1), i)
		if i%10_000 == 0 {
			out = append(out, suback...)
			subacks++
		}
		for len(out) > 1<<17 || i == updates-1 && len(out) > 0 {
			some := min(len(out), 1+random.Intn(1<<17))
			if _, err := s.broker.Write(out[:some]); err != nil {
				t.Fatal(err)
			}
			out = out[:copy(out, out[some:])]
		}
	}
	s.reached(t, updates)
	sending.Wait()
	if len(s.subacks) != subacks {
		t.Fatalf("%d of %d SUBACKs were seen", len(s.subacks), subacks)
	}
}

func TestAnIDThatIsGivenAgainBeforeItIsAcknowledgedCountsEachTime(t *testing.T) {
	c := &tapped{tap: &tap{onDurable: func() {}, own: []byte("things/device-")}}
	foreign := appendPublish(nil, []byte(testTopic), 5, []byte("no document"))
	data := update(update(foreign, 5, 1), 5, 2)
	if seen, err := c.fromBroker(data, time.Now().UnixMicro()); seen != len(data) || err != nil {
		t.Fatalf("%d of %d bytes, %v", seen, len(data), err)
	}
	for _, wanted := range []int64{0, 1, 2, 2} {
		if _, err := c.fromService(puback(nil, 5), time.Now().UnixMicro()); err != nil {
			t.Fatal(err)
		}
		if durable := c.durable.Load(); durable != wanted {
			t.Fatalf("%d count, not %d", durable, wanted)
		}
	}
	if c.held.Load() != 3 || c.open != 0 {
		t.Fatalf("at most %d were open, and %d are", c.held.Load(), c.open)
	}
}

func TestARefusedUpdateIsNotDurable(t *testing.T) {
	c := &tapped{tap: &tap{onDurable: func() {}, own: []byte("things/device-")}}
	_, _ = c.fromBroker(update(update(nil, 1, 1), 1, 2), time.Now().UnixMicro())
	refusal := []byte{typePuback << 4, 3, 0, 1, firstFailure}
	_, _ = c.fromService(puback(refusal, 1), time.Now().UnixMicro())
	if c.durable.Load() != 1 || c.open != 0 {
		t.Fatalf("%d count, %d are open", c.durable.Load(), c.open)
	}
}

func TestWhatAServiceSaidLastReachesTheBrokerThoughTheServiceHasGone(t *testing.T) {
	const bytes = 32 << 20
	s := staged(t)
	ping := []byte{12 << 4, 0}
	written := make(chan error, 1)
	go func() {
		out := make([]byte, 0, bytes)
		for len(out) < bytes {
			out = append(out, ping...)
		}
		_, err := s.service.Write(out)
		_ = s.service.Close()
		written <- err
	}()
	if err := <-written; err != nil { // all of it, before the broker has read anything
		t.Fatal(err)
	}
	got, err := io.Copy(io.Discard, s.broker)
	if wanted := int64(len(appendConnect(nil, "service")) + bytes); got != wanted || err != nil {
		t.Fatalf("%d of %d bytes came, %v", got, wanted, err)
	}
}

func TestWhatComesAgainAfterALostConnectionCountsOnce(t *testing.T) {
	both := &tap{onDurable: func() {}, own: []byte("things/device-")}
	foreign := []byte(`{"state":{"reported":{"on":true}},"timestamp":1700000000000000}`)
	other := []byte(`{"state":{"reported":{"on":true}},"timestamp":1700000000000001}`)
	for _, id := range []uint16{1, 11} { // the second connection, and what the broker calls it there
		c := &tapped{tap: both}
		data := update(update(nil, id, 0), id+1, 64)
		data = appendPublish(data, []byte("things/load-1/shadow/update"), id+2, foreign)
		data = appendPublish(data, []byte("things/load-2/shadow/update"), id+3, foreign)
		data = appendPublish(data, []byte("things/load-2/shadow/update"), id+4, other)
		_, _ = c.fromBroker(data, time.Now().UnixMicro())
		for i := range uint16(5) {
			_, _ = c.fromService(puback(nil, id+i), time.Now().UnixMicro())
		}
	}
	if both.durable.Load() != 5 || both.again.Load() != 5 {
		t.Fatalf("%d count, %d came again", both.durable.Load(), both.again.Load())
	}
}

func TestAnUpdateOfThePublisherHasItsNumberAsName(t *testing.T) {
	d := &document{prefix: "things", devices: 20_000, leaves: usualLeaves}
	for _, sequence := range []int64{0, 7, 5_867_400} {
		p := &publisher{}
		p.add(d, sequence, time.Now().UnixMicro())
		_, body, _, _ := packet(p.out)
		if name := nameOf(body, []byte("things/device-")); name != uint64(sequence)<<1 {
			t.Fatalf("%d is called %d", sequence, name)
		}
	}
}
