"""CQL files come apart at the right places."""

from __future__ import annotations

import pytest

from shadowsvc.store.cql import statements


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" ; ;\n", ()),
        ("A; B", ("A", "B")),
        ("A -- not; here\n B;", ("A B",)),
        ("A // not; here\n B;", ("A B",)),
        ("A /* not;\nhere */ B;", ("A B",)),
        ("A 'x;y -- z' B;", ("A 'x;y -- z' B",)),
        ("A 'it''s; /*' B;", ("A 'it''s; /*' B",)),
        ('A "q;""--" B;', ('A "q;""--" B',)),
        ("A $$ x; 'y $$ B;C", ("A $$ x; 'y $$ B", "C")),
        ("A\n\t  'two  spaces'\n", ("A 'two  spaces'",)),
        ("A -- the end", ("A",)),
        ("A - 1; B / 2", ("A - 1", "B / 2")),
        ("-- é 'open\nA;", ("A",)),
    ],
)
def test_a_text_gives_its_statements(text: str, expected: tuple[str, ...]) -> None:
    assert statements(text) == expected


@pytest.mark.parametrize("text", ["A\n'x", 'A\n"x', "A\n/* x", "A\n$$ x $"])
def test_what_has_no_end_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"line 2: .* has no end"):
        statements(text)


def test_comments_and_spacing_do_not_change_a_statement() -> None:
    assert statements("A  B\n\n;") == statements("-- new words\nA /* c */ B;")
