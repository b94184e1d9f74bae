"""The load rig: devices by the thousand, what they publish, and how long the system takes.

Lives here: a device without I/O (`device`, `websocket`), what devices publish (`families`,
`replay`), how they come, go and come back (`shapes`, `backoff`), the lean driver that runs
thousands of them in one event loop (`lean`, `connection`), latency as the service's own PUBACKs
show it (`observer`), and the comparison of Cassandra with what was acknowledged (`journal`,
`check`).
`python -m load --help` has the commands; `scripts/load` sets up what they need.

Rules: of shadowsvc only what a user of it may import, never its pipeline, mqtt or store; nothing
that is shipped imports this. A device costs no task and no timer of its own. The rig measures
itself: every figure stands beside the rig's own CPU and the lateness of its timers.
"""
