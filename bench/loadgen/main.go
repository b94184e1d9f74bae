// Command loadgen publishes shadow updates and measures when they are durable.
//
// The service under test connects to the broker through a tap in it. Commands come on standard input, one a line, and
// facts go to standard output, one JSON object a line:
//
//	saturate WARM SECONDS     as many updates as are acknowledged, WINDOW of them on the way
//	rate N WARM SECONDS       N updates a second, evenly paced, whatever happens to them
//	drain SECONDS             wait until everything is acknowledged
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"time"
)

const chunk = 50

type generator struct {
	tap        *tap
	publishers []*publisher
	topics     []string
	window     int64
	sequence   int64
	turn       int
	room       chan struct{}
	events     *json.Encoder
}

type event map[string]any

func main() {
	broker := flag.String("broker", "127.0.0.1:1883", "broker")
	connections := flag.Int("connections", 8, "publishers")
	devices := flag.Int("devices", 20_000, "devices; no multiple of 7919")
	window := flag.Int64("window", 1000, "updates published and not durable, while saturating")
	prefix := flag.String("prefix", "things", "first level of the topics")
	name := flag.String("name", "loadgen", "start of the client ids")
	cassandra := flag.String("cassandra", "", "the service acknowledges early: tap this Cassandra too")
	flag.Parse()
	log.SetFlags(0)
	err := run(*broker, *cassandra, *prefix, *name, *connections, *devices, *window)
	if err != nil {
		log.Fatal(err)
	}
}

func run(
	broker, cassandra, prefix, name string, connections, devices int, window int64,
) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	g := &generator{
		window: window,
		room:   make(chan struct{}, 1),
		events: json.NewEncoder(os.Stdout),
	}
	subscribed := make(chan byte, 16)
	g.tap = &tap{
		broker:     broker,
		early:      cassandra != "",
		subscribed: func(level byte) { subscribed <- level },
		onDurable: func() {
			select {
			case g.room <- struct{}{}:
			default:
			}
		},
	}
	go g.tap.serve(listener)
	if cassandra != "" {
		if cassandra, err = (&cqlTap{tap: g.tap, cassandra: cassandra}).listenFor(); err != nil {
			return err
		}
	}
	for i := range devices {
		g.topics = append(g.topics, fmt.Sprintf("%s/device-%05d/shadow/update", prefix, i))
	}
	for i := range connections {
		p, err := connect(broker, fmt.Sprintf("%s-%d", name, i))
		if err != nil {
			return err
		}
		g.publishers = append(g.publishers, p)
	}
	g.tell(event{"event": "listening", "address": listener.Addr().String(), "cassandra": cassandra})
	g.tell(event{"event": "subscribed", "protocol_level": int(<-subscribed)})
	go func() {
		for range subscribed { // further subscriptions of the same service
		}
	}()
	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		if err := g.obey(commands.Text()); err != nil {
			return err
		}
	}
	return commands.Err()
}

func (g *generator) tell(e event) {
	if err := g.events.Encode(e); err != nil {
		log.Fatal(err)
	}
}

func (g *generator) obey(command string) error {
	var warm, seconds, rate float64
	if n, _ := fmt.Sscanf(command, "saturate %g %g", &warm, &seconds); n == 2 {
		return g.measure("saturation", warm, seconds, g.saturate)
	}
	if n, _ := fmt.Sscanf(command, "rate %g %g %g", &rate, &warm, &seconds); n == 3 {
		return g.measure("rate", warm, seconds, func(until time.Time) error {
			return g.pace(rate, until)
		})
	}
	if n, _ := fmt.Sscanf(command, "drain %g", &seconds); n == 1 {
		g.drain(time.Now().Add(time.Duration(seconds * float64(time.Second))))
		return nil
	}
	return fmt.Errorf("not understood: %q", command)
}

// measure keeps publishing for warm and then for seconds; the latter are measured.
func (g *generator) measure(
	phase string, warm, seconds float64, publish func(until time.Time) error,
) error {
	start := time.Now().Add(time.Duration(warm * float64(time.Second)))
	end := start.Add(time.Duration(seconds * float64(time.Second)))
	failed := make(chan error, 1)
	go func() { failed <- publish(end) }()
	time.Sleep(time.Until(start))
	began, before := time.Now(), g.tap.begin()
	g.tell(event{"event": "start", "phase": phase})
	time.Sleep(time.Until(end))
	took := time.Since(began).Seconds()
	after, micros := g.tap.end()
	g.tell(event{
		"event": "end", "phase": phase, "seconds": took, "durable": after - before,
		"p50_ms": quantile(micros, 0.5), "p99_ms": quantile(micros, 0.99),
		"p999_ms": quantile(micros, 0.999), "max_ms": quantile(micros, 1),
	})
	return <-failed
}

// saturate publishes a chunk whenever there is room for one in the window.
func (g *generator) saturate(until time.Time) error {
	for now := time.Now(); now.Before(until); now = time.Now() {
		if g.sequence-g.tap.durable.Load() > g.window-chunk {
			select {
			case <-g.room:
			case <-time.After(time.Until(until)):
			}
			continue
		}
		p := g.next()
		micros := now.UnixMicro()
		for range chunk {
			p.add(g.topics, g.sequence, micros)
			g.sequence++
		}
		if err := p.flush(); err != nil {
			return err
		}
	}
	return nil
}

// pace publishes every update as soon as it is due. An update carries the time at which it was due,
// so that a stall of this program or of the broker shows in the latency of all that it delayed.
func (g *generator) pace(rate float64, until time.Time) error {
	start := time.Now()
	for sent := int64(0); ; {
		now := time.Now()
		if now.After(until) {
			return nil
		}
		due := int64(now.Sub(start).Seconds() * rate)
		if sent < due {
			p := g.next()
			for ; sent < due; sent++ {
				at := start.Add(time.Duration(float64(sent) / rate * float64(time.Second)))
				p.add(g.topics, g.sequence, at.UnixMicro())
				g.sequence++
			}
			if err := p.flush(); err != nil {
				return err
			}
		}
		time.Sleep(500 * time.Microsecond)
	}
}

func (g *generator) next() *publisher {
	g.turn = (g.turn + 1) % len(g.publishers)
	return g.publishers[g.turn]
}

func (g *generator) drain(until time.Time) {
	for g.tap.durable.Load() < g.sequence && time.Now().Before(until) {
		time.Sleep(10 * time.Millisecond)
	}
	var acked int64
	for _, p := range g.publishers {
		acked += p.acked.Load()
	}
	g.tell(event{
		"event": "drained", "published": g.sequence, "accepted": acked,
		"durable": g.tap.durable.Load(), "held": g.tap.held.Load(),
	})
}

func quantile(sorted []int32, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]) / 1000
}
