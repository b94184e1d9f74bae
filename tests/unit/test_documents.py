"""What the documents name exists: pages, links, metrics, settings, commands, tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from shadowsvc.cli import app
from shadowsvc.health import REASONS
from shadowsvc.ingress.metrics import IngressExposition, IngressMetrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUNBOOKS = DOCS / "runbooks"
PAGES = sorted(path for path in RUNBOOKS.glob("*.md") if path.name != "README.md")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
# A name cut short, as in `SHADOWSVC_LIMITS__LOGIN_RETRY_…`, is the beginning of several.
METRIC = re.compile(r"\b((?:shadowsvc|process|python)_[a-z0-9_]+)\b")
SETTING = re.compile(r"\b(SHADOWSVC_[A-Z]+__[A-Z0-9_]+)(…?)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST = re.compile(r"`(test_\w+|Test\w+)`")
SUFFIXES = ("_bucket", "_sum", "_count")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def metrics() -> set[str]:
    """Return the exported names; `scripts/check` sees that the document has all of them."""
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| \w+ \|", text_of(DOCS / "metrics.md"), re.MULTILINE)
    ingress = IngressExposition(IngressMetrics(), now=lambda: 0.0, is_ready=lambda: True)
    ends = {"counter": "_total", "info": "_info"}
    return {*rows, *(family.name + ends.get(family.type, "") for family in ingress.collect())}


def settings() -> set[str]:
    return {name for name, _ in SETTING.findall(text_of(DOCS / "configuration.md"))}


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", text_of(path), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_not_to_be_ready_has_its_runbook(reason: str) -> None:
    page = RUNBOOKS / f"{reason.replace('_', '-')}.md"
    assert page.exists()
    assert f"`{reason}`" in text_of(page).splitlines()[0]
    assert f"[`{reason}`]({page.name})" in text_of(RUNBOOKS / "README.md")


def test_the_index_has_every_runbook() -> None:
    listed = set(LINK.findall(text_of(RUNBOOKS / "README.md")))
    assert {page.name for page in PAGES} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_metric_that_a_runbook_names_is_exported(page: Path) -> None:
    known = metrics()
    for name in METRIC.findall(text_of(page)):
        base = next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)
        assert name in known or base in known, name


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_document_names_is_one(page: Path) -> None:
    known = settings()
    for name, cut in SETTING.findall(text_of(page)):
        # A password may come from a file; a name that ends in "_" stands for all that go on so.
        plain = name.removesuffix("_FILE")
        begins = bool(cut) or name.endswith("_")
        assert (
            name in known
            or plain in known
            or (begins and any(one.startswith(name) for one in known))
        ), name


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_that_a_runbook_names_exists(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in re.findall(r"(?:^|`|-- )shadowsvc ([a-z][a-z-]+)", text_of(page), re.MULTILINE):
        assert name in commands, name


def test_every_promise_names_its_tests_and_they_exist() -> None:
    source = "\n".join(text_of(path) for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(
        re.findall(r"^\s*(?:async )?(?:def|class) (test_\w+|Test\w+)", source, re.MULTILINE)
    )
    defined |= set(re.findall(r"^(Test\w+) = ", source, re.MULTILINE))
    table = text_of(DOCS / "guarantees.md").partition("## What is promised")[2]
    table = table.partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = TEST.findall(row.rsplit("|", 2)[1])
        assert named, row
        missing = [name for name in named if name not in defined]
        assert not missing, f"{missing} in {row}"
        for path in re.findall(r"`(tests/[\w/.]+)`", row):
            assert (ROOT / path).exists(), path
