package main

import (
	"encoding/binary"
	"io"
	"math/rand"
	"net"
	"testing"
	"time"
)

// tied returns both ends of a connection; the first is an outbox.
func tied(t *testing.T) (*outbox, net.Conn) {
	t.Helper()
	listener := listen(t)
	near, err := dial(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	if err := far.SetDeadline(time.Now().Add(waitLimit)); err != nil {
		t.Fatal(err)
	}
	return newOutbox(near), far
}

func TestWhatIsWrittenKeepsItsOrderWhetherItHadToWaitOrNot(t *testing.T) {
	const numbers = 4_000_000
	near, far := tied(t)
	random := rand.New(rand.NewSource(1))
	go func() {
		data := []byte{}
		for i := range uint32(numbers) {
			data = binary.BigEndian.AppendUint32(data, i)
			if i == numbers-1 || random.Intn(1000) == 0 {
				if _, err := near.Write(data); err != nil {
					t.Error(err)
				}
				data = data[:0]
			}
		}
		_ = near.Close()
	}()
	piece := make([]byte, 4<<18)
	for wanted := uint32(0); wanted < numbers; {
		n, err := io.ReadAtLeast(far, piece[:4*(1+random.Intn(1<<18))], 4)
		if err != nil {
			t.Fatalf("after %d numbers: %v", wanted, err)
		}
		if over := n % 4; over > 0 {
			more, err := io.ReadFull(far, piece[n:n+4-over])
			if n += more; err != nil {
				t.Fatal(err)
			}
		}
		for at := 0; at < n; at += 4 {
			if got := binary.BigEndian.Uint32(piece[at:]); got != wanted {
				t.Fatalf("%d came instead of %d", got, wanted)
			}
			wanted++
		}
		if random.Intn(4) == 0 {
			time.Sleep(time.Duration(random.Intn(3)) * time.Millisecond)
		}
	}
}

func TestAConnectionThatTheOtherEndClosedTakesNothingMore(t *testing.T) {
	near, far := tied(t)
	_ = far.Close()
	for limit := time.Now().Add(waitLimit); ; time.Sleep(time.Millisecond) {
		if _, err := near.Write(make([]byte, 1<<16)); err != nil {
			return
		}
		if time.Now().After(limit) {
			t.Fatal("it is still written to")
		}
	}
}

func TestClosingEndsAReadThatWaits(t *testing.T) {
	near, _ := tied(t)
	ended := make(chan error, 1)
	go func() {
		_, err := near.Read(make([]byte, 1))
		ended <- err
	}()
	_ = near.Close()
	select {
	case err := <-ended:
		if err == nil {
			t.Fatal("it read something")
		}
	case <-time.After(waitLimit):
		t.Fatal("it still reads")
	}
}

func TestAPublisherCountsAcknowledgementsHoweverTheyAreSplit(t *testing.T) {
	const acknowledgements = 1000
	near, far := tied(t)
	p := &publisher{to: near, from: near.socket, in: make([]byte, 0, 64)}
	go count([]*publisher{p})
	out := []byte{}
	for i := range uint16(acknowledgements) {
		out = puback(out, i)
	}
	for random := rand.New(rand.NewSource(1)); len(out) > 0; {
		some := min(len(out), 1+random.Intn(100))
		if _, err := far.Write(out[:some]); err != nil {
			t.Fatal(err)
		}
		out = out[some:]
	}
	for limit := time.Now().Add(waitLimit); p.acked.Load() < acknowledgements; {
		if time.Now().After(limit) {
			t.Fatalf("%d of %d were counted", p.acked.Load(), acknowledgements)
		}
		time.Sleep(time.Millisecond)
	}
}
