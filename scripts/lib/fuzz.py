"""A million wrong inputs: the fuzz targets of `tests/fuzz`, on all processors.

Lives here: dividing numbers of inputs among processes, progress, the report of a finding, and the
summary. Rules: an input follows from seed, target and number, whatever the number of processes; a
finding is printed at once, with a command that repeats it and one that repeats the smallest input
like it; Ctrl-C ends with the summary of what was done. Must not come in: what an input is and what
must hold of it (`tests.fuzz`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import secrets
import shlex
import signal
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.fuzz.decoder_target import DecoderTarget
from tests.fuzz.session_target import SessionTarget
from tests.fuzz.target import Finding, draw_for, finding_of, minimize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuzz.target import Target

_CHUNK: Final = 500
_CPU_SECONDS: Final = 10.0
"""What one input may take; a thousand times more than a slow one does."""
_MAX_WORKER_BYTES: Final = 512 * 1024 * 1024
_PLAIN_EVERY_SECONDS: Final = 10.0
_TARGETS: Final[dict[str, Any]] = {"decoder": DecoderTarget, "session": SessionTarget}

_targets: dict[str, Target] = {}
"""Of this process: making one costs, and none keeps anything of an input."""
_reported: set[str] = set()
"""Kinds of findings that this process has made small already."""


class Work(NamedTuple):
    """Some inputs of one target."""

    target: str
    seed: int
    first: int
    inputs: int


class Report(NamedTuple):
    """A finding as it is printed."""

    target: str
    number: int
    kind: str
    detail: str
    smallest: str
    """JSON; empty if this process has told of the kind before."""


class Done(NamedTuple):
    """What came of some work."""

    inputs: int
    outcomes: Counter[str]
    findings: list[Report]
    peak_bytes: int
    """Of the process, since its start."""


def main() -> int:
    """Run; return the exit code: 0 nothing found, 1 found, 2 bad arguments, 130 interrupted."""
    options = _arguments()
    if options.repeat is not None:
        return _repeat(json.loads(options.repeat))
    if options.input is not None:
        return _one(options.target, options.seed, options.input)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    names = list(_TARGETS) if options.target == "all" else [options.target]
    work = list(_divide(names, options.seed, options.inputs))
    print(
        f"{options.inputs:,} inputs of {' and '.join(names)}, seed {options.seed}, "
        f"{options.jobs} processes",
        flush=True,
    )
    started = time.monotonic()
    outcomes: Counter[str] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    done = peak_bytes = 0
    interrupted = False
    show = _Progress(options.inputs)
    # Not forked: a process that begins anew has the memory of its own work alone.
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, _begin_worker) as pool:
        try:
            for each in pool.imap_unordered(_work, work):
                done += each.inputs
                outcomes += each.outcomes
                peak_bytes = max(peak_bytes, each.peak_bytes)
                for report in each.findings:
                    kinds[report.target, report.kind] += 1
                    if kinds[report.target, report.kind] == 1:
                        show.line(_told(report, options.seed))
                show.progress(done, sum(kinds.values()))
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.monotonic() - started
    show.end()
    for name, count in sorted(outcomes.items(), key=lambda item: (item[0].split()[0], -item[1])):
        print(f"  {name:<32} {count:>10,}  {count / max(1, done):6.1%}")
    print(
        f"{done:,} inputs in {seconds:.0f} s: {done / seconds:,.0f}/s; "
        f"largest process {peak_bytes / 1e6:.0f} MB"
        + (f"; interrupted, {options.inputs - done:,} left" if interrupted else "")
    )
    for (target, kind), count in kinds.most_common():
        print(f"FOUND {count:,} times: {target}: {kind}")
    if peak_bytes > _MAX_WORKER_BYTES:
        print(f"FOUND: a process took more than {_MAX_WORKER_BYTES / 1e6:.0f} MB")
    found = bool(kinds) or peak_bytes > _MAX_WORKER_BYTES
    if not found:
        print("nothing found")
    return 1 if found else 130 if interrupted else 0


def _divide(names: list[str], seed: int, inputs: int) -> Iterator[Work]:
    """Take turns, so that an interrupted run has seen every target."""
    each = -(-inputs // len(names))
    for first in range(0, each, _CHUNK):
        for index, name in enumerate(names):
            share = each if index else inputs - each * (len(names) - 1)
            if first < share:
                yield Work(name, seed, first, min(_CHUNK, share - first))


# ------------------------------------------------------------------ in a process of its own


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.signal(signal.SIGVTALRM, _too_long)
    _silence()


def _silence() -> None:
    """Keep the codec's panics off the terminal: it prints each, and we catch it."""
    sys.unraisablehook = lambda _: None
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    os.close(sink)


