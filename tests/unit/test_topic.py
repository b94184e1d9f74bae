"""Topic names: what names a shadow, and what is turned away with which reason."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowsvc.errors import Rejected
from shadowsvc.shadow.document import REASONS
from shadowsvc.shadow.topic import MAX_NAME_CHARS, TopicParser
from shadowsvc.store.cassandra import PROBE_DEVICE

TOPICS = TopicParser("things")
NAMES = st.text("abzAZ09_.:@=-", min_size=1, max_size=MAX_NAME_CHARS)
LEVELS = st.sampled_from(
    ["things", "shadow", "name", "update", "", "a", "d-1", "$shadowsvc", "é", "a b", "update2", "+"]
)


def matches(topic_filter: str, topic: str) -> bool:
    """MQTT 5 §4.7 for filters without `#`."""
    expression = "/".join(
        "[^/]*" if level == "+" else re.escape(level) for level in topic_filter.split("/")
    )
    return re.fullmatch(expression, topic, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("topic", "device", "shadow"),
    [
        ("things/d/shadow/update", "d", ""),
        ("things/d/shadow/name/firmware/update", "d", "firmware"),
        ("things/aa:bb:cc:00:11:22/shadow/update", "aa:bb:cc:00:11:22", ""),
        ("things/urn:imei:490154203237518/shadow/update", "urn:imei:490154203237518", ""),
        ("things/user@example.com/shadow/update", "user@example.com", ""),
        ("things/CN=d.1_2/shadow/update", "CN=d.1_2", ""),
        ("things/things/shadow/update", "things", ""),
        ("things/shadow/shadow/update", "shadow", ""),
        ("things/update/shadow/update", "update", ""),
        ("things/name/shadow/name/name/update", "name", "name"),
        ("things/d/shadow/name/update/update", "d", "update"),
        ("things/d/shadow/name/shadow/update", "d", "shadow"),
        ("things/shadow/shadow/name/shadow/update", "shadow", "shadow"),
        (f"things/{'x' * 128}/shadow/update", "x" * 128, ""),
        (f"things/d/shadow/name/{'x' * 128}/update", "d", "x" * 128),
    ],
)
def test_a_topic_names_a_device_and_a_shadow(topic: str, device: str, shadow: str) -> None:
    assert TOPICS.parse(topic) == (device, shadow)


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("", "topic"),
        ("things", "topic"),
        ("things/d", "topic"),
        ("things/d/shadow", "topic"),
        ("things/d/shadow/get", "topic"),
        ("things/d/shadow/update/", "topic"),
        ("things/d/shadow/update/accepted", "topic"),
        ("things/d/shadow/name/update", "topic"),
        ("things/d/shadow/name//update", "topic"),
        ("things/d/shadow/name/a/b/update", "topic"),
        ("things/d/shadow/name/a/update/update", "topic"),
        ("things/d/shadow/name/é/update", "topic"),
        (f"things/d/shadow/name/{'x' * 129}/update", "topic"),
        ("other/d/shadow/update", "topic"),
        ("thingsx/d/shadow/update", "topic"),
        ("/things/d/shadow/update", "topic"),
        ("other/d/shadow/name/shadow/update", "topic"),
        ("things//shadow/update", "device_name"),
        ("things/shadow/update", "device_name"),
        ("things/a/b/shadow/update", "device_name"),
        ("things//shadow/name/shadow/update", "device_name"),
        ("things/a b/shadow/update", "device_name"),
        ("things/a\n/shadow/update", "device_name"),
        ("things/a\0/shadow/update", "device_name"),
        ("things/é/shadow/update", "device_name"),
        ("things/\u0661/shadow/update", "device_name"),
        ("things/a+b/shadow/update", "device_name"),
        ("things/$a/shadow/update", "device_name"),
        (f"things/{'x' * 129}/shadow/update", "device_name"),
        ("things/é/shadow/name/a/update", "device_name"),
    ],
)
def test_what_names_none_is_rejected_with_its_reason(topic: str, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        TOPICS.parse(topic)
    assert caught.value.reason == reason


def test_no_device_has_the_name_of_the_probe() -> None:
    with pytest.raises(Rejected, match="device_name"):
        TOPICS.parse(f"things/{PROBE_DEVICE}/shadow/update")


@pytest.mark.parametrize("prefix", ["things", "a/b", "x", "shadow", "a/shadow/name/b"])
def test_the_prefix_is_part_of_filters_and_topics(prefix: str) -> None:
    topics = TopicParser(prefix)
    assert topics.filters() == (
        f"{prefix}/+/shadow/update",
        f"{prefix}/+/shadow/name/+/update",
    )
    assert topics.parse(f"{prefix}/d/shadow/update") == ("d", "")
    assert topics.parse(f"{prefix}/d/shadow/name/s/update") == ("d", "s")


@given(NAMES, NAMES)
def test_every_name_survives(device: str, shadow: str) -> None:
    assert TOPICS.parse(f"things/{device}/shadow/update") == (device, "")
    assert TOPICS.parse(f"things/{device}/shadow/name/{shadow}/update") == (device, shadow)


@settings(max_examples=400, deadline=None)
@given(st.lists(LEVELS, max_size=8).map("/".join) | st.text(max_size=40))
def test_what_is_accepted_matches_exactly_one_filter_and_the_rest_is_rejected(topic: str) -> None:
    hits = [matches(topic_filter, topic) for topic_filter in TOPICS.filters()]
    try:
        device, shadow = TOPICS.parse(topic)
    except Rejected as rejected:
        assert rejected.reason in {"topic", "device_name"}
        assert rejected.reason in REASONS
        return
    assert hits == [not shadow, bool(shadow)]
    middle = f"name/{shadow}/" if shadow else ""
    assert topic == f"things/{device}/shadow/{middle}update"
