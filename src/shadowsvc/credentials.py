"""What we show and whom we trust on one side, at one moment.

Lives here: one immutable object made of what files and settings hold, checked before anybody uses
it, and the one reading of a certificate's dates. Rules: it is made whole or not at all; it is made
of bytes that were read once, so that no file can change between the look and the use; nothing shows
a secret, neither `repr` nor an error; a key with a passphrase is refused and never asked for. Must
not come in: when files are read again (`shadowsvc.rotation`), sockets, drivers.

Dates are read here and by no library: the standard library shows those of a peer and of
authorities, but not those of an own certificate. `notAfter` has a fixed place (RFC 5280 §4.1), and
OpenSSL has accepted the certificate before we look.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from shadowsvc.config_rules import reason
from shadowsvc.errors import CredentialsUnusable
from shadowsvc.settings import variable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import SecretStr

    from shadowsvc.settings import Cassandra, Mqtt, Settings

__all__ = [
    "FILES",
    "Credentials",
    "complaints",
    "expiries",
    "from_contents",
    "load",
    "read_files",
    "system_authorities",
]

FILES = ("ca_file", "certificate_file", "key_file")
"""The settings of a side that name files."""

_MAX_FILE_BYTES = 4 * 1024 * 1024  # the system's own bundle of authorities has 0.2 MiB
_BEGIN = b"-----BEGIN CERTIFICATE-----"
_PEM = re.compile(_BEGIN + rb"[\s\S]+?-----END CERTIFICATE-----")
_SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
_SOON_SECONDS = 7 * 86_400
_SEQUENCE = 0x30
_VERSION = 0xA0
_UTC_TIME = 0x17
_GENERALIZED_TIME = 0x18
_LONG_LENGTH = 0x80


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """A login, the own certificate and the authorities that are trusted."""

    username: str | None = None
    password: SecretStr | None = None
    ca: str | None = None
    """PEM; None: the system's authorities."""
    certificate: str | None = None
    """PEM, with its chain."""
    key: str | None = None
    """PEM."""
    context: ssl.SSLContext | None = field(default=None, compare=False)
    """Made of the three above, for whoever speaks TLS by Python; None without TLS."""
    ca_expiries: tuple[float, ...] = ()
    """When each certificate in `ca` ends, in seconds since 1970."""
    certificate_expiries: tuple[float, ...] = ()
    """Likewise of `certificate`."""

    def __repr__(self) -> str:
        """Show nothing of it."""
        return "Credentials(****)"

    def ca_expiry(self, now: float) -> float | None:
        """When the next authority ends; those that ended count only when all have."""
        ahead = [expiry for expiry in self.ca_expiries if expiry > now]
        return min(ahead) if ahead else max(self.ca_expiries, default=None)

    def certificate_expiry(self) -> float | None:
        """When the own certificate ends, or the first one of its chain."""
        return min(self.certificate_expiries, default=None)


def read_files(section: str, branch: Mqtt | Cassandra) -> dict[str, bytes]:
    """Read what the settings `FILES` of a side name, by setting.

    Blocks. Raises `CredentialsUnusable`.
    """
    contents = {}
    for name in FILES:
        file: Path | None = getattr(branch, name)
        if file is not None and branch.tls:
            try:
                with file.open("rb") as stream:
                    contents[name] = stream.read(_MAX_FILE_BYTES + 1)
            except OSError as error:
                raise CredentialsUnusable(f"{variable(section, name)}: {reason(error)}") from None
            if len(contents[name]) > _MAX_FILE_BYTES:
                raise CredentialsUnusable(
                    f"{variable(section, name)}: the file is larger than 4 MiB"
                )
    return contents


def from_contents(
    section: str,
    branch: Mqtt | Cassandra,
    contents: Mapping[str, bytes],
    *,
    username: str | None,
    password: SecretStr | None,
    replaces: Credentials | None = None,
) -> Credentials:
    """Make credentials of what `read_files` returned and of a login.

    A certificate that has ended is taken at the start, when the broker or Cassandra shall judge,
    but does not replace one that has not. Raises `CredentialsUnusable`.
    """
    if not branch.tls:
        return Credentials(username, password)
    ca = _text(section, "ca_file", contents)
    certificate = _text(section, "certificate_file", contents)
    key = _text(section, "key_file", contents)
    ca_expiries = _checked(section, "ca_file", contents)
    certificate_expiries = _checked(section, "certificate_file", contents)
    if replaces is not None:
        now = time.time()
        for name, new, old in (
            ("ca_file", max(ca_expiries, default=None), max(replaces.ca_expiries, default=None)),
            (
                "certificate_file",
                min(certificate_expiries, default=None),
                min(replaces.certificate_expiries, default=None),
            ),
        ):
            if new is not None and old is not None and new <= now < old:
                raise CredentialsUnusable(f"{variable(section, name)}: the certificate has expired")
    return Credentials(
        username,
        password,
        ca,
        certificate,
        key,
        _context(section, ca, contents),
        ca_expiries,
        certificate_expiries,
    )


