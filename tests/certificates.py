"""Authorities and certificates for tests, made by openssl.

Lives here: one authority in one folder, and what it signs. Rules: everything is PEM and readable by
servers that change their user; nothing lives longer than two days. Must not come in: servers.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path  # noqa: TC003 - arguments of subprocesses

import pytest

__all__ = ["LOCAL", "Authority", "openssl"]

LOCAL = "IP:127.0.0.1,DNS:localhost"
"""Alternative names of a server on the loopback."""


def openssl(*arguments: str | Path) -> None:
    """Run openssl to its end."""
    if shutil.which("openssl") is None:
        pytest.fail("openssl is missing: apt-get install openssl")
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


class Authority:
    """PEM files of one authority, in `folder`."""

    def __init__(self, folder: Path, name: str = "ca", *, days: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        self.folder = folder
        self.name = name
        self.ca = folder / f"{name}.pem"
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(days),
                "-subj", f"/CN={name}",
                "-addext", "keyUsage=critical,keyCertSign,cRLSign",
                "-keyout", folder / f"{name}.key", "-out", self.ca)  # fmt: skip

    def pair(self, name: str) -> tuple[Path, Path]:
        """Where certificate and key of `name` are."""
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def issue(self, name: str, alternative_names: str, *, days: int = 2) -> tuple[Path, Path]:
        """Sign a new certificate; with `days` below nothing it has ended already."""
        certificate, key = self.pair(name)
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={alternative_names}\n"
            "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
        )
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request,
                "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", request, "-CA", self.ca,
                "-CAkey", self.folder / f"{self.name}.key",
                "-CAcreateserial", "-days", str(days), "-out", certificate,
                "-extfile", extensions)  # fmt: skip
        key.chmod(0o644)  # mosquitto drops to its own user
        return certificate, key

    def keystore(self, name: str, password: str) -> Path:
        """Pack certificate, key and authority as PKCS#12, for Java."""
        certificate, key = self.pair(name)
        store = self.folder / f"{name}.p12"
        openssl("pkcs12", "-export", "-in", certificate, "-inkey", key, "-certfile", self.ca,
                "-out", store, "-passout", f"pass:{password}", "-name", "node")  # fmt: skip
        return store

    def truststore(self, password: str) -> Path:
        """Pack the authority as PKCS#12 that Java takes as one to trust."""
        store = self.folder / f"{self.name}-trust.p12"
        store.unlink(missing_ok=True)
        subprocess.run(
            ["keytool", "-importcert", "-noprompt", "-alias", "ca", "-file", str(self.ca),
             "-keystore", str(store), "-storetype", "PKCS12", "-storepass", password],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        return store
