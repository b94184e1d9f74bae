// Command loadgen publishes shadow updates and measures when they are durable.
//
// The service under test connects to the broker through a tap in it. Commands come on standard input, one a line, and
// facts go to standard output, one JSON object a line:
//
//	saturate WARM SECONDS     as many updates as are acknowledged, WINDOW of them on the way
//	rate N WARM SECONDS       N updates a second, evenly paced, whatever happens to them
//	inject N                  N updates as fast as the broker acknowledges them, whoever listens
//	watch SECONDS             measure until everything is durable, at most for so long
//	drain SECONDS [OTHERS]    wait until everything is acknowledged, OTHERS more from elsewhere too
//
// SIGINT ends what is being published; what was measured until then is told as ever.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	chunk = 50
	// Readers wait in the kernel, and each keeps one of Go's processors for a while: with as many as
	// there are cores, one that comes back would often find none.
	processors  = 8
	injectLimit = 10 * time.Minute
)

type generator struct {
	tap        *tap
	publishers []*publisher
	document   document
	window     int64
	sequence   int64
	turn       int
	room       chan struct{}
	wakeAt     atomic.Int64 // how many must be durable before there is room for a chunk
	events     *json.Encoder
	telling    sync.Mutex
	late       []int32 // µs by which a paced update was late, once for each waking
	stop       chan os.Signal
}

type event map[string]any

func main() {
	broker := flag.String("broker", "127.0.0.1:1883", "broker")
	connections := flag.Int("connections", 8, "publishers")
	devices := flag.Int64("devices", 20_000, "devices; no multiple of 7919")
	window := flag.Int64("window", 1000, "updates published and not durable, while saturating")
	prefix := flag.String("prefix", "things", "first level of the topics")
	name := flag.String("name", "loadgen", "start of the client ids")
	cassandra := flag.String("cassandra", "", "the service acknowledges early: tap this Cassandra too")
	publishTo := flag.String("publish-to", "", "where the publishers connect, if not to the broker")
	services := flag.Int("services", 1, "connections that subscribe before `subscribed` is told")
	leaves := flag.Int("leaves", usualLeaves, "leaves of an update")
	textBytes := flag.Int("text-bytes", 0, "size of one leaf that is a text; 0: the usual one")
	arrivals := flag.Bool("arrivals", false, "measure from publish to subscriber, too")
	rest := flag.Duration("rest", 0, "let messages gather so long at the tap, which costs less CPU")
	every := flag.Duration("every", 0, "tell how far it is so often while measuring; 0: never")
	flag.Parse()
	log.SetFlags(0)
	runtime.GOMAXPROCS(processors)
	if *publishTo == "" {
		*publishTo = *broker
	}
	d := document{prefix: *prefix, devices: *devices, leaves: *leaves, textBytes: *textBytes}
	err := run(
		*broker, *publishTo, *cassandra, *name, d, *connections, *services, *window, *arrivals, *rest,
		*every,
	)
	if err != nil {
		log.Fatal(err)
	}
}

func run(
	broker, publishTo, cassandra, name string, d document, connections, services int, window int64,
	arrivals bool, rest, every time.Duration,
) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	g := &generator{
		document: d,
		window:   window,
		room:     make(chan struct{}, 1),
		events:   json.NewEncoder(os.Stdout),
		stop:     make(chan os.Signal, 1),
	}
	signal.Notify(g.stop, os.Interrupt)
	subscribed := make(chan byte, 16)
	g.tap = &tap{
		broker:     broker,
		early:      cassandra != "",
		own:        []byte(d.prefix + deviceLevel),
		arrivals:   arrivals,
		rest:       rest,
		subscribed: func(level byte) { subscribed <- level },
		onDurable: func() {
			if g.tap.durable.Load() < g.wakeAt.Load() {
				return
			}
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
	for i := range connections {
		p, err := connect(publishTo, fmt.Sprintf("%s-%d", name, i))
		if err != nil {
			return err
		}
		g.publishers = append(g.publishers, p)
	}
	go count(g.publishers)
	g.tell(event{"event": "listening", "address": listener.Addr().String(), "cassandra": cassandra})
	level := <-subscribed
	for range services - 1 {
		level = <-subscribed
	}
	g.tell(event{"event": "subscribed", "protocol_level": int(level)})
	go func() {
		for range subscribed { // further subscriptions of the same service
		}
	}()
	if every > 0 {
		go g.progress(every)
	}
	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		if err := g.obey(commands.Text()); err != nil {
			return err
		}
	}
	return commands.Err()
}

