"""`shadowsvc ingress`: HAProxy in front of the brokers, kept in step with the Kubernetes API.

Rooms:
- `model`: which pods take connections, read out of EndpointSlices. Pure.
- `render`: HAProxy's configuration from settings, brokers and a jinja2 template. Pure.
- `api`: lists and watches EndpointSlices; the only importer of lightkube and httpx2.
- `runtime`: HAProxy's sockets, the worker's and the master's, and what it answers there.
- `haproxy`: the program: checks a configuration, starts and stops the process.
- `certificates`: from a directory of certificates to files that HAProxy reads.
- `supervise`: brings all of it together; the only place that decides.
- `metrics`: what is counted. `command`: the process, its signals, its HTTP pages.

Rules:
- The state is not remembered but asked for: every round compares what should be with what the
  running HAProxy says, so that it does not matter who was restarted, or when.
- A configuration is used only after `haproxy -c` took it. What is refused changes nothing.
- No broker at all is no answer: the last good configuration stays until there is a better one.
- Brokers come and go through the runtime API. What else changes needs a reload, which leaves the
  connections with the old process. Nothing here ever closes one.

Must not come in: MQTT, Cassandra, anything of the way of an update.
"""
