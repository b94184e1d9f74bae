"""The files of figures and prices: each has source and date, and a name that fits its unit."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path

import pytest

from load.capacity.constants import Constants, NotMeasured, read_constants
from load.capacity.prices import PRICES_FILE, read_prices
from load.errors import BadOption

REPOSITORY = Path(__file__).parents[2]
CONSTANTS = read_constants()
UNIT_WORDS = {
    "µs": ("cpu_us",),
    "µs/s": ("cpu_us", "connection_second"),
    "bytes": ("bytes",),
    "1/s": ("per_second",),
    "leaves": ("leaves",),
    "slots": ("slots",),
    "processes": ("processes",),
    "listeners": ("listeners",),
    "connections": ("connections",),
    "descriptors": ("descriptors",),
    "ports": ("ports",),
}


def test_the_name_of_every_figure_tells_its_unit() -> None:
    for item in CONSTANTS.all:
        assert all(word in item.name for word in UNIT_WORDS[item.unit]), item.name


def test_every_value_has_a_source_a_date_and_a_command_and_a_measured_one_its_machine() -> None:
    for item in CONSTANTS.all:
        assert item.command
        if item.value is not None:
            assert item.source
            assert isinstance(item.date, dt.date)
            assert item.machine or item.kind == "fact"


def test_every_script_that_is_said_to_measure_a_figure_is_there_or_the_figure_is_not() -> None:
    for item in CONSTANTS.all:
        program = item.command.split()[0]
        if program.startswith("scripts/") and item.value is not None:
            assert (REPOSITORY / program).is_file(), item.name


def test_an_unmeasured_figure_says_what_measures_it() -> None:
    figure = dataclasses.replace(CONSTANTS.all[0], value=None)

    with pytest.raises(NotMeasured, match=f"{figure.name} is not measured yet: {figure.command}"):
        Constants({figure.name: figure})[figure.name]


def test_every_price_has_a_source_and_a_date() -> None:
    prices = read_prices()

    assert prices.managed is not None
    for source in (prices.machines_source, prices.managed.source):
        assert source.source
        assert isinstance(source.date, dt.date)


VALID = """
[part.figure_bytes]
value = 5
unit = "bytes"
kind = "measured"
source = "somewhere"
date = 2026-01-02
command = "scripts/x"
machine = "a machine"
"""


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ('source = "somewhere"', "", "lacks source"),
        ('command = "scripts/x"', "", "lacks command"),
        ('machine = "a machine"', "", "lacks machine"),
        ("date = 2026-01-02", "", "needs the date"),
        ('kind = "measured"', 'kind = "guess"', "kind has to be measured or fact"),
        ("value = 5", "value = 0", "has to be above 0"),
        ("value = 5", 'value = "5"', "has to be a number"),
        ("value = 5", "value = true", "has to be a number"),
        ("value = 5", "valeu = 5", "unknown keys: valeu"),
        ("[part.figure_bytes]", "[part", "constants.toml: "),
    ],
)
def test_a_figure_without_what_it_must_have_is_refused(
    tmp_path: Path, line: str, instead: str, message: str
) -> None:
    file = tmp_path / "constants.toml"
    assert line in VALID
    file.write_text(VALID.replace(line, instead))

    with pytest.raises(BadOption, match=message):
        read_constants(file)


def test_a_figure_without_a_value_needs_no_source(tmp_path: Path) -> None:
    file = tmp_path / "constants.toml"
    file.write_text('[a.b_bytes]\nunit = "bytes"\nkind = "measured"\ncommand = "scripts/x"\n')

    assert read_constants(file).get("a.b_bytes").value is None


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("date = 2026-07-20", 'date = "yesterday"', "needs the source and the date"),
        ("cores = 4", "cores = 0", "1 or more"),
        ("price_per_hour = 0.1785", "price_per_hour = -1", "nothing in it is below 0"),
        ("hours_per_month = 730", "hours_per_month = 0", "above 0"),
        ('currency = "USD"', "", "currency is missing"),
        ("price_per_hour = 0.1785", "", "price_per_hour"),
        ("[machines.broker]", "[machines.brokers]", "broker"),
    ],
)
def test_prices_that_lack_something_are_refused(
    tmp_path: Path, line: str, instead: str, message: str
) -> None:
    text = PRICES_FILE.read_text()
    assert line in text
    file = tmp_path / "prices.toml"
    file.write_text(text.replace(line, instead))

    with pytest.raises(BadOption, match=message):
        read_prices(file)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"--constants .*nothing"):
        read_constants(tmp_path / "nothing")
    with pytest.raises(BadOption, match=r"--prices .*nothing"):
        read_prices(tmp_path / "nothing")


def test_prices_without_a_managed_service_are_fine(tmp_path: Path) -> None:
    text = PRICES_FILE.read_text()
    file = tmp_path / "prices.toml"
    file.write_text(text[: text.index("[managed]")])

    assert read_prices(file).managed is None
