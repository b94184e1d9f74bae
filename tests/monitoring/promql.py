"""What an expression of PromQL asks for: metrics, the labels they are chosen by, other labels.

Lives here: a reader that is just good enough for names. Whether an expression is valid is asked of
Prometheus itself. Rules: strings are taken out first, so that no text in them looks like a name.
Must not come in: which names exist.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Asked", "Selector", "asked"]

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_CLAUSE = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_SELECTOR = re.compile(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\s*\(|[\w:])")
_MATCHER = re.compile(r"([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*§(\d+)§")
_WORDS = {
    "and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left",
    "group_right", "inf", "nan",
}  # fmt: skip


class Selector(NamedTuple):
    """A metric, and by which labels with which values its series are chosen."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]

    @property
    def text(self) -> str:
        """As PromQL has it."""
        matchers = ",".join(f'{label}{how}"{value}"' for label, how, value in self.matchers)
        return f"{self.metric}{{{matchers}}}"


class Asked(NamedTuple):
    """What one expression asks for."""

    selectors: tuple[Selector, ...]
    labels: frozenset[str]
    """Labels in `by`, `on` and their like."""

    @property
    def metrics(self) -> set[str]:
        """The metrics' names."""
        return {selector.metric for selector in self.selectors}


def asked(expression: str) -> Asked:
    """Read an expression."""
    strings: list[str] = []

    def keep(match: re.Match[str]) -> str:
        strings.append(match[0][1:-1])
        return f"§{len(strings) - 1}§"

    labels: set[str] = set()

    def clause(match: re.Match[str]) -> str:
        labels.update(name.strip() for name in match[2].split(",") if name.strip())
        return " "

    text = _CLAUSE.sub(clause, _STRING.sub(keep, expression))
    text = _RANGE.sub(" ", text)
    text = re.sub(r"\boffset\s+-?\w+", " ", text)
    selectors = []
    for name, braces in _SELECTOR.findall(text):
        if name.lower() in _WORDS:
            continue
        matchers = tuple(
            (label, operator, strings[int(number)])
            for label, operator, number in _MATCHER.findall(braces)
        )
        selectors.append(Selector(name, matchers))
    return Asked(tuple(selectors), frozenset(labels))
