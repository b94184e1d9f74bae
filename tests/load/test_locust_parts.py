"""What Locust's side of the rig decides without Locust: options, pace, own limits, words."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from configargparse import ArgumentParser

from load.errors import BadOption
from load.locust.arguments import Plan, add_arguments, targets_of
from load.locust.pace import schedule, users_and_rate
from load.locust.summary import html_section, lines, progress, with_section
from load.locust.watch import WINDOW_SECONDS, Verdict, Watch
from load.shapes import Shape

if TYPE_CHECKING:
    from pathlib import Path

HOST = "ws://127.0.0.1:8000/mqtt"


def given(*arguments: str, **environment: str) -> dict[str, Any]:
    parser = ArgumentParser()
    add_arguments(parser)
    found: dict[str, Any] = vars(parser.parse_args(list(arguments), env_vars=environment))
    return found


def test_gevent_changes_nothing_outside_of_locusts_processes() -> None:
    names = ("arguments", "life", "pace", "summary", "watch", "wire")
    code = f"""
import sys
for name in {names}:
    __import__("load.locust." + name)
print("gevent" in sys.modules, "locust" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert "gevent.monkey" not in sys.modules, "nor is it in the tests' own process"


# ------------------------------------------------------------------------------- options


def test_what_is_not_given_makes_devices_that_publish_and_come_back_with_full_jitter() -> None:
    plan = Plan.of(HOST, given())
    assert plan.shape is None
    assert plan.interval_seconds == 10
    assert (plan.options.backoff.name, plan.options.backoff.floor_share) == ("full-jitter", 0)
    assert plan.options.topic.format(client_id="a") == "things/a/shadow/update"
    assert plan.options.clean_start


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("--families", "toaster", "family 'toaster'"),
        ("--shape", "ramp:10", "the stage 'ramp:10' of the shape"),
        ("--backoff", "soon", "--backoff 'soon': one of"),
        ("--sources", "127.0.0.x", "source '127.0.0.x'"),
        ("--qos", "2", "--qos 2"),
        ("--client-id", "lamp", "--client-id 'lamp'"),
        ("--interval", "-1", "--interval"),
        ("--devices-per-worker", "0", "--devices-per-worker"),
        ("--connect-rate", "0", "--connect-rate"),
        ("--passwords", "/nowhere/at/all", "--passwords /nowhere/at/all"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(argument: str, value: str, words: str) -> None:
    with pytest.raises(BadOption, match=re.escape(words)):
        Plan.of(HOST, given(f"{argument}={value}")).options.source()


@pytest.mark.parametrize("host", ["", None, "http://127.0.0.1", f"{HOST},127.0.0.1:1883"])
def test_a_target_that_is_none_is_refused(host: str | None) -> None:
    with pytest.raises(BadOption, match=r"target"):
        targets_of(host)


def test_options_come_from_the_environment_too() -> None:
    plan = Plan.of(HOST, given(LOAD_INTERVAL="2.5", LOAD_SHAPE="ramp:10:5", LOAD_TRAIL="true"))
    assert plan.interval_seconds == 2.5
    assert plan.shape is not None
    assert plan.shape.most_connections == 5
    assert plan.options.trail is True


def test_each_device_has_its_own_password(tmp_path: Path) -> None:
    file = tmp_path / "devices"
    file.write_text("load-0000001:one\nload-0000002:with:colon\n\n")
    common = tmp_path / "common"
    common.write_text("all of them\nnot this\n")
    plan = Plan.of(HOST, given("--passwords", str(file), "--password-file", str(common)))
    assert plan.options.password == b"all of them"
    assert plan.passwords == {"load-0000001": b"one", "load-0000002": b"with:colon"}


# ------------------------------------------------------------------------------- pace


SHAPE = Shape.parse("ramp:10:100:50,plateau:20,storm:30:0.5:200,drain:5")


def test_locust_is_told_where_a_stage_ends_and_goes_on_so_until_another_changes_it() -> None:
    assert users_and_rate(SHAPE, 0) == (100, 10)
    assert users_and_rate(SHAPE, 9.9) == (100, 10)
    # The same in the stages that change nothing: a ramp that is late is not slowed down.
    assert users_and_rate(SHAPE, 15) == (100, 10)
    assert users_and_rate(SHAPE, 59) == (100, 10)
    assert users_and_rate(SHAPE, 60) == (0, 20)
    assert users_and_rate(SHAPE, 65) is None


@pytest.mark.parametrize("passed", [0.0, 1.0, 9.9, 10.0, 29.9])
def test_a_devices_interval_makes_the_rate_that_the_shape_wants_of_all(passed: float) -> None:
    # 100 devices and 50 a second, from the first device of the ramp on.
    assert schedule(SHAPE, passed, 7).interval_seconds == pytest.approx(2, rel=0.2)


def test_a_storm_begins_for_all_at_the_same_moment_and_has_its_own_rate() -> None:
    before = schedule(SHAPE, 29, 7)
    assert (before.until, before.drop_share) == (30, 0)
    storm = schedule(SHAPE, before.until, 7)
    assert (storm.stage, storm.drop_share, storm.until) == (2, 0.5, 60)
    assert storm.interval_seconds == 0.5


def test_without_a_rate_in_the_shape_each_device_has_its_interval() -> None:
    quiet = Shape.parse("ramp:10:100,plateau:20")
    assert schedule(quiet, 3, 7).interval_seconds == 7
    assert schedule(quiet, 15, 7).interval_seconds == 7
    assert schedule(quiet, 30, 7) == (math.inf, math.inf, 0, 0)


# ------------------------------------------------------------------------------- own limits


def watch_of(*windows: tuple[float, float]) -> Verdict:
    """Return what windows of (CPU share, lateness) say."""
    now = cpu = 100.0
    watch = Watch(now, cpu)
    for share, late in windows:
        for _ in range(100):
            watch.late(late)
        now += WINDOW_SECONDS
        cpu += share * WINDOW_SECONDS
        watch.look(now, cpu)
    return watch.verdict(now, cpu)


def test_a_rig_that_has_room_says_so() -> None:
    verdict = watch_of((0.5, 0.001), (0.89, 0.04))
    assert verdict.bad_seconds == 0
    assert verdict.seconds == 20
    assert "was not the bottleneck" in verdict.words("worker 1")


@pytest.mark.parametrize("bad", [(0.95, 0.001), (0.2, 0.08)], ids=["cpu", "timers"])
def test_one_bad_minute_is_not_hidden_by_the_mean_of_a_long_run(bad: tuple[float, float]) -> None:
    verdict = watch_of(*[(0.1, 0.001)] * 50, bad, *[(0.1, 0.001)] * 50)
    assert (verdict.seconds, verdict.bad_seconds) == (1010, 10)
    assert "was the bottleneck for 10 s of 1010 s" in verdict.words("the rig")
    assert Verdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict


def test_a_window_that_is_not_over_counts_if_it_says_anything() -> None:
    watch = Watch(0, 0)
    assert watch.verdict(0.5, 0.5).seconds == 0
    assert watch.verdict(2, 2).bad_seconds == 2
    assert watch.verdict(2, 2).bad_seconds == 2, "asking changes nothing"


# ------------------------------------------------------------------------------- words


def process(worker: int, *, cpu: float, published: int) -> dict[str, Any]:
    verdict = Verdict()
    verdict.take(10, cpu, 0.001)
    counts = dict.fromkeys(
        ("connected", "connecting", "connects", "connects_failed", "dropped", "acknowledged",
         "unrouted", "refused", "unanswered", "skipped"), 1,
    )  # fmt: skip
    return {**counts, "published": published, "worker": worker, "verdict": verdict.as_json()}


def test_the_summary_says_first_whether_to_trust_it_and_adds_up_the_processes() -> None:
    good, bad = process(0, cpu=0.3, published=5), process(1, cpu=0.97, published=7)
    assert lines({"worker 0": good})[1].startswith("The rig was not the bottleneck")
    said = lines({"worker 0": good, "worker 1": bad})
    assert said[1] == "The rig was the bottleneck: 1 of 2 processes were at their limit."
    assert any("worker 1 was the bottleneck for 10 s of 10 s" in line for line in said)
    assert any("12 published, 2 acknowledged" in line for line in said)
    assert "12 published" in progress({"worker 0": good, "worker 1": bad})
    assert lines({}) == []


def test_the_report_has_a_table_and_the_figures_and_no_markup_of_strangers() -> None:
    section = html_section({"<worker> </script>": process(0, cpu=0.1, published=5)})
    page = with_section("<html><body><div></div></body></html>", section)
    assert page.startswith("<html><body><section")
    assert "<worker>" not in page.partition("<script")[0]
    found = re.search(r'id="load-figures">(.*?)</script>', page)
    assert found
    assert json.loads(found[1])["<worker> </script>"]["published"] == 5
