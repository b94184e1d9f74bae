"""Write the Grafana dashboards from their code; with --check tell if the files are old.

Lives here: which dashboards there are, and their files. Must not come in: panels (`service`,
`fleet`).
"""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path

from fleet import fleet
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from service import service

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "monitoring" / "grafana" / "dashboards"
DASHBOARDS = {"service.json": service, "fleet.json": fleet}


def main() -> int:
    """Write or check; return the exit code."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.stderr.write("usage: scripts/dashboards [--check]\n")
        return 2
    wanted = {
        name: dumps(make().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, make in DASHBOARDS.items()
    }
    if not sys.argv[1:]:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name, text in wanted.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    if found == wanted:
        return 0
    old = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    sys.stderr.write(
        f"dashboards are not what their code makes: {', '.join(old)}; run scripts/dashboards\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
