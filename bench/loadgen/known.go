package main

import (
	"bytes"
	"hash/maphash"
)

// A set holds the names of updates; ours by the million, in a bit each.
type set struct {
	ours   []uint64
	others map[uint64]struct{}
}

var (
	seed          = maphash.MakeSeed()
	volume        = []byte(`"volume":`)
	afterSequence = []byte(`}},"timestamp":`)
)

// nameOf returns what tells an update from all others: twice the running number of ours, whose topics
// begin with own; an odd number made of topic and payload of others.
func nameOf(publish, own []byte) uint64 {
	if len(publish) > 2 && len(own) > 0 && bytes.HasPrefix(publish[2:], own) {
		_, at := numberBefore(publish, len(publish)-1)
		if rest, ok := bytes.CutSuffix(publish[:at], afterSequence); ok {
			sequence, at := numberBefore(rest, len(rest))
			if at < len(rest) && bytes.HasSuffix(rest[:at], volume) {
				return uint64(sequence) << 1
			}
		}
	}
	id := publishIDAt(publish)
	var hash maphash.Hash
	hash.SetSeed(seed)
	hash.Write(publish[:min(id, len(publish))])
	hash.Write(publish[min(id+2, len(publish)):])
	return hash.Sum64() | 1
}

// add tells whether it is new.
func (s *set) add(name uint64) bool {
	if name&1 != 0 {
		if s.others == nil {
			s.others = map[uint64]struct{}{}
		}
		before := len(s.others)
		s.others[name] = struct{}{}
		return len(s.others) > before
	}
	word, bit := int(name>>7), uint64(1)<<(name>>1&63)
	if word >= len(s.ours) {
		s.ours = append(s.ours, make([]uint64, word-len(s.ours)+1)...)
	}
	known := s.ours[word]&bit != 0
	s.ours[word] |= bit
	return !known
}
