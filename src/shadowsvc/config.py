"""Where settings come from, and what is wrong with them.

Lives here: reading the environment, secret files and the settings file into the tree of
`shadowsvc.settings`, and the words for what is wrong. Rules: every mistake is found in one go and
is one line that names the variable to change, what was given (never a secret) and what is allowed.
The environment beats secret files, they beat the settings file, it beats the defaults; an empty
variable counts as not given. Must not come in: the settings themselves (`shadowsvc.settings`) and
the rules between them (`shadowsvc.config_rules`).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import SecretStr, ValidationError

from shadowsvc.config_rules import (
    adopted_receive_maximum,
    advice,
    broken_rules,
    reason,
    require_for_run,
    worst_case_held_bytes,
)
from shadowsvc.errors import ConfigError
from shadowsvc.settings import (
    LAYERS,
    PREFIX,
    Canary,
    Cassandra,
    DeadLetters,
    Http,
    Ingress,
    Limits,
    Log,
    Mqtt,
    Setting,
    Settings,
    Shadow,
    Slots,
    all_settings,
    variable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Needs = Callable[[Settings], list[str]]

__all__ = [
    "CONFIG_FILE_VARIABLE",
    "SECRETS_DIR_VARIABLE",
    "Canary",
    "Cassandra",
    "DeadLetters",
    "Described",
    "Http",
    "Ingress",
    "Limits",
    "Loaded",
    "Log",
    "Mqtt",
    "Settings",
    "Shadow",
    "Slots",
    "adopted_receive_maximum",
    "advice",
    "describe",
    "load",
    "load_with_origins",
    "read_secrets",
    "require_for_run",
    "worst_case_held_bytes",
]

CONFIG_FILE_VARIABLE = f"{PREFIX}CONFIG_FILE"
SECRETS_DIR_VARIABLE = f"{PREFIX}SECRETS_DIR"
_MAX_SECRET_BYTES = 65_536
_MAX_SHOWN = 80
_HIDDEN = "****"

_KNOWN: dict[str, Setting] = {setting.variable: setting for setting in all_settings()}
_NOT_OURS = re.compile(rf"{PREFIX}(BACKING\w*|PYTHON|CONFIG_FILE|SECRETS_DIR)")
# Kubernetes sets such variables in every pod for every Service of the namespace, so a Service
# called shadowsvc or shadowsvc-metrics must not stop the pod.
_KUBERNETES = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


class _Value(NamedTuple):
    given: Any
    origin: str


class Loaded(NamedTuple):
    """The settings, and for each that is not a default where it came from, by variable."""

    settings: Settings
    origins: Mapping[str, str]


class Described(NamedTuple):
    """One effective setting, for people."""

    variable: str
    value: str
    origin: str


def load(
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
    *,
    needs: Needs | None = None,
) -> Settings:
    """Read the settings from `environ` (by default the process's) and a TOML file.

    The file is by default what `SHADOWSVC_CONFIG_FILE` names, if anything. `needs` returns lines
    for what is missing besides, as `require_for_run`. Raises `ConfigError` with one line for each
    mistake.
    """
    return load_with_origins(environ, config_file, needs=needs).settings


def load_with_origins(
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
    *,
    needs: Needs | None = None,
) -> Loaded:
    """Read the settings as `load` does, and remember where each came from."""
    environ = os.environ if environ is None else environ
    if config_file is None and environ.get(CONFIG_FILE_VARIABLE):
        config_file = Path(environ[CONFIG_FILE_VARIABLE])
    mistakes: list[str] = []
    layers = [
        _environment(environ, mistakes),
        _secret_files(environ, mistakes),
        _secrets_dir(environ, mistakes),
        _settings_file(config_file, mistakes),
    ]
    values: dict[str, _Value] = {}
    for layer in layers:
        for name, value in layer.items():
            values.setdefault(name, value)

    faulty: set[str] = set()
    try:
        settings = _build(layers)
    except ValidationError as error:
        found = _explain(error, values)
        faulty.update(found)
        mistakes.extend(found.values())
        # With defaults in place of what is wrong, the rules between settings still get their say.
        settings = _build([_without(layer, faulty) for layer in layers])
    mistakes.extend(
        _line(rule.variable, values, rule.problem)
        for rule in broken_rules(settings)
        if not faulty.intersection((rule.variable, *rule.others))
    )
    if needs is not None:
        mistakes.extend(line for line in needs(settings) if line.partition(":")[0] not in faulty)
    if mistakes:
        raise ConfigError(mistakes)
    return Loaded(settings, {name: value.origin for name, value in values.items()})


def read_secrets(environ: Mapping[str, str], section: str) -> dict[str, str]:
    """Return the secrets of a section that files hold now, by name of the setting.

    Those that the environment itself gives, and so cannot change, are left out. Raises
    `ConfigError` with one line for each file that cannot be read.
    """
    mistakes: list[str] = []
    found: dict[str, str] = {}
    for layer in (_secret_files(environ, mistakes), _secrets_dir(environ, mistakes)):
        for name, value in layer.items():
            if not environ.get(name) and _KNOWN[name].section == section:
                found.setdefault(_KNOWN[name].name, value.given)
    others = tuple(f"{PREFIX}{each}__".upper() for each in Settings.model_fields if each != section)
    mistakes = [line for line in mistakes if not line.startswith(others)]
    if mistakes:
        raise ConfigError(mistakes)
    return found


def describe(settings: Settings, origins: Mapping[str, str] | None = None) -> list[Described]:
    """Return every effective setting in the order of the tree, secrets hidden."""
    origins = origins or {}
    return [
        Described(
            name,
            _plain(getattr(getattr(settings, setting.section), setting.name)),
            origins.get(name, "default"),
        )
        for name, setting in _KNOWN.items()
    ]


def _build(layers: Iterable[Mapping[str, _Value]]) -> Settings:
    token = LAYERS.set(tuple(_nested(layer) for layer in layers))
    try:
        return Settings()
    finally:
        LAYERS.reset(token)


def _nested(layer: Mapping[str, _Value]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for name, value in layer.items():
        setting = _KNOWN[name]
        tree.setdefault(setting.section, {})[setting.name] = value.given
    return tree


def _without(layer: Mapping[str, _Value], names: set[str]) -> dict[str, _Value]:
    return {name: value for name, value in layer.items() if name not in names}


# Sources


def _environment(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, _Value]:
    layer = {}
    for name in sorted(environ):
        if name in _KNOWN:
            if environ[name]:
                layer[name] = _Value(environ[name], "environment")
        elif name.upper().startswith(PREFIX) and not _is_foreign(name, environ[name]):
            mistakes.append(f"{name}: no such setting{_did_you_mean(name)}")
    return layer


def _is_foreign(name: str, value: str) -> bool:
    if _NOT_OURS.fullmatch(name) or _secret_of(name):
        return True
    if "__" in name:
        return False
    link = name.endswith("_PORT") and _KUBERNETES_LINK.fullmatch(value) is not None
    return link or _KUBERNETES.fullmatch(name) is not None


def _secret_of(name: str) -> Setting | None:
    setting = _KNOWN.get(name.removesuffix("_FILE"))
    return setting if setting is not None and setting.from_file and name.endswith("_FILE") else None


def _did_you_mean(name: str) -> str:
    spellings = [
        *_KNOWN,
        *(f"{known}_FILE" for known, setting in _KNOWN.items() if setting.from_file),
        CONFIG_FILE_VARIABLE,
        SECRETS_DIR_VARIABLE,
    ]
    upper = name.upper()
    flat = {re.sub(r"_+", "_", spelling): spelling for spelling in spellings}
    near = difflib.get_close_matches(re.sub(r"_+", "_", upper), flat, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {flat[near[0]]}?"
    return "; `shadowsvc check-config` lists them all"


def _secret_files(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, _Value]:
    layer = {}
    for name in sorted(environ):
        setting = _secret_of(name)
        if setting is not None and environ[name]:
            secret = _read_secret(Path(environ[name]), name, mistakes)
            if secret is not None:
                layer[setting.variable] = _Value(secret, f"file {environ[name]}")
    return layer


def _secrets_dir(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, _Value]:
    given = environ.get(SECRETS_DIR_VARIABLE)
    if not given:
        return {}
    try:
        files = sorted(Path(given).iterdir())
    except OSError as error:
        mistakes.append(
            f"{SECRETS_DIR_VARIABLE}: got {_show(given)} from environment; {reason(error)}; "
            "allowed: a readable directory"
        )
        return {}
    layer = {}
    for file in files:
        name = file.name.upper()
        if not name.startswith(PREFIX):
            continue
        setting = _KNOWN.get(name)
        if setting is None or not setting.from_file:
            mistakes.append(
                f"{SECRETS_DIR_VARIABLE}: {file} is named like no secret; allowed: "
                + ", ".join(known for known, each in _KNOWN.items() if each.from_file)
            )
            continue
        secret = _read_secret(file, SECRETS_DIR_VARIABLE, mistakes)
        if secret is not None:
            layer[name] = _Value(secret, f"file {file}")
    return layer


def _read_secret(file: Path, name: str, mistakes: list[str]) -> str | None:
    allowed = "allowed: path of a readable text file with the secret"
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_SECRET_BYTES + 1)
        # Editors and `echo` end a file with a line break; no secret does.
        secret = raw.decode().rstrip("\r\n")
    except OSError as error:
        mistakes.append(f"{name}: got {_show(str(file))}; {reason(error)}; {allowed}")
    except UnicodeDecodeError:
        mistakes.append(f"{name}: got {_show(str(file))}; it is not UTF-8; {allowed}")
    else:
        if secret and len(raw) <= _MAX_SECRET_BYTES:
            return secret
        size = "too long" if secret else "empty"
        mistakes.append(f"{name}: got {_show(str(file))}; the file is {size}; {allowed}")
    return None


def _settings_file(file: Path | None, mistakes: list[str]) -> dict[str, _Value]:
    if file is None:
        return {}
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        problem = reason(error)
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        # The parser's words may quote the file, and with it a secret: its place is enough.
        place = re.search(r"\(at ([^()]*)\)$", str(error))
        problem = "it is not TOML" + (f" (at {place[1]})" if place else "")
    else:
        return dict(_settings_in(tree, file, mistakes))
    mistakes.append(
        f"{CONFIG_FILE_VARIABLE} or --config: got {_show(str(file))}; {problem}; "
        "allowed: path of a readable TOML file"
    )
    return {}


def _settings_in(
    tree: Mapping[str, Any], file: Path, mistakes: list[str]
) -> Iterator[tuple[str, _Value]]:
    for section, branch in tree.items():
        if section not in Settings.model_fields:
            near = difflib.get_close_matches(section, Settings.model_fields, n=1)
            hint = f"did you mean [{near[0]}]?" if near else "allowed: "
            hint += "" if near else ", ".join(f"[{name}]" for name in Settings.model_fields)
            mistakes.append(f"{_show(section)} in {file}: no such section; {hint}")
        elif not isinstance(branch, dict):
            mistakes.append(f"{section} in {file}: not a section; write it as [{section}]")
        else:
            for name, given in branch.items():
                known = variable(section, name)
                if known in _KNOWN and name == name.lower():
                    yield known, _Value(given, f"{file}")
                else:
                    mistakes.append(
                        f"{_show(f'{section}.{name}')} in {file}: no such setting"
                        f"{_did_you_mean(known)}"
                    )


# Mistakes


def _explain(error: ValidationError, values: Mapping[str, _Value]) -> dict[str, str]:
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        name = variable(*map(str, detail["loc"][:2]))
        # Of a list the first mistake stands for all: one line a setting.
        if name not in lines:
            problem = ""
            if detail["type"] == "value_error":
                problem = str(detail["ctx"]["error"])
            lines[name] = _line(name, values, problem)
    return lines


def _line(name: str, values: Mapping[str, _Value], problem: str = "") -> str:
    setting = _KNOWN[name]
    if name in values:
        given = _HIDDEN if setting.secret else _show(values[name].given)
        start = f"{name}: got {given} from {values[name].origin}"
    else:
        start = f"{name}: the default is {_show(setting.default)}"
    return "; ".join(filter(None, (start, problem, f"allowed: {setting.allowed}")))


def _show(given: object) -> str:
    """Return what was given in one short line, without what may be a password in a URL."""
    text = given if isinstance(given, str) else str(given)
    if "@" in text:
        scheme, separator, _ = text.partition("://")
        text = f"{scheme + separator if separator else ''}{_HIDDEN}@{text.rpartition('@')[2]}"
    if len(text) > _MAX_SHOWN:
        text = text[:_MAX_SHOWN] + "…"
    return repr(text)


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return _HIDDEN
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))
