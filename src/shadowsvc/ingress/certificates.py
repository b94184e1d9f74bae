"""From a directory of certificates to files that HAProxy reads.

Lives here: pairs of certificate and key, checked and put together. A Secret has them as two files
and swaps both at once; HAProxy wants one file. Rules: blocks, so it runs in a thread; a pair that
can't be used changes nothing, the file that was made before stays; what it writes is readable for
its owner and group only; a key with a passphrase is refused and never asked for; nothing shows a
key. Must not come in: HAProxy's sockets.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from shadowsvc.config_rules import reason
from shadowsvc.credentials import expiries

__all__ = ["Certificates", "gather"]

_MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Certificates:
    """What HAProxy may use."""

    files: tuple[str, ...] = ()
    """Names in the directory that was written to, sorted."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """By name: SHA-1 of the certificate, upper-case hexadecimal, as HAProxy shows it."""
    expiries: dict[str, float] = field(default_factory=dict)
    """By name: when it ends, or the first of its chain, in seconds since 1970."""
    faults: tuple[str, ...] = ()
    """One line for each pair that can't be used."""


def gather(source: Path, target: Path) -> Certificates:
    """Bring `target` in step with `source`; what can't be used leaves its file as it was."""
    target.mkdir(mode=0o750, parents=True, exist_ok=True)
    faults = []
    try:
        # Read by way of the one link that a Secret's update swaps, so that the pair is of one time.
        data = source / "..data"
        found = sorted((data if data.is_dir() else source).resolve(strict=True).iterdir())
    except OSError as error:
        return _present(target, (f"{source}: {reason(error)}",))
    names = set()
    wanted = [file for file in found if file.suffix in {".crt", ".pem"} and file.is_file()]
    if not wanted and any(target.glob("*.pem")):
        # A Secret that is deleted leaves nothing: no reason to close what devices connect to.
        return _present(target, (f"{source}: all certificates are gone",))
    for file in wanted:
        name = f"{file.stem}.pem"
        names.add(name)
        try:
            pem = _read(file)
            if file.suffix == ".crt":
                pem = pem.rstrip(b"\n") + b"\n" + _read(file.with_suffix(".key"))
            _write(target, name, pem)
        except OSError as error:
            missing = Path(error.filename).name if error.filename else file.name
            faults.append(f"{missing}: {reason(error)}")
        except ValueError as error:
            faults.append(f"{file.name}: {error}")
    for file in target.glob("*.pem"):
        if file.name not in names:
            file.unlink(missing_ok=True)
    return _present(target, tuple(faults))


def _read(file: Path) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError("the file is larger than 1 MiB")
    return data


def _write(target: Path, name: str, pem: bytes) -> None:
    known = target / name
    if known.exists() and known.read_bytes() == pem:
        return
    handle, made = tempfile.mkstemp(prefix=".new-", dir=target)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(pem)
        Path(made).chmod(0o640)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A passphrase is never asked for: an empty one fits no key.
            context.load_cert_chain(made, password="")
            expiries(pem)
        except (ssl.SSLError, IndexError) as error:
            raise ValueError("certificate and key can't be used, or are no pair") from error
        Path(made).replace(known)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(made).unlink()


def _present(target: Path, faults: tuple[str, ...]) -> Certificates:
    files, prints, ends = [], {}, {}
    for file in sorted(target.glob("*.pem")):
        pem = file.read_bytes()
        try:
            begin = pem.index(b"-----BEGIN CERTIFICATE-----")
            end = pem.index(b"-----END CERTIFICATE-----", begin)
            first = pem[begin:end].decode("ascii") + "-----END CERTIFICATE-----"
            der = ssl.PEM_cert_to_DER_cert(first)
            ends[file.name] = min(expiries(pem))
        except (ValueError, IndexError):  # not written by us
            faults = (*faults, f"{file}: it holds no certificate")
            continue
        files.append(file.name)
        prints[file.name] = hashlib.sha1(der, usedforsecurity=False).hexdigest().upper()
    return Certificates(tuple(files), prints, ends, faults)
