"""The start of the HAProxy pods, as processes: what one container copies, the other can run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backing.process import find_program
from tests.kubernetes.manifests import K8S, overlay, pod_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Haproxy = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = overlay("dev").config_maps["shadowsvc-ingress", "ingress"]
FOLDER = Path(SETTINGS["SHADOWSVC_INGRESS__HAPROXY"]).parent


@pytest.fixture
def copied(tmp_path: Path) -> Haproxy:
    """HAProxy as the container `ingress` has it, with nothing of the image that it came from."""
    program = find_program("haproxy", package="haproxy", folders=("/usr/local/sbin", "/usr/sbin"))
    target = tmp_path / "program"
    subprocess.run(
        ["/bin/sh", str(K8S / "base" / "ingress" / "copy-program.sh"), str(target)],
        check=True,
        capture_output=True,
        timeout=30,
        env={"PATH": f"{Path(program).parent}:/usr/bin:/bin"},
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(target / "haproxy"), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env={},
            check=False,
        )

    return run


def test_the_copied_program_checks_configurations(copied: Haproxy, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.cfg", tmp_path / "bad.cfg"
    good.write_text(
        "defaults\n mode tcp\n timeout client 1s\n timeout server 1s\n timeout connect 1s\n"
        "listen a\n bind 127.0.0.1:1883\n server b 127.0.0.1:1\n"
    )
    bad.write_text("defaults\n mode nonsense\n")
    assert copied("-c", "-q", "-f", str(good)).returncode == 0
    refused = copied("-c", "-f", str(bad))
    assert refused.returncode == 1
    assert "nonsense" in refused.stdout + refused.stderr


def test_the_copied_program_is_where_the_settings_look() -> None:
    pod = pod_of(overlay("dev").one("DaemonSet", "haproxy"))
    (first,) = pod["initContainers"]
    assert first["command"][-1] == str(FOLDER)
    haproxy, ingress = pod["containers"]
    assert first["image"] == haproxy["image"], "the very program that will read what was checked"
    assert {each["name"]: each["mountPath"] for each in ingress["volumeMounts"]} == {
        "run": SETTINGS["SHADOWSVC_INGRESS__DIRECTORY"],
        "program": str(FOLDER),
        "certificates": SETTINGS["SHADOWSVC_INGRESS__CERTIFICATE_DIRECTORY"],
        "token": "/var/run/secrets/kubernetes.io/serviceaccount",
    }
    assert f"-S {SETTINGS['SHADOWSVC_INGRESS__DIRECTORY']}/master.sock" in haproxy["command"][-1]
