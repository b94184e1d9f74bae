"""A Cassandra node's configuration: cassandra.yaml, the log's, and the options of the JVM.

The settings are Cassandra's built-in defaults but for those that cost a test its time: no snapshot
before a truncate or drop, no wait for gossip where there is nobody to gossip with, a log at WARN.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

MAIN_CLASS = "org.apache.cassandra.service.CassandraDaemon"

_RING_DELAY_MS = 2000
# Options that a node without neighbours starts faster with.
ALONE_OPTIONS = (
    "-Dcassandra.skip_wait_for_gossip_to_settle=0",
    "-Dcassandra.ring_delay_ms=100",
)
_NOT_ALONE_OPTIONS = (f"-Dcassandra.ring_delay_ms={_RING_DELAY_MS}",)

RAISED_THRESHOLDS: Mapping[str, object] = {
    "unlogged_batch_across_partitions_warn_threshold": 32,
    "batch_size_warn_threshold": "32KiB",
}
"""As `deploy/` has them: room for batches of 32 devices without a warning."""

# What Cassandra reaches for inside the JDK since Java 9 closed it: its conf/jvm17-server.options.
_EXPORTS = (
    "java.base/java.lang.ref",
    "java.base/jdk.internal.misc",
    "java.base/sun.nio.ch",
    "java.management.rmi/com.sun.jmx.remote.internal.rmi",
    "java.rmi/sun.rmi.registry",
    "java.rmi/sun.rmi.server",
    "java.sql/java.sql",
    "jdk.unsupported/sun.misc",
)
_OPENS = (
    "java.base/java.io",
    "java.base/java.lang",
    "java.base/java.lang.module",
    "java.base/java.nio",
    "java.base/java.util",
    "java.base/java.util.concurrent",
    "java.base/java.util.concurrent.atomic",
    "java.base/jdk.internal.loader",
    "java.base/jdk.internal.math",
    "java.base/jdk.internal.module",
    "java.base/jdk.internal.ref",
    "java.base/jdk.internal.reflect",
    "java.base/jdk.internal.util.jar",
    "java.base/sun.nio.ch",
    "jdk.management/com.sun.management.internal",
)
_SECURITY_MANAGER_OFF_SINCE = 18
# The default level is DEBUG, which costs a third of the throughput.
_LOGBACK = """\
<configuration>
  <appender name="STDOUT" class="ch.qos.logback.core.ConsoleAppender">
    <encoder><pattern>%-5level [%thread] %date{ISO8601} %F:%L - %msg%n</pattern></encoder>
  </appender>
  <root level="WARN"><appender-ref ref="STDOUT"/></root>
</configuration>
"""


def yaml(
    *,
    storage: str,
    listen_address: str,
    rpc_address: str,
    port: int,
    storage_port: int,
    seeds: Sequence[str],
    cluster_name: str,
    num_tokens: int,
    settings: Mapping[str, object],
) -> str:
    """Return a cassandra.yaml that keeps everything below the folder `storage`.

    `settings` replace ours of the same name.
    """
    ours: dict[str, object] = {
        "cluster_name": cluster_name,
        "num_tokens": num_tokens,
        "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
        "endpoint_snitch": "GossipingPropertyFileSnitch",
        "seed_provider": [
            {
                "class_name": "org.apache.cassandra.locator.SimpleSeedProvider",
                "parameters": [{"seeds": ",".join(f"{seed}:{storage_port}" for seed in seeds)}],
            }
        ],
        "listen_address": listen_address,
        "storage_port": storage_port,
        "rpc_address": rpc_address,
        "native_transport_port": port,
        # An empty ring has nothing to stream, and nodes join it sooner without looking.
        "auto_bootstrap": False,
        "commitlog_sync": "periodic",
        "commitlog_sync_period": "10000ms",
        "memtable": {
            "configurations": {
                "trie": {"class_name": "TrieMemtable"},
                "default": {"inherits": "trie"},
            }
        },
        "auto_snapshot": False,
        "data_file_directories": [f"{storage}/data"],
        "commitlog_directory": f"{storage}/commitlog",
        "hints_directory": f"{storage}/hints",
        "saved_caches_directory": f"{storage}/saved_caches",
        "cdc_raw_directory": f"{storage}/cdc_raw",
    }
    if "commitlog_sync" in settings:  # a period is an error with the other modes
        del ours["commitlog_sync_period"]
    return json.dumps(ours | dict(settings), indent=2, default=str) + "\n"  # JSON is YAML


def rack(data_centre: str) -> str:
    """Return cassandra-rackdc.properties, where the snitch reads the node's place."""
    return f"dc={data_centre}\nrack=rack1\n"


def logback() -> str:
    """Return logback.xml: warnings and worse to standard output."""
    return _LOGBACK


def command(
    java: str,
    *,
    java_version: int,
    jars: Sequence[Path],
    folder: Path,
    heap: str,
    alone: bool,
    jvm_options: Sequence[str],
) -> list[str]:
    """Return the command line of a node that has its configuration in `folder`/conf."""
    jamm = next(jar for jar in jars if jar.name.startswith("jamm-"))
    class_path = ":".join([str(folder / "conf"), *map(str, jars)])
    return [
        java,
        f"-javaagent:{jamm}",
        f"-Xms{heap}",
        f"-Xmx{heap}",
        "-XX:+UseG1GC",
        "-XX:-UsePerfData",  # keeps /tmp clean
        "-XX:+ExitOnOutOfMemoryError",
        *(f"--add-exports={name}=ALL-UNNAMED" for name in _EXPORTS),
        *(f"--add-opens={name}=ALL-UNNAMED" for name in _OPENS),
        *(["-Djava.security.manager=allow"] * (java_version >= _SECURITY_MANAGER_OFF_SINCE)),
        f"-Djava.io.tmpdir={folder / 'tmp'}",
        "-Djdk.attach.allowAttachSelf=true",
        "-Dio.netty.tryReflectionSetAccessible=true",
        f"-Dcassandra.config={(folder / 'conf' / 'cassandra.yaml').as_uri()}",
        f"-Dcassandra.storagedir={folder}",
        f"-Dcassandra.logdir={folder}",
        "-Dcassandra-foreground=yes",
        *(ALONE_OPTIONS if alone else _NOT_ALONE_OPTIONS),
        *jvm_options,
        "-cp",
        class_path,
        MAIN_CLASS,
    ]
