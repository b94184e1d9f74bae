"""Compare shadowsvc with its peers in one run; started by `scripts/bench`, which builds the peers.

Services take turns, round after round, so that what changes on the machine meanwhile meets all of
them. README.md says what is measured and why so.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from backing import RAISED_THRESHOLDS, BackingError, Cassandra
from bench import report
from bench.measure import BenchError, Load, Run, run
from bench.services import DEFAULT_SERVICES, REPOSITORY, SERVICES

_OUT = REPOSITORY / "out"
_DEFAULT_RATE = 9779.0  # publishes a second of the system that shadowsvc is made for


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    runs: list[Run] = []
    status = 0
    try:
        with Cassandra(heap=options.heap, settings=RAISED_THRESHOLDS) as cassandra:
            _say(f"Cassandra is up ({options.heap} heap); logs of the services: {options.logs}")
            _measure(options, cassandra, runs)
    except KeyboardInterrupt:
        _say("interrupted; what was measured so far:")
        status = 130
    except (BenchError, BackingError) as error:
        _say(f"failed: {error}")
        status = 1
    if runs:
        _report(options, runs)
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure updates/s, CPU an update, publish-to-durable latency and memory of "
        "shadowsvc and its peers, in turns, on the same kind of broker, Cassandra and load.",
    )
    parser.add_argument(
        "--services",
        type=lambda text: text.split(","),
        default=list(DEFAULT_SERVICES),
        metavar="NAME,NAME",
        help=f"which, of {', '.join(SERVICES)} (default: {','.join(DEFAULT_SERVICES)})",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="turns of every service (default: %(default)s)")
    add(
        "--seconds", type=float, default=10.0,
        help="length of each of the two measured windows (default: %(default)s)",
    )  # fmt: skip
    add(
        "--rate", type=float, default=_DEFAULT_RATE,
        help="the fixed rate, updates/s; 0 leaves it out (default: %(default)g)",
    )  # fmt: skip
    add(
        "--warm-up", type=float, default=15.0,
        help="seconds of saturation by every service before the first round, for the sake of "
        "Cassandra's compiler (default: %(default)s)",
    )  # fmt: skip
    add(
        "--window", type=int, default=1000,
        help="updates published and not yet durable at saturation (default: %(default)s)",
    )  # fmt: skip
    add("--connections", type=int, default=8, help="publishers (default: %(default)s)")
    add("--heap", default="2G", help="Cassandra's heap (default: %(default)s)")
    add("--quick", action="store_true", help="one short round: to see that it works")
    add("--json", type=Path, default=_OUT / "bench.json", help="result (default: %(default)s)")
    add("--plot", type=Path, default=_OUT / "bench.png", help="picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.services if name not in SERVICES]
    if unknown:
        parser.error(f"unknown service {', '.join(unknown)}: there are {', '.join(SERVICES)}")
    if options.quick:
        options.rounds, options.seconds, options.warm_up = 1, 4.0, 5.0
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be greater than 0")
    options.logs = _OUT / "bench" / "logs"
    options.logs.mkdir(parents=True, exist_ok=True)
    return options


def _measure(options: argparse.Namespace, cassandra: Cassandra, runs: list[Run]) -> None:
    services = [SERVICES[name] for name in options.services]
    fixed = {"window": options.window, "connections": options.connections}
    if options.warm_up > 0:
        warm = Load(
            saturate_warm_seconds=0, saturate_seconds=options.warm_up,
            rate=0, rate_warm_seconds=0, rate_seconds=0, **fixed,
        )  # fmt: skip
        for service in services:
            _say(f"warming up with {service.name}")
            run(service, 0, warm, cassandra, options.logs)
    load = Load(
        saturate_warm_seconds=3,
        saturate_seconds=options.seconds,
        rate=options.rate,
        rate_warm_seconds=2,
        rate_seconds=options.seconds if options.rate else 0,
        **fixed,
    )
    for round_ in range(1, options.rounds + 1):
        for service in services:
            done = run(service, round_, load, cassandra, options.logs)
            runs.append(done)
            _say(f"round {round_} of {options.rounds}: {service.name:13} {_brief(done)}")


def _brief(done: Run) -> str:
    parts = []
    if phase := done.phases.get("saturation"):
        parts.append(f"{phase.updates_per_second:,.0f} updates/s, {phase.cpu_us:.1f} µs an update")
    if phase := done.phases.get("rate"):
        parts.append(
            f"at {phase.updates_per_second:,.0f}/s {phase.cpu_us:.1f} µs, p99 {phase.p99_ms:.1f} ms"
        )
    return "; ".join([*parts, f"{done.rss_mb:.0f} MB"])


def _report(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    summary = report.summarize(runs)
    print(f"\n{report.table(summary)}")
    if text := report.goals(summary):
        print(f"\n{text}")
    chosen = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "logs"
    }
    report.write_json(options.json, runs, chosen)
    print(f"\nwritten: {options.json}")
    rounds = len({run.round for run in runs})
    try:
        report.plot(
            options.plot, summary, f"median over {rounds} rounds; lines from least to greatest"
        )
        print(f"written: {options.plot}")
    except ImportError:
        _say("no picture: matplotlib is not installed")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
