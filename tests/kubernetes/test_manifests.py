"""What every manifest has to have, read without a cluster."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from shadowsvc.config import load, require_for_run
from tests.kubernetes.manifests import (
    K8S,
    OVERLAYS,
    WORKLOADS,
    containers,
    overlay,
    pod_of,
    pods,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shadowsvc.config import Settings

PODS = pods()
EACH_POD = pytest.mark.parametrize(
    ("name", "workload"),
    [(name, workload) for name, _, workload in PODS],
    ids=[f"{name}-{what}" for name, what, _ in PODS],
)
EACH_OVERLAY = pytest.mark.parametrize("name", OVERLAYS)

WRITES_ITS_ROOT = {"vernemq", "cassandra"}
"""Images whose start script writes its configuration beside the program."""
TOKENS = {"vernemq", "prometheus"}
"""Who asks the Kubernetes API with a token that is mounted by itself."""
OURS = re.compile(r"shadowsvc:")


def name_of(thing: dict[str, Any]) -> str:
    name: str = thing["metadata"]["name"]
    return name


def settings_of(name: str, folder: Path, *which: *tuple[str, str]) -> Settings:
    """Load the settings of a ConfigMap as the pod would."""
    given = dict(overlay(name).config_maps[which])
    authority = "SHADOWSVC_CASSANDRA__CA_FILE"
    if authority in given:  # of a ConfigMap that is not in the repository: some file
        file = folder / "ca.crt"
        file.write_text("-")
        given[authority] = str(file)
    return load(given, needs=require_for_run if which[1] == "shadowsvc" else None)


def security(workload: dict[str, Any], container: dict[str, Any]) -> dict[str, Any]:
    return {**pod_of(workload).get("securityContext", {}), **container["securityContext"]}


def references(pod: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield kind, name and whether it may be missing, of all that a pod takes from the API."""
    for volume in pod.get("volumes", ()):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"], volume["secret"].get("optional", False)
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], False
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        for source in container.get("envFrom", ()):
            kind = "Secret" if "secretRef" in source else "ConfigMap"
            yield kind, next(iter(source.values()))["name"], False
        for variable in container.get("env", ()):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                yield "Secret", reference["name"], False


@EACH_POD
def test_every_image_is_pinned(name: str, workload: dict[str, Any]) -> None:
    for container in containers(workload):
        image, _, tag = container["image"].rpartition(":")
        assert image, f"{name}: {container['image']} has no version"
        assert re.match(r"v?\d", tag), f"{name}: {container['image']}"
        assert container["imagePullPolicy"] == "IfNotPresent"


@EACH_POD
def test_every_container_has_requests_and_limits(name: str, workload: dict[str, Any]) -> None:
    for container in containers(workload):
        for kind in ("requests", "limits"):
            assert set(container["resources"][kind]) >= {"cpu", "memory"}, (name, container["name"])


@EACH_POD
def test_every_container_may_do_as_little_as_possible(name: str, workload: dict[str, Any]) -> None:
    pod = pod_of(workload)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
    for container in containers(workload):
        context = security(workload, container)
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        if container["name"] == "haproxy":  # low ports of the node; a namespace of its own
            assert context["capabilities"]["add"] == ["NET_BIND_SERVICE"]
            assert workload["metadata"]["namespace"] == "shadowsvc-ingress"
        else:
            assert "add" not in context["capabilities"]
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] > 0
        assert context["readOnlyRootFilesystem"] is (container["name"] not in WRITES_ITS_ROOT)
        if OURS.match(container["image"]):
            assert context["runAsUser"] == 10001, "the image's user, see Dockerfile"


@EACH_POD
def test_no_pod_has_a_token_that_it_does_not_need(name: str, workload: dict[str, Any]) -> None:
    assert pod_of(workload)["automountServiceAccountToken"] is (name_of(workload) in TOKENS), name
    assert pod_of(workload)["enableServiceLinks"] is False


@EACH_POD
def test_what_runs_for_ever_is_probed_at_a_named_port(name: str, workload: dict[str, Any]) -> None:
    if workload["kind"] == "Job":
        assert pod_of(workload)["restartPolicy"] == "OnFailure", name
        return
    for container in pod_of(workload)["containers"]:
        ports = [port["name"] for port in container["ports"]]
        assert len(set(ports)) == len(ports)
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[kind]
            how = probe.get("httpGet") or probe["tcpSocket"]
            assert how["port"] in ports, f"{container['name']}: {kind}"
        if OURS.match(container["image"]):
            asked = {
                kind: container[kind]["httpGet"]["path"] for kind in container if "Probe" in kind
            }
            assert asked == {
                "startupProbe": "/startupz",
                "livenessProbe": "/livez",
                "readinessProbe": "/readyz",
            }


@EACH_POD
def test_a_workload_selects_its_own_pods(name: str, workload: dict[str, Any]) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == name_of(workload), name
    if workload["kind"] == "Job":
        return
    selector = workload["spec"]["selector"]["matchLabels"]
    assert selector.items() <= labels.items()
    for rule in pod_of(workload).get("topologySpreadConstraints", ()):
        assert rule["labelSelector"]["matchLabels"].items() <= labels.items()


