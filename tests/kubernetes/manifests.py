"""The manifests in deploy/k8s as values, read without a cluster and without kubectl.

Lives here: the walk through kustomizations that an overlay names, its objects with the overlay's
patches on paths, and its generated ConfigMaps. Rules: knows as much of kustomize as these manifests
use, and refuses the rest; `test_api_server` compares the outcome with kubectl's. Must not come in:
assertions about the manifests.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["K8S", "OVERLAYS", "WORKLOADS", "Overlay", "containers", "overlay", "pod_of", "pods"]

K8S = Path(__file__).parents[2] / "deploy" / "k8s"
OVERLAYS = sorted(each.parent.name for each in K8S.glob("overlays/*/kustomization.yaml"))
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")
_KNOWN = frozenset(
    {
        "apiVersion", "kind", "resources", "components", "configMapGenerator", "patches", "labels",
        "generatorOptions",
    }
)  # fmt: skip

Object = dict[str, Any]


@dataclass
class Overlay:
    """What one overlay makes."""

    objects: list[Object] = field(default_factory=list)
    config_maps: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    """By namespace and name."""

    def of(self, *kinds: str) -> list[Object]:
        """Return the objects of these kinds."""
        return [each for each in self.objects if each["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        """Return the one object of this kind and name."""
        (found,) = (each for each in self.of(kind) if each["metadata"]["name"] == name)
        return found


@cache
def overlay(name: str) -> Overlay:
    """Read one overlay."""
    made = Overlay()
    _walk(K8S / "overlays" / name, made)
    return made


def pod_of(workload: Object) -> Object:
    """Return the pod's specification."""
    pod: Object = workload["spec"]["template"]["spec"]
    return pod


def containers(workload: Object) -> list[Object]:
    """Return all containers of a workload, those at its start too."""
    pod = pod_of(workload)
    return [*pod.get("initContainers", ()), *pod["containers"]]


def pods(*overlays: str) -> list[tuple[str, str, Object]]:
    """Return every workload: overlay, `Kind/name`, object."""
    return [
        (each, f"{workload['kind']}/{workload['metadata']['name']}", workload)
        for each in overlays or OVERLAYS
        for workload in overlay(each).of(*WORKLOADS)
    ]


def _walk(folder: Path, made: Overlay) -> None:
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(said) - _KNOWN
    assert not unknown, f"{folder}: this reader does not know {unknown}"
    for entry in said.get("resources", ()):
        if (folder / entry).is_dir():
            _walk(folder / entry, made)
        else:
            found = yaml.safe_load_all((folder / entry).read_text())
            made.objects.extend(each for each in found if each)
    for entry in said.get("components", ()):
        _walk(folder / entry, made)
    for entry in said.get("configMapGenerator", ()):
        _config_map(folder, entry, made)
    for entry in said.get("patches", ()):
        _patch(entry, made)


def _config_map(folder: Path, entry: Object, made: Overlay) -> None:
    key = (entry["namespace"], entry["name"])
    data = made.config_maps.setdefault(key, {})
    if entry.get("behavior") == "merge":
        assert data, f"{folder}: {key} is merged before it is made"
    else:
        assert not data, f"{folder}: {key} is made twice"
    for file in entry.get("envs", ()):
        lines = (folder / file).read_text().splitlines()
        data.update(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    data.update(line.split("=", 1) for line in entry.get("literals", ()))
    for file in entry.get("files", ()):
        data[Path(file).name] = (folder / file).read_text()


def _patch(entry: Object, made: Overlay) -> None:
    target = entry["target"]
    (index,) = (
        number
        for number, each in enumerate(made.objects)
        if each["kind"] == target["kind"]
        and each["metadata"]["name"] == target["name"]
        and each["metadata"].get("namespace") == target["namespace"]
    )
    # Read anew for each overlay, but let no patch reach into what another object shares by a link.
    found = made.objects[index] = copy.deepcopy(made.objects[index])
    for step in yaml.safe_load(entry["patch"]):
        *path, last = step["path"].strip("/").split("/")
        at: Any = found
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at[part]
        if step["op"] == "remove":
            del at[last]
        elif last == "-":
            at.append(step["value"])
        else:
            assert step["op"] == "replace" or last not in at, step
            at[last] = step["value"]
