package main

import (
	"encoding/binary"
	"errors"
)

// The little of MQTT that is needed to publish and to look over a shoulder.
const (
	typeConnect   = 1
	typeConnack   = 2
	typePublish   = 3
	typePuback    = 4
	typeSuback    = 9
	dupFlag       = 8
	firstFailure  = 0x80
	maxLengthSize = 4
)

var (
	errLength = errors.New("malformed remaining length")
	errShort  = errors.New("a PUBACK without a packet id")
)

// packet splits off the first packet of data: its first byte, its body, and its size. size is 0
// while the packet is not whole.
func packet(data []byte) (first byte, body []byte, size int, err error) {
	length := 0
	for i := 1; i < len(data) && i <= maxLengthSize; i++ {
		length |= int(data[i]&0x7f) << (7 * (i - 1))
		if data[i]&0x80 != 0 {
			continue
		}
		if size = i + 1 + length; size > len(data) {
			return 0, nil, 0, nil
		}
		return data[0], data[i+1 : size], size, nil
	}
	if len(data) > maxLengthSize {
		return 0, nil, 0, errLength
	}
	return 0, nil, 0, nil
}

// appendHeader appends the fixed header of a packet whose body has length bytes.
func appendHeader(to []byte, first byte, length int) []byte {
	to = append(to, first)
	for length >= 0x80 {
		to = append(to, byte(length)|0x80)
		length >>= 7
	}
	return append(to, byte(length))
}

func appendString[T string | []byte](to []byte, text T) []byte {
	return append(binary.BigEndian.AppendUint16(to, uint16(len(text))), text...)
}

// appendConnect appends a CONNECT of MQTT 5 with clean start and no keepalive.
func appendConnect(to []byte, clientID string) []byte {
	body := appendString(nil, "MQTT")
	body = append(body, 5, 2, 0, 0, 0)
	body = appendString(body, clientID)
	return append(appendHeader(to, typeConnect<<4, len(body)), body...)
}

// appendPublish appends a PUBLISH of MQTT 5 with QoS 1.
func appendPublish(to []byte, topic []byte, id uint16, payload []byte) []byte {
	to = appendHeader(to, typePublish<<4|2, 2+len(topic)+2+1+len(payload))
	to = appendString(to, topic)
	to = binary.BigEndian.AppendUint16(to, id)
	to = append(to, 0) // no properties
	return append(to, payload...)
}

// publishID returns the packet id of a PUBLISH with QoS 1; ok is false for other QoS.
func publishID(first byte, body []byte) (id uint16, ok bool) {
	if first&6 != 2 || len(body) < 2 {
		return 0, false
	}
	at := publishIDAt(body)
	if len(body) < at+2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(body[at:]), true
}

// publishIDAt returns where the packet id of a PUBLISH stands: after the topic.
func publishIDAt(body []byte) int {
	return 2 + int(binary.BigEndian.Uint16(body))
}

// protocolLevel returns the version that a CONNECT asks for: 4 is MQTT 3.1.1, 5 is MQTT 5.
func protocolLevel(body []byte) byte {
	at := 2 + int(binary.BigEndian.Uint16(body))
	return body[at]
}

// stamp returns the publish time that ends our documents (`…"timestamp":1700000000000000}`), in
// microseconds. Neither protocol level nor properties matter, since it is read from the end.
func stamp(body []byte) int64 {
	if len(body) == 0 || body[len(body)-1] != '}' {
		return 0
	}
	value, _ := numberBefore(body, len(body)-1)
	return value
}

// numberBefore returns the digits that end before end, and where they begin.
func numberBefore(text []byte, end int) (value int64, begin int) {
	scale := int64(1)
	for begin = end; begin > 0 && text[begin-1] >= '0' && text[begin-1] <= '9'; begin-- {
		value += int64(text[begin-1]-'0') * scale
		scale *= 10
	}
	return value, begin
}