def load(section: str, branch: Mqtt | Cassandra) -> Credentials:
    """Make credentials of what the files hold now and the settings' login.

    Blocks. Raises `CredentialsUnusable`.
    """
    return from_contents(
        section,
        branch,
        read_files(section, branch),
        username=branch.username,
        password=branch.password,
    )


def complaints(settings: Settings) -> list[str]:
    """Return one line for each side whose files cannot be used, or soon not any more. Blocks."""
    lines = []
    for section, branch in (("mqtt", settings.mqtt), ("cassandra", settings.cassandra)):
        try:
            made = load(section, branch)
        except CredentialsUnusable as error:
            lines.append(str(error))
            continue
        now = time.time()
        for name, expiry in (
            ("ca_file", made.ca_expiry(now)),
            ("certificate_file", made.certificate_expiry()),
        ):
            if expiry is not None and expiry < now + _SOON_SECONDS:
                days = (expiry - now) / 86_400
                end = f"ends in {days:.1f} days" if days > 0 else "has expired"
                lines.append(f"{variable(section, name)}: a certificate {end}")
    return lines


def system_authorities() -> str | None:
    """Return the authorities that the system trusts, PEM, for a driver that knows none. Blocks."""
    paths = ssl.get_default_verify_paths()
    for file in (paths.cafile, paths.openssl_cafile, *_SYSTEM_BUNDLES):
        if file is not None:
            with contextlib.suppress(OSError):
                return Path(file).read_text(encoding="utf-8")
    return None


def expiries(pem: bytes) -> tuple[float, ...]:
    """Return when each certificate in a PEM text ends, in seconds since 1970.

    Raises `ValueError` for a text that is cut short or holds what is no certificate.
    """
    blocks = _PEM.findall(pem)
    if len(blocks) != pem.count(_BEGIN):
        raise ValueError("a certificate is cut short")
    return tuple(_not_after(ssl.PEM_cert_to_DER_cert(block.decode("ascii"))) for block in blocks)


def _text(section: str, name: str, contents: Mapping[str, bytes]) -> str | None:
    if name not in contents:
        return None
    try:
        return contents[name].decode()
    except UnicodeDecodeError:
        raise CredentialsUnusable(f"{variable(section, name)}: the file is no PEM text") from None


def _checked(section: str, name: str, contents: Mapping[str, bytes]) -> tuple[float, ...]:
    if name not in contents:
        return ()
    try:
        found = expiries(contents[name])
    except (ValueError, IndexError) as error:
        raise CredentialsUnusable(
            f"{variable(section, name)}: {error or 'no certificate'}"
        ) from None
    # Without this an empty file would mean the system's authorities: many more than were meant.
    if not found:
        raise CredentialsUnusable(f"{variable(section, name)}: there is no certificate in the file")
    return found


def _context(section: str, ca: str | None, contents: Mapping[str, bytes]) -> ssl.SSLContext:
    """Return a context that checks chain and host name (`ssl.create_default_context`)."""
    try:
        context = ssl.create_default_context(cadata=ca)
    except (ssl.SSLError, ValueError) as error:
        raise CredentialsUnusable(f"{variable(section, 'ca_file')}: {error}") from None
    if "certificate_file" in contents:
        names = f"{variable(section, 'certificate_file')} and {variable(section, 'key_file')}"
        chain, key = contents["certificate_file"], contents["key_file"]
        try:
            _load(context, chain, key)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise CredentialsUnusable(f"{names}: {_why(error)}") from None
    return context


def _load(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Load chain and key: OpenSSL wants files, and these live in memory alone."""
    with _in_memory(chain) as chain_path, _in_memory(key) as key_path:
        context.load_cert_chain(chain_path, key_path, password=_no_passphrase)


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("pem")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase; store it without one")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return str(error) or type(error).__name__


def _not_after(der: bytes) -> float:
    """Return `notAfter` of a certificate in DER (X.690): the second time in `validity`."""
    _, start, _ = _element(der, 0, _SEQUENCE)  # Certificate
    _, at, _ = _element(der, start, _SEQUENCE)  # TBSCertificate
    if der[at] == _VERSION:
        at = _element(der, at)[2]
    for _ in ("serialNumber", "signature", "issuer"):
        at = _element(der, at)[2]
    _, at, _ = _element(der, at, _SEQUENCE)  # Validity
    tag, at, end = _element(der, _element(der, at)[2])
    # RFC 5280 §4.1.2.5: in UTC, with seconds, and two digits of the year mean 1950 to 2049.
    text = der[at:end].decode("ascii")
    if tag == _UTC_TIME:
        text = f"{'19' if text >= '50' else '20'}{text}"
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the certificate has no notAfter")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _element(der: bytes, at: int, wanted: int | None = None) -> tuple[int, int, int]:
    """Return an element's tag, where its content begins, and where it ends."""
    tag, length, start = der[at], der[at + 1], at + 2
    if length >= _LONG_LENGTH:
        size = length - _LONG_LENGTH
        length = int.from_bytes(der[start : start + size], "big")
        start += size
    if (wanted is not None and tag != wanted) or start + length > len(der):
        raise ValueError("there is something that is no certificate")
    return tag, start, start + length
