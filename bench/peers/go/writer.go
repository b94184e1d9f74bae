package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	gocql "github.com/apache/cassandra-gocql-driver/v2"
	"github.com/eclipse/paho.golang/paho"
)

const (
	setLeaf = "UPDATE shadow USING TIMESTAMP ? SET value = ? " +
		"WHERE device = ? AND shadow = ? AND section = ? AND path = ?"
	// The first leaf of an update carries the time of the whole update along.
	setLeafAndTime = "UPDATE shadow USING TIMESTAMP ? SET value = ?, updated_at = ? " +
		"WHERE device = ? AND shadow = ? AND section = ? AND path = ?"

	retryDelay = 100 * time.Millisecond
)

// A delivery is one message and the connection that its acknowledgement belongs to.
type delivery struct {
	packet *paho.Publish
	client *paho.Client
}

// acknowledge is called when the update is durable. paho keeps the acknowledgements in order.
func (d delivery) acknowledge() {
	if err := d.client.Ack(d.packet); err != nil {
		slog.Warn("acknowledgement not taken", "error", err) // the broker sends it again
	}
}

type writer struct {
	session *gocql.Session
}

// statements appends what writes the update.
func statements(to []gocql.BatchEntry, u *update) []gocql.BatchEntry {
	for i, l := range u.leaves {
		entry := gocql.BatchEntry{Stmt: setLeaf, Idempotent: true}
		if i == 0 {
			entry.Stmt = setLeafAndTime
			entry.Args = []any{u.micros, l.value, u.micros / 1000, u.device, u.shadow, l.section, l.path}
		} else {
			entry.Args = []any{u.micros, l.value, u.device, u.shadow, l.section, l.path}
		}
		to = append(to, entry)
	}
	return to
}

// untilDone asks again and again, until request succeeds or ctx ends.
func untilDone(ctx context.Context, request func() error) error {
	for {
		err := request()
		if err == nil || ctx.Err() != nil {
			return err
		}
		slog.Warn("write failed, will be tried again", "error", err)
		time.Sleep(retryDelay)
	}
}

// write returns when the entries are durable, in one request, or when ctx ends.
func (w *writer) write(ctx context.Context, entries []gocql.BatchEntry) error {
	return untilDone(ctx, func() error {
		batch := w.session.Batch(gocql.UnloggedBatch)
		batch.Entries = entries
		return batch.ExecContext(ctx)
	})
}

// writeEach returns when the entries are durable, in a request each, or when ctx ends.
func (w *writer) writeEach(ctx context.Context, entries []gocql.BatchEntry) error {
	var leaves sync.WaitGroup
	var mutex sync.Mutex
	var failed error
	for _, entry := range entries {
		leaves.Go(func() {
			err := untilDone(ctx, func() error {
				return w.session.Query(entry.Stmt, entry.Args...).ExecContext(ctx)
			})
			if err != nil {
				mutex.Lock()
				failed = err
				mutex.Unlock()
			}
		})
	}
	leaves.Wait()
	return failed
}

// each has workers take deliveries one by one, and write what makes an update durable.
// What is written is acknowledged, and so is what is no update.
func each(
	ctx context.Context, in <-chan delivery, workers int,
	write func(context.Context, []gocql.BatchEntry) error,
) {
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			var u update
			var entries []gocql.BatchEntry
			for d := range in {
				if err := u.parse(d.packet.Topic, d.packet.Payload); err != nil {
					slog.Warn("rejected", "error", err)
					d.acknowledge()
					continue
				}
				entries = statements(entries[:0], &u)
				if write(ctx, entries) == nil {
					d.acknowledge()
				}
			}
		})
	}
	group.Wait()
}

// single writes one request an update: a batch of one partition.
func (w *writer) single(ctx context.Context, in <-chan delivery, workers int) {
	each(ctx, in, workers, w.write)
}

// statement writes one request a leaf.
func (w *writer) statement(ctx context.Context, in <-chan delivery, workers int) {
	each(ctx, in, workers, w.writeEach)
}

// batched writes unlogged batches of up to size updates, none waiting longer than linger.
//
// gocql tells nobody which replicas a partition has, so all partitions are taken for one replica set.
// That is so on the one node that the benchmark has; with more nodes a grouping would be needed.
func (w *writer) batched(
	ctx context.Context, in <-chan delivery, workers, size int, linger time.Duration,
) {
	full := make(chan []delivery)
	free := sync.Pool{New: func() any { return make([]delivery, 0, size) }}
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			updates := make([]update, size)
			var entries []gocql.BatchEntry
			for deliveries := range full {
				entries = entries[:0]
				for i, d := range deliveries {
					if err := updates[i].parse(d.packet.Topic, d.packet.Payload); err != nil {
						slog.Warn("rejected", "error", err)
						continue
					}
					entries = statements(entries, &updates[i])
				}
				if len(entries) == 0 || w.write(ctx, entries) == nil {
					for _, d := range deliveries {
						d.acknowledge()
					}
				}
				free.Put(deliveries[:0])
			}
		})
	}
	collect(in, full, &free, size, linger)
	close(full)
	group.Wait()
}

// collect makes batches until in is closed.
func collect(
	in <-chan delivery, full chan<- []delivery, free *sync.Pool, size int, linger time.Duration,
) {
	timer := time.NewTimer(linger)
	for first := range in {
		batch := append(free.Get().([]delivery), first)
		timer.Reset(linger)
	fill:
		for len(batch) < size {
			select {
			case next, ok := <-in:
				if !ok {
					break fill
				}
				batch = append(batch, next)
			case <-timer.C:
				break fill
			}
		}
		full <- batch
	}
}