@EACH_OVERLAY
def test_services_budgets_and_policies_select_pods_that_exist(name: str) -> None:
    made = overlay(name)
    templates = [
        (each["metadata"]["namespace"], each["spec"]["template"]) for each in made.of(*WORKLOADS)
    ]
    for service in made.of("Service"):
        selected = [
            template
            for namespace, template in templates
            if namespace == service["metadata"]["namespace"]
            and service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        ]
        (template,) = selected
        named = {
            port["name"]
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
        }
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in named, (name_of(service), port)
    for budget in made.of("PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"]
        assert any(wanted.items() <= each["metadata"]["labels"].items() for _, each in templates)
    for stateful in made.of("StatefulSet"):
        made.one("Service", stateful["spec"]["serviceName"])


@EACH_OVERLAY
def test_named_ports_of_a_policy_are_ports_of_its_pods(name: str) -> None:
    made = overlay(name)
    for policy in made.of("NetworkPolicy"):
        wanted = policy["spec"]["podSelector"].get("matchLabels", {})
        if not wanted:
            continue
        ports = {
            port["name"]: port["containerPort"]
            for workload in made.of(*WORKLOADS)
            if wanted.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
            for container in pod_of(workload)["containers"]
            for port in container.get("ports", ())
        }
        for rule in policy["spec"].get("ingress", ()):
            for port in rule.get("ports", ()):
                if ports and isinstance(port["port"], str):
                    assert port["port"] in ports, (name_of(policy), port)


