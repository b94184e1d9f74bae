package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
)

const (
	// step makes neighbours in time no neighbours in name; it has no factor in common with usual
	// numbers of devices, so every device has its turn.
	step = 7919
	// maxUnacked keeps packet ids of one connection from meeting themselves.
	maxUnacked = 30_000
	// ackPause lets the broker's acknowledgements gather: they come one by one, and reading each by
	// itself would cost more than publishing.
	ackPause = 5 * time.Millisecond
	// usualLeaves is how many leaves a document has that is measured everywhere.
	usualLeaves = 4
	// deviceLevel is the topic of a device after the prefix, before its number.
	deviceLevel = "/device-"
)

// A document says what is published, and by whom. All documents hold the leaf volume, a running
// number by which the last update of a device is found again.
type document struct {
	prefix    string
	devices   int64
	leaves    int
	textBytes int
	topic     []byte
}

// A publisher is one connection that publishes with QoS 1. Only missing acknowledgements hold it back
// (room): a write that waited for a broker that does not read would know of no end.
type publisher struct {
	to      io.Writer
	from    *socket
	in      []byte
	sent    int64
	acked   atomic.Int64
	payload []byte
	out     []byte
}

func connect(broker, clientID string) (*publisher, error) {
	conn, err := dial(broker)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(appendConnect(nil, clientID)); err != nil {
		return nil, err
	}
	connack := make([]byte, 2, 2+0xff)
	if _, err := io.ReadFull(conn, connack); err != nil {
		return nil, err
	}
	connack = connack[:2+int(connack[1])]
	if _, err := io.ReadFull(conn, connack[2:]); err != nil {
		return nil, err
	}
	if connack[0]>>4 != typeConnack || len(connack) < 4 || connack[3] != 0 {
		return nil, fmt.Errorf("refused: % x", connack)
	}
	return &publisher{to: newOutbox(conn), from: conn, in: make([]byte, 0, 64*1024)}, nil
}

// count reads PUBACKs, of all publishers in turn.
func count(publishers []*publisher) {
	reading := slices.Clone(publishers)
	for len(reading) > 0 {
		reading = slices.DeleteFunc(reading, func(p *publisher) bool { return p.count() != nil })
		time.Sleep(ackPause)
	}
}

func (p *publisher) count() error {
	n, err := p.from.glance(p.in[len(p.in):cap(p.in)])
	if n == 0 || err != nil {
		return err
	}
	p.in = p.in[:len(p.in)+n]
	seen, acked := 0, int64(0)
	for {
		first, _, size, err := packet(p.in[seen:])
		if err != nil {
			return err
		}
		if size == 0 {
			break
		}
		seen += size
		if first>>4 == typePuback {
			acked++
		}
	}
	p.acked.Add(acked)
	p.in = p.in[:copy(p.in, p.in[seen:])]
	return nil
}

// add puts one update into the next write: number sequence, published at micros.
func (p *publisher) add(of *document, sequence, micros int64) {
	d := append(p.payload[:0], `{"state":{"reported":{`...)
	if of.leaves == usualLeaves && of.textBytes == 0 {
		d = appendUsual(d, sequence)
	} else {
		d = of.appendOther(d, sequence)
	}
	d = append(d, `"volume":`...)
	d = strconv.AppendInt(d, sequence, 10)
	d = append(d, `}},"timestamp":`...)
	d = strconv.AppendInt(d, micros, 10)
	p.payload = append(d, '}')
	p.sent++
	id := uint16((p.sent-1)%65_535 + 1)
	of.appendTopic(sequence * step % of.devices)
	p.out = appendPublish(p.out, of.topic, id, p.payload)
}

func appendUsual(d []byte, sequence int64) []byte {
	d = append(d, `"temp":`...)
	d = strconv.AppendInt(d, 15+sequence%10, 10)
	d = append(d, '.', byte('1'+sequence%9))
	d = append(d, `,"battery":`...)
	d = strconv.AppendInt(d, sequence%101, 10)
	if sequence&1 == 0 {
		return append(d, `,"power":{"state":"on"},`...)
	}
	return append(d, `,"power":{"state":"off"},`...)
}

// appendOther appends all leaves but volume; the first is a text, if there is to be one.
func (of *document) appendOther(d []byte, sequence int64) []byte {
	leaves := of.leaves - 1
	if of.textBytes > 0 && leaves > 0 {
		d = append(d, `"text":"`...)
		for i := range of.textBytes {
			d = append(d, byte('a'+(sequence+int64(i))%26))
		}
		d = append(d, `",`...)
		leaves--
	}
	for i := range leaves {
		d = append(d, `"leaf`...)
		d = appendPadded(d, int64(i), 3)
		d = append(d, `":`...)
		d = strconv.AppendInt(d, sequence%1000, 10)
		d = append(d, ',')
	}
	return d
}

// appendTopic makes the topic of a device, PREFIX/device-NUMBER/shadow/update.
func (of *document) appendTopic(device int64) {
	t := append(of.topic[:0], of.prefix...)
	t = append(t, deviceLevel...)
	t = appendPadded(t, device, 5)
	of.topic = append(t, "/shadow/update"...)
}

// appendPadded appends a number with so many digits at least.
func appendPadded(to []byte, number int64, digits int) []byte {
	for limit, i := int64(10), 1; i < digits; limit, i = limit*10, i+1 {
		if number < limit {
			for range digits - i {
				to = append(to, '0')
			}
			break
		}
	}
	return strconv.AppendInt(to, number, 10)
}

// room waits until the broker acknowledged enough of what went before; false: it was over first.
func (p *publisher) room(over func() bool) bool {
	for p.sent-p.acked.Load() > maxUnacked {
		if over() {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}

// flush writes what was added.
func (p *publisher) flush() error {
	_, err := p.to.Write(p.out)
	p.out = p.out[:0]
	return err
}
