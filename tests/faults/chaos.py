"""A random schedule of faults on real processes, and what the witness says of it.

Lives here: the run, its ledger, and the command (`scripts/chaos`). Rule: at the end everything is
there again, and every promise must have been kept. Must not come in: which faults there are
(`tests.faults.schedule`), what the promises are (`tests.faults.witness`).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import backing
from backing import BackingError
from tests.faults.schedule import plan
from tests.faults.stage import SLOTS, Stage
from tests.keyspaces import make_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.faults.pod import Pod
    from tests.faults.schedule import Step
    from tests.faults.witness import Verdict

__all__ = ["Interrupts", "Outcome", "run"]

_LOOK_SECONDS = 0.1
_COUNTED = {
    "reconnects": "disconnects_total",
    "retries": "write_retries_total",
    "abandoned": "deliveries_abandoned_total",
    "last copies": "deliveries_done_without_ack_total",
    "batches split": "batches_split_total",
}


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    minutes: float
    pods: int
    slots: bool
    faults: Counter[str] = field(default_factory=Counter)
    """How often each happened."""
    seen: dict[str, int] = field(default_factory=dict)
    """What the services and the wire counted of them."""
    verdict: Verdict | None = None
    """None when the run was left before everything was looked at."""
    interrupted: bool = False
    """Whether it was ended before its time."""

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return self.verdict is not None and not self.verdict.forbidden

    def lines(self) -> Iterator[str]:
        """Yield the ledger for people."""
        ids = "leased client ids" if self.slots else "client ids of their own"
        yield f"seed {self.seed}, {self.minutes:g} minutes, {self.pods} services with {ids}"
        if self.interrupted:
            yield "interrupted: the schedule was not played to its end"
        yield from (f"  {count:>3} x {name}" for name, count in sorted(self.faults.items()))
        yield f"counted: {_listed(self.seen)}"
        if self.verdict is None:
            yield "left before anything was compared: nobody knows whether every promise was kept"
        else:
            yield from self.verdict.lines()
        if not self.kept:
            yield f"repeat with: scripts/chaos --minutes {self.minutes:g} --seed {self.seed}"


def run(
    seed: int,
    seconds: float,
    broker: backing.Mosquitto,
    database: backing.Cassandra,
    keyspace: str,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda _line: None,
    rate: float = 300,
    interrupts: Interrupts | None = None,
) -> Outcome:
    """Run a schedule to its end, or until it is interrupted, and look at everything.

    Args:
        seed: of schedule and traffic.
        seconds: in which faults begin; starting, ending and the last look come on top.
        broker: runs, keeps sessions in a file.
        database: runs, keeps what it confirmed over a kill.
        keyspace: with the schema.
        folder: for logs.
        say: takes one line for each fault.
        rate: messages a second of all publishers together.
        interrupts: of whoever started it; KeyboardInterrupt leaves without looking.
    """
    planned = plan(seed, seconds)
    outcome = Outcome(seed, round(seconds / 60, 3), planned.pods, planned.slots)
    interrupts = interrupts or Interrupts(say)
    stage = Stage(
        broker,
        database,
        keyspace,
        f"chaos{seed}",
        folder,
        settings=SLOTS if planned.slots else {},
        pods=planned.pods,
        seed=seed,
    )
    with _forgiving(outcome), stage:
        interrupts.outcome = outcome
        try:
            _play(stage, seed, planned.steps, rate, outcome, interrupts, say)
        except KeyboardInterrupt:
            outcome.seen = _progress(stage) | _seen(stage)
            raise
    return outcome


def _play(
    stage: Stage,
    seed: int,
    steps: Iterable[Step],
    rate: float,
    outcome: Outcome,
    interrupts: Interrupts,
    say: Callable[[str], None],
) -> None:
    """Let things fail, wait for rest, and enter in `outcome` what came of it."""
    stage.start()
    broker = stage.broker
    assert isinstance(broker, backing.Mosquitto)
    broker.save()
    with (
        stage.traffic(seed=seed, rate=rate / 2),
        stage.traffic(seed=seed + 1, rate=rate / 2, poison=0.1),
    ):
        player = _Player(stage, outcome.faults, say, interrupts)
        with interrupts.awaited():
            player.play(steps)
        player.end()
    outcome.seen = _seen(stage)
    say("everything is back; waiting for rest")
    for pod in stage.pods:
        pod.heal()
    for pod in stage.pods:
        try:
            pod.service.wait_ready(60)
        except AssertionError as error:
            stage.witness.violations.append(f"{pod.name} does not recover: {error}")
    assert isinstance(stage.database, backing.Cassandra)
    if not stage.database.running:
        why = "\n".join(stage.witness.violations)
        raise BackingError(f"Cassandra did not come back, nothing can be compared: {why}")
    outcome.verdict = stage.wait_verdict(120)
    happened = sum(outcome.seen[name] for name in ("reconnects", "retries", "repeated"))
    if outcome.faults and not happened:
        outcome.verdict.forbidden.append("no fault was seen by any service")


@contextmanager
def _forgiving(outcome: Outcome) -> Iterator[None]:
    """A service that logged a defect says so once more when it is ended: once is enough."""
    try:
        yield
    except AssertionError:
        if outcome.verdict is None or outcome.kept:
            raise


class Interrupts:
    """What Ctrl-C does: the first ends the schedule in good order, the next one everything.

    It never breaks into a fault that is being begun or ended, since half of one has no excuse.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.outcome: Outcome | None = None
        """Of the run, as far as it came."""
        self._say = say
        self._awaited = False

    def install(self) -> None:
        """Take SIGINT, which a shell ignores for what it starts in the background, and SIGTERM."""
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._leave)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Let the first one be seen in `happened` alone until the context is left."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    @property
    def happened(self) -> bool:
        """Whether the schedule is to end."""
        return self.outcome is not None and self.outcome.interrupted

    def _interrupt(self, number: int, _frame: object) -> None:
        if self._awaited and not self.happened:
            assert self.outcome is not None
            self.outcome.interrupted = True
            self._say("interrupted: ending what fails at present; once more to leave at once")
        else:
            self._leave(number, _frame)

    def _leave(self, _number: int, _frame: object) -> None:
        # Nothing may break into the end of everything: servers and folders would stay.
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        if self.outcome is not None:
            self.outcome.interrupted = True
        self._say("stopping everything")
        raise KeyboardInterrupt


