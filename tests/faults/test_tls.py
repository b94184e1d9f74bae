"""Under load the broker's certificate becomes one that nobody may trust."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

import pytest

from backing import ListenerTls, Mosquitto, free_port
from tests.certificates import LOCAL, Authority
from tests.faults.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    import backing

pytestmark = pytest.mark.timeout(180)

DURABLE = "updates_durable_total"


class Plain(NamedTuple):
    """The listener without TLS of a broker, for publishers."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"


@pytest.fixture
def certificates(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "certificates")
    made.issue("good", LOCAL)
    made.issue("wrong host", "DNS:elsewhere.example")
    made.issue("expired", LOCAL, days=-1)
    return made


@pytest.mark.parametrize("bad", ["expired", "wrong host"])
def test_a_broker_that_may_not_be_trusted_any_more_is_left_until_it_may_again(
    cassandra: backing.Database,
    migrated: str,
    certificates: Authority,
    unique: str,
    tmp_path: Path,
    bad: str,
) -> None:
    """No wire here: the connection is encrypted. What the broker acknowledged must be durable."""
    served = ListenerTls(tmp_path / "served.pem", tmp_path / "served.key")
    plain = Plain("127.0.0.1", free_port())

    def serve(name: str) -> None:
        for source, target in zip(
            certificates.pair(name), (served.certificate, served.key), strict=True
        ):
            shutil.copy(source, target)

    serve("good")
    with (
        Mosquitto(
            tls=served, persistent=True, extra_config=[f"listener {plain.port} {plain.host}"]
        ) as broker,
        Stage(
            plain,  # type: ignore[arg-type]  # asked for its address alone
            cassandra,
            migrated,
            unique,
            tmp_path,
            pods=0,
            settings={
                "MQTT__URL": f"mqtts://127.0.0.1:{broker.port}",
                "MQTT__CA_FILE": str(certificates.ca),
            },
        ) as stage,
    ):
        pod = stage.add_pod(MQTT__URL=f"mqtts://127.0.0.1:{broker.port}")
        stage.start()
        with stage.traffic():
            pod.wait_more(50, DURABLE)
            broker.stop()
            serve(bad)
            broker.start()
            pod.wait_total(2, "disconnects_total", reason="tls")
            durable = pod.total(DURABLE)
            assert pod.service.live()
            assert pod.service.ready_reasons() == {"not_subscribed"}
            pod.wait_more(2, "disconnects_total", reason="tls")
            assert pod.total(DURABLE) == durable
            broker.stop()
            serve("good")
            broker.start()
            pod.service.wait_ready()
            pod.wait_more(50, DURABLE)
        verdict = stage.settle()
    assert verdict.excused == 0
    assert verdict.acknowledged_to_publisher > 0
    assert verdict.acknowledged_by_service == 0
