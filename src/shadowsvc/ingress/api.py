"""EndpointSlices of one Service: listed once, then watched.

Lives here: the requests to the Kubernetes API, and how a watch is kept. lightkube knows where the
API is and how to log in (kubeconfig, or the pod's service account, whose token changes); httpx2,
which it is built on, carries the requests. The loop is ours: a watch that ends is resumed where it
was, one whose version has expired (410) is begun with a new list, bookmarks move the version along
when nothing happens, and whatever fails is tried again with full jitter. Rules: every wait has a
limit; what was known stays known while the API is away; the libraries' exceptions become
`KubernetesUnavailable` here and nowhere else. Must not come in: what is done about a change.
"""

from __future__ import annotations

import asyncio
import random
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import httpx2
import msgspec
import orjson
import structlog
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ConfigError as LightkubeConfigError
from lightkube.models.discovery_v1 import EndpointSlice

from shadowsvc.backoff import wait_seconds
from shadowsvc.errors import ConfigError, KubernetesUnavailable
from shadowsvc.ingress.model import Broker, brokers_of
from shadowsvc.settings import variable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from lightkube.config.kubeconfig import SingleConfig

    from shadowsvc.ingress.metrics import IngressMetrics
    from shadowsvc.settings import Ingress

__all__ = ["Slices", "connect"]

_REQUEST_SECONDS: Final = 10.0
_WATCH_SECONDS: Final = (90, 150)
"""How long one watch is; the server ends it. Nothing can be silent for longer."""
_GRACE_SECONDS: Final = 10.0
_LASTING_SECONDS: Final = 5.0
_RETRY_MIN_SECONDS: Final = 0.2
_RETRY_MAX_SECONDS: Final = 30.0
_PAGE: Final = 500
_MAX_SHOWN: Final = 300

_log = structlog.get_logger(__name__)


class _Expired(Exception):
    """The version is too old to watch from (410 Gone)."""


def connect(settings: Ingress) -> httpx2.AsyncClient:
    """Return a client that knows where the API is, whom to trust and how to log in.

    Raises:
        ConfigError: there is no kubeconfig, or no service account.
    """
    name = variable("ingress", "kubeconfig")
    try:
        if settings.kubeconfig is not None:
            found = KubeConfig.from_file(settings.kubeconfig).get()
        else:
            found = KubeConfig.from_service_account().get()
        params = ConnectionParams(timeout=httpx2.Timeout(_REQUEST_SECONDS), trust_env=False)
        return AsyncClient(_with_user(found), params)
    except (LightkubeConfigError, OSError, ValueError, msgspec.MsgspecError) as error:
        problem = str(error) or type(error).__name__
    except (KeyError, TypeError, AttributeError):
        problem = "it is not written as a kubeconfig"
    where = settings.kubeconfig or "this is no pod with a service account"
    raise ConfigError([f"{name}: {where}: {problem}; allowed: path of a kubeconfig file"])


def _with_user(found: SingleConfig | None) -> SingleConfig:
    if found is None or found.user is None:
        raise ValueError("it has no current context with a user")
    return found