func (g *generator) tell(e event) {
	g.telling.Lock()
	defer g.telling.Unlock()
	if err := g.events.Encode(e); err != nil {
		log.Fatal(err)
	}
}

func (g *generator) obey(command string) error {
	var warm, seconds, rate float64
	if n, _ := fmt.Sscanf(command, "saturate %g %g", &warm, &seconds); n == 2 {
		// What latency is then, the window says. At a rate it would hold the tap's late waking.
		schedule(schedBatch)
		defer schedule(schedOther)
		return g.measure("saturation", warm, seconds, g.saturate)
	}
	if n, _ := fmt.Sscanf(command, "rate %g %g %g", &rate, &warm, &seconds); n == 3 {
		return g.measure("rate", warm, seconds, func(until time.Time) error {
			return g.pace(rate, until)
		})
	}
	var updates, others int64
	if n, _ := fmt.Sscanf(command, "inject %d", &updates); n == 1 {
		return g.inject(updates)
	}
	if n, _ := fmt.Sscanf(command, "watch %g", &seconds); n == 1 {
		// Measured from the first on that is durable: a service that starts has its own work to do.
		limit := time.Now().Add(time.Duration(seconds * float64(time.Second)))
		for before := g.tap.durable.Load(); g.tap.durable.Load() == before; {
			if time.Now().After(limit) || g.interrupted() {
				break
			}
			time.Sleep(time.Millisecond)
		}
		return g.measure("backlog", 0, time.Until(limit).Seconds(), g.untilDurable)
	}
	if n, _ := fmt.Sscanf(command, "drain %g %d", &seconds, &others); n >= 1 {
		g.drain(time.Now().Add(time.Duration(seconds*float64(time.Second))), others)
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
	published := g.sequence
	go func() { failed <- publish(end) }()
	time.Sleep(time.Until(start))
	began, before := time.Now(), g.tap.begin()
	g.tell(event{"event": "start", "phase": phase})
	err := <-failed
	took := time.Since(began).Seconds()
	after, micros, arrived := g.tap.end()
	slices.Sort(g.late)
	told := event{
		"event": "end", "phase": phase, "seconds": took, "durable": after - before,
		"published": g.sequence - published,
		"mean_ms":   mean(micros),
		"p50_ms":    quantile(micros, 0.5), "p99_ms": quantile(micros, 0.99),
		"p999_ms": quantile(micros, 0.999), "max_ms": quantile(micros, 1),
		"late_p50_ms": quantile(g.late, 0.5), "late_p99_ms": quantile(g.late, 0.99),
	}
	if g.tap.arrivals {
		told["arrived"] = len(arrived)
		told["arrive_mean_ms"] = mean(arrived)
		told["arrive_p50_ms"] = quantile(arrived, 0.5)
		told["arrive_p99_ms"] = quantile(arrived, 0.99)
		told["arrive_max_ms"] = quantile(arrived, 1)
	}
	g.late = g.late[:0]
	g.tell(told)
	return err
}

// interrupted tells whether SIGINT came since the last question.
func (g *generator) interrupted() bool {
	select {
	case <-g.stop:
		return true
	default:
		return false
	}
}

// progress tells how far it is, again and again.
func (g *generator) progress(every time.Duration) {
	for range time.Tick(every) {
		durable, micros, arrived := g.tap.lately()
		g.tell(event{
			"event": "progress", "durable": durable, "held": g.tap.held.Load(),
			"latest": len(micros), "mean_ms": mean(micros), "p99_ms": quantile(micros, 0.99),
			"arrive_mean_ms": mean(arrived), "arrive_p99_ms": quantile(arrived, 0.99),
		})
	}
}

// saturate publishes a chunk whenever there is room for one in the window.
func (g *generator) saturate(until time.Time) error {
	over := time.After(time.Until(until))
	for time.Now().Before(until) && !g.interrupted() {
		g.wakeAt.Store(g.sequence - g.window + chunk)
		if g.tap.durable.Load() < g.wakeAt.Load() {
			select {
			case <-g.room:
			case <-over:
				return nil
			}
			continue
		}
		p := g.next()
		if !p.room(func() bool { return time.Now().After(until) || g.interrupted() }) {
			return nil
		}
		micros := time.Now().UnixMicro()
		for range chunk {
			p.add(&g.document, g.sequence, micros)
			g.sequence++
		}
		if err := p.flush(); err != nil {
			return err
		}
	}
	return nil
}

// inject publishes until there are so many more.
func (g *generator) inject(updates int64) error {
	began := time.Now()
	for sent := int64(0); sent < updates && !g.interrupted(); {
		p := g.next()
		if !p.room(func() bool { return time.Since(began) > injectLimit || g.interrupted() }) {
			break
		}
		micros := time.Now().UnixMicro()
		for range min(chunk, updates-sent) {
			p.add(&g.document, g.sequence, micros)
			g.sequence++
			sent++
		}
		if err := p.flush(); err != nil {
			return err
		}
	}
	for g.accepted() < g.sequence && time.Since(began) < injectLimit && !g.interrupted() {
		time.Sleep(10 * time.Millisecond)
	}
	g.tell(event{
		"event": "injected", "seconds": time.Since(began).Seconds(), "published": g.sequence,
		"accepted": g.accepted(),
	})
	return nil
}

// untilDurable publishes nothing.
func (g *generator) untilDurable(until time.Time) error {
	for g.tap.durable.Load() < g.sequence && time.Now().Before(until) && !g.interrupted() {
		time.Sleep(time.Millisecond)
	}
	return nil
}

// pace publishes every update as soon as it is due. An update carries the time at which it was due,
// so that a stall of this program or of the broker shows in the latency of all that it delayed.
func (g *generator) pace(rate float64, until time.Time) error {
	start := time.Now()
	over := func() bool { return time.Now().After(until) || g.interrupted() }
	due := func() int64 { return int64(time.Since(start).Seconds() * rate) }
	for sent := int64(0); !over(); {
		if sent < due() {
			p := g.next()
			if !p.room(over) {
				break
			}
			now, due := time.Now(), due()
			first := start.Add(time.Duration(float64(sent) / rate * float64(time.Second)))
			g.late = append(g.late, int32(now.Sub(first).Microseconds()))
			for ; sent < due; sent++ {
				at := start.Add(time.Duration(float64(sent) / rate * float64(time.Second)))
				p.add(&g.document, g.sequence, at.UnixMicro())
				g.sequence++
			}
			if err := p.flush(); err != nil {
				return err
			}
		}
		time.Sleep(500 * time.Microsecond)
	}
	return nil
}

func (g *generator) next() *publisher {
	g.turn = (g.turn + 1) % len(g.publishers)
	return g.publishers[g.turn]
}

func (g *generator) drain(until time.Time, others int64) {
	for g.tap.durable.Load() < g.sequence+others && time.Now().Before(until) {
		time.Sleep(10 * time.Millisecond)
	}
	g.tell(event{
		"event": "drained", "published": g.sequence, "accepted": g.accepted(),
		"durable": g.tap.durable.Load(), "held": g.tap.held.Load(),
		"connected": g.tap.connected.Load(), "again": g.tap.again.Load(),
	})
}

// accepted counts what the broker acknowledged.
func (g *generator) accepted() (updates int64) {
	for _, p := range g.publishers {
		updates += p.acked.Load()
	}
	return updates
}

func mean(micros []int32) float64 {
	sum := 0.0
	for _, each := range micros {
		sum += float64(each)
	}
	return sum / float64(max(1, len(micros))) / 1000
}

func quantile(sorted []int32, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]) / 1000
}
