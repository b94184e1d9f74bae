"""The pure parts of the stage: plans, recovery, accounting's readings, tables, straight lines."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING

import pytest

from load.stage import accounting, growth_report, headline_report
from load.stage.accounting import KindUse, MachineUse, Reading
from load.stage.growth_report import Result, extrapolations, fit
from load.stage.headline import Observed, Sample, Step
from load.stage.ingress import address_of
from load.stage.paper import Line, Panel, Table, draw, into_document, number, page
from load.stage.plan import DoesNotFit, fitting, plan
from load.stage.recovery import recovery_of

if TYPE_CHECKING:
    from pathlib import Path

DESCRIPTORS = 20_000


# ------------------------------------------------------------------ plans


@pytest.mark.parametrize("connections", [1, 200, 8_999, 9_001, 18_000, 28_233, 50_000, 200_000])
def test_no_process_of_a_plan_needs_more_descriptors_than_it_may_have(connections: int) -> None:
    made = plan(connections, DESCRIPTORS)
    assert made.a_broker_after_a_kill < DESCRIPTORS * 0.95
    assert 2 * made.an_ingress < DESCRIPTORS * 0.95
    assert made.a_driver < DESCRIPTORS * 0.95
    assert made.brokers >= 2


def test_a_number_that_is_given_is_kept() -> None:
    made = plan(2_000, DESCRIPTORS, brokers=3, ingresses=2, drivers=4)
    assert (made.brokers, made.ingresses, made.drivers) == (3, 2, 4)


@pytest.mark.parametrize("kind", ["brokers", "ingresses", "drivers"])
def test_a_number_that_is_too_small_is_refused_by_its_option(kind: str) -> None:
    with pytest.raises(DoesNotFit, match=f"--{kind} 1 is too few"):
        plan(50_000, DESCRIPTORS, **{kind: 1})


def test_memory_bounds_how_many_connections_are_tried() -> None:
    assert fitting(50_000, 24 * 10**9) == 50_000
    assert fitting(50_000, 10**9) == 15_000
    assert fitting(50_000, 10**7) == 150


def test_addresses_of_nodes_are_on_the_loopback() -> None:
    assert address_of(31, 4) == "127.0.31.4"
    with pytest.raises(ValueError, match="no address"):
        address_of(31, 255)


# ------------------------------------------------------------------ recovery


def _series() -> list[tuple[float, int]]:
    """1,000 connected, 400 lost 2 s after the kill at 10 s, then 100 more every second."""
    return [
        (9.0, 1_000),
        (10.0, 1_000),
        (11.0, 900),
        (12.0, 600),
        *((12.0 + step, 600 + 100 * step) for step in range(1, 5)),
        (17.0, 1_000),
    ]


def test_a_recovery_says_what_was_lost_and_when_it_was_back() -> None:
    found = recovery_of(_series(), 10.0)
    assert found is not None
    assert (found.before, found.lost, found.lowest_seconds) == (1_000, 400, 2.0)
    assert found.back_seconds == {"50%": 4.0, "90%": 6.0, "99%": 6.0, "100%": 6.0}
    assert found.half_life_seconds == 2.0
    assert found.most_connects_per_second == 100.0
    assert found.missing[0] == (1.0, 100)


def test_what_did_not_come_back_has_no_time() -> None:
    found = recovery_of([(0.0, 100), (1.0, 50), (2.0, 80)], 0.5)
    assert found is not None
    assert found.back_seconds["50%"] == 1.5
    assert found.back_seconds["100%"] is None


def test_a_return_that_did_not_last_is_none() -> None:
    series = [(0.0, 100), (1.0, 0), (2.0, 100), (3.0, 20), (4.0, 100)]
    found = recovery_of(series, 0.5)
    assert found is not None
    assert found.back_seconds["50%"] == 3.5


def test_without_samples_on_both_sides_there_is_no_recovery() -> None:
    assert recovery_of([(0.0, 100)], 1.0) is None
    assert recovery_of([(2.0, 100)], 1.0) is None


# ------------------------------------------------------------------ accounting


def test_a_reading_of_this_process_has_its_memory_and_descriptors() -> None:
    found = accounting.reading({"me": [os.getpid()], "nobody": [2**22 + 1]})
    mine = found.kinds["me"]
    assert mine.processes == 1
    assert mine.pss_bytes > 1_000_000
    assert mine.descriptors == mine.most_descriptors > 2
    assert mine.cpu_seconds > 0
    assert found.kinds["nobody"].processes == 0
    assert found.machine.available_bytes > 0
    assert found.machine.slab_bytes > 0
    assert found.machine.busy_seconds > 0


def test_shares_of_cpu_are_differences_over_the_time_between() -> None:
    machine = MachineUse(0, 0, 0, 0, 0, 100.0)
    later_machine = MachineUse(0, 0, 0, 0, 0, 103.0)
    first = Reading(10.0, {"broker": KindUse(2, 0, 5.0, 0, 0)}, machine)
    second = Reading(12.0, {"broker": KindUse(2, 0, 6.0, 0, 0)}, later_machine)
    assert second.cpu_share(first) == {"broker": 0.5}
    assert second.busy_share(first) == 1.5


def test_a_killed_broker_makes_no_negative_share() -> None:
    machine = MachineUse(0, 0, 0, 0, 0, 0.0)
    first = Reading(10.0, {"broker": KindUse(2, 0, 5.0, 0, 0)}, machine)
    second = Reading(12.0, {"broker": KindUse(1, 0, 3.0, 0, 0)}, machine)
    assert second.cpu_share(first) == {"broker": 0.0}


# ------------------------------------------------------------------ paper


def test_a_table_is_the_same_as_markdown_and_as_html() -> None:
    table = Table("Bytes", ("kind", "bytes"), (("broker", "5,000"), ("<client>", "70")))
    assert table.markdown().splitlines() == [
        "| kind     | bytes |",
        "| -------- | ----: |",
        "| broker   | 5,000 |",
        "| <client> |    70 |",
    ]
    assert "<td>&lt;client&gt;</td><td>70</td>" in table.html()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "-"), (12_345.6, "12,346"), (3.0, "3"), (0.01234, "0.0123"), (0, "0")],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_only_what_is_between_the_marks_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "scale.md"
    document.write_text("before\n<!-- scale: begin -->\nold\n<!-- scale: end -->\nafter\n")
    into_document(document, "scale", "new")
    wanted = "before\n<!-- scale: begin -->\n\nnew\n\n<!-- scale: end -->\nafter\n"
    assert document.read_text() == wanted
    into_document(document, "scale", "new")
    assert document.read_text() == wanted
    with pytest.raises(ValueError, match="no place for growth"):
        into_document(document, "growth", "new")


def test_a_page_holds_tables_warnings_and_pictures(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    draw(
        picture, "curves", [Panel("one", "x", "y", (Line("a", [1, 2], [3, 4]),), ((1.5, "kill"),))]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    made = tmp_path / "a.html"
    table = Table("Bytes", ("kind", "bytes"), (("broker", "5,000"),))
    page(
        made,
        title="A run",
        command="scripts/scale",
        notes=["n"],
        warnings=["late"],
        tables=[table],
        pictures=[picture],
    )
    text = made.read_text()
    assert "5,000" in text
    assert 'class="warning">late' in text
    assert "data:image/png;base64," in text


# ------------------------------------------------------------------ growth


def _result(axis: str, value: int, cpu_us: float, broker_mb: float | None = None) -> Result:
    return Result(
        axis=axis,
        value=value,
        note="",
        updates_per_second=1_000.0,
        cpu_us=cpu_us,
        cassandra_cpu_us=1.0,
        broker_cpu_us=1.0,
        loadgen_cpu_us=1.0,
        others_share=0.0,
        rss_mb=100.0,
        updates=1,
        devices=1,
        broker_mb=broker_mb,
    )


def test_a_straight_line_goes_through_points_that_lie_on_one() -> None:
    line = fit([(1, 12.0), (2, 14.0), (4, 18.0)])
    assert line is not None
    assert (round(line.base, 9), round(line.slope, 9), round(line.explained, 9)) == (10.0, 2.0, 1.0)
    assert fit([(1, 1.0), (2, 2.0)]) is None
    assert fit([(1, 1.0), (1, 2.0), (1, 3.0)]) is None


def test_extrapolations_lie_beyond_the_last_point_and_are_called_so() -> None:
    results = [_result("leaves", value, 10.0 + 2 * value) for value in (1, 4, 200)]
    (found,) = extrapolations(results)
    assert found["axis"] == "leaves"
    assert found["extrapolated"] == {"500": pytest.approx(1010.0)}
    dashed = [
        line for panel in growth_report.panels(results) for line in panel.lines if line.dashed
    ]
    assert [line.label for line in dashed] == ["extrapolated"]
    assert "not measured" in growth_report.tables(results)[-1].headings[-1]


def test_a_run_without_a_result_is_a_report_all_the_same(tmp_path: Path) -> None:
    from load.stage import growth

    options = growth._options(["--quick", "--json", str(tmp_path / "g.json")])
    options.page, options.plot = tmp_path / "g.html", tmp_path / "g.png"
    growth_report.write(options, [], ["leaves 1: lost"], interrupted=True)
    told = json.loads((tmp_path / "g.json").read_text())
    assert told["interrupted"]
    assert told["failed"] == ["leaves 1: lost"]
    assert "Interrupted" in (tmp_path / "g.html").read_text()


def test_every_axis_of_growth_makes_points_of_its_values() -> None:
    from load.stage import growth

    options = growth._options([])
    base = growth.base_load(options)
    for name, axis in growth.AXES.items():
        for value in axis.values:
            points = list(axis.points(base, value, options))
            assert points
            assert all((point.axis, point.value) == (name, value) for point in points)
    assert {point.nodes for point in growth.AXES["nodes"].points(base, 3, options)} == {3}


# ------------------------------------------------------------------ headline


def _reading(at: float, service: float, driver: float) -> Reading:
    machine = MachineUse(0, 0, 0, 0, 0, service + driver + at * 0.5)
    kinds = {
        "service": KindUse(1, 100_000_000, service, 0, 0),
        "driver": KindUse(1, 50_000_000, driver, 0, 0),
    }
    return Reading(at, kinds, machine)


def _end(**given: float) -> dict[str, float]:
    names = ("mean_ms", "p50_ms", "p99_ms", "max_ms")
    return {
        "seconds": 10.0,
        **dict.fromkeys(names, 20.0),
        **dict.fromkeys([f"arrive_{name}" for name in names], 5.0),
        "p999_ms": 30.0,
        "late_p50_ms": 0.1,
        "late_p99_ms": 0.5,
        **given,
    }


def _headline(durable: int, **given: float) -> Observed:
    observed = Observed(plan(500, DESCRIPTORS, spare_brokers=0), connected=500)
    step = Step(1_000.0, 100.0, _reading(0.0, 0.0, 0.0), _reading(10.0, 5.0, 1.0), _end(**given))
    step.published, step.durable_in_time = 10_000, durable
    observed.steps.append(step)
    observed.missing = observed.fleet_missing = 0
    return observed


def test_a_rate_that_was_carried_is_told_with_the_cpu_of_every_part() -> None:
    found = headline_report.figures(_headline(10_000))
    (step,) = found["steps"]
    assert step["carried"]
    assert step["cpu_share"] == pytest.approx(
        {"service": 0.5, "driver": 0.1, "other processes": 0.5}
    )
    assert sum(step["cpu_share"].values()) == pytest.approx(step["busy_share"])
    assert step["cpu_us_an_update"]["service"] == pytest.approx(500.0)
    assert headline_report.warnings(found) == []
    assert "69" in headline_report.tables(found)[0].rows[0]


def test_a_rate_that_was_not_carried_is_called_so() -> None:
    found = headline_report.figures(_headline(8_000))
    assert not found["steps"][0]["carried"]
    (warning,) = headline_report.warnings(found)
    assert warning.startswith("NOT CARRIED: 1,000/s were offered, 800/s became durable")


def test_what_the_service_got_twice_is_told() -> None:
    observed = _headline(10_000)
    observed.reconnects, observed.again = 2, 3_000
    (warning,) = headline_report.warnings(headline_report.figures(observed))
    assert warning.startswith("The service lost its connection 2 times, got 3,000 updates again")


def test_a_rig_that_was_late_is_named_as_the_limit() -> None:
    found = headline_report.figures(_headline(10_000, late_p99_ms=80.0))
    assert found["steps"][0]["bottleneck"] == ["the load generator was 80 ms late (p99)"]


@pytest.mark.parametrize(
    ("missing", "fleet_missing", "good"),
    [(0, 0, True), (1, 0, False), (0, 1, False), (None, 0, False)],
)
def test_a_run_is_whole_only_if_everything_was_read_back(
    missing: int | None, fleet_missing: int, *, good: bool
) -> None:
    observed = _headline(10_000)
    observed.missing, observed.fleet_missing = missing, fleet_missing
    assert headline_report.whole(observed) is good
    assert bool(headline_report.warnings(headline_report.figures(observed))) is not good


def test_a_headline_that_was_interrupted_before_anything_is_a_report(tmp_path: Path) -> None:
    from load.stage import headline

    options = headline._options(["--quick", "--json", str(tmp_path / "h.json")])
    options.page, options.plot = tmp_path / "h.html", tmp_path / "h.png"
    observed = Observed(plan(500, DESCRIPTORS, spare_brokers=0), interrupted=True)
    headline_report.write(options, observed)
    assert "Not read back" in (tmp_path / "h.html").read_text()


def test_the_curves_of_a_headline_are_those_of_its_samples() -> None:
    observed = _headline(10_000)
    for at in (0, 5, 10):
        now = _reading(float(at), at / 2, at / 10)
        observed.steps[0].samples.append(Sample(at, at * 1_000, 500, 20.0, 40.0, 5.0, 9.0, now))
    rate, latency, cpu, connections = headline_report.panels(observed)
    assert list(rate.lines[0].ys) == [1_000.0, 1_000.0]
    assert [line.label for line in latency.lines if line.dashed] == ["69 ms"]
    assert {line.label: list(line.ys) for line in cpu.lines}["service"] == [0.5, 0.5]
    assert list(connections.lines[0].ys) == [500.0, 500.0, 500.0]
