"""The load rig as users of Locust, with its web page, its distribution and its reports.

Rooms:
- `__main__`: the command, `scripts/locust`; starts Locust with `locustfile`.
- `arguments`: what can be set beside Locust's own options.
- `wire`: one device's connection on a socket. `life`: what a device does from its first connect to
  its last DISCONNECT, and what it measures.
- `rig`: what the devices of a process share: numbers, the line to connect, the schedule, TLS.
- `pace`: what a shape means to Locust, and to a device.
- `users`, `shape`, `durable`, `run`, `locustfile`: what Locust runs.
- `watch`, `summary`: the rig's own limits; what the rig says of itself.

Rules: gevent changes sockets, locks and sleep of the whole process, so nothing outside Locust's own
processes may import `locust` or `gevent`. `wire` and `life` are plain blocking code, which gevent
turns into greenlets there; `arguments`, `pace`, `watch` and `summary` need neither. One greenlet a
device; no thread and no `select()` for any. Must not come in: MQTT itself (`load.device`), what
devices publish (`load.families`).
"""
