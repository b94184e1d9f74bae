"""Cassandra's jars from Maven Central, and a Java that can run them.

The jars lie in `$XDG_CACHE_HOME/shadowsvc` (`~/.cache/shadowsvc`), one folder a version, fetched
once (66 MB) with Maven, which must be installed for that alone. Several runs may ask at the same
time: the first fetches under a file lock into a folder of its own, and renames it when complete.
"""

import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from backing.errors import BackingError
from backing.process import find_program

CASSANDRA_VERSION = "5.0.6"

_FETCH_LIMIT_SECONDS = 600
_LOWEST_JAVA = 17
# Java 24 took the security manager away (JEP 486), and Cassandra 5.0 installs one at start.
_HIGHEST_JAVA = 23
_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId>
  <artifactId>cassandra-jars</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.cassandra</groupId>
      <artifactId>cassandra-all</artifactId>
      <version>{version}</version>
    </dependency>
  </dependencies>
</project>
"""


def cassandra_jars() -> tuple[Path, ...]:
    """Return the server's jars, fetching them the first time.

    Raises:
        BackingError: Maven is missing, or could not fetch them.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shadowsvc"
    folder = cache / f"cassandra-{CASSANDRA_VERSION}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _fetch(folder)
    return tuple(sorted(folder.glob("*.jar")))


def _fetch(folder: Path) -> None:
    maven = find_program("mvn", package="maven")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as name:
        work = Path(name)
        (work / "pom.xml").write_text(_POM.format(version=CASSANDRA_VERSION))
        command = [maven, "-q", "-B", "-Dstyle.color=never", "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", "-DoutputDirectory=jars"]
        try:
            done = subprocess.run(
                command,
                cwd=work,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_FETCH_LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            message = f"Maven did not fetch Cassandra within {_FETCH_LIMIT_SECONDS} s"
            raise BackingError(message) from error
        if done.returncode != 0 or not any((work / "jars").glob("cassandra-all-*.jar")):
            output = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise BackingError(f"Maven could not fetch Cassandra {CASSANDRA_VERSION}:\n{output}")
        (work / "jars").rename(folder)


@functools.cache
def java() -> tuple[str, int]:
    """Return the path and major version of a Java that runs Cassandra.

    Looks at `$JAVA_HOME`, `java` in PATH and `/usr/lib/jvm`, in this order.

    Raises:
        BackingError: there is none between 17 and 23.
    """
    candidates: list[Path] = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(Path(home) / "bin" / "java")
    if found := shutil.which("java"):
        candidates.append(Path(found))
    candidates += sorted(Path("/usr/lib/jvm").glob("*/bin/java"))
    seen: list[str] = []
    for candidate in candidates:
        version = _java_version(candidate)
        if _LOWEST_JAVA <= version <= _HIGHEST_JAVA:
            return str(candidate), version
        if version:
            seen.append(f"{candidate} is Java {version}")
    message = f"Cassandra needs Java {_LOWEST_JAVA} to {_HIGHEST_JAVA}"
    found_text = f" ({'; '.join(seen)})" if seen else ""
    raise BackingError(f"{message}{found_text}: install the package openjdk-17-jre-headless")


def _java_version(program: Path) -> int:
    try:
        done = subprocess.run(
            [program, "-version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(\d+)', done.stderr + done.stdout)
    return int(match[1]) if match and done.returncode == 0 else 0
