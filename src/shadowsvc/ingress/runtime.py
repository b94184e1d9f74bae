"""HAProxy's sockets, and what it answers there.

Lives here: one command a connection on the worker's socket and on the master's, and reading of the
answers (HAProxy's Management Guide, sections 9.3 and 9.4). Rules: every exchange has a limit of
time and of bytes; nothing from outside gets into a command but names and addresses that
`model` let through; an answer that is no known success is `HaproxyFailed`, or `CommandRefused` when
HAProxy said no. Must not come in: what should be.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shadowsvc.errors import HaproxyFailed
from shadowsvc.ingress.render import DESCRIPTION

if TYPE_CHECKING:
    from pathlib import Path

    from shadowsvc.ingress.render import Server

__all__ = ["CommandRefused", "Live", "Master", "NobodyThere", "Running", "Runtime"]

_SECONDS: Final = 5.0
_MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
_MAX_SHOWN: Final = 300
_MAINTENANCE: Final = 0x01 | 0x02 | 0x20  # SRV_ADMF_FMAINT, _IMAINT, _CMAINT of HAProxy
_DRAINING: Final = 0x08 | 0x10  # SRV_ADMF_FDRAIN, _IDRAIN
_FINGERPRINT = re.compile(r"^SHA1 FingerPrint: ([0-9A-F]{40})$", re.MULTILINE)


class CommandRefused(HaproxyFailed):
    """HAProxy is there and does not do what it was told."""


class NobodyThere(HaproxyFailed):
    """Nobody listens at the socket: HAProxy does not run, or is about to."""


@dataclass(frozen=True, slots=True)
class Running:
    """A worker that serves."""

    pid: int
    digest: str | None
    """Of the frame of its configuration; None if that is not ours."""


@dataclass(frozen=True, slots=True)
class Live:
    """A server as the worker has it."""

    where: str
    takes_connections: bool
    """By its administrative state; whether it is up is another thing."""


class _Socket:
    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self, command: str) -> str:
        """Send a command and return the answer. Raises `HaproxyFailed`."""
        try:
            async with asyncio.timeout(_SECONDS):
                reader, writer = await asyncio.open_unix_connection(str(self._path))
                try:
                    writer.write(f"{command}\n".encode())
                    # The master answers to the end of what it is asked, so there has to be one.
                    writer.write_eof()
                    parts, size = [], 0
                    while (part := await reader.read(65_536)) and size <= _MAX_ANSWER_BYTES:
                        parts.append(part)
                        size += len(part)
                finally:
                    writer.close()
        except TimeoutError as error:
            raise HaproxyFailed(f"HAProxy's socket {self._path}: no answer in time") from error
        except OSError as error:
            raise NobodyThere(f"HAProxy's socket {self._path}: {error}") from error
        return b"".join(parts).decode(errors="replace").strip()


class Runtime(_Socket):
    """The worker's socket."""

    async def running(self) -> Running:
        """Ask who serves there. Raises `HaproxyFailed`."""
        fields = dict(
            line.split(": ", 1)
            for line in (await self.ask("show info")).splitlines()
            if ": " in line
        )
        try:
            pid = int(fields["Pid"])
        except (KeyError, ValueError) as error:
            raise HaproxyFailed(f"what answers at {self._path} is no HAProxy") from error
        said = fields.get("description", "")
        ours = said.startswith(DESCRIPTION)
        return Running(pid, said.removeprefix(DESCRIPTION).strip() if ours else None)

    async def servers(self) -> dict[tuple[str, str], Live]:
        """Return the servers by backend and name. Raises `HaproxyFailed`."""
        lines = (await self.ask("show servers state")).splitlines()
        found = {}
        try:
            columns = (
                next(line for line in lines if line.startswith("# ")).removeprefix("# ").split()
            )
            for line in lines:
                if not line or line.startswith("#") or line.isdecimal():
                    continue
                row = dict(zip(columns, line.split(), strict=True))
                host = row["srv_addr"]
                admin = int(row["srv_admin_state"])
                found[row["be_name"], row["srv_name"]] = Live(
                    f"{f'[{host}]' if ':' in host else host}:{row['srv_port']}",
                    not admin & (_MAINTENANCE | _DRAINING),
                )
        except (StopIteration, KeyError, ValueError) as error:
            raise HaproxyFailed("`show servers state` has an unknown form") from error
        return found

    async def add(self, server: Server) -> None:
        """Make a server and let it take connections. Raises `HaproxyFailed`."""
        name = f"{server.backend}/{server.name}"
        await self._do(
            f"add server {name} {server.where} {server.options}", "New server registered"
        )
        if "check" in server.options.split():
            await self._do(f"enable health {name}", "")
        await self._do(f"enable server {name}", "")

    async def move(self, server: Server) -> None:
        """Give a server another address; its connections stay. Raises `HaproxyFailed`."""
        await self._do(
            f"set server {server.backend}/{server.name} addr {server.address} port {server.port}",
            "changed",
            "no need to change",
        )

    async def open(self, backend: str, name: str) -> None:
        """Let a server take connections. Raises `HaproxyFailed`."""
        await self._do(f"set server {backend}/{name} state ready", "")

    async def close(self, backend: str, name: str) -> None:
        """Let a server take no new connections; those that it has stay. Raises `HaproxyFailed`."""
        await self._do(f"set server {backend}/{name} state maint", "")

    async def delete(self, backend: str, name: str) -> bool:
        """Delete a closed server; False while it has connections. Raises `HaproxyFailed`."""
        answer = await self.ask(f"del server {backend}/{name}")
        return answer.startswith(("Server deleted", "No such server"))

    async def certificates(self) -> list[str]:
        """Return the files of the certificates in use. Raises `HaproxyFailed`."""
        lines = (await self.ask("show ssl cert")).splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    async def fingerprint(self, file: str) -> str | None:
        """Return the SHA-1 of a certificate in use, in hexadecimal. Raises `HaproxyFailed`."""
        found = _FINGERPRINT.search(await self.ask(f"show ssl cert {file}"))
        return None if found is None else found[1]

    async def replace_certificate(self, file: str, pem: str) -> None:
        """Put a certificate, with chain and key, in place of another. Raises `HaproxyFailed`."""
        # The payload ends at the first empty line.
        text = "\n".join(line for line in pem.splitlines() if line.strip())
        try:
            await self._do(f"set ssl cert {file} <<\n{text}\n", "Transaction created", "updated")
            await self._do(f"commit ssl cert {file}", "Success")
        except CommandRefused:
            await self.ask(f"abort ssl cert {file}")
            raise

    async def _do(self, command: str, *successes: str) -> None:
        answer = await self.ask(command)
        if not any(word in answer if word else not answer for word in successes):
            shown = command.partition("\n")[0]
            raise CommandRefused(f"HAProxy to {shown!r}: {answer[:_MAX_SHOWN]}")


class Master(_Socket):
    """The master's socket."""

    async def reload(self) -> str:
        """Let the master read the configuration and start a worker; return what it says.

        Before HAProxy 2.7 that is nothing. Raises `HaproxyFailed`; `CommandRefused` where it says
        that the new worker did not start.
        """
        answer = await self.ask("reload")
        if "Success=0" in answer:
            raise CommandRefused(f"HAProxy did not reload: {answer[:_MAX_SHOWN]}")
        return answer
