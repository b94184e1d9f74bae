"""What a run leaves for people: tables, pictures, an HTML page, and the place in a document.

Lives here: `Table` as Markdown and HTML, `Panel` and `draw` (matplotlib), `page`, `into_document`.
Rules: the same tables stand in the terminal, the page and the document, so that they cannot differ;
a page is one file that needs no other; in a document only what is between two marks is replaced.
Must not come in: what the figures mean.
"""

from __future__ import annotations

import base64
import html
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Line", "Panel", "Table", "draw", "into_document", "number", "page"]

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ccc; padding: .25em .8em; text-align: right }
th:first-child, td:first-child { text-align: left }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto }
img { max-width: 100% }
.warning { border-left: .3em solid #c00; padding-left: .8em }
"""
_WIDE_ENOUGH = 1000
_COLUMNS = 2


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows of the same length; the first column is text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return it as Markdown, with columns in line."""
        lines = [self.headings, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = tuple(
            "-" * width if at == 0 else "-" * max(1, width - 1) + ":"
            for at, width in enumerate(widths)
        )
        return "\n".join(
            "| "
            + " | ".join(
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            + " |"
            for line in (lines[0], rule, *lines[1:])
        )

    def html(self) -> str:
        """Return it as HTML."""

        def row(cells: Sequence[str], kind: str) -> str:
            return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)

        body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.rows)
        title = html.escape(self.title)
        return f"<h2>{title}</h2>\n<table><tr>{row(self.headings, 'th')}</tr>\n{body}\n</table>"


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False
    """For what was not measured but extrapolated; the label has to say so, too."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of several curves."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    marks: tuple[tuple[float, str], ...] = field(default=())
    """Upright lines with a word: (x, what happened)."""
    log_x: bool = False
    log_y: bool = False
    dots: bool = False
    """Whether each point is shown, for few points."""


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw the panels into one picture; the ending of `path` says the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow, and only needed here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, 3.5 * rows), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel(panel.x_label)
        axis.set_ylabel(panel.y_label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        for line in panel.lines:
            axis.plot(
                line.xs,
                line.ys,
                "--" if line.dashed else "-",
                marker="o" if panel.dots else None,
                markersize=4,
                label=line.label,
            )
        for at, word in panel.marks:
            axis.axvline(at, color="#c00", linewidth=0.8)
            axis.annotate(
                word, (at, 1), xycoords=("data", "axes fraction"), fontsize=8, rotation=90,
                va="top", ha="right",
            )  # fmt: skip
        if panel.log_x:
            axis.set_xscale("log")
        if panel.log_y:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        if len(panel.lines) > 1:
            axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def page(
    path: Path,
    *,
    title: str,
    command: str,
    notes: Sequence[str],
    warnings: Sequence[str],
    tables: Sequence[Table],
    pictures: Sequence[Path],
) -> None:
    """Write an HTML page that holds everything, pictures (PNG) included."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(command)}</pre>"]
    parts += [f'<p class="warning">{html.escape(line)}</p>' for line in warnings]
    parts += [f"<p>{html.escape(line)}</p>" for line in notes]
    parts += [table.html() for table in tables]
    parts += [
        f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
        if picture.exists()
    ]
    body = "\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>\n{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def into_document(document: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of `name` in a Markdown document.

    The marks are `<!-- NAME: begin -->` and `<!-- NAME: end -->`, each on a line of its own.

    Raises:
        ValueError: the document has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, found, rest = document.read_text().partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise ValueError(f"{document} has no place for {name}: {begin.strip()}")
    document.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}")


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure with so many significant digits, or a dash when there is none."""
    if value is None or math.isnan(value):
        return "-"
    if abs(value) >= _WIDE_ENOUGH:
        return f"{value:,.0f}"
    if value == int(value) and abs(value) < _WIDE_ENOUGH:
        return f"{value:.0f}"
    return f"{float(f'{value:.{digits}g}'):g}"
