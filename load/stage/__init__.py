"""The stage: everything that a run on one machine needs, and the three runs themselves.

Rooms:
- `plan`: how many processes of each kind hold so many connections. Pure.
- `accounting`: memory, CPU and descriptors out of `/proc`; kernel memory; readings over time.
- `ingress`: HAProxy processes with the configuration that `shadowsvc ingress` writes.
- `drivers`: processes of the lean driver, what they say, and how they are ended; `ear`: the
  subscribers of all brokers.
- `recovery`: what a series of connected devices says about a storm. Pure.
- `paper`: tables, pictures, an HTML page of both, and their place in a document; `results`: where
  all that a run says is left.
- `scale`, `headline`, `growth`: the runs; `scripts/scale`, `scripts/headline`, `scripts/growth`.

Rules: everything is a real process on the loopback, ended by its process id; every figure stands
beside what the rig itself used; an interrupt ends everything and still reports; what was not
measured is not said. Must not come in: what a device does (`load.device`).
"""
