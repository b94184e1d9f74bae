package main

import (
	"os"
	"testing"
	"time"
)

func TestPublishingEndsInTimeThoughTheBrokerReadsNothing(t *testing.T) {
	listener := listen(t)
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	go func() {
		broker, err := listener.Accept()
		if err != nil {
			return
		}
		defer broker.Close()
		_, _ = broker.Write([]byte{typeConnack << 4, 3, 0, 0, 0})
		<-done
	}()
	p, err := connect(listener.Addr().String(), "publisher")
	if err != nil {
		t.Fatal(err)
	}
	g := &generator{
		publishers: []*publisher{p},
		document:   document{prefix: "things", devices: 10, leaves: 2, textBytes: 4096},
		stop:       make(chan os.Signal, 1),
	}
	ended := make(chan error, 1)
	go func() { ended <- g.pace(100_000, time.Now().Add(2*time.Second)) }()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(waitLimit):
		t.Fatalf("not ended, with %d published", g.sequence)
	}
	if g.sequence <= maxUnacked {
		t.Fatalf("only %d were published: nothing held it back", g.sequence)
	}
}
