"""What the service keeps in Cassandra, and everything that talks to it.

Lives here: the schema and its migrations (`schema/*.cql`, `migrate`), the writer of the data plane
(`cassandra`), the map of tokens to replica sets (`topology`), reading a shadow (`reader`), and the
connection that the last three share (`driver`). Rules: drivers' exceptions become ours at the
border of the module that imports the driver and nowhere else; only `cassandra` imports acsylla,
only `driver` and its three users import cassandra-driver; statements name tables without their
keyspace, which the connection sets. Must not come in: anything of MQTT, and the rules of a shadow,
which are `shadowsvc.shadow`'s.
"""