class _Player:
    """Begins and ends the steps of a schedule, each at its time.

    The schedule's clock stands still while a fault is being begun or ended: to start Cassandra
    takes ten seconds, and what was planned for these must not happen all at once.
    """

    def __init__(
        self,
        stage: Stage,
        faults: Counter[str],
        say: Callable[[str], None],
        interrupts: Interrupts,
    ) -> None:
        self._faults = faults
        self._interrupts = interrupts
        self._stage = stage
        self._say = say
        self._began = self._started = time.monotonic()
        self._running: list[Step] = []

    def play(self, steps: Iterable[Step]) -> None:
        """Begin the faults, and wait until all have ended, or until an interrupt."""
        for step in steps:
            self._wait(step.at)
            if self._interrupts.happened:
                break
            seconds_in = time.monotonic() - self._began
            self._say(f"[{seconds_in:6.1f} s] {step}; {_listed(_progress(self._stage))}")
            self._running.append(step)
            self._attempt(step, step.fault.begin)
            self._faults[f"{step.fault.place}: {step.fault.name}"] += 1
        self._wait(max([self._now(), *(step.until for step in self._running)]))

    def end(self) -> None:
        """End what fails at present."""
        while self._running:
            self._end(self._running[0])

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _wait(self, until: float) -> None:
        while not self._interrupts.happened:
            due = min([until, *(step.until for step in self._running)])
            left = due - self._now()
            if left > 0:
                time.sleep(min(left, _LOOK_SECONDS))
                continue
            ended = [step for step in self._running if step.until <= due]
            for step in ended:
                self._end(step)
            if due == until and not ended:
                return

    def _end(self, step: Step) -> None:
        self._running.remove(step)
        self._attempt(step, step.fault.end)

    def _attempt(self, step: Step, change: Callable[[Stage, Pod], None]) -> None:
        began = time.monotonic()
        try:
            change(self._stage, self._stage.pods[step.pod])
        except (AssertionError, BackingError) as error:
            self._stage.witness.violations.append(f"{step}: {error}")
        self._started += time.monotonic() - began


def _progress(stage: Stage) -> dict[str, int]:
    return {
        "published": len(stage.witness.messages()),
        "acknowledged by the services": len(stage.witness.acked()),
    }


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _seen(stage: Stage) -> dict[str, int]:
    seen = {name: int(stage.seen_total(figure)) for name, figure in _COUNTED.items()}
    for name in ("resumed", "new", "repeated"):
        seen[name] = sum(pod.wire.counts[name] for pod in stage.pods)
    return seen


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status: 0, 1 for a broken promise, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Random faults on a real broker, a real Cassandra and one to three services; "
        "at the end everything that was acknowledged must be there. Ctrl-C ends the schedule and "
        "prints the ledger so far, after everything is back; once more, at once and without.",
    )
    parser.add_argument("--minutes", type=float, default=5, help="how long faults happen (5)")
    parser.add_argument("--seed", type=int, help="of the schedule; a random one by default")
    parser.add_argument("--rate", type=float, default=300, help="messages a second (300)")
    parser.add_argument("--json", action="store_true", help="the ledger as JSON")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    interrupts = Interrupts(say)
    interrupts.install()
    try:
        say(f"seed {seed}; starting broker and Cassandra")
        outcome = _run_alone(seed, options.minutes * 60, options.rate, say, interrupts)
    except KeyboardInterrupt:
        if interrupts.outcome is None:
            say(f"left before anything failed; repeat with --seed {seed}")
            return 130
        outcome = interrupts.outcome
    if options.json:
        sys.stdout.write(json.dumps(asdict(outcome) | {"kept": outcome.kept}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(outcome.lines()) + "\n")
    if outcome.verdict is not None and not outcome.kept:
        return 1
    return 130 if outcome.interrupted else 0


def _run_alone(
    seed: int, seconds: float, rate: float, say: Callable[[str], None], interrupts: Interrupts
) -> Outcome:
    """Run a schedule with a broker and a Cassandra of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shadowsvc-chaos-")))
        broker = stack.enter_context(backing.Mosquitto(persistent=True))
        database = stack.enter_context(backing.Cassandra(settings={"commitlog_sync": "batch"}))
        make_schema(database, "chaos")
        return run(
            seed,
            seconds,
            broker,
            database,
            "chaos",
            folder,
            say=say,
            rate=rate,
            interrupts=interrupts,
        )


if __name__ == "__main__":
    sys.exit(main())