@EACH_OVERLAY
def test_every_namespace_denies_by_default_and_says_its_standard(name: str) -> None:
    made = overlay(name)
    standards = {
        name_of(each): each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for each in made.of("Namespace")
    }
    assert standards.pop("shadowsvc-ingress") == "privileged"
    assert set(standards.values()) == {"restricted"}
    denied = {
        each["metadata"]["namespace"]
        for each in made.of("NetworkPolicy")
        if each["spec"]["podSelector"] == {}
        and set(each["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and "ingress" not in each["spec"]
        and "egress" not in each["spec"]
    }
    assert denied == {*standards, "shadowsvc-ingress"}
    for each in made.objects:
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] in denied, name_of(each)


@EACH_OVERLAY
def test_a_drain_ends_before_the_pod_is_killed(name: str) -> None:
    made = overlay(name)
    settings = made.config_maps["shadowsvc", "shadowsvc"]
    drain = float(settings["SHADOWSVC_LIMITS__DRAIN_TIMEOUT_SECONDS"])
    grace = pod_of(made.one("Deployment", "shadowsvc"))["terminationGracePeriodSeconds"]
    assert grace >= drain + 10


@EACH_OVERLAY
def test_the_listeners_lease_their_client_ids(name: str) -> None:
    made = overlay(name)
    assert "SHADOWSVC_MQTT__CLIENT_ID" not in made.config_maps["shadowsvc", "shadowsvc"]
    (container,) = pod_of(made.one("Deployment", "shadowsvc"))["containers"]
    assert [each["name"] for each in container["env"]] == ["SHADOWSVC_SECRETS_DIR"]
    rolling = made.one("Deployment", "shadowsvc")["spec"]["strategy"]["rollingUpdate"]
    assert rolling["maxUnavailable"] == 0, "a new pod comes before an old one goes"


@EACH_OVERLAY
@pytest.mark.parametrize("which", [("shadowsvc", "shadowsvc"), ("shadowsvc-ingress", "ingress")])
def test_the_settings_are_those_of_the_service(
    name: str, which: tuple[str, str], tmp_path: Path
) -> None:
    settings_of(name, tmp_path, *which)  # raises for a name that is no setting, or a bad value


@EACH_OVERLAY
def test_what_the_ingress_asks_for_is_what_the_broker_offers(name: str) -> None:
    made = overlay(name)
    given = load(made.config_maps["shadowsvc-ingress", "ingress"]).ingress
    service = made.one("Service", given.service)
    assert service["metadata"]["namespace"] == given.namespace
    assert not service["spec"].get("publishNotReadyAddresses"), "only pods that are ready"
    offered = {port["name"] for port in service["spec"]["ports"]}
    assert offered == {*given.mqtt_ports, *given.websocket_ports}
    role = next(each for each in made.of("Role") if name_of(each) == "ingress")
    assert role["metadata"]["namespace"] == given.namespace
    assert role["rules"] == [
        {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["get", "list", "watch"],
        }
    ]
    haproxy, ingress = pod_of(made.one("DaemonSet", "haproxy"))["containers"]
    ports = {port["name"]: port["containerPort"] for port in haproxy["ports"]}
    assert ports == {
        "mqtt": given.listen_mqtt,
        "mqtts": given.listen_mqtts,
        "websocket": given.listen_websocket,
        "websocket-tls": given.listen_websocket_tls,
        "statistics": given.listen_statistics,
    }
    settings = load(made.config_maps["shadowsvc-ingress", "ingress"])
    assert ingress["ports"][0]["containerPort"] == settings.http.port


@EACH_OVERLAY
def test_the_broker_of_the_settings_is_there_and_reached_by_name(name: str, tmp_path: Path) -> None:
    made = overlay(name)
    settings = settings_of(name, tmp_path, "shadowsvc", "shadowsvc")
    host, port = settings.mqtt.url.removeprefix("mqtt://").split(":")
    service = made.one("Service", host)
    assert int(port) in {each["port"] for each in service["spec"]["ports"]}


@EACH_POD
def test_what_a_pod_refers_to_exists_or_is_documented(name: str, workload: dict[str, Any]) -> None:
    made = overlay(name)
    namespace = workload["metadata"]["namespace"]
    read_me = (K8S / "README.md").read_text()
    section = read_me[read_me.index(f"| In `{namespace}` |") :] if "secret" in str(workload) else ""
    for kind, what, _ in references(pod_of(workload)):
        generated = kind == "ConfigMap" and (namespace, what) in made.config_maps
        assert generated or f"| {kind} `{what}` |" in section, f"{kind} {what}"


def test_no_secret_is_in_the_repository() -> None:
    for file in K8S.rglob("*"):
        if file.suffix in {".yaml", ".env", ".conf", ".acl"}:
            text = file.read_text()
            assert not re.search(r"^kind: Secret$|secretGenerator|PRIVATE KEY", text, re.MULTILINE)
            assert not re.search(r"PASSWORD=|_USER_|COOKIE=", text), file
            if file.suffix == ".yaml":
                list(yaml.safe_load_all(text))


@EACH_OVERLAY
def test_erlang_has_as_many_schedulers_as_the_pod_has_processors(name: str) -> None:
    made = overlay(name)
    if ("shadowsvc", "vernemq") not in made.config_maps:
        assert name == "dev"
        return
    settings = made.config_maps["shadowsvc", "vernemq"]
    flags = dict(re.findall(r"\+(\S+) (\S+)", settings["ERL_ZFLAGS"]))
    (container,) = pod_of(made.one("StatefulSet", "vernemq"))["containers"]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert limits == requests
    assert flags["S"] == f"{int(limits['cpu'])}:{int(limits['cpu'])}"
    listeners = {
        key: value
        for key, value in settings.items()
        if re.fullmatch(r"DOCKER_VERNEMQ_LISTENER__(TCP|WS)__(MQTT|WS)_\d", key)
    }
    connections = len(listeners) * int(settings["DOCKER_VERNEMQ_LISTENER__MAX_CONNECTIONS"])
    assert int(flags["P"]) >= 2 * connections
    assert int(flags["Q"]) >= connections
    ports = {port["containerPort"] for port in container["ports"]}
    assert {int(value.rpartition(":")[2]) for value in listeners.values()} <= ports


def test_the_broker_is_set_as_the_guarantees_need_it() -> None:
    settings = overlay("production").config_maps["shadowsvc", "vernemq"]
    wanted = {
        "MAX_ONLINE_MESSAGES": "-1",
        "MAX_OFFLINE_MESSAGES": "-1",
        "OVERRIDE_MAX_ONLINE_MESSAGES": "on",
        "SHARED_SUBSCRIPTION_POLICY": "prefer_online_before_local",
        "UPGRADE_OUTGOING_QOS": "on",
        "ALLOW_REGISTER_DURING_NETSPLIT": "on",
        "ALLOW_PUBLISH_DURING_NETSPLIT": "on",
        "ALLOW_SUBSCRIBE_DURING_NETSPLIT": "on",
        "ALLOW_UNSUBSCRIBE_DURING_NETSPLIT": "on",
        "ALLOW_ANONYMOUS": "off",
    }
    for key, value in wanted.items():
        assert settings[f"DOCKER_VERNEMQ_{key}"] == value, key


@EACH_OVERLAY
def test_broker_and_ingress_agree_on_the_proxy_protocol(name: str) -> None:
    made = overlay(name)
    sent = load(made.config_maps["shadowsvc-ingress", "ingress"]).ingress.proxy_protocol
    settings = made.config_maps.get(("shadowsvc", "vernemq"))
    if settings is None:
        assert sent == "off", "mosquitto 2.0 does not know it"
        return
    assert sent != "off"
    for kind in ("TCP__MQTT", "WS__WS"):
        for number in range(4):
            assert settings[f"DOCKER_VERNEMQ_LISTENER__{kind}_{number}__PROXY_PROTOCOL"] == "on"


def test_the_listeners_may_never_be_none() -> None:
    scaled = yaml.safe_load((K8S / "components/keda/scaled-object.yaml").read_text())["spec"]
    most = load({}).slots.max_slots
    assert 1 < scaled["minReplicaCount"] <= scaled["fallback"]["replicas"]
    assert scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"] < most
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    orphan = load({}).slots.orphan_after_seconds
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] > 2 * orphan
