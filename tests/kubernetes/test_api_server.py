"""Every object of both overlays before a real API server. Needs kubectl and KUBECONFIG.

The server looks at each object as if it were applied (dry run). Namespaces are made for real, with
names of their own, since nothing can be looked at in a namespace that is not there.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.kubernetes.kubectl import attempt, kubectl, render, require_api
from tests.kubernetes.manifests import K8S, OVERLAYS, overlay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

OPERATORS = {"monitoring.coreos.com/v1": "the Prometheus operator", "keda.sh/v1alpha1": "KEDA"}
"""Kinds of operators, that a server knows only with their definitions."""


@pytest.fixture(autouse=True)
def _an_api() -> None:
    require_api()


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"t{uuid.uuid4().hex[:8]}-"
    yield name
    found = kubectl("get", "namespaces", "-o", "name").split()
    ours = [each for each in found if each.startswith(f"namespace/{name}")]
    if ours:
        kubectl("delete", "--wait=false", *ours)


def moved(each: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Put an object into the namespace of this test."""
    metadata = each["metadata"]
    if each["kind"] == "Namespace":
        metadata["name"] = prefix + metadata["name"]
    else:
        metadata["namespace"] = prefix + metadata["namespace"]
    return each


def dry_run(objects: list[dict[str, Any]], prefix: str) -> str:
    """Let the server look at all; return its words. Fails the test when one is refused."""
    for each in objects:
        moved(each, prefix)
    namespaces = [each for each in objects if each["kind"] == "Namespace"]
    others = [each for each in objects if each["kind"] != "Namespace"]
    kubectl("apply", "--server-side", "-f", "-", given=yaml.safe_dump_all(namespaces))
    done = attempt(
        "apply",
        "--server-side",
        "--dry-run=server",
        "--field-manager=shadowsvc-tests",
        "-f",
        "-",
        given=yaml.safe_dump_all(others),
        limit_seconds=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("serverside-applied") == len(others), done.stdout
    return done.stderr


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_takes_every_object(name: str, prefix: str) -> None:
    objects = render(K8S / "overlays" / name)
    known = [each for each in objects if each["apiVersion"] not in OPERATORS]
    left_out = [each for each in objects if each["apiVersion"] in OPERATORS]
    print(f"left out: {[(each['kind'], each['metadata']['name']) for each in left_out]}")  # noqa: T201 - shown by -s
    assert len(known) >= 30
    said = dry_run(known, prefix)
    # It warns of pods that break the namespace's standard, and of fields that nobody reads.
    assert "Warning" not in said, said


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_that_may_do_more_is_refused(name: str, prefix: str) -> None:
    """The standard of the namespace is there: what breaks it is noticed by the test above."""
    objects = [
        each
        for each in render(K8S / "overlays" / name)
        if each["kind"] in {"Namespace", "Deployment"} and each["metadata"]["name"] == "shadowsvc"
    ]
    (workload,) = (each for each in objects if each["kind"] == "Deployment")
    workload["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"] = {}
    assert 'would violate PodSecurity "restricted' in dry_run(objects, prefix)


@pytest.mark.parametrize(
    ("account", "home", "allowed"),
    [
        ("ingress", "shadowsvc-ingress", {"endpointslices.discovery.k8s.io": "get list watch"}),
        ("vernemq", "shadowsvc", {"pods": "get list", "statefulsets.apps": "get"}),
        ("shadowsvc", "shadowsvc", {}),
    ],
)
def test_an_account_may_do_what_it_needs_and_no_more(
    account: str, home: str, allowed: dict[str, str], prefix: str
) -> None:
    kinds = {"Namespace", "Role", "RoleBinding"}
    objects = [each for each in render(K8S / "overlays" / "production") if each["kind"] in kinds]
    for each in objects:
        moved(each, prefix)
        for subject in each.get("subjects", ()):
            subject["namespace"] = prefix + subject["namespace"]
    kubectl("apply", "--server-side", "-f", "-", given=yaml.safe_dump_all(objects))
    asked = ("endpointslices.discovery.k8s.io", "pods", "statefulsets.apps", "secrets")
    for resource in asked:
        for verb in ("get", "list", "watch", "delete"):
            said = attempt(
                "auth", "can-i", verb, resource, f"--namespace={prefix}shadowsvc",
                f"--as=system:serviceaccount:{prefix}{home}:{account}",
            )  # fmt: skip
            wanted = "yes" if verb in allowed.get(resource, "").split() else "no"
            assert said.stdout.split()[0] == wanted, (
                f"{verb} {resource}: {said.stdout}{said.stderr}"
            )


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_reader_of_the_other_tests_agrees_with_kustomize(name: str) -> None:
    rendered = render(K8S / "overlays" / name)
    read = overlay(name)

    def names(objects: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
        return {
            (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"])
            for each in objects
            if each["kind"] not in {"ConfigMap", "PodMonitor", "PrometheusRule"}
        }

    assert names(rendered) == names(read.objects)
    for (namespace, wanted), data in read.config_maps.items():
        (found,) = (
            each["data"]
            for each in rendered
            if each["kind"] == "ConfigMap"
            and each["metadata"].get("namespace") == namespace
            and each["metadata"]["name"].rpartition("-")[0] == wanted
        )
        assert found == data, wanted
    for workload in (each for each in rendered if each["kind"] in {"Deployment", "DaemonSet"}):
        mine = read.one(workload["kind"], workload["metadata"]["name"])
        assert workload["spec"].get("replicas") == mine["spec"].get("replicas")


def test_every_component_is_of_use_with_the_overlays(tmp_path: Path, prefix: str) -> None:
    """Those that no overlay takes: autoscaling."""
    overlay_file = tmp_path / "kustomization.yaml"
    relative = os.path.relpath(K8S, tmp_path)
    overlay_file.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"{relative}/overlays/production"],
                "components": [f"{relative}/components/keda"],
            }
        )
    )
    objects = render(tmp_path)
    (scaled,) = (each for each in objects if each["kind"] == "Deployment")
    assert "replicas" not in scaled["spec"]
    assert [each["kind"] for each in objects].count("ScaledObject") == 1
    dry_run([each for each in objects if each["apiVersion"] not in OPERATORS], prefix)
