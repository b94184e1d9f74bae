"""Shapes: what is wanted depends on the time alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load.errors import BadOption
from load.shapes import Shape, Target

TEXT = "ramp:100:1000:50,plateau:50:300,storm:30:0.5,drain:20"


def at(shape: Shape, seconds: float) -> Target:
    found = shape.at(seconds)
    assert found is not None
    return found


def test_a_ramp_grows_evenly_in_connections_and_rate() -> None:
    shape = Shape.parse(TEXT)
    assert at(shape, 0).connections == 0
    assert at(shape, 25) == Target(0, "ramp", 250, 10.0, 12.5, 0.0)
    assert at(shape, 99.99).connections == 1000


def test_a_plateau_holds_what_was_with_its_own_rate() -> None:
    assert at(Shape.parse(TEXT), 120) == Target(1, "plateau", 1000, 0.0, 300.0, 0.0)


def test_a_storm_drops_its_share_and_wants_all_back() -> None:
    assert at(Shape.parse(TEXT), 151) == Target(2, "storm", 1000, 0.0, 300.0, 0.5)


def test_a_drain_ends_with_nobody() -> None:
    shape = Shape.parse(TEXT)
    assert at(shape, 190).connections == 500
    assert at(shape, 199.999).connections == 0
    assert shape.at(200) is None
    assert (shape.seconds, shape.most_connections) == (200, 1000)


def test_a_second_ramp_begins_where_the_first_ended() -> None:
    shape = Shape.parse("ramp:10:100,ramp:10:300")
    assert at(shape, 10).connections == 100
    assert at(shape, 15) == Target(1, "ramp", 200, 20.0, 0.0, 0.0)


def test_a_steady_shape_wants_all_from_the_start() -> None:
    shape = Shape.steady(70, 5, float("inf"))
    assert at(shape, 0) == at(shape, 1e9) == Target(0, "plateau", 70, 0.0, 5, 0.0)


@given(st.integers(1, 9), st.floats(0, 199.99))
def test_the_parts_of_several_processes_add_up_to_the_whole(parts: int, seconds: float) -> None:
    whole = Shape.parse(TEXT)
    shares = [at(whole.share(part, parts), seconds) for part in range(parts)]
    wanted = at(whole, seconds)
    # Between whole connections each part rounds by itself.
    assert sum(one.connections for one in shares) == pytest.approx(wanted.connections, abs=parts)
    assert sum(one.publish_rate for one in shares) == pytest.approx(wanted.publish_rate)
    assert {one.drop_share for one in shares} == {wanted.drop_share}


def test_parts_hold_every_connection_of_a_plateau() -> None:
    whole = Shape.parse("ramp:1:10007,plateau:9")
    assert sum(at(whole.share(part, 4), 5).connections for part in range(4)) == 10_007


@pytest.mark.parametrize(
    "text",
    ["", "ramp:10", "ramp:x:5", "flood:1:2", "storm:5:2", "plateau:0", "drain:5:6", "ramp:-1:5",
     "plateau:1:2:3", "ramp:10:-5", "ramp:10:inf", "ramp:nan:5", "plateau:5:-1", "plateau:5:nan"],
)  # fmt: skip
def test_a_shape_that_is_not_understood_is_refused_with_its_stage(text: str) -> None:
    with pytest.raises(BadOption, match=f"stage '{text}' of the shape"):
        Shape.parse(text)
