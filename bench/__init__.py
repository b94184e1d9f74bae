"""The benchmark: shadowsvc and its peers on the same broker, Cassandra and load; see README.md."""
