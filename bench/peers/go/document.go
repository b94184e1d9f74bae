package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/valyala/fastjson"
)

// A leaf is one JSON value of an update that is no object, and where it stands.
type leaf struct {
	section string
	path    []byte // JSON Pointer (RFC 6901) from the section on
	value   []byte // JSON text
}

// An update is what one message says about one device.
type update struct {
	device string
	shadow string
	micros int64 // write time, µs since 1970
	leaves []leaf
	arena  []byte // what paths and values are cut from
}

var (
	errTopic    = errors.New("not a shadow topic")
	errDocument = errors.New("not a shadow document")
	parsers     fastjson.ParserPool
	escapes     = strings.NewReplacer("~", "~0", "/", "~1")
)

// parse reads topic and payload into u, whose memory it uses again.
func (u *update) parse(topic string, payload []byte) error {
	u.leaves, u.arena = u.leaves[:0], u.arena[:0]
	prefix, rest, ok := strings.Cut(topic, "/")
	device, rest, ok2 := strings.Cut(rest, "/shadow/")
	if !ok || !ok2 || prefix == "" || device == "" {
		return errTopic
	}
	name, isNamed := strings.CutPrefix(rest, "name/")
	if isNamed {
		if name, ok = strings.CutSuffix(name, "/update"); !ok {
			return errTopic
		}
		u.shadow = name
	} else if u.shadow = ""; rest != "update" {
		return errTopic
	}
	u.device = device

	parser := parsers.Get()
	defer parsers.Put(parser)
	document, err := parser.ParseBytes(payload)
	if err != nil {
		return fmt.Errorf("%w: %w", errDocument, err)
	}
	stamp, err := document.Get("timestamp").Int64()
	if err != nil {
		return fmt.Errorf("%w: timestamp: %w", errDocument, err)
	}
	u.micros = toMicros(stamp)
	for _, section := range [...]string{"reported", "desired"} {
		object := document.GetObject("state", section)
		if object == nil {
			continue
		}
		u.walk(section, "", object)
	}
	if len(u.leaves) == 0 {
		return fmt.Errorf("%w: no leaf", errDocument)
	}
	return nil
}

func (u *update) walk(section, parent string, object *fastjson.Object) {
	object.Visit(func(key []byte, value *fastjson.Value) {
		from := len(u.arena)
		u.arena = append(u.arena, parent...)
		u.arena = append(u.arena, '/')
		u.arena = appendEscaped(u.arena, key)
		path := u.arena[from:len(u.arena):len(u.arena)]
		if value.Type() == fastjson.TypeObject {
			u.walk(section, string(path), value.GetObject())
			return
		}
		from = len(u.arena)
		u.arena = value.MarshalTo(u.arena)
		text := u.arena[from:len(u.arena):len(u.arena)]
		u.leaves = append(u.leaves, leaf{section: section, path: path, value: text})
	})
}

func appendEscaped(to, key []byte) []byte {
	for _, c := range key {
		if c == '~' || c == '/' {
			return append(to, escapes.Replace(string(key))...)
		}
	}
	return append(to, key...)
}

// toMicros takes seconds, milliseconds or microseconds, told apart by magnitude.
func toMicros(stamp int64) int64 {
	switch {
	case stamp < 1e11:
		return stamp * 1e6
	case stamp < 1e14:
		return stamp * 1e3
	}
	return stamp
}
