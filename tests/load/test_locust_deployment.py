"""Manifests, compose profile and image of the rig with Locust, read without a cluster or an engine.

The rules are those of all manifests (`tests/kubernetes`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from configargparse import ArgumentParser

from load.endpoints import Endpoint
from load.locust.arguments import add_arguments
from tests.kubernetes import test_manifests as rules
from tests.kubernetes.manifests import K8S, Overlay, _walk, pod_of

ROOT = Path(__file__).parents[2]
FOLDER = K8S / "components" / "load"
WORKLOADS = ("load", "load-worker")


def component() -> Overlay:
    made = Overlay()
    _walk(FOLDER, made)
    return made


MADE = component()
EACH = pytest.mark.parametrize("workload", WORKLOADS)


def known_variables() -> set[str]:
    parser = ArgumentParser()
    add_arguments(parser)
    return {str(getattr(each, "env_var", None)) for each in parser._actions}


@pytest.fixture
def as_overlay(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(rules, "overlay", lambda _: MADE)
    return "load"


@EACH
def test_a_pod_of_the_rig_keeps_the_rules_of_all_pods(workload: str) -> None:
    found = MADE.one("Deployment", workload)
    rules.test_every_image_is_pinned("load", found)
    rules.test_every_container_has_requests_and_limits("load", found)
    rules.test_every_container_may_do_as_little_as_possible("load", found)
    rules.test_no_pod_has_a_token_that_it_does_not_need("load", found)
    rules.test_a_workload_selects_its_own_pods("load", found)
    context = pod_of(found)["securityContext"]
    assert context["runAsUser"] == 10001, "the image's user, see load/Dockerfile"
    # What Pod Security's `restricted` allows of sysctls, since Kubernetes 1.22.
    assert {each["name"] for each in context.get("sysctls", ())} <= {"net.ipv4.ip_local_port_range"}


def test_the_master_is_probed_and_reached_by_its_workers(as_overlay: str) -> None:
    master, worker = (MADE.one("Deployment", each) for each in WORKLOADS)
    rules.test_what_runs_for_ever_is_probed_at_a_named_port("load", master)
    rules.test_services_budgets_and_policies_select_pods_that_exist(as_overlay)
    rules.test_named_ports_of_a_policy_are_ports_of_its_pods(as_overlay)
    assert master["spec"]["replicas"] == 1, "a second one would have no workers"
    arguments = pod_of(worker)["containers"][0]["args"]
    service = MADE.one("Service", arguments[arguments.index("--master-host") + 1])
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {"workers": 5557, "web": 8089}, "Locust's own ports"


def test_the_namespace_is_restricted_and_denies_by_default() -> None:
    (namespace,) = MADE.of("Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    (deny,) = (each for each in MADE.of("NetworkPolicy") if each["spec"]["podSelector"] == {}
               and len(each["spec"]["policyTypes"]) == 2)  # fmt: skip
    assert "ingress" not in deny["spec"]
    assert "egress" not in deny["spec"]
    for each in MADE.objects:
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == namespace["metadata"]["name"]


def test_settings_are_options_of_the_rig() -> None:
    settings = MADE.config_maps["shadowsvc-load", "load"]
    text = (FOLDER / "settings.env").read_text()
    names = {*settings, *re.findall(r"^#(LOAD_\w+)=", text, re.MULTILINE)}
    assert {"LOCUST_HOST", "LOAD_PASSWORDS"} <= names
    assert names - {"LOCUST_HOST"} <= known_variables()
    assert Endpoint.parse(settings["LOCUST_HOST"]).path == "/mqtt"


@EACH
def test_what_a_pod_mounts_exists_or_is_documented(workload: str) -> None:
    read_me = (ROOT / "load" / "README.md").read_text()
    for kind, what, optional in rules.references(pod_of(MADE.one("Deployment", workload))):
        if kind == "ConfigMap":
            assert ("shadowsvc-load", what) in MADE.config_maps
        else:
            assert optional
            assert what in read_me


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


@EACH
def test_the_compose_profile_is_the_same_image_and_may_do_as_little(workload: str) -> None:
    service = compose()[workload]
    assert service["profiles"] == ["load"]
    assert service["build"] == {"context": ".", "dockerfile": "load/Dockerfile"}
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:")
    assert set(service["environment"]) - {"LOCUST_HOST"} <= known_variables()
    kubernetes = pod_of(MADE.one("Deployment", workload))["containers"][0]
    assert service["command"] == kubernetes["args"]
    image = kubernetes["image"].partition(":")[0]
    assert f"{image}:" in service["image"]
    assert f"docker build -t {image}:" in (ROOT / "load" / "Dockerfile").read_text()


def test_the_image_has_what_is_copied_and_locust_is_in_no_other() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in (ROOT / "load" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            source = line.split()[1]
            assert f"!{source}" in ignored or f"!{source}/" in ignored, source
    locked = {
        name: (ROOT / name).read_text() for name in ("requirements.txt", "requirements-load.txt")
    }
    assert not re.search(r"^(locust|gevent)==", locked["requirements.txt"], re.MULTILINE)
    assert re.search(r"^locust==", locked["requirements-load.txt"], re.MULTILINE)
    # What it shares with the service has the same version.
    versions = [
        dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE)) for text in locked.values()
    ]
    service, rig = versions
    shared = service.keys() & rig.keys()
    assert {"mqtt5", "orjson", "uvloop", "pydantic"} <= shared
    assert {name: rig[name] for name in shared} == {name: service[name] for name in shared}


@pytest.mark.kubernetes
@pytest.mark.timeout(300)
def test_the_server_takes_every_object(tmp_path: Path) -> None:
    from tests.kubernetes import test_api_server as server
    from tests.kubernetes.kubectl import kubectl, render, require_api

    require_api()
    where = os.path.relpath(FOLDER, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        f"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\ncomponents: [{where}]\n"
    )
    objects = render(tmp_path)
    assert len(objects) == len(MADE.objects) + 1, "and the ConfigMap"
    prefix = f"t{os.getpid()}-"
    try:
        said = server.dry_run(objects, prefix)
        assert "Warning" not in said, said
    finally:
        kubectl("delete", "--wait=false", "namespace", f"{prefix}shadowsvc-load")
