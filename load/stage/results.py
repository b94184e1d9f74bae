"""Where the results of a run go: terminal, JSON, picture, page, and the place in docs/scale.md.

Lives here: the options that say where, and `Results` with `leave`. Rules: warnings come before
tables, wherever; a run that saw nothing leaves a report all the same; without matplotlib there is
no picture, and that is said. Must not come in: what the figures mean (the reports of the runs), how
tables and pictures are made (`paper`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.services import REPOSITORY
from load.stage.console import say, tell, written
from load.stage.paper import draw, into_document, page

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from load.stage.paper import Panel, Table

__all__ = ["OUT", "Results", "add_options", "leave"]

OUT = REPOSITORY / "out"


@dataclass(frozen=True, slots=True)
class Results:
    """What a run says, ready for people."""

    name: str
    """Of its place in docs/scale.md, and of the picture there."""
    title: str
    caption: str
    """Of the picture in the document."""
    note: str
    """How the figures are to be read."""
    warnings: Sequence[str]
    tables: Sequence[Table]
    panels: Sequence[Panel]
    document: Mapping[str, Any]
    """The JSON, but for the command."""


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Let the user say where results go: `--json`, `--plot`, `--page`, `--docs`."""
    for option, ending, what in (
        ("--json", "json", "result"),
        ("--plot", "png", "picture"),
        ("--page", "html", "page"),
    ):
        path = OUT / f"{name}.{ending}"
        parser.add_argument(option, type=Path, default=path, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--docs", action="store_true", help="put tables and picture into docs/scale.md, too"
    )


def leave(options: argparse.Namespace, results: Results) -> None:
    """Print warnings and tables, and write JSON, picture and page.

    Args:
        options: those of `add_options`, and `command`, the command line.
        results: what there is.

    Raises:
        ValueError: with `--docs`, the document has no place for it.
    """
    told, made = results.warnings, results.tables
    tell("\n{}\n".format("\n\n".join([*told, *(_under(table) for table in made)])))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": options.command, **results.document}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    written(options.json)
    pictures = []
    if results.panels:
        try:
            draw(options.plot, results.title, results.panels)
            pictures.append(options.plot)
            written(options.plot)
            if options.docs:
                draw(REPOSITORY / "docs" / f"{results.name}.svg", results.title, results.panels)
        except ImportError:
            say("no picture: matplotlib is not installed")
    page(
        options.page,
        title=results.title,
        command=options.command,
        notes=[results.note],
        warnings=told,
        tables=made,
        pictures=pictures,
    )
    written(options.page)
    if options.docs:
        parts = [f"```sh\n{options.command}\n```", *told]
        parts += [f"### {_under(table)}" for table in made]
        if results.panels:
            parts.append(f"![{results.caption}]({results.name}.svg)")
        into_document(REPOSITORY / "docs" / "scale.md", results.name, "\n\n".join(parts))


def _under(table: Table) -> str:
    return f"{table.title}\n\n{table.markdown()}"
