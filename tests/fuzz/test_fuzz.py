"""A sample of what `scripts/fuzz` tries a million of, and that it would notice a defect."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shadowsvc.errors import Rejected
from shadowsvc.mqtt.session import Session
from shadowsvc.shadow.document import REASONS, Decoder
from tests.fuzz.decoder_target import DecoderCase, DecoderTarget
from tests.fuzz.publish_reader import Message, frames_of, message_of
from tests.fuzz.session_target import SessionCase, SessionTarget
from tests.fuzz.target import Finding, draw_for, finding_of, minimize

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuzz.target import Target

# The codec's panic on text that is not UTF-8 leaves an exception that nobody can catch behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(120),
]

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, str(ROOT / "scripts" / "lib" / "fuzz.py"))
SEED = 7
SAMPLE = 6000
RIGHT = b'{"state":{"reported":{"a":{"b":7}}},"timestamp":1700000000000}'
PUBLISH = b"\x32\x06\x00\x01t\x00\x01\x00"


def sample(target: Target, count: int = SAMPLE) -> Counter[str]:
    seen: Counter[str] = Counter()
    for number in range(count):
        case = target.make(draw_for(SEED, target.name, number))
        try:
            seen[target.check(case)] += 1
        except BaseException:  # noqa: BLE001 - a panic too; told with what repeats it
            pytest.fail(
                f"{finding_of(target, case)}\nscripts/fuzz --target {target.name} "
                f"--seed {SEED} --input {number}"
            )
    return seen


def test_no_bytes_make_the_decoder_break_its_promises() -> None:
    seen = sample(DecoderTarget())
    # Every way a document can end is among them: the sample has not gone blind.
    reachable = {*REASONS, "accepted"} - {"refused_by_store", "internal_error"}
    assert set(seen) == reachable
    assert seen["accepted"] > SAMPLE / 10


def test_no_bytes_make_the_session_break_its_promises() -> None:
    seen = sample(SessionTarget())
    assert set(seen) == {
        "all taken",
        "waits for more",
        "ProtocolViolation",
        "MqttRefused",
        "ConnectionLost",
    }
    assert seen["all taken"] > SAMPLE / 20


# ------------------------------------------------------------------ defects that it would find


def broken_decode(change: Callable[[Any], Any]) -> Callable[..., Any]:
    right = Decoder.decode

    def decode(self: Decoder, *arguments: Any) -> Any:
        return change(right(self, *arguments))

    return decode


def with_float(update: Any) -> Any:
    update.values = [b"7.5" for _ in update.values]
    return update


def without_a_leaf(update: Any) -> Any:
    update.paths, update.values = update.paths[1:], update.values[1:]
    update.desired_from -= 1
    return update


def raise_it(_update: Any) -> Any:
    raise KeyError("x")


def reject_it(_update: Any) -> Any:
    raise Rejected("because", "x")


def reject_at_length(_update: Any) -> Any:
    raise Rejected("not_json", "\x1b[2J")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (with_float, "a leaf that is not the document's"),
        (without_a_leaf, "a leaf that is not the document's"),
        (raise_it, "KeyError came out"),
        (reject_it, "an unknown reason"),
        (reject_at_length, "a detail with control characters"),
    ],
)
def test_a_defect_of_the_decoder_is_found_and_made_small(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], kind: str
) -> None:
    monkeypatch.setattr(Decoder, "decode", broken_decode(change))
    target = DecoderTarget()
    case = DecoderCase(RIGHT.replace(b"{", b"{  ", 1))
    finding = finding_of(target, case)
    assert finding is not None
    assert finding.kind == kind
    small = minimize(target, case, kind)
    assert len(small.data) < len(case.data)
    again = finding_of(target, target.from_json(json.loads(json.dumps(small.as_json()))))
    assert again is not None
    assert again.kind == kind


def test_a_number_that_lost_its_value_and_a_limit_that_does_not_hold_are_found() -> None:
    target = DecoderTarget()
    target._veterans[0].limits.max_payload_bytes = 1 << 20
    assert target.check(DecoderCase(RIGHT)) == "accepted"
    with pytest.raises(Finding, match="not deterministic"):
        target.check(DecoderCase(RIGHT + b" " * 65536))


def lose_what_was_cut(right: Callable[..., int]) -> Callable[..., int]:
    def receive(self: Session, view: memoryview, now: float) -> int:
        used = right(self, view, now)
        return len(view) if used else used  # the rest is forgotten

    return receive


def hand_over_twice(right: Callable[..., int]) -> Callable[..., int]:
    def receive(self: Session, view: memoryview, now: float) -> int:
        if len(view) and view[0] == 0x32:
            right(self, view, now)
        return right(self, view, now)

    return receive


def raise_plainly(right: Callable[..., int]) -> Callable[..., int]:
    def receive(self: Session, view: memoryview, now: float) -> int:
        if len(view) > 3 and view[0] == 0x32:
            raise IndexError("x")
        return right(self, view, now)

    return receive


@pytest.mark.parametrize(
    ("defect", "kinds"),
    [
        (lose_what_was_cut, {"cut elsewhere, other messages", "cut elsewhere, another error"}),
        (hand_over_twice, {"handed over another number of times than once"}),
        (raise_plainly, {"IndexError came out"}),
    ],
)
def test_a_defect_of_the_session_is_found(
    monkeypatch: pytest.MonkeyPatch, defect: Callable[..., Any], kinds: set[str]
) -> None:
    monkeypatch.setattr(Session, "receive", defect(Session.receive))
    target = SessionTarget()
    found = {
        finding.kind
        for chance in range(40)
        if (finding := finding_of(target, SessionCase(PUBLISH * 5, chance))) is not None
    }
    assert found
    assert found <= kinds


def test_the_second_reader_reads_what_is_right_and_doubts_the_rest() -> None:
    frames, rest = frames_of(PUBLISH + b"\xd0\x00" + PUBLISH[:5])
    assert (frames, rest) == ([PUBLISH, b"\xd0\x00"], PUBLISH[:5])
    full = b"\x3b\x18\x00\x02\xc3\xa9\x00\x07\x0c\x23\x00\x02\x01\x01\x26\x00\x01a\x00\x01bxyz"
    assert message_of(full) == Message("é", b"xyz", 7, True, True, 1, 2, (("a", "b"),))
    for wrong in (
        b"\xd0\x00",
        b"\x34" + PUBLISH[1:],  # QoS 2
        b"\x38\x04\x00\x01t\x00",  # DUP of QoS 0
        PUBLISH[:-2] + b"\x00\x00",  # packet id 0
        b"\x30\x04\x00\x01+\x00",  # a wildcard
        b"\x30\x04\x00\x01\xff\x00",  # not UTF-8
        b"\x30\x07\x00\x01t\x03\x23\x00\x00",  # alias 0
        b"\x30\x04\x00\x09t\x00",  # a topic longer than the packet
        b"\x30\x05\x00\x01t\x80\x00",  # a length that could be shorter
    ):
        assert message_of(wrong) is None


# ------------------------------------------------------------------ the command


def environment(*first: Path) -> dict[str, str]:
    """Return the variables of the command; modules of `first` come before all others."""
    path = ":".join(map(str, [*first, ROOT / "src", ROOT]))
    return {**os.environ, "PYTHONPATH": path, "RUST_BACKTRACE": "0"}


def run(*arguments: str, first: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(*first),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_command_says_what_it_tried_and_how_fast_and_ends_with_0() -> None:
    done = run("--inputs", "1500", "--seed", "3", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1,500 inputs in \d+ s: [\d,]+/s", done.stdout)
    counts = re.findall(
        r"^  (?:decoder|session) .+? +([\d,]+)  +[\d.]+%$", done.stdout, re.MULTILINE
    )
    assert sum(int(count.replace(",", "")) for count in counts) == 1500


def test_an_input_can_be_tried_again_by_its_number_and_by_its_bytes() -> None:
    assert run("--target", "decoder", "--seed", "3", "--input", "5").returncode == 0
    members = {"target": "session", **SessionCase(PUBLISH, 1).as_json()}
    done = run("--repeat", json.dumps(members))
    assert done.returncode == 0, done.stderr
    assert "all taken" in done.stdout
    assert run("--input", "5").returncode == 2


def test_a_finding_ends_with_1_and_with_commands_that_repeat_it(tmp_path: Path) -> None:
    # A site module breaks the decoder in every process of the command.
    (tmp_path / "sitecustomize.py").write_text(
        "from shadowsvc.shadow.document import Decoder\n"
        "right = Decoder.decode\n"
        "def decode(self, topic, payload, *rest):\n"
        "    update = right(self, topic, payload, *rest)\n"
        "    if b'true' in payload:\n"
        "        raise KeyError('true')\n"
        "    return update\n"
        "Decoder.decode = decode\n"
    )
    arguments = ["--inputs", "600", "--seed", "3", "--jobs", "1", "--target", "decoder"]
    done = run(*arguments, first=(tmp_path,))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "KeyError came out" in done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if "scripts/fuzz" in line]
    assert len(lines) == 2
    for line in lines:
        again = run(*shlex.split(line)[1:], first=(tmp_path,))
        assert again.returncode == 1, again.stdout + again.stderr
        assert "KeyError came out" in again.stdout


def test_ctrl_c_ends_it_with_the_summary() -> None:
    process = subprocess.Popen(
        [*COMMAND, "--inputs", "100000000", "--seed", "3", "--jobs", "1"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert "100,000,000 inputs" in process.stdout.readline()
        time.sleep(3)  # some work gets done; how much does not matter
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.search(r"interrupted, [\d,]+ left", output)
    assert "nothing found" in output
