"""The image: what is in it, how little it may do, and that it works that way.

The containers of this file run as the image asks for: with a read-only root, without a capability,
as its own user, against a broker and a Cassandra in containers of a network of their own.
"""

from __future__ import annotations

import json
import signal
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from testcontainers.community.cassandra import CassandraContainer
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

from backing.containers import CASSANDRA_IMAGE, MOSQUITTO_IMAGE
from tests.certificates import LOCAL, Authority
from tests.containers.updates import QUERY, Publisher, rows, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.containers.conftest import Built

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
USER = "10001:10001"
MIB = 1024**2
MAX_OWN_BYTES = 110 * MIB
"""What we add to the base: program, dependencies, byte code."""
MAX_IMAGE_BYTES = 280 * MIB
"""Base included. A base that grows beyond this deserves a look."""
MOSQUITTO = """\
listener 1883
allow_anonymous true
max_inflight_messages 0
max_queued_messages 0
"""


def run(image: str, *argv: str, user: str = USER, limit_seconds: float = 120) -> tuple[int, str]:
    """Run a program in place of the service, to its end; returns exit code and output."""
    container = (
        DockerContainer(image)
        .with_kwargs(entrypoint=argv[0], user=user, read_only=True, cap_drop=["ALL"])
        .with_command(list(argv[1:]))
    )
    with container:
        wrapped = container.get_wrapped_container()
        code = int(wrapped.wait(timeout=limit_seconds)["StatusCode"])
        return code, wrapped.logs().decode()


def python(image: str, program: str, *, user: str = USER) -> Any:
    """Run a Python program in the image; returns the JSON that it prints."""
    code, output = run(image, "python", "-c", program, user=user)
    assert code == 0, output
    return json.loads(output)


# -------------------------------------------------------------------- what is in it


