// Command listener is the benchmark's Go peer: it joins an MQTT 5 shared subscription, writes every
// update to Cassandra, and acknowledges it when the write is durable.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	_ "net/http/pprof" // served with -pprof only
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	gocql "github.com/apache/cassandra-gocql-driver/v2"
	"github.com/eclipse/paho.golang/autopaho"
	"github.com/eclipse/paho.golang/paho"
)

type options struct {
	mqtt, clientID, group, prefix, cassandra, keyspace, dc, mode, pprof string
	receiveMaximum                                                      uint
	connections, workers, batch, gcPercent                              int
	linger, ackInterval, coalesce, flushDelay                           time.Duration
	plainConn                                                           bool
}

func main() {
	var o options
	flag.StringVar(&o.mqtt, "mqtt", "mqtt://127.0.0.1:1883", "broker")
	flag.StringVar(&o.clientID, "client-id", "", "client id of the persistent session")
	flag.StringVar(&o.group, "group", "listener", "share group")
	flag.StringVar(&o.prefix, "prefix", "things", "first level of the topics")
	flag.StringVar(&o.cassandra, "cassandra", "127.0.0.1:9042", "contact point")
	flag.StringVar(&o.keyspace, "keyspace", "shadowsvc", "keyspace that holds the table shadow")
	flag.StringVar(&o.dc, "dc", "datacenter1", "local data centre")
	flag.StringVar(&o.mode, "mode", "single", "single, batch or statements: what one request holds")
	flag.UintVar(&o.receiveMaximum, "receive-maximum", 1000, "messages held unacknowledged")
	flag.IntVar(&o.connections, "connections", 1, "connections a Cassandra host")
	flag.IntVar(&o.workers, "workers", 64, "requests in flight")
	flag.IntVar(&o.batch, "batch", 10, "updates a request in batch mode")
	flag.DurationVar(&o.linger, "linger", 5*time.Millisecond, "longest wait for a batch to fill")
	flag.DurationVar(&o.ackInterval, "ack-interval", time.Millisecond, "paho's SendAcksInterval")
	flag.DurationVar(&o.coalesce, "coalesce", 200*time.Microsecond, "gocql's WriteCoalesceWaitTime")
	flag.DurationVar(&o.flushDelay, "flush-delay", 200*time.Microsecond, "wait to join acknowledgements")
	flag.BoolVar(&o.plainConn, "plain-conn", false, "leave reads and writes of MQTT unbuffered")
	flag.IntVar(&o.gcPercent, "gc-percent", 400, "as GOGC: memory spent to collect less often")
	flag.StringVar(&o.pprof, "pprof", "", "address to serve profiles on")
	flag.Parse()
	if err := run(o); err != nil {
		slog.Error("stopped", "error", err)
		os.Exit(1)
	}
}

func run(o options) error {
	if o.clientID == "" {
		return fmt.Errorf("-client-id is missing")
	}
	debug.SetGCPercent(o.gcPercent)
	if o.pprof != "" {
		go func() { slog.Error("profiles", "error", http.ListenAndServe(o.pprof, nil)) }()
	}
	broker, err := url.Parse(o.mqtt)
	if err != nil {
		return err
	}
	session, err := connectCassandra(o)
	if err != nil {
		return err
	}
	defer session.Close()

	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	// Never full: the broker sends no more than the receive maximum before it gets acknowledgements.
	deliveries := make(chan delivery, o.receiveMaximum)
	mqtt, err := autopaho.NewConnection(stop, clientConfig(o, broker, deliveries))
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w := &writer{session: session}
		switch o.mode {
		case "batch":
			w.batched(stop, deliveries, o.workers, o.batch, o.linger)
		case "statements":
			w.statement(stop, deliveries, o.workers)
		default:
			w.single(stop, deliveries, o.workers)
		}
	}()
	<-mqtt.Done()
	close(deliveries)
	<-done
	return nil
}

func connectCassandra(o options) (*gocql.Session, error) {
	host, portText, err := net.SplitHostPort(o.cassandra)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return nil, err
	}
	cluster := gocql.NewCluster(host)
	cluster.Port = port
	cluster.Keyspace = o.keyspace
	cluster.Consistency = gocql.LocalQuorum
	cluster.NumConns = o.connections
	cluster.ProtoVersion = 4
	cluster.Timeout = 2 * time.Second
	cluster.WriteCoalesceWaitTime = o.coalesce
	cluster.DefaultTimestamp = false // every statement names its own
	cluster.DefaultIdempotence = true
	cluster.PoolConfig.HostSelectionPolicy = gocql.TokenAwareHostPolicy(
		gocql.DCAwareRoundRobinPolicy(o.dc),
	)
	return cluster.CreateSession()
}

func clientConfig(o options, broker *url.URL, deliveries chan<- delivery) autopaho.ClientConfig {
	topics := []string{
		strings.Join([]string{"$share", o.group, o.prefix, "+/shadow/update"}, "/"),
		strings.Join([]string{"$share", o.group, o.prefix, "+/shadow/name/+/update"}, "/"),
	}
	config := autopaho.ClientConfig{
		ServerUrls:            []*url.URL{broker},
		KeepAlive:             30,
		SessionExpiryInterval: 86400,
		ReconnectBackoff:      autopaho.NewConstantBackoff(200 * time.Millisecond),
		ConnectPacketBuilder: func(c *paho.Connect, _ *url.URL) (*paho.Connect, error) {
			maximum := uint16(o.receiveMaximum)
			c.Properties.ReceiveMaximum = &maximum
			return c, nil
		},
		OnConnectionUp: func(m *autopaho.ConnectionManager, _ *paho.Connack) {
			subscribe := &paho.Subscribe{}
			for _, topic := range topics {
				subscribe.Subscriptions = append(
					subscribe.Subscriptions, paho.SubscribeOptions{Topic: topic, QoS: 1})
			}
			go func() {
				if _, err := m.Subscribe(context.Background(), subscribe); err != nil {
					slog.Error("not subscribed", "error", err)
				}
			}()
		},
		OnConnectError: func(err error) { slog.Warn("not connected", "error", err) },
		ClientConfig: paho.ClientConfig{
			ClientID:                   o.clientID,
			EnableManualAcknowledgment: true,
			SendAcksInterval:           o.ackInterval,
			OnPublishReceived: []func(paho.PublishReceived) (bool, error){
				func(p paho.PublishReceived) (bool, error) {
					deliveries <- delivery{packet: p.Packet, client: p.Client}
					return true, nil
				},
			},
			OnClientError: func(err error) { slog.Warn("connection lost", "error", err) },
		},
	}
	if !o.plainConn {
		config.AttemptConnection = func(
			ctx context.Context, _ autopaho.ClientConfig, u *url.URL,
		) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", u.Host)
			if err != nil {
				return nil, err
			}
			return newBufferedConn(conn, o.flushDelay), nil
		}
	}
	return config
}
