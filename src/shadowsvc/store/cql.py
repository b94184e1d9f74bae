"""Take a CQL text apart into its statements.

Lives here: the few lexical rules of CQL that this needs. Rules: a `;` inside a string, a quoted
name, a `$$` body or a comment does not end a statement; comments and spacing are dropped, so that
two texts which mean the same give the same statements. Must not come in: what statements mean.
"""

from __future__ import annotations

import re

__all__ = ["statements"]

# Apache Cassandra's Lexer.g: STRING_LITERAL, QUOTED_NAME, COMMENT (-- or //), MULTILINE_COMMENT.
_PIECE = re.compile(
    r"""
      (?P<kept>   '(?:[^']|'')*'  |  "(?:[^"]|"")*"  |  \$\$.*?\$\$ )
    | (?P<comment> (?:--|//)[^\r\n]*  |  /\*.*?\*/ )
    | (?P<broken>  ['"]  |  \$\$  |  /\* )
    | (?P<space>   \s+ )
    | (?P<end>     ; )
    | (?P<other>   . )
    """,
    re.DOTALL | re.VERBOSE,
)


def statements(text: str) -> tuple[str, ...]:
    """Return the statements of `text`, each on one line without its `;`.

    Raises `ValueError` for a string, name, body or comment without an end.
    """
    found: list[str] = []
    current: list[str] = []
    for match in _PIECE.finditer(text):
        kind = match.lastgroup
        if kind == "broken":
            line = text.count("\n", 0, match.start()) + 1
            raise ValueError(f"line {line}: {match[0]} has no end")
        if kind == "end":
            found.append("".join(current).strip())
            current = []
        elif kind in {"space", "comment"}:
            if current and current[-1] != " ":
                current.append(" ")
        else:
            current.append(match[0])
    found.append("".join(current).strip())
    return tuple(statement for statement in found if statement)