class Slices:
    """The slices of the brokers' Service, and the brokers in them."""

    def __init__(
        self,
        settings: Ingress,
        client: httpx2.AsyncClient,
        metrics: IngressMetrics,
        on_change: Callable[[tuple[Broker, ...]], None],
        *,
        now: Callable[[], float],
    ) -> None:
        """Make it; `on_change` gets all brokers, at once after a list, then with each change."""
        self._address_type = settings.address_type
        self._client = client
        self._metrics = metrics
        self._on_change = on_change
        self._now = now
        self._path = f"apis/discovery.k8s.io/v1/namespaces/{settings.namespace}/endpointslices"
        self._selector = f"kubernetes.io/service-name={settings.service}"
        self._slices: dict[str, EndpointSlice] = {}
        self._version: str | None = None
        self._failures = 0

    async def list(self) -> tuple[Broker, ...]:
        """Ask for all slices once. Raises `KubernetesUnavailable`."""
        slices: dict[str, EndpointSlice] = {}
        params = {"labelSelector": self._selector, "limit": str(_PAGE)}
        while True:
            page = await self._get(params)
            try:
                for item in page.get("items") or ():
                    each = msgspec.convert(item, EndpointSlice)
                    slices[_name(each)] = each
                metadata = page["metadata"]
                version: str = metadata["resourceVersion"]
            except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
                raise KubernetesUnavailable("nonsense", f"a list without sense: {error}") from error
            if not metadata.get("continue"):
                break
            params["continue"] = metadata["continue"]
        self._slices, self._version = slices, version
        self._metrics.api_answered(self._now())
        self._metrics.lists += 1
        return brokers_of(slices.values(), self._address_type)

    async def run(self) -> NoReturn:
        """Keep the brokers known, for ever."""
        while True:
            try:
                if self._version is None:
                    self._on_change(await self.list())
                await self._watch(self._version)
            except _Expired:
                self._metrics.watches_expired += 1
                self._version = None
                _log.info("watch expired, listing anew")
                if self._failures == 0:
                    self._failures = 1  # the next one waits
                    continue
                await self._back_off()
            except KubernetesUnavailable as error:
                self._metrics.api_errors[error.reason] += 1
                self._metrics.api_failed(str(error))
                if self._failures == 0:
                    _log.warning("kubernetes api", reason=error.reason, error=str(error))
                await self._back_off()
            else:
                self._failures = 0

    async def _back_off(self) -> None:
        self._failures += 1
        await asyncio.sleep(wait_seconds(self._failures, _RETRY_MIN_SECONDS, _RETRY_MAX_SECONDS))

    async def _get(self, params: dict[str, str]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                response = await self._client.get(self._path, params=params)
        except (httpx2.HTTPError, LightkubeConfigError, OSError, TimeoutError) as error:
            raise _unavailable(error) from error
        if response.status_code != HTTPStatus.OK:
            raise _refusal(response.status_code, response.content)
        return _object(response.content)

    async def _watch(self, version: str | None) -> None:
        """Follow the changes from `version` on until the server ends the watch."""
        seconds = random.randint(*_WATCH_SECONDS)  # noqa: S311 - to spread the ends
        params = {
            "labelSelector": self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
            "resourceVersion": version or "",
        }
        timeout = httpx2.Timeout(_REQUEST_SECONDS, read=seconds + _GRACE_SECONDS)
        begun = self._now()
        try:
            async with (
                asyncio.timeout(seconds + _GRACE_SECONDS),
                self._client.stream("GET", self._path, params=params, timeout=timeout) as response,
            ):
                if response.status_code != HTTPStatus.OK:
                    raise _refusal(response.status_code, await response.aread())
                self._metrics.api_answered(self._now())
                async for line in response.aiter_lines():
                    if line:
                        self._take(_object(line.encode()))
        except (httpx2.HTTPError, LightkubeConfigError, OSError, TimeoutError) as error:
            raise _unavailable(error) from error
        if self._now() - begun < _LASTING_SECONDS:
            raise KubernetesUnavailable("watch_ended", "the watch ended at once")

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        thing = event.get("object")
        if not isinstance(kind, str) or not isinstance(thing, dict):
            raise KubernetesUnavailable("nonsense", "an event without sense")
        if kind == "ERROR":
            raise _refusal(int(thing.get("code") or 0), orjson.dumps(thing))
        try:
            each = msgspec.convert(thing, EndpointSlice)
        except (msgspec.MsgspecError, TypeError) as error:
            raise KubernetesUnavailable("nonsense", f"a slice without sense: {error}") from error
        if each.metadata is not None and each.metadata.resourceVersion:
            self._version = each.metadata.resourceVersion
        self._failures = 0
        self._metrics.api_answered(self._now())
        self._metrics.events[kind.lower() if kind in _KINDS else "other"] += 1
        if kind in {"ADDED", "MODIFIED"}:
            self._slices[_name(each)] = each
        elif kind == "DELETED":
            self._slices.pop(_name(each), None)
        else:
            return
        self._on_change(brokers_of(self._slices.values(), self._address_type))


_KINDS = frozenset({"ADDED", "MODIFIED", "DELETED", "BOOKMARK"})


def _name(each: EndpointSlice) -> str:
    return (each.metadata.name if each.metadata is not None else None) or ""


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise KubernetesUnavailable("nonsense", f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise KubernetesUnavailable("nonsense", "no JSON object")
    return found


def _refusal(status: int, body: bytes) -> Exception:
    if status == HTTPStatus.GONE:
        return _Expired()
    try:
        said = str(orjson.loads(body).get("message") or "")
    except (orjson.JSONDecodeError, AttributeError):
        said = ""
    reason = {
        HTTPStatus.UNAUTHORIZED: "unauthorized",
        HTTPStatus.FORBIDDEN: "forbidden",
        HTTPStatus.TOO_MANY_REQUESTS: "too_many_requests",
    }.get(status, "refused")  # type: ignore[call-overload]
    if reason == "forbidden":
        said += " (the service account needs get, list and watch of endpointslices)"
    return KubernetesUnavailable(reason, f"status {status}: {said[:_MAX_SHOWN]}".rstrip(": "))


def _unavailable(error: BaseException) -> KubernetesUnavailable:
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        reason = "timeout"
    elif isinstance(error, httpx2.ConnectError):
        reason = "connect"
    else:
        reason = "network"
    return KubernetesUnavailable(reason, (str(error) or type(error).__name__)[:_MAX_SHOWN])