def test_the_image_says_what_it_is_and_how_it_starts(built: Built) -> None:
    config = built.image.attrs["Config"]
    assert config["User"] == USER, "a number, so that runAsNonRoot can be checked"
    assert config["Entrypoint"] == ["shadowsvc"], "exec form: no shell between it and SIGTERM"
    assert config["Cmd"] == ["run"]
    assert "8080/tcp" in config["ExposedPorts"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert labels["title"] == "shadowsvc"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["revision"] == "abc123"
    _, version = run(built.name, "shadowsvc", "--version")
    assert version.split() == ["shadowsvc", labels["version"]]


def test_nothing_that_lies_beside_the_sources_gets_into_the_image(built: Built) -> None:
    search = f"grep -rlF {built.secret} / --exclude-dir=proc --exclude-dir=sys; echo searched"
    _, output = run(built.name, "sh", "-c", search, user="0:0")
    assert "searched" in output
    assert "/opt" not in output, output
    assert output.strip().endswith("searched")
    assert not [line for line in output.splitlines() if line.startswith("/")], output


def test_no_setting_and_no_secret_is_part_of_the_image(built: Built) -> None:
    ours = [entry for entry in built.image.attrs["Config"]["Env"] if "SHADOWSVC" in entry]
    assert ours == ["SHADOWSVC_LOG__FORMAT=json"]
    steps = json.dumps(built.image.history())
    for word in (built.secret, "index-url", "PASSWORD"):
        assert word not in steps


def test_nothing_in_the_image_installs_or_compiles(built: Built) -> None:
    program = """
import glob, importlib.util, json, shutil, subprocess
tools = ["pip", "pip3", "gcc", "cc", "c++", "g++", "make", "ld", "uv", "git"]
apt = ["/var/cache/apt/**/*.deb", "/var/cache/apt/*.bin", "/var/lib/apt/lists/*_*"]
caches = ["/root/.cache", "/.cache", "/tmp/*", "/build", *apt]
pip = [
    python for python in ("/opt/shadowsvc/bin/python", "/usr/local/bin/python3")
    if subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0
]
print(json.dumps({
    "tools": [tool for tool in tools if shutil.which(tool)],
    "caches": [path for pattern in caches for path in glob.glob(pattern, recursive=True)],
    "pip": pip,
    "hatchling": importlib.util.find_spec("hatchling") is not None,
}))
"""
    found = python(built.name, program, user="0:0")
    assert found == {"tools": [], "caches": [], "pip": [], "hatchling": False}


def test_the_rooms_that_are_to_be_compiled_are(built: Built) -> None:
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = hooks["targets"]["wheel"]["hooks"]["mypyc"]["include"]
    rooms = [path.removeprefix("src/").removesuffix(".py").replace("/", ".") for path in included]
    program = f"""
import importlib, json
print(json.dumps([importlib.import_module(room).__file__ for room in {rooms}]))
"""
    found = python(built.name, program)
    assert len(found) == len(rooms) > 5
    assert [path for path in found if not path.endswith(".so")] == []


def test_every_module_is_byte_compiled_and_its_source_is_not_looked_at(built: Built) -> None:
    program = """
import importlib.util, json, pathlib
sources = list(pathlib.Path("/opt/shadowsvc/lib").rglob("site-packages/**/*.py"))
compiled = [pathlib.Path(importlib.util.cache_from_source(path)) for path in sources]
print(json.dumps({
    "sources": len(sources),
    "missing": [str(path) for path in compiled if not path.exists()],
    "checked": [str(p) for p in compiled if p.exists() and p.read_bytes()[4:8] != b"\\1\\0\\0\\0"],
}))
"""
    found = python(built.name, program)
    assert found["sources"] > 500
    assert found["missing"] == []
    assert found["checked"] == [], "an unchecked hash has the flags 1 (PEP 552)"


def test_the_image_is_small(built: Built) -> None:
    program = """
import json, os
seen = {os.lstat(os.path.join(at, name)).st_ino: os.lstat(os.path.join(at, name)).st_size
        for at, _, names in os.walk("/opt/shadowsvc") for name in names}
print(json.dumps(sum(seen.values())))
"""
    assert 10 * MIB < python(built.name, program) <= MAX_OWN_BYTES
    assert built.image.attrs["Size"] <= MAX_IMAGE_BYTES


def test_without_settings_it_names_each_that_is_missing_and_ends_with_2(built: Built) -> None:
    code, output = run(built.name, "shadowsvc", "run")
    assert code == 2
    assert "SHADOWSVC_CASSANDRA__LOCAL_DC" in output


TLS = """
import asyncio, json, os, pathlib, socket, ssl, threading
import acsylla

def serve(version, seen):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("/tls/node.pem", "/tls/node.key")
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)

    def answer():
        try:
            connection, _ = listener.accept()
            connection.settimeout(20)
            with context.wrap_socket(connection, server_side=True) as secured:
                seen[version] = secured.version()
        except OSError as error:
            seen[version] = getattr(error, "reason", str(error))
        listener.close()

    thread = threading.Thread(target=answer)
    thread.start()
    return listener.getsockname()[1], thread

async def main():
    seen = {}
    for version in ("TLSv1_1", "TLSv1_2", "TLSv1_3"):
        port, thread = serve(version, seen)
        cluster = acsylla.create_cluster(
            ["127.0.0.1"], port=port, connect_timeout=5, ssl_enabled=True, log_level="disabled",
            ssl_trusted_cert=pathlib.Path("/tls/ca.pem").read_text(),
            ssl_verify_flags=acsylla.SSLVerifyFlags.PEER_CERT,
        )
        try:
            await asyncio.wait_for(cluster.create_session(), 20)
        except Exception as error:
            print(type(error).__name__, error)
        thread.join(20)
    print(json.dumps(seen), flush=True)
    os._exit(0)  # the driver's threads may go on trying

asyncio.run(main())
"""


def test_the_way_to_cassandra_is_not_encrypted_by_less_than_tls_1_2(
    built: Built, tmp_path: Path
) -> None:
    """The OpenSSL that acsylla bundles would agree to 1.1; the image's configuration forbids it."""
    authority = Authority(tmp_path / "tls")
    authority.issue("node", LOCAL)
    container = (
        DockerContainer(built.name)
        .with_kwargs(entrypoint="python", read_only=True, cap_drop=["ALL"])
        .with_command(["-c", TLS])
        .with_volume_mapping(tmp_path / "tls", "/tls")
    )
    with container:
        wrapped = container.get_wrapped_container()
        code, output = wrapped.wait(timeout=120)["StatusCode"], wrapped.logs().decode()
    assert code == 0, output
    assert json.loads(output.splitlines()[-1]) == {
        "TLSv1_1": "UNSUPPORTED_PROTOCOL",
        "TLSv1_2": "TLSv1.2",
        "TLSv1_3": "TLSv1.3",
    }


# -------------------------------------------------------------------- how it works


class Surroundings:
    """A broker and a Cassandra with the schema, in a network of their own."""

    def __init__(self, image: str, network: Network) -> None:
        self.image = image
        self.network = network
        self.cassandra = (
            CassandraContainer(CASSANDRA_IMAGE)
            .with_network(network)
            .with_network_aliases("cassandra")
        )
        self.broker = (
            DockerContainer(MOSQUITTO_IMAGE)
            .with_network(network)
            .with_network_aliases("broker")
            .with_exposed_ports(1883)
            .with_env("CONFIG", MOSQUITTO)
            .with_command(
                ["sh", "-c", 'printf "%s" "$CONFIG" >/tmp/m.conf && exec mosquitto -c /tmp/m.conf']
            )
        )

    def publisher(self, prefix: str) -> Publisher:
        host = self.broker.get_container_host_ip()
        port = int(self.broker.get_exposed_port(1883))
        return Publisher("127.0.0.1" if host == "localhost" else host, port, prefix)

    def service(self, *command: str, **settings: object) -> DockerContainer:
        """A container of the image, not yet started, with all that can be taken away from it."""
        container = (
            DockerContainer(self.image)
            .with_network(self.network)
            .with_envs(
                SHADOWSVC_MQTT__URL="mqtt://broker:1883",
                SHADOWSVC_CASSANDRA__CONTACT_POINTS="cassandra",
                SHADOWSVC_CASSANDRA__LOCAL_DC=CassandraContainer.DEFAULT_LOCAL_DATACENTER,
                SHADOWSVC_CASSANDRA__REPLICATION="1",
                **{f"SHADOWSVC_{name}": str(value) for name, value in settings.items()},
            )
            .with_kwargs(read_only=True, cap_drop=["ALL"], security_opt=["no-new-privileges:true"])
        )
        return container.with_command(list(command)) if command else container

    def stored(self) -> dict[str, int]:
        """Return device and value of every row."""
        answer = self.cassandra.get_wrapped_container().exec_run(["cqlsh", "-e", QUERY])
        output = answer.output.decode()
        assert answer.exit_code == 0, output
        return rows(output)


@pytest.fixture(scope="module")
def surroundings(built: Built) -> Iterator[Surroundings]:
    with Network() as network:
        made = Surroundings(built.name, network)
        with made.broker, made.cassandra:

            def migrated() -> bool:
                with made.service("migrate") as migration:
                    wrapped = migration.get_wrapped_container()
                    assert wrapped.wait(timeout=120)["StatusCode"] == 0, wrapped.logs().decode()
                return True

            # Again, as a Job would: Cassandra may say that it is up before it answers.
            wait_for(migrated, "the schema is there", 120)
            yield made


def health(container: DockerContainer) -> str:
    wrapped = container.get_wrapped_container()
    wrapped.reload()
    state = wrapped.attrs["State"]
    assert state["Status"] == "running", wrapped.logs().decode()[-3000:]
    return str(state["Health"]["Status"])


def execute(container: DockerContainer, *argv: str) -> tuple[int, str]:
    answer = container.get_wrapped_container().exec_run(list(argv))
    return int(answer.exit_code), answer.output.decode()


def wait_ready(container: DockerContainer) -> None:
    def ready() -> bool:
        code, output = execute(container, "shadowsvc", "probe", "ready")
        assert code == 0, output
        return True

    wait_for(ready, "the service is ready", 90)


@pytest.fixture(scope="module")
def service(surroundings: Surroundings) -> Iterator[DockerContainer]:
    with surroundings.service(MQTT__TOPIC_PREFIX="one", MQTT__SHARE_GROUP="one") as container:
        wait_ready(container)
        yield container


def test_the_health_check_finds_it_healthy(service: DockerContainer) -> None:
    wait_for(lambda: health(service) == "healthy", "the engine calls it healthy", 90)
    state = service.get_wrapped_container().attrs["State"]
    assert state["Health"]["Log"][-1]["Output"].strip() == "live", "no dependency is asked"
    assert execute(service, "shadowsvc", "probe", "live") == (0, "live\n")
    assert execute(service, "shadowsvc", "probe", "ready") == (0, "ready\n")


def test_it_is_process_1_with_no_privilege_and_no_way_to_one(service: DockerContainer) -> None:
    _, status = execute(service, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert fields["Gid"].split() == ["10001"] * 4
    assert fields["NoNewPrivs"] == "1"
    for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"):
        assert int(fields[kind], 16) == 0, kind
    _, command = execute(service, "cat", "/proc/1/cmdline")
    assert command.rstrip("\0").split("\0")[1:] == ["/opt/shadowsvc/bin/shadowsvc", "run"]


def test_no_file_can_be_written(service: DockerContainer) -> None:
    # Not /tmp, /var/tmp and /run, over which an engine may lay memory of its own.
    for folder in ("/", "/opt/shadowsvc", "/etc", "/usr/local", "/var/lib"):
        code, output = execute(service, "sh", "-c", f"echo x >{folder}/written")
        assert code != 0
        assert "Read-only file system" in output or "Permission denied" in output, output


def test_an_update_is_stored_and_read_back_in_the_container(
    service: DockerContainer, surroundings: Surroundings, unique: str
) -> None:
    surroundings.publisher("one").send(unique, 42)

    def stored() -> bool:
        code, output = execute(service, "shadowsvc", "get", unique, "--json")
        assert code == 0, output
        return bool(json.loads(output)["state"] == {"reported": {"value": 42}})

    wait_for(stored, "the update can be read")


def test_sigterm_under_load_drains_ends_with_0_and_loses_nothing(
    surroundings: Surroundings, unique: str
) -> None:
    publisher = surroundings.publisher(unique)
    devices = [f"{unique}-{number}" for number in range(600)]
    with surroundings.service(MQTT__TOPIC_PREFIX=unique, MQTT__SHARE_GROUP=unique) as container:
        wait_ready(container)
        wrapped = container.get_wrapped_container()

        def end() -> None:
            wrapped.kill(signal.SIGTERM)
            assert wrapped.wait(timeout=60)["StatusCode"] == 0, wrapped.logs().decode()[-3000:]

        publisher.send_while(devices, 200, end)
        assert len(publisher.taken) == len(devices)
        lines = wrapped.logs().decode().splitlines()
        (stopped,) = [event for event in map(json.loads, lines) if event["event"] == "stopped"]
        assert stopped["drained"] is True
        assert stopped["left_to_the_broker"] == 0
        assert 0 < stopped["acknowledged"] < len(devices), "the rest came after its end"
        wrapped.start()

        def all_there() -> bool:
            kept = surroundings.stored()
            missing = {name: at for name, at in publisher.taken.items() if kept.get(name) != at}
            assert not missing, f"{len(missing)} missing, such as {sorted(missing)[:5]}"
            return True

        wait_for(all_there, "what was published is stored", 90)


def test_a_secret_is_taken_from_a_mounted_file_and_shown_nowhere(
    surroundings: Surroundings, unique: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(unique)
    file.chmod(0o644)
    container = surroundings.service(
        "check-config",
        MQTT__USERNAME="someone",
        MQTT__PASSWORD_FILE="/run/secrets/password",
    ).with_volume_mapping(file, "/run/secrets/password")
    with container:
        wrapped = container.get_wrapped_container()
        code, output = wrapped.wait(timeout=60)["StatusCode"], wrapped.logs().decode()
    assert code == 0, output
    assert "SHADOWSVC_MQTT__PASSWORD=" in output
    assert unique not in output
