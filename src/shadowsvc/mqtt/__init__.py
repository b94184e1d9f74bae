"""MQTT 5: the ingest session and its connection, and the outbound publisher.

Rules: the session is a state machine without I/O; the connection owns the socket and the
reconnecting; the publisher is aiomqtt and publishes only. Drivers' exceptions become
`shadowsvc.errors` here. Must not come in: documents, Cassandra, anything from `store`.
"""
