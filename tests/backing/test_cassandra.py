"""The local Cassandra keeps its ports and what it acknowledged."""

import pytest

from backing import Cassandra

pytestmark = pytest.mark.timeout(240)  # a cold start on a busy machine


@pytest.mark.slow
def test_a_killed_node_comes_back_with_what_it_acknowledged() -> None:
    with Cassandra(heap="512M", settings={"commitlog_sync": "batch"}) as node:
        with node.session() as session:
            session.execute(
                "CREATE KEYSPACE k WITH replication = {'class': 'NetworkTopologyStrategy', "
                f"'{node.dc}': 1}}"
            )
            session.execute("CREATE TABLE k.t (a int PRIMARY KEY)")
            insert = session.prepare("INSERT INTO k.t (a) VALUES (?)")
            for number in range(100):
                session.execute(insert, (number,))
            assert node.cpu_seconds() > 0
            address, pid = (node.contact_points, node.port), node.pid
            node.kill()
        node.start()
        assert (node.contact_points, node.port) == address
        assert node.pid != pid
        with node.session() as session:
            assert session.execute("SELECT count(*) FROM k.t").one()[0] == 100