def _too_long(*_: object) -> None:
    raise Finding(f"takes more than {_CPU_SECONDS:g} s of CPU")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _work(work: Work) -> Done:
    target = _target(work.target)
    outcomes: Counter[str] = Counter()
    findings = []
    for number in range(work.first, work.first + work.inputs):
        case = target.make(draw_for(work.seed, work.target, number))
        try:
            with _limited():
                outcomes[f"{work.target} {target.check(case)}"] += 1
        except BaseException:  # noqa: BLE001 - made into a finding, or raised again, by a second look
            with _limited():
                finding = finding_of(target, case) or Finding("not found a second time")
            findings.append(_report(target, number, case, finding))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Done(work.inputs, outcomes, findings, peak_bytes)


def _report(target: Target, number: int, case: Any, finding: Finding) -> Report:
    smallest = ""
    if finding.kind not in _reported:
        _reported.add(finding.kind)
        small = minimize(target, case, finding.kind)
        smallest = json.dumps({"target": target.name, **small.as_json()})
        finding = finding_of(target, small) or finding
    return Report(target.name, number, finding.kind, finding.detail, smallest)


def _target(name: str) -> Target:
    if name not in _targets:
        _targets[name] = _TARGETS[name]()
    return _targets[name]


# ------------------------------------------------------------------ one input again


def _one(name: str, seed: int, number: int) -> int:
    target = _target(name)
    return _look(target, target.make(draw_for(seed, name, number)))


def _repeat(members: dict[str, Any]) -> int:
    target = _target(members.pop("target"))
    return _look(target, target.from_json(members))


def _look(target: Target, case: Any) -> int:
    print(case)
    finding = finding_of(target, case)
    if finding is None:
        print(f"{target.name}: {target.check(case)}; nothing found")
        return 0
    print(f"FOUND {target.name}: {finding}")
    return 1


# ------------------------------------------------------------------ what is shown


def _told(report: Report, seed: int) -> str:
    lines = [
        f"FOUND {report.target}: {report.kind}: {report.detail}",
        f"  scripts/fuzz --target {report.target} --seed {seed} --input {report.number}",
    ]
    if report.smallest:
        lines.append(f"  scripts/fuzz --repeat {shlex.quote(report.smallest)}")
    return "\n".join(lines)


class _Progress:
    """One line that is written over and over on a terminal, else one every ten seconds."""

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._started = time.monotonic()
        self._shown = self._started
        self._over = sys.stdout.isatty()

    def progress(self, done: int, found: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._over else _PLAIN_EVERY_SECONDS):
            return
        self._shown = now
        rate = done / (now - self._started)
        left = (self._inputs - done) / rate if rate else 0.0
        text = f"{done:,} inputs, {rate:,.0f}/s, {found} findings, {left:.0f} s left"
        print(
            f"\r\x1b[2K{text}" if self._over else text, end="" if self._over else "\n", flush=True
        )

    def line(self, text: str) -> None:
        print(f"\r\x1b[2K{text}" if self._over else text, flush=True)

    def end(self) -> None:
        if self._over:
            print("\r\x1b[2K", end="")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description=(
            "Feeds mutated packets to the ingest session and mutated documents to the decoder, and "
            "checks what must hold of every answer. Exit code 0: nothing was found; 1: something "
            "was, with a command that repeats it."
        ),
    )
    add = parser.add_argument
    add("--inputs", type=int, default=1_000_000, help="how many, of all targets (1000000)")
    add("--seed", type=int, help="of all chance (a new one each time, which is printed)")
    add("--target", choices=[*_TARGETS, "all"], default="all", help="what is tried (all)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a processor)")
    add("--input", type=int, metavar="NUMBER", help="only this one; with --target and --seed")
    add("--repeat", metavar="JSON", help="only this one, as a finding printed it")
    options = parser.parse_args()
    if options.inputs < 1 or options.jobs < 1:
        parser.error("--inputs and --jobs must be 1 or more")
    if options.input is not None and (options.target == "all" or options.seed is None):
        parser.error("--input needs --target and --seed")
    if options.seed is None:
        options.seed = secrets.randbelow(1_000_000)
    return options


if __name__ == "__main__":
    sys.exit(main())
